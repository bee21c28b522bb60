"""The helper that all distributed tests stand on must neither hang nor hide a failure."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def add_up(value: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = value + dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), total


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()  # would wait for ever


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        print("last words", flush=True)
        os._exit(3)
    dist.barrier()


def test_results_come_back_in_rank_order():
    results = run_ranks(add_up, 3, torch.tensor([1.0, 2.0]))
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(torch.equal(total, torch.tensor([6.0, 9.0])) for _, total in results)


def test_a_failing_rank_is_reported_and_the_others_are_ended():
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*fail_on_rank_1.*ValueError: the reason"):
        run_ranks(fail_on_rank_1, 2)
    assert time.monotonic() - start < 30


def test_a_hanging_rank_is_ended_and_its_stack_shown():
    with pytest.raises(RankError, match=r"(?s)\[0, 1\] did not end in time.*in hang_on_rank_1"):
        run_ranks(hang_on_rank_1, 2, timeout=3)


def test_a_dying_rank_is_reported_with_its_output():
    with pytest.raises(RankError, match=r"(?s)rank 1 died.*last words"):
        run_ranks(die_on_rank_1, 2)
