"""The process dies, or the disk fails, at every single file-system call of a save; what is left must load."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints.collective import CheckpointError
from checkpoints.store import CheckpointStore
from tests.ranks import _context  # its fork server has imported torch

# All that changes files, and opening them. Those of `pathlib` and `shutil` come here too.
CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")
OLD, NEW, NEXT = 5, 6, 7


def content(step: int) -> dict:
    return {
        "model": {f"layers.{index}.weight": torch.full((3, 4), float(step)) for index in range(2)},
        "optimizer": {"step": torch.tensor(step)},
        "state": {"value": step},
    }


def save(store: CheckpointStore, step: int, background: bool) -> None:
    """Ends when the checkpoint is there."""
    if background:
        assert store.save_async(step, **content(step))
        store.finish()
    else:
        store.save(step, **content(step))


def at_call(number: int, instead: Callable[[Callable, tuple, dict], None]) -> list[str]:
    """From now on file-system calls are counted; `instead` gets that of this number. Their names, as they come."""
    seen: list[str] = []

    def counted(name: str, real: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            seen.append(name)
            if len(seen) == number:
                instead(real, args, kwargs)
            return real(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    return seen


def die(real: Callable, args: tuple, kwargs: dict) -> None:
    """Before the call; of a write, in the middle."""
    if isinstance(args[-1], bytes | memoryview):
        real(args[0], args[1][: len(args[1]) // 2])
    os._exit(1)


def save_and_die(folder: Path, call: int, background: bool) -> None:
    """Saves a new step, and that step again: it is replaced, and the old one is pruned."""
    torch.set_num_threads(1)
    store = CheckpointStore(folder, keep=1)
    save(store, OLD, background)
    at_call(call, die)
    save(store, NEW, background)
    save(store, NEW, background)
    os._exit(0)


def check_folder(folder: Path, calls: int) -> None:
    """The old or the new checkpoint is whole; whatever is listed is; and saving goes on as if nothing had been."""
    store = CheckpointStore(folder, keep=1)
    infos = store.list()
    assert infos and all(store.verify(info.step) == [] for info in infos), calls
    assert store.newest_whole() in (OLD, NEW), calls
    target = content(0)
    state = store.load(None, target["model"], target["optimizer"])
    step = state["step"]
    assert state["value"] == step == store.newest_whole(), calls
    assert all((tensor == step).all() for part in ("model", "optimizer") for tensor in target[part].values()), calls
    save(store, NEXT, background=False)
    assert [path.name for path in folder.iterdir()] == ["step-00000007"], calls


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_death_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, background: bool):
    call, ended = 0, False
    while not ended:
        call += 1
        folder = tmp_path / str(call)
        process = _context.Process(target=save_and_die, args=(folder, call, background))
        process.start()
        process.join(60)
        ended = process.exitcode == 0
        assert process.exitcode in (0, 1), call
        check_folder(folder, call)
    assert call > 60  # so many there are at the least in two saves


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_at_any_call_spares_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
):
    def fail(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in range(1, 100):
        with monkeypatch.context() as patched:
            for name in CALLS:
                patched.setattr(os, name, getattr(os, name))  # so that they are put back
            store = CheckpointStore(tmp_path / str(call), keep=1)
            save(store, OLD, background)
            seen = at_call(call, fail)
            if background:
                assert store.save_async(NEW, **content(NEW))
                store._background.wait()  # type: ignore[union-attr]
                (report,) = store.reports()[-1:]
                message = report.error
            else:
                try:
                    store.save(NEW, **content(NEW))
                    message = ""
                except CheckpointError as error:
                    message = str(error)
        if message:
            assert "earlier checkpoints are untouched" in message and "No space left on device; free some" in message
            assert [path for path in store.folder.glob(".tmp*") if "pruned" not in path.name] == [], call
        else:
            assert store.newest_whole() == NEW, call
        if background:
            store.finish()  # tries again
            assert store.newest_whole() == NEW, call
            store.close()
        check_folder(store.folder, call)
        if len(seen) < call:
            return
    pytest.fail("the save never came to its end")
