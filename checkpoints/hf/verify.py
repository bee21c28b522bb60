"""Proof that an exported folder is the native model: its tensors bit for bit, its logits as transformers gets them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.hf.brand import Brand
from checkpoints.hf.convert import target_dtype
from checkpoints.hf.ops import Shapes, Step, bind, first_few
from checkpoints.hf.probe import Probe, text_probe
from checkpoints.hf.quiet import quiet
from checkpoints.manifest import Progress
from checkpoints.tensors import TensorFiles, as_bytes, open_checkpoint, open_hf

TOLERANCE = 1e-4  # of the largest logit: far above fp32 rounding (1e-6), far below tanh instead of erf in a GELU
LOCATE = 1e-5  # of the largest activation: where the paths begin to part
NUM_TOKENS = 256  # of the batch that both models see


class NotEqual(ValueError):
    """An export that is not the model it came from."""


@dataclass(frozen=True)
class Trace:
    """What a model does with a batch: logits [B, S, V], or [B, C] of classes; states: input of the first block, output
    of each, [B, S, E].
    """

    logits: Tensor
    states: list[Tensor]


Native = Callable[..., Trace]  # tokens [B, S] and a probe's `native` by name -> what the native model does, in fp32


def prove_tensors(
    checkpoint: Path,
    shapes: Shapes,
    brand: Brand,
    out: Path,
    dtype: torch.dtype | None,
    progress: Progress | None = None,
) -> int:
    """Import every tensor of `out` back and compare it with the checkpoint's bit for bit; returns their number.

    Logits cannot see all of a model (a key bias without RoPE shifts every score alike). One tensor at a time.
    Raises NotEqual, naming the first tensor that differs.
    """
    source, exported = open_checkpoint(checkpoint), open_hf(out)
    steps = bind(brand.tensors, shapes)
    if strays := exported.infos.keys() - {name for step in steps for name in step.hf}:
        raise NotEqual(f"{out.name} has the tensor {first_few(sorted(strays))} that nothing was converted to")
    for step in steps:
        _prove_step(source, exported, step, dtype)
        if progress is not None:
            progress(sum(source.infos[name].num_bytes for name in step.native))
    return sum(len(step.native) for step in steps)


# A function of its own, so that a step's tensors are gone before the next one's come.
def _prove_step(source: TensorFiles, exported: TensorFiles, step: Step, dtype: torch.dtype | None) -> None:
    theirs = step.row.to_native([exported.read(name) for name in step.hf], list(step.native_shapes))
    for name, back in zip(step.native, theirs, strict=True):
        saved = source.infos[name].dtype
        if target_dtype(step, saved, dtype) == saved:
            same = source.holds(name, back)
        else:
            ours = source.read(name).to(dtype)
            same = ours.dtype == back.dtype and torch.equal(as_bytes(ours), as_bytes(back))
        if not same:
            raise NotEqual(f"tensor '{name}' is another one after exporting it and importing it back")


def prove_logits(out: Path, native: Native, vocab_size: int, max_seq_len: int, probe: Probe | None = None) -> float:
    """Load `out` with transformers and compare its fp32 logits with the native model's; returns the largest difference.

    Both see the same probe, without padding; where there is none, NUM_TOKENS random tokens (fewer where sequences are
    shorter). Needs the memory of one fp32 model at a time. Raises NotEqual, naming the first block whose output
    differs.
    """
    if probe is None:
        probe = text_probe(vocab_size, min(NUM_TOKENS, max_seq_len))
    with torch.inference_mode():
        ours = native(probe.tokens, **probe.native)
        theirs = run_transformers(out, probe, num_blocks=len(ours.states) - 1)
    error = largest_difference(ours.logits, theirs.logits)
    if not error <= TOLERANCE * max(largest(ours.logits), largest(theirs.logits)):  # NaN fails too
        raise NotEqual(
            f"logits differ by {error:.2e} (largest logit {largest(ours.logits):.2e}) from transformers'; "
            f"{first_divergence(ours, theirs)}"
        )
    return error


def run_transformers(folder: Path, probe: Probe, num_blocks: int) -> Trace:
    """What transformers makes of a folder and a probe, in fp32. Raises NotEqual as `load_transformers`."""
    model = load_transformers(folder)
    text = {} if probe.tokens is None else {"input_ids": probe.tokens, "use_cache": False}
    blocks = find_blocks(model.get_decoder() if text else model, num_blocks)
    states: list[Tensor] = []
    blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0].clone()))
    for block in blocks:
        block.register_forward_hook(lambda _, args, out: states.append(out if isinstance(out, Tensor) else out[0]))
    return Trace(model(**text, **probe.hf).logits, states)


def load_transformers(folder: Path) -> Any:
    """The model that transformers builds of a folder, in fp32.

    Raises NotEqual where transformers misses a tensor, finds one too many, or refuses the folder.
    """
    from transformers import (  # imports slowly
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
    )

    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            kinds: tuple[tuple[Any, Any], ...] = (
                (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
                (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
            )
            auto = next((auto for mapping, auto in kinds if type(config) in mapping), AutoModel)
            classifier = getattr(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None), "__name__", "")
            if classifier in (config.architectures or ()):
                auto = AutoModelForImageClassification
            loaded: Any = auto.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the loading info
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise NotEqual(f"transformers cannot load the export: {' '.join(str(error).split())}") from error
    model, loading = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(name if isinstance(name, str) else name[0] for name in loading[what]):
            raise NotEqual(f"transformers loads the export with {what.replace('_', ' ')}: {first_few(names)}")
    return model.eval()


def find_blocks(model: nn.Module, num_blocks: int) -> nn.ModuleList:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks:
            return module
    raise NotEqual(f"the model that transformers builds has no list of {num_blocks} blocks")


def first_divergence(ours: Trace, theirs: Trace) -> str:
    """Where, in words, the states of two models begin to differ."""
    for index, (one, other) in enumerate(zip(ours.states, theirs.states, strict=True)):
        error = largest_difference(one, other)
        if not error <= LOCATE * largest(one):
            where = f"block {index - 1} is the first whose output differs" if index else "the embedding differs already"
            return f"{where} (by {error:.2e})"
    return "all blocks agree: the final norm or the head differs"


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def largest_difference(one: Tensor, other: Tensor) -> float:
    return largest(one.float() - other.float())
