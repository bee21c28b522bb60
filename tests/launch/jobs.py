"""Small training jobs on the cluster of the tests."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from checkpoints.store import CheckpointStore
from launch.slurm.cluster import ClusterConfig
from launch.slurm.submit import Order, prepare, submit
from pretrain.history import read_ends
from tests.slurm.cluster import Cluster, wait_until
from tests.small import small_overrides


@dataclass
class TrainingJob:
    """A job that was submitted to train in `run_dir`."""

    cluster: Cluster
    run_dir: Path
    id: int

    @property
    def ends(self) -> list[tuple[str, int]]:
        return [(end["reason"], end["restart"]) for end in read_ends(self.run_dir)]

    @property
    def attempts(self) -> list[dict[str, Any]]:
        path = self.run_dir / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def output(self) -> str:
        path = self.run_dir / f"logs/slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    @property
    def step(self) -> int:
        """The last step logged."""
        path = self.run_dir / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []
        return int(lines[-1]["step"]) if lines else 0

    def step_of(self, number: int) -> int:
        """The last step of start `number` of the run (from 0; -1: the last one), as its log tells."""
        attempt = self.attempts[number]
        path = self.run_dir / f"logs/{attempt['job']}.{attempt['restart']}/rank-00000.log"
        lines = re.findall(r"^step +(\d+)/", path.read_text(), re.MULTILINE) if path.exists() else []
        return int(lines[-1]) if lines else 0

    @property
    def saved(self) -> int:
        return CheckpointStore(self.run_dir / "checkpoints").newest_whole() or 0

    def wait_for(self, true: Any, timeout: float = 90) -> None:
        wait_until(true, timeout, self.report)

    def wait_for_step(self, step: int, timeout: float = 90) -> None:
        self.wait_for(lambda: self.step >= step, timeout)

    def finish(self, timeout: float = 120, state: str = "COMPLETED") -> None:
        ended = self.cluster.wait(self.id, timeout=timeout)
        assert ended == state, self.report()

    def processes(self, node: str, module: str) -> list[psutil.Process]:
        """Those of a node that run `python -m module`, the youngest last."""
        found = []
        for process in self.cluster.processes(node):
            try:
                if module in process.cmdline() and str(self.run_dir) in " ".join(process.cmdline()):
                    found.append((process.create_time(), process))
            except psutil.Error:
                continue
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def ranks(self, node: str) -> list[psutil.Process]:
        return self.processes(node, "launch.cli")

    def report(self) -> str:
        logs = sorted((self.run_dir / "logs").glob("*/*"), key=lambda path: path.stat().st_mtime)[-8:]
        parts = [f"--- {path} ---\n{path.read_text(errors='replace')[-1500:]}" for path in logs]
        return "\n".join([self.cluster.report(self.id), self.output[-4000:], *parts])


def small_job(run_dir: Path, shards: Path) -> list[str]:
    """Overrides of recipe `tiny`."""
    return [*small_overrides(run_dir, shards), "train.micro_batch=2", "log.every=1"]


def start_job(
    cluster: Cluster,
    run_dir: Path,
    shards: Path,
    *overrides: str,
    nodes: int = 2,
    ranks: int = 1,
    spares: int = 0,
    max_requeues: int = 3,
    launcher: str = "agent",
    time: str = "10",
    grace: int = 20,
    health: str = "off",
    python: Path | None = None,
) -> TrainingJob:
    """Submit recipe `tiny`, small. The caller's environment has OMP_NUM_THREADS and GLOO_SOCKET_IFNAME."""
    site = ClusterConfig.model_validate(
        {
            "ranks_per_node": ranks,
            "cpus_per_rank": 1,
            "launcher": launcher,
            "time": time,
            "grace": grace,
            "health": health,
            "python": str(python or ""),
        }
    )
    order = Order(
        recipe="tiny",
        overrides=[*small_job(run_dir, shards), *overrides],
        nodes=nodes,
        cluster=site,
        spares=spares,
        max_requeues=max_requeues,
        environment=("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES"),
    )
    return TrainingJob(cluster, run_dir, int(submit(prepare(order), order)[0]))


def weights(run_dir: Path) -> dict[str, bytes]:
    """The files of the newest checkpoint's weights."""
    newest = CheckpointStore(run_dir / "checkpoints").newest_whole()
    folder = run_dir / f"checkpoints/step-{newest:08d}/model"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
