"""How long a training step takes under a layout, from the model's shape, a GPU's table and first principles.

A step is its slowest pipeline stage: products and attention as in `parallel.planner.kernels`; elementwise work as the
bytes it moves; collectives as in `parallel.planner.links`, hidden behind compute where the program overlaps them;
recomputation; the pipeline's bubble; the optimizer's bytes; kernel launches of the host where the device is faster. No
figure belongs to a published run: all constants are in `parallel.planner.gpus`.
"""

from dataclasses import dataclass

from parallel.planner.layout import Part, Setting, bubble
from parallel.planner.links import Traffic, collective
from parallel.planner.pieces import held_by
from parallel.planner.traffic import end_traffic, once_traffic, parameter_traffic, step_traffic
from parallel.planner.work import Pass, Work, head_work, layer_work

OPTIMIZER_SECONDS = 1e-3  # launches, the norm's all-reduce, and the host's turn at the end of a step
HIDING = 0.7  # of a micro-batch, during which what travels once a step can: not in the first layers' part of it
STAGE_SENDS_EXPOSED = {True: 0.3, False: 0.7}  # share of sends between stages that waits, where others overlap or not


@dataclass(frozen=True)
class Step:
    """seconds: of a step. parts: where they go, name -> seconds, in sum `seconds`. traffic: collectives of the slowest
    process. mfu: model FLOPs over the bf16 peak; tflops: the same in TFLOP/s a GPU. bubble: share of the step."""

    seconds: float
    tokens: int
    gpus: int
    parts: dict[str, float]
    traffic: tuple[Traffic, ...]
    bubble: float
    mfu: float
    tflops: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Stage:
    """Seconds of a micro-batch on the process of `part`. waits: for parameters and gradients; ends: for what embedding,
    head and loss send; head: products of the head, and passes over logits."""

    part: Part
    layers: float
    waits: float
    ends: float
    head: tuple[float, float]

    @property
    def seconds(self) -> float:
        return self.layers + self.waits + self.ends + sum(self.head)


def simulate(setting: Setting) -> Step:
    """One step."""
    work = [layer_work(setting, layer) for layer in setting.shape.layer_kinds]
    waits = [_parameter_wait(setting, kind, one) for kind, one in enumerate(work)]
    head = head_work(setting)
    different = {part: _stage(setting, part, work, waits, head) for part in set(setting.parts)}
    stages = [different[part] for part in setting.parts]
    slowest = max(stages, key=lambda stage: stage.seconds)
    microbatches, layout = setting.microbatches, setting.layout
    idle = 0.0
    if layout.pp > 1:
        others = sum(stage.seconds for stage in stages) - slowest.seconds
        idle = others / (layout.pp - 1) * bubble(setting)
    sends = _stage_sends(setting)
    once = _once(setting, slowest)
    seconds = microbatches * slowest.seconds + idle + sends + sum(once.values())
    parts = {
        **_layer_parts(setting, slowest, work),
        "embedding, head and loss: communication": microbatches * slowest.ends,
        "hidden states between stages": sends,
        "pipeline bubble": idle,
        **once,
    }
    parts["waiting for the host"] = max(0.0, seconds - sum(parts.values()))
    tokens = setting.global_batch * setting.shape.seq_len
    rate = setting.shape.flops_per_token * tokens / seconds / layout.gpus
    return Step(
        seconds,
        tokens,
        layout.gpus,
        parts,
        tuple(step_traffic(setting, slowest.part)),
        idle / seconds,
        rate / setting.gpu.peak_bf16,
        rate / 1e12,
    )


def _stage(setting: Setting, part: Part, work: list[Work], waits: list[float], head: tuple[float, float]) -> Stage:
    layers = wait = 0.0
    for count, one, each in zip(part.layers, work, waits, strict=True):
        layers += count * (max(one.forward.seconds, one.host) + max(one.backward.seconds, 2 * one.host))
        wait += count * each
    ends = sum(t.seconds * t.count for t in end_traffic(setting, part))
    return Stage(part, layers, wait, ends, head if part.last else (0.0, 0.0))


def _parameter_wait(setting: Setting, kind: int, work: Work) -> float:
    """Seconds that forward and backward of a layer wait for parameters, and for gradients to leave."""
    waits = {"forward": 0.0, "backward": 0.0}
    for traffic in parameter_traffic(setting, setting.shape.layer_kinds[kind]):
        each = traffic.seconds * traffic.count / setting.microbatches
        if traffic.kind == "reduce-scatter":
            waits["backward"] += each
        elif setting.layout.keep or setting.program.once:
            waits["forward"] += each
        else:
            waits["forward"] += each / 2
            waits["backward"] += each / 2
    if not setting.program.overlap:
        return sum(waits.values())
    forward = _beside(waits["forward"], work.forward.seconds, setting)
    return forward + _beside(waits["backward"], work.backward.seconds, setting)


def _beside(wire: float, busy: float, setting: Setting) -> float:
    """Seconds that communication adds to compute that it overlaps with."""
    return max(0.0, wire - busy) + setting.kernels.contention * min(wire, busy)


def _stage_sends(setting: Setting) -> float:
    """Seconds that stages wait for hidden states and their gradients."""
    layout, program = setting.layout, setting.program
    size = setting.tokens * setting.stream * program.residual
    one = collective(setting, "pp", "send", "hidden states", size)
    share = STAGE_SENDS_EXPOSED[layout.chunks > 1 or program.tp_overlap]
    return one.seconds * one.count * share * 2 * setting.microbatches * layout.chunks


def _once(setting: Setting, slowest: Stage) -> dict[str, float]:
    """What a step does once: gradients and parameters of all layers, the optimizer; of the fullest process."""
    program, layout = setting.program, setting.layout
    fullest = max(set(setting.parts), key=lambda part: held_by(setting, part).whole)
    wire = sum(t.seconds * t.count for t in once_traffic(setting, fullest))
    if program.overlap:
        wire = _beside(wire, HIDING * slowest.seconds, setting)
    cut = layout.shards if program.sharded != "none" else 1
    moved = held_by(setting, fullest).whole / cut * 2 * (program.state + program.weight + program.gradient)
    optimizer = moved / (setting.gpu.hbm * setting.kernels.hbm) + OPTIMIZER_SECONDS
    return {"gradients and parameters, once a step": wire, "optimizer": optimizer}


def _layer_parts(setting: Setting, stage: Stage, work: list[Work]) -> dict[str, float]:
    def over(name: str) -> float:
        """Of all layers and micro-batches, one of the fields of `Pass`."""
        counted = zip(stage.part.layers, work, strict=True)
        return setting.microbatches * sum(n * (_of(w.forward, name) + _of(w.backward, name)) for n, w in counted)

    return {
        "matrix products": over("matrix") + setting.microbatches * stage.head[0],
        "attention": over("attention"),
        "elementwise": over("elementwise") + setting.microbatches * stage.head[1],
        "recomputation": over("again"),
        "tensor, context, expert parallelism": over("exposed"),
        "parameters and gradients (FSDP)": setting.microbatches * stage.waits,
    }


def _of(one: Pass, name: str) -> float:
    value: float = getattr(one, name)
    return value
