"""torch's elastic agent over the ranks of one machine: it assigns their numbers and restarts them.

The ranks are started before torch is imported here (2 s), and the agent takes them over.
"""

import os
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from launch.ranks import Ranks

ROLE = "pretrain"
MISTAKE = 2  # exit code of a user's mistake: it would be made again


class Agent(SimpleElasticAgent):
    """Watches `Ranks`, which run already, and starts them anew as often as the specification allows: not after a
    user's mistake, nor once they were asked to stop.
    """

    def __init__(self, spec: WorkerSpec, ranks: Ranks) -> None:
        super().__init__(spec)
        self._ranks = ranks

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        numbers = [worker.global_rank for worker in worker_group.workers]
        ours = list(range(self._ranks.first, self._ranks.first + self._ranks.here))
        assert numbers == ours, f"torch's agent assigned ranks {numbers}, but {ours} were started"
        if self._remaining_restarts < worker_group.spec.max_restarts:
            self._ranks.restart_all()
        return dict(enumerate(self._ranks.pids))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._ranks.look():
            return RunResult(state=WorkerState.HEALTHY)
        failure = self._ranks.failure
        if failure is None:
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(_numbers(worker_group)))
        if self._ranks.asked or failure.code == MISTAKE:
            self._remaining_restarts = 0
        if self._remaining_restarts:
            self._ranks.tell()
            left = self._remaining_restarts
            print(f"pretrain: restarting from the last checkpoint ({left} of {worker_group.spec.max_restarts} left)")
        local = failure.rank - self._ranks.first
        found = ProcessFailure(local, self._ranks.pids[local], failure.code, error_file=os.devnull)
        return RunResult(state=WorkerState.FAILED, failures={failure.rank: found})

    def _stop_workers(self, worker_group: WorkerGroup, *_: Any, **__: Any) -> None:
        """They have ended by the time that a failure is reported."""

    def _shutdown(self, *_: Any, **__: Any) -> None:
        self._ranks.stop()

    def _exit_barrier(self) -> None:
        """Not needed: the ranks of all machines meet at a barrier before they leave."""


def supervise(ranks: Ranks, *, group: int, groups: int, port: int, restarts: int) -> int:
    """Watch ranks that were started; returns the exit code of this machine's ranks.

    group: number of this machine among `groups`; the agent of the first one listens at `ranks.address` and `port`.
    """
    rendezvous = StaticTCPRendezvous(ranks.address, port, group, groups, ROLE, timeout=600)
    spec = WorkerSpec(
        role=ROLE,
        local_world_size=ranks.here,
        rdzv_handler=rendezvous,
        entrypoint=ranks.command[0],
        max_restarts=restarts,
        monitor_interval=0.05,
    )
    Agent(spec, ranks).run()
    return ranks.code


def _numbers(worker_group: WorkerGroup) -> list[int]:
    return [worker.global_rank for worker in worker_group.workers]
