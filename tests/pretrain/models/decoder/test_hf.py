"""Every brand: Hugging Face -> run -> Hugging Face, equal by logits, by every tensor's bits and by config."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints.hf.brand import Misfit, choose_brand
from checkpoints.hf.ops import bind
from launch.cli import main
from launch.commands import results
from launch.commands.convert import native_tensors
from pretrain.config import recipe_names, resolve
from pretrain.generate import generate
from pretrain.load import load_trained
from pretrain.models import FAMILIES
from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.decoder.hf import BRANDS
from tests.checkpoints.hf.tiny import CASES, VOCAB, checkpoint_command, load_tokenizer, save_model, tiny_tokenizer

TEXT = "the lazy fox jumps"
LENGTH = 60  # longer than every window, and than what RoPE is stretched from


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def config_of(folder: Path) -> dict:
    config = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def without_derived(config: dict) -> dict:
    """yarn's mscale pair comes back as the attention factor that follows from it."""
    rope = dict(config.get("rope_parameters") or {})
    for key in ("mscale", "mscale_all_dim", "attention_factor"):
        rope.pop(key, None)
    return {**config, "rope_parameters": rope}


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    theirs, run, back = tmp_path / "hf", tmp_path / "run", tmp_path / "back"
    save_model(CASES[name], theirs)
    assert checkpoint_command("import", theirs, run) == 0

    native = load_trained(run).model
    model = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, expected = native.logits(native(tokens)), model(tokens, use_cache=False).logits
    assert expected.std() > 0.3  # else the next line would prove nothing
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)

    assert checkpoint_command("export", run, back) == 0
    before, after = tensors_of(theirs), tensors_of(back)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    if "mscale" in name:
        assert without_derived(config_of(theirs)) == without_derived(config_of(back))
    else:
        assert config_of(theirs) == config_of(back)
    for file in ("generation_config.json",):
        assert json.loads((theirs / file).read_text()) == json.loads((back / file).read_text())
    assert not (back / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3", "olmo2", "gemma3", "smollm3", "gpt2"])
def test_tokenizer_comes_along_and_greedy_tokens_agree(name: str, tmp_path: Path, monkeypatch) -> None:
    theirs, run, back = save_model(CASES[name], tmp_path / "hf"), tmp_path / "run", tmp_path / "back"
    tiny_tokenizer().save(theirs)
    checkpoint_command("import", theirs, run)
    checkpoint_command("export", run, back)

    assert len(assert_greedy_tokens_agree(run, back, monkeypatch)) > 15


@pytest.mark.parametrize("name", ["llama3", "gemma3", "mistral"])  # whose tokenizers begin every text with a token
def test_greedy_tokens_agree_where_the_tokenizer_adds_a_first_token(name: str, tmp_path: Path, monkeypatch) -> None:
    theirs, run, back = save_model(CASES[name], tmp_path / "hf"), tmp_path / "run", tmp_path / "back"
    tiny_tokenizer().save(theirs)
    fast = FastTokenizer.from_file(str(theirs / "tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(theirs / "tokenizer.json"))
    checkpoint_command("import", theirs, run)
    checkpoint_command("export", run, back)
    assert load_tokenizer(back)(TEXT).input_ids[0] == 1
    assert len(assert_greedy_tokens_agree(run, back, monkeypatch)) > 15


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--top-k", "-5"), "top-k is -5"),
        (("--seed", "1" + "0" * 23), "seed is 1000"),
        (("--max-new-tokens", "0"), "max-new-tokens is 0"),
    ],
)
def test_options_that_mean_nothing_print_nothing(words: tuple[str, str], message: str, tmp_path: Path, capsys) -> None:
    tiny_tokenizer().save(save_model(CASES["llama3"], tmp_path / "hf"))
    checkpoint_command("import", tmp_path / "hf", tmp_path / "run")
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), TEXT, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"pretrain: error: {message}") and err.count("\n") == 1


def test_any_of_several_end_tokens_ends_a_text(tmp_path: Path, monkeypatch) -> None:
    """As in Llama 3's chat models, whose generation_config.json lists three."""
    theirs, run, back = save_model(CASES["llama3"], tmp_path / "hf"), tmp_path / "run", tmp_path / "back"
    tiny_tokenizer().save(theirs)
    checkpoint_command("import", theirs, run)
    checkpoint_command("export", run, back)
    tokens = assert_greedy_tokens_agree(run, back, monkeypatch)
    prompt = tiny_tokenizer().encode_prompt(TEXT).tolist()
    end = next(token for token in tokens[len(prompt) + 5 :] if token not in prompt)
    for folder in (theirs, back):
        generation = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": [2, end]}
        (folder / "generation_config.json").write_text(json.dumps(generation))
    checkpoint_command("import", theirs, tmp_path / "again")
    shorter = assert_greedy_tokens_agree(tmp_path / "again", back, monkeypatch)
    assert shorter == tokens[: tokens.index(end)]


