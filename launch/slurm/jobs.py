"""What SLURM knows of jobs that were submitted: where they are, and how they ended."""

import os
import subprocess
from collections.abc import Container, Iterable
from dataclasses import dataclass

SECONDS = 20  # that squeue may take: whoever looks at a run does not want to wait for a busy controller
# The reason stands last: it is the only one that may hold the separator.
COLUMNS = "%i|%A|%F|%T|%D|%N|%S|%l|%r"
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "SIGNALING", "RESIZING")


@dataclass(frozen=True)
class Job:
    """One job, or one of an array.

    job: its id, "12_3" for one of an array (which SLURM_JOB_ID calls by a number of its own, `number`); array: the id
    of the whole array. nodes: as SLURM writes them, "" before it starts. started: seconds since 1970, None before.
    limit: the time limit as SLURM writes it. reason: why it waits or failed, "" for none.
    """

    job: str
    number: str
    array: str
    state: str
    num_nodes: str
    nodes: str
    started: float | None
    limit: str
    reason: str

    @property
    def alive(self) -> bool:
        return self.state in ALIVE or self.state.startswith("REQUEUE")

    def of(self, submitted: Container[str], started: Container[str] = ()) -> bool:
        """Whether it is one of those that were submitted, or, by what SLURM_JOB_ID was, of those that started. Of an
        array the last one that starts keeps the array's number, and those that wait have it too: that tells nothing.
        """
        return self.job in submitted or self.array in submitted or (self.number in started and "_" not in self.job)


def find_jobs(job_ids: Iterable[str]) -> tuple[list[Job], str | None]:
    """(the jobs of these ids, of an array all of it; why SLURM could not be asked). SLURM forgets jobs that ended some
    minutes ago: those are left out.
    """
    numbers = sorted({job for job in job_ids if job.partition("_")[0].isdecimal()})
    if not numbers:
        return [], None
    command = ["squeue", "-h", "-r", "-t", "all", "-o", COLUMNS, "-j", ",".join(numbers)]
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env=environment,
        )
    except FileNotFoundError:
        return [], "squeue is not here"
    except subprocess.TimeoutExpired:
        return [], f"squeue gave no answer in {SECONDS} s"
    if done.returncode and "Invalid job id" not in done.stderr:  # so it calls a single one that it has forgotten
        return [], done.stderr.strip().splitlines()[-1].removeprefix(
            "squeue: "
        ) if done.stderr.strip() else "squeue failed"
    return [_job(line) for line in done.stdout.splitlines() if line.count("|") >= COLUMNS.count("|")], None


def _job(line: str) -> Job:
    job, number, array, state, num_nodes, nodes, started, limit, reason = line.split("|", COLUMNS.count("|"))
    return Job(
        job,
        number,
        array,
        state,
        num_nodes,
        nodes,
        float(started) if started.isdecimal() else None,
        limit,
        "" if reason == "None" else reason,
    )
