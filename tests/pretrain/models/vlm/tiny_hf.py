"""Tiny Hugging Face models that see: no two dimensions alike, nothing at its initial value."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessor, FuyuImageProcessorPil

from checkpoints.hf.brand import choose_brand
from checkpoints.hf.folder import KEPT
from checkpoints.hf.probe import Probe
from pretrain.config import override_config, write_config
from pretrain.load import Trained
from pretrain.models.vlm.hf import BRANDS
from tests.checkpoints.hf.tiny import checkpoint_command

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
    about: dict[str, Any] = {"image_mean": MEAN, "image_std": STD}
    if config["model_type"] == "fuyu":
        FuyuImageProcessorPil(**about, size={"height": 25, "width": 40}).save_pretrained(folder)
    else:
        CLIPImageProcessor(**about, size=square, crop_size=square, do_center_crop=False).save_pretrained(folder)
    return model.eval()


def probe_of(trained: Trained) -> Probe:
    """Pictures and tokens for both models."""
    native = trained.config.model.model_dump(mode="json")
    brand = choose_brand(BRANDS, native, None)
    assert brand.probe is not None
    return brand.probe(native)


def import_run(folder: Path, run: Path) -> None:
    assert checkpoint_command("import", folder, run) == 0


def edit_run(run: Path, *overrides: str) -> None:
    """Another config in a run's folder, as if it had been trained with that."""
    write_config(override_config(run, list(overrides)), run / "config.toml")


def export_run(run: Path, out: Path, *, tokenizer: Path | None = None, keep: bool = True) -> None:
    """Which proves itself. tokenizer: folder of the run's. keep: what the import had kept; else as a run of our own."""
    if tokenizer is not None:
        shutil.copytree(tokenizer, run / "tokenizer")
    if not keep:
        (run / KEPT).unlink()
    assert checkpoint_command("export", run, out) == 0
