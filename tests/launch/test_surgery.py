"""pretrain checkpoint upcycle and prune on runs: equal outputs, training that goes on, and every mistake in a line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore
from checkpoints.tensors import open_checkpoint
from launch.cli import main
from launch.commands import surgery
from parallel.materialise import init_parameters, named_tensors
from pretrain.config import load_run_config, resolve, write_config
from pretrain.load import build_model, load_trained
from pretrain.models import FAMILIES
from pretrain.models.family import Family
from tests.small import SMALL, small_overrides

MOE = ["model.moe.experts=4", "model.moe.top_k=2"]
STEP = 7


def make_run(folder: Path, *overrides: str) -> Path:
    """A run of lively random weights, without optimizer."""
    where = [f"run.dir={folder}", "model.vocab_size=96", "train.precision=fp32", *overrides]
    config, _ = resolve("tiny", [*SMALL, *where])
    model = build_model(config.model)
    with torch.no_grad():
        init_parameters(model, 5, {})
        for tensor in model.parameters():
            tensor.mul_(3.0 if tensor.dim() > 1 else 1.0)
    tensors, ties = named_tensors(model)
    state = {"cursor": 56}
    CheckpointStore(folder / "checkpoints").save(
        STEP, {name: tensor.detach() for name, tensor in tensors.items()}, {}, state, ties=ties
    )
    write_config(config, folder / "config.toml")
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("dense") / "run", "run.resume=never", "train.stop_at=7")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Path:
    wanted = ["model.moe.experts=6", "model.moe.top_k=2", "model.moe.ffn=20", "model.moe.first_dense=1"]
    return make_run(tmp_path_factory.mktemp("sparse") / "run", *wanted, "model.layers=3", "model.moe.bias=true")


def cli(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


@torch.no_grad()
def logits(run: Path) -> torch.Tensor:
    model = load_trained(run).model
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(2))
    return model.logits(model(tokens))


@pytest.mark.parametrize(
    ("arguments", "exact"),
    [
        (["--method", "copy", *MOE], True),
        (["--method", "copy", *MOE, "model.moe.bias=true", "model.moe.first_dense=1"], True),
        (["--method", "clustering", "--router", "zero", "model.moe.experts=4", "model.moe.top_k=4"], True),
        (["--method", "copy", "--noise", "0.5", *MOE], False),
        (["--method", "random", *MOE], False),
    ],
)
def test_the_output_is_the_dense_models_where_it_is_said_to_be(dense, tmp_path, capsys, arguments, exact):
    out = tmp_path / "out"
    assert cli("upcycle", dense, out, *arguments) == 0
    said = capsys.readouterr().out
    off = float((logits(out) - logits(dense)).abs().max())
    assert ("the output is exactly the dense model's" in said) == exact
    assert (off < 1e-5) == exact, off
    assert CheckpointStore(out / "checkpoints").verify(0) == []


def test_a_new_run_continues_the_data_and_knows_where_it_comes_from(dense, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli("upcycle", dense, out, *MOE, "optim.lr=0.5") == 0
    config = load_run_config(out)
    assert (config.run.dir, config.optim.lr, config.model.moe.ffn) == (str(out), 0.5, 96)
    assert (config.run.resume, config.train.stop_at) == ("auto", 0)
    folder = out / "checkpoints/step-00000000"
    assert json.loads((folder / "state.json").read_text()) == {"cursor": 56, "step": 0, "ranks": [None]}
    source = dense / f"checkpoints/step-{STEP:08d}"
    (origin,) = Manifest.read(folder).lineage
    assert (origin.operation, origin.path, origin.step) == ("upcycle", str(source), STEP)
    assert origin.manifest == json.loads((source / "manifest.json").read_text())["crc32"]
    assert origin.arguments["method"] == "copy" and origin.arguments["experts"] == 4
    capsys.readouterr()
    for command in ("list", "verify"):
        assert cli(command, out) == 0
        assert f"derived by upcycle of {source} (manifest {origin.manifest})" in capsys.readouterr().out
    store = CheckpointStore(out / "checkpoints")
    tensors, _ = named_tensors(build_model(config.model))
    store.load(None, {name: tensor.detach() for name, tensor in tensors.items()})
    store.save(1, {name: tensor.detach() for name, tensor in tensors.items()}, {}, {})
    assert store.list()[-1].lineage == (origin,)  # also what is trained on from it
    assert cli("upcycle", dense, tmp_path / "other", *MOE, "data.seq_len=32") == 0
    state = (tmp_path / "other/checkpoints/step-00000000/state.json").read_text()
    assert json.loads(state)["cursor"] == 0  # counts other samples


def test_routers_start_like_the_models_own_and_the_same_each_time(dense, tmp_path):
    for name in ("a", "b"):
        assert cli("upcycle", dense, tmp_path / name, "--noise", "0.1", *MOE, "model.moe.bias=true") == 0
    one, other = (open_checkpoint(tmp_path / name / "checkpoints/step-00000000") for name in ("a", "b"))
    assert all(torch.equal(one.read(name), other.read(name)) for name in one)
    first, second = (one.read(f"layers.{i}.moe.router.weight") for i in (0, 1))
    assert not torch.equal(first, second)
    assert float(first.std()) == pytest.approx(0.02, rel=0.2)
    assert not one.read("layers.0.moe.routing.bias").any()
    gate, up = one.read("layers.0.moe.experts.gate"), one.read("layers.0.moe.experts.up")
    source = open_checkpoint(dense / f"checkpoints/step-{STEP:08d}")
    noise = [t - source.read(f"layers.0.mlp.{n}.weight") for t, n in ((gate, "gate"), (up, "up"))]
    assert abs(float(torch.corrcoef(torch.stack([n.flatten() for n in noise]))[0, 1])) < 0.05


def log_load(run: Path, step: int, load: list[list[float]]) -> None:
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": step, "loss": 1.0, "router_load": load}) + "\n")


def test_pruning_keeps_the_most_used_experts(sparse, tmp_path, capsys):
    (sparse / "metrics.jsonl").unlink(missing_ok=True)
    log_load(sparse, 5, [[9, 9, 9, 0, 0, 0], [9, 9, 9, 0, 0, 0]])
    log_load(sparse, STEP, [[0.1, 2.0, 0.0, 1.5, 0.3, 2.1], [3.0, 0.0, 0.0, 0.2, 2.5, 0.3]])
    log_load(sparse, STEP + 1, [[9, 9, 9, 0, 0, 0], [9, 9, 9, 0, 0, 0]])  # past the checkpoint
    with (sparse / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 9, "loss"')  # torn by a kill
    out = tmp_path / "out"
    assert cli("prune", sparse, out, "--keep", 3) == 0
    assert "layers.1.moe.router: kept 1, 3, 5" in capsys.readouterr().out
    before = open_checkpoint(sparse / f"checkpoints/step-{STEP:08d}")
    after = open_checkpoint(out / "checkpoints/step-00000000")
    for layer, kept in ((1, [1, 3, 5]), (2, [0, 4, 5])):
        for name in ("experts.gate", "experts.up", "experts.down", "router.weight", "routing.bias"):
            name = f"layers.{layer}.moe.{name}"
            assert torch.equal(after.read(name), before.read(name)[kept])
    assert torch.equal(after.read("layers.0.mlp.up.weight"), before.read("layers.0.mlp.up.weight"))
    assert load_run_config(out).model.moe.experts == 3
    assert logits(out).isfinite().all()
    (origin,) = Manifest.read(out / "checkpoints/step-00000000").lineage
    assert origin.arguments == {"by": "load", "experts": [[1, 3, 5], [0, 4, 5]]}
    assert cli("prune", out, tmp_path / "less", "--keep", 1, "--by", "norm", "model.moe.top_k=1") == 0
    assert [o.operation for o in Manifest.read(tmp_path / "less/checkpoints/step-00000000").lineage] == ["prune"] * 2
    router = after.read("layers.1.moe.router.weight")
    best = int(router.norm(dim=1).argmax())
    found = open_checkpoint(tmp_path / "less/checkpoints/step-00000000").read("layers.1.moe.router.weight")
    assert torch.equal(found, router[best : best + 1])


def test_pruning_leaves_groups_of_equal_size(tmp_path, capsys):
    wanted = ["model.moe.experts=6", "model.moe.top_k=2", "model.moe.ffn=20", "model.moe.groups=2"]
    run = make_run(tmp_path / "run", *wanted, "model.moe.top_groups=1")
    log_load(run, STEP, [[0.1, 2.0, 0.2, 1.5, 1.6, 2.1]] * 2)
    assert cli("prune", run, tmp_path / "out", "--keep", 4) == 0
    assert "layers.0.moe.router: kept 1, 2, 4, 5" in capsys.readouterr().out
    assert logits(tmp_path / "out").isfinite().all()
    assert cli("prune", run, tmp_path / "odd", "--keep", 3) == 2
    assert "model.moe.groups" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["upcycle", "dense", "out"], ["model.moe is not set"]),
        (["upcycle", "sparse", "out", *MOE], ["has experts already"]),
        (["upcycle", "dense", "dense", *MOE], ["exists and is not empty"]),
        (["upcycle", "dense", "out", "--method", "cut", *MOE], ["--method cut is unknown", "copy, contiguous, random"]),
        (["upcycle", "dense", "out", "--method", "random", "model.moe.experts=5"], ["model.ffn = 96", "5 equal parts"]),
        (["upcycle", "dense", "out", "model.moe.experts=2", "model.moe.top_k=3"], ["top_k = 3", "at most"]),
        (["upcycle", "dense", "out", "--noise", "-1", *MOE], ["--noise -1.0"]),
        (["upcycle", "dense", "out", "--noise", "1", "--noise-share", "0", *MOE], ["--noise-share 0.0"]),
        (["upcycle", "dense", "out", "--method", "random", "--noise", "1", *MOE], ["for --method copy"]),
        (["upcycle", "dense", "out", "--router", "zero", *MOE], ["same 2 of 4 experts"]),
        (["upcycle", "dense", "out", "model.moe.ffn=7", *MOE], ["model.moe.ffn = 7", "width 96"]),
        (["upcycle", "dense", "out", "model.moe.shared_ffn=7", *MOE], ["shared_ffn = 7"]),
        (["upcycle", "dense", "out", "model.layers=1", *MOE], ["model.layers = 1", "the checkpoint's is 2"]),
        (["upcycle", "dense", "out", "run.dir=x", *MOE], ["run.dir"]),
        (["upcycle", "dense", "out", "--step", "3", *MOE], ["no checkpoint of step 3"]),
        (["upcycle", "biased", "out", *MOE], ["layers.0.mlp.down.bias", "no place"]),
        (["upcycle", "torn", "out", *MOE], ["no whole checkpoint"]),
        (["prune", "dense", "out", "--keep", "2"], ["has no experts"]),
        (["prune", "sparse", "out", "--keep", "6"], ["--keep 6", "below model.moe.experts = 6"]),
        (["prune", "sparse", "out", "--keep", "1", "--by", "norm"], ["below model.moe.top_k = 2"]),
        (["prune", "sparse", "out", "--keep", "3", "--by", "norm", "model.moe.ffn=9"], ["model.moe.ffn = 9"]),
        (["prune", "sparse", "out", "--keep", "3"], ["no router_load by step 7", "--by norm"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_leaves_nothing(dense, sparse, tmp_path, capsys, arguments, words):
    (sparse / "metrics.jsonl").unlink(missing_ok=True)
    runs = {"dense": dense, "sparse": sparse, "out": tmp_path / "out"}
    if "biased" in arguments:
        runs["biased"] = make_run(tmp_path / "biased", "model.mlp_bias=true")
    if "torn" in arguments:
        runs["torn"] = make_run(tmp_path / "torn")
        next(runs["torn"].rglob("*.safetensors")).unlink()
    capsys.readouterr()
    assert cli(*(runs.get(word, word) for word in arguments)) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "pretrain: error: " in line]
    assert len(lines) == 1 and "Traceback" not in said
    for word in words:
        assert word in lines[0]
    assert not runs["out"].exists() and not list(tmp_path.glob(".tmp-*"))


def test_a_family_without_feed_forward_table_is_named(dense, tmp_path, capsys, monkeypatch):
    family = FAMILIES["decoder"]
    bare = Family(family.config, family.build, family.plan, family.hf)
    monkeypatch.setattr(surgery, "FAMILIES", {"decoder": bare})
    assert cli("upcycle", dense, tmp_path / "out", *MOE) == 2
    assert "model.family = 'decoder' has no layers that can become experts" in capsys.readouterr().err


@pytest.mark.slow
def test_training_goes_on_where_the_dense_run_ended(tmp_path, tiny_shards):
    """The next step of the dense run and the first of the upcycled one see the same batch: their losses are equal."""

    def pretrain(*arguments: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "launch.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def losses(run: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    run, out = tmp_path / "dense", tmp_path / "moe"
    arguments = ["run", "tiny", *small_overrides(run, tiny_shards), "train.precision=fp32", "train.steps=12"]
    pretrain(*arguments, "train.stop_at=8", "optim.lr=0.01")
    pretrain("checkpoint", "upcycle", str(run), str(out), *MOE)
    held_out = [f"eval.shards={tiny_shards}/train-*.tar", "eval.max_samples=8"]
    evaluated = [pretrain("evaluate", str(each), *held_out).partition("eval_loss")[2] for each in (run, out)]
    assert evaluated[0] == evaluated[1]
    pretrain(*arguments, "optim.lr=0.01")
    pretrain("run", str(out / "config.toml"), "train.steps=4")
    pretrain("checkpoint", "upcycle", str(run), str(tmp_path / "shared"), "--step", "8", *MOE)
    layout = ["parallel.dp_shard=2", "parallel.ep=2", "train.stop_at=2", "--nproc", "2"]
    pretrain("run", str(tmp_path / "shared/config.toml"), "train.steps=4", *layout)
    assert losses("shared") == pytest.approx(losses("moe")[:2], abs=1e-5)
    assert losses("moe")[0] == pytest.approx(losses("dense")[8], abs=1e-5)
    assert all(math.isfinite(loss) for loss in losses("moe")) and len(losses("moe")) == 4
    pretrain("checkpoint", "prune", str(out), str(tmp_path / "pruned"), "--keep", "2", "--by", "load")
