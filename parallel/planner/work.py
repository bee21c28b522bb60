"""What one process computes in one layer, and how long it waits there for others."""

from dataclasses import dataclass

from parallel.planner.gpus import Compute
from parallel.planner.kernels import fused_attention, plain_attention, product
from parallel.planner.layout import Setting, local
from parallel.planner.links import Traffic
from parallel.planner.pieces import degrees_of, held
from parallel.planner.shape import LayerShape, Matrix
from parallel.planner.traffic import BACKWARD, FORWARD, layer_traffic


@dataclass(frozen=True)
class Pass:
    """Seconds of forward or of backward of one layer and micro-batch."""

    matrix: float
    attention: float
    elementwise: float
    exposed: float  # waiting for tensor, context and expert parallelism
    again: float = 0.0  # recomputation

    @property
    def seconds(self) -> float:
        return self.matrix + self.attention + self.elementwise + self.exposed + self.again


@dataclass(frozen=True)
class Work:
    """A layer and micro-batch on one process. host: seconds that the host needs to launch the kernels of forward; twice
    that of backward."""

    forward: Pass
    backward: Pass
    host: float


def layer_work(setting: Setting, layer: LayerShape) -> Work:
    gpu, kernels = setting.gpu, setting.kernels
    products = [_product_seconds(setting, layer, m) for m in layer.matrices]
    scores = _attention_seconds(setting, layer)
    launches = _launches(setting, layer)
    moved = _elementwise_bytes(setting, layer)
    if setting.program.casts:
        moved += setting.program.casts * held(layer.parameters, degrees_of(setting), True).whole
    moved /= gpu.hbm * kernels.hbm
    gaps = launches * kernels.gap
    exposed = _exposed(setting, layer, scores)
    forward = Pass(sum(f for f, _ in products), scores[FORWARD], moved + gaps, exposed[FORWARD])
    backward = Pass(
        sum(b for _, b in products),
        scores[BACKWARD],
        2 * moved + 2 * gaps,
        exposed[BACKWARD],
        _again(setting, forward),
    )
    return Work(forward, backward, launches * kernels.host)


def head_work(setting: Setting) -> tuple[float, float]:
    """Seconds of head and loss of a micro-batch: products, and logits read and written."""
    shape, program, gpu, kernels = setting.shape, setting.program, setting.gpu, setting.kernels
    columns = shape.vocab / setting.layout.tp
    rows = min(setting.tokens, program.chunk or setting.tokens)
    turns = setting.tokens / rows
    compute: Compute = "fp32" if program.compute == "fp32" else "bf16"
    one = product(rows, shape.hidden, columns, compute, gpu, kernels)
    one += product(rows, columns, shape.hidden, compute, gpu, kernels)
    one += product(shape.hidden, rows, columns, compute, gpu, kernels)
    passes = (14.0 if program.fused else 30.0) * columns * setting.tokens
    if program.chunk:  # the gradient of the matrix is added to once a chunk
        passes += turns * 2 * program.gradient * shape.hidden * columns
    return one * turns, passes / (gpu.hbm * kernels.hbm)


