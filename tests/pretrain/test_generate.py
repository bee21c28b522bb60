"""Continuing a prompt: the cache changes nothing, and options that mean nothing are refused."""

import math
from typing import Any

import pytest
import torch

from pretrain.generate import generate
from pretrain.load import build_model
from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.layers.cache import KVCache

VOCAB, LONGEST = 61, 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden": 32, "layers": 4, "ffn": 48, "heads": 4, "kv_heads": 2, "max_seq_len": LONGEST,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "rope": {},
    "sliding": {"pattern": ["sliding", "full"], "window": 5, "rope_local": {"theta": 50.0}},
    "sliding-first": {"pattern": ["sliding"], "window": 1},
    "nope": {"pattern": ["full", "nope"]},
    "learned": {"positions": "learned"},
    "softcap": {"attention_softcap": 2.0, "logit_softcap": 3.0},
}


def make_model(name: str) -> Any:
    model = build_model(DecoderConfig(**SIZES, **MODELS[name])).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("rope")


def prompt(length: int = LONGEST) -> torch.Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pieces", [[1] * LONGEST, [7, *[1] * (LONGEST - 7)], [3, 9, 1, LONGEST - 13]], ids=str)
@torch.inference_mode()
def test_the_cache_changes_no_logit(name: str, pieces: list[int]) -> None:
    """Token by token, after a prompt, and in uneven pieces: as in one pass over the whole sequence."""
    model, tokens = make_model(name), prompt()[None].expand(2, -1).clone()
    tokens[1] = tokens[1].flip(0)
    whole = model.logits(model(tokens))
    assert whole.std() > 0.3  # else equality would prove nothing
    cache = KVCache()
    parts = [model.logits(model(piece, cache=cache)) for piece in tokens.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)
    assert cache.length == LONGEST and len(cache.entries) == SIZES["layers"]


@torch.inference_mode()
def test_greedy_tokens_are_the_likeliest_of_full_passes(model: Any) -> None:
    tokens = prompt(5)
    found = list(generate(model, tokens, max_new_tokens=10))
    for token in found:
        assert token == int(model.logits(model(tokens[None]))[0, -1].argmax())
        tokens = torch.cat((tokens, torch.tensor([token])))
    assert len(found) == 10


def test_it_ends_at_the_longest_sequence_and_before_the_end_of_text(model: Any) -> None:
    assert len(list(generate(model, prompt(LONGEST - 3), max_new_tokens=10))) == 3
    found = list(generate(model, prompt(5), max_new_tokens=10))
    end = next(index for index, token in enumerate(found) if index and token not in found[:index])
    assert list(generate(model, prompt(5), max_new_tokens=10, eos_ids=[VOCAB, found[end]])) == found[:end]


def test_sampling_follows_seed_temperature_and_top_k(model: Any) -> None:
    def sample(**options: Any) -> list[int]:
        return list(generate(model, prompt(5), max_new_tokens=20, **options))

    greedy = sample()
    assert sample(temperature=1.0, seed=7) == sample(temperature=1.0, seed=7) != sample(temperature=1.0, seed=8)
    assert sample(temperature=50.0, top_k=1) == greedy != sample(temperature=50.0)
    assert sample(temperature=1e-3) == greedy and sample(temperature=1e-300) == greedy
    assert sample(temperature=1.0, top_k=10**9) == sample(temperature=1.0)
    likeliest = model.logits(model(prompt(5)[None]))[0, -1].topk(3).indices.tolist()
    options: dict[str, Any] = {"temperature": 100.0, "top_k": 3}
    first = {next(generate(model, prompt(5), max_new_tokens=1, seed=seed, **options)) for seed in range(40)}
    assert first == set(likeliest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: must be 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -5}, "top-k is -5: must be 0"),
        ({"seed": 10**23}, f"seed is {10**23}: must be 0 to {2**64 - 1}"),
        ({"seed": -1}, "seed is -1"),
        ({"max_new_tokens": 0}, "max-new-tokens is 0: must be 1 or more"),
        ({"max_new_tokens": -1}, "max-new-tokens is -1"),
        ({"tokens": prompt(0)}, r"the prompt has 0 tokens: must be 1 to 39 \(model.max_seq_len - 1\)"),
        ({"tokens": prompt(LONGEST)}, "the prompt has 40 tokens: must be 1 to 39"),
        ({"tokens": torch.tensor([3, VOCAB])}, "the prompt has token 61, but model.vocab_size = 61"),
    ],
)
def test_bad_options_are_refused_at_the_call(model: Any, options: dict, message: str) -> None:
    """Before the first token is asked for: the command has printed nothing by then."""
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, **{"tokens": prompt(5), "max_new_tokens": 3} | options)
    assert "\n" not in str(caught.value)


def test_the_largest_seed_is_taken(model: Any) -> None:
    assert len(list(generate(model, prompt(5), max_new_tokens=2, temperature=1.0, seed=2**64 - 1))) == 2
