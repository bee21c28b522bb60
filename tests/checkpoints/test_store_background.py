"""Saves in the background, over two ranks: what they hold, how they follow each other, and how they fail."""

import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from checkpoints import commit
from checkpoints.collective import CheckpointError
from checkpoints.store import CheckpointStore
from tests.ranks import run_ranks


def content(value: float) -> dict[str, Any]:
    """Sharded, replicated and tied tensors, and the state."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.full((6, 4), value)
    return {
        "model": {
            "sharded": distribute_tensor(torch.full((7, 4), value), mesh, [Shard(0)]),
            "replicated": whole,
            "tied": whole,
            "other": torch.full((6, 4), value + 0.5),
        },
        "optimizer": {"step": torch.tensor(value)},
        "state": {"value": value},
        "ties": {"tied": "replicated"},
        "rank_state": dist.get_rank(),
    }


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def loaded(store: CheckpointStore, step: int) -> tuple[list[float], Any]:
    """The distinct values of the checkpoint, less 0.5 for "other"; and the ranks' states."""
    target = content(-1.0)
    state = store.load(step, target["model"], target["optimizer"])
    target["model"]["other"] -= 0.5
    tensors = [*target["model"].values(), *target["optimizer"].values()]
    return sorted({float(value) for tensor in tensors for value in local(tensor).flatten()}), state["ranks"]


def overwrite(saved: dict[str, Any]) -> None:
    for tensor in (*saved["model"].values(), *saved["optimizer"].values()):
        local(tensor).fill_(99.0)


class Held:
    """Holds back this rank's writing until `release` is set."""

    def __init__(self) -> None:
        self.release, self.real = threading.Event(), commit.write_shard

    def __enter__(self) -> "Held":
        def wait_and_write(*args: Any) -> Any:
            assert self.release.wait(30)
            return self.real(*args)

        commit.write_shard = wait_and_write  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        commit.write_shard = self.real


def values_are_those_of_the_call(folder: Path) -> None:
    store = CheckpointStore(folder, keep=9)
    for step in (1, 2, 3):
        saved = content(float(step))
        assert store.save_async(step, **saved)
        overwrite(saved)  # as the next training step does
    store.finish()
    for step in (1, 2, 3):
        assert loaded(store, step) == ([float(step)], [0, 1])
    assert [report.step for report in store.reports()] == [1, 2, 3] and store.reports() == []
    store.close()


def buffers_are_allocated_once_and_hold_a_share(folder: Path) -> None:
    store = CheckpointStore(folder)
    saved = content(1.0)
    store.prepare(saved["model"], saved["optimizer"], ties=saved["ties"])
    background = store._background
    assert background is not None and background.staging is not None
    first = {part: buffer.data_ptr() for part, buffer in background.staging._buffers.items()}
    store.save_async(1, **saved)
    store.save_async(2, **content(2.0))
    store.finish()
    assert {part: buffer.data_ptr() for part, buffer in background.staging._buffers.items()} == first
    sizes = [sum(len(buffer) for buffer in background.staging._buffers.values())] * 2
    dist.all_gather_object(sizes, sizes[0])
    # 7 rows sharded as 4 and 3, two tensors of 6 rows that both ranks hold, one scalar; the tie is not copied
    assert sum(sizes) == (7 + 6 + 6) * 4 * 4 + 4 and max(sizes) < 0.6 * sum(sizes)
    grown = content(3.0)
    grown["model"]["more"] = torch.full((2,), 3.0)
    store.save_async(3, **grown)  # other tensors: planned and allocated anew
    store.finish()
    assert store.verify(3) == [] and [report.error for report in store.reports()] == ["", "", ""]
    store.close()


def a_busy_rank_makes_all_skip_or_wait(folder: Path) -> None:
    store, rank = CheckpointStore(folder, keep=9), dist.get_rank()
    with Held() as held:
        if rank == 0:
            held.release.set()  # only rank 1 is slow
        assert store.save_async(1, **content(1.0))
        assert not store.save_async(2, **content(2.0), skip_if_busy=True)
        dist.barrier()
        threading.Timer(0.3, held.release.set).start()
        start = time.monotonic()
        assert store.save_async(3, **content(3.0))
        assert rank == 0 or time.monotonic() - start > 0.2
        store.finish()
    assert [info.step for info in store.list()] == [1, 3]
    assert loaded(store, 1)[0] == [1.0] and loaded(store, 3)[0] == [3.0]
    with Held() as held:
        threading.Timer(0.3, held.release.set).start()
        store.save_async(4, **content(4.0))
        store.save(5, **content(5.0))  # in the foreground: waits too
    assert loaded(store, 4)[0] == [4.0] and loaded(store, 5)[0] == [5.0]
    store.close()


