"""Fits the calibrated figures of `parallel.planner.gpus` to published runs and says how well they carry over.

    python -m tests.bench.fit_plan [--rows FILE] [--rounds N]

Coordinate search over the logarithms of the figures; the loss is the mean over sources of a Huber function of
log(predicted / published), plus a weak pull towards where the search starts. Then: fitted with each source left out,
and with each fifth of the rows (by model) left out, judged on what was left out.
"""

import argparse
import math
import statistics
import zlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from parallel.planner.gpus import KERNELS
from parallel.planner.step import simulate
from tests.bench.published import Run, read_runs

Figures = dict[str, float]
# Chips of one design share their figures.
CHIPS = {
    "a100": ("a100-40", "a100-80"),
    "h100": ("h100", "h200"),
    "h100-500w": ("h100-500w",),
    "b200": ("b200", "gb200"),
    "b300": ("b300", "gb300"),
}
# Hardly a dense run in bf16 is published for Blackwell: the share of its peak is taken to be Hopper's.
SHARED = {(chip, "sustained_bf16"): "h100.sustained_bf16" for chip in ("b200", "b300")}
# Where the search starts and what it is pulled towards: guesses from data sheets and kernels' own benchmarks, made
# before any row was looked at, so that a source left out cannot have left its mark.
PRIOR: Figures = {
    **{f"kernels.{k}": v for k, v in {
        "hbm": 0.75, "nvlink": 0.75, "network": 0.75, "latency": 15e-6, "host": 6e-6, "gap": 2e-6, "contention": 0.15,
        "depth": 128.0, "misaligned": 3.0, "backward": 1.3, "tp_hidden": 0.6, "ep_hidden": 0.5, "tile": 12.0,
        "width": 40.0, "ported": 0.65,
    }.items()},
    "a100.sustained_bf16": 0.79, "a100.attention": 0.5,
    "h100.sustained_bf16": 0.70, "h100.sustained_fp8": 0.6, "h100.attention": 0.42,
    "h100-500w.sustained_bf16": 0.6, "h100-500w.sustained_fp8": 0.5, "h100-500w.attention": 0.42,
    "b200.sustained_fp8": 0.6, "b200.sustained_fp4": 0.5, "b200.attention": 0.42,
    "b300.sustained_fp8": 0.6, "b300.sustained_fp4": 0.5, "b300.attention": 0.5,
}  # fmt: skip
LIMITS = {
    "hbm": 0.9, "sustained_bf16": 0.85, "sustained_fp8": 0.75, "sustained_fp4": 0.75, "attention": 0.7, "nvlink": 0.95,
    "network": 0.95, "contention": 0.6, "tp_hidden": 0.95, "ep_hidden": 0.95,
}  # fmt: skip


def predict(run: Run, figures: Figures) -> float:
    """Tokens/s a GPU under these figures."""
    gpu = run.setting.gpu
    chip = next((chip for chip, members in CHIPS.items() if gpu.name in members), "")
    own = {k.partition(".")[2]: v for k, v in figures.items() if k.partition(".")[0] == chip}
    own |= {name: figures[of] for (of_chip, name), of in SHARED.items() if of_chip == chip}
    kernels = replace(KERNELS, **{k[8:]: v for k, v in figures.items() if k.startswith("kernels.")})
    step = simulate(replace(run.setting, gpu=replace(gpu, **own), kernels=kernels))
    return step.tokens_per_s / step.gpus


def loss(runs: list[Run], figures: Figures, origin: Figures) -> float:
    by_source: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        error = math.log(predict(run, figures) / run.tokens_per_s)
        by_source[run.row["source"]].append(min(abs(error), 0.5 * abs(error) + 0.1) + 0.5 * error * error)
    pull = sum(math.log(figures[k] / origin[k]) ** 2 for k in figures)
    rows = sum(math.sqrt(len(v)) * statistics.fmean(v) for v in by_source.values())
    return rows / sum(math.sqrt(len(v)) for v in by_source.values()) + 0.003 * pull


def fit(runs: list[Run], rounds: int) -> Figures:
    figures, step = dict(PRIOR), 0.2
    best = loss(runs, figures, PRIOR)
    for _ in range(rounds):
        before = best
        for key in figures:
            for factor in (math.exp(step), math.exp(-step)):
                value = figures[key] * factor
                limit = LIMITS.get(key.partition(".")[2], math.inf)
                tried = {**figures, key: min(value, limit)}
                if (found := loss(runs, tried, PRIOR)) < best - 1e-6:
                    best, figures = found, tried
                    break
        if before - best < 2e-4:
            step /= 2
    return figures


def errors(runs: list[Run], figures: Figures) -> str:
    found = sorted(abs(predict(run, figures) / run.tokens_per_s - 1) for run in runs)
    median, worst = statistics.median(found), found[int(0.9 * len(found))]
    return f"{len(found):4} rows  median {100 * median:5.1f} %  90th {100 * worst:5.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_name("published_runs.csv"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--no-cross", action="store_true")
    args = parser.parse_args()
    runs = [run for run in read_runs(args.rows)[0] if run.tokens_per_s]
    figures = fit(runs, args.rounds)
    for key, value in figures.items():
        print(f"  {key:28} {value:.4g}")
    print(f"fitted on all             {errors(runs, figures)}")
    if args.no_cross:
        return
    for source in sorted({run.row["source"] for run in runs}):
        kept = [run for run in runs if run.row["source"] != source]
        print(
            f"without {source:17} {errors([r for r in runs if r.row['source'] == source], fit(kept, args.rounds))}",
            flush=True,
        )
    held_out = []
    for part in range(5):

        def in_part(run: Run, part: int = part) -> bool:
            return zlib.crc32(run.row["model"].encode()) % 5 == part

        fitted = fit([run for run in runs if not in_part(run)], args.rounds)
        held_out += [abs(predict(run, fitted) / run.tokens_per_s - 1) for run in runs if in_part(run)]
    held_out.sort()
    print(f"models left out, a fifth at a time: median {100 * statistics.median(held_out):.1f} %")


if __name__ == "__main__":
    main()
