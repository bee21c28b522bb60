"""What the supervisor of a job decides, with a stand-in for srun that plays what the ranks of each start do."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import allocation, guard, job
from launch.slurm.job import Supervisor
from launch.slurm.recipe import fewer_nodes
from parallel.mesh import ParallelConfig
from parallel.pipeline_cut import check_microbatches, schedule_names
from pretrain.history import append_line, read_ends, read_lines

# Plays the first file that is left in the folder of plays: a health check's or a start's.
SRUN = f"""#!{sys.executable} -IS
import json, pathlib, sys, time
if "launch.slurm.guard" in sys.argv:
    sys.exit()
output = next(word for word in sys.argv if word.startswith("--output="))
kind = "health" if "launch.health" in sys.argv else "start"
folder = pathlib.Path(output.removeprefix("--output=")).parent
run = folder.parent.parent if kind == "start" else folder.parent
plays = sorted((run / "plays").glob(f"{{kind}}-*.json"))
play = json.loads(plays[0].read_text())
plays[0].unlink()
if kind == "health":
    time.sleep(play.get("sleep", 0))
    if "findings" in play:
        (run / "health.json").write_text(json.dumps({{"findings": play["findings"]}}))
else:
    if "saves" in play:
        saved = run / "checkpoints" / f"step-{{play['saves']:08d}}"
        saved.mkdir(parents=True)
        (saved / "manifest.json").touch()
    if "error" in play:
        (folder / "rank-00000.log").write_text(f"pretrain: error: {{play['error']}}\\n")
    if play.get("code"):
        failure = {{"rank": 0, "world": 2, "code": play["code"], "host": "n1", "time": 1.0}}
        (folder / "failed-00000.json").write_text(json.dumps(failure))
sys.exit(abs(play.get("code", 0)))
"""
LOST = {"code": -9}
LOCKED = {"code": 2, "error": f"/run: {job.LOCKED}; stop it, or choose another run.dir"}
MISTAKE = {"code": 2, "error": "train.loss = nan; lower optim.lr"}
FINISHED = {"saves": 100}
SICK = {"kind": "slow", "host": "n1", "text": "rank 0 on n1 is slow", "sick": True}


@pytest.fixture(autouse=True)
def node(tmp_path, monkeypatch):
    """Batch host of job 7, which has the nodes n1 and n2; nothing takes its time."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    program("srun", SRUN, tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setattr(allocation, "allocated", lambda: ["n1", "n2"])
    monkeypatch.setattr(allocation, "answering", list)
    monkeypatch.setattr(allocation, "address", str)
    monkeypatch.setattr(allocation, "end_steps", lambda: None)
    for name in ("LOOK_SECONDS", "LOCK_SECONDS", "REQUEUE_SECONDS", "REQUEUE_PAUSE"):
        monkeypatch.setattr(job, name, 0.01)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def queued(monkeypatch) -> list[list[str]]:
    """The nodes that each requeue excludes."""
    found: list[list[str]] = []
    monkeypatch.setattr(allocation, "requeue", lambda: found.append([]) or True)
    monkeypatch.setattr(allocation, "exclude", lambda nodes: found[-1].extend(nodes) or True)
    return found


def program(name: str, text: str, folder: Path) -> None:
    (folder / "bin" / name).write_text(text)
    (folder / "bin" / name).chmod(0o755)


def supervisor(folder: Path, *plays: dict[str, Any], checks: Sequence[dict[str, Any]] = (), **more: Any) -> Supervisor:
    run = folder / "run"
    (run / "plays").mkdir(parents=True)
    (run / "logs").mkdir()
    for kind, files in (("start", plays), ("health", checks)):
        for number, play in enumerate(files):
            (run / "plays" / f"{kind}-{number:02d}.json").write_text(json.dumps(play))
    record = {"nodes": 2, "ranks_per_node": 1, "spares": 0, "launcher": "srun", "max_requeues": 3, "grace_s": 20}
    record |= {"health": "off", "srun_options": [], "rank_python": ["python"]}
    (run / "job.json").write_text(json.dumps(record | more))
    write_recipe(run, "dp_shard = 2")
    return Supervisor(run)


