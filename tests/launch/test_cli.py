"""The command line as a user meets it: real processes, exit codes, one-line errors."""

import errno
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints.store import CheckpointStore
from launch.cli import main
from launch.local import free_port
from tests.small import small_overrides

COMMAND = [sys.executable, "-m", "launch.cli"]


def pretrain(*arguments: str, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, check=False, **options
    )


def small_run(folder: Path, shards: Path, *overrides: str) -> list[str]:
    return ["run", "tiny", *small_overrides(folder, shards), *overrides]


def start(arguments: list[str], metrics: Path, lines: int) -> subprocess.Popen:
    """A run in the background that has logged so many steps."""
    command = [*COMMAND, *arguments]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= lines):
        time.sleep(0.1)
    return started


def assert_one_line_error(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("pretrain: error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


def test_help_is_quick_and_lists_what_exists():
    start = time.perf_counter()
    done = pretrain("--help")
    seconds = time.perf_counter() - start
    assert done.returncode == 0
    for command in ("run", "data", "checkpoint", "generate", "evaluate", "report", "doctor", "schema", "submit"):
        assert f"\n    {command}" in done.stdout
    assert seconds < 0.4 or min(_seconds_of_help() for _ in range(3)) < 0.4


def _seconds_of_help() -> float:
    start = time.perf_counter()
    pretrain("--help")
    return time.perf_counter() - start


def test_explain_says_where_each_key_comes_from():
    done = pretrain("run", "tiny", "train.steps=33", "--explain", "optim.lr=0.5")
    assert done.returncode == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert rows["train.steps"].split()[1] == "33"
    assert "override train.steps=33" in rows["train.steps"]
    assert "override optim.lr=0.5" in rows["optim.lr"]
    assert "recipe tiny.toml" in rows["model.hidden"]
    assert rows["data.prefetch"].endswith("default")


def test_schema_is_json(tmp_path):
    assert pretrain("schema", str(tmp_path / "schema.json")).returncode == 0
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert "train" in schema["properties"]


def test_doctor_tells_the_machine():
    done = pretrain("doctor")
    assert done.returncode == 0
    assert "torch.compile" in done.stdout and "attention at 512" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "tiny", "train.stepz=3"], ["unknown key train.stepz", "did you mean train.steps?"]),
        (["run", "tini"], ["recipe 'tini' is unknown", "did you mean tiny?"]),
        (["run", "tiny", "--nproc", "0"], ["--nproc 0: must be at least 1"]),
        (["checkpoint", "list", "/nowhere"], ["/nowhere/checkpoints: no checkpoints there"]),
        (["checkpoint", "verify", "/nowhere"], ["no checkpoints there"]),
        (["generate", "/nowhere", "x"], ["/nowhere is not a run", "config.toml is missing"]),
        (["report", "/nowhere"], ["/nowhere"]),
        (["data", "build", "--input", "/nowhere/*.txt", "--out", "x"], ["/nowhere/*.txt"]),
        (["data", "inspect", "/nowhere/*.tar"], ["/nowhere/*.tar"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, tmp_path):
    assert_one_line_error(pretrain(*arguments, cwd=tmp_path), *words)


def test_debug_shows_the_traceback():
    done = pretrain("--debug", "run", "tini", "--explain")
    assert done.returncode not in (0, 2)
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *((OSError(number, "x"), 1) for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH)),
        *((OSError(number, "x"), 2) for number in (errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.EROFS)),
        *((ConnectionResetError("x"), 1), (TimeoutError("x"), 1), (OSError("x"), 2), (ValueError("x"), 2)),
    ],
    ids=repr,
)
def test_what_may_pass_by_itself_is_no_mistake(error, code, monkeypatch, capsys):
    """Jobs are started anew after code 1 alone."""

    def fail(_) -> None:
        raise error

    monkeypatch.setattr("launch.commands.checkpoint.list_", fail)
    assert main(["checkpoint", "list", "/nowhere"]) == code
    assert capsys.readouterr().err.startswith("pretrain: error: ")


def test_unknown_options_are_not_taken_for_overrides():
    done = pretrain("run", "tiny", "--stepz", "3")
    assert done.returncode == 2
    assert "unrecognized arguments" in done.stderr


