"""pretrain plan"""

import argparse
from datetime import timedelta

from parallel.mesh import AXES
from parallel.planner.gpus import GIB, find_gpu
from parallel.planner.search import Planned
from pretrain.config import resolve
from pretrain.planner import Question, answer, ask, to_overrides


def plan(args: argparse.Namespace) -> None:
    """Print the fastest layouts that fit."""
    gpu = find_gpu(args.gpu)
    question = ask(*resolve(args.recipe, args.overrides), args.gpus, gpu)
    found = answer(question)
    print("\n".join(table(question, found[: args.top])))
    print()
    print("\n".join(why(found)))
    if args.explain:
        print()
        print("\n".join(explain(question, found[0])))
    print(f"\npretrain run {args.recipe} {' '.join([*other(args.overrides), to_overrides(found[0])])}")


def other(overrides: list[str]) -> list[str]:
    """Those that the plan does not set itself."""
    own = ("parallel.", "train.micro_batch", "train.recompute")
    return [word for word in overrides if not word.startswith(own)]


def table(question: Question, found: list[Planned]) -> list[str]:
    """One line a layout, fastest first."""
    config, gpu = question.config, question.gpu
    lines = [
        f"{config.model.num_parameters() / 1e9:.2f}B parameters, {config.train.global_batch} sequences of "
        f"{config.data.seq_len} tokens a step, on {question.gpus} x {gpu.name} ({gpu.memory / GIB:.0f} GiB)",
        "",
        f"{'':>3} {'pp':>3} {'repl':>4} {'shard':>5} {'cp':>3} {'tp':>3} {'micro':>5} {'recompute':>9} {'schedule':>16} "
        f"{'GiB/GPU':>8} {'tokens/s':>11} {'TFLOP/s':>8} {'MFU':>6} {'bubble':>7} {'days':>7}",
    ]
    for rank, planned in enumerate(found, 1):
        layout, step = planned.layout, planned.step
        schedule = "-" if layout.pp == 1 else layout.schedule + (f" x{layout.chunks}" if layout.chunks > 1 else "")
        cp = f"{layout.cp}{layout.cp_method[0]}" if layout.cp > 1 else "1"
        lines.append(
            f"{rank:>3} {layout.pp:>3} {layout.dp_replicate:>4} {layout.dp_shard:>5} {cp:>3} {layout.tp:>3} "
            f"{layout.micro_batch:>5} {layout.recompute:>9} {schedule:>16} {planned.memory.total / GIB:>8.1f} "
            f"{step.tokens_per_s:>11,.0f} {step.tflops:>8.0f} {100 * step.mfu:>5.1f}% {100 * step.bubble:>6.1f}% "
            f"{config.train.steps * step.seconds / 86400:>7.1f}"
        )
    return lines


def why(found: list[Planned]) -> list[str]:
    """What the runner-up loses its time with."""
    best = found[0]
    if len(found) == 1:
        return ["It is the only set of degrees that fits."]
    second = found[1]
    lost = {name: seconds - best.step.parts.get(name, 0.0) for name, seconds in second.step.parts.items()}
    worst = max(lost, key=lambda name: lost[name])
    slower = 100 * (second.step.seconds / best.step.seconds - 1)
    return [
        f"The first is best: the second's step is {slower:.1f} % longer; it loses most in {worst} "
        f"(+{1000 * lost[worst]:.0f} ms of a step of {1000 * best.step.seconds:.0f} ms)."
    ]


def explain(question: Question, planned: Planned) -> list[str]:
    """All terms of one layout."""
    config, step, gpu = question.config, planned.step, question.gpu
    layout = planned.layout
    degrees = ", ".join(f"{axis} {getattr(layout, axis)}" for axis in AXES)
    lines = [f"Layout: {degrees}; {planned.microbatches} micro-batches of {layout.micro_batch} a step"]
    lines += ["", f"Memory of the fullest GPU, of {gpu.memory / GIB:.1f} GiB"]
    lines += [f"  {name:40} {size / GIB:>9.2f} GiB" for name, size in planned.memory.terms.items()]
    lines += [f"  {'total':40} {planned.memory.total / GIB:>9.2f} GiB"]
    lines += ["", "Time of a step"]
    lines += [
        f"  {name:40} {1000 * seconds:>9.1f} ms {100 * seconds / step.seconds:>6.1f} %"
        for name, seconds in step.parts.items()
        if seconds > 0
    ]
    lines += [f"  {'total':40} {1000 * step.seconds:>9.1f} ms"]
    lines += [
        "",
        f"Communication of a GPU in a step{'':18} axis           times        MiB each      GiB     link   busy ms",
    ]
    for t in step.traffic:
        lines.append(
            f"  {t.kind:14} {t.what:34} {t.axis:13} {t.count:>7,.0f} {t.bytes / 2**20:>14.1f} "
            f"{t.count * t.bytes / GIB:>9.2f} {t.link:>8} {1000 * t.count * t.seconds:>9.1f}"
        )
    tokens = config.train.steps * config.train.global_batch * config.data.seq_len
    spent = timedelta(seconds=round(config.train.steps * step.seconds))
    lines += [
        "",
        f"{step.tokens_per_s:,.0f} tokens/s, {step.tokens_per_s / step.gpus:,.0f} a GPU; {step.tflops:.0f} TFLOP/s a GPU; "
        f"MFU {100 * step.mfu:.1f} % of {gpu.peak_bf16 / 1e12:,.0f} TFLOP/s (bf16, dense); bubble {100 * step.bubble:.1f} %",
        f"{tokens / 1e9:,.1f}B tokens ({config.train.steps:,} steps) take {spent}, saving and evaluating aside.",
    ]
    return lines
