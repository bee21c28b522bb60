"""Fuyu: Hugging Face -> run -> Hugging Face, equal by logits with pictures, by every tensor's bits and by config."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    FuyuImageProcessorPil,
    PreTrainedTokenizerFast,
)

from checkpoints.hf.brand import choose_brand
from pretrain.config import load_run_config
from pretrain.data import picture_form
from pretrain.load import load_trained
from pretrain.models.vlm.config import VLMConfig
from pretrain.models.vlm.hf import BRANDS
from pretrain.models.vlm.hf_probe import as_patches
from pretrain.models.vlm.model import Pictures
from tests.checkpoints.hf.tiny import TOKEN_IDS
from tests.pretrain.models.vlm.test_hf import config_of
from tests.pretrain.models.vlm.test_hf_processor import draw
from tests.pretrain.models.vlm.tiny_hf import IMAGE_TOKEN, VOCAB, edit_run, export_run, import_run, probe_of, save_hf

PERSIMMON = {
    "model_type": "persimmon", "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 76,
    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
} | TOKEN_IDS  # fmt: skip
FUYU = {"model_type": "fuyu", "patch_size": 5, "image_token_id": IMAGE_TOKEN, "text_config": PERSIMMON}
THIRD = {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0, "partial_rotary_factor": 1 / 3}
CASES: dict[str, dict[str, Any]] = {
    "fuyu": FUYU,
    "fuyu-tied": FUYU
    | {"tie_word_embeddings": True}
    | {"text_config": PERSIMMON | {"tie_word_embeddings": True, "rope_parameters": THIRD, "hidden_act": "gelu"}},
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    theirs, run, back = tmp_path / "hf", tmp_path / "run", tmp_path / "back"
    model = save_hf(CASES[name], theirs)
    import_run(theirs, run)

    native = load_trained(run)
    probe = probe_of(native)
    assert (probe.native["slots"] >= 0).sum() == 18
    with torch.inference_mode():
        ours = native.model.logits(native.model(probe.tokens, **probe.native))
        expected = model(input_ids=probe.tokens, **probe.hf).logits
        blind = native.model.logits(native.model(probe.tokens))
    assert (blind - expected).abs().max() > 0.1  # else the next line would prove nothing
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)

    export_run(run, back)
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, back))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    assert config_of(theirs) == config_of(back)


PERSIMMON_LIKE = {
    "norm": "layer", "gated": False, "activation": "relu2", "qk_norm": "head", "rotary_fraction": 0.5,
    "connector": {"kind": "linear"}, **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"vision": {}}, "model.vision = 'set' (allowed: None)"),
        ({"connector": {"kind": "mlp"}}, "model.connector.kind = 'mlp'"),
        ({"qk_norm": "none"}, "persimmon cannot express model.qk_norm = 'none'"),
        ({"kv_heads": 2}, "model.kv_heads = 2 (allowed: 0, 6)"),
    ],
)
def test_what_fuyu_lacks_is_named(change: dict[str, Any], message: str) -> None:
    config = VLMConfig(vocab_size=VOCAB, **(PERSIMMON_LIKE | change)).model_dump(mode="json")
    if not message:
        assert choose_brand(BRANDS, config, None).model_type == "fuyu"
        return
    with pytest.raises(ValueError, match="no Hugging Face architecture expresses this model: llava cannot") as caught:
        choose_brand(BRANDS, config, None)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def save_tokenizer(folder: Path, *tokens: str) -> Path:
    """These are its first tokens; a mark comes before each text, which Fuyu's processor cuts off."""
    pieces = [(token, -1.0) for token in (*tokens, "<unk>", "<s>", "</s>")]
    model = models.Unigram([*pieces, *((letter, -3.0) for letter in "▁ abcdefghijklmnopqrstuvwxyz")], len(tokens))
    fast = FastTokenizer(model)
    fast.normalizer = normalizers.Prepend("▁")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def patches_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.23 without torchvision: Fuyu's processor hands a tensor to a function that knows numpy alone."""
    theirs = FuyuImageProcessorPil.patchify_image

    def patchify(self: Any, image: torch.Tensor, patch_size: Any = None) -> torch.Tensor:
        return torch.from_numpy(theirs(self, image.numpy(), patch_size))

    monkeypatch.setattr(FuyuImageProcessorPil, "patchify_image", patchify)


