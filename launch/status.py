"""How runs stand: from their folders and, where there is one, from SLURM's queue. Imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.holder import find_holder
from launch.readings import (
    Pace,
    age,
    find_slowest,
    last_checkpoint,
    last_metrics,
    last_stragglers,
    read_heartbeats,
    read_target,
    silence,
)
from launch.rundir import first_error, last_written, log_folders, lost_contact, read_json
from launch.slurm.jobs import Job, find_jobs
from launch.starts import DONE, STOPPED, Start, read_story

SIGNS = ("job.json", "starts.jsonl", "config.toml", "metrics.jsonl", "sweep.json")  # each makes a folder a run's
FRESH_SECONDS = 90.0  # a heartbeat of another host that is older than this, file systems included, has stopped
GOING = ("running", "starting", "restarting", "ending", "queued")


@dataclass(frozen=True)
class RunStatus:
    """What is not known is None.

    state: one of GOING, or finished, stopped (it was asked to), failed, lost (killed hard), new. why: in words.
    target: the step that it trains to. checkpoint: step of the last one, saved at checkpoint_time. seconds since 1970.
    eta: seconds. silent: seconds since the rank that moved last longest ago did. stragglers: as of the last log window
    in which there were any, no longer ago than the last ten.
    """

    run: str
    state: str
    why: str
    step: int | None
    target: int | None
    loss: float | None
    eval_loss: float | None
    tokens_per_s: float | None
    eta: float | None
    checkpoint: int | None
    checkpoint_time: float | None
    jobs: tuple[Job, ...]
    starts: tuple[Start, ...]
    phase: str | None = None
    silent: float | None = None
    silent_rank: int | None = None
    slowest: Pace | None = None
    stragglers: tuple[Pace, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def going(self) -> bool:
        return self.state in GOING

    @property
    def restarts(self) -> int:
        trained = [start for start in self.starts if start.step is not None]
        return max(0, len(trained) - 1)


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SIGNS)


def find_runs(folder: Path) -> list[Path]:
    """The runs and sweeps below a folder, by name; not those in a run's folder."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            found += [path] if is_run(path) else find_runs(path)
    return found


def points(run_dir: Path) -> list[tuple[Path, list[str]]]:
    """Folder and overrides of each run of a sweep; [] for a run that is none."""
    record = read_json(run_dir / "sweep.json")
    rows = record.get("points", []) if isinstance(record, dict) else []
    return [(run_dir / str(row["dir"]), [str(word) for word in row["overrides"]]) for row in rows]


def job_ids(run_dir: Path) -> list[str]:
    """The SLURM jobs of a run, as they were submitted; "12_3" for one of an array."""
    record = read_json(run_dir / "job.json")
    return [str(job) for job in record.get("job_ids", [])] if isinstance(record, dict) else []


def read_all(run_dirs: Iterable[Path]) -> list[RunStatus]:
    """The status of each run, with one question to SLURM for all of them."""
    stories = {run_dir: read_story(run_dir) for run_dir in run_dirs}
    submitted = {run_dir: {*job_ids(run_dir)} for run_dir in stories}
    started = {run_dir: {start.job for start in stories[run_dir] if start.job} for run_dir in stories}
    jobs, problem = find_jobs(job for ids in (*submitted.values(), *started.values()) for job in ids)
    found = []
    for run_dir, story in stories.items():
        mine = [job for job in jobs if job.of(submitted[run_dir], started[run_dir])]
        asked = problem if submitted[run_dir] or started[run_dir] else None
        found.append(read_status(run_dir, story, mine, asked))
    return found


def read_status(run_dir: Path, story: Sequence[Start], jobs: Sequence[Job], problem: str | None = None) -> RunStatus:
    """The status of one run. jobs: those of it that SLURM knows; problem: why it could not be asked."""
    metrics = last_metrics(run_dir / "metrics.jsonl")
    target = read_target(run_dir)
    checkpoint, saved = last_checkpoint(run_dir / "checkpoints")
    beats = read_heartbeats(run_dir, story)
    state, why = _state(run_dir, story, jobs, beats)
    step = max((value for value in (metrics.get("step"), checkpoint) if value is not None), default=None)
    whole = target is not None and checkpoint is not None and checkpoint >= target
    if state in ("lost", "stopped") and whole and story and story[-1].reason in (None, "finished"):
        state, why = "finished", ""
    moving = state == "running"
    eta = metrics.get("seconds")
    quiet = max(((silence(beat), rank) for rank, beat in beats.items()), default=None) if moving else None
    return RunStatus(
        run=str(run_dir),
        state=state,
        why=why,
        step=step,
        target=target,
        loss=metrics.get("loss"),
        eval_loss=metrics.get("eval_loss"),
        tokens_per_s=metrics.get("tokens_per_s"),
        eta=max(0, target - step) * eta if moving and eta and target is not None and step is not None else None,
        checkpoint=checkpoint,
        checkpoint_time=saved,
        jobs=tuple(jobs),
        starts=tuple(story),
        phase=str(beats[min(beats)].get("phase")) if beats and moving else None,
        silent=quiet[0] if quiet else None,
        silent_rank=quiet[1] if quiet else None,
        slowest=find_slowest(beats) if moving else None,
        stragglers=last_stragglers(run_dir, step) if moving else (),
        notes=(
            *((f"SLURM could not be asked: {problem}",) if problem else ()),
            *(_findings(run_dir) if moving else ()),
        ),
    )