def write_recipe(run: Path, parallel: str, global_batch: int = 16) -> None:
    train = f"[train]\nsteps = 100\nglobal_batch = {global_batch}\nmicro_batch = 1\n"
    (run / "submitted.toml").write_text(f"{train}[parallel]\n{parallel}\n")


def saved_before(run: Path, step: int) -> None:
    (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (run / f"checkpoints/step-{step:08d}/manifest.json").touch()


def test_a_stale_lock_is_waited_for(tmp_path):
    """A node is lost with a checkpoint saved; its lock outlives it by three starts."""
    one = supervisor(tmp_path, LOST | {"saves": 10}, LOCKED, LOCKED, LOCKED, LOST, FINISHED)
    assert one.main() == 0
    assert [line["step"] for line in one._attempts()] == [0, 10, 10, 10, 10, 10]


def test_a_lock_that_stays_ends_the_job_and_says_who_holds_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "LOCK_LIMIT", 0.0)
    one = supervisor(tmp_path, LOCKED, LOCKED, FINISHED)
    (one.run_dir / ".lock").write_text('{"host": "n9", "pid": 12}')
    assert one.main() == 2
    assert "locked by process 12 on n9" in capsys.readouterr().out.splitlines()[-1]


def test_starts_of_other_jobs_do_not_count(tmp_path):
    one = supervisor(tmp_path, LOST, FINISHED)
    saved_before(one.run_dir, 10)
    for restart in range(2):
        append_line(one.run_dir / "attempts.jsonl", {"job": "6", "restart": restart, "step": 10})
    assert one.main() == 0


def test_two_fruitless_starts_are_the_end(tmp_path):
    one = supervisor(tmp_path, LOST, LOCKED, LOST, FINISHED)
    assert one.main() == 1
    assert len(one._attempts()) == 3


def test_a_mistake_is_the_end_unless_fewer_nodes_made_it(tmp_path, queued, monkeypatch):
    assert supervisor(tmp_path / "a", MISTAKE).main() == 2
    assert not queued
    monkeypatch.setattr(allocation, "allocated", lambda: ["n1"])
    one = supervisor(tmp_path / "b", MISTAKE)
    write_recipe(one.run_dir, "dp_shard = -1")
    one.main()
    assert queued == [[]]


def test_code_2_of_a_rank_that_lost_another_is_no_mistake(tmp_path):
    lost = {"code": 2, "error": "Connection closed by peer [127.0.0.1]:4321", "saves": 10}
    one = supervisor(tmp_path, lost, FINISHED)
    assert one.main() == 0
    assert [end["reason"] for end in read_ends(one.run_dir)] == ["rank lost"]


def test_a_requeue_is_asked_for_again(tmp_path, monkeypatch, capfd):
    """SLURM gives no answer, refuses, then takes the job."""
    monkeypatch.setattr(allocation, "SECONDS", 0.4)
    counter = tmp_path / "tries"
    text = f"#!/bin/sh\necho $* >> '{counter}'\ncase $(wc -l < '{counter}') in 1) exec sleep 5;; 2) exit 1;; esac\n"
    program("scontrol", text, tmp_path)
    one = supervisor(tmp_path)
    assert one._requeue("time limit") == 0
    assert counter.read_text() == "requeue 7\n" * 3
    one.job["grace_s"] = 0
    program("scontrol", "#!/bin/sh\nexit 1\n", tmp_path)
    assert one._requeue("time limit") == 1
    assert "submit it again, to go on from step 0" in capfd.readouterr().out


def test_nodes_are_excluded_beside_those_that_are_already(tmp_path):
    asked = tmp_path / "asked"
    text = f"#!/bin/sh\necho $* >> '{asked}'\necho 'JobId=7 ExcNodeList=n[4-5] JobState=PENDING'\n"
    program("scontrol", text, tmp_path)
    assert allocation.exclude(["n1", "n2"])
    assert asked.read_text().splitlines()[-1] == "update JobId=7 ExcNodeList=n[4-5],n1,n2"


