"""A ledger of what a piece of code communicates, by the kernels it dispatches."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = {
    "all_gather": ("allgather_base", "all_gather_into_tensor", "allgather_into_tensor_coalesced"),
    "reduce_scatter": ("reduce_scatter_base", "reduce_scatter_tensor"),
    "all_reduce": ("allreduce", "all_reduce"),
    "all_to_all": ("alltoall_base", "all_to_all_single"),
    "send": ("send",),
    "other": ("broadcast", "scatter", "gather", "alltoall", "allgather", "all_gather", "reduce", "reduce_scatter"),
}


class Ledger(TorchDispatchMode):
    """Counts collectives, and the bytes of the larger of their input and output on one rank, while it is active; of an
    all-to-all those of its input: over all ranks what is given is what is got."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            name = func._schema.name.partition("::")[2].strip("_")
            kind = next((kind for kind, ops in NAMES.items() if name in ops), None)
            if kind is not None:
                given = args[1 if func.namespace == "c10d" else 0] if kind == "all_to_all" else (args, result)
                tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
                self.calls[kind] += 1
                self.bytes[kind] += max((tensor.nbytes for tensor in tensors), default=0)
        return result
