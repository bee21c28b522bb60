"""One small tokenizer for building, generating and exporting: a ``tokenizer.json`` and who its special tokens
are.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from data_pipeline.paths import write_atomic
from data_pipeline.sentencepiece_model import convert_sentencepiece, train_sentencepiece
from data_pipeline.shards import token_dtype

JSON, CONFIG, MODEL = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
BESIDE = (
    CONFIG,
    MODEL,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[SEP]")


class Tokenizer:
    """Text to ids and back.

    Attributes:
        vocab_size: largest id + 1. eos_id: the end-of-text token. bos_id, unk_id, pad_id: or None.
        dtype: smallest numpy dtype name that holds every id.
    """

    def __init__(self, fast: FastTokenizer, special: dict[str, str], files: dict[str, bytes]) -> None:
        """``special`` maps roles (``eos_token``) to tokens; ``files`` are what ``save`` writes, byte for
        byte.
        """
        self._fast, self._files, self.special = fast, files, special
        # Text that spells a special token must not become one: it would end documents in their middle.
        fast.encode_special_tokens = True
        fast.no_truncation()
        fast.no_padding()
        self.vocab_size = max(fast.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = token_dtype(self.vocab_size)
        eos_id = self._id("eos_token")
        if eos_id is None:
            raise ValueError(
                f"tokenizer: its end-of-text token {special.get('eos_token')!r} is not in its vocabulary; "
                f"name one in "
                f"{CONFIG} (eos_token)"
            )
        self.eos_id: int = eos_id
        self.bos_id, self.unk_id, self.pad_id = (
            self._id("bos_token"),
            self._id("unk_token"),
            self._id("pad_token"),
        )

    def _id(self, role: str) -> int | None:
        token = self.special.get(role)
        return None if token is None else self._fast.token_to_id(token)

    def encode_batch(self, texts: Sequence[str], *, end_of_text: bool = False) -> list[np.ndarray]:
        """Ids of each text as arrays of ``dtype``, without special tokens but for ``eos_id`` last if asked
        for.
        """
        end = [self.eos_id] if end_of_text else []
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids + end, dtype=self.dtype) for encoding in encodings]

    def encode(self, text: str) -> np.ndarray:
        """Ids [n] of one text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids [n] of a prompt as Hugging Face's ``tokenizer(text)`` gives them: with the special tokens that its
        post-processor adds (the first one of Llama, Gemma, Mistral), and those that the text spells.
        """
        self._fast.encode_special_tokens = False
        try:
            return np.array(self._fast.encode(text).ids, dtype=self.dtype)
        finally:
            self._fast.encode_special_tokens = True

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of ids [n]."""
        return self._fast.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def save(self, folder: Path | str) -> None:
        """Write the files that Hugging Face's ``AutoTokenizer`` reads, into an existing or new folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            write_atomic(Path(folder) / name, data)

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids."""
        facts = self._files[JSON] + json.dumps(self.special, sort_keys=True).encode()
        return hashlib.sha256(facts).hexdigest()


def train_tokenizer(texts: Sequence[str], *, model: str = "bpe", vocab_size: int = 8192) -> Tokenizer:
    """Train a SentencePiece tokenizer ("bpe" or "unigram") that gives back every text unchanged."""
    return _from_sentencepiece(train_sentencepiece(texts, model=model, vocab_size=vocab_size), "trained tokenizer")


def load_tokenizer(path: Path | str, *, eos_token: str | None = None) -> Tokenizer:
    """Load a folder with a ``tokenizer.json``, such a file, or a SentencePiece ``.model``.

    Args:
        eos_token: the end-of-text token, where ``tokenizer_config.json`` does not say and no usual name is
        found.

    Raises:
        FileNotFoundError: there is no tokenizer. ValueError: unreadable, or without an end-of-text token.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (JSON, MODEL) if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"tokenizer {path}: the folder holds neither {JSON} nor {MODEL}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path}: no such file; give a folder, a tokenizer.json or a .model")
    if path.suffix == ".model":
        return _from_sentencepiece(path.read_bytes(), str(path))
    data = path.read_bytes()
    try:
        fast = FastTokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer {path}: not a tokenizer.json ({error})") from error
    config = path.with_name(CONFIG)
    special = _special_tokens(json.loads(config.read_text())) if config.is_file() else {}
    if eos_token is not None:
        special["eos_token"] = eos_token
    if "eos_token" not in special:
        usual = [token for token in END_OF_TEXT if fast.token_to_id(token) is not None]
        if not usual:
            raise ValueError(
                f"tokenizer {path}: no end-of-text token found ({', '.join(END_OF_TEXT)}); name it with eos_token"
            )
        special["eos_token"] = usual[0]
    unknown = getattr(fast.model, "unk_token", None)
    if "unk_token" not in special and isinstance(unknown, str):
        special["unk_token"] = unknown
    files = {name: (path.parent / name).read_bytes() for name in BESIDE if (path.parent / name).is_file()}
    if CONFIG not in files or eos_token is not None:
        files[CONFIG] = _config(special, json.loads(files.get(CONFIG, b"{}")))
    return Tokenizer(fast, special, {**files, JSON: data})


def _from_sentencepiece(model: bytes, name: str) -> Tokenizer:
    fast, special = convert_sentencepiece(model, name)
    if "eos_token" not in special:
        raise ValueError(f"{name}: has no end-of-sentence piece; train it with eos_id >= 0")
    files = {JSON: fast.to_str(pretty=True).encode(), CONFIG: _config(special, {}), MODEL: model}
    return Tokenizer(fast, special, files)


def _special_tokens(config: dict) -> dict[str, str]:
    """Roles to tokens; a token is written as text, or as a record with its ``content``."""
    found = {}
    for role in ("eos_token", "bos_token", "unk_token", "pad_token"):
        token = config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[role] = token
    return found


def _config(special: dict[str, str], known: dict) -> bytes:
    """A tokenizer_config.json: the generic class, since brand classes rebuild the tokenizer in their own
    way.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **known,
        **special,
    }
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
