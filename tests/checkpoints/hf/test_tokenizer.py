import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from checkpoints.hf.tokenizer import settle_tokenizer, special_tokens
from tests.checkpoints.hf.tiny import CASES, TEXT, save_model, tiny_tokenizer

CODE = "def f(x):\n    return x ** 2  # naïve, 日本"


def model_with_tokenizer(name: str, folder: Path) -> Path:
    save_model(CASES[name], folder)
    tiny_tokenizer().save(folder)
    return folder


def add_token(folder: Path, index: int, content: str, special: bool) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": index, "content": content, "special": special, **flags})
    path.write_text(json.dumps(tokenizer))


def test_transformers_own_class_does_not_replace_ours(tmp_path: Path) -> None:
    """Qwen2Tokenizer splits text before merging, wherever it stands and whatever tokenizer.json says."""
    folder, ours = model_with_tokenizer("qwen2", tmp_path), tiny_tokenizer()
    assert AutoTokenizer.from_pretrained(folder).encode(TEXT[0]) != ours.encode(TEXT[0]).tolist()
    settle_tokenizer(folder, ours.vocab_size)
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in (TEXT[0], CODE):
        assert loaded.encode(text, add_special_tokens=False) == ours.encode(text).tolist()
    assert loaded.eos_token_id == ours.eos_id


@pytest.mark.parametrize("name", ["llama2", "gemma3", "gpt2"])
def test_files_that_are_read_as_written_stay_as_they_are(name: str, tmp_path: Path) -> None:
    folder = model_with_tokenizer(name, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    settle_tokenizer(folder, 300)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_tokens_that_the_model_does_not_know(tmp_path: Path) -> None:
    folder = model_with_tokenizer("llama2", tmp_path)
    with pytest.raises(ValueError, match=r"it has 300 tokens, but model.vocab_size = 299; use the model's own"):
        settle_tokenizer(folder, 299)
    add_token(folder, 300, "<image>", special=True)
    settle_tokenizer(folder, 300)  # no text turns into it: as in Gemma 3
    add_token(folder, 301, "word", special=False)
    with pytest.raises(ValueError, match=r"it has 302 tokens, but model.vocab_size = 300"):
        settle_tokenizer(folder, 300)


def test_a_padding_token_beyond_the_vocabulary_would_be_fed_to_the_model(tmp_path: Path) -> None:
    folder = model_with_tokenizer("llama2", tmp_path)
    add_token(folder, 300, "<padding>", special=True)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<padding>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"it has 301 tokens, but model.vocab_size = 300"):
        settle_tokenizer(folder, 300)


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    folder = model_with_tokenizer("llama2", tmp_path)
    (folder / "tokenizer.json").write_text('{"model": 3}\n')
    for check in (special_tokens, lambda path: settle_tokenizer(path, 300)):
        with pytest.raises(ValueError, match="tokenizer: transformers cannot load it") as caught:
            check(folder)
        assert "\n" not in str(caught.value)
