"""A run's configuration: TOML recipe, inheritance, dotted overrides; frozen once resolved, with provenance.

defaults  <-  base recipe  <-  recipe  <-  key=value overrides
"""

import difflib
import tomllib
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from parallel.engine import ENGINES, check_engine
from parallel.engines.deepspeed_options import DeepSpeedOptions
from parallel.mesh import ParallelConfig
from pretrain.heartbeat import WatchdogConfig
from pretrain.models import FAMILIES
from pretrain.objectives import OBJECTIVES
from pretrain.optim import OptimConfig
from pretrain.schedule import ScheduleConfig, check_schedule
from pretrain.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    RunConfigSection,
    Section,
    TokenizerConfig,
    TrainConfig,
)

RECIPES = Path(__file__).parent / "recipes"
Tree = dict[str, Any]
Origins = dict[str, str]  # dotted key -> where its value comes from


def _union(types: list[Any], discriminator: str) -> Any:
    """One of these config classes, told apart by a literal field; the class itself when there is one only."""
    return types[0] if len(types) == 1 else Annotated[reduce(or_, types), Field(discriminator=discriminator)]


if TYPE_CHECKING:
    AnyModelConfig = Any
    AnyObjectiveConfig = Any
else:
    AnyModelConfig = _union([family.config for family in FAMILIES.values()], "family")
    AnyObjectiveConfig = _union([config for config, _ in OBJECTIVES.values()], "name")


class RunConfig(Section):
    """Everything one run is made of."""

    engine: str = Field("torch", description=f"Training engine: {', '.join(ENGINES)}")
    run: RunConfigSection = RunConfigSection()
    model: AnyModelConfig = Field(default_factory=FAMILIES["decoder"].config)
    tokenizer: TokenizerConfig = TokenizerConfig()
    objective: AnyObjectiveConfig = Field(default_factory=OBJECTIVES["causal"][0])
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    deepspeed: DeepSpeedOptions = DeepSpeedOptions()

    @model_validator(mode="before")
    @classmethod
    def _named(cls, tree: Any) -> Any:
        """A section whose keys depend on a name: the usual one where a recipe gives none."""
        if not isinstance(tree, dict):
            return tree
        usual = {"model": {"family": "decoder"}, "objective": {"name": "causal"}}
        return tree | {key: usual[key] | tree[key] for key in usual if isinstance(tree.get(key), dict)}

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        sections = {name: section for name, section in self if isinstance(section, BaseModel)}
        check_engine(self.engine, {f"{name}.{key}": v for name, section in sections.items() for key, v in section})
        if self.engine == "megatron":
            FAMILIES[self.model.family].megatron(self.model)  # type: ignore[misc]  # the table says which have it
        self.model.check_length(self.data.seq_len)
        self.model.check_patches(self.data.patches, self.parallel.tp)
        both = getattr(self.objective, "image_attention", "causal") == "both" and self.data.patches
        if both and self.parallel.cp > 1 and self.parallel.cp_method == "ring":
            raise ValueError(
                'parallel.cp_method = "ring" cannot do objective.image_attention = "both"; set it to "ulysses"'
            )
        if both and not self.objective.document_mask:
            raise ValueError(
                'objective.document_mask = false leaves no mask for objective.image_attention = "both"; set it to '
                'true, or image_attention to "causal"'
            )
        if self.train.global_batch % self.train.micro_batch:
            raise ValueError(
                f"train.global_batch = {self.train.global_batch} is not a multiple of train.micro_batch = "
                f"{self.train.micro_batch}; change one of them"
            )
        if self.train.stop_at > self.train.steps:
            raise ValueError(
                f"train.stop_at = {self.train.stop_at} is past the end, train.steps = {self.train.steps}; lower it"
            )
        if self.eval.every and not self.eval.shards:
            raise ValueError("eval.every is set but eval.shards is empty; name held-out shards or set eval.every = 0")
        check_schedule(self.schedule, self.train.steps)
        return self


def resolve(recipe: str, overrides: list[str] | None = None) -> tuple[RunConfig, Origins]:
    """Recipe name or path, and `key=value` overrides -> the validated config and where each key comes from.

    Raises FileNotFoundError for a recipe that is not there, ValueError (one line) for anything wrong in it.
    """
    tree, origins = _load_recipe(find_recipe(recipe).resolve(), seen=())
    for override in overrides or []:
        key, value = _parse_override(override)
        _insert(tree, key, value, override)
        for below in [old for old in origins if old.startswith(f"{key}.")]:
            del origins[below]
        origins.update(dict.fromkeys(_flatten(value, key), f"override {override}"))
    return validate(tree, recipe), origins


