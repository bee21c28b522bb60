"""pretrain checkpoint diff, merge, average, cast, prune-optimizer: on runs, with lineage; every mistake in a line."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints.hf.folder import KEPT, Kept
from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore
from checkpoints.tensors import open_checkpoint
from launch.cli import main
from parallel.materialise import init_parameters, named_tensors
from parallel.world import World
from pretrain.config import load_run_config, resolve, write_config
from pretrain.load import build_model, load_trained
from pretrain.train import train
from tests.small import SMALL, small_overrides

STEP = 7


def make_run(folder: Path, seed: int, *overrides: str, steps: tuple[int, ...] = (STEP,), around: Path | None = None):
    """A run with AdamW state whose weights at each step are of that seed; `around`: little away from that run's."""
    where = [f"run.dir={folder}", "model.vocab_size=96", "train.precision=fp32", *overrides]
    config, _ = resolve("tiny", [*SMALL, *where])
    model = build_model(config.model)
    store = CheckpointStore(folder / "checkpoints", keep=9)
    for step in steps:
        with torch.no_grad():
            init_parameters(model, 100 * seed + step, {})
        tensors, ties = named_tensors(model)
        weights = {name: tensor.detach() for name, tensor in tensors.items()}
        if around is not None:
            base = open_checkpoint(newest(around))
            weights = {name: base.read(name) + 0.1 * tensor for name, tensor in weights.items()}
        moments = {f"exp_avg.{name}": tensor * 0.1 for name, tensor in weights.items()}
        moments["step.norm.weight"] = torch.tensor(float(step))
        store.save(step, weights, moments, {"cursor": 8 * step}, ties=ties, rank_state={"rng": step})
    write_config(config, folder / "config.toml")
    return folder


def newest(run: Path) -> Path:
    return CheckpointStore(run / "checkpoints").list()[-1].path


def weights(run: Path) -> dict[str, Tensor]:
    files = open_checkpoint(newest(run))
    return {name: files.read(name) for name in files}


def cli(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    base = make_run(folder / "base", 1)
    a, b, c = (make_run(folder / name, 2 + i, around=base) for i, name in enumerate("abc"))
    (a / "tokenizer").mkdir()
    (a / "tokenizer/tokenizer.json").write_text("{}")
    Kept("llama").save(a / KEPT)
    return {"base": base, "a": a, "b": b, "c": c}


def test_a_mean_is_a_run_that_knows_where_it_comes_from(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli("merge", runs["a"], runs["b"], "--weights", 3, 1, "--out", out) == 0
    assert "at step 0, by mean" in capsys.readouterr().out
    ours, a, b = weights(out), weights(runs["a"]), weights(runs["b"])
    assert ours.keys() == a.keys() and "head.weight" not in ours
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, 0.75 * a[name] + 0.25 * b[name], rtol=0, atol=1e-6)
    folder = out / "checkpoints/step-00000000"
    manifest = Manifest.read(folder)
    assert manifest.ties == {"head.weight": "embed.weight"} and not manifest.tensors["optimizer"]
    assert [(o.operation, o.path, o.step) for o in manifest.lineage] == [
        ("merge", str(newest(runs["a"])), STEP),
        ("merge", str(newest(runs["b"])), STEP),
    ]
    first = manifest.lineage[0]
    assert first.arguments == {"method": "mean", "model": 1, "weight": 3.0}
    assert first.manifest == json.loads((newest(runs["a"]) / "manifest.json").read_text())["crc32"]
    assert json.loads((folder / "state.json").read_text()) == {"cursor": 8 * STEP, "step": 0, "ranks": [None]}
    assert CheckpointStore(out / "checkpoints").verify(0) == []
    config = load_run_config(out)
    assert config.run.dir == str(out) and config.model == load_run_config(runs["a"]).model
    assert (out / "tokenizer/tokenizer.json").read_text() == "{}"
    assert Kept.load(out / KEPT).brand == "llama"
    model = load_trained(out).model
    assert model.logits(model(torch.arange(20)[None])).isfinite().all()
    soup = make_run(tmp_path / "soup", 5, "model.init_std=0.05", "optim.lr=0.1", around=runs["base"])
    assert cli("merge", runs["a"], soup, "--out", tmp_path / "souped") == 0  # trained otherwise, of the same kind
    assert cli("merge", out, runs["c"], "--out", tmp_path / "next") == 0
    operations = [o.path for o in Manifest.read(tmp_path / "next/checkpoints/step-00000000").lineage]
    assert operations == [str(newest(run)) for run in (runs["a"], runs["b"], out, runs["c"])]


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        ("mean", [], lambda base, a, b: (a + b) / 2),
        ("ema", ["--decay", 0.8], lambda base, a, b: 0.8 * a + 0.2 * b),
        ("task", ["--scale", 0.5], lambda base, a, b: base + 0.5 * (a - base + b - base)),
        ("task", ["--weights", 1, -1], lambda base, a, b: base + a - b),
        ("dare", ["--drop", 0], lambda base, a, b: a + b - base),
        ("ties", ["--keep", 1, "--weights", 1, 0], lambda base, a, b: a),
        ("slerp", ["--t", 1], lambda base, a, b: b),
    ],
)
def test_each_method_reads_its_options(runs, tmp_path, method, arguments, expected):
    over_base = ["--base", runs["base"]] if method in ("task", "ties", "dare") else []
    command = ["merge", runs["a"], runs["b"], "--out", tmp_path / "out", "--method", method]
    assert cli(*command, *over_base, *arguments) == 0
    base, a, b = (weights(runs[name]) for name in ("base", "a", "b"))
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected(base[name], a[name], b[name]), rtol=1e-5, atol=1e-6)
    lineage = Manifest.read(newest(tmp_path / "out")).lineage
    assert [o.arguments["model"] for o in lineage] == [*(["base"] if over_base else []), 1, 2]


