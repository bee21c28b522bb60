"""Three engines, one run: equal losses at every step, each goes on where another stopped, and exports are equal.

All through the loop that a user starts, on the same shards, in fp32. Megatron and DeepSpeed run on ranks, which are
processes of their own, which many runs share: starting and importing takes longer than a run.
"""

import importlib.util
import json
import re
import shutil
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints.manifest import Manifest
from checkpoints.retention import find_step
from checkpoints.store import CheckpointStore
from launch.cli import main
from parallel.world import World
from pretrain.config import RunConfig, load_run_config, resolve
from pretrain.engine import build_engine
from pretrain.load import load_trained
from pretrain.objectives import OBJECTIVES
from pretrain.resume import resume
from pretrain.train import train
from tests.pretrain.test_train import ALONE, losses
from tests.ranks import run_ranks
from tests.small import small_overrides

MISSING = [name for name in ("deepspeed", "megatron") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed (pip extras of these names): {', '.join(MISSING)}"),
]

STEPS, STOP = 20, 16
SMALL = [
    "train.precision=fp32",
    f"train.steps={STEPS}",
    "train.micro_batch=2",
    "model.hidden=32",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn=48",
    "deepspeed.persistent=0",  # or ZeRO 3 would cut none of parameters as small as these
]
MODELS = {
    "dense": ["model.tied=true", "model.qkv_bias=true"],
    "experts": ["model.tied=false", "model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn=24"],
}
MEGATRON = "engine=megatron"
LAYOUTS = {
    "torch": [],
    "megatron tp": [MEGATRON, "parallel.tp=2"],
    "megatron pp": [MEGATRON, "parallel.pp=2"],
    "megatron dp": [MEGATRON, "parallel.dp_replicate=2", "parallel.dp_shard=1"],
    "megatron shared": [MEGATRON, "parallel.dp_shard=2"],
    "megatron ep": [MEGATRON, "parallel.ep=2"],
    **{f"zero {stage}": ["engine=deepspeed", f"deepspeed.zero={stage}"] for stage in (1, 2, 3)},
}
TWO = {"dense": [name for name in LAYOUTS if name != "megatron ep"], "experts": list(LAYOUTS)}
FOUR = {"megatron tp pp": [MEGATRON, "parallel.tp=2", "parallel.pp=2"]}
PAIRS = {
    "dense": [
        *permutations(("torch", "megatron tp", "megatron shared", "zero 1", "zero 3"), 2),
        *(("megatron pp", "megatron tp"), ("zero 3", "megatron pp")),
    ],
    "experts": [*permutations(("torch", "megatron ep", "zero 3"), 2), ("megatron pp", "megatron tp")],
}
# The largest differences seen, of any layout and any pair, were 2e-7, 1e-5 and 5e-5, the last of biases whose gradient
# is little but rounding, which AdamW divides by itself. What is lost, or stands in another's place, is off by about 1.
LOSSES, MOMENTS, WEIGHTS = 1e-6, 1e-4, 5e-4  # relative; of tensors, by their norms


@dataclass(frozen=True)
class Start:
    """A run, or what is left of one that stopped in another folder."""

    config: RunConfig
    stopped: Path | None = None