def assert_greedy_tokens_agree(run: Path, back: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that the command `pretrain generate` makes of a text, and those that transformers makes of it."""
    made: list[int] = []

    def recorded(model: Any, tokens: torch.Tensor, **options: Any) -> Iterator[int]:
        made.extend(tokens.tolist())
        for token in generate(model, tokens, **options):
            made.append(token)
            yield token

    monkeypatch.setattr(results, "generate_tokens", recorded)
    assert main(["--debug", "generate", str(run), TEXT, "--max-new-tokens", "20"]) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(back)
    expected = model.generate(**load_tokenizer(back)(TEXT, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    eos = model.generation_config.eos_token_id
    tokens = expected[0].tolist()
    assert made == (tokens[:-1] if tokens[-1] in (eos if isinstance(eos, list) else [eos]) else tokens)
    return made


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_has_a_brand_whose_table_fits(recipe: str) -> None:
    config = resolve(recipe)[0].model
    config = config if config.vocab_size else resolve(recipe, ["model.vocab_size=1024"])[0].model
    try:
        brand = choose_brand(FAMILIES[config.family].hf, config.model_dump(mode="json"), None)
    except ValueError:
        assert config.family != "decoder" and recipe.startswith(("tiny", "digits"))  # nobody has published the like
        return
    known = [name for name in BRANDS if recipe.startswith(name.removesuffix("_text").removesuffix("_moe"))]
    assert not known or brand.model_type in known
    shapes, _ = native_tensors(config)
    assert sum(len(step.native) for step in bind(brand.tensors, shapes)) == len(shapes)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"qk_norm": "full"}, "model.norm_position = 'pre'"),  # of OLMo2, which comes nearest
        ({"norm": "layer"}, "model.norm = 'layer'"),
        ({"attention_softcap": 50.0}, "model.attention_softcap = 50.0"),
        ({"positions": "learned"}, "model.positions = 'learned'"),
        ({"pattern": ("sliding", "nope"), "window": 8, "qkv_bias": True}, "model.pattern, at layer 1, = 'nope'"),
    ],
)
def test_what_no_brand_expresses_says_why(change: dict, key: str) -> None:
    config = DecoderConfig(vocab_size=VOCAB, **change).model_dump(mode="json")
    with pytest.raises(ValueError, match="no Hugging Face architecture expresses this model") as caught:
        choose_brand(BRANDS, config, None)
    assert key in str(caught.value) and "\n" not in str(caught.value)


def test_a_forced_brand_that_cannot_is_refused() -> None:
    config = DecoderConfig(vocab_size=VOCAB, qkv_bias=True).model_dump(mode="json")
    assert choose_brand(BRANDS, config, None).model_type == "qwen2"
    with pytest.raises(Misfit, match=r"llama cannot express model.out_bias = False \(allowed: 'True, as"):
        choose_brand(BRANDS, config, "llama")
    with pytest.raises(ValueError, match="brand 'lama' is unknown: one of llama, mistral"):
        choose_brand(BRANDS, config, "lama")


ROPE = CASES["llama-yarn"].options["rope_parameters"]
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama2", {"rope_parameters": DYNAMIC}, "rope_parameters.rope_type = 'dynamic'"),
        ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type = 'dynamic'"),
        ("llama2", {"rope_parameters": ROPE | {"truncate": False}}, "rope_parameters.truncate = False"),
        ("llama2", {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor = 0.5"),
        ("llama2", {"hidden_act": "mish"}, "hidden_act = 'mish' (allowed: 'silu'"),
        ("llama2", {"model_type": "bloom"}, "model_type = 'bloom' cannot be imported (allowed: llama, mistral"),
        ("llama2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config = 'set'"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True (allowed: False)"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 (allowed: None)"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True (allowed: False)"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": None}, "the layer has no RoPE"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "layer_types[0] = 'chunked_attention'"),
    ],
)
def test_config_features_we_lack_are_named(name: str, change: dict, message: str, tmp_path: Path) -> None:
    theirs = save_model(CASES[name], tmp_path / "hf")
    config = json.loads((theirs / "config.json").read_text()) | change
    (theirs / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    with pytest.raises(ValueError) as caught:
        checkpoint_command("import", theirs, tmp_path / "run")
    assert message in str(caught.value) and str(theirs) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_old_spellings_of_rope_are_understood(tmp_path: Path) -> None:
    theirs = save_model(CASES["llama3"], tmp_path / "hf")
    config = json.loads((theirs / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {**rope, "type": "llama3"}
    (theirs / "config.json").write_text(json.dumps(config))
    checkpoint_command("import", theirs, tmp_path / "run")
    native = load_trained(tmp_path / "run").config.model.rope
    assert (native.scaling, native.theta, native.factor) == ("llama3", 300.0, 4.0)
