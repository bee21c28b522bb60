"""Proof that an exported dual encoder is the native one: features of pictures and texts as transformers gets them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.hf.brand import Brand
from checkpoints.hf.probe import Probe
from checkpoints.hf.tokenizer import has_tokenizer, load_tokenizer
from checkpoints.hf.verify import TOLERANCE, NotEqual, largest, largest_difference, load_transformers

LARGEST = 2  # an end-of-text token that transformers takes as "the text's largest token", for the sake of old files


@dataclass(frozen=True)
class Features:
    """images, texts [B, D] of length 1; logits [B, B]: of each image with each text."""

    images: Tensor
    texts: Tensor
    logits: Tensor


def prove_features(out: Path, native: Callable[..., Features], brand: Brand, probe: Probe) -> float:
    """Load `out` with transformers and compare what it makes of a probe; returns the largest difference of a logit.

    native: (tokens, **probe.native) -> what the native model makes of it, in fp32. Needs the memory of one fp32 model
    at a time. Raises NotEqual, naming the tower that differs.
    """
    model = load_transformers(out)
    probe = replace(probe, tokens=end_texts(out, model.config.text_config, brand, probe))
    with torch.inference_mode():
        theirs = model(input_ids=probe.tokens, **probe.hf)
        del model
        ours = native(probe.tokens, **probe.native)
    pairs = {
        "features of images": (ours.images, theirs.image_embeds),
        "features of texts": (ours.texts, theirs.text_embeds),
        "logits": (ours.logits, theirs.logits_per_image),
    }
    for name, (one, other) in pairs.items():
        error = largest_difference(one, other)
        if not error <= TOLERANCE * max(largest(one), largest(other)):  # NaN fails too
            raise NotEqual(f"{name} differ by {error:.2e} (largest {largest(one):.2e}) from transformers'")
    return largest_difference(ours.logits, theirs.logits_per_image)


def end_texts(out: Path, text: Any, brand: Brand, probe: Probe) -> Tensor:
    """The probe's tokens with the end-of-text token at each text's end, and nowhere else. Raises NotEqual where that
    token is not what transformers looks for.
    """
    end, last = text.eos_token_id, text.vocab_size - 1
    read = load_tokenizer(out).eos_token_id if has_tokenizer(out) else None
    if brand.looks_for_end and end is None:
        raise NotEqual(
            f"{brand.model_type} looks for the end-of-text token, and none is known: keep the tokenizer with the run"
        )
    if brand.looks_for_end and end == LARGEST and read == LARGEST:
        raise NotEqual(
            f"{brand.model_type}: an end-of-text token of {LARGEST} means something else to transformers (a text's "
            "largest token); train with a tokenizer that has another"
        )
    assert probe.tokens is not None
    token = read if read is not None else last if end in (None, LARGEST) else end
    tokens = torch.where(probe.tokens == token, (token + 1) % (last + 1), probe.tokens)
    tokens[torch.arange(len(tokens)), probe.native["lengths"] - 1] = token
    return tokens