@dataclass(frozen=True)
class PassOn:
    """The last checkpoint of a run, taken over and saved again as a run of another layout does, without a step."""

    given: Path
    layout: Path  # a run's folder
    out: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A folder of each model with its runs: <layout>, "<layout>, then <layout>", and "alone": torch, one process."""
    folder = tmp_path_factory.mktemp("runs")

    def start(model: str, name: str, overrides: list[str], stopped: Path | None = None) -> Start:
        return Start(_config(folder / model / name, tiny_shards, model, overrides), stopped)

    four: list[Start | PassOn] = []
    for model in MODELS:
        train(start(model, "alone", []).config, ALONE)
        two: list[Start | PassOn] = [start(model, name, LAYOUTS[name]) for name in TWO[model]]
        two += [_pass_on(folder / model, name) for name in TWO[model]]
        for first in dict.fromkeys(first for first, _ in PAIRS[model]):
            two.append(start(model, f"half {first}", [*LAYOUTS[first], f"train.stop_at={STOP}"]))
        for first, second in PAIRS[model]:
            stopped = folder / model / f"half {first}"
            two.append(start(model, f"{first}, then {second}", LAYOUTS[second], stopped))
        for name, overrides in FOUR.items():
            four += [start(model, name, overrides), _pass_on(folder / model, name)]
        run_ranks(_work, 2, two, timeout=400)  # a world each: the groups of runs that are over keep their threads
    run_ranks(_work, 4, four, timeout=400)
    return folder


def _config(run: Path, shards: Path, model: str, overrides: list[str]) -> RunConfig:
    return resolve("tiny", [*small_overrides(run, shards), *SMALL, *MODELS[model], *overrides])[0]


def _pass_on(folder: Path, name: str) -> PassOn:
    return PassOn(folder / "alone", folder / name, folder / f"passed {name}")


def _work(jobs: list[Start | PassOn]) -> None:
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    for job in jobs:
        if isinstance(job, PassOn):
            config = load_run_config(job.layout)
            engine = build_engine(config, world, OBJECTIVES["causal"][1](config.objective))
            resume(CheckpointStore(job.given / "checkpoints"), STEPS, engine, world)
            CheckpointStore(job.out / "checkpoints").save(STEPS, **engine.state_dict(), state={}, ties=engine.ties)
            engine.close()
            continue
        if job.stopped and not world.rank:
            assert len(losses(job.stopped)) == STOP
            shutil.copytree(job.stopped, job.config.run.dir)
        dist.barrier()
        train(job.config, world)


@pytest.mark.parametrize("model", MODELS)
def test_every_step_is_that_of_one_process(runs: Path, model: str) -> None:
    expected = losses(runs / model / "alone")
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.3
    for name in (*TWO[model], *FOUR):
        check_same(runs / model / name, runs / model / "alone")


@pytest.mark.parametrize("model", MODELS)
def test_each_goes_on_where_another_stopped(runs: Path, model: str) -> None:
    for first, second in PAIRS[model]:
        check_same(runs / model / f"{first}, then {second}", runs / model / "alone")


@pytest.mark.parametrize("model", MODELS)
def test_what_is_passed_on_is_equal_to_the_bit(runs: Path, model: str, tmp_path: Path) -> None:
    """Weights, moments, and the Hugging Face folder."""
    given = runs / model / "alone"
    expected, folder = saved(given), export(given, tmp_path / "alone")
    for name in (*TWO[model], *FOUR):
        found = saved(runs / model / f"passed {name}")
        for part, tensors in expected.items():
            assert found[part].keys() == tensors.keys(), (name, found[part].keys() ^ tensors.keys())
            assert not [key for key, value in tensors.items() if not torch.equal(found[part][key], value)], name
    files = {file.name for file in folder.iterdir()} - {"lineage.json"}  # which names the run
    assert {"model.safetensors", "config.json"} <= files
    for name in ("megatron tp pp", "zero 3"):
        passed = runs / model / f"passed {name}"
        shutil.copy(runs / model / name / "config.toml", passed)
        shutil.copytree(runs / model / name / "tokenizer", passed / "tokenizer")
        out = export(passed, tmp_path / name)
        assert not [file for file in files if (out / file).read_bytes() != (folder / file).read_bytes()], name


@pytest.mark.parametrize("model", MODELS)
def test_exports_of_trained_runs_are_those_of_the_native_one(runs: Path, model: str, tmp_path: Path) -> None:
    native = export(runs / model / "alone", tmp_path / "alone")
    weights = load_file(native / "model.safetensors")
    for name in ("megatron tp pp", "zero 3"):
        out = export(runs / model / name, tmp_path / name)
        assert json.loads((out / "config.json").read_text()) == json.loads((native / "config.json").read_text())
        check_tensors(load_file(out / "model.safetensors"), weights, WEIGHTS, name)
        trained = load_trained(runs / model / name)
        tokens = torch.arange(40).reshape(2, 20) * 7 % trained.config.model.vocab_size
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.inference_mode():
            ours = trained.model.logits(trained.model(tokens))
            torch.testing.assert_close(theirs(tokens).logits, ours, rtol=1e-4, atol=1e-5)


def export(run: Path, out: Path) -> Path:
    assert main(["checkpoint", "export", str(run), str(out)]) == 0
    return out


def check_same(run: Path, whole: Path) -> None:
    """The losses of every step, and all that the last checkpoint holds by the names that it has there."""
    torch.testing.assert_close(losses(run), losses(whole), rtol=LOSSES, atol=0, msg=lambda text: f"{run.name}: {text}")
    found, expected = saved(run), saved(whole)
    check_tensors(found["model"], expected["model"], WEIGHTS, run.name)
    check_tensors(found["optimizer"], expected["optimizer"], MOMENTS, run.name)


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float, where: str) -> None:
    assert found.keys() == expected.keys(), (where, found.keys() ^ expected.keys())
    far = {}
    for name, value in expected.items():
        assert found[name].shape == value.shape, (where, name)
        error = float((found[name].double() - value).norm() / value.double().norm().clamp(min=1e-30))
        if not error <= limit:
            far[name] = error
    assert not far, (where, far)


def saved(run: Path, step: int = STEPS) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, "model" and "optimizer", whole."""
    checkpoint = find_step(run / "checkpoints", step)
    targets = {
        part: {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in entries.items()}
        for part, entries in Manifest.read(checkpoint).tensors.items()
    }
    CheckpointStore(run / "checkpoints").load(checkpoint, **targets)
    return targets


def test_what_has_no_counterpart_is_named(tmp_path: Path, tiny_shards: Path) -> None:
    """Native runs that no other engine can take over, and why."""
    begun = {"muon": ["optim.name=muon"], "other model": ["model.qkv_bias=false"], "steps apart": []}
    said = {
        "muon": r"step-00000001 does not fit this run: it lacks optimizer exp_avg.*only it has .*; use the recipe",
        "other model": r"it lacks model layers.0.attention.q.bias.*; use the recipe",
        "steps apart": 'not all taken the same number of optimizer steps.* take engine = "torch"',
    }
    for name, overrides in begun.items():
        train(_config(tmp_path / name, tiny_shards, "dense", [*overrides, "train.stop_at=1"]), ALONE)
    store = CheckpointStore(tmp_path / "steps apart/checkpoints")
    tensors = saved(store.folder.parent, 1)
    tensors["optimizer"]["step.norm.weight"] += 1
    store.save(1, **tensors, state={"cursor": 8}, ties=Manifest.read(find_step(store.folder, 1)).ties)
    cases = [(name, layout) for name in begun for layout in ("megatron dp", "zero 1", "zero 3")]
    alone = ["parallel.dp_replicate=1", "parallel.dp_shard=1"]
    configs = [_config(tmp_path / name, tiny_shards, "dense", [*LAYOUTS[layout], *alone]) for name, layout in cases]
    for case, message in zip(cases, run_ranks(_refusals, 1, configs, timeout=120)[0], strict=True):
        assert re.search(said[case[0]], message) and "\n" not in message, (case, message)


def _refusals(configs: list[RunConfig]) -> list[str]:
    messages = []
    for config in configs:
        try:
            train(config, ALONE)
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("nothing")
    return messages
