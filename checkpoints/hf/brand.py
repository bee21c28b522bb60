"""What a family states about a Hugging Face architecture, and the vocabulary to state its config in.

A config row claims native keys and Hugging Face keys and reads both ways; every native key must be claimed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from checkpoints.hf.ops import Row, match
from checkpoints.hf.probe import Probe

Config = dict[str, Any]

# No say in what a model computes: kept as they were where a model was imported.
NEUTRAL = (
    "model_type", "architectures", "transformers_version", "dtype", "_name_or_path", "use_cache", "id2label",
    "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states", "bos_token_id",
    "eos_token_id", "pad_token_id", "attention_dropout", "pretraining_tp",
)  # fmt: skip
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Written anew at each export, or of no use in the config.
FLEETING = ("model_type", "architectures", "transformers_version", "dtype", "_name_or_path")


class Misfit(ValueError):
    """A config that the other side cannot express; the message names key, value and what is allowed."""


class ConfigRow(Protocol):
    """native, hf: the keys this row answers for. Both directions raise Misfit for what they cannot express."""

    @property
    def native(self) -> tuple[str, ...]: ...
    @property
    def hf(self) -> tuple[str, ...]: ...
    def to_hf(self, native: Config) -> Config: ...
    def to_native(self, hf: Config) -> Config: ...


@dataclass(frozen=True)
class Same:
    """One key on each side, with the same value."""

    native_key: str
    hf_key: str

    @property
    def native(self) -> tuple[str, ...]:
        return (self.native_key,)

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.hf_key,)

    def to_hf(self, native: Config) -> Config:
        return {self.hf_key: native[self.native_key]}

    def to_native(self, hf: Config) -> Config:
        return {self.native_key: hf[self.hf_key]}


@dataclass(frozen=True)
class Choice:
    """One key on each side, with other words for the same. (native, hf) pairs: the first that fits is written."""

    native_key: str
    hf_key: str
    words: tuple[tuple[Any, Any], ...]

    @property
    def native(self) -> tuple[str, ...]:
        return (self.native_key,)

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.hf_key,)

    def to_hf(self, native: Config) -> Config:
        value = native[self.native_key]
        for ours, theirs in self.words:
            if ours == value:
                return {self.hf_key: theirs}
        raise misfit(f"model.{self.native_key}", value, [ours for ours, _ in self.words])

    def to_native(self, hf: Config) -> Config:
        value = hf[self.hf_key]
        for ours, theirs in self.words:
            if theirs == value:
                return {self.native_key: ours}
        raise misfit(self.hf_key, value, [theirs for _, theirs in self.words])


@dataclass(frozen=True)
class OnlyNative:
    """A native key that this architecture knows with one value alone, and has no key for."""

    key: str
    value: Any

    @property
    def native(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def hf(self) -> tuple[str, ...]:
        return ()

    def to_hf(self, native: Config) -> Config:
        if native[self.key] != self.value:
            raise misfit(f"model.{self.key}", native[self.key], [self.value])
        return {}

    def to_native(self, hf: Config) -> Config:
        return {self.key: self.value}


@dataclass(frozen=True)
class OnlyHf:
    """A Hugging Face key that the native model knows with one value alone, and has no key for."""

    key: str
    value: Any

    @property
    def native(self) -> tuple[str, ...]:
        return ()

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.key,)

    def to_hf(self, native: Config) -> Config:
        return {self.key: self.value}

    def to_native(self, hf: Config) -> Config:
        if hf.get(self.key, self.value) != self.value:
            raise misfit(self.key, hf[self.key], [self.value])
        return {}


@dataclass(frozen=True)
class Mapped:
    """Keys that belong together, by a function each way."""

    native: tuple[str, ...]
    hf: tuple[str, ...]
    write: Callable[[Config], Config]
    read: Callable[[Config], Config]

    def to_hf(self, native: Config) -> Config:
        return self.write(native)

    def to_native(self, hf: Config) -> Config:
        return self.read(hf)


@dataclass(frozen=True)
class Brand:
    """One Hugging Face architecture.

    model_type, architecture: as in config.json. tensors: the key table. config: the config's rows. carried: further
    config keys without a say in what the model computes. ignored: templates of tensors that files hold and nobody
    needs; `{layers}` is the number of layers, `*` anything. prefix: what names begin with, left out
    by files saved from the bare model. inner: of a config made of several, their keys and the brands they may be of;
    the language model's comes first. probe: native config -> what its proof is run on; None: random tokens. patches:
    native config -> image patches of one picture, 0 for a model without eyes. pairs: the model compares pictures with
    texts and gives features, not logits of tokens; looks_for_end: it takes a text's at the end-of-text token.
    objective: of the run that an import makes, as a recipe has it.
    """

    model_type: str
    architecture: str
    tensors: tuple[Row, ...]
    config: tuple[ConfigRow, ...]
    carried: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    prefix: str = "model."
    also: tuple[Row, ...] = ()  # of files that hold the same native tensors in another way
    inner: Mapping[str, Mapping[str, "Brand"]] = field(default_factory=dict)
    probe: Callable[[Config], Probe] | None = None
    patches: Callable[[Config], int] = lambda native: 0
    pairs: bool = False
    looks_for_end: bool = False
    objective: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, names: Iterable[str]) -> tuple[Row, ...]:
        """The key table of a file with these tensors: `tensors`, but for what it holds in the way of `also`."""
        full = [name if name.startswith(self.prefix) else self.prefix + name for name in names]
        other = [row for row in self.also if any(match(row.hf[0], name) is not None for name in full)]
        told = {name for row in other for name in row.native}
        return *(row for row in self.tensors if told.isdisjoint(row.native)), *other

    def to_hf(self, native: Config) -> Config:
        """Native config -> config.json's keys. Raises Misfit, naming the brand, for what it cannot express."""
        claimed = {key for row in self.config for key in row.native}
        assert claimed == native.keys(), f"{self.model_type}: rows and config differ in {claimed ^ native.keys()}"
        config: Config = {}
        try:
            for row in self.config:
                config |= row.to_hf(native)
        except Misfit as error:
            raise Misfit(f"{self.model_type} cannot express {error}") from None
        return config

    def to_native(self, config: Config, defaults: Config, where: str) -> Config:
        """Normalised config.json -> native config.

        defaults: of the architecture; a key that no row knows must have its default. Raises Misfit otherwise.
        """
        try:
            return self.read(config, defaults)
        except Misfit as error:
            raise Misfit(f"{where}: cannot import {error}") from None
        except KeyError as error:
            raise Misfit(f"{where}: key {error} is missing") from None

    def read(self, config: Config, defaults: Config) -> Config:
        """As `to_native`, with errors that do not say where. Raises KeyError for a key that is missing."""
        known = {key for row in self.config for key in row.hf} | set(self.carried) | set(NEUTRAL)
        native: Config = {}
        for key in sorted((config.keys() & defaults.keys()) - known):
            if config[key] != defaults[key]:
                raise misfit(key, config[key], [defaults[key]])
        if config.get("quantization_config"):
            raise misfit("quantization_config", "set", [None])
        for row in self.config:
            native |= row.to_native(config)
        return native

    def keep(self, config: Config) -> Config:
        """The keys of an imported config that an export gives back as they were."""
        kept = {key: config[key] for key in (*NEUTRAL, *self.carried) if key in config and key not in FLEETING}
        for key, brands in self.inner.items():
            kind = config[key]["model_type"]
            kept[key] = {"model_type": kind, **brands[kind].keep(config[key])}
        return kept


def misfit(key: str, value: Any, allowed: list[Any]) -> Misfit:
    words = ", ".join(dict.fromkeys(repr(word) for word in allowed))
    return Misfit(f"{key} = {value!r} (allowed: {words})")


def choose_brand(brands: dict[str, Brand], native: Config, wanted: str | None) -> Brand:
    """The brand called `wanted`, or the first that can express this config.

    Raises ValueError: no such brand, or it (or all) cannot, and why.
    """
    if wanted is not None:
        if wanted not in brands:
            raise ValueError(f"brand {wanted!r} is unknown: one of {', '.join(brands)}")
        brands[wanted].to_hf(native)
        return brands[wanted]
    reasons = []
    for brand in brands.values():
        try:
            brand.to_hf(native)
        except Misfit as error:
            reasons.append(str(error))
        else:
            return brand
    raise ValueError("no Hugging Face architecture expresses this model: " + "; ".join(reasons))