def _product_seconds(setting: Setting, layer: LayerShape, m: Matrix) -> tuple[float, float]:
    layout, compute, gpu, kernels = setting.layout, setting.program.compute, setting.gpu, setting.kernels
    inner, columns = local(m, layout, layer)
    rows, many = setting.tokens * m.active, 1
    if m.copies > 1:  # tokens of the other ep processes come here, and are shared out
        many = max(1, m.copies // layout.ep)
        rows *= max(1, layout.ep / m.copies) / many
    forward = product(rows, inner, columns, compute, gpu, kernels)
    backward = product(rows, columns, inner, compute, gpu, kernels)
    backward += product(inner, rows, columns, compute, gpu, kernels)
    return forward * many, backward * many


def _attention_seconds(setting: Setting, layer: LayerShape) -> tuple[float, float]:
    layout, program, gpu, kernels = setting.layout, setting.program, setting.gpu, setting.kernels
    if not layer.heads:
        return 0.0, 0.0
    if program.flash:
        flops = layer.scores / 3 * setting.tokens / layout.tp
        native = program.native_attention
        return fused_attention(flops, layer.qk_dim, layer.v_dim, program.compute, native, gpu, kernels)
    heads = layer.heads / layout.tp
    return plain_attention(layout.micro_batch, heads, setting.shape.seq_len, layer.qk_dim, gpu, kernels)


def _launches(setting: Setting, layer: LayerShape) -> float:
    """Kernels of forward."""
    layout, program = setting.layout, setting.program
    launches = 8.0 + 2 * layer.norms + (60 if layer.experts else 0)
    for m in layer.matrices:
        if m.copies > 1:  # each expert's input is cast on its own
            held = max(1, m.copies // layout.ep)
            launches += held * (1 if program.compute in ("fp32", "bf16") else 4)
        launches += 1
    if not program.flash:
        launches += 5
    if _rings(setting, layer):
        launches += 6 * layout.cp
    return launches if program.fused else 2.5 * launches


def _rings(setting: Setting, layer: LayerShape) -> bool:
    return setting.layout.cp > 1 and setting.layout.cp_method == "ring" and layer.heads > 0


def _elementwise_bytes(setting: Setting, layer: LayerShape) -> float:
    """Bytes that norms, residual sums, rotations, activation functions and casts of one layer move in forward."""
    program, stream = setting.program, setting.stream
    wide, narrow = program.residual, program.saved
    total = layer.norms * stream * (wide + narrow) + 2 * stream * (2 * wide + narrow)
    for m in layer.matrices:
        inner, columns = local(m, setting.layout, layer)
        if m.style == "row":
            total += narrow * inner * m.active
        else:  # queries and keys are read and written by their rotation
            rotated = layer.heads > 0 and m.group.endswith("attention")
            total += narrow * (2 if rotated else 1) * columns * m.active
        if program.compute in ("fp8", "fp4"):  # largest value, cast, transpose of inputs; of gradients in backward
            total += 2.0 * inner * m.active
    if layer.top_k:  # permuted to experts and back
        total += 4 * narrow * setting.shape.hidden * layer.top_k
    if not program.fused:
        total *= 2.0
    if _rings(setting, layer):  # each turn's part of the output is merged into an fp32 sum: both read, the sum written
        total += setting.layout.cp * layer.heads / setting.layout.tp * layer.v_dim * 12.0
    return total * setting.tokens


def _again(setting: Setting, forward: Pass) -> float:
    layout, program = setting.layout, setting.program
    share = 1 / layout.recompute_every
    if layout.recompute == "full":
        return share * (forward.matrix + forward.attention + forward.elementwise)
    if layout.recompute == "none":
        return 0.0
    if program.attention_again:
        return share * forward.attention
    return share * (forward.elementwise * 0.8 + forward.matrix * program.matmul_share)


def _exposed(setting: Setting, layer: LayerShape, scores: tuple[float, float]) -> list[float]:
    """Seconds that forward and backward of a layer wait for tensor, context and expert parallelism."""
    kernels = setting.kernels
    found, ring = [0.0, 0.0], [0.0, 0.0]
    for traffic, direction in layer_traffic(setting, layer):
        if traffic.kind == "send":
            ring[direction] += traffic.seconds * traffic.count
        else:
            found[direction] += traffic.seconds * traffic.count * (1 - _hidden_share(setting, traffic))
    for direction, busy in enumerate(scores):  # beside the attention of the turn before
        found[direction] += max(0.0, ring[direction] - busy) + kernels.contention * min(ring[direction], busy)
    return found


def _hidden_share(setting: Setting, traffic: Traffic) -> float:
    if not setting.program.tp_overlap:
        return 0.0
    return {"tp": setting.kernels.tp_hidden, "ep": setting.kernels.ep_hidden}.get(traffic.axis, 0.0)
