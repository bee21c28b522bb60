"""How long a training step takes under a layout, from the model's shape, a GPU's table and first principles.

A step is its slowest pipeline stage: products and attention as in `parallel.planner.kernels`; elementwise work as the bytes it
moves; collectives as in `parallel.planner.links`, hidden behind compute where the program overlaps them; recomputation; the
pipeline's bubble; the optimizer's bytes; kernel launches of the host where the device is faster. No figure belongs to a
published run: all constants are in `parallel.planner.gpus`.
"""

from dataclasses import dataclass

from parallel.planner.gpus import KERNELS, Gpu, Kernels
from parallel.planner.kernels import fused_attention, plain_attention, product
from parallel.planner.layout import Layout, Program, bubble, kv_share, local
from parallel.planner.links import Group, Kind, Traffic, collective, groups
from parallel.planner.memory import held_elements, stage_parameters
from parallel.planner.shape import LayerShape, ModelShape


@dataclass(frozen=True)
class Work:
    """Seconds of one layer and micro-batch on one process: forward, backward and recomputation of products, attention
    and elementwise work; what of tensor, context and expert parallelism is not hidden."""

    matrix: float
    attention: float
    elementwise: float
    again: float
    exposed: float
    forward: float
    backward: float
    launches: float


@dataclass(frozen=True)
class Step:
    """seconds: of a step. parts: where they go, name -> seconds, in sum `seconds`. traffic: collectives of the fullest
    process. mfu: model FLOPs over the bf16 peak; tflops: the same in TFLOP/s a GPU."""

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


