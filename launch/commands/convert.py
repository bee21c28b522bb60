"""pretrain checkpoint export, import"""

import argparse
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import Tensor

from checkpoints.derived import new_folder
from checkpoints.hf import convert
from checkpoints.hf.brand import Brand, choose_brand
from checkpoints.hf.folder import KEPT, Kept
from checkpoints.hf.ops import Shapes
from checkpoints.hf.pictures import PictureSteps, read_steps
from checkpoints.hf.tokenizer import copy_tokenizer, has_tokenizer
from checkpoints.hf.verify import Trace, prove_logits, prove_tensors
from checkpoints.hf.verify_pairs import Features, prove_features
from checkpoints.manifest import MANIFEST, Manifest
from checkpoints.store import CheckpointStore
from launch.progress import progress_bar
from parallel.materialise import named_tensors
from pretrain.config import RunConfig, load_run_config, validate, write_config
from pretrain.data import picture_form
from pretrain.load import build_model
from pretrain.models import FAMILIES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(args: argparse.Namespace) -> None:
    """Write a run's checkpoint as a Hugging Face folder, and prove it equal before it gets its name.

    Writing and comparing tensors take the memory of two tensors, comparing logits that of the whole model in fp32.
    """
    run_dir, checkpoint = find_checkpoint(Path(args.run), args.step)
    run_config = load_run_config(run_dir)
    config = run_config.model
    if getattr(run_config.objective, "image_attention", "causal") == "both":
        raise ValueError(
            f'{run_dir}: objective.image_attention = "both", but transformers lets image tokens see only those before '
            'them, so its outputs would be others; train with "causal" to export'
        )
    shapes, _ = native_tensors(config)
    if not args.no_verify_logits:
        check_memory(shapes)
    kept = Kept.load(run_dir / KEPT) if (run_dir / KEPT).is_file() else None
    native = config.model_dump(mode="json")
    brand = pick_brand(config, native, args.brand, kept)
    pictures = picture_steps(run_config) if brand.patches(native) else None
    dtype = DTYPES[args.dtype] if args.dtype else None
    tokenizer = run_dir / "tokenizer"
    num_bytes = sum(entry.bytes for name, entry in Manifest.read(checkpoint).files.items() if name.startswith("model/"))
    out = Path(args.out)
    console = Console(soft_wrap=True, highlight=False)
    lines: list[str] = []
    if pictures is not None and pictures.resize == "native" and pictures.newline < 0:
        lines.append("a FuyuProcessor ends rows of patches with a token, the run did not (data.pictures.newline = -1)")

    with progress_bar(console) as bar:

        def prove(folder: Path) -> None:
            count = prove_tensors(checkpoint, shapes, brand, folder, dtype, bar("comparing tensors", num_bytes))
            lines.append(f"{count} tensors came back bit for bit")
            if args.no_verify_logits:
                lines.append("logits were not compared (--no-verify-logits)")
                return
            bar("comparing logits", None)
            error = prove_outputs(folder, config, checkpoint, brand, dtype)
            what = "features and logits" if brand.pairs else "logits"
            lines.append(f"fp32 {what} equal transformers': largest difference {error:.1e}")

        convert.export(
            checkpoint,
            native,
            shapes,
            brand,
            out,
            tokenizer=tokenizer if has_tokenizer(tokenizer) else None,
            dtype=dtype,
            shard_size=args.shard_size,
            kept=kept,
            pictures=pictures,
            prove=prove,
            progress=bar("writing", num_bytes),
        )
    console.print(f"exported {checkpoint} to {out} as {brand.model_type}: {'; '.join(lines)}")


