"""Whether a parallel layout computes what one process computes: the runs that are compared, and their comparison.

One process in fp64 is the reference, one in fp32 shows what rounding does (see `parallel.verify`), the layout runs in
fp32: the same initial weights, the same awkward synthetic documents, the real loader, engine and training step.

AdamW divides by the root of the second moment. Where a gradient is almost zero its first update is +lr or -lr as
rounding has it, and two right layouts would differ. Both optimizers are therefore verified with `optim.eps` raised to
the root mean square of the (clipped) gradient: no error is then amplified by more than 1 / eps, and a wrong gradient,
moment, bias correction, rate or decay still shows. Muon's products are done in fp32 (`optim.muon_precision`).
"""

import json
import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from data_pipeline.loader import Loader
from data_pipeline.pack import SampleStream
from parallel.across import check_across
from parallel.context import check_context
from parallel.engine import ENGINES, Batch, Engine, Sums
from parallel.engines.megatron_checks import check_layout as check_megatron
from parallel.expert import check_experts
from parallel.mesh import AXES, resolve_degrees
from parallel.pipeline_cut import check_microbatches, plan_stages
from parallel.tensor import check_tensor
from parallel.verify import Comparison, Distance, Layout, compare, typical_error
from parallel.world import World
from pretrain.config import RunConfig, validate
from pretrain.data import reads_classes
from pretrain.engine import build_engine, make_spec
from pretrain.models import FAMILIES
from pretrain.objectives import OBJECTIVES
from pretrain.synthetic import SyntheticLabels, SyntheticPairs, SyntheticPictures, SyntheticStream
from pretrain.train import train_step

OPTIMIZERS = ("adamw", "muon")
LEARNING_RATE = 0.01  # a smaller one's updates would drown in the rounding of weights near 1
ROUTER_LOSSES = ("balance_loss", "z_loss")
COUNTED = ("accuracy",)  # which of two equal logits is the larger one is for rounding to say
TENSORS = ("initial weights", "gradients", "weights")
Record = dict[str, dict[str, list[float]]]  # kind -> quantity -> fields of its Distance


@dataclass
class Outcome:
    """What one run computed: numbers by kind and name; whole tensors by kind and parameter name, as they were met."""

    numbers: dict[str, dict[str, float]]
    tensors: dict[str, dict[str, Tensor]]


