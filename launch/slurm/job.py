"""The supervisor of a job: it starts the ranks on the job's nodes, and when they end early it starts them anew.

    python -P -m launch.slurm.job RUN_DIR          (the batch script's last command)

time limit near (SIGUSR1)       ranks save and leave, the job goes back into the queue
preempted, cancelled (SIGTERM)  ranks save and leave; back into the queue only when it was preempted
a rank, an agent, a node dies   start anew from the last checkpoint, on the nodes that are left where there are enough
                                (spares first, then fewer replicas), else back into the queue
this node dies                  back into the queue, by `launch.slurm.guard` on another
the run's folder is locked      try again for some minutes: a lost node's lock outlives it
refused on fewer nodes          back into the queue
a user's mistake (code 2)       end
no checkpoint in two starts     end

Each start is a line of attempts.jsonl. Imports no torch.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

from launch.ranks import Failure, Tail, node_name
from launch.rundir import first_error, log_folder, lost_contact, rank_log, read_json
from launch.slurm import allocation, guard
from launch.slurm.recipe import fewer_nodes, goal
from pretrain.history import append_end, append_line, now, read_ends, read_lines, this_start

LOOK_SECONDS = 0.2
GUARDS = 2  # nodes that look after the supervisor's
LINGER_SECONDS = 30.0  # for a step to end once one of its ranks has failed
END_SECONDS = 10.0  # for a step to end once SLURM was told to end it
LOCK_SECONDS = 15.0  # between two looks whether the ranks of a start before are gone
LOCK_LIMIT = 300.0  # for a file server to see that the node of a lock is gone: leases last 90 s and more
LOCKED = "another process is training there"  # of `pretrain.lock`
HEALTH_SECONDS = 60.0  # twice what the check allows itself
REQUEUE_SECONDS = 60.0  # for SLURM to end this process once it took the job back
REQUEUE_PAUSE = 5.0  # before it is asked again
RESERVE = 0.15  # share of the grace period in which the job is queued again, saved or not
MISTAKE, STALLED = 2, os.EX_TEMPFAIL  # exit codes of ranks
TIME_LIMIT, CANCELLED = "time limit", "preempted or cancelled"


class Supervisor:
    """Of one job, from its start or requeue on."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.job: dict[str, Any] = read_json(run_dir / "job.json")
        self.id = os.environ["SLURM_JOB_ID"]
        self.requeues = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.asked: str | None = None  # to end, and why
        self.since = 0.0
        self.sick: set[str] = set()  # left out of the next start
        self.unfit: set[str] = set()  # of these, what the health check names
        self.locked_since: float | None = None
        self.folder = run_dir / "logs"
        self.guards: dict[str, subprocess.Popen[bytes]] = {}

    def main(self) -> int:
        """Returns the exit code of the job: 0 finished or stopped as asked, 2 a user's mistake, 1 anything else."""
        for number, why in ((signal.SIGUSR1, TIME_LIMIT), (signal.SIGTERM, CANCELLED), (signal.SIGINT, CANCELLED)):
            signal.signal(number, self._asker(why))
        self._close_lost_start()
        failed = False
        while True:
            nodes = self._choose(failed)
            if self.asked:
                return self._leave()
            if nodes is None:
                why = f"too few nodes are left without {', '.join(sorted(self.sick))}"
                append_end(self.run_dir, "unhealthy", detail=why, step=self._newest())
                return self._requeue(why, self.unfit)
            code = self._train(nodes)
            if self._finished():
                return 0
            if self.asked or code == 0:
                return self._leave()
            failure = self._failure()
            reason = self._record(failure, nodes)
            if self._locked(self.folder):
                if not self._wait_for_lock():
                    return MISTAKE
            else:
                self.locked_since = None
                if failure is not None and failure.code == MISTAKE and reason == "error":
                    if len(nodes) == self.job["nodes"]:
                        return MISTAKE
                    return self._requeue(f"refused on {len(nodes)} of {self.job['nodes']} nodes")
                if self._fruitless():
                    self.say("no new checkpoint in two starts in a row: not started again")
                    return 1
            failed = True

    def say(self, text: str) -> None:
        print(f"pretrain: {text}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "supervisor.log").open("a") as log:
            log.write(f"{now()} {text}\n")

    # ---- which nodes ----

    def _choose(self, failed: bool) -> list[str] | None:
        """Nodes for the next start; None: too few are left."""
        nodes, wanted = allocation.allocated(), self.job["nodes"]
        well = allocation.answering(nodes) if failed or self.job["spares"] else nodes
        unfit = self._unfit(well) if well and not self.asked else set()
        well = [node for node in well if node not in unfit]
        self.sick = set(nodes) - set(well)
        if self.sick:
            self.say(f"left out: {', '.join(sorted(self.sick))}")
        if len(well) >= wanted:
            return well[:wanted]
        fewer = fewer_nodes(self.run_dir, len(well), self.job["ranks_per_node"])
        if fewer:
            self.say(f"{fewer} of {wanted} nodes: fewer replicas, the same global batch")
        return well[:fewer] or None

    def _unfit(self, nodes: list[str]) -> set[str]:
        """Nodes that the health check wants left out."""
        policy = self.job.get("health", "off")
        if policy == "off":
            return set()
        health = self.run_dir / "health.json"
        health.unlink(missing_ok=True)
        log = self.run_dir / "logs" / f"health-{self.id}.log"
        command = self._srun(nodes, self.job["ranks_per_node"], log)
        command += ["-P", "-m", "launch.health", str(self.run_dir), "--policy", policy]
        step = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=self._meeting_point(nodes, self.requeues))
        try:
            code = step.wait(HEALTH_SECONDS)
            how = f"exit code {code}"
        except subprocess.TimeoutExpired:
            how = f"no end within {HEALTH_SECONDS:.0f} s"
            allocation.end_steps()
            step.kill()
            code = step.wait()
        found = read_json(health)
        if found is None or (code and policy != "fail"):
            self.say(f"health: the check failed: {how}{'' if found else ', no health.json'}; log: {log}")
        findings = found["findings"] if found else []
        for each in findings:
            self.say(f"health: {each['text']}")
        if policy == "warn":
            return set()
        self.unfit = {each["host"] for each in findings if each["sick"] and each["host"]}
        return set(nodes) if code and policy == "fail" else self.unfit

    # ---- one start ----

    def _train(self, nodes: list[str]) -> int:
        """One step over these nodes to its end; returns srun's exit code."""
        restart = max([self.requeues, *(line["restart"] + 1 for line in self._attempts())])
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restart - self.requeues)
        self.folder = self._logs(restart)
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"time": now(), "job": self.id, "restart": restart, "step": self._newest(), "nodes": nodes}
        append_line(self.run_dir / "attempts.jsonl", line)
        self.say(f"start {restart} from step {line['step']} on {', '.join(nodes)}")
        self._guard(nodes)
        per_node = self.job["ranks_per_node"] if self.job["launcher"] == "srun" else 1
        command = self._srun(nodes, per_node, self.folder / "agent-%N.log")
        command += ["-P", "-m", "launch.agent", str(self.run_dir)]
        environment = self._meeting_point(nodes, restart)
        with (self.folder / "srun.log").open("ab") as log:
            step = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, env=environment)
            tail = Tail(rank_log(self.folder, 0))
            try:
                return self._watch(step)
            finally:
                tail.close()

    def _guard(self, nodes: Sequence[str]) -> None:
        """Have other nodes look whether this one is lost."""
        own = node_name()
        for node in [node for node in nodes if node != own][:GUARDS]:
            if node not in self.guards or self.guards[node].poll() is not None:
                self.guards[node] = guard.start(node, own, self.run_dir / "logs")

    def _meeting_point(self, nodes: Sequence[str], restart: int) -> dict[str, str]:
        # Below the range of ports that the system gives away; another one for each start, and for the job of another
        # cluster with the same number.
        port = 20000 + 2 * ((int(self.id) * 13 + os.getpid() * 101 + restart) % 6000)
        return {**os.environ, "MASTER_ADDR": allocation.address(nodes[0]), "MASTER_PORT": str(port)}

    def _srun(self, nodes: Sequence[str], per_node: int, log: Path) -> list[str]:
        """The command that runs Python on these nodes, without Python's arguments."""
        output = str(log.parent).replace("%", "%%") + f"/{log.name}"
        # Of a task of the job; this step may have more or fewer of them on a node.
        cpus = int(os.environ.get("SLURM_CPUS_PER_TASK") or 0)
        if self.job["launcher"] == "agent":
            cpus //= per_node
        return [
            "srun",
            f"--nodes={len(nodes)}",
            f"--ntasks={len(nodes) * per_node}",
            f"--ntasks-per-node={per_node}",
            f"--nodelist={','.join(nodes)}",
            *([f"--cpus-per-task={cpus}"] if cpus else []),
            *("--overlap", "--kill-on-bad-exit=1", "--mpi=none", "--open-mode=append"),
            f"--output={output}",
            f"--error={output}",
            *self.job["srun_options"],
            *self.job["rank_python"],
        ]

    def _watch(self, step: subprocess.Popen[bytes]) -> int:
        passed, failed_at = False, None
        while step.poll() is None:
            if self.asked and not passed:
                passed = True
                self.say(f"{self.asked}: asking the ranks to save and leave")
                allocation.signal_ranks("TERM")
            if failed_at is None and self._failure() is not None:
                failed_at = time.monotonic()
            late = failed_at is not None and time.monotonic() - failed_at > LINGER_SECONDS
            if late or (self.asked == TIME_LIMIT and self._left() < 0):
                self.say("the step does not end: it is ended")
                allocation.end_steps()
                try:
                    step.wait(END_SECONDS if late else 1.0)
                except subprocess.TimeoutExpired:
                    step.kill()
            time.sleep(LOOK_SECONDS)
        return step.returncode

    def _asker(self, why: str) -> Any:
        def ask(_number: int, _frame: FrameType | None) -> None:
            if self.asked is None:
                self.asked, self.since = why, time.monotonic()

        return ask

    def _left(self) -> float:
        """Seconds of the grace period until the job has to be queued again."""
        return self.since + (1 - RESERVE) * float(self.job["grace_s"]) - time.monotonic()

    # ---- how it ended ----

    def _finished(self) -> bool:
        return self._newest() >= goal(self.run_dir)

    def _newest(self) -> int:
        """Step of the newest whole checkpoint, 0 without one."""
        found = (self.run_dir / "checkpoints").glob("step-*/manifest.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    def _failure(self) -> Failure | None:
        """The rank that failed first: one that a signal killed before those that lost it."""
        found = [Failure(**value) for path in self.folder.glob("failed-*.json") if (value := read_json(path))]
        return min(found, key=lambda failure: (failure.code > 0, failure.time), default=None)

    def _record(self, failure: Failure | None, nodes: list[str]) -> str:
        """Add how a start ended, where its ranks could not, and show any rank's first error; returns the reason."""
        said = first_error(self.folder)
        lost = sorted(set(nodes) - set(allocation.answering(nodes)))
        rank, host = (failure.rank, failure.host) if failure else (None, None)
        if lost:
            reason, detail, rank, host = "node lost", f"{', '.join(lost)} gone", None, lost[0]
        elif failure is None:
            reason, detail = "rank lost", self._last_words() or "srun failed"
        elif failure.code < 0:
            reason, detail = "rank lost", str(failure)
        elif said and lost_contact(said.line):  # what it lost could not tell: killed, with all that watched it
            reason, detail, rank, host = "rank lost", said.line, None, None
        else:
            reason, detail = "error", said.line if said else str(failure)
            rank = said.rank if said else rank
        if not (failure and failure.code == STALLED) and not (reason == "error" and self._told()):
            append_end(self.run_dir, reason, detail=detail, rank=rank, step=self._newest(), host=host)
        path = said.path if said else self.folder
        where = "" if rank is None else f" of rank {rank}"
        self.say(f"{reason}{where}{f' on {host}' if host else ''}: {detail}; logs: {path}")
        return reason

    def _told(self) -> bool:
        start = this_start()
        ends = read_ends(self.run_dir)
        return any(end["job"] == start["job"] and end["restart"] == start["restart"] for end in ends)

    def _locked(self, folder: Path) -> bool:
        """Whether a start found the run's folder held by ranks of one before, as on a node that SLURM has lost."""
        said = first_error(folder)
        return said is not None and LOCKED in said.line

    def _wait_for_lock(self) -> bool:
        """Pause before the next try; False: no more."""
        self.locked_since = self.locked_since or time.monotonic()
        if time.monotonic() - self.locked_since > LOCK_LIMIT:
            holder = read_json(self.run_dir / ".lock") or {}
            who = f"process {holder.get('pid')} on {holder.get('host')}"
            self.say(f"{self.run_dir} is locked by {who} for {LOCK_LIMIT:.0f} s: end it, or choose another run.dir")
            return False
        until = time.monotonic() + LOCK_SECONDS
        while not self.asked and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
        return True

    def _last_words(self) -> str:
        path = self.folder / "srun.log"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return lines[-1] if lines else ""

    def _fruitless(self) -> bool:
        """Whether the last two starts of this job that got into the run's folder have left no checkpoint."""
        own = (line for line in reversed(self._attempts()) if not self._locked(self._logs(line["restart"])))
        return [line["step"] for line in islice(own, 2)] == [self._newest()] * 2

    def _attempts(self) -> list[dict[str, Any]]:
        """Of this job, its requeues included; oldest first."""
        return [line for line in read_lines(self.run_dir / "attempts.jsonl") if line.get("job") == self.id]

    def _logs(self, restart: int) -> Path:
        return log_folder(self.run_dir, self.id, restart)

    def _leave(self) -> int:
        """The ranks have saved and left, as they were asked."""
        why = self.asked or CANCELLED
        append_end(self.run_dir, why, step=self._newest())
        if why == TIME_LIMIT:
            if self._fruitless():
                self.say("no new checkpoint in two starts in a row: not queued again")
                return 1
            return self._requeue(why)
        fields = allocation.state()
        if fields.get("JobState") == "RUNNING" and fields.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"):
            return self._requeue("preempted")
        self.say(f"stopped at step {self._newest()}")
        return 0

    def _requeue(self, why: str, without: Collection[str] = ()) -> int:
        """Give the job back to the queue, if it may, for other nodes than these: SLURM ends this process then."""
        if self.requeues >= self.job["max_requeues"]:
            self.say(f"{why}; not queued again: {self.requeues} of {self.job['max_requeues']} times are used")
            return 0 if self.asked else 1
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.say(f"{why}: back into the queue ({self.requeues + 1} of {self.job['max_requeues']} times)")
        until = time.monotonic() + float(self.job["grace_s"])
        while not self._give_back(sorted(without)):
            if time.monotonic() > until:
                self.say(f"SLURM did not take it back: submit it again, to go on from step {self._newest()}")
                return 1
            time.sleep(REQUEUE_PAUSE)
        time.sleep(REQUEUE_SECONDS)
        return 0

    def _give_back(self, without: list[str]) -> bool:
        held = {signal.SIGTERM} if without else set()  # nodes can be excluded once the job is queued again
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        taken = allocation.requeue()
        if taken and without:
            done = "are excluded from now on" if allocation.exclude(without) else "could not be excluded"
            self.say(f"{', '.join(without)} {done}; to change it: scontrol update JobId={self.id} ExcNodeList=...")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        return taken

    def _close_lost_start(self) -> None:
        """SLURM started the job anew by itself: its last start has no end yet."""
        attempts = self._attempts()
        if not self.requeues or not attempts:
            return
        job, restart = self.id, attempts[-1]["restart"]
        if not any((end["job"], end["restart"]) == (job, restart) for end in read_ends(self.run_dir)):
            detail = "SLURM ended the job and started it anew"
            append_end(self.run_dir, "node lost", detail=detail, restart=restart, step=self._newest(), host=None)


if __name__ == "__main__":
    sys.exit(Supervisor(Path(sys.argv[1])).main())
