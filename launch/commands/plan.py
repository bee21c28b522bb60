"""pretrain plan"""

import argparse
import shlex
from dataclasses import dataclass
from datetime import timedelta

from parallel.engine import ENGINES
from parallel.mesh import AXES
from parallel.planner.gpus import GIB, find_gpu
from parallel.planner.memory import Memory
from parallel.planner.search import CLOSE, Planned
from parallel.planner.step import Step
from pretrain.config import resolve
from pretrain.planner import SETTINGS, Question, answer, ask, to_overrides

ALL = "all"
ZERO = "deepspeed.zero"
# Terms of memory -> their column in the comparison of engines; the rest is "other".
COLUMNS = {name: name for name in ("weights", "gradients", "optimizer", "activations")}
COLUMNS |= {"recomputed layer": "activations", "logits": "activations"}
UNPROVEN = (
    "Megatron-Core and DeepSpeed: bytes of weights, gradients and optimizer are tested against the engines, speeds are "
    "predictions that no published run of these engines was held against."
)


@dataclass(frozen=True)
class Answer:
    """What was asked, overrides and all, and the layouts that fit, best first."""

    words: list[str]
    question: Question
    found: list[Planned]


def plan(args: argparse.Namespace) -> None:
    """Print the fastest layouts that fit, of one engine, or the best of each."""
    if args.engine == ALL:
        best = compare(args)
    else:
        words = _on_engine(args.overrides, args.engine) if args.engine else args.overrides
        best = _answer(args, words)
        print("\n".join(table(best.question, best.found[: args.top])))
        print()
        print(why(best.found))
        if best.question.config.engine != "torch":
            print(UNPROVEN)
    if args.explain:
        print()
        print("\n".join(explain(best.question, best.found[0])))
    own = [word for word in best.words if word.partition("=")[0] not in SETTINGS]
    print(f"\npretrain run {shlex.join([args.recipe, *own])} {to_overrides(best.question, best.found[0])}")


def compare(args: argparse.Namespace) -> Answer:
    """Print the best layout of each engine side by side, or why it has none; the fastest."""
    able: list[Answer] = []
    unable: dict[str, str] = {}
    for name in ENGINES:
        answers, reason = _of_engine(args, name)
        able += sorted(answers, key=_seconds)[:1]
        if not answers:
            unable[name] = reason
    if not able:
        raise ValueError("no engine can: " + "; ".join(unable.values()))
    able.sort(key=_seconds)
    print("\n".join(side_by_side(able)))
    for name, reason in unable.items():
        print(f"{name}: {reason}")
    print(f"\n{UNPROVEN}")
    return able[0]


def _of_engine(args: argparse.Namespace, name: str) -> tuple[list[Answer], str]:
    """Answers of an engine, of each stage of ZeRO where the command line names none; why there is none."""
    words = _on_engine(args.overrides, name)
    stages = [3, 2, 1] if name == "deepspeed" and not any(_key(word) == ZERO for word in words) else []
    answers, reasons = [], []
    for own in [[*words, f"{ZERO}={stage}"] for stage in stages] or [words]:
        try:
            answers.append(_answer(args, own))
        except ValueError as error:
            reasons.append(str(error))
    return answers, reasons[0] if reasons else ""


def _answer(args: argparse.Namespace, words: list[str]) -> Answer:
    question = ask(*resolve(args.recipe, words), args.gpus, find_gpu(args.gpu))
    return Answer(words, question, answer(question))


def _on_engine(words: list[str], name: str) -> list[str]:
    return [*(word for word in words if _key(word) != "engine"), f"engine={name}"]


def _key(word: str) -> str:
    return word.partition("=")[0].strip()


def _seconds(one: Answer) -> float:
    return one.found[0].step.seconds


def side_by_side(answers: list[Answer]) -> list[str]:
    """One line an engine; memory in GiB of the fullest GPU."""
    columns = [*dict.fromkeys(COLUMNS.values()), "other"]
    lines = [
        *heading(answers[0].question),
        f"{'engine':9} {'tokens/s':>11} {'MFU':>6} {'days':>7} {'GiB/GPU':>8} = "
        f"{' + '.join(f'{column:>{max(5, len(column))}}' for column in columns)}   layout",
    ]
    for one in answers:
        best, config = one.found[0], one.question.config
        grouped = by_column(best.memory)
        terms = " + ".join(f"{grouped[column] / GIB:>{max(5, len(column))}.1f}" for column in columns)
        zero = f"{ZERO}={config.deepspeed.zero} " if config.engine == "deepspeed" else ""
        lines.append(
            f"{config.engine:9} {best.step.tokens_per_s:>11,.0f} {100 * best.step.mfu:>5.1f}% "
            f"{config.train.steps * best.step.seconds / 86400:>7.1f} {best.memory.total / GIB:>8.1f} = {terms}   "
            f"{zero}{to_overrides(one.question, best)}"
        )
    return lines


def by_column(memory: Memory) -> dict[str, float]:
    """Bytes of each of `COLUMNS`, and of the rest."""
    found = dict.fromkeys([*COLUMNS.values(), "other"], 0.0)
    for name, size in memory.terms.items():
        found[COLUMNS.get(name, "other")] += size
    return found


def heading(question: Question) -> list[str]:
    config, space = question.config, question.space
    return [
        f"{config.model.num_parameters() / 1e9:.2f}B parameters, {config.train.global_batch} sequences of "
        f"{config.data.seq_len} tokens a step, on {space.gpus} x {space.gpu.name} ({space.gpu.memory / GIB:.0f} GiB)",
        "",
    ]


