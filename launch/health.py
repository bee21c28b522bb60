"""Are the nodes of a job fit to train? `python -P -m launch.health RUN_DIR`, alone or as ranks of a scheduler.

Each rank says what it is and measures; rank 0 writes `health.json` into the run's folder: {"time", "job", "seconds",
"policy", "ranks", "links", "findings": [{"kind", "host", "text", "sick"}], "exclude": [hosts]}. Ends within LIMIT
seconds, whatever hangs.
"""

import argparse
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoints.collective import Ranks
from launch.probes import (
    Clock,
    clock_offsets,
    describe_device,
    seen_shards,
    sees_token,
    time_all_reduce,
    time_links,
    time_matmul,
)
from launch.ranks import node_name
from launch.rundir import write_json
from launch.slurm.allocation import call
from launch.verdicts import LINKS, Facts, Finding, finding, judge
from pretrain.history import now, this_start

LIMIT = 30.0
JOIN_SECONDS = 12.0  # for all ranks to come
ANSWER_SECONDS = 8.0  # of one collective
POLICIES = ("warn", "exclude", "fail")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1, of rank 0, where policy "fail" has a sick node, a missing rank, or a check that did not work."""
    parser = argparse.ArgumentParser(prog="python -P -m launch.health", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--policy", choices=POLICIES, default="warn", help="what becomes of sick nodes (%(default)s)")
    args = parser.parse_args(argv)
    begin, run_dir = time.monotonic(), Path(args.run)
    rank, world = _number("RANK", "SLURM_PROCID", 0), _number("WORLD_SIZE", "SLURM_NTASKS", 1)
    timer = threading.Timer(LIMIT, lambda: os._exit(1))
    timer.daemon = True
    timer.start()
    store, present = join(rank, world) if world > 1 else (None, [0])
    steps = Steps(store, rank)
    ranks: list[Facts] = []
    findings: list[Finding] = []
    try:
        ranks = examine(run_dir, rank, steps)
    except Exception as error:
        findings = steps.hanging(present) or [finding("failed", None, f"the check failed: {one_line(error)}")]
    if rank == 0:
        findings += absent(store, world, present) + judge(ranks)
        report(run_dir, args.policy, ranks, findings, time.monotonic() - begin)
    bad = [each for each in findings if each["sick"] or each["kind"] in ("failed", "missing")]
    sys.stdout.flush()
    sys.stderr.flush()
    # Leaving the usual way could wait for ranks that hang.
    # Of a failing rank srun would end the others, rank 0 perhaps before it has told.
    os._exit(1 if rank == 0 and bad and args.policy == "fail" else 0)


def _number(own: str, slurms: str, usual: int) -> int:
    return int(os.environ.get(own) or os.environ.get(slurms) or usual)


def join(rank: int, world: int) -> tuple[dist.Store, list[int]]:
    """Meet at MASTER_ADDR:MASTER_PORT. Makes a process group of those that come in time; returns their ranks too."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise ValueError(f"{error} is not set; the ranks of a health check meet at MASTER_ADDR:MASTER_PORT") from None
    wait = timedelta(seconds=JOIN_SECONDS)
    store = dist.TCPStore(address, port, world, rank == 0, timeout=wait, wait_for_workers=False)
    store.set(f"here/{rank}", node_name())
    if rank == 0:
        until = time.monotonic() + JOIN_SECONDS
        present: list[int] = []
        while len(present) < world and time.monotonic() < until:
            present = [other for other in range(world) if store.check([f"here/{other}"])]
            time.sleep(0.05)
        store.set("present", json.dumps(present))
    store.set_timeout(wait + timedelta(seconds=3))
    present = json.loads(store.get("present"))
    if rank not in present:
        os._exit(0)  # too late: rank 0 has said so
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=ANSWER_SECONDS)
    group, number = dist.PrefixStore("group", store), present.index(rank)
    dist.init_process_group(backend, store=group, rank=number, world_size=len(present), timeout=timeout)
    return store, present


class Steps:
    """How far each rank is: what can be said when one hangs."""

    def __init__(self, store: dist.Store | None, rank: int) -> None:
        self._store, self._rank, self._done, self._name = store, rank, 0, "start"

    def begin(self, name: str) -> None:
        self._done, self._name = self._done + 1, name
        if self._store is not None:
            self._store.set(f"step/{self._rank}", str(self._done))

    def hanging(self, present: list[int]) -> list[Finding]:
        """The ranks that are not as far as this one."""
        found = []
        for rank in present if self._store is not None else ():
            assert self._store is not None
            key = f"step/{rank}"
            if not self._store.check([key]) or int(self._store.get(key)) < self._done:
                host = self._store.get(f"here/{rank}").decode()
                found.append(finding("hangs", host, f"rank {rank} on {host} hangs before: {self._name}", sick=True))
        return found


