"""Megatron-Core on a host without CUDA: stand-ins for the few calls by which it says "this process's GPU"."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HOST = torch.device("cpu")


class _OnHost(TorchFunctionMode):
    """device="cuda" is the host; the type of a tensor reads as that of one on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None and str(kwargs["device"]).startswith("cuda"):
            kwargs = {**kwargs, "device": HOST}
        found = func(*args, **kwargs)
        if func is Tensor.type and isinstance(found, str):
            return found.replace("torch.", "torch.cuda.", 1)
        return found


@contextmanager
def on_host() -> Iterator[None]:
    """Where this process has CUDA, nothing; else the stand-ins, for as long as the context lasts."""
    if torch.cuda.is_available():
        yield
        return
    calls: dict[str, Any] = {
        "current_device": lambda: HOST,
        "synchronize": lambda *_: None,
        "Stream": mock.MagicMock,  # work on the host is in order without them
        "Event": mock.MagicMock,
    }
    with mock.patch.multiple(torch.cuda, **calls), _OnHost():
        yield