class Recorder:
    """An engine that keeps the gradients of its first step, before they are clipped."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.gradients: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward_backward(self, microbatches: list[Batch], count: Tensor) -> Sums:
        sums = self._engine.forward_backward(microbatches, count)
        if not self.gradients:
            self.gradients = whole(self._engine.gradients())
        return sums


def run_steps(config: RunConfig, world: World, steps: int) -> Outcome:
    """Train `steps` steps of the recipe on synthetic data and evaluate once. Collective."""
    objective = OBJECTIVES[config.objective.name][1](config.objective)
    compiling = config.train.compile == "on"
    if compiling:
        objective.compile()
    engine = build_engine(config, world, objective, compiling)
    recorder: Any = Recorder(engine)
    loader = Loader(
        synthetic_stream(config),
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=engine.data_rank,
        world=engine.data_world,
        prefetch=0,
    )
    initial = whole(engine.state_dict()["model"])
    losses: dict[str, float] = {}
    norms: dict[str, float] = {}
    for step in range(1, steps + 1):
        batches = [objective.collate(batch) for batch in next(loader)[0]]
        values, _ = train_step(recorder, objective, batches, LEARNING_RATE)
        shown = [name for name in (*objective.sums, *ROUTER_LOSSES) if name in values and name not in COUNTED]
        losses |= {f"{name} of step {step}": float(torch.as_tensor(values[name]).sum()) for name in shown}
        norms[f"gradient norm of step {step}"] = float(values["grad_norm"])
    batches = [objective.collate(batch) for batch in next(loader)[0]]
    count = engine.sum_over_data(torch.tensor([objective.count(batches)]))
    losses["loss of evaluation"] = float(engine.evaluate(batches)["loss"] / count)
    weights = whole(engine.state_dict()["model"])
    engine.close()
    tensors = {"initial weights": initial, "gradients": recorder.gradients, "weights": weights}
    return Outcome({"losses": losses, "norms": norms}, tensors)


def synthetic_stream(config: RunConfig) -> SampleStream:
    """Samples from a seed, of the kind that the recipe's model takes."""
    model = config.model
    text = SyntheticStream(seq_len=config.data.seq_len, vocab_size=model.vocab_size, seed=config.run.seed)
    if not config.data.patches:
        return text
    vision, connector = model.vision, getattr(model, "connector", None)
    merge = connector.merge if connector is not None else 1
    rows, columns = vision.grid if vision is not None else (4 * merge, 4 * merge)
    kind = SyntheticPairs if compares_samples(config) else SyntheticPictures
    if reads_classes(config):
        kind = SyntheticLabels
    return kind(
        text,
        patches=config.data.patches,
        values=model.patches.values,
        sides=(rows // merge * merge, columns // merge * merge),
        merge=merge,
        class_slot=vision is not None and vision.class_token,
        queries=connector.queries if connector is not None else 0,
        image_token=getattr(model, "image_token", 0),
    )


def compares_samples(config: RunConfig) -> bool:
    """Whether the loss compares samples of a step with each other, so that one micro-batch must have them all."""
    return hasattr(OBJECTIVES[config.objective.name][1], "across")


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host in fp64, gathered where they are distributed. Collective.

    A sum that is still to be done over processes is not done here: the optimizer would not do it either.
    """
    full = ((name, _as_it_lies(t).full_tensor() if isinstance(t, DTensor) else t) for name, t in tensors.items())
    return {name: tensor.detach().to("cpu", torch.float64, copy=True) for name, tensor in full}


def _as_it_lies(tensor: DTensor) -> DTensor:
    if not any(place.is_partial() for place in tensor.placements):
        return tensor
    placements = [Replicate() if place.is_partial() else place for place in tensor.placements]
    local, mesh = tensor.to_local(), tensor.device_mesh
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def make_reference(world: World, config_text: str, steps: int, folder: str) -> dict[str, Any]:
    """What one process of the torch engine computes in fp64 with each optimizer, as files in `folder`, and how far from
    that fp32 is.
    """
    config = from_text(config_text)
    plain: dict[str, Any] = {
        "parallel.pp": 1,
        "parallel.dp_replicate": 1,
        "parallel.dp_shard": 1,
        "parallel.cp": 1,
        "parallel.tp": 1,
        "parallel.ep": 1,
    }
    plain |= {
        "engine": "torch",
        "parallel.stage_layers": (),
        "parallel.cpu_offload": False,
        "train.recompute": "none",
        "train.compile": "off",
    }
    if compares_samples(config):
        plain["train.micro_batch"] = config.train.global_batch
    alone = changed(config, plain)
    precise = changed(alone, {"train.precision": "fp64"})
    eps = adamw_eps(config, run_steps(precise, world, 1))
    report: dict[str, Any] = {"eps": eps}
    # Another order of sums: another draw of rounding errors.
    if compares_samples(config):
        orders = [{"objective.chunk_rows": rows} for rows in (1, config.objective.chunk_rows)]
    else:
        orders = [{"train.micro_batch": size} for size in {1, config.train.micro_batch}]
    for optimizer in optimizers(config):
        chosen = {"optim.name": optimizer, "optim.eps": eps, "optim.muon_precision": "fp32"}
        outcome = run_steps(changed(precise, chosen), world, steps)
        write_reference(Path(folder), optimizer, outcome)
        reference = Reference(Path(folder), optimizer)
        draws = [reference.distances(run_steps(changed(alone, {**chosen, **order}), world, steps)) for order in orders]
        report[optimizer] = {
            kind: {name: max((d[kind][name] for d in draws), key=lambda fields: fields[0]) for name in names}
            for kind, names in draws[0].items()
        }
    return report


def optimizers(config: RunConfig) -> tuple[str, ...]:
    """Those to verify with: what the recipe's engine can of all."""
    can = ENGINES[config.engine].only.get("optim.name", OPTIMIZERS)
    return tuple(name for name in OPTIMIZERS if name in can)


def adamw_eps(config: RunConfig, outcome: Outcome) -> float:
    """Root mean square of the elements of the gradient that the optimizer gets; at least the recipe's."""
    norm, largest = outcome.numbers["norms"]["gradient norm of step 1"], config.optim.clip_grad_norm
    clipped = min(norm, largest) if largest else norm
    elements = sum(gradient.numel() for gradient in outcome.tensors["gradients"].values())
    return max(config.optim.eps, clipped / math.sqrt(elements))


def write_reference(folder: Path, optimizer: str, outcome: Outcome) -> None:
    tensors = {f"{kind}|{name}": t.contiguous() for kind in TENSORS for name, t in outcome.tensors[kind].items()}
    save_file(tensors, folder / f"{optimizer}.safetensors")
    (folder / f"{optimizer}.json").write_text(json.dumps(outcome.numbers))


class Reference:
    """What `write_reference` wrote, one tensor in memory at a time."""

    def __init__(self, folder: Path, optimizer: str):
        self.numbers: dict[str, dict[str, float]] = json.loads((folder / f"{optimizer}.json").read_text())
        self._file = safe_open(folder / f"{optimizer}.safetensors", framework="pt")

    def distances(self, outcome: Outcome) -> Record:
        """How far a run's quantities are from the reference; those of this process. Weights: their change since the
        start, which a small learning rate cannot hide. A gradient that is not there counts as zeros.
        """
        record: Record = {}
        for kind, numbers in self.numbers.items():
            record[kind] = {n: list(astuple(Distance.of(outcome.numbers[kind][n], v))) for n, v in numbers.items()}
        start, end = outcome.tensors["initial weights"], outcome.tensors["weights"]
        record["initial weights"] = self._compare("initial weights", start)
        gradients = {name: outcome.tensors["gradients"].get(name, torch.zeros_like(start[name])) for name in start}
        record["gradients"] = self._compare("gradients", gradients)
        record["weights"] = {}
        for name in start:
            expected = self._file.get_tensor(f"weights|{name}") - self._file.get_tensor(f"initial weights|{name}")
            record["weights"][name] = list(astuple(Distance.of(end[name] - start[name], expected)))
        return record

    def _compare(self, kind: str, tensors: dict[str, Tensor]) -> dict[str, list[float]]:
        known = set(self._file.keys())
        found = {}
        for name, tensor in tensors.items():
            key = f"{kind}|{name}"
            expected = self._file.get_tensor(key) if key in known else torch.zeros_like(tensor)
            if expected.shape != tensor.shape:
                raise RuntimeError(
                    f"{name} is {list(tensor.shape)} in the layout, {list(expected.shape)} in one process"
                )
            found[name] = list(astuple(Distance.of(tensor, expected)))
        return found


def measure_layout(world: World, config_texts: list[str], steps: int, folder: str, eps: float) -> list[Record]:
    """One rank of a layout: how far its part of each run is from the reference in `folder`."""
    records = []
    for text in config_texts:
        config = changed(from_text(text), {"optim.eps": eps, "optim.muon_precision": "fp32"})
        records.append(Reference(Path(folder), config.optim.name).distances(run_steps(config, world, steps)))
    return records


def compare_layout(config: RunConfig, processes: int, records: list[Record], rounding: Record) -> Comparison:
    """All ranks' records of a layout against what rounding does."""
    degrees = resolve_degrees(config.parallel, processes)
    typical = typical_error(_distances(rounding["gradients"]))
    of_weights = typical_error(_distances(rounding["weights"]))
    rows = {}
    for kind, fields in rounding.items():
        scale = {"weights": of_weights, "initial weights": 0.0}.get(kind, typical)
        rows[kind] = compare([_distances(record[kind]) for record in records], _distances(fields), scale)
    data = degrees["dp_replicate"] * degrees["dp_shard"]
    accumulation = config.train.global_batch // (config.train.micro_batch * data)
    tied = FAMILIES[config.model.family].plan(config.model).tied
    return Comparison(Layout(degrees, accumulation, tuple(tied.values())), rows)


def check_layout(config: RunConfig, processes: int | None) -> tuple[int, dict[str, int]]:
    """Number of processes and degree of each axis. `processes` None: the product of the degrees, where one that is left
    open (-1) counts 2. Raises ValueError for a layout that the recipe in its full size cannot have.
    """
    if processes is None:
        degrees = [getattr(config.parallel, axis) for axis in AXES]
        processes = math.prod(2 if degree == -1 else max(degree, 1) for degree in degrees)
    found = check_degrees(config, processes)
    check_balance(config)
    return processes, found


def check_degrees(config: RunConfig, processes: int) -> dict[str, int]:
    """Degree of each axis on so many processes. Raises ValueError for a layout in which a run of the recipe would not
    start.
    """
    found = resolve_degrees(config.parallel, processes)
    if compares_samples(config):
        check_across(found, config.train.global_batch, config.train.micro_batch)
    plan, cp, tp = FAMILIES[config.model.family].plan(config.model), found["cp"], found["tp"]
    if config.engine == "megatron":
        spec = make_spec(config, OBJECTIVES[config.objective.name][1](config.objective))
        check_megatron(spec, spec.options["facts"], found)
    check_experts(plan, found["ep"])
    check_tensor(plan, tp, config.data.seq_len // cp)
    check_context(config.data.seq_len, cp, config.parallel.cp_method, plan.heads, tp)
    if found["pp"] > 1 and config.engine == "torch":
        with torch.device("meta"):
            model = FAMILIES[config.model.family].build(with_some_vocabulary(config).model)
        stages = len(plan_stages(model, plan, config.parallel, found["pp"], config.data.seq_len))
        data = found["dp_replicate"] * found["dp_shard"]
        batch, micro_batch = config.train.global_batch, config.train.micro_batch
        check_microbatches(config.parallel, found["pp"], stages, batch, micro_batch, data)
    at_once = config.train.micro_batch * found["dp_replicate"] * found["dp_shard"]
    if config.train.global_batch % at_once:
        raise ValueError(
            f"train.global_batch = {config.train.global_batch} is not a multiple of train.micro_batch x dp_replicate x "
            f"dp_shard = {at_once}; change one of them"
        )
    return found


def check_balance(config: RunConfig) -> None:
    """Raises ValueError for a loss that is another one for each size of micro-batch: nothing to compare."""
    moe = getattr(config.model, "moe", None)
    if moe is not None and moe.balance == "micro_batch" and moe.balance_weight:
        raise ValueError(
            'model.moe.balance = "micro_batch" makes the loss depend on how a batch is cut, so layouts cannot agree; '
            'set it to "sequence" or "global" to verify'
        )


def count_experts(config: RunConfig) -> int:
    """Of a layer that has them; 0: none."""
    return int(FAMILIES[config.model.family].plan(config.model).experts)


def with_some_vocabulary(config: RunConfig) -> RunConfig:
    """The config with a vocabulary, where it is left to the data's tokenizer."""
    return config if config.model.vocab_size else changed(config, {"model.vocab_size": 512})


def changed(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The config with keys, dotted or not, replaced."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        part = getattr(config, section).model_copy(update={name: value}) if name else value
        config = config.model_copy(update={section: part})
    return config


def to_text(config: RunConfig) -> str:
    return config.model_dump_json()


def from_text(text: str) -> RunConfig:
    try:
        return validate(json.loads(text), "verify-layout")
    except ValueError as error:
        error.on_all_ranks = True  # type: ignore[attr-defined]  # each rank reads the same text
        raise


def _distances(fields: dict[str, list[float]]) -> dict[str, Distance]:
    return {name: Distance(*values) for name, values in fields.items()}
