"""A real SLURM cluster on this machine: munged, slurmctld and several slurmd, in a temporary folder.

    def test_it(slurm: Cluster) -> None:
        job = slurm.submit("--nodes=2", "--wrap=srun hostname")
        slurm.wait(job, "COMPLETED")

Client commands find it by SLURM_CONF, which the fixture sets in this process. Timers are short: a lost node is
noticed, and a requeued job starts again, within seconds. There is no accounting database.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import psutil
import pytest

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch")
MUNGE_FILES = ("key-file", "socket", "pid-file", "log-file", "seed-file")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where daemons are, also for shells without it

CONFIG = """\
ClusterName=pretrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
JobRequeue=1
KillWait={kill_wait}
SlurmdTimeout=6
SlurmctldTimeout=10
MessageTimeout=5
BatchStartTimeout=10
MinJobAge=3600
InactiveLimit=0
WaitTime=0
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
{nodes}
PartitionName=debug Nodes={names} Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime={kill_wait}
PartitionName=small Nodes=n1 MaxTime=5 State=UP PriorityTier=1
NodeName=far[1-2] NodeHostname=far[1-2] NodeAddr=127.0.0.1 CPUs=4 State=DOWN Reason=far
PartitionName=away Nodes=far[1-2] MaxTime=60 State=UP
PartitionName=urgent Nodes={names} MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can be started here; empty when one can."""
    if os.geteuid() != 0:
        return "needs root, to start slurmd"
    lost = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    return f"needs {', '.join(lost)} (apt-get install slurm-wlm munge)" if lost else ""


@dataclass
class Cluster:
    """The daemons of one cluster. `nodes`: names, n1 first; each claims `cpus` CPUs and `gpus` GPUs that are not there.

    Partitions: debug (the default, all nodes, preempted by urgent), small (n1, 5 minutes at most), urgent; and away,
    of two nodes that are other machines, and down.
    `kill_wait`: seconds between SIGTERM and SIGKILL when a job is cancelled or preempted.
    """

    folder: Path
    nodes: list[str]
    cpus: int = 8
    gpus: int = 2
    kill_wait: int = 10
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.folder / "slurm.conf"

    def start(self) -> None:
        """Start all daemons; returns when every node is idle."""
        self.folder.chmod(0o755)
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = _free_ports(len(self.nodes) + 1)
        lines = [
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
            f"RealMemory=1000 Gres=gpu:{self.gpus} State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        text = CONFIG.format(
            host=socket.gethostname(),
            port=ports[0],
            folder=self.folder,
            kill_wait=self.kill_wait,
            nodes="\n".join(lines),
            names=",".join(self.nodes),
        )
        self.config.write_text(text)
        for index in range(self.gpus):
            (self.folder / f"gpu{index}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n")
        options = {f"--{name}": self.folder / f"munge.{name.removesuffix('-file')}" for name in MUNGE_FILES}
        self._daemon("munged", "munged", "--foreground", "--force", *(f"{name}={at}" for name, at in options.items()))
        wait_until((self.folder / "munge.socket").exists, 10, "munged made no socket")
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.config))
        for node in self.nodes:
            self.start_node(node)
        self.wait_idle()

    def stop(self) -> None:
        """End all jobs, nodes and daemons, and remove the folder."""
        for node in self.nodes:
            self.kill_node(node)
        for name in ("slurmctld", "munged"):
            daemon = self.daemons.pop(name, None)
            if daemon is not None:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, node: str, hidden: Path | None = None) -> None:
        """Start the slurmd of a node, at first or after `kill_node`. hidden: a folder that is empty on it, as one
        is that is not shared.
        """
        command = ["slurmd", "-D", "-N", node, "-f", str(self.config)]
        if hidden is not None:
            apart = ["unshare", "--mount", "--propagation=private", "sh", "-c"]
            command = [*apart, 'mount -t tmpfs none "$0" && exec "$@"', str(hidden), *command]
        self._daemon(node, *command)

    def kill_node(self, node: str) -> None:
        """What a loss of power does: its slurmd, and all that jobs run there, are gone at once."""
        found = self.processes(node)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        daemon = self.daemons.pop(node, None)
        if daemon is not None:
            daemon.wait()
        psutil.wait_procs(found, timeout=10)

    def processes(self, node: str) -> list[psutil.Process]:
        """The slurmd of a node, its slurmstepd, and all processes below them."""
        log, spool = str(self.folder / f"slurmd.{node}.log"), str(self.folder / f"spool.{node}")
        roots = []
        for process in psutil.process_iter(["name"]):
            if process.info["name"] in ("slurmd", "slurmstepd"):
                with suppress(psutil.Error, OSError):
                    opened = [str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
                    if any(path == log or path.startswith(f"{spool}/") for path in opened):
                        roots.append(process)
        found = {}
        for root in roots:
            with suppress(psutil.NoSuchProcess):
                found |= {process.pid: process for process in (root, *root.children(recursive=True))}
        return list(found.values())

    def wait_idle(self, timeout: float = 30) -> None:
        """Wait until no job is left and all nodes can take one."""
        wait_until(lambda: set(self.node_states().values()) == {"idle"}, timeout, self.report)

    def node_states(self) -> dict[str, str]:
        """Such as {"n1": "idle", "n2": "down*"}."""
        listing = subprocess.run(["sinfo", "-N", "-h", "-o", "%N %t"], capture_output=True, text=True, check=False)
        states = dict(line.split() for line in listing.stdout.splitlines())
        return {node: states.get(node, "unknown") for node in self.nodes}

    def submit(self, *arguments: str) -> int:
        """`sbatch` with these arguments; returns the job's id. Its output goes to the cluster's folder."""
        output = f"--output={self.folder}/job-%j.out"
        command = ["sbatch", "--parsable", output, f"--chdir={self.folder}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def output(self, job: int | str) -> str:
        """What a job of `submit` has printed so far."""
        path = self.folder / f"job-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def job(self, job: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState, Restarts, BatchHost; empty when it is not known."""
        command = ["scontrol", "show", "job", "--oneliner", str(job)]
        listing = subprocess.run(command, capture_output=True, text=True, check=False)
        return dict(word.split("=", 1) for word in listing.stdout.split() if "=" in word)

    def wait(self, job: int | str, *states: str, timeout: float = 60) -> str:
        """Wait until a job is in one of these states (default: any in which it has ended); returns it."""
        wanted = states or ENDED
        wait_until(lambda: self.job(job).get("JobState") in wanted, timeout, lambda: self.report(job))
        return self.job(job)["JobState"]

    def cancel_all(self) -> None:
        """End every job and wait until the nodes are free."""
        listing = subprocess.run(["squeue", "-h", "-o", "%A"], capture_output=True, text=True, check=False)
        jobs = sorted(set(listing.stdout.split()))
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)
            subprocess.run(["scancel", "--signal=KILL", *jobs], capture_output=True, check=False)
        self.wait_idle(timeout=self.kill_wait + 20)

    def report(self, job: int | str | None = None) -> str:
        """Everything that explains why a wait was in vain."""
        parts = [f"nodes: {self.node_states()}"]
        if job is not None:
            parts += [str(self.job(job)), f"--- output of job {job} ---", self.output(job)[-4000:]]
        for name in ("slurmctld.log", *(f"slurmd.{node}.log" for node in self.nodes)):
            path = self.folder / name
            if path.exists():
                parts += [f"--- {name} ---", "\n".join(path.read_text(errors="replace").splitlines()[-15:])]
        return "\n".join(parts)

    def _daemon(self, name: str, *command: str) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "PYTEST"))}
        tool = shutil.which(command[0], path=PATH) or command[0]
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [tool, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment | {"PATH": PATH},
                cwd=self.folder,
                start_new_session=True,  # a Ctrl-C of the tests is not the cluster's
            )


