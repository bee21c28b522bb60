"""The data of a run: mixtures that are edited, the ledger, loss spikes, replayed steps, documents left out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_pipeline.ledger import read_ledger
from launch.cli import main
from parallel.world import World
from pretrain.config import load_run_config
from pretrain.replay import replay
from pretrain.spikes import Spikes
from pretrain.train import train
from tests.data_pipeline.conftest import make_shards
from tests.data_pipeline.servers import serving
from tests.pretrain.test_train import ALONE, assert_same_tensors, losses, small_config
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """Three sources of random tokens, as overrides."""
    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    found = {}
    for name, count in (("a", 60), ("b", 40), ("c", 30)):
        documents = [rng.integers(0, 2000, int(length)) for length in rng.integers(5, 200, count)]
        shards = make_shards(folder / name, documents, num_shards=2, vocab_size=2048)
        found[name] = f'{{name = "{name}", shards = "{shards}/train-*.tar", weight = %s}}'
    return found


def mixed(sources: dict[str, str], **weights: object) -> str:
    return f"data.sources=[{', '.join(sources[name] % weight for name, weight in weights.items())}]"


def ledger_of(run_dir: Path) -> list[tuple]:
    entries = read_ledger(run_dir / "ledger.bin")
    return [(e.step, e.first, [c.tolist() for c in e.record]) for e in entries if e.record is not None]


def test_an_edited_mixture_resumes_exactly(tmp_path, sources, tiny_shards) -> None:
    """Edited at step 4 and stopped again at 6: as edited at 4 and never stopped; the ledgers are alike."""
    first, second = mixed(sources, a=1.0, b="[[0, 3.0], [512, 1.0]]"), mixed(sources, c=2.0, a=1.0)
    for run, stops in (("whole", (8,)), ("halves", (6, 8))):
        train(small_config(tmp_path / run, tiny_shards, first, "train.steps=8", "train.stop_at=4"), ALONE)
        for stop in stops:
            config = small_config(tmp_path / run, tiny_shards, second, "train.steps=8", f"train.stop_at={stop}")
            train(config, ALONE)
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    assert_same_tensors(tmp_path / "whole", tmp_path / "halves", 8)
    steps = ledger_of(tmp_path / "whole")
    assert steps == ledger_of(tmp_path / "halves")
    assert [step for step, _, _ in steps] == list(range(1, 9))
    used = [set(columns[1]) for _, _, columns in steps]
    assert set().union(*used[:4]) == {0, 1} and set().union(*used[4:]) == {0, 2}, "b went, c came"
    state = json.loads((tmp_path / "whole/checkpoints/step-00000008/state.json").read_text())
    assert [phase["start"] for phase in state["mixture"]] == [0, steps[4][1]]


def test_a_source_that_changed_is_refused(tmp_path, sources, tiny_shards) -> None:
    train(small_config(tmp_path / "run", tiny_shards, mixed(sources, a=1.0), "train.steps=4", "train.stop_at=2"), ALONE)
    other = mixed(sources, b=1.0).replace('name = "b"', 'name = "a"')
    with pytest.raises(ValueError, match="source 'a' holds other data than when it was last read"):
        train(small_config(tmp_path / "run", tiny_shards, other, "train.steps=4"), ALONE)
    with pytest.raises(ValueError, match=r"all sources are used up; raise data.sources.epochs"):
        short = mixed(sources, c=1.0).replace("weight", "epochs = 0.1, weight")
        train(small_config(tmp_path / "short", tiny_shards, short, "train.steps=200"), ALONE)


def test_replay_gives_the_loss_that_was_logged(tmp_path, sources, tiny_shards, capsys) -> None:
    run = tmp_path / "run"
    overrides = (mixed(sources, a=1.0, b=1.0), "train.steps=6", "checkpoint.every=2")
    train(small_config(run, tiny_shards, *overrides), ALONE)
    logged = losses(run)
    for step, start in ((1, 0), (4, 2), (6, 4)):
        found = replay(load_run_config(run), ALONE, step)
        assert found.start == start and found.logged == logged[step - 1]
        assert found.loss == pytest.approx(logged[step - 1], rel=1e-6)
        named = [row["loss"] for row in found.rows if row["targets"]]
        assert named == sorted(named, reverse=True) and len(named) > 8
    capsys.readouterr()
    assert main(["data", "ledger", str(run), "--step", "4"]) == 0
    listed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    found = replay(load_run_config(run), ALONE, 4)
    assert sorted(listed) == sorted([row["source"], row["shard"], row["key"], str(row["start"])] for row in found.rows)
    capsys.readouterr()
    source, shard, key, start = listed[0]
    assert main(["data", "ledger", str(run), "--document", key]) == 0
    assert "\t".join(["step 4", source, shard, key, start]) in capsys.readouterr().out.splitlines()
    for words, message in (
        (["data", "ledger", str(run), "--step", "9"], "has no step 9; it has 1 to 6"),
        (["data", "ledger", str(run), "--document", "none"], "no source of .* has a document with the key 'none'"),
    ):
        assert main(words) == 2
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(ValueError, match="has taken steps 1 to 6"):
        replay(load_run_config(run), ALONE, 7)


AXES = ("tp", "cp", "pp", "dp_shard")


def _replay_on_ranks(run: Path, expected: list[float]) -> None:
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    config = load_run_config(run)
    places = [tuple(place) for place in json.loads((run / "places.json").read_text())]
    for axis in AXES:
        parallel = config.parallel.model_copy(update={"dp_shard": 1, axis: 2})
        found = replay(config.model_copy(update={"parallel": parallel}), world, 3)
        got = {(r["source"], r["shard"], r["key"], r["start"]): r["loss"] for r in found.rows}
        assert [got[place] for place in places] == pytest.approx(expected, rel=1e-4), axis


@pytest.mark.slow
def test_losses_of_documents_are_those_of_one_process_in_every_layout(tmp_path, sources, tiny_shards) -> None:
    run = tmp_path / "run"
    overrides = (
        mixed(sources, a=1.0, b=1.0),
        "train.steps=4",
        "train.micro_batch=2",
        "model.heads=4",
        "model.kv_heads=2",
    )
    train(small_config(run, tiny_shards, *overrides), ALONE)
    rows = [row for row in replay(load_run_config(run), ALONE, 3).rows if row["targets"]]
    places = [[row["source"], row["shard"], row["key"], row["start"]] for row in rows]
    (run / "places.json").write_text(json.dumps(places))
    run_ranks(_replay_on_ranks, 2, run, [row["loss"] for row in rows], timeout=200)


def test_skipped_documents_are_no_targets(tmp_path, sources, tiny_shards, capsys) -> None:
    """The lines that the ledger prints are such a list; the others' losses stay as they were."""
    base = (mixed(sources, a=1.0, b=1.0), "train.steps=1", "schedule.warmup=0")
    train(small_config(tmp_path / "plain", tiny_shards, *base), ALONE)
    before = replay(load_run_config(tmp_path / "plain"), ALONE, 1).rows
    worst = next(row for row in before if row["targets"])
    skip = tmp_path / "skip.txt"
    skip.write_text(f"# of a spike\n\n{worst['source']}\t{worst['shard']}\t{worst['key']}\t0\n")
    train(small_config(tmp_path / "less", tiny_shards, *base, f"data.skip={skip}"), ALONE)
    after = {(r["source"], r["key"], r["start"]): r for r in replay(load_run_config(tmp_path / "less"), ALONE, 1).rows}
    for row in before:
        now = after[row["source"], row["key"], row["start"]]
        if (row["source"], row["key"]) == (worst["source"], worst["key"]):
            assert now["targets"] == 0 and row["targets"] > 0
        else:
            assert now == row
    skip.write_text("a\tb\n")
    with pytest.raises(ValueError, match=r"skip.txt: line 1: give source, shard and key with tabs between"):
        train(small_config(tmp_path / "bad", tiny_shards, *base, f"data.skip={skip}"), ALONE)
    with pytest.raises(FileNotFoundError, match=r"data.skip = .*: no such file"):
        train(small_config(tmp_path / "bad", tiny_shards, *base, "data.skip=none.txt"), ALONE)


