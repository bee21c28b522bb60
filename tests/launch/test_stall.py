"""The paragraph that says why a run stands still, from what ranks report."""

from launch.flight import describe
from launch.stall import explain_stall


def opened(number, *, ranks, group="0", op="all_reduce", still=True, **more):
    where = f"parallel/x.py:{number} in f"
    return {
        "op": op, "number": number, "group": group, "ranks": ranks, "shape": [4, 3], "dtype": "float32", "open": still,
        "where": where, "backend": "gloo", "p2p": False, "started": False, **more,
    }  # fmt: skip


def report(rank, *collectives, waits=True, reading=None, phase="step"):
    return {
        "rank": rank, "host": f"n{rank}", "pid": 100 + rank, "step": 7, "phase": phase, "silence": 61.0, "waits": waits,
        "where": f"pretrain/y.py:{rank} in g", "reading": reading, "collectives": list(collectives),
    }  # fmt: skip


def explain(reports, world):
    beat = {"host": "h", "pid": 1, "step": 6, "phase": "saving", "alive": "2026-01-01T00:00:00+00:00"}
    return explain_stall({each["rank"]: each for each in reports}, dict.fromkeys(range(world), beat), 60)


def test_a_rank_before_a_collective():
    late = report(1, opened(4, ranks=[0, 1, 2], still=False), waits=False, reading="a.tar", phase="waiting for data")
    text = explain([report(0, opened(5, ranks=[0, 1, 2])), late, report(2, opened(5, ranks=[0, 1, 2]))], 3)
    assert text == (
        "no progress for 60 s; rank 1 has not come to all_reduce (4x3 float32, number 5 of ranks 0-2, parallel/x.py:5 "
        'in f), in which ranks 0, 2 wait; rank 1 (n1, process 101) stands since 61 s in phase "waiting for data" after '
        "step 7 at pretrain/y.py:1 in g, at a.tar"
    )


def test_a_chain_of_waiting_ranks_ends_at_the_one_that_waits_for_nobody():
    """0 waits for 1 in one group, 1 for 2 in another: 2 it is."""
    first = report(0, opened(9, ranks=[0, 1], group="a"))
    second = report(1, opened(3, ranks=[1, 2], group="b"))
    text = explain([first, second, report(2, waits=False)], 3)
    assert "rank 2 has not come to all_reduce (4x3 float32, number 3 of ranks 1-2," in text
    assert "rank 0 has" not in text and "rank 1 has" not in text


def test_silent_ranks_are_told_by_their_heartbeats():
    text = explain([report(0, opened(5, ranks=[0, 1, 2]))], 3)
    assert "ranks 1-2 have not come to all_reduce" in text and "in which rank 0 waits" in text
    assert "rank 2 (h, process 1) does not respond" in text and 'at step 6, in phase "saving"' in text


def test_ranks_in_different_collectives_are_both_told():
    """Neither comes to the other's: a mismatch in the program."""
    everyone = [0, 1]
    left = report(0, opened(5, ranks=everyone, group="a"))
    right = report(1, opened(8, ranks=everyone, group="b", op="broadcast"))
    text = explain([left, right], 2)
    assert "rank 1 has not come to all_reduce" in text and "rank 1 (n1, process 101) stands" in text


def test_a_collective_that_all_have_come_to():
    text = explain([report(rank, opened(5, ranks=[0, 1])) for rank in range(2)], 2)
    assert "all its ranks are in all_reduce (4x3 float32, number 5 of ranks 0-1" in text


def test_without_a_record_of_collectives_the_stacks_tell():
    text = explain([report(0), report(1, waits=False, phase="saving")], 2)
    assert 'rank 1 (n1, process 101) stands since 61 s in phase "saving"' in text
    assert "rank 0 waits at pretrain/y.py:0 in g" in text


def on_device(number, started=None, **more):
    """A collective of NCCL. started: False, True where torch records it; None: ended."""
    more = {"ranks": [0, 1, 2], "backend": "nccl"} | more
    return opened(number, still=started is not None, started=bool(started), **more)


def waiting_for_device(rank, *collectives):
    """Its host is in no collective call."""
    return report(rank, *collectives, waits=False)


def test_of_ranks_that_wait_for_their_devices_the_one_that_never_called_is_named():
    """Hosts run ahead: the others have called more than the one collective that hangs."""
    ahead = [on_device(5, False), on_device(8, False, group="b"), on_device(6, False)]
    late = report(1, on_device(4), waits=False, reading="a.tar", phase="waiting for data")
    text = explain([waiting_for_device(0, *ahead), late, waiting_for_device(2, *ahead)], 3)
    assert "rank 1 has not come to all_reduce (4x3 float32, number 5 of ranks 0-2, parallel/x.py:5 in f)" in text
    assert "in which ranks 0, 2 wait; rank 1 (n1, process 101) stands" in text and "at a.tar" in text
    assert "rank 0 (" not in text and "rank 2 (" not in text


def test_a_device_that_does_not_begin_what_others_are_in():
    """As behind a kernel that hangs; the next one hangs behind it in turn."""
    others = [waiting_for_device(rank, on_device(5, True), on_device(6, False)) for rank in (0, 2)]
    text = explain([*others, waiting_for_device(1, on_device(5, False), on_device(6, False))], 3)
    assert (
        "the device of rank 1 has not begun all_reduce (4x3 float32, number 5 of ranks 0-2, parallel/x.py:5 in f), in "
        "which ranks 0, 2 wait: what was queued before it hangs there; rank 1 (n1, process 101) stands"
    ) in text
    assert "rank 0 (" not in text


