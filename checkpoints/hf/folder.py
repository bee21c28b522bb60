"""What stands beside the weights in a Hugging Face folder: config.json, generation_config.json."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints.hf.brand import TOKENS, Brand, Config
from checkpoints.hf.tokenizer import special_tokens
from checkpoints.shards import dtype_name

CONFIG, GENERATION = "config.json", "generation_config.json"
KEPT = "huggingface.json"  # in an imported run's folder


@dataclass(frozen=True)
class Kept:
    """What an imported folder said that the native config has no place for; an export gives it back.

    brand: its model_type. config: keys without a say in what the model computes. generation: generation_config.json.
    """

    brand: str
    config: Config = field(default_factory=dict)
    generation: Config | None = None

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a text where transformers generates with the exported model; none if it names none."""
        ids = (self.config if self.generation is None else self.generation).get("eos_token_id")
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content
