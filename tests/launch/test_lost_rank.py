"""Ranks that a scheduler started on its own, and that nobody ends when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import free_port
from tests.small import small_overrides

pytestmark = pytest.mark.slow


def start_rank(rank: int, world: int, port: int, arguments: list[str]) -> subprocess.Popen[str]:
    address = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-P", "-m", "launch.cli", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_the_others_end_within_a_minute_and_say_who_they_are(tmp_path, tiny_shards):
    layout = ["train.steps=100000", "train.micro_batch=2", "data.seq_len=66", "parallel.tp=3"]
    port, metrics = free_port(), tmp_path / "run/metrics.jsonl"
    arguments = ["run", "tiny", *small_overrides(tmp_path / "run", tiny_shards), *layout]
    ranks = [start_rank(i, 3, port, arguments) for i in range(3)]
    try:
        deadline = time.monotonic() + 90
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 1):
            assert time.monotonic() < deadline and ranks[0].poll() is None
            time.sleep(0.1)
        ranks[1].send_signal(signal.SIGKILL)
        died = time.monotonic()
        for rank in (0, 2):
            _, errors = ranks[rank].communicate(timeout=60)
            assert ranks[rank].returncode == 1
            assert f"pretrain: error: rank {rank} of 3: another process is gone" in errors
        assert time.monotonic() - died < 60
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_ranks_with_different_settings_do_not_start(tmp_path, tiny_shards):
    port, shared = free_port(), small_overrides(tmp_path / "run", tiny_shards)
    ranks = [start_rank(i, 2, port, ["run", "tiny", *shared, f"train.steps={5 + i}"]) for i in range(2)]
    outputs = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "rank 0 and rank 1 of 2 run different settings: train.steps = 5 and 6" in outputs[0]
    assert not Path(tmp_path / "run/config.toml").exists()