def test_dropping_follows_the_seed(runs, tmp_path):
    command = ["merge", runs["a"], "--base", runs["base"], "--method", "dare", "--drop", 0.5]
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        assert cli(*command, "--seed", seed, "--out", tmp_path / name) == 0
    one, same, other = (weights(tmp_path / name) for name in ("one", "same", "other"))
    name = "layers.0.mlp.up.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    dropped = [one[f"layers.{i}.mlp.up.weight"] == weights(runs["base"])[f"layers.{i}.mlp.up.weight"] for i in (0, 1)]
    assert float(dropped[0].double().mean()) == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(*dropped)  # each tensor has its own


def test_averages_take_the_last_checkpoints_of_a_run_and_keep_its_place(tmp_path, capsys):
    run = make_run(tmp_path / "run", 1, steps=(2, 4, 6, 8))
    each = [open_checkpoint(run / f"checkpoints/step-{step:08d}") for step in (2, 4, 6, 8)]
    assert cli("average", run, tmp_path / "mean", "--last", 3) == 0
    assert "averaged steps 4, 6, 8" in capsys.readouterr().out
    for name, tensor in weights(tmp_path / "mean").items():
        torch.testing.assert_close(tensor, sum(files.read(name) for files in each[1:]) / 3)
    folder = tmp_path / "mean/checkpoints/step-00000008"
    assert json.loads((folder / "state.json").read_text())["cursor"] == 64
    assert [(o.operation, o.step) for o in Manifest.read(folder).lineage] == [("average", step) for step in (4, 6, 8)]
    assert cli("average", run, tmp_path / "ema", "--last", 2, "--decay", 0.9, "--step", 4) == 0
    for name, tensor in weights(tmp_path / "ema").items():
        torch.testing.assert_close(tensor, 0.9 * each[0].read(name) + 0.1 * each[1].read(name))
    assert newest(tmp_path / "ema").name == "step-00000004"


