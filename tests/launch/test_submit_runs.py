"""What a job's ranks find: their recipe, their copies, their packages, their files, the shell's variables."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.local import rank_environment
from launch.slurm import snapshot
from launch.slurm import submit as submitting
from launch.slurm.cluster import ClusterConfig
from launch.slurm.submit import Job, Order, prepare
from parallel.engine import ENGINES
from pretrain.config import load_run_config
from tests.small import small_overrides

CONTAINER = {"kind": "pyxis", "image": "site/image", "python": "python3"}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def order(tmp_path: Path, *overrides: str, **options) -> Order:
    words = [*small_overrides(tmp_path / "run", tmp_path), "data.sources=[]", *overrides]
    cluster = ClusterConfig.model_validate(options.pop("cluster", {}))
    return Order(recipe="tiny", overrides=words, nodes=1, cluster=cluster, dry_run=True, **options)


def queued(job: Job, wanted: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "_queue", lambda *_: "7")
    monkeypatch.setattr(submitting, "check_alone", lambda _: [])
    submitting.submit(job, wanted)


def test_later_starts_continue_a_run_that_had_to_be_new(tmp_path, monkeypatch):
    wanted = order(tmp_path, "run.resume=never")
    job = prepare(wanted)
    queued(job, wanted, monkeypatch)
    shutil.move(tmp_path / "run/submitted.toml", tmp_path / "config.toml")
    assert load_run_config(tmp_path).run.resume == "auto"


def test_runs_of_a_sweep_have_copies_of_their_own(tmp_path):
    job = prepare(order(tmp_path, "checkpoint.remote=s3://bucket/runs", sweep=("optim.lr=1e-3,1e-4",)))
    remotes = {folder.name: config.checkpoint.remote for folder, config in job.configs.items()}
    assert remotes == {"000": "s3://bucket/runs/000", "001": "s3://bucket/runs/001"}


def test_an_engine_that_is_not_here_is_named_before_the_queue(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "torch", replace(ENGINES["torch"], package="no-such-distribution", extra="x"))
    with pytest.raises(ValueError, match="needs the package no-such-distribution, which is not installed"):
        prepare(order(tmp_path))
    prepare(order(tmp_path, cluster={"container": CONTAINER}))  # has its own


def test_containers_see_the_tokenizer_and_the_list_of_what_is_left_out(tmp_path, tiny_shards):
    shutil.copytree(tiny_shards / "tokenizer", tmp_path / "tok/one")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/skip.txt").touch()
    paths = [f"tokenizer.path={tmp_path}/tok/one", f"data.skip={tmp_path}/lists/skip.txt"]
    mounts = prepare(order(tmp_path, *paths, cluster={"container": CONTAINER})).plan.mounts
    assert {str(tmp_path / "tok/one"), str(tmp_path / "lists")} <= set(mounts)


def test_variables_that_steer_libraries_are_named_where_they_stay_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    said = [line for line in prepare(order(tmp_path)).warnings if "NCCL_SOCKET_IFNAME" in line]
    assert len(said) == 1 and "forward with --env" in said[0]
    assert not any("NCCL" in line for line in prepare(order(tmp_path, environment=("NCCL_*",))).warnings)


def test_threads_are_of_the_cpus_that_a_job_was_given(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert rank_environment(2, gpus=0)["OMP_NUM_THREADS"] == "4"


def test_a_snapshot_has_modules_that_are_not_committed(tmp_path, monkeypatch):
    git = shutil.which("git", path=os.defpath)
    if git is None:
        pytest.skip("needs git")
    (tmp_path / "git").symlink_to(git)
    code = tmp_path / "code"
    (code / "launch").mkdir(parents=True)
    (code / "launch/__init__.py").touch()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "a"]):
        subprocess.run([git, "-C", code, *words], check=True)
    (code / "launch/new.py").write_text("NEW = 1\n")
    (code / "notes.txt").write_text("of no package\n")
    monkeypatch.setattr(snapshot, "_home", lambda: code)
    assert snapshot.write_snapshot(tmp_path / "kept").endswith("+ diff.patch")
    diff = (tmp_path / "kept/diff.patch").read_text()
    assert "+NEW = 1" in diff and "launch/new.py" in diff and "of no package" not in diff
    (code / "launch/new.py").unlink()
    subprocess.run([git, "-C", code, "apply", tmp_path / "kept/diff.patch"], check=True)
    assert (code / "launch/new.py").read_text() == "NEW = 1\n"
