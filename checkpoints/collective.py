"""What all ranks of a checkpoint do together: agree on values, and fail together.

Only JSON travels (as byte tensors over gloo), never pickles. Without an initialised process group everything
works for the one process there is.
"""

import errno
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or cannot be read into this run. The message is one line."""


KINDS: dict[str, type[Exception]] = {
    "CheckpointError": CheckpointError, "FileNotFoundError": FileNotFoundError, "RuntimeError": RuntimeError,
}  # fmt: skip
CURES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EACCES: "make the folder writable",
    errno.EROFS: "use another folder",
}


class Ranks:
    """The processes that save and load together.

    Creating it is collective where the default backend is not gloo: it then opens a gloo group of its own, so
    that the little that ranks tell each other never touches an accelerator. own_group: open one in any case, for a
    thread whose words must not be taken for those of another.
    """

    def __init__(self, *, own_group: bool = False) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            shared = dist.get_backend() == "gloo" and not own_group
            self.group = dist.group.WORLD if shared else dist.new_group(backend="gloo")

    def gather(self, value: Any) -> list[Any]:
        """Collective. Every rank's `value` (JSON), in rank order."""
        if self.group is None:
            return [value]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([payload.numel()]), group=self.group)
        widest = max(int(size) for size in sizes)
        padded = torch.zeros(widest, dtype=torch.uint8)
        padded[: payload.numel()] = payload
        received = [torch.empty(widest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(received, padded, group=self.group)
        return [json.loads(bytes(r[: int(size)].numpy())) for r, size in zip(received, sizes, strict=True)]

    def union(self, flags: torch.Tensor) -> torch.Tensor:
        """Collective. True (N,) where any rank's `flags` (N,) is true."""
        merged = flags.to(torch.uint8)
        if self.group is not None:
            dist.all_reduce(merged, op=dist.ReduceOp.MAX, group=self.group)
        return merged.bool()

    def together(self, action: Callable[[], Any], *, name_rank: bool = True) -> list[Any]:
        """Collective. Runs `action` everywhere; all results (JSON), or the first failure, on every rank.

        `action` must hold no collective of its own, which another rank's failure would leave waiting.
        """
        result, error = None, None
        try:
            result = action()
        except Exception as caught:
            error = caught
        replies = self.gather({"result": result, "error": error and explain(error)})
        for rank, reply in enumerate(replies):
            if reply["error"]:
                kind, text = reply["error"]
                shared = KINDS[kind](f"{text} (rank {rank})" if name_rank and self.size > 1 else text)
                shared.on_all_ranks = True  # type: ignore[attr-defined]  # so that it is reported once
                raise shared from error
        return [reply["result"] for reply in replies]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Collective. Runs `action` on rank 0 alone; its result (JSON), or its failure, on every rank."""
        return self.together(lambda: action() if self.rank == 0 else None, name_rank=False)[0]

    def everywhere(self, action: Callable[[], Any]) -> Any:
        """Collective. Runs `action` everywhere; this rank's result, of any type, or the first failure."""
        kept: list[Any] = []
        self.together(lambda: kept.append(action()))
        return kept[0]


def explain(error: BaseException) -> tuple[str, str]:
    """(key of KINDS, one line) for any exception. What is no mistake of the user's becomes a RuntimeError."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        text += f"; {CURES[error.errno]}" if error.errno in CURES else ""
    else:
        text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return "FileNotFoundError", text
    if isinstance(error, OSError | ValueError):
        return "CheckpointError", text
    return "RuntimeError", f"{type(error).__name__}: {text}"