def layer_work(
    layer: LayerShape, hidden: int, seq_len: int, layout: Layout, program: Program, gpu: Gpu, kernels: Kernels
) -> Work:
    """One layer, forward and backward."""
    tokens = layout.micro_batch * seq_len / layout.cp
    forward = backward = again_products = 0.0
    launches = 8.0 + 2 * layer.norms + (60 if layer.experts else 0)
    for m in layer.matrices:
        inner, columns = local(m, layout, layer)
        held = max(1, m.copies // layout.ep)
        rows = tokens * m.active / (1 if m.copies == 1 else held)
        if m.copies > 1:
            rows *= layout.ep / max(1, min(layout.ep, m.copies))  # tokens of the other ep processes come here
        many = held if m.copies > 1 else 1
        compute = program.compute
        f = product(rows, inner, columns, compute, gpu, kernels) * many
        b = product(rows, columns, inner, compute, gpu, kernels) + product(inner, rows, columns, compute, gpu, kernels)
        forward += f
        backward += b * many
        again_products += f
        # Each expert's input is cast on its own.
        launches += 1 if m.copies == 1 else 1 + held * (1 if compute == "bf16" else 4)
    heads = layer.heads / layout.tp
    flops = layer.scores / 3 * tokens / layout.tp
    if program.flash:
        scores = fused_attention(flops, layer.qk_dim, layer.v_dim, program.native_attention, gpu, kernels)
    else:
        scores = plain_attention(layout.micro_batch, heads, seq_len, layer.qk_dim, gpu, kernels)
        launches += 5
    moved = elementwise_bytes(layer, hidden, tokens, layout, program) / (gpu.hbm * kernels.hbm)
    if layout.cp > 1 and layout.cp_method == "ring" and layer.heads:
        # Each turn's part of the output is merged into an fp32 sum: both read, the sum written.
        moved += layout.cp * tokens * heads * layer.v_dim * 12.0 / (gpu.hbm * kernels.hbm)
        launches += 6 * layout.cp
    if not program.fused:
        launches *= 2.5
    moved_forward = moved + launches * kernels.gap
    moved_backward = 2 * moved + 2 * launches * kernels.gap
    share = 1 / layout.recompute_every
    again = 0.0
    if layout.recompute == "full":
        again = share * (forward + scores[0] + moved_forward)
    elif layout.recompute == "selective":
        again = share * (moved_forward * 0.8 + again_products * program.matmul_share)
        if program.attention_again:
            again = share * scores[0]
    exposed_forward, exposed_backward = exposed(layer, hidden, tokens, layout, program, gpu, kernels)
    if layout.cp > 1 and layout.cp_method == "ring":
        traffics = layer_traffic(layer, hidden, tokens, layout, program, gpu, kernels)
        ring = ring_waits(traffics, scores, kernels)
        exposed_forward, exposed_backward = exposed_forward + ring[0], exposed_backward + ring[1]
    return Work(
        forward + backward,
        scores[0] + scores[1],
        moved_forward + moved_backward,
        again,
        exposed_forward + exposed_backward,
        forward + scores[0] + moved_forward + exposed_forward,
        backward + scores[1] + moved_backward + exposed_backward + again,
        launches * kernels.host,
    )


def elementwise_bytes(layer: LayerShape, hidden: int, tokens: float, layout: Layout, program: Program) -> float:
    """Bytes that norms, residual sums, rotations, activation functions and casts of one layer move in forward."""
    stream = hidden / (layout.tp if program.sequence else 1)
    r = program.residual
    total = layer.norms * stream * (r + 2) + 2 * stream * (2 * r + 2)
    for m in layer.matrices:
        inner, columns = local(m, layout, layer)
        if m.style == "row":
            total += 2.0 * inner * m.active
        else:
            total += 4.0 * columns * m.active if layer.heads and m.group.endswith("attention") else 2.0 * columns * m.active
        if program.compute != "bf16":  # amax, cast, transpose of inputs; gradients are the factor 2 of backward
            total += 2.0 * inner * m.active
    if layer.top_k:  # permuted to experts and back
        total += 4 * 2.0 * hidden * layer.top_k
    if not program.fused:
        total *= 2.0
    return total * tokens


def exposed(
    layer: LayerShape, hidden: int, tokens: float, layout: Layout, program: Program, gpu: Gpu, kernels: Kernels
) -> tuple[float, float]:
    """Seconds that forward and backward of a layer wait for tensor, context and expert parallelism."""
    found = [0.0, 0.0]
    for traffic, direction in layer_traffic(layer, hidden, tokens, layout, program, gpu, kernels):
        hidden_share = kernels.tp_hidden if traffic.axis == "tp" and program.tp_overlap else 0.0
        if traffic.kind == "send":  # the ring's: beside the attention of the turn before
            continue
        if traffic.axis == "ep" and program.tp_overlap:
            hidden_share = kernels.ep_hidden
        found[direction] += traffic.seconds * traffic.count * (1 - hidden_share)
    return found[0], found[1]


def ring_waits(traffics: list[tuple[Traffic, int]], scores: tuple[float, float], kernels: Kernels) -> list[float]:
    """Seconds that ring attention, forward and backward, waits for keys and values to come round."""
    waits = []
    for direction, busy in enumerate(scores):
        wire = sum(t.seconds * t.count for t, which in traffics if which == direction and t.kind == "send")
        waits.append(max(0.0, wire - busy) + kernels.contention * min(wire, busy))
    return waits


def layer_traffic(
    layer: LayerShape, hidden: int, tokens: float, layout: Layout, program: Program, gpu: Gpu, kernels: Kernels
) -> list[tuple[Traffic, int]]:
    """Collectives of one layer and micro-batch inside its compute; 0: of forward, 1: of backward."""
    found: list[tuple[Traffic, int]] = []
    groups_ = groups(layout, gpu)

    def add(group: Group, kind, what, size, forward, backward):
        for direction, count in enumerate((forward, backward)):
            if count and group.size > 1:
                found.append((collective(group, kind, what, size, gpu, kernels, count), direction))

    wide, narrow = tokens * hidden * program.wire, tokens * hidden * program.saved
    blocks = len({m.group for m in layer.matrices if m.style in ("column", "key_value")})
    share = 1 / layout.recompute_every
    again = share * blocks if layout.recompute == "full" else 0.0
    if layout.tp > 1 and program.sequence:
        # Where only parts were kept, backward gathers the inputs again for the gradients of the weights.
        kept = layout.recompute == "none" or program.regather or layout.recompute == "full"
        add(groups_["tp"], "all-gather", "activations", wide, blocks, again + (0 if kept else share * blocks))
        add(groups_["tp"], "all-gather", "gradients of activations", narrow, 0, (2 if program.regather else 1) * blocks)
        # Nothing needs what the last product of a layer gives a second time.
        add(groups_["tp"], "reduce-scatter", "activations", narrow, blocks, max(0.0, again - share))
        add(groups_["tp"], "reduce-scatter", "gradients of activations", wide, 0, blocks)
    elif layout.tp > 1:
        add(groups_["tp"], "all-reduce", "activations", narrow, blocks, blocks + again)
    if layout.cp > 1 and layer.heads:
        q = tokens * layer.heads / layout.tp * layer.qk_dim * 2.0
        kv = tokens * layer.heads * kv_share(layer, layout.tp) * (layer.qk_dim + layer.v_dim) * 2.0
        kv *= layer.kv_heads / layer.heads
        if layout.cp_method == "ring":
            turns = layout.cp - 1
            add(groups_["cp"], "send", "keys and values", kv, turns, turns * (1 + (again > 0) * share))
            add(groups_["cp"], "send", "their gradients", kv, 0, turns + 1)
        else:
            share_of = 1 + (again > 0) * share
            add(groups_["cp"], "all-to-all", "queries, keys, values", q + kv, 1, share_of)
            add(groups_["cp"], "all-to-all", "attention's output", q, 1, share_of)
    if layer.experts and layout.ep > 1:
        routed = tokens * layer.top_k * hidden * (1.5 if program.compute != "bf16" else 2.0)
        add(groups_["ep"], "all-to-all", "tokens to experts and back", routed, 2, 2)
    return found


def head_work(shape: ModelShape, layout: Layout, program: Program, gpu: Gpu, kernels: Kernels) -> tuple[float, float]:
    """Seconds of head and loss of a micro-batch: products, and logits read and written."""
    tokens = layout.micro_batch * shape.seq_len / layout.cp
    columns = shape.vocab / layout.tp
    rows = min(tokens, program.chunk or tokens)
    turns = tokens / rows
    one = product(rows, shape.hidden, columns, "bf16", gpu, kernels)
    one += product(rows, columns, shape.hidden, "bf16", gpu, kernels)
    one += product(shape.hidden, rows, columns, "bf16", gpu, kernels)
    passes = (14.0 if program.fused else 30.0) * columns * tokens
    if program.chunk:  # the gradient of the matrix is added to once a chunk
        passes += turns * 2 * program.gradient * shape.hidden * columns
    return one * turns, passes / (gpu.hbm * kernels.hbm)




def end_traffic(
    shape: ModelShape, layout: Layout, program: Program, gpu: Gpu, kernels: Kernels, first: bool, last: bool
) -> list[Traffic]:
    """Collectives of embedding, head and loss of one micro-batch."""
    found: list[Traffic] = []
    groups_ = groups(layout, gpu)

    def add(axis: str, kind: Kind, what: str, size: float, count: float = 1) -> None:
        if groups_[axis].size > 1 and count:
            found.append(collective(groups_[axis], kind, what, size, gpu, kernels, count))

    if program.sharded == "all" and not program.once:
        elements = sum(sum(held_elements([p], shape, layout)) for p in stage_parameters(shape, (), first, last))
        add("shards", "all-gather", "embedding and head", elements * program.ends)
        add("shards", "reduce-scatter", "gradients of embedding and head", elements * program.reduced)
    stream = layout.micro_batch * shape.seq_len / layout.cp * shape.hidden
    kinds: tuple[Kind, Kind] = ("all-gather", "reduce-scatter") if program.sequence else ("all-reduce", "all-reduce")
    if first:
        add("tp", kinds[1], "embedded tokens", stream * program.residual)
        if program.sequence:
            add("tp", kinds[0], "gradients of embedded tokens", stream * program.residual)
    if last:
        if program.sequence:
            add("tp", kinds[0], "hidden states for the loss", stream * program.saved)
        add("tp", kinds[1], "gradients of hidden states", stream * program.saved)
    return found


def simulate(
    shape: ModelShape,
    layout: Layout,
    program: Program,
    gpu: Gpu,
    global_batch: int,
    stages: list[list[int]],
    kernels: Kernels = KERNELS,
) -> Step:
    """One step. stages: for each pipeline process, how many layers of each kind in `shape.kinds` it has."""
    microbatches = max(1, global_batch // (layout.data * layout.micro_batch))
    work = [
        layer_work(layer, shape.hidden, shape.seq_len, layout, program, gpu, kernels) for layer in shape.layer_kinds
    ]
    head, logits = head_work(shape, layout, program, gpu, kernels)
    waits, traffic = _data_parallel(shape, layout, program, gpu, kernels, microbatches, work, stages)
    times, ends, end_traffics = [], [], []
    for rank, counts in enumerate(stages):
        last = rank == len(stages) - 1
        busy = 0.0
        for count, one, wait in zip(counts, work, waits, strict=True):
            device_forward = max(one.forward, one.launches) + wait[0]
            device_backward = max(one.backward, 2 * one.launches) + wait[1]
            busy += count * (device_forward + device_backward)
        of_ends = end_traffic(shape, layout, program, gpu, kernels, rank == 0, last)
        ends.append(sum(t.seconds * t.count for t in of_ends))
        times.append(busy + ends[-1] + (head + logits if last else 0.0))
        end_traffics.append([_times(t, microbatches * t.count) for t in of_ends])
    slowest = max(times)
    worst = times.index(slowest)
    tokens = layout.micro_batch * shape.seq_len / layout.cp
    send = collective(
        groups(layout, gpu)["pp"],
        "send",
        "hidden states and their gradients",
        tokens * shape.hidden * program.residual / (layout.tp if program.sequence else 1),
        gpu,
        kernels,
        2 * microbatches * layout.chunks,
    )
    inside = [
        _times(t, t.count * count * microbatches)
        for layer, count in zip(shape.layer_kinds, stages[worst], strict=True)
        for t, _ in layer_traffic(layer, shape.hidden, tokens, layout, program, gpu, kernels)
    ]
    traffic = [*inside, *traffic, *end_traffics[worst], send]
    p2p = send.seconds * send.count * (0.3 if layout.chunks > 1 or program.tp_overlap else 0.7)
    idle = (sum(times) - slowest) / layout.chunks / max(1, layout.pp - 1) if layout.pp > 1 else 0.0
    idle *= bubble(layout) * layout.chunks
    compute = microbatches * slowest
    after, after_traffic = _after(shape, layout, program, gpu, kernels, slowest, stages)
    traffic += after_traffic
    seconds = (compute + idle + p2p + sum(after.values())) * (1 + kernels.straggle)
    parts = _parts(stages[worst], work, waits, microbatches, (head, logits) if worst == len(stages) - 1 else (0.0, 0.0))
    parts["embedding, head and loss: communication"] = microbatches * ends[worst]
    parts["hidden states between stages"] = p2p
    parts["pipeline bubble"] = idle
    parts |= after
    parts["waiting for the host"] = max(0.0, seconds - sum(parts.values()))
    total = global_batch * shape.seq_len
    rate = shape.flops_per_token * total / seconds / layout.gpus
    return Step(
        seconds, total, layout.gpus, parts, tuple(t for t in traffic if t.count), idle / seconds, rate / gpu.peak_bf16,
        rate / 1e12,
    )


def _parts(counts, work, waits, microbatches, head):  # type: ignore[no-untyped-def]
    def over(name: str) -> float:
        return microbatches * sum(n * getattr(one, name) for n, one in zip(counts, work, strict=True))

    return {
        "matrix products": over("matrix") + microbatches * head[0],
        "attention": over("attention"),
        "elementwise": over("elementwise") + microbatches * head[1],
        "recomputation": over("again"),
        "tensor, context, expert parallelism": over("exposed"),
        "parameters and gradients (FSDP)": microbatches * sum(n * sum(w) for n, w in zip(counts, waits, strict=True)),
    }


def _data_parallel(shape, layout, program, gpu, kernels, microbatches, work, stages):  # type: ignore[no-untyped-def]
    """Seconds that forward and backward of one layer of each kind wait for gathered parameters; the collectives."""
    waits, traffic = [], []
    group = groups(layout, gpu)["shards"]
    expert_group = groups(layout, gpu)["expert shards"]
    most = [max(counts[i] for counts in stages) for i in range(len(work))]
    for index, (layer, one) in enumerate(zip(shape.layer_kinds, work, strict=True)):
        if program.sharded != "all" or group.size == 1:
            waits.append((0.0, 0.0))
            continue
        plain, experts = held_elements(layer.parameters, shape, layout)
        times = 1.0 if program.once else microbatches
        gather = scatter = 0.0
        for which, elements in ((group, plain), (expert_group, experts)):
            if not elements or which.size == 1:
                continue
            a = collective(which, "all-gather", "parameters", elements * program.gathered, gpu, kernels)
            s = collective(which, "reduce-scatter", "gradients", elements * program.reduced, gpu, kernels)
            gathers = times * (1 if layout.keep else 2) * most[index]
            traffic += [_times(a, gathers), _times(s, times * most[index])]
            gather += a.seconds
            scatter += s.seconds
        share = 1 / microbatches if program.once else 1.0
        forward, backward = gather * share, (scatter + (0.0 if layout.keep else gather)) * share
        waits.append(
            tuple(
                max(wire - busy, 0.0) + kernels.contention * min(wire, busy) if program.overlap else wire
                for wire, busy in ((forward, one.forward), (backward, one.backward))
            )
        )
    return waits, traffic


def _after(shape, layout, program, gpu, kernels, slowest, stages):  # type: ignore[no-untyped-def]
    """What a step does once: embedding and head gathered, replicas' gradients summed, the optimizer."""
    traffic = []
    all_groups = groups(layout, gpu)
    elements = 0.0
    for rank, counts in enumerate(stages):
        mine = sum(
            n * sum(held_elements(layer.parameters, shape, layout))
            for n, layer in zip(counts, shape.layer_kinds, strict=True)
        )
        if rank == 0:
            mine += sum(held_elements(shape.first, shape, layout))
        if rank == len(stages) - 1 and not (shape.tied and len(stages) == 1):
            mine += sum(held_elements(shape.last, shape, layout))
        elements = max(elements, mine)
    ends = (*shape.first, *(p for p in shape.last if not (shape.tied and p.style == "head" and layout.pp == 1)))
    end_elements = max(
        sum(held_elements(part, shape, layout)) for part in ((ends,) if layout.pp == 1 else (shape.first, shape.last))
    )
    wire = 0.0
    shards = all_groups["shards"]
    cut = layout.shards if program.sharded != "none" else 1
    if program.sharded == "all" and program.once:
        for kind, what, size in (
            ("all-gather", "embedding and head", program.ends),
            ("reduce-scatter", "gradients of embedding and head", program.reduced),
        ):
            t = collective(shards, kind, what, end_elements * size, gpu, kernels)
            traffic.append(t)
            wire += t.seconds
    elif program.sharded != "all":
        reduce = "all-reduce" if program.sharded == "none" else "reduce-scatter"
        traffic.append(collective(shards, reduce, "gradients", elements * program.reduced, gpu, kernels))
        if program.sharded != "none":
            traffic.append(collective(shards, "all-gather", "parameters", elements * program.gathered, gpu, kernels))
        wire = sum(t.seconds for t in traffic)
    replicate = all_groups["dp_replicate"]
    if replicate.size > 1:
        t = collective(replicate, "all-reduce", "gradients of replicas", elements / cut * program.reduced, gpu, kernels)
        traffic.append(t)
        wire += t.seconds
    if program.overlap:
        wire = max(0.0, wire - 0.7 * slowest) + kernels.contention * min(wire, 0.7 * slowest)
    moved = elements / cut * (2 * program.state + 2 * program.weight + 2 * program.gradient)
    optimizer = moved / (gpu.hbm * kernels.hbm) + 1e-3
    return {"gradients and parameters, once a step": wire, "optimizer": optimizer}, traffic


def _times(traffic: Traffic, count: float) -> Traffic:
    return Traffic(traffic.axis, traffic.kind, traffic.what, count, traffic.bytes, traffic.link, traffic.seconds)