def wait_until(true: Callable[[], object], timeout: float, why: str | Callable[[], str] = "") -> None:
    """Look every tenth of a second; after `timeout` seconds, fail with what `why` says."""
    deadline = time.monotonic() + timeout
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {why() if callable(why) else why}")
        time.sleep(0.1)


def running(nodes: int = 3) -> Iterator[Cluster]:
    """A cluster, up while this is suspended; skips the test with the reason where none can run."""
    reason = missing()
    if reason:
        if os.environ.get("PRETRAIN_REQUIRE_SLURM"):
            pytest.fail(f"SLURM tests may not be skipped here: {reason}")
        pytest.skip(f"SLURM: {reason}")
    # A socket's path is 107 bytes at most: pytest's own folders are too deep.
    cluster = Cluster(Path(mkdtemp(prefix="slurm-")), [f"n{index + 1}" for index in range(nodes)])
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(cluster.config)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[Cluster]:
    """One cluster for all tests of this process."""
    yield from running()


@pytest.fixture
def slurm(slurm_session: Cluster) -> Iterator[Cluster]:
    """The cluster, idle and whole before the test; nothing of the test's is left after it."""
    yield slurm_session
    for node in slurm_session.nodes:
        if node not in slurm_session.daemons:
            slurm_session.start_node(node)
    slurm_session.cancel_all()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
