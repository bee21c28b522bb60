"""Ids equal SentencePiece's, text comes back unchanged, and Hugging Face reads the same tokenizer."""

import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer

from data_pipeline.sources.stdlib import tiny_files
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

HARD = [
    "",
    " ",
    "  a",
    "a  ",
    "\n\n\tx\ty\r\n",
    "é 日本 🎉 e\u0301",
    " " * 43 + "x = 1\n",
    " \n ",
    "\u00a0\u2003x\u200b",
    "\x00\x01\x7f",
    "1234 5678",
    "<0x09> <0x41>",
]
SPELLED = "a </s> b <s> <unk> <pad>"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in tiny_files(500_000)]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request, texts, tmp_path_factory):
    tokenizer = train_tokenizer(texts, model=request.param, vocab_size=1500)
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save(folder)
    return tokenizer, folder


def test_ids_equal_sentencepieces_on_real_and_hard_text(trained, texts) -> None:
    tokenizer, folder = trained
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    lines = [line for text in texts[:6] for line in text.splitlines(keepends=True)] + [*HARD, SPELLED]
    different = 0
    for line, ids in zip(lines, tokenizer.encode_batch(lines), strict=True):
        wanted = processor.encode(line)
        if ids.tolist() != wanted:  # unigram: another cut of the same score, as of six spaces into 2 + 4 or 4 + 2
            different += 1
            scores = [sum(processor.get_score(number) for number in found) for found in (ids.tolist(), wanted)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-3), line
    is_bpe = b'"BPE"' in (folder / "tokenizer.json").read_bytes()
    assert different <= (0 if is_bpe else len(lines) // 20)


def test_bpe_equals_sentencepiece_on_whole_documents(texts) -> None:
    tokenizer = train_tokenizer(texts, model="bpe", vocab_size=1500)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._files["tokenizer.model"])
    for text in [*texts, *HARD]:
        assert tokenizer.encode(text).tolist() == processor.encode(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_comes_back(trained, text) -> None:
    tokenizer, _ = trained
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_documents_come_back_and_no_text_becomes_a_special_token(trained, texts) -> None:
    tokenizer, _ = trained
    for text in [*texts, *HARD, SPELLED]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id, tokenizer.pad_id}.intersection(ids.tolist())


def test_ids_and_dtype(trained) -> None:
    tokenizer, _ = trained
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 1500
    ended = tokenizer.encode_batch(["a b", ""], end_of_text=True)
    assert [ids.dtype for ids in ended] == [np.uint16] * 2
    assert ended[0].tolist() == [*tokenizer.encode("a b").tolist(), 2] and ended[1].tolist() == [2]


@pytest.mark.parametrize("model_type", [None, "llama", "mistral", "qwen3", "olmo2", "gemma3_text", "smollm3", "gpt2"])
def test_hugging_face_reads_the_same_tokenizer(trained, texts, tmp_path, model_type) -> None:
    tokenizer, _ = trained
    tokenizer.save(tmp_path)
    if model_type is not None:  # AutoTokenizer looks at the model's config too
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*texts[:5], *HARD]:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text).input_ids == tokenizer.encode_prompt(text).tolist() == ids
        assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (2, 1, 0, 3)


def test_training_and_saving_are_deterministic(texts, trained, tmp_path) -> None:
    _, folder = trained
    kind = "unigram" if b'"Unigram"' in (folder / "tokenizer.json").read_bytes() else "bpe"
    train_tokenizer(texts, model=kind, vocab_size=1500).save(tmp_path)
    load_tokenizer(folder).save(tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_model_file_alone_gives_the_same_tokenizer(trained, tmp_path) -> None:
    tokenizer, folder = trained
    loaded = load_tokenizer(folder / "tokenizer.model")
    assert loaded.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_models_of_others_with_normalisation_and_dummy_prefix(texts, tmp_path, kind) -> None:
    """As Llama 2 (BPE, dummy prefix) and T5 (unigram, nmt_nfkc, spaces squeezed) were trained."""
    options = {"bpe": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}}.get(kind, {})
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(texts).splitlines()),
        model_prefix=str(tmp_path / "other"),
        model_type=kind,
        vocab_size=1200,
        byte_fallback=kind == "bpe",
        minloglevel=2,
        **options,
    )
    tokenizer = load_tokenizer(tmp_path / "other.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "other.model"))
    for text in ["def f(x): return 1", "ﬁne Ｘ½ naïve", "two words  here", "日本 x", "a"]:
        assert tokenizer.encode(text).tolist() == processor.encode(text), text
    for text in ["def f(x): return 1", "two words  here"]:  # unknown letters would be shown in another way
        assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text))


def byte_level(tmp_path, **special) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.add_special_tokens(list(special.values()))
    fast.save(str(tmp_path / "tokenizer.json"))


def test_tokenizer_json_without_config_finds_a_usual_end_of_text(tmp_path) -> None:
    byte_level(tmp_path, eos="<|endoftext|>")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (256, None, 257)
    tokenizer.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id == 256


def test_end_of_text_from_config_or_argument(tmp_path) -> None:
    byte_level(tmp_path, eos="<|stop|>", other="</s>")
    assert load_tokenizer(tmp_path).eos_id == 257
    assert load_tokenizer(tmp_path, eos_token="<|stop|>").eos_id == 256
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|stop|>"}, "extra": 1}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 256
    tokenizer.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["extra"] == 1


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False, "add_eos_token": True}])  # theirs ignores them too
def test_prompts_begin_as_hugging_faces_do_and_documents_stay_without(tmp_path, flags) -> None:
    byte_level(tmp_path, bos_token="<s>", eos_token="</s>")
    fast = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    fast.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **flags}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ["a b", "", "é 日本", "it ends </s> here"]:
        assert tokenizer.encode_prompt(text).tolist() == theirs(text).input_ids
        assert not {256, 257}.intersection(tokenizer.encode(text).tolist())
    assert tokenizer.encode_prompt("a").tolist() == [256, 64]


def test_prompt_of_ours_takes_spelled_special_tokens(trained) -> None:
    tokenizer, folder = trained
    assert tokenizer.encode_prompt(SPELLED).tolist() == AutoTokenizer.from_pretrained(folder)(SPELLED).input_ids
    assert tokenizer.eos_id in tokenizer.encode_prompt(SPELLED)


def test_bad_tokenizers(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tokenizer(tmp_path / "none.json")
    byte_level(tmp_path)
    with pytest.raises(ValueError, match="no end-of-text token found"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="'<nope>' is not in its vocabulary"):
        load_tokenizer(tmp_path, eos_token="<nope>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"\x08garbage")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")


def test_vocabulary_too_large_for_the_text() -> None:
    with pytest.raises(ValueError, match="vocab_size 5000: SentencePiece cannot train it"):
        train_tokenizer(["a few words only"], vocab_size=5000)
    with pytest.raises(ValueError, match="must be bpe or unigram"):
        train_tokenizer(["a"], model="wordpiece")


def test_unknown_letters_of_a_model_without_bytes_are_counted(texts, tmp_path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:3]),
        model_prefix=str(tmp_path / "m"),
        vocab_size=300,
        minloglevel=2,
        max_sentence_length=10**6,
    )
    tokenizer: Tokenizer = load_tokenizer(tmp_path / "m.model")
    assert tokenizer.unk_id in tokenizer.encode("日本").tolist()
