"""What the supervisor needs of a run's recipe, read without torch."""

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
    where all data-parallel degrees are fixed.
    """
    train, parallel = _section(run_dir, "train"), _section(run_dir, "parallel")
    degrees = {key: int(parallel.get(key, 1)) for key in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    if -1 not in degrees.values():
        return 0
    fixed = 1
    for degree in degrees.values():
        fixed *= max(degree, 1)
    model = degrees["pp"] * degrees["cp"] * degrees["tp"]
    for count in range(nodes, 0, -1):
        world = count * ranks_per_node
        if world % fixed == 0 and train["global_batch"] % (train["micro_batch"] * (world // model)) == 0:
            return count
    return 0


def _section(run_dir: Path, name: str) -> dict[str, Any]:
    tree = tomllib.loads((run_dir / SUBMITTED).read_text(encoding="utf-8"))
    found: dict[str, Any] = tree.get(name, {})
    return found
