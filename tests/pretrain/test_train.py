"""Runs: exact resume, the same loss in every layout, signals, and what a run leaves behind."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from checkpoints.store import CheckpointStore
from data_pipeline.tokenizer import train_tokenizer
from launch.cli import main
from parallel.world import World
from pretrain.config import RunConfig, load_run_config, resolve
from pretrain.load import load_trained, run_tokenizer
from pretrain.lock import RunLock
from pretrain.metrics import Metrics
from pretrain.train import train
from tests.ranks import run_ranks
from tests.small import small_overrides

ALONE = World(0, 1, torch.device("cpu"))


def small_config(run_dir: Path, shards: Path, *overrides: str) -> RunConfig:
    return resolve("tiny", [*small_overrides(run_dir, shards), "train.precision=fp32", *overrides])[0]


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds, by file and name."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return {f"{f.relative_to(folder)}:{n}": t for f in folder.glob("*/*.safetensors") for n, t in load_file(f).items()}


def assert_same_tensors(left: Path, right: Path, step: int) -> None:
    ours, theirs = tensors(left, step), tensors(right, step)
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in name or "momentum_buffer" in name for name in ours)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bitwise(tmp_path, tiny_shards, optimizer, precision):
    chosen = [f"optim.name={optimizer}", f"train.precision={precision}", "train.steps=8"]
    train(small_config(tmp_path / "whole", tiny_shards, *chosen), ALONE)
    train(small_config(tmp_path / "halves", tiny_shards, *chosen, "train.stop_at=4"), ALONE)
    assert CheckpointStore(tmp_path / "halves/checkpoints").newest_whole() == 4
    train(small_config(tmp_path / "halves", tiny_shards, *chosen, "data.prefetch=0"), ALONE)
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    assert_same_tensors(tmp_path / "whole", tmp_path / "halves", 8)


def _train_on_rank(config: RunConfig) -> None:
    train(config, World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))


@pytest.mark.slow
def test_resume_is_bitwise_on_two_ranks(tmp_path, tiny_shards):
    whole = small_config(tmp_path / "whole", tiny_shards, "train.steps=6")
    run_ranks(_train_on_rank, 2, whole, timeout=120)
    run_ranks(_train_on_rank, 2, small_config(tmp_path / "halves", tiny_shards, "train.steps=6", "train.stop_at=3"))
    run_ranks(_train_on_rank, 2, small_config(tmp_path / "halves", tiny_shards, "train.steps=6"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    assert_same_tensors(tmp_path / "whole", tmp_path / "halves", 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, []),
        (4, ["parallel.dp_replicate=2"]),
        (2, ["parallel.dp_replicate=2", "parallel.dp_shard=1"]),
        (2, ["train.recompute=full", "parallel.reshard_after_forward=false"]),
    ],
    ids=["fsdp2", "hsdp2x2", "replicate2", "fsdp2-recompute"],
)
def test_sharded_runs_have_the_loss_of_one_process(tmp_path, tiny_shards, world, layout):
    """Gradients averaged instead of summed, or a wrong slice of the data, would show at the second step."""
    shared = ["train.steps=4", "train.micro_batch=1"]
    train(small_config(tmp_path / "one", tiny_shards, *shared), ALONE)
    config = small_config(tmp_path / "many", tiny_shards, *shared, *layout)
    run_ranks(_train_on_rank, world, config, timeout=120)
    torch.testing.assert_close(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=2e-6, atol=0)
    one, many = load_trained(tmp_path / "one").model, load_trained(tmp_path / "many").model
    for (name, ours), (_, theirs) in zip(one.named_parameters(), many.named_parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "same",
    [["train.micro_batch=1"], ["train.micro_batch=8"], ["train.recompute=full"], ["train.recompute=selective"]],
    ids=lambda overrides: overrides[0],
)
def test_accumulation_and_recomputation_change_nothing(tmp_path, tiny_shards, same):
    train(small_config(tmp_path / "a", tiny_shards, "train.steps=3"), ALONE)
    train(small_config(tmp_path / "b", tiny_shards, "train.steps=3", *same), ALONE)
    torch.testing.assert_close(losses(tmp_path / "b"), losses(tmp_path / "a"), rtol=2e-6, atol=0)


@pytest.mark.slow
def test_compiled_run_has_the_loss_of_the_eager_one(tmp_path, tiny_shards):
    train(small_config(tmp_path / "eager", tiny_shards, "train.steps=3"), ALONE)
    train(small_config(tmp_path / "compiled", tiny_shards, "train.steps=3", "train.compile=on"), ALONE)
    torch.testing.assert_close(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-5, atol=0)


def test_same_seed_same_losses_other_seed_others(tmp_path, tiny_shards):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(small_config(tmp_path / name, tiny_shards, "train.steps=2", f"run.seed={seed}"), ALONE)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_a_signal_saves_and_the_same_command_resumes(tmp_path, tiny_shards, capsys, monkeypatch):
    train(small_config(tmp_path / "whole", tiny_shards, "train.steps=6"), ALONE)
    config = small_config(tmp_path / "stopped", tiny_shards, "train.steps=6")
    log = Metrics.log

    def signal_after_two_steps(self, step, values):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        log(self, step, values)

    monkeypatch.setattr(Metrics, "log", signal_after_two_steps)
    position = train(config, ALONE)
    assert 2 < position.step < 6
    assert "by a signal; resume with: the same command" in capsys.readouterr().out
    assert CheckpointStore(tmp_path / "stopped/checkpoints").newest_whole() == position.step
    train(config, ALONE)
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    assert_same_tensors(tmp_path / "whole", tmp_path / "stopped", 6)


def test_a_run_leaves_its_record(tmp_path, tiny_shards):
    config = small_config(tmp_path / "run", tiny_shards, "train.steps=2", "log.tensorboard=true", "log.every=1")
    train(config, ALONE)
    saved = load_run_config(tmp_path / "run")
    assert saved.model.vocab_size == 2048
    assert saved.train == config.train
    env = json.loads((tmp_path / "run/env.json").read_text())
    assert env["seed"] == 1
    assert torch.__version__.startswith(env["packages"]["torch"].split("+")[0])
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    tokenizer = run_tokenizer(tmp_path / "run")
    assert tokenizer.decode(tokenizer.encode("def f(x):\n    return x")) == "def f(x):\n    return x"


def test_held_out_loss_is_logged_and_falls(tmp_path, tiny_shards):
    held_out = [f"eval.shards={tiny_shards}/train-*.tar", "eval.every=10", "eval.max_samples=16"]
    train(small_config(tmp_path / "run", tiny_shards, "train.steps=20", *held_out), ALONE)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evals] == [10, 20]
    assert evals[1]["eval_loss"] < evals[0]["eval_loss"] < 7.7
    assert 0 < evals[1]["eval_bits_per_byte"] < 8


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["run.resume=must"], FileNotFoundError, "has no whole checkpoint"),
        (["model.vocab_size=100"], ValueError, "vocabulary"),
        (["data.sources=[{shards='/nowhere/*.tar'}]"], FileNotFoundError, "nowhere"),
        (["parallel.dp_shard=3"], ValueError, "need 3 processes, but 1 run"),
        (
            ["parallel.tp=2"],
            ValueError,
            "parallel: tp 2 need a multiple of 2 processes, but 1 run; set parallel.tp = 1, or start 2",
        ),
        (["train.micro_batch=8", "train.global_batch=8", "parallel.dp_shard=0"], ValueError, "parallel.dp_shard = 0"),
    ],
)
def test_a_run_that_cannot_start_says_why(tmp_path, tiny_shards, overrides, error, message):
    with pytest.raises(error, match=message) as caught:
        train(small_config(tmp_path / "run", tiny_shards, *overrides), ALONE)
    assert "\n" not in str(caught.value)


def test_shards_and_tokenizer_must_agree(tmp_path, tiny_shards):
    other = train_tokenizer(["some text, and more of it\n" * 50], vocab_size=300)
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="vocabulary of 2048"):
        train(small_config(tmp_path / "run", tiny_shards, f"tokenizer.path={tmp_path / 'other'}"), ALONE)
    with pytest.raises(ValueError, match=r"model\.vocab_size = 64 is less than"):
        train(
            small_config(tmp_path / "run", tiny_shards, f"tokenizer.path={tmp_path / 'other'}", "model.vocab_size=64"),
            ALONE,
        )
    bare = tmp_path / "bare"  # shards that tell nothing of themselves
    bare.mkdir()
    shutil.copy(tiny_shards / "train-00000.tar", bare)
    with pytest.raises(ValueError, match="vocab_size"):
        train(small_config(tmp_path / "run", bare, "train.steps=1"), ALONE)
    same = f"tokenizer.path={tiny_shards / 'tokenizer'}"
    train(small_config(tmp_path / "run", bare, "train.steps=1", same), ALONE)
    assert run_tokenizer(tmp_path / "run").vocab_size == load_run_config(tmp_path / "run").model.vocab_size == 2048


def test_a_run_goes_on_only_as_what_it_is(tmp_path, tiny_shards, capsys):
    train(small_config(tmp_path / "run", tiny_shards, "train.steps=6", "train.stop_at=2"), ALONE)
    for changed in ("run.seed=77", "data.seq_len=32"):
        before = (tmp_path / "run/config.toml").read_text()
        with pytest.raises(ValueError, match=f"{changed.replace('=', ' = ')}, but .* was started with"):
            train(small_config(tmp_path / "run", tiny_shards, "train.steps=6", changed), ALONE)
        with pytest.raises(ValueError, match="need 3 processes"):
            train(small_config(tmp_path / "run", tiny_shards, "train.steps=6", "parallel.dp_shard=3"), ALONE)
        assert (tmp_path / "run/config.toml").read_text() == before
    train(small_config(tmp_path / "run", tiny_shards, "train.steps=6", "optim.lr=1e-4"), ALONE)
    assert "changed since the last start: optim.lr 0.003 -> 0.0001" in capsys.readouterr().out
    starts = [json.loads(line) for line in (tmp_path / "run/starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 2]
    assert "optim.lr 0.003 -> 0.0001" in starts[1]["changes"]


def test_a_checkpoint_with_another_number_of_experts_is_refused(tmp_path, tiny_shards):
    experts = ["model.moe.experts=4", "model.moe.ffn=16", "train.steps=2"]
    train(small_config(tmp_path / "run", tiny_shards, *experts, "train.stop_at=1"), ALONE)
    said = r"step-00000001 does not fit .* layers.0.moe.experts.gate \(float32 \[4, 16, 48\] there, float32 \[8, 16"
    with pytest.raises(ValueError, match=said):
        train(small_config(tmp_path / "run", tiny_shards, *experts, "model.moe.experts=8"), ALONE)
    assert CheckpointStore(tmp_path / "run/checkpoints").verify(1) == []


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path, tiny_shards):
    config = small_config(tmp_path / "run", tiny_shards, "train.steps=3")
    train(config, ALONE)
    next((tmp_path / "run/checkpoints/step-00000003/model").glob("*")).unlink()
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="1 checkpoints and none is whole"):
        train(config, ALONE)
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_good_checkpoint(tmp_path, tiny_shards):
    often = ["checkpoint.every=1", "checkpoint.keep=1"]
    train(small_config(tmp_path / "run", tiny_shards, "train.steps=9", "train.stop_at=2", *often), ALONE)
    with pytest.raises(ValueError, match=r"(loss|grad_norm) is (nan|inf) at step \d: nothing was saved since step \d"):
        train(small_config(tmp_path / "run", tiny_shards, "train.steps=9", "optim.lr=1e30", *often), ALONE)
    kept = CheckpointStore(tmp_path / "run/checkpoints").newest_whole()
    assert 2 <= kept < 9
    assert all(t.isfinite().all() for t in tensors(tmp_path / "run", kept).values())


def test_one_process_at_a_time_trains_in_a_folder(tmp_path, tiny_shards):
    other = RunLock(tmp_path / "run")
    other.take()
    with pytest.raises(ValueError, match="another process is training there"):
        train(small_config(tmp_path / "run", tiny_shards, "train.steps=1"), ALONE)
    other.release()
    train(small_config(tmp_path / "run", tiny_shards, "train.steps=1"), ALONE)


def test_another_tokenizer_than_the_runs_is_refused(tmp_path, tiny_shards):
    train(small_config(tmp_path / "run", tiny_shards, "train.steps=4", "train.stop_at=1"), ALONE)
    shutil.rmtree(tmp_path / "run/tokenizer")
    train_tokenizer(["another text\n" * 50], vocab_size=280).save(tmp_path / "run/tokenizer")
    with pytest.raises(ValueError, match="different tokenizers"):
        train(small_config(tmp_path / "run", tiny_shards, "train.steps=4"), ALONE)


def test_the_choice_to_compile_is_that_of_the_whole_run(tmp_path, tiny_shards, monkeypatch):
    """What is left of a run must not decide: its second half would compute other roundings than its first."""
    seen = []

    def decide(setting, flops, device):
        seen.append(flops)
        return False, "test"

    monkeypatch.setattr("pretrain.train.decide_compile", decide)
    for stop in (2, 4):
        config = small_config(tmp_path / "run", tiny_shards, "train.steps=4", f"train.stop_at={stop}")
        train(config, ALONE)
    assert seen[0] == seen[1] > 0


def test_an_existing_run_is_respected(tmp_path, tiny_shards, capsys):
    config = small_config(tmp_path / "run", tiny_shards, "train.steps=2")
    train(config, ALONE)
    train(config, ALONE)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a run at step 2"):
        train(small_config(tmp_path / "run", tiny_shards, "train.steps=4", "run.resume=never"), ALONE)
    with pytest.raises(ValueError, match="is at step 2 already"):
        train(small_config(tmp_path / "run", tiny_shards, "train.steps=2", "train.steps=1"), ALONE)
    before = (tmp_path / "run/config.toml").read_text()
    with pytest.raises(ValueError, match="does not fit this run"):
        train(small_config(tmp_path / "run", tiny_shards, "train.steps=4", "model.ffn=80"), ALONE)
    assert (tmp_path / "run/config.toml").read_text() == before


def averages(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return {n.partition("ema.")[2]: t for n, t in tensors(run_dir, step).items() if ":ema." in n}


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return {n.partition(":")[2]: t for n, t in tensors(run_dir, step).items() if n.startswith("model/")}


def test_average_of_the_weights(tmp_path, tiny_shards, capsys):
    """Kept as optimizer state: exact, resumed bitwise, begun and ended at a resume."""
    chosen = ["train.steps=4", "checkpoint.every=1", "checkpoint.keep=9", "optim.ema=0.75"]
    train(small_config(tmp_path / "whole", tiny_shards, *chosen), ALONE)
    train(small_config(tmp_path / "halves", tiny_shards, *chosen, "train.stop_at=2"), ALONE)
    train(small_config(tmp_path / "halves", tiny_shards, *chosen), ALONE)
    assert_same_tensors(tmp_path / "whole", tmp_path / "halves", 4)
    before = averages(tmp_path / "whole", 3)
    assert before.keys() == weights(tmp_path / "whole", 4).keys()
    for name, average in averages(tmp_path / "whole", 4).items():
        now = weights(tmp_path / "whole", 4)[name]
        torch.testing.assert_close(average, 0.75 * before[name] + 0.25 * now)
    train(small_config(tmp_path / "late", tiny_shards, *chosen, "optim.ema=0.0", "train.stop_at=2"), ALONE)
    train(small_config(tmp_path / "late", tiny_shards, *chosen, "train.stop_at=3"), ALONE)
    for name, average in averages(tmp_path / "late", 3).items():
        begun = weights(tmp_path / "late", 2)[name]
        torch.testing.assert_close(average, 0.75 * begun + 0.25 * weights(tmp_path / "late", 3)[name])
    train(small_config(tmp_path / "late", tiny_shards, *chosen, "optim.ema=0.0"), ALONE)
    assert not averages(tmp_path / "late", 4)
    assert losses(tmp_path / "late") == losses(tmp_path / "whole"), "it changes nothing else"
    whole, out = tmp_path / "whole", tmp_path / "averaged"
    assert main(["checkpoint", "ema", str(whole), str(out)]) == 0
    average, made = averages(whole, 4), weights(out, 4)
    assert made.keys() == average.keys()
    assert all(torch.equal(made[name], average[name]) for name in made)
    assert main(["checkpoint", "ema", str(tmp_path / "late"), str(tmp_path / "none")]) == 2
    assert "holds no moving average" in capsys.readouterr().err


def test_a_flipped_bit_sends_the_run_back_to_the_checkpoint_before(tmp_path, tiny_shards, caplog):
    """Bit for bit as if it had never happened; where none is sound the run says so and starts nothing."""
    chosen = ["train.steps=6", "checkpoint.every=2"]
    train(small_config(tmp_path / "whole", tiny_shards, *chosen), ALONE)
    train(small_config(tmp_path / "run", tiny_shards, *chosen, "train.stop_at=4"), ALONE)
    for step in (4, 2):
        file = next((tmp_path / f"run/checkpoints/step-{step:08d}/optimizer").iterdir())
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        if step == 4:
            train(small_config(tmp_path / "run", tiny_shards, *chosen), ALONE)
            assert f"skipping a broken checkpoint: {file} is damaged" in caplog.text
            assert_same_tensors(tmp_path / "whole", tmp_path / "run", 6)
            shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
            shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    with pytest.raises(ValueError, match=r"1 checkpoints and none is whole \(checksums of step 2 do not match\)"):
        train(small_config(tmp_path / "run", tiny_shards, *chosen), ALONE)
