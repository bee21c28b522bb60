"""`pretrain submit` on a real cluster: what reaches the job, and what the cluster cannot give."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

from launch import cli
from pretrain.config import resolve
from tests.slurm.cluster import Cluster, wait_until
from tests.small import small_overrides

# In place of the Python of the job: writes down how it was started, and waits where it is told to.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[4])
seen = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
(folder / "seen.json").write_text(json.dumps(seen))
print("supervised")
while (folder / "wait").exists():
    time.sleep(0.1)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A cluster file whose Python is the stand-in."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    file = tmp_path / "cluster.toml"
    file.write_text(f'python = "{python}"\nranks_per_node = 2\ngrace = 10\ntime = "5"\n')
    return file


def submit(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[int]:
    """The ids of the jobs that were queued."""
    code = cli.main(["submit", "tiny", *arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.startswith("code: commit ") or "git repository" in printed.out
    line = next(line for line in printed.out.splitlines() if line.startswith("job "))
    return [int(word) for word in line.removeprefix("job ").partition(" (")[0].split(", ")]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = cli.main(["submit", "tiny", *arguments])
    printed = capsys.readouterr()
    assert code == 2, printed.out
    errors = [line for line in printed.err.splitlines() if not line.startswith("pretrain: warning: ")]
    assert len(errors) == 1 and errors[0].startswith("pretrain: error: "), printed.err
    return errors[0]


def seen(run_dir: Path) -> dict:
    return json.loads((run_dir / "seen.json").read_text())


def test_strange_words_reach_the_job_as_they_are(slurm, site, tiny_shards, tmp_path, capsys, monkeypatch):
    trap = tmp_path / "trap"
    folder = tmp_path / f"it's a; touch {trap.name} && $(touch {trap.name}) `touch {trap.name}` \"#%j %%"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", f"$(touch {trap}); 'quoted'\nnewline")
    monkeypatch.setenv("OTHER", "stays here")
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    run_dir = folder / "ru$n"
    overrides = [*small_overrides(run_dir, tiny_shards), "train.micro_batch=2", f"data.skip=$(touch {trap});'x"]
    name = ["--name", "run-1", "--env", "HF_*"]
    [job] = submit(capsys, *overrides, "--nodes", "2", *name, "--cluster", str(site), "--copy-code")
    assert slurm.wait(job) == "COMPLETED"

    told = seen(run_dir)
    assert told["arguments"] == ["-P", "-m", "launch.slurm.job", str(run_dir)]
    assert told["folder"] == str(folder)
    environment = told["environment"]
    assert environment["HF_HOME"] == os.environ["HF_HOME"]
    assert "OTHER" not in environment
    assert environment["SLURM_EXPORT_ENV"] == "ALL"
    code = Path(environment["PYTHONPATH"])
    assert code == run_dir / "snapshot" / "code"
    where = [sys.executable, "-P", "-c", "import launch, pretrain.history; print(launch.__file__)"]
    found = subprocess.run(where, env=environment, capture_output=True, text=True, check=True, cwd="/")
    assert Path(found.stdout.strip()).is_relative_to(code)
    assert (run_dir / "logs" / f"slurm-{job}.out").read_text() == "supervised\n"
    fields = slurm.job(job)
    expected = {"JobName": "run-1", "NumNodes": "2", "Requeue": "1", "TimeLimit": "00:05:00", "Partition": "debug"}
    assert expected.items() <= fields.items()
    record = json.loads((run_dir / "job.json").read_text())
    assert (record["job_ids"], record["nodes"], record["ranks_per_node"]) == ([str(job)], 2, 2)
    assert record["overrides"] == overrides
    assert record["time_limit_s"] == 300 and record["grace_s"] == 10
    assert resolve(str(run_dir / "submitted.toml"))[0].data.skip == f"$(touch {trap});'x"
    assert not list(tmp_path.rglob("trap"))
    assert (run_dir / "snapshot" / "versions.txt").read_text().count("torch==") == 1


@pytest.mark.slow
def test_the_script_can_be_queued_again_by_hand(slurm, site, tiny_shards, tmp_path, capsys):
    run_dir = tmp_path / "run"
    [job] = submit(capsys, *small_overrides(run_dir, tiny_shards), "--cluster", str(site))
    slurm.wait(job, "COMPLETED")
    (run_dir / "seen.json").unlink()
    listed = subprocess.run(["sbatch", "--parsable", run_dir / "job.sh"], capture_output=True, text=True, check=True)
    assert slurm.wait(int(listed.stdout)) == "COMPLETED"
    assert seen(run_dir)["arguments"][-1] == str(run_dir)


@pytest.mark.slow
def test_a_folder_has_one_job_at_a_time(slurm, site, tiny_shards, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "wait").touch()
    arguments = [*small_overrides(run_dir, tiny_shards), "--cluster", str(site)]
    first = submit(capsys, *arguments, "--chain", "2")
    slurm.wait(first[0], "RUNNING")
    assert slurm.job(first[1])["Dependency"].startswith(f"afterany:{first[0]}")
    assert "Dependency" not in slurm.job(first[0]) or slurm.job(first[0])["Dependency"] == "(null)"
    error = refused(capsys, *arguments)
    assert f"{first[0]} (running), {first[1]} (pending)" in error and str(run_dir) in error
    assert "run.dir" in refused(capsys, *arguments, "--dry-run")
    (run_dir / "wait").unlink()
    assert [slurm.wait(job) for job in first] == ["COMPLETED"] * 2
    second = submit(capsys, *arguments)
    assert json.loads((run_dir / "job.json").read_text())["job_ids"] == [str(job) for job in [*first, *second]]
    slurm.wait(second[0], "COMPLETED")


@pytest.mark.slow
def test_a_sweep_is_an_array_of_runs(slurm, site, tiny_shards, tmp_path, capsys):
    run_dir = tmp_path / "sweep%a"
    arguments = [*small_overrides(run_dir, tiny_shards), "--cluster", str(site)]
    sweep = ["--sweep", "optim.lr=1e-4,3e-4", "run.seed=1..3", "--at-once", "2"]
    [job] = submit(capsys, *arguments, *sweep)
    points = json.loads((run_dir / "sweep.json").read_text())["points"]
    assert [point["overrides"] for point in points[2:4]] == [
        ["optim.lr=1e-4", "run.seed=3"],
        ["optim.lr=3e-4", "run.seed=1"],
    ]
    assert [point["dir"] for point in points] == [f"{index:03d}" for index in range(6)]
    assert "sweep over other values" in refused(capsys, *arguments, "--sweep", "run.seed=1..6")
    assert "--sweep again" in refused(capsys, *arguments)
    assert f"{job}_5" in refused(capsys, *arguments, *sweep)
    for point in points:
        index, folder = point["index"], run_dir / point["dir"]
        slurm.wait(f"{job}_{index}", "COMPLETED")
        assert seen(folder)["arguments"][-1] == str(folder)
        assert len(list((folder / "logs").glob("slurm-*.out"))) == 1
        record = json.loads((folder / "job.json").read_text())
        assert record["job_ids"] == [f"{job}_{index}"] and record["array"] == {"index": index}
        assert record["overrides"][-2:] == point["overrides"]
        assert f"seed = {index % 3 + 1}\n" in (folder / "submitted.toml").read_text()
    assert len({seen(run_dir / point["dir"])["environment"]["SLURM_JOB_ID"] for point in points}) == 6


@pytest.mark.slow
def test_runs_of_a_sweep_are_queued_again_one_by_one(slurm, site, tiny_shards, tmp_path, capsys):
    """One of them has the number of the whole array as its own."""
    python = tmp_path / "python"
    again = (
        "from launch.slurm import allocation\nif 'SLURM_RESTART_COUNT' not in os.environ:\n    allocation.requeue()\n"
    )
    python.write_text(STAND_IN.replace("print(", f"if (folder / 'again').exists():\n{indent(again, '    ')}print("))
    run_dir = tmp_path / "sweep"
    for index in range(2):
        (run_dir / f"{index:03d}").mkdir(parents=True)
        (run_dir / f"{index:03d}" / "wait").touch()
    (run_dir / "001" / "again").touch()
    [job] = submit(capsys, *small_overrides(run_dir, tiny_shards), "--cluster", str(site), "--sweep", "run.seed=1..2")
    wait_until(lambda: slurm.job(f"{job}_1").get("Restarts") == "1", 30, lambda: slurm.report(f"{job}_1"))
    slurm.wait(f"{job}_1", "RUNNING")
    assert slurm.job(f"{job}_1")["JobId"] == str(job)
    assert (slurm.job(f"{job}_0")["Restarts"], slurm.job(f"{job}_0")["JobState"]) == ("0", "RUNNING")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--partition", "debg"], ["partition 'debg' is unknown (did you mean debug?)", "small"]),
        (["--nodes", "4"], ["4 nodes", "partition debug has 3 nodes"]),
        (["--nodes", "3", "--spares", "1"], ["4 nodes", "--spares"]),
        (["--nodes", "2", "--partition", "small"], ["partition small has 1 node;"]),
        (["--gpus-per-node", "4"], ["--gpus-per-node 4", "at most 2 GPUs"]),
        (["--nodes", "2", "--ranks-per-node", "4", "--cpus-per-rank", "4"], ["0 nodes with 16 CPUs"]),
        (["--constraint", "h100"], ["0 nodes with --constraint h100"]),
        (["--partition", "small", "--time", "10"], ["--time 0-00:10:00", "at most 0-00:05:00", "--chain"]),
        (["--time", "2", "--grace", "120"], ["--grace 120", "120 seconds"]),
        (["--account", "a b"], ["account", "'a b' is no name"]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_what_the_cluster_does_not_have_is_refused(slurm, options, words, tiny_shards, tmp_path, capsys):
    run_dir = tmp_path / "run"
    batch = "train.global_batch=96"  # that all these numbers of processes can share
    error = refused(capsys, *small_overrides(run_dir, tiny_shards), batch, *options)
    for word in words:
        assert word in error
    assert not run_dir.exists()


def test_nodes_must_share_the_folder(slurm, tiny_shards, tmp_path, capsys, monkeypatch):
    """The nodes of `away` are other machines; what is in the memory of this one they cannot see."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        pytest.skip("no file system in memory here")
    away = [*small_overrides(memory / "pretrain-no-run", tiny_shards), "--partition", "away", "--nodes", "2"]
    error = refused(capsys, *away)
    assert "/dev/shm/pretrain-no-run is on a tmpfs of this machine" in error
    assert cli.main(["submit", "tiny", *away, f"run.dir={tmp_path}", "--dry-run"]) == 0
    assert "0 can be used now" in capsys.readouterr().err
    assert not (memory / "pretrain-no-run").exists()


def test_a_node_that_does_not_see_the_folder_says_so(slurm: Cluster, site, tiny_shards, tmp_path, capsys):
    hidden = tmp_path / "disk"
    (hidden / "run" / "logs").mkdir(parents=True)
    overrides = small_overrides(hidden / "run", tiny_shards)
    assert cli.main(["submit", "tiny", *overrides, "--cluster", str(site), "--dry-run"]) == 0
    script = tmp_path / "job.sh"
    lines = capsys.readouterr().out.partition("\n{")[0].splitlines()
    script.write_text("\n".join(line for line in lines if not line.startswith("#SBATCH --output")))
    slurm.kill_node("n3")
    try:
        slurm.start_node("n3", hidden=hidden)
        slurm.wait_idle()
        job = slurm.submit("--nodelist=n3", str(script))
        assert slurm.wait(job) == "FAILED"
        assert f"does not see {shlex.quote(str(hidden / 'run'))}" in slurm.output(job)
    finally:
        slurm.kill_node("n3")
