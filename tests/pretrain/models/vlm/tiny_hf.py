"""Tiny Hugging Face models that see: no two dimensions alike, nothing at its initial value."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessor

from checkpoints.hf import convert
from checkpoints.hf.folder import KEPT, Kept
from checkpoints.hf.probe import Probe
from checkpoints.hf.verify import Trace, prove_logits, prove_tensors
from launch.commands.convert import native_tensors
from pretrain.config import validate, write_config
from pretrain.load import Trained, load_trained
from pretrain.models.vlm.hf import BRANDS

VOCAB, IMAGE_TOKEN = 307, 203
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def save_hf(config: dict[str, Any], folder: Path, seed: int = 0) -> Any:
    """A model with every parameter random, norms and biases too, and its image processor, as they are saved."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    square = {"height": 24, "width": 24}
    CLIPImageProcessor(
        image_mean=MEAN, image_std=STD, size=square, crop_size=square, do_center_crop=False
    ).save_pretrained(folder)
    return model.eval()


def import_run(folder: Path, run: Path) -> None:
    """What `pretrain checkpoint import` does."""
    model = convert.look_at(folder, BRANDS)
    data = {"seq_len": 64, "patches": model.brand.patches(model.config)}
    config = validate({"run": {"dir": str(run)}, "model": model.config, "data": data}, str(folder))
    convert.import_(model, *native_tensors(config.model), run / "checkpoints")
    model.kept.save(run / KEPT)
    write_config(config, run / "config.toml")


def probe_of(trained: Trained) -> Probe:
    """Pictures and tokens for both models."""
    brand = next(iter(BRANDS.values()))
    assert brand.probe is not None
    return brand.probe(trained.config.model.model_dump(mode="json"))


def export_run(run: Path, out: Path, *, tokenizer: Path | None = None, keep: bool = True) -> float:
    """What `pretrain checkpoint export` does, proofs included; returns the largest difference of logits."""
    trained = load_trained(run)
    native, shapes = trained.config.model.model_dump(mode="json"), native_tensors(trained.config.model)[0]
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    brand = next(iter(BRANDS.values()))
    errors: list[float] = []

    def prove(folder: Path) -> None:
        assert prove_tensors(checkpoint, shapes, brand, folder, None) == len(shapes)
        probe = probe_of(trained)
        errors.append(prove_logits(folder, lambda tokens, **more: trace(trained.model, tokens, **more), 0, 0, probe))

    kept = Kept.load(run / KEPT) if keep else None
    convert.export(checkpoint, native, shapes, brand, out, kept=kept, tokenizer=tokenizer, prove=prove)
    return errors[0]


def trace(model: Any, tokens: torch.Tensor, **more: Any) -> Trace:
    states: list[torch.Tensor] = []
    blocks = list(model.layers.values())
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0].clone()))]
    hooks += [block.register_forward_hook(lambda _, args, out: states.append(out)) for block in blocks]
    logits = model.logits(model(tokens, **more))
    for hook in hooks:
        hook.remove()
    return Trace(logits, states)
