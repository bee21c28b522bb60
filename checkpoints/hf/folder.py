"""What stands beside the weights in a Hugging Face folder: config.json, generation_config.json, tokenizer files."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from checkpoints.hf.brand import TOKENS, Brand, Config
from checkpoints.shards import dtype_name

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
SAMPLE = "The 12 foxes' naïve  plan:\n\tif x >= 3.14:  return 'done', 100% 日本 😀\n"


@dataclass(frozen=True)
class Kept:
    """What an imported folder said that the native config has no place for; an export gives it back.

    brand: its model_type. config: keys without a say in what the model computes. generation: generation_config.json.
    """

    brand: str
    config: Config = field(default_factory=dict)
    generation: Config | None = None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Kept":
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{path} is damaged: remove it to export without what the import had kept") from None


def read_config(folder: Path, brands: dict[str, Brand]) -> tuple[Brand, Config, Kept]:
    """(brand, native config, what to keep) of a Hugging Face folder.

    transformers reads the file first, so that old spellings of a key arrive in today's. Raises FileNotFoundError or
    ValueError for a folder without a readable config, of an unknown architecture, or with what we cannot express.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the folder of a Hugging Face model")
    raw = _read_json(path)
    model_type = raw.get("model_type")
    if model_type not in brands:
        raise ValueError(f"{path}: model_type = {model_type!r} cannot be imported (allowed: {', '.join(brands)})")
    brand = brands[model_type]
    from transformers import AutoConfig  # imports slowly

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validators raise many types
        raise ValueError(f"{path}: transformers refuses it: {' '.join(str(error).split())}") from error
    normal = config.to_dict()
    generation = _read_json(folder / GENERATION) if (folder / GENERATION).is_file() else None
    native = brand.to_native(normal, type(config)().to_dict(), str(path))
    return brand, native, Kept(brand.model_type, brand.keep(normal), generation)


def write_config(
    folder: Path, brand: Brand, native: Config, dtype: torch.dtype, kept: Kept | None, tokenizer: Path | None
) -> None:
    """Write config.json and generation_config.json. Special tokens: as kept, else the tokenizer's, else none.

    Raises ValueError where the brand, or transformers, cannot express the config.
    """
    values = brand.to_hf(native)
    if kept is not None and kept.brand != brand.model_type:
        kept = Kept(brand.model_type, {key: kept.config.get(key) for key in TOKENS})
    if kept is None:
        kept = Kept(brand.model_type, special_tokens(tokenizer) if tokenizer else dict.fromkeys(TOKENS))
    from transformers import AutoConfig, GenerationConfig

    about = {"architectures": [brand.architecture], "dtype": dtype_name(dtype)}
    try:
        config = AutoConfig.for_model(brand.model_type, **{**kept.config, **values, **about})
    except Exception as error:  # its validators raise many types
        raise ValueError(f"{brand.model_type} cannot express this model: {' '.join(str(error).split())}") from error
    config.save_pretrained(folder)
    if kept.generation is not None:
        (folder / GENERATION).write_text(json.dumps(kept.generation, indent=2, sort_keys=True) + "\n")
    else:
        tokens = {key: kept.config.get(key) for key in TOKENS}
        GenerationConfig(**tokens, _from_model_config=True).save_pretrained(folder)


def special_tokens(tokenizer: Path) -> Config:
    """Ids of the special tokens that a tokenizer's folder names, None for those it does not."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    return {key: getattr(loaded, key) for key in TOKENS}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files that stand in `source`, if any."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raises ValueError unless transformers loads the folder's tokenizer, and the model knows all of its tokens.

    For some architectures (Qwen2) transformers puts a class of its own in place of the generic one that the folder
    asks for, and splits text differently: that is found here, not by whoever uses the model.
    """
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # many types, the tokenizers library's bare Exception among them
        raise ValueError(f"tokenizer: transformers cannot load it: {' '.join(str(error).split())}") from error
    if len(loaded) > vocab_size:
        raise ValueError(
            f"tokenizer: it has {len(loaded)} tokens, but model.vocab_size = {vocab_size}; use the model's own"
        )
    declared = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if declared.get("tokenizer_class") not in GENERIC or not (folder / "tokenizer.json").is_file():
        return
    ours = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(SAMPLE, add_special_tokens=False).ids
    if loaded.encode(SAMPLE, add_special_tokens=False) != ours:
        raise ValueError(
            f"tokenizer: for this architecture transformers loads it as {type(loaded).__name__} and gets other tokens; "
            "export as another --brand, or move the run's tokenizer folder away to export without it"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content