def test_a_cast_changes_parameters_alone(tmp_path):
    sparse = ["model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn=20", "model.moe.bias=true"]
    run = make_run(tmp_path / "run", 1, *sparse)
    assert cli("cast", run, tmp_path / "out", "--dtype", "bf16") == 0
    before, after = weights(run), weights(tmp_path / "out")
    assert {name for name, tensor in after.items() if tensor.dtype != torch.bfloat16} == {
        f"layers.{i}.moe.routing.bias" for i in (0, 1)
    }
    assert all(torch.equal(tensor, before[name].to(tensor.dtype)) for name, tensor in after.items())
    old, new = (Manifest.read(newest(each)) for each in (run, tmp_path / "out"))
    assert new.tensors["optimizer"] == old.tensors["optimizer"] and new.step == STEP
    for name in (name for name in old.files if name.startswith("optimizer/")):
        assert (newest(run) / name).read_bytes() == (newest(tmp_path / "out") / name).read_bytes()
    state = json.loads((newest(tmp_path / "out") / "state.json").read_text())
    assert state == json.loads((newest(run) / "state.json").read_text())
    assert (new.lineage[0].operation, new.lineage[0].arguments) == ("cast", {"dtype": "bf16"})
    assert CheckpointStore(tmp_path / "out/checkpoints").verify(STEP) == []
    assert load_trained(tmp_path / "out").step == STEP
    assert cli("cast", tmp_path / "out", tmp_path / "back", "--dtype", "fp32") == 0
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "back").values())


def test_without_optimizer_the_model_is_the_same_and_smaller(runs, tmp_path, capsys):
    assert cli("prune-optimizer", runs["a"], tmp_path / "out") == 0
    before, after = Manifest.read(newest(runs["a"])), Manifest.read(newest(tmp_path / "out"))
    assert before.tensors["optimizer"] and not after.tensors["optimizer"]
    assert after.num_bytes < 0.6 * before.num_bytes
    assert after.lineage[0].operation == "prune-optimizer"
    capsys.readouterr()
    assert cli("diff", runs["a"], tmp_path / "out") == 0
    assert "equal, bit for bit" in capsys.readouterr().out
    assert cli("diff", runs["a"], tmp_path / "out", "--optimizer") == 0
    assert "only in a: optimizer step.norm.weight" in capsys.readouterr().out


