"""Heartbeats: what a rank's file says, and what saying it costs."""

import json
import sys
import threading
import time

from launch.readings import find_slowest
from pretrain.heartbeat import ENDED, PATIENCE, Heartbeat, waits_for_ranks


def read(beat):
    return json.loads(beat.path.read_text())


def wait_for(condition, timeout=20.0):
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_file_follows_phases_and_steps(tmp_path):
    with Heartbeat(tmp_path, 3) as beat:
        assert beat.path.name == "rank-00003.json" and read(beat)["phase"] == "starting"
        beat.done(12)
        with beat.phase("saving"):
            wait_for(lambda: read(beat)["phase"] == "saving")
            first = read(beat)
            wait_for(lambda: read(beat)["alive"] > first["alive"])
            assert read(beat)["time"] == first["time"], "alive moves on, the rank does not"
        assert beat.phase_name == "step" and first["step"] == 12
    assert read(beat)["phase"] == ENDED and {"host", "pid", "job", "restart"} <= read(beat).keys()


def test_a_beat_takes_microseconds(tmp_path):
    with Heartbeat(tmp_path, 0) as beat:
        times = []
        for _ in range(50):
            begin = time.perf_counter()
            for step in range(100):
                with beat.phase("saving"):
                    pass
                beat.done(step)
            times.append((time.perf_counter() - begin) / 100)
    assert min(times) < 60e-6, "three beats of at most 20 us"


def test_each_item_is_a_sign_of_life(tmp_path):
    beat = Heartbeat(tmp_path, 0)
    assert list(beat.each("abc")) == ["a", "b", "c"] and beat.beats == 3


def test_a_folder_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "heartbeats").write_text("no folder")
    with Heartbeat(tmp_path, 0) as beat:
        beat.done(1)


def test_the_pace_counts_waiting_for_data_as_own(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with Heartbeat(tmp_path, 0, every=2) as beat:
        for step in range(1, 14):
            with beat.phase("waiting for data"):
                time.sleep(0.2)
            time.sleep(0.1)
            beat.done(step)
        wait_for(lambda: beat.window >= 1)
    assert 0.25 < beat.pace.step < 3 and beat.pace.own == beat.pace.step
    assert 0.3 < beat.pace.data / beat.pace.own < 0.95


def test_on_gpus_the_own_time_is_missing_not_wrong(tmp_path, monkeypatch):
    """Hosts wait for their devices alike, whichever rank is slow."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with Heartbeat(tmp_path, 0, every=1) as beat:
        for step in range(1, 14):
            time.sleep(0.2)
            beat.done(step)
        wait_for(lambda: beat.window >= 1)
    assert beat.pace.own is None and beat.pace.step > 0.1
    record = read(beat)
    assert record["own_s"] is None and record["step_s"] > 0.1
    assert find_slowest({0: record, 1: record | {"rank": 1}}) is None


def test_a_thread_in_a_collective_waits_for_others():
    source = "def wait(event):\n    event.wait()\n"
    scope = {}
    exec(compile(source, "torch/distributed/distributed_c10d.py", "exec"), scope)
    event = threading.Event()
    thread = threading.Thread(target=scope["wait"], args=(event,))
    thread.start()
    try:
        wait_for(lambda: waits_for_ranks(sys._current_frames()[thread.ident]))
        assert not waits_for_ranks(sys._current_frames()[threading.get_ident()])
    finally:
        event.set()
        thread.join()


def test_every_phase_has_its_patience():
    assert min(PATIENCE.values()) == 1 and PATIENCE["step"] == PATIENCE["waiting for data"] == 1