def import_(args: argparse.Namespace) -> None:
    """Make a run out of a Hugging Face folder: config, tokenizer, and a checkpoint of step 0 without optimizer."""
    folder, run_dir = Path(args.model), Path(args.run)
    brands = {name: brand for family in FAMILIES.values() for name, brand in family.hf.items()}
    with new_folder(run_dir) as temp:
        model = convert.look_at(folder, brands)
        patches = model.brand.patches(model.config)  # of one picture, which must fit a row
        longest = model.config.get("max_seq_len", patches)
        data: dict[str, Any] = {}
        if patches:
            steps = read_steps(folder, model.config["patches"]["size"])
            steps = replace(steps, max_patches=min(steps.max_patches, longest // 4))  # text and new lines beside them
            patches = steps.max_patches or patches
            data["pictures"] = steps.in_recipe()
        data |= {"seq_len": min(512 + 2 * patches, longest), "patches": patches}
        tree = {"run": {"dir": str(run_dir)}, "model": model.config, "data": data}
        if model.brand.objective:
            tree["objective"] = dict(model.brand.objective)
        if has_tokenizer(folder):
            tree["tokenizer"] = {"path": str(run_dir / "tokenizer")}
        config = validate(tree, str(folder))
        shapes, ties = native_tensors(config.model)
        with progress_bar(Console()) as bar:
            advance = bar("importing", model.tensors.num_bytes)
            convert.import_(model, shapes, ties, temp / "checkpoints", progress=advance)
        copy_tokenizer(folder, temp / "tokenizer")
        model.kept.save(temp / KEPT)
        write_config(config, temp / "config.toml")
    print(f"imported {folder} ({model.brand.model_type}, {len(shapes)} tensors) as the run {run_dir}, at step 0")


def picture_steps(config: RunConfig) -> PictureSteps:
    """What becomes of pictures in a run."""
    form = picture_form(config)
    newline = -1 if form.newline_token is None else form.newline_token
    return PictureSteps(form.resize, form.size, form.max_patches, newline)


def find_checkpoint(path: Path, step: int | None) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) for a run's folder or a checkpoint's.

    Without `step`, a run's newest whole checkpoint. Raises FileNotFoundError or ValueError.
    """
    if (path / MANIFEST).is_file():
        if step is not None:
            raise ValueError(
                f"--step {step}: {path} is one checkpoint already; leave --step out, or give the run's folder"
            )
        return path.resolve().parent.parent, path
    folder = path / "checkpoints"
    store = CheckpointStore(folder)
    found = store.newest_whole() if step is None else step
    if found is None:
        raise FileNotFoundError(f"{folder} has no whole checkpoint; give the folder of a run")
    for info in store.list():
        if info.step == found:
            if info.problem:
                raise ValueError(f"step {found} is not whole: {info.problem}; use another --step")
            return path, info.path
    raise FileNotFoundError(f"{path} has no checkpoint of step {found}; see `pretrain checkpoint list {path}`")


def pick_brand(config: Any, native: dict[str, Any], wanted: str | None, kept: Kept | None) -> Brand:
    """`wanted`; else the brand that the run was imported from, if it still fits; else the first that fits."""
    brands = FAMILIES[config.family].hf
    if wanted is None and kept is not None and kept.brand in brands:
        try:
            return choose_brand(brands, native, kept.brand)
        except ValueError:
            pass
    return choose_brand(brands, native, wanted)


def native_tensors(config: Any) -> tuple[Shapes, dict[str, str]]:
    """Shapes of the native model's tensors, each storage once, and its ties; nothing is allocated."""
    with torch.device("meta"):
        model = FAMILIES[config.family].build(config)
    tensors, ties = named_tensors(model)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, ties


def check_memory(shapes: Shapes) -> None:
    """Raises ValueError where there is no room to compare logits: the whole model in fp32, ours, then theirs."""
    needed, free = 4 * sum(map(math.prod, shapes.values())), psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"comparing logits takes the whole model in fp32, {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB of memory "
            "are free; --no-verify-logits compares the tensors alone, one at a time"
        )


def prove_outputs(folder: Path, config: Any, checkpoint: Path, brand: Brand, dtype: torch.dtype | None) -> float:
    """Run both models on the brand's probe; returns the largest difference. Raises NotEqual."""
    probe = brand.probe(config.model_dump(mode="json")) if brand.probe else None
    if brand.pairs:
        assert probe is not None
        return prove_features(folder, partial(run_pairs, config, checkpoint, dtype), brand, probe)
    native = partial(run_native, config, checkpoint, dtype)
    return prove_logits(folder, native, config.vocab_size, getattr(config, "max_seq_len", 0), probe)


@torch.inference_mode()
def run_native(config: Any, checkpoint: Path, dtype: torch.dtype | None, tokens: Tensor | None, **others: Any) -> Trace:
    """The native model's logits and states. others: what it gets beside tokens, by name."""
    model = load_rounded(config, checkpoint, dtype)
    blocks = list(model.layers.values())
    states: list[Tensor] = []
    blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0].clone()))
    for block in blocks:
        block.register_forward_hook(lambda _, args, out: states.append(out))
    hidden = model(**others) if tokens is None else model(tokens, **others)
    return Trace(model.logits(hidden), states)


@torch.inference_mode()
def run_pairs(config: Any, checkpoint: Path, dtype: torch.dtype | None, tokens: Tensor, **others: Any) -> Features:
    """The native model's features of pairs, and their logits."""
    model = load_rounded(config, checkpoint, dtype)
    images, texts = model(tokens=tokens, **others).unbind(1)
    scale, bias = model.temperature(images)
    return Features(images, texts, images @ texts.T * scale + bias)


def load_rounded(config: Any, checkpoint: Path, dtype: torch.dtype | None) -> Any:
    """The native model in fp32, from weights as the store loads them, rounded to `dtype`."""
    model = build_model(config).eval()
    tensors, _ = named_tensors(model)
    CheckpointStore(checkpoint.parent).load(checkpoint, {name: tensor.detach() for name, tensor in tensors.items()})
    if dtype is not None:
        for tensor in model.parameters():  # buffers keep their type
            tensor.data.copy_(tensor.data.to(dtype))
    return model
