"""The tokenizer's files beside exported weights: copied, then checked to be read as they were meant."""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoints.hf.brand import TOKENS, Config

FAST, ABOUT = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (
    FAST, ABOUT, "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
SAMPLE = "The 12 foxes' naïve  plan:\n\tif x >= 3.14:  return 'done', 100% 日本 😀\n"


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files that stand in `source`, if any."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def special_tokens(folder: Path) -> Config:
    """Ids of the special tokens that a tokenizer's folder names, None for those it does not. Raises ValueError."""
    loaded = load_tokenizer(folder)
    return {key: getattr(loaded, key) for key in TOKENS}


def settle_tokenizer(folder: Path, vocab_size: int) -> None:
    """Make sure that transformers reads the tokenizer of a model's folder as its files say.

    For some architectures (Qwen2) transformers replaces the generic class that a tokenizer asks for by one of its
    own, which splits text in another way; `tokenizer_config.json` is then marked so that it does not.
    Raises ValueError where that does not help, or the model does not know all tokens.
    """
    _check_size(load_tokenizer(folder), vocab_size)
    if _reads_as_written(folder):
        return
    about = json.loads((folder / ABOUT).read_text())
    # Transformers trusts the class above only if one for remote code is named; that is looked up on explicit request.
    about["auto_map"] = {"AutoTokenizer": [about["tokenizer_class"]] * 2}
    (folder / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    if not _reads_as_written(folder):
        raise ValueError(
            f"tokenizer: for this architecture transformers reads it as {type(load_tokenizer(folder)).__name__} and "
            "gets other tokens; export as another --brand, or move the run's tokenizer folder away to export without it"
        )


def load_tokenizer(folder: Path) -> Any:
    """As transformers reads it. Raises ValueError."""
    from transformers import AutoTokenizer  # imports slowly

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # many types, the tokenizers library's bare Exception among them
        raise ValueError(f"tokenizer: transformers cannot load it: {' '.join(str(error).split())}") from error


def _check_size(loaded: Any, vocab_size: int) -> None:
    """Special tokens that no text turns into may lie beyond the model's (Gemma 3 has one for images)."""
    markers = {token for token, id in loaded.get_added_vocab().items() if loaded.added_tokens_decoder[id].special}
    used = markers & {loaded.bos_token, loaded.eos_token, loaded.pad_token}
    size = 1 + max((id for token, id in loaded.get_vocab().items() if token not in markers - used), default=-1)
    if size > vocab_size:
        raise ValueError(f"tokenizer: it has {size} tokens, but model.vocab_size = {vocab_size}; use the model's own")


def _reads_as_written(folder: Path) -> bool:
    """Only the generic class promises to do what tokenizer.json says; brands' own classes are left to transformers."""
    if not (folder / FAST).is_file() or not (folder / ABOUT).is_file():
        return True
    if json.loads((folder / ABOUT).read_text()).get("tokenizer_class") not in GENERIC:
        return True
    ours = Tokenizer.from_file(str(folder / FAST)).encode(SAMPLE, add_special_tokens=False).ids
    return load_tokenizer(folder).encode(SAMPLE, add_special_tokens=False) == ours