def table(question: Question, found: list[Planned]) -> list[str]:
    """One line a layout, best first."""
    config, space = question.config, question.space
    ep = f" {'ep':>3}" if space.plan.experts else ""
    lines = [
        *heading(question),
        f"{'':>3} {'pp':>3} {'repl':>4} {'shard':>5} {'cp':>3} {'tp':>3}{ep} {'micro':>5} {'recompute':>9} "
        f"{'schedule':>18} {'GiB/GPU':>8} {'tokens/s':>11} {'TFLOP/s':>8} {'MFU':>6} {'bubble':>7} {'days':>7}",
    ]
    for rank, planned in enumerate(found, 1):
        layout, step = planned.layout, planned.step
        schedule = "-" if layout.pp == 1 else layout.schedule + (f" x{layout.chunks}" if layout.chunks > 1 else "")
        cp = f"{layout.cp}{layout.cp_method[0]}" if layout.cp > 1 else "1"
        ep = f" {layout.ep:>3}" if space.plan.experts else ""
        lines.append(
            f"{rank:>3} {layout.pp:>3} {layout.dp_replicate:>4} {layout.dp_shard:>5} {cp:>3} {layout.tp:>3}{ep} "
            f"{layout.micro_batch:>5} {layout.recompute:>9} {schedule:>18} {planned.memory.total / GIB:>8.1f} "
            f"{step.tokens_per_s:>11,.0f} {step.tflops:>8.0f} {100 * step.mfu:>5.1f}% {100 * step.bubble:>6.1f}% "
            f"{config.train.steps * step.seconds / 86400:>7.1f}"
        )
    return lines


def why(found: list[Planned]) -> str:
    """Why the first is best."""
    best = found[0]
    if len(found) == 1:
        return "It is the only set of degrees that fits."
    fastest = min(found, key=lambda planned: planned.step.seconds)
    if fastest is not best:
        slower = 100 * (best.step.seconds / fastest.step.seconds - 1)
        return (
            f"The first is the simplest of those within {100 * (CLOSE - 1):.0f} % of the fastest, which predictions "
            f"can hardly tell apart: its step is {slower:.1f} % longer."
        )
    second = found[1]
    lost = {name: seconds - best.step.parts.get(name, 0.0) for name, seconds in second.step.parts.items()}
    worst = max(lost, key=lambda name: lost[name])
    slower = 100 * (second.step.seconds / best.step.seconds - 1)
    return (
        f"The first is the fastest: the second's step is {slower:.1f} % longer; it loses most in {worst} "
        f"(+{1000 * lost[worst]:.0f} ms of a step of {1000 * best.step.seconds:.0f} ms)."
    )


def explain(question: Question, planned: Planned) -> list[str]:
    """All terms of one layout."""
    layout, step, gpu = planned.layout, planned.step, question.space.gpu
    degrees = ", ".join(f"{axis} {getattr(layout, axis)}" for axis in AXES)
    return [
        f"Layout: {degrees}; {planned.setting.microbatches} micro-batches of {layout.micro_batch} a step",
        "",
        f"Memory of the fullest GPU, of {gpu.memory / GIB:.1f} GiB",
        *(f"  {name:40} {size / GIB:>9.2f} GiB" for name, size in planned.memory.terms.items() if size),
        f"  {'total':40} {planned.memory.total / GIB:>9.2f} GiB",
        "",
        "Time of a step",
        *(
            f"  {name:40} {1000 * seconds:>9.1f} ms {100 * seconds / step.seconds:>6.1f} %"
            for name, seconds in step.parts.items()
            if seconds
        ),
        f"  {'total':40} {1000 * step.seconds:>9.1f} ms",
        "",
        *_communication(step),
        "",
        *_summary(question, step),
    ]


def _communication(step: Step) -> list[str]:
    """MiB: what one process gives or gets, whichever is more; GiB: what it sends in all."""
    title = "Communication of a GPU in a step"
    return [
        f"{title:51} {'axis':13} {'times':>8} {'MiB each':>9} {'GiB sent':>9} {'link':>8} {'busy ms':>9}",
        *(
            f"  {t.kind:14} {t.what:34} {t.axis:13} {t.count:>8,.0f} {t.size / 2**20:>9.1f} "
            f"{t.count * t.sent / GIB:>9.2f} {t.link:>8} {1000 * t.count * t.seconds:>9.1f}"
            for t in step.traffic
        ),
    ]


def _summary(question: Question, step: Step) -> list[str]:
    config, gpu = question.config, question.space.gpu
    tokens = config.train.steps * config.train.global_batch * config.data.seq_len
    spent = timedelta(seconds=round(config.train.steps * step.seconds))
    return [
        f"{step.tokens_per_s:,.0f} tokens/s, {step.tokens_per_s / step.gpus:,.0f} a GPU; {step.tflops:.0f} TFLOP/s a "
        f"GPU; MFU {100 * step.mfu:.1f} % of {gpu.peak_bf16 / 1e12:,.0f} TFLOP/s (bf16, dense); "
        f"bubble {100 * step.bubble:.1f} %",
        f"{tokens / 1e9:,.1f}B tokens ({config.train.steps:,} steps) take {spent}, saving and evaluating aside.",
    ]
