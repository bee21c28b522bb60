"""Continuing a prompt, with a key/value cache."""

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from pretrain.models.layers.cache import KVCache

MAX_SEED = 2**64 - 1  # what torch's generators take


def generate(
    model: Any,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 1,
) -> Iterator[int]:
    """New tokens after `tokens` [S], one by one, until one of `eos_ids` (not yielded) or the model's longest sequence.

    temperature 0 takes the likeliest token; else tokens are drawn, from the `top_k` likeliest when that is not 0.
    Raises ValueError, at the call and not at the first token, for an option out of its range, and for a prompt that
    is empty, too long, or of another vocabulary.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max-new-tokens is {max_new_tokens}: must be 1 or more")
    if not 0 <= temperature < math.inf:  # NaN fails too
        raise ValueError(f"temperature is {temperature}: must be 0 (the likeliest token) or a number above it")
    if top_k < 0:
        raise ValueError(f"top-k is {top_k}: must be 0 (draw from all tokens) or a number of tokens")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}: must be 0 to {MAX_SEED}")
    longest, vocab_size = model.cfg.max_seq_len, model.cfg.vocab_size
    if not 0 < tokens.shape[0] < longest:
        raise ValueError(f"the prompt has {tokens.shape[0]} tokens: must be 1 to {longest - 1} (model.max_seq_len - 1)")
    if (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(f"the prompt has token {largest}, but model.vocab_size = {vocab_size}: use its own tokenizer")
    generator = torch.Generator(tokens.device).manual_seed(seed)
    num_tokens = min(max_new_tokens, longest - tokens.shape[0])
    return _tokens(model, tokens, num_tokens, eos_ids, temperature, top_k, generator)


@torch.inference_mode()
def _tokens(
    model: Any,
    tokens: Tensor,
    num_tokens: int,
    eos_ids: Collection[int],
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> Iterator[int]:
    cache = KVCache()
    fresh = tokens[None]
    for _ in range(num_tokens):
        logits = model.logits(model(fresh, cache=cache)[:, -1]).float()
        fresh = _choose(logits, temperature, top_k, generator)
        token = int(fresh)
        if token in eos_ids:
            return
        yield token


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """logits [1, V] -> token [1, 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k:
        kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    below_best = (logits - logits.max()).double()  # so that no temperature, however low, overflows
    return torch.multinomial((below_best / temperature).softmax(-1), 1, generator=generator)
