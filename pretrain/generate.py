"""Continuing a prompt, with a key/value cache."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pretrain.models.decoder.model import KVCache


@torch.inference_mode()
def generate(
    model: Any,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 1,
) -> Iterator[int]:
    """Yield new tokens after `tokens` [S] one by one, until `eos_id` (not yielded) or the model's longest sequence.

    temperature 0 takes the likeliest token; else tokens are drawn, from the `top_k` likeliest when that is not 0.
    Raises ValueError for an empty or too long prompt.
    """
    longest = model.cfg.max_seq_len
    if not 0 < tokens.shape[0] < longest:
        raise ValueError(f"the prompt has {tokens.shape[0]} tokens: must be 1 to {longest - 1} (model.max_seq_len - 1)")
    generator = torch.Generator(tokens.device).manual_seed(seed)
    cache = KVCache()
    fresh = tokens[None]
    for _ in range(min(max_new_tokens, longest - tokens.shape[0])):
        logits = model.logits(model(fresh, cache=cache)[:, -1]).float()
        fresh = _choose(logits, temperature, top_k, generator)
        token = int(fresh)
        if token == eos_id:
            return
        yield token


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """logits [1, V] -> token [1, 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k:
        kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
