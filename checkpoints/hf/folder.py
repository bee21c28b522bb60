"""What stands beside the weights in a Hugging Face folder: config.json, generation_config.json, a processor's."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from checkpoints.hf import processor
from checkpoints.hf.brand import TOKENS, Brand, Config
from checkpoints.hf.inner import find_tokens, joined, place_tokens
from checkpoints.hf.processor import read_json
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
        ids = find_tokens(self.config if self.generation is None else self.generation)["eos_token_id"]
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
    raw = read_json(path)
    model_type = raw.get("model_type")
    if model_type not in brands:
        raise ValueError(f"{path}: model_type = {model_type!r} cannot be imported (allowed: {', '.join(brands)})")
    brand = brands[model_type]
    from transformers import AutoConfig  # imports slowly

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validators raise many types
        raise ValueError(f"{path}: transformers refuses it: {' '.join(str(error).split())}") from error
    normal = config.to_dict() | ({processor.KEY: processor.read_processor(folder)} if brand.probe else {})
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else None
    native = brand.to_native(normal, type(config)().to_dict(), str(path))
    return brand, native, Kept(brand.model_type, brand.keep(normal), generation)


def write_config(
    folder: Path, brand: Brand, native: Config, dtype: torch.dtype, kept: Kept | None, tokenizer: Path | None
) -> Config | None:
    """Write config.json and generation_config.json. Special tokens: as kept, else the tokenizer's, else none.

    Returns what `write_processor` is to write, None for a model without one. Raises ValueError where the brand, or
    transformers, cannot express the config.
    """
    values = brand.to_hf(native)
    if kept is None:
        tokens = special_tokens(tokenizer) if tokenizer else dict.fromkeys(TOKENS)
        kept = Kept(brand.model_type, place_tokens(brand, tokens))
    elif kept.brand != brand.model_type:
        kept = Kept(brand.model_type, place_tokens(brand, find_tokens(kept.config)))
    values = joined(kept.config, values)
    pictures: Config | None = values.pop(processor.KEY, None)
    from transformers import AutoConfig, GenerationConfig

    about = {"architectures": [brand.architecture], "dtype": dtype_name(dtype)}
    try:
        config = AutoConfig.for_model(brand.model_type, **{**values, **about})
    except Exception as error:  # its validators raise many types
        raise ValueError(f"{brand.model_type} cannot express this model: {' '.join(str(error).split())}") from error
    config.save_pretrained(folder)
    if kept.generation is not None:
        (folder / GENERATION).write_text(json.dumps(kept.generation, indent=2, sort_keys=True) + "\n")
    else:
        GenerationConfig(**find_tokens(kept.config), _from_model_config=True).save_pretrained(folder)
    return pictures