@pytest.mark.parametrize(("policy", "excluded"), [("warn", None), ("exclude", ["n1"]), ("fail", ["n1"])])
def test_a_sick_node(tmp_path, queued, capsys, policy, excluded):
    check = {"findings": [SICK], "code": int(policy == "fail")}
    one = supervisor(tmp_path, FINISHED, checks=(check,), health=policy)
    one.main()
    assert queued == ([] if excluded is None else [excluded])
    said = capsys.readouterr().out
    assert "health: rank 0 on n1 is slow" in said and "check failed" not in said
    assert [line["nodes"] for line in read_lines(one.run_dir / "attempts.jsonl")] == (
        [["n1", "n2"]] if excluded is None else []
    )


@pytest.mark.parametrize("policy", ["warn", "exclude"])
@pytest.mark.parametrize(
    ("check", "words"),
    [
        ({"code": 1}, "exit code 1, no health.json"),
        ({}, "exit code 0, no health.json"),
        ({"sleep": 9}, "no end within 0 s, no health.json"),
        ({"findings": [], "code": 3}, "exit code 3; log: "),
    ],
)
def test_a_check_that_fails_is_told_and_the_run_starts(tmp_path, capsys, monkeypatch, policy, check, words):
    if "sleep" in check:
        monkeypatch.setattr(job, "HEALTH_SECONDS", 0.2)
    one = supervisor(tmp_path, FINISHED, checks=(check,), health=policy)
    assert one.main() == 0
    assert f"health: the check failed: {words}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "names", "lost"),
    [
        ({"JobState": "RUNNING", "NodeList": "n[2-3]"}, "n2\nn3", True),
        ({"JobState": "RUNNING", "NodeList": "n[1-2]"}, "n1\nn2", False),
        ({"JobState": "COMPLETING", "NodeList": "n2"}, "n2", False),  # n1 has ended its part
        ({"JobState": "RUNNING", "NodeList": "n2"}, "", False),  # no answer
        ({}, "", False),
    ],
)
def test_a_job_goes_on_without_its_supervisors_node(monkeypatch, state, names, lost):
    monkeypatch.setattr(allocation, "state", lambda: state)
    monkeypatch.setattr(allocation, "call", lambda *_: names)
    assert guard.lost("n1") == lost


def test_fewer_nodes_hold_the_experts(tmp_path):
    write_recipe(tmp_path, "dp_shard = -1\nep = 4")
    assert [fewer_nodes(tmp_path, nodes, ranks_per_node=2) for nodes in (7, 3, 1)] == [4, 2, 0]
    write_recipe(tmp_path, "dp_shard = -1\nep = 4\ncp = 2")
    assert [fewer_nodes(tmp_path, nodes, ranks_per_node=2) for nodes in (3, 1)] == [2, 0]
    write_recipe(tmp_path, "dp_shard = 2\ntp = -1")  # tp is no number of replicas
    assert fewer_nodes(tmp_path, 3, ranks_per_node=2) == 0


@pytest.mark.parametrize("schedule", schedule_names())
def test_fewer_nodes_are_enough_for_the_schedule(schedule, tmp_path):
    """As torch's own schedules say."""
    single = schedule in ("1f1b", "gpipe")
    for pp in (1, 2, 3):
        for microbatches in range(1, 11):
            options = ParallelConfig(pp=pp, schedule=schedule)
            try:
                check_microbatches(options, pp, pp if single else 2 * pp, microbatches, 1, 1)
                fits = 1
            except ValueError:
                fits = 0
            write_recipe(tmp_path, f'pp = {pp}\ndp_shard = -1\nschedule = "{schedule}"', microbatches)
            assert fewer_nodes(tmp_path, 1, ranks_per_node=pp) == fits, (pp, microbatches)
