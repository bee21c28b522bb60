"""The paragraph that says why a run stands still, from what ranks report."""

from launch.stall import explain_stall


def opened(number, *, ranks, group="0", op="all_reduce", still=True):
    where = f"parallel/x.py:{number} in f"
    return {
        "op": op, "number": number, "group": group, "ranks": ranks, "shape": [4, 3], "dtype": "float32", "open": still,
        "where": where,
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
