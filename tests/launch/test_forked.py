"""Worlds forked from a warm process: what comes back, and what is said of those that break."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from launch.forked import run_world


def add_up(world, number):
    total = torch.tensor([number + world.rank])
    dist.all_reduce(total)
    return [world.rank, world.size, int(total)]


def initialised(world):
    return dist.is_initialized()


def die_on_rank_1(world):
    if world.rank == 1:
        print("last words", flush=True)
        os._exit(3)
    dist.barrier()


def break_on_rank_1(world):
    if world.rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def sleep_on_rank_1(world):
    if world.rank == 1:
        time.sleep(600)


def refuse(world):
    raise ValueError("a key = 3:\n set it to 4")


def test_results_come_in_rank_order_and_one_process_has_no_group():
    assert run_world(add_up, 2, 5).results == [[0, 2, 11], [1, 2, 11]]
    assert run_world(initialised, 1).results == [False]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (die_on_rank_1, "rank 1 of 2 died: last words"),
        (break_on_rank_1, "rank 1 of 2 failed: KeyError: 'the reason'"),
    ],
)
def test_the_rank_that_broke_is_named(function, said):
    start = time.monotonic()
    ended = run_world(function, 2, timeout=60)
    assert ended.results is None
    assert ended.refused == ""
    assert ended.problem.startswith(said)
    assert time.monotonic() - start < 30  # the other rank, which waits for ever, was ended


def test_a_world_that_hangs_is_ended():
    ended = run_world(sleep_on_rank_1, 2, timeout=5)
    assert ended.problem.startswith("hangs: no end after 5 s; rank 0 in ")
    assert "rank 1 in " in ended.problem


def test_what_every_rank_refuses_is_one_line():
    assert run_world(refuse, 2).refused == "a key = 3: set it to 4"