@pytest.mark.slow
def test_two_processes_train_stop_on_sigterm_and_resume(tmp_path, tiny_shards):
    arguments = small_run(tmp_path / "run", tiny_shards, "train.steps=400", "checkpoint.every=1000", "--nproc", "2")
    metrics = tmp_path / "run/metrics.jsonl"
    started = start(arguments, metrics, lines=4)
    started.send_signal(signal.SIGTERM)
    output, _ = started.communicate(timeout=90)
    assert started.returncode == 0, output
    assert f"by a signal; resume with: {shlex.join(['pretrain', *arguments])}" in output
    stopped = CheckpointStore(tmp_path / "run/checkpoints").newest_whole()
    assert stopped is not None and 3 < stopped < 400
    done = pretrain(*arguments, f"train.stop_at={stopped + 3}")
    assert done.returncode == 0, done.stderr
    assert f"resuming {tmp_path / 'run'} at step {stopped}" in done.stdout
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, stopped + 4))


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_is_named(tmp_path, tiny_shards):
    arguments = small_run(tmp_path / "run", tiny_shards, "train.steps=100000", "--nproc", "2")
    started = start(arguments, tmp_path / "run/metrics.jsonl", lines=2)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 1
    assert "rank 1 of 2 died (signal 9)" in output


ONE_RANK_FAILS = """
import sys, time
import launch.cli, launch.commands.run as command

def train(config, world, *_):
    if world.rank == 1:
        raise ValueError("shard 7 is torn")
    time.sleep(60)

command.train = train
sys.exit(launch.cli.main(["run", "tiny"]))
"""


@pytest.mark.slow
def test_an_error_of_one_rank_is_shown_with_its_rank():
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", ONE_RANK_FAILS]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    _, errors = ranks[1].communicate(timeout=60)
    ranks[0].kill()
    ranks[0].communicate(timeout=60)
    assert ranks[1].returncode == 2
    assert errors.splitlines()[-1] == "pretrain: error: rank 1 of 2: shard 7 is torn"


@pytest.mark.slow
def test_impatient_signals_do_not_lose_the_save(tmp_path, tiny_shards):
    arguments = small_run(tmp_path / "run", tiny_shards, "train.steps=100000")
    started = start(arguments, tmp_path / "run/metrics.jsonl", lines=3)
    for _ in range(4):  # the later ones while the last step or the save is on its way
        started.send_signal(signal.SIGINT)
        time.sleep(0.005)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 0, output
    stopped = CheckpointStore(tmp_path / "run/checkpoints").newest_whole()
    assert stopped is not None and CheckpointStore(tmp_path / "run/checkpoints").verify(stopped) == []


def test_a_module_of_the_users_folder_is_not_imported(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('taken from the wrong folder')")
    script = str(Path(sys.executable).with_name("pretrain"))
    done = subprocess.run(
        [script, "run", "tinny"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert_one_line_error(done, "recipe 'tinny' is unknown")


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, tiny_shards):
    """RLIMIT_FSIZE stands for the full disk: any file past it fails to be written."""
    arguments = small_run(tmp_path / "run", tiny_shards, "train.steps=4", "checkpoint.every=2")
    assert pretrain(*arguments, "train.stop_at=2").returncode == 0

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = pretrain(*arguments, preexec_fn=small_files)
    assert_one_line_error(done, "step 4 was not saved", "earlier checkpoints are untouched")
    store = CheckpointStore(tmp_path / "run/checkpoints")
    assert store.newest_whole() == 2
    assert store.verify(2) == []
    done = pretrain(*arguments)
    assert done.returncode == 0, done.stderr
    assert store.newest_whole() == 4


@pytest.mark.slow
def test_results_of_a_run(tmp_path, tiny_shards):
    """generate, evaluate, report, checkpoint list and verify on one real run."""
    run = str(tmp_path / "run with space")
    assert pretrain(*small_run(Path(run), tiny_shards, "train.steps=3")).returncode == 0
    first = pretrain("generate", run, "def main(", "--max-new-tokens", "8")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def main(")
    assert pretrain("generate", run, "def main(", "--max-new-tokens", "8").stdout == first.stdout
    evaluated = pretrain("evaluate", run, f"eval.shards={tiny_shards}/train-*.tar", "eval.max_samples=8")
    assert "eval_loss" in evaluated.stdout and "eval_bits_per_byte" in evaluated.stdout
    assert_one_line_error(pretrain("evaluate", run), "eval.shards is not set")
    assert pretrain("report", run).returncode == 0
    assert "<svg" in (Path(run) / "report.html").read_text()
    assert "whole" in pretrain("checkpoint", "list", run).stdout
    assert pretrain("checkpoint", "verify", run).returncode == 0
    weights = next((Path(run) / "checkpoints/step-00000003/model").glob("*.safetensors"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    done = pretrain("checkpoint", "verify", run)
    assert done.returncode == 1
    assert weights.name in done.stdout
    weights.unlink()
    assert_one_line_error(pretrain("generate", run, "x"), "no whole checkpoint")
