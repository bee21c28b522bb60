"""Activation recomputation: trade compute for memory, block by block."""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

# Expensive to compute for their size: selective recomputation keeps the results of these, of every fused attention
# kernel (known by its name: torch's, flash-attn's and our own are many) and of communication whose result is no larger
# than its input, and recomputes the rest.
SAVED_OPS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._grouped_mm.default}
SAVED_NAMES = ("attention", "attn", "reduce_scatter", "all_to_all")


def apply_remat(block: nn.Module, recompute: Recompute) -> None:
    """Make `block` recompute its activations in backward, in place; module and parameter names stay.

    full: keep the block's inputs only. selective: keep the results of matrix products and of fused attention too.
    """
    if recompute == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    whole = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:  # no partial: dynamo leaves those uncompiled without a word
        return checkpoint(whole, *args, **options, **kwargs)

    block.forward = forward


def hide_hooks(module: nn.Module) -> None:
    """Keep what FSDP's hooks around `module` do from selective recomputation, in place.

    Inside a recomputed block they communicate at other times in backward than in forward, and torch 2.13 refuses a
    block that runs other operations the second time.
    """

    def hidden(hook: Any) -> Any:
        def run(*args: Any) -> Any:
            with _disable_current_modes():
                return hook(*args)

        return run

    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            hooks[key] = hidden(hook)


def _policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = str(op)
    # Megatron's collectives write into a buffer: what they return must not be kept, or may be overwritten.
    saved = op in SAVED_OPS or (not name.startswith("c10d.") and any(part in name for part in SAVED_NAMES))
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