def find_recipe(recipe: str) -> Path:
    """A path as it stands; a bare name from the recipes that come with the package."""
    path = Path(recipe)
    if path.suffix == ".toml" or len(path.parts) > 1:
        if not path.is_file():
            raise FileNotFoundError(f"recipe {recipe}: no such file")
        return path
    names = recipe_names()
    if recipe not in names:
        raise FileNotFoundError(f"recipe {recipe!r} is unknown{_suggest(recipe, names)}; one of {', '.join(names)}")
    return RECIPES / f"{recipe}.toml"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def validate(tree: Tree, where: str) -> RunConfig:
    """A plain tree -> RunConfig; every error of it in one line that starts with `where`."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(_explain(detail) for detail in error.errors())) from None


def load_run_config(run_dir: Path) -> RunConfig:
    """The resolved config saved in a run's folder."""
    path = Path(run_dir) / "config.toml"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is not a run: {path} is missing")
    return validate(_read_toml(path), str(path))


def override_config(run_dir: Path, overrides: list[str]) -> RunConfig:
    """The config saved in a run's folder, with `key=value` overrides."""
    return resolve(str(Path(run_dir) / "config.toml"), overrides)[0]


def write_config(config: RunConfig, path: Path) -> None:
    """Save a resolved config as TOML that `load_run_config` and `pretrain run` read."""
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))


def explain_origins(config: RunConfig, origins: Origins) -> list[tuple[str, str, str]]:
    """(dotted key, value, origin) of every resolved key, in the order of the sections."""
    return [(key, repr(value), _origin(key, origins)) for key, value in flat_config(config).items()]


def flat_config(config: RunConfig) -> Tree:
    """Dotted key -> value."""
    return _flatten(config.model_dump(mode="json"), "")


def recipe_schema() -> Tree:
    """JSON Schema of a recipe file, `base` included."""
    schema = RunConfig.model_json_schema()
    schema["properties"]["base"] = {"type": "string", "description": "Recipe to inherit from, then override"}
    return schema


def _origin(key: str, origins: Origins) -> str:
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return "default"


def _load_recipe(path: Path, seen: tuple[Path, ...]) -> tuple[Tree, Origins]:
    if path in seen:
        raise ValueError(f"recipe {path}: base recipes go in a circle: {' -> '.join(p.name for p in (*seen, path))}")
    own = _read_toml(path)
    base = own.pop("base", None)
    tree: Tree = {}
    origins: Origins = {}
    if base is not None:
        beside = path.parent / f"{str(base).removesuffix('.toml')}.toml"
        tree, origins = _load_recipe(beside.resolve() if beside.is_file() else find_recipe(str(base)), (*seen, path))
    _merge(tree, own)
    origins.update(dict.fromkeys(_flatten(own, ""), f"recipe {path.name}"))
    return tree, origins


def _read_toml(path: Path) -> Tree:
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def _merge(tree: Tree, over: Tree) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _parse_override(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ValueError(f"override {override!r}: write it as key=value, such as train.steps=200")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text  # a bare word or path needs no quotes


def _insert(tree: Tree, key: str, value: Any, override: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {override!r}: {section!r} is a value, not a section")
    tree[last] = value


def _flatten(value: Any, key: str) -> Tree:
    if isinstance(value, dict) and (value or not key):
        flat: Tree = {}
        for name, inner in value.items():
            flat |= _flatten(inner, f"{key}.{name}" if key else name)
        return flat
    return {key: value}


def _explain(detail: Any) -> str:
    location = [str(part) for part in detail["loc"] if str(part) not in FAMILIES and str(part) not in OBJECTIVES]
    key = ".".join(location)
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key}{_suggest(key, _known_keys())}"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return f"{key} = {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _suggest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:  # a right key in the wrong section
        near = [key for key in known if key.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    return f" (did you mean {near[0]}?)" if near else ""


def _known_keys() -> list[str]:
    def keys(annotation: Any, prefix: str) -> list[str]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found = []
            for name, field in annotation.model_fields.items():
                key = f"{prefix}{field.alias or name}"
                found += [key, *keys(field.annotation, f"{key}.")]
            return found
        if hasattr(annotation, "__dataclass_fields__"):
            return [f"{prefix}{name}" for name in annotation.__dataclass_fields__]
        return [key for inner in get_args(annotation) for key in keys(inner, prefix)]

    return keys(RunConfig, "")