def _state(
    run_dir: Path, story: Sequence[Start], jobs: Sequence[Job], beats: dict[int, dict[str, Any]]
) -> tuple[str, str]:
    alive = [job for job in jobs if job.alive]
    if alive:
        job = min(alive, key=lambda job: job.state == "PENDING")
        return _queued(job, story) if job.state == "PENDING" else _in_job(job, story)
    last = story[-1] if story else None
    holder = find_holder(run_dir)
    if holder is not None and holder.alive is not False:
        # A SLURM job that is over has no process: only the lock of a start without one tells of life.
        fresh = holder.alive or min((age(beat) for beat in beats.values()), default=FRESH_SECONDS) < FRESH_SECONDS
        if fresh and not (jobs and last is not None and last.job):
            where = f"process {holder.pid} on {holder.host}"
            if last is None or (last.time or 0.0) < holder.since - 1:
                return "starting", where
            return ("running" if last.reason is None else "ending"), where
    ended = max(jobs, key=lambda job: job.started or 0.0, default=None)
    return _over(run_dir, last, ended)


def _queued(job: Job, story: Sequence[Start]) -> tuple[str, str]:
    before = f"after {_words(story[-1])}; " if story and story[-1].reason not in (None, *DONE) else ""
    lost = "after a start that was killed hard; " if story and story[-1].reason is None else ""
    return "queued", f"{before or lost}waits: {job.reason or 'for its turn'}"


def _in_job(job: Job, story: Sequence[Start]) -> tuple[str, str]:
    where = f"job {job.job} on {job.nodes}"
    last = story[-1] if story and story[-1].job in (job.number, job.job) else None
    if last is None or (last.time or 0.0) < (job.started or 0.0) - 2:
        return ("ending" if job.state == "COMPLETING" else "starting"), where
    if job.state == "COMPLETING" or last.reason in STOPPED:
        return "ending", where
    return ("running", where) if last.reason is None else ("restarting", f"{_words(last)}; {where}")


def _over(run_dir: Path, last: Start | None, job: Job | None) -> tuple[str, str]:
    """Nothing of it is alive."""
    how = f"job {job.job}: {job.state}" if job is not None and job.state != "COMPLETED" else ""
    if last is None:
        if job is not None or job_ids(run_dir):
            state = "lost" if job is None else "stopped" if job.state == "CANCELLED" else "failed"
            return state, how or "its job left no start of training"
        return "new", "not started yet"
    said = last_error(run_dir, last)
    if last.reason == "error" and lost_contact(str(last.detail)) and said:
        return "failed", said
    if last.reason is not None:
        state = "finished" if last.reason == "finished" else "stopped" if last.reason in STOPPED else "failed"
        return state, "" if state == "finished" else _words(last)
    if last.time is None:
        return "stopped", "how it ended is not recorded"
    return "lost", "; ".join(word for word in ("killed hard: no end is recorded", how, said) if word)


def _findings(run_dir: Path) -> list[str]:
    """What the health check before the last start found."""
    health = read_json(run_dir / "health.json")
    found = health.get("findings", []) if isinstance(health, dict) else []
    return [f"health of {each.get('host') or 'the job'}: {each.get('text')}" for each in found]


def last_error(run_dir: Path, last: Start | None) -> str:
    """What the first rank that failed in the last start died of, from the logs, in one line; empty where they do not
    tell.
    """
    folders = log_folders(run_dir)
    if not folders or (last is not None and last.time and last_written(folders[-1]) < last.time):
        return ""
    killed = [record for path in folders[-1].glob("failed-*.json") if (record := read_json(path))]
    killed = [record for record in killed if record["code"] < 0]
    if killed:
        return f"rank {killed[0]['rank']} on {killed[0]['host']} died (signal {-killed[0]['code']})"
    found = first_error(folders[-1])
    return "" if found is None else f"rank {found.rank}: {found.line}"


def _words(start: Start) -> str:
    """Why a start ended."""
    by = f"rank {start.rank}: " if start.rank is not None and start.reason not in STOPPED else ""
    return f"{start.reason} ({by}{start.detail})" if start.detail else str(start.reason)