def test_a_png_and_a_prompt_give_the_same_logits(tmp_path: Path, patches_of_tensors: None) -> None:
    theirs, run, out = tmp_path / "hf", tmp_path / "run", tmp_path / "out"
    save_hf(FUYU | {"image_token_id": 0}, theirs)
    save_tokenizer(theirs, "|SPEAKER|", "|NEWLINE|")
    import_run(theirs, run)
    export_run(run, out, keep=False)
    picture = draw(tmp_path / "picture.png", (20, 15))
    inputs = AutoProcessor.from_pretrained(out)(images=picture, text="the quick fox", return_tensors="pt")
    tokens = inputs.input_ids
    assert tokens[0, :15].tolist() == [0, 0, 0, 0, 1] * 3  # a new line after each row of patches
    model: Any = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    trained = load_trained(run)

    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, 15, 20, 3).permute(0, 3, 1, 2)
    patches = as_patches(pixels, 5)
    grid = torch.tensor([[row, column] for row in range(3) for column in range(4)], dtype=torch.int32)
    pictures = Pictures.packed(patches, torch.zeros(1, 12, dtype=torch.int32), grid[None])
    slots = torch.full(tokens.shape, -1)
    slots[tokens == 0] = torch.arange(12)
    with torch.inference_mode():
        expected = model(**inputs).logits
        ours = trained.model.logits(trained.model(tokens, pictures=pictures, slots=slots.int()))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_what_becomes_of_pictures_comes_along_and_goes_back(tmp_path: Path) -> None:
    """A picture of 25 x 40 pixels is 40 patches of 5, of which 128 tokens leave room for 32, and 25 x 25 pixels."""
    theirs, run = tmp_path / "hf", tmp_path / "run"
    save_hf(FUYU | {"image_token_id": 0}, theirs)
    save_tokenizer(theirs, "|SPEAKER|", "|NEWLINE|")
    import_run(theirs, run)
    data = load_run_config(run).data
    assert (data.pictures.resize, data.pictures.max_patches, data.pictures.newline) == ("native", 32, 1)
    assert data.patches == 32 and picture_form(load_run_config(run)).most_tokens < data.seq_len

    export_run(run, tmp_path / "capped")
    edit_run(run, "data.pictures.max_patches=40")
    export_run(run, tmp_path / "whole")
    sizes = [AutoImageProcessor.from_pretrained(tmp_path / name).size for name in ("capped", "whole")]
    assert [(size.height, size.width) for size in sizes] == [(25, 25), (25, 40)]


@pytest.mark.parametrize(
    ("change", "tokens", "message"),
    [
        (
            "newline=-1",
            ("|SPEAKER|", "|NEWLINE|"),
            r"data\.pictures\.newline = -1: .* '\|NEWLINE\|', token 1, .* = 1 to",
        ),
        ("newline=0", ("|SPEAKER|",), r"tokenizer: it lacks '\|NEWLINE\|'"),
        (
            "resize=crop",
            ("|SPEAKER|", "|NEWLINE|"),
            r'data\.pictures\.resize = "crop": .* train with "native" to export',
        ),
    ],
)
def test_steps_that_its_processor_does_not_do_are_refused(
    change: str, tokens: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    save_hf(FUYU | {"image_token_id": 0}, tmp_path / "hf")
    import_run(tmp_path / "hf", run)
    edit_run(run, f"data.pictures.{change}", *(["data.pictures.size=15"] if "crop" in change else []))
    with pytest.raises(ValueError, match=message) as caught:
        export_run(run, tmp_path / "out", tokenizer=save_tokenizer(tmp_path / "tokenizer", *tokens))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_export_without_tokenizer_says_that_rows_had_no_new_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_hf(FUYU, tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert "the run did not (data.pictures.newline = -1)" in capsys.readouterr().out


def test_an_image_token_of_another_name_is_refused(tmp_path: Path) -> None:
    save_hf(FUYU | {"image_token_id": 0}, tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ValueError, match=r"image_token = 0 must be '\|SPEAKER\|' for a FuyuProcessor") as caught:
        export_run(tmp_path / "run", tmp_path / "out", tokenizer=save_tokenizer(tmp_path / "tokenizer", "<image>"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0.3, 0.05])
def test_dims_that_make_no_pairs_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"head_dim = 10 with model.rotary_fraction = {fraction}: . dims would rotate"):
        VLMConfig(hidden=60, heads=6, rotary_fraction=fraction, head_dim=10)
