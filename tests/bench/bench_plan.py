"""The planner against published runs: `make bench-plan`.

python -m tests.bench.bench_plan [--rows FILE] [--verbose] [--fit]
"""

import argparse
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from parallel.planner.gpus import GIB, KERNELS, Kernels
from parallel.planner.memory import plan_memory
from parallel.planner.step import simulate
from tests.bench.published import Run, read_runs

ROWS = Path(__file__).with_name("published_runs.csv")


def predict(run: Run, kernels: Kernels = KERNELS) -> float:
    """Tokens/s a GPU."""
    step = simulate(replace(run.setting, kernels=kernels))
    return step.tokens_per_s / step.gpus


def predict_memory(run: Run) -> float:
    """GiB."""
    memory = plan_memory(run.setting)
    return (memory.tensors if run.allocated else memory.total) / GIB


def report(what: str, found: list[tuple[str, float]]) -> None:
    """found: (group, predicted / published)."""
    by_group: dict[str, list[float]] = defaultdict(list)
    for group, ratio in found:
        by_group[group].append(ratio)
    print(f"{what:32} rows   predicted/published      error: median   90th percentile")
    for group, ratios in [*sorted(by_group.items()), ("all", [r for _, r in found])]:
        errors = sorted(abs(r - 1) for r in ratios)
        worst = errors[min(len(errors) - 1, int(0.9 * len(errors)))]
        print(
            f"  {group:30} {len(ratios):4}   median {statistics.median(ratios):5.2f}                   "
            f"{100 * statistics.median(errors):5.1f} %         {100 * worst:5.1f} %"
        )


def _describe(run: Run) -> str:
    row, setting = run.row, run.setting
    return f"{row['source'][:8]} {row['model']} {setting.layout} {setting.gpu.name} {row['precision']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    runs, left = read_runs(args.rows)
    speed = [(r, predict(r) / r.tokens_per_s) for r in runs if r.tokens_per_s]
    memory = [(r, predict_memory(r) / r.memory) for r in runs if r.memory]
    if args.verbose:
        for run, ratio in speed:
            print(f"{ratio:5.2f} {_describe(run)}")
        for run, ratio in memory:
            print(f"memory {ratio:5.2f} of {run.memory} GiB {_describe(run)}")
    report("throughput", [(r.row["source"], x) for r, x in speed])
    report("throughput by GPU", [(r.setting.gpu.name, x) for r, x in speed])
    report("memory", [(r.row["source"], x) for r, x in memory])
    reasons: dict[str, int] = defaultdict(int)
    for _, why in left:
        reasons[why] += 1
    print("left out:", "; ".join(f"{n} {why}" for why, n in reasons.items()))


if __name__ == "__main__":
    main()