def test_a_diff_shows_the_largest_changes_first(runs, tmp_path, capsys):
    run = make_run(tmp_path / "run", 1)
    store = CheckpointStore(run / "checkpoints", keep=9)
    changed = weights(run)
    changed["layers.1.mlp.up.weight"] = changed["layers.1.mlp.up.weight"] * -1
    changed["norm.weight"] = changed["norm.weight"] * 1.01
    changed["layers.0.mlp.up.weight"][3, 5] += 7
    store.save(9, changed, {}, {}, ties={"head.weight": "embed.weight"})
    old, new = (run / f"checkpoints/step-{step:08d}" for step in (STEP, 9))
    assert cli("diff", old, new, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    first, second, third, *others = found["tensors"]
    assert not found["equal"] and not any(other["relative"] for other in others)
    assert all(other["equal"] for other in others)
    names = ["layers.0.mlp.up.weight", "layers.1.mlp.up.weight", "norm.weight"]
    assert [row["name"] for row in (first, second, third)] == names
    assert first["max_abs"] == pytest.approx(7) and 0 < first["cosine"] < 1
    assert (second["relative"], second["cosine"]) == (pytest.approx(2), pytest.approx(-1))
    assert third["relative"] == pytest.approx(0.01, rel=1e-4)
    squares = sum(float(tensor.double().square().sum()) for tensor in weights(runs["base"]).values())
    assert found["total"]["model"]["relative"] > 7 / math.sqrt(squares)
    assert cli("diff", old, new, "--top", 1) == 0
    said = capsys.readouterr().out
    assert "layers.0.mlp.up.weight" in said and "norm.weight" not in said and "and 2 more" in said
    wide = make_run(tmp_path / "wide", 1, "model.ffn=128", "model.tied=false")
    assert cli("diff", run, wide) == 0
    said = capsys.readouterr().out
    assert "unlike: model layers.0.mlp.up.weight: shape [96, 48] in a, [128, 48] in b" in said
    assert "only in b: model head.weight" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "a", "b", "--out", "out", "--method", "soup"], ["--method soup is unknown", "mean, ema, slerp"]),
        (["merge", "a", "--out", "out"], ["needs at least 2 models, but 1"]),
        (["merge", "a", "b", "c", "--out", "out", "--method", "slerp"], ["needs exactly 2 models, but 3"]),
        (["merge", "a", "b", "--out", "out", "--method", "ties"], ["--method ties needs --base"]),
        (["merge", "a", "b", "--out", "out", "--base", "base"], ["--method mean takes no --base"]),
        (["merge", "a", "b", "--out", "out", "--drop", "0.5"], ["--drop is not for --method mean", "--weights"]),
        (["merge", "a", "b", "--out", "out", "--weights", "1"], ["--weights has 1 numbers, but 2 models"]),
        (["merge", "a", "b", "--out", "out", "--weights", "1", "-2"], ["--weights 1 -2", "at least 0"]),
        (["merge", "a", "b", "--out", "out", "--method", "ema", "--decay", "1"], ["--decay 1", "below 1"]),
        (
            ["merge", "a", "--base", "base", "--out", "out", "--method", "ties", "--keep", "0"],
            ["--keep 0: must"],
        ),
        (["merge", "a", "wide", "--out", "out"], ["model.ffn = 128", "but 96 in"]),
        (["merge", "a", "turned", "--out", "out"], ["model.rope.theta = 5000.0", "but 10000.0 in"]),
        (["merge", "a", "b", "--out", "a"], ["exists and is not empty"]),
        (["merge", "a", "torn", "--out", "out"], ["no whole checkpoint"]),
        (["average", "a", "out", "--last", "2"], ["--last 2", "1 whole checkpoints by step 7"]),
        (["average", "a", "out", "--last", "1"], ["needs at least 2"]),
        (["cast", "large", "out", "--dtype", "fp16"], ["tensor 'norm.weight' holds 1e+05, too large for float16"]),
        (["diff", "a", "nothing"], ["nothing"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_leaves_nothing(runs, tmp_path, capsys, arguments, words):
    places = {**runs, "out": tmp_path / "out", "nothing": tmp_path / "nothing"}
    if "wide" in arguments:
        places["wide"] = make_run(tmp_path / "wide", 1, "model.ffn=128")
    if "turned" in arguments:
        places["turned"] = make_run(tmp_path / "turned", 1, "model.rope.theta=5000")
    if "torn" in arguments:
        places["torn"] = make_run(tmp_path / "torn", 1)
        next(places["torn"].rglob("*.safetensors")).unlink()
    if "large" in arguments:
        places["large"] = make_run(tmp_path / "large", 1)
        model = weights(places["large"])
        model["norm.weight"][0] = 1e5
        CheckpointStore(places["large"] / "checkpoints").save(8, model, {}, {}, ties={"head.weight": "embed.weight"})
    capsys.readouterr()
    assert cli(*(places.get(word, word) for word in arguments)) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "pretrain: error: " in line]
    assert len(lines) == 1 and "Traceback" not in said
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.slow
def test_derived_runs_train_on(tmp_path, tiny_shards):
    """Without optimizer state from the same step, on the same data; merged ones from step 0."""
    alone = World(0, 1, torch.device("cpu"))

    def go(run: str, *overrides: str) -> list[float]:
        path = tmp_path / run / "config.toml"
        recipe = str(path) if path.is_file() else "tiny"
        own = [] if path.is_file() else small_overrides(tmp_path / run, tiny_shards)
        train(resolve(recipe, [*own, "train.precision=fp32", *overrides])[0], alone)
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    for name, seed in (("one", 1), ("two", 1)):
        go(name, "train.steps=6", "train.stop_at=4", "checkpoint.every=2", f"optim.lr=0.00{seed}", "log.every=1")
    assert cli("prune-optimizer", tmp_path / "one", tmp_path / "bare") == 0
    assert cli("cast", tmp_path / "one", tmp_path / "narrow", "--dtype", "bf16") == 0
    assert cli("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "merged") == 0
    assert cli("average", tmp_path / "one", tmp_path / "mean", "--last", 2) == 0
    whole, bare, narrow, mean = (go(name, "train.stop_at=0") for name in ("one", "bare", "narrow", "mean"))
    merged = go("merged", "train.stop_at=0", "train.steps=2")
    assert len(bare) == len(narrow) == len(mean) == 2 and len(merged) == 2
    assert bare[0] == whole[4]  # the same batch and weights; the optimizer is felt a step later
    assert bare[1] != whole[5]
    assert narrow[0] == pytest.approx(whole[4], abs=0.02) and narrow[0] != whole[4]
    assert all(math.isfinite(loss) for loss in (*mean, *merged))