def what_training_says_never_meets_the_background(folder: Path) -> None:
    store, world = CheckpointStore(folder), dist.get_world_size()
    for step in (1, 2, 3):
        with Held() as held:
            store.save_async(step, **content(float(step)))
            for turn in range(40):
                total = torch.tensor([float(turn)])
                dist.all_reduce(total)
                assert total.item() == turn * world
                if turn == 20:
                    held.release.set()
            store.finish()
    assert [report.error for report in store.reports()] == [""] * 3
    store.close()


def limited(size: int) -> None:
    """The file size limit stands in for a full disk; Python ignores SIGXFSZ, so that writing raises EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def a_failure_is_reported_and_made_good(folder: Path) -> None:
    store, rank = CheckpointStore(folder, keep=9), dist.get_rank()
    store.save_async(1, **content(1.0))
    store.finish()
    store.reports()
    assert store._background is not None
    if rank == 1:
        limited(50)
    store.save_async(2, **content(2.0))  # does not raise
    store._background.wait()
    (report,) = store.reports()
    text = str(report)
    assert text.startswith("a save in the background failed, the next one tries again: step 2 was not")
    assert "File too large; raise the file size limit (ulimit -f) (rank 1)" in text and "\n" not in text
    assert [info.step for info in store.list()] == [1] and store.verify(1) == []
    with pytest.raises(CheckpointError, match=r"step 2 was not saved in .*File too large"):
        store.finish()  # tries once more
    limited(resource.RLIM_INFINITY)
    dist.barrier()
    overwrite(content(2.0))
    store.finish()  # the copy is still there
    assert loaded(store, 2)[0] == [2.0]
    if rank == 1:
        limited(50)
    store.save_async(3, **content(3.0))
    store._background.wait()
    limited(resource.RLIM_INFINITY)
    dist.barrier()
    store.save_async(4, **content(4.0))
    store.finish()
    assert [info.step for info in store.list()] == [1, 2, 4]
    assert [bool(report.error) for report in store.reports()] == [True, False]
    store.close()


def mistakes_are_raised_at_the_call(folder: Path) -> None:
    store = CheckpointStore(folder)
    with pytest.raises(CheckpointError, match=r"step 1 was not saved.*state\.a is a set: only JSON"):
        store.save_async(1, {}, {}, {"a": {1}} if dist.get_rank() else {})
    uneven = DTensor.from_local(torch.ones(3, 2), init_device_mesh("cpu", (2,)), [Shard(0)], run_check=False)
    wrong = {"w": DTensor.from_local(uneven.to_local(), uneven.device_mesh, [Shard(0)], shape=torch.Size((4, 2)), stride=(2, 1), run_check=False)}  # fmt: skip # noqa: E501
    with pytest.raises(CheckpointError, match="'w' has local shape"):
        store.save_async(1, wrong, {}, {})
    assert store.save_async(1, **content(1.0))
    store.close()  # waits, on each rank by itself
    assert store.verify(1) == []


CASES: list[Callable[[Path], None]] = [
    values_are_those_of_the_call,
    buffers_are_allocated_once_and_hold_a_share,
    a_busy_rank_makes_all_skip_or_wait,
    what_training_says_never_meets_the_background,
    a_failure_is_reported_and_made_good,
    mistakes_are_raised_at_the_call,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_two_ranks(case: Callable[[Path], None], tmp_path: Path):
    run_ranks(case, 2, tmp_path)


def test_one_process_without_a_group(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    weight = torch.ones(3)
    store.save_async(1, {"w": weight}, {}, {})
    weight.zero_()
    store.finish()
    store.close()
    target = {"w": torch.zeros(3)}
    CheckpointStore(tmp_path).load(1, target)
    assert target["w"].all()


def test_a_copy_that_does_not_fit_is_refused(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    huge = torch.empty(1).expand(2**45)
    with pytest.raises(
        CheckpointError,
        match=r"async needs 140737.5 GB of host memory in this process: set",
    ):
        store.prepare({"w": huge}, {})
