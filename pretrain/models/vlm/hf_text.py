"""The language model of a vision-language brand, as a config inside its config."""

from collections.abc import Mapping

from checkpoints.hf.brand import Brand, Config, ConfigRow, Mapped
from checkpoints.hf.inner import inner_to_hf, inner_to_native
from pretrain.models.decoder.config import DecoderConfig

DECODER_KEYS = tuple(DecoderConfig.model_fields)


def text_row(brands: Mapping[str, Brand]) -> ConfigRow:
    """The decoder, in `text_config`; whether its head is tied is said above it."""

    def write(native: Config) -> Config:
        decoder = {key: native[key] for key in DECODER_KEYS} | {"family": "decoder"}
        return {"text_config": inner_to_hf(brands, decoder), "tie_word_embeddings": native["tied"]}

    def read(hf: Config) -> Config:
        text = inner_to_native(brands, hf, "text_config")
        return text | {"family": "vlm", "tied": hf["tie_word_embeddings"]}

    return Mapped(DECODER_KEYS, ("text_config", "tie_word_embeddings"), write, read)
