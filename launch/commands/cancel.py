"""pretrain cancel"""

import argparse
import os
import signal
from pathlib import Path

from launch.holder import find_holder
from launch.rundir import append_end
from launch.slurm.jobs import Job, find_jobs
from launch.slurm.queue import call
from launch.starts import read_story
from launch.status import is_run, job_ids, points


def cancel(args: argparse.Namespace) -> None:
    """Ask a run, or all of a sweep, to save and leave. Raises ValueError where nothing of it is alive."""
    run_dir = Path(args.run)
    if not is_run(run_dir):
        raise FileNotFoundError(f"{run_dir} is no run: give the folder of a run or of a sweep, such as runs/demo")
    ids = job_ids(run_dir)
    jobs, problem = find_jobs(ids)
    if ids and problem:
        raise ValueError(f"{run_dir} has jobs {', '.join(ids)}, and SLURM could not be asked: {problem}")
    alive = [job for job in jobs if job.alive and job.of(ids)]
    folders = [run_dir, *(folder for folder, _ in points(run_dir))]
    if alive:
        _cancel_jobs(alive, args.now)
    for job in alive:
        if job.state == "PENDING":
            for folder in folders:
                _record(folder, job)
    here = [_cancel_here(folder, args.now) for folder in folders]
    if not alive and not any(here):
        raise ValueError(f"{run_dir}: nothing of it is running or queued; see pretrain status {run_dir}")


def _cancel_jobs(alive: list[Job], now: bool) -> None:
    waiting = [job.job for job in alive if now or job.state == "PENDING"]
    training = [job.job for job in alive if job.job not in waiting]
    if waiting:  # first: they may be what would start once the others have ended
        call("scancel", *waiting)
        print(f"cancelled job {', '.join(waiting)}")
    if training:
        # The batch shell has become the supervisor, which passes it on and gives the ranks the job's grace period;
        # scancel without a signal kills all after the cluster's KillWait, often 30 s.
        call("scancel", "--batch", "--signal=TERM", *training)
        print(f"asked job {', '.join(training)} to save and leave; to end it at once: pretrain cancel --now")


def _record(run_dir: Path, job: Job) -> None:
    """That a job which waited will not start: SLURM forgets those of an array at once."""
    if job.job not in job_ids(run_dir):
        return
    own = [start.restart + 1 for start in read_story(run_dir) if start.job == job.number]
    detail = "cancelled while it waited"
    append_end(run_dir, "preempted or cancelled", detail=detail, job=job.job, restart=max(own, default=0))


def _cancel_here(run_dir: Path, now: bool) -> bool:
    """Whether a process of this host trains there, which has been asked then."""
    holder = find_holder(run_dir)
    if holder is None or holder.alive is False:
        return False
    if holder.alive is None:
        if job_ids(run_dir):
            return False  # of a job, which SLURM knows about
        raise ValueError(f"{run_dir} is or was trained by process {holder.pid} of {holder.host}: cancel it there")
    process = holder.launcher()
    # The launcher sends on what it gets: killed itself, it would leave that to the ranks.
    try:
        os.kill(process, signal.SIGTERM)
        if now:
            os.kill(holder.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise ValueError(f"{run_dir} is trained by process {process} of another user; ask them") from None
    print(f"asked process {process} to {'end' if now else 'save and leave'}")
    return True