def test_a_device_that_waits_in_another_collective_is_no_cause():
    """1 has not begun what 0 is in, being in another one, to which 2 has not come."""
    first = waiting_for_device(0, on_device(9, True, ranks=[0, 1]))
    pair = {"ranks": [1, 2], "group": "b"}
    second = waiting_for_device(1, on_device(20, True, **pair), on_device(9, False, ranks=[0, 1]))
    text = explain([first, second, waiting_for_device(2, on_device(19, **pair))], 3)
    assert "rank 2 has not come to all_reduce (4x3 float32, number 20 of ranks 1-2" in text
    assert "rank 1 has" not in text and "device" not in text


def test_a_collective_that_ends_on_some_devices_alone():
    others = [waiting_for_device(rank, on_device(5), on_device(6, False)) for rank in (0, 2)]
    text = explain([*others, waiting_for_device(1, on_device(5, False), on_device(6, False))], 3)
    assert (
        "number 5 of ranks 0-2, parallel/x.py:5 in f) does not end on rank 1, while it has ended on ranks 0, 2" in text
    )


def test_a_collective_that_all_devices_are_in():
    def text(started):
        return explain([waiting_for_device(rank, on_device(5, started)) for rank in range(3)], 3)

    what = "all_reduce (4x3 float32, number 5 of ranks 0-2, parallel/x.py:5 in f), which does not end"
    assert f"all its ranks have begun {what}: look at the network between them" in text(True)
    assert f"all its ranks have called {what}: look at" in text(False) and "TORCH_NCCL_ENABLE_TIMING" in text(False)
    assert "stands since" not in text(True) + text(False)


def test_of_collectives_that_all_have_called_the_first_is_told():
    """2 has only the one that hangs behind it on 1."""
    pair = {"ranks": [1, 2], "group": "b"}
    first = waiting_for_device(0, on_device(5, False, ranks=[0, 1]))
    second = waiting_for_device(1, on_device(5, False, ranks=[0, 1]), on_device(3, False, **pair))
    text = explain([first, second, waiting_for_device(2, on_device(3, False, **pair))], 3)
    assert "all its ranks have called all_reduce (4x3 float32, number 5 of ranks 0-1" in text


def test_a_device_without_collectives_holds_the_others_up():
    """Its host waits for it too, but it has nothing open."""
    text = explain([waiting_for_device(0, on_device(5, False, ranks=[0, 1])), waiting_for_device(1)], 2)
    assert "rank 1 has not come to all_reduce" in text and "rank 1 (n1, process 101) stands" in text


def test_backends_of_one_group_count_for_themselves():
    """Gloo's hundredth collective does not mean that a rank has come to NCCL's fifth."""
    late = report(1, opened(100, ranks=[0, 1], still=False), waits=False)
    text = explain([waiting_for_device(0, on_device(5, False, ranks=[0, 1])), late], 2)
    assert "rank 1 has not come to all_reduce (4x3 float32, number 5" in text


def test_sends_and_receives_of_devices_are_told():
    pair = {"ranks": [0, 1], "p2p": True}
    left = waiting_for_device(0, on_device(3, False, op="recv 0<-1", **pair))
    text = explain([left, waiting_for_device(1, on_device(2, False, op="recv 1<-0", **pair))], 2)
    assert "rank 0 waits in recv 0<-1 (4x3 float32, number 3 of ranks 0-1, parallel/x.py:3 in f)" in text
    assert "rank 1 waits in recv 1<-0" in text and "stands since" not in text


def entry(record, name, *, state="scheduled", number=1, p2p=0, retired=False, **more):
    """As torch's record of NCCL has it."""
    return {
        "frames": [{"filename": "/x.py", "line": record, "name": "f"}], "process_group": ("0", "default_pg"),
        "collective_seq_id": number, "p2p_seq_id": p2p, "profiling_name": name, "time_created_ns": record,
        "input_sizes": [[4, 3]], "input_dtypes": ["BFloat16"], "state": state, "retired": retired, "is_p2p": p2p > 0,
        **more,
    }  # fmt: skip


def test_what_is_read_from_torchs_record():
    """Of what is sent as one, the parts never get a state of their own."""
    whole = {"input_sizes": [], "input_dtypes": []}
    entries = [
        entry(1, "nccl:all_reduce", state="completed", number=1),
        entry(2, "nccl:send 0->1", number=2, p2p=1),
        entry(3, "nccl:coalesced", number=2, p2p=1, retired=True, **whole),
        entry(5, "nccl:all_gather", state="started", number=3),
        entry(6, "nccl:recv 0<-1", number=4, p2p=2),
        entry(7, "nccl:coalesced", number=4, p2p=2, **whole),
        entry(4, "gloo:broadcast", number=1, retired=True),
    ]
    found = describe(entries, {"0": [0, 1]})
    assert [(each["op"], each["backend"], each["open"], each["started"]) for each in found] == [
        ("all_reduce", "nccl", False, False),
        ("send 0->1", "nccl", False, False),
        ("coalesced", "nccl", False, False),
        ("broadcast", "gloo", False, False),
        ("all_gather", "nccl", True, True),
        ("recv 0<-1", "nccl", True, False),
        ("coalesced", "nccl", True, False),
    ]
    assert found[4] | {"where": ""} == {
        "op": "all_gather", "backend": "nccl", "number": 3, "group": "0", "ranks": [0, 1], "shape": [4, 3],
        "dtype": "bfloat16", "p2p": False, "open": True, "started": True, "where": "",
    }  # fmt: skip
    assert found[5]["p2p"] and found[5]["where"] == "/x.py:6 in f"
