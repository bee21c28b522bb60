"""Megatron-Core on a host without CUDA: stand-ins for the few calls by which it says "this process's GPU"."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor
from torch.overrides import TorchFunctionMode

HOST = torch.device("cpu")
# Work on the host is done in order: streams and events have nothing to say.
CUDA: dict[str, Any] = {
    "current_device": lambda: HOST,
    "synchronize": lambda *_: None,
    "Stream": mock.MagicMock,
    "current_stream": mock.MagicMock,
    "stream": lambda _: nullcontext(),
}
_all_gather = dist.all_gather
_all_to_all = token_dispatcher.all_to_all


class _OnHost(TorchFunctionMode):
    """device="cuda" is the host; the type of a tensor reads as that of one on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        if kwargs.get("device") is not None and str(kwargs["device"]).startswith("cuda"):
            kwargs = {**kwargs, "device": HOST}
        found = func(*args, **kwargs)
        if func is Tensor.type and isinstance(found, str):
            return found.replace("torch.", "torch.cuda.", 1)
        return found


def _gather(outputs: list[Tensor], own: Tensor, group: Any = None, async_op: bool = False) -> None:
    """all_gather, of parts of different lengths too, which gloo lacks."""
    assert not async_op
    longest = max(len(output) for output in outputs)
    padded = own.new_zeros(longest, *own.shape[1:])
    padded[: len(own)] = own
    every = [torch.empty_like(padded) for _ in outputs]
    _all_gather(every, padded, group=group)
    for output, part in zip(outputs, every, strict=True):
        output.copy_(part[: len(output)])


def _scatter(
    output: Tensor, parts: list[Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> None:
    """reduce_scatter, to parts of different lengths too."""
    assert not async_op
    total = torch.cat(parts)
    dist.all_reduce(total, op=op, group=group)
    output.copy_(total.split([len(part) for part in parts])[dist.get_rank(group)])


def _listed(group: Any, rows: Tensor, received: Any = None, sent: Any = None, **options: Any) -> Any:
    """Megatron's all-to-all: sizes that it has moved to the host are tensors still where they never left it."""
    sizes = [size.tolist() if isinstance(size, Tensor) else size for size in (received, sent)]
    return _all_to_all(group, rows, *sizes, **options)


@contextmanager
def on_host() -> Iterator[None]:
    """Where this process has CUDA, nothing; else the stand-ins, for as long as the context lasts."""
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.multiple(torch.cuda, **CUDA))
            stack.enter_context(mock.patch.object(token_dispatcher, "all_to_all", _listed))
            # Not by the mode below, which backward does not enter.
            stack.enter_context(mock.patch.multiple(dist, all_gather=_gather, reduce_scatter=_scatter))
            stack.enter_context(_OnHost())
        yield