def test_only_what_stands_out_is_a_spike() -> None:
    spikes, rng = Spikes(8.0), np.random.default_rng(1)
    calm = [spikes.score(4 - step / 400 + rng.normal() * 0.05) for step in range(200)]
    assert not any(calm) and spikes.score(None) == 0
    assert spikes.score(6.0) > 8
    assert not any(Spikes(0.0).score(value) for value in [1.0] * 50 + [100.0])
    early = Spikes(8.0)
    assert not any(early.score(value) for value in [1.0] * 10 + [100.0])


def test_documents_of_a_spike_are_written(tmp_path, sources, tiny_shards, monkeypatch, capsys) -> None:
    """The losses come from the model two steps on; the costliest document stands first."""
    monkeypatch.setattr("pretrain.spikes.ENOUGH", 2)
    overrides = (mixed(sources, a=1.0, b=1.0), "train.steps=12", "log.spike=0.000001", "optim.lr=1e-12")
    train(small_config(tmp_path / "run", tiny_shards, *overrides), ALONE)
    lines = [json.loads(line) for line in (tmp_path / "run/spikes.jsonl").read_text().splitlines()]
    assert lines and "stands out" in capsys.readouterr().out
    logged = losses(tmp_path / "run")
    for line in lines:
        assert line["loss"] == logged[line["step"] - 1] > np.median(logged[: line["step"] - 1])
        rows = line["documents"]
        targets = sum(row["targets"] for row in rows)
        total = sum(row["loss"] * row["targets"] for row in rows if row["targets"])
        assert total / targets == pytest.approx(line["loss"], rel=1e-5), "with lr 0 the weights are those of the step"
        assert rows[0]["loss"] >= rows[1]["loss"]


def test_a_run_reads_over_http_what_it_reads_here(tmp_path, sources, tiny_shards) -> None:
    """Few shards at a time, as a small cache wants them."""
    local = [mixed(sources, a=1.0, b=1.0), "train.steps=3", "data.shuffle_shards=1"]
    train(small_config(tmp_path / "here", tiny_shards, *local), ALONE)
    folder = Path(re.findall(r'shards = "(.*?)/a/', sources["a"])[0])
    with serving(folder) as server:
        there = [local[0].replace(str(folder), server.url), *local[1:], f"data.cache.dir={tmp_path / 'cache'}"]
        there[0] = there[0].replace("train-*.tar", "train-{00000..00001}.tar")
        train(small_config(tmp_path / "there", tiny_shards, *there), ALONE)
    assert losses(tmp_path / "there") == losses(tmp_path / "here")
    assert ledger_of(tmp_path / "there") == ledger_of(tmp_path / "here")
