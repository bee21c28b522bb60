"""Configs inside configs: what is kept of them, and where special tokens stand."""

from dataclasses import replace

import pytest

from checkpoints.hf.brand import Brand, Misfit, Same
from checkpoints.hf.inner import find_tokens, inner_to_hf, inner_to_native, joined, place_tokens

LLAMA = Brand("llama", "LlamaForCausalLM", (), (Same("hidden", "hidden_size"),))
GPT2 = Brand("gpt2", "GPT2LMHeadModel", (), (Same("hidden", "n_embd"),))
BRANDS = {"llama": LLAMA, "gpt2": GPT2}
OUTER = replace(LLAMA, inner={"text_config": BRANDS})


def test_what_was_kept_stands_beside_what_is_written() -> None:
    kept = {"use_cache": False, "text_config": {"model_type": "llama", "eos_token_id": 7, "pretraining_tp": 2}}
    values = {"side": 3, "text_config": {"model_type": "llama", "hidden_size": 5}}
    assert joined(kept, values) == {
        "use_cache": False,
        "side": 3,
        "text_config": {"model_type": "llama", "eos_token_id": 7, "pretraining_tp": 2, "hidden_size": 5},
    }


def test_of_a_part_of_another_brand_only_the_tokens_stay() -> None:
    kept = {"text_config": {"model_type": "llama", "eos_token_id": 7, "pretraining_tp": 2}}
    values = {"text_config": {"model_type": "gpt2", "n_embd": 5}}
    assert joined(kept, values) == {"text_config": {"model_type": "gpt2", "eos_token_id": 7, "n_embd": 5}}


def test_tokens_are_found_wherever_they_stand() -> None:
    config = {"pad_token_id": 9, "text_config": {"eos_token_id": [2, 3], "pad_token_id": 0}}
    assert find_tokens(config) == {"bos_token_id": None, "eos_token_id": [2, 3], "pad_token_id": 9}
    assert place_tokens(OUTER, {"eos_token_id": 2}) == {"text_config": {"eos_token_id": 2}}
    assert place_tokens(LLAMA, {"eos_token_id": 2}) == {"eos_token_id": 2}
    assert OUTER.keep({"text_config": {"model_type": "llama", "eos_token_id": 2, "hidden_size": 4}}) == {
        "text_config": {"model_type": "llama", "eos_token_id": 2}
    }


def test_a_part_is_of_the_first_brand_that_fits() -> None:
    assert inner_to_hf(BRANDS, {"hidden": 5}) == {"model_type": "llama", "hidden_size": 5}
    assert inner_to_native(BRANDS, {"text": {"model_type": "gpt2", "n_embd": 5}}, "text") == {"hidden": 5}


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ({"model_type": "t5"}, Misfit, r"text.model_type = 't5' \(allowed: 'llama', 'gpt2'\)"),
        ({"model_type": "gpt2", "n_embd": 5, "n_layer": 3}, Misfit, r"text.n_layer = 3 \(allowed: 12\)"),
        ({"model_type": "gpt2"}, KeyError, r"text.n_embd"),
    ],
)
def test_a_part_that_does_not_fit_is_named_by_its_key(part: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        inner_to_native(BRANDS, {"text": part}, "text")
