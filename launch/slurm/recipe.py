"""What the supervisor needs of a run's recipe, read without torch."""

import math
import tomllib
from pathlib import Path
from typing import Any

SUBMITTED = "submitted.toml"


def goal(run_dir: Path) -> int:
    """The step at which the run ends."""
    train = _section(run_dir, "train")
    return int(train.get("stop_at") or train["steps"])


def fewer_nodes(run_dir: Path, nodes: int, ranks_per_node: int) -> int:
    """The largest number of nodes, `nodes` at most, on which the run goes on with the same global batch; 0: none, as
    where all data-parallel degrees are fixed. The rules are those of `parallel.mesh` and `parallel.pipeline_cut`.
    """
    train, parallel = _section(run_dir, "train"), _section(run_dir, "parallel")
    degrees = {key: int(parallel.get(key, 1)) for key in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    inferred = [key for key, degree in degrees.items() if degree == -1]
    if inferred not in (["dp_replicate"], ["dp_shard"]):
        return 0
    fixed = math.prod(degree for degree in degrees.values() if degree != -1)
    for count in range(nodes, 0, -1):
        degrees[inferred[0]], left = divmod(count * ranks_per_node, fixed)
        if left:
            continue
        at_once = train["micro_batch"] * degrees["dp_replicate"] * degrees["dp_shard"]
        microbatches, torn = divmod(train["global_batch"], at_once)
        experts_fit = degrees["dp_shard"] * degrees["cp"] % int(parallel.get("ep", 1)) == 0
        if not torn and experts_fit and _scheduled(parallel.get("schedule", "1f1b"), degrees["pp"], microbatches):
            return count
    return 0


def _scheduled(schedule: str, pp: int, microbatches: int) -> bool:
    """Whether torch's pipeline schedule takes so many micro-batches."""
    name = schedule.lower()
    if pp > 1 and name.startswith("interleaved"):
        return microbatches % max(1, microbatches // pp) == 0  # rounds of about pp, all alike
    return pp == 1 or microbatches >= {"1f1b": pp, "dualpipev": 2 * pp}.get(name, 1)


def _section(run_dir: Path, name: str) -> dict[str, Any]:
    tree = tomllib.loads((run_dir / SUBMITTED).read_text(encoding="utf-8"))
    found: dict[str, Any] = tree.get(name, {})
    return found