def absent(store: dist.Store | None, world: int, present: list[int]) -> list[Finding]:
    """The ranks that did not come; their nodes, where SLURM tells which were to come."""
    missing = sorted(set(range(world)) - set(present))
    if store is None or not missing:
        return []
    came = {store.get(f"here/{rank}").decode() for rank in present}
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    listed = call("scontrol", "show", "hostnames", nodes).split() if nodes else []
    text = f"ranks {missing} of {world} did not come within {JOIN_SECONDS:.0f} s"
    hosts = [host for host in listed if host not in came]
    return [finding("missing", host, text, sick=True) for host in hosts] or [finding("missing", None, text)]


def examine(
    run_dir: Path,
    rank: int,
    steps: Steps | None = None,
    *,
    clock: Clock = time.time,
    matmul: Callable[[torch.device], float] = time_matmul,
    host: str = "",
) -> list[Facts]:
    """Collective. What every rank says of itself, in rank order; rank: as the scheduler counts, whoever is missing."""
    steps = steps or Steps(None, rank)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", _number("LOCAL_RANK", "SLURM_LOCALID", 0) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    several = dist.is_initialized() and dist.get_world_size() > 1
    steps.begin("meeting")
    ranks = Ranks()
    own: Facts = {
        "rank": rank, "host": host or node_name(), "machine": machine_id(), "pid": os.getpid(),
        "device_index": device.index, **describe_device(device),
    }  # fmt: skip
    if several:
        dist.barrier()
    steps.begin("clocks")
    own["clock_s"] = clock_offsets(clock) if several else 0.0
    steps.begin("matrix products")
    own["matmul_s"] = matmul(device)
    steps.begin("the run's folder")
    own |= _look_around(run_dir, ranks)
    if several:
        steps.begin("all-reduce")
        own["latency_s"], own["bytes_per_s"] = time_all_reduce(device)
        steps.begin("links")
        own["link"] = time_links()
        if device.type == "cuda":
            steps.begin("links of devices")
            own["device_link"] = time_links(device)
    steps.begin("results")
    return ranks.gather(own)


def _look_around(run_dir: Path, ranks: Ranks) -> Facts:
    """Whether this rank sees rank 0's run folder, and how many bytes of shards."""
    name, text = ".health", uuid.uuid4().hex
    text = ranks.gather(text)[0]
    if ranks.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(text)
    ranks.gather(None)
    sees = sees_token(run_dir, name, text)
    ranks.gather(None)
    if ranks.rank == 0:
        (run_dir / name).unlink()
    try:
        return {"sees_folder": sees, "shards": seen_shards(run_dir) if sees else {}}
    except ValueError as error:  # of the recipe: training will say so
        return {"sees_folder": sees, "shards": {}, "recipe": str(error)}


def machine_id() -> str:
    """Of this start of this machine, containers included."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else platform.node()


def report(run_dir: Path, policy: str, ranks: Sequence[Facts], findings: Sequence[Finding], seconds: float) -> None:
    """Write health.json, and say it."""
    sick = sorted({each["host"] for each in findings if each["sick"]})
    links = [
        {**facts[key], "of": key, "from": facts["rank"], "to": ranks[facts[key]["to"]]["rank"]}
        for key in LINKS
        for facts in ranks
        if facts.get(key)
    ]
    write_json(
        run_dir / "health.json",
        {
            "time": now(), "job": this_start()["job"], "seconds": round(seconds, 2), "policy": policy,
            "ranks": list(ranks), "links": links, "findings": list(findings),
            "exclude": sick if policy == "exclude" else [],
        },
    )  # fmt: skip
    hosts = len({facts["host"] for facts in ranks})
    print(f"health: {len(ranks)} ranks on {hosts} hosts, {seconds:.1f} s, {len(findings)} findings", flush=True)
    for each in findings:
        print(f"health: {each['kind']}: {each['text']}", flush=True)
    if sick:
        print(f"health: sick: {', '.join(sick)}" + (", left out" if policy == "exclude" else ""), flush=True)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as mistake:
        print(f"pretrain: error: {one_line(mistake)}", file=sys.stderr)
        sys.exit(2)
