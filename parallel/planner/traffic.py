"""What a training step communicates: which collectives, how often, of how many bytes.

Counts and sizes are exact for the torch engine (`tests/parallel/planner/test_traffic.py`), bytes for the other engines
(`tests/parallel/planner/test_engines.py`); for other programs they are those of Megatron-LM and of FSDP.
"""

from collections import Counter
from functools import lru_cache
from math import ceil, lcm

from parallel.planner.layout import Part, Setting, kv_share
from parallel.planner.links import Kind, Traffic, collective
from parallel.planner.pieces import Degrees, degrees_of, held, held_by, held_ends, is_partial, stage_parameters
from parallel.planner.shape import LayerShape, Parameter

FORWARD, BACKWARD = 0, 1


def step_traffic(setting: Setting, part: Part) -> list[Traffic]:
    """All that a process of `part` sends in a step; scalars (counts, loss, norm) aside."""
    found, microbatches = [], setting.microbatches
    for count, layer in zip(part.layers, setting.shape.layer_kinds, strict=True):
        if count:
            found += [t.times(count * microbatches) for t, _ in layer_traffic(setting, layer)]
            found += [t.times(count) for t in parameter_traffic(setting, layer)]
    found += [t.times(microbatches) for t in end_traffic(setting, part)]
    found += once_traffic(setting, part)
    found += pipeline_traffic(setting, part)
    return [t for t in found if t.count]


def layer_traffic(setting: Setting, layer: LayerShape) -> list[tuple[Traffic, int]]:
    """Collectives of one layer and micro-batch inside its compute, of forward and of backward."""
    layout, found = setting.layout, []
    for counts, what in (
        *_tensor_traffic(setting, layer),
        *_context_traffic(setting, layer),
        *_expert_traffic(setting, layer),
    ):
        for direction, count in enumerate(counts):
            axis, kind, name, size = what
            if count and getattr(layout, axis) > 1:
                found.append((collective(setting, axis, kind, name, size, count), direction))
    return found


# Times in forward and in backward; axis, kind, name, bytes.
Item = tuple[tuple[float, float], tuple[str, Kind, str, float]]


def _tensor_traffic(setting: Setting, layer: LayerShape) -> list[Item]:
    layout, program = setting.layout, setting.program
    if layout.tp == 1:
        return []
    wide, narrow = (setting.tokens * setting.shape.hidden * size for size in (program.wire, program.saved))
    blocks = len({m.group for m in layer.matrices if m.style in ("column", "key_value") and m.copies == 1})
    share = 1 / layout.recompute_every
    again = share * blocks if layout.recompute == "full" else 0.0
    if not program.sequence:
        return [((blocks, blocks + again), ("tp", "all-reduce", "activations", narrow))]
    # Where only parts were kept, backward gathers the inputs again for the gradients of the weights.
    kept = layout.recompute == "none" or program.regather or layout.recompute == "full"
    gathers = again + (0 if kept else share * blocks)
    return [
        ((blocks, gathers), ("tp", "all-gather", "activations", wide)),
        ((0, (2 if program.regather else 1) * blocks), ("tp", "all-gather", "gradients of activations", narrow)),
        # Nothing needs what the last product of a layer gives a second time.
        ((blocks, max(0.0, again - share)), ("tp", "reduce-scatter", "activations", narrow)),
        ((0, blocks), ("tp", "reduce-scatter", "gradients of activations", wide)),
    ]


def _context_traffic(setting: Setting, layer: LayerShape) -> list[Item]:
    layout = setting.layout
    if layout.cp == 1 or not layer.heads:
        return []
    width = setting.program.saved
    twice = 1 + (1 / layout.recompute_every if layout.recompute == "full" else 0.0)
    heads, kv_heads = layer.heads / layout.tp, layer.kv_heads * kv_share(layer, layout.tp)
    if layout.cp_method == "ring":
        turns = layout.cp - 1
        kv = setting.tokens * kv_heads * (layer.qk_dim + layer.v_dim) * width
        return [
            ((turns, turns * twice), ("cp", "send", "keys and values", kv)),
            ((0, turns + 1), ("cp", "send", "their gradients", kv)),
        ]
    kv_heads = lcm(round(kv_heads), layout.cp)  # repeated where they are too few
    query, out = (setting.tokens * heads * dim * width for dim in (layer.qk_dim, layer.v_dim))
    kv = setting.tokens * kv_heads * (layer.qk_dim + layer.v_dim) * width
    return [
        ((1, twice), ("cp", "all-to-all", "queries, keys, values", query + kv)),
        ((1, twice), ("cp", "all-to-all", "attention's output", out)),
    ]


def _expert_traffic(setting: Setting, layer: LayerShape) -> list[Item]:
    if not layer.experts:
        return []
    layout, program = setting.layout, setting.program
    size = program.saved * (1.0 if program.compute in ("fp32", "bf16") else 0.75)  # there in 8 bits, back in 16
    routed = setting.tokens * layer.top_k * setting.stream * size
    forward = 2 + (2 / layout.recompute_every if layout.recompute == "full" else 0)
    found: list[Item] = [((2, forward), ("ep", "all-to-all", "tokens to experts and back", routed))]
    if layout.expert_tp:  # each process has a part of every expert, for the tokens of all
        found.append(((2, forward), ("tp", "all-to-all", "tokens to parts of experts and back", routed * layout.tp)))
    return found


def end_traffic(setting: Setting, part: Part) -> list[Traffic]:
    """Collectives of embedding, head and loss of one micro-batch."""
    program, layout = setting.program, setting.layout
    found: list[Traffic] = []
    if program.sharded == "all" and not program.once and layout.shards > 1:
        elements = held_ends(setting, part).gathered
        found += _gather_and_reduce(setting, elements, "embedding and head", program.ends)
    if layout.tp == 1:
        return found
    stream = setting.tokens * setting.shape.hidden

    def add(kind: Kind, what: str, size: float, count: float = 1) -> None:
        found.append(collective(setting, "tp", kind, what, size / count, count))

    kinds: tuple[Kind, Kind] = ("all-gather", "reduce-scatter") if program.sequence else ("all-reduce", "all-reduce")
    if part.first:
        add(kinds[1], "embedded tokens", stream * program.residual)
        if program.sequence:
            add(kinds[0], "gradients of embedded tokens", stream * program.residual)
    if part.last:
        chunks = ceil(setting.tokens / program.chunk) if program.chunk else 1
        if program.sequence:
            add(kinds[0], "hidden states for the loss", stream * program.saved, chunks)
        add(kinds[1], "gradients of hidden states", stream * program.saved, chunks)
        add("all-gather", "log-sums and targets' logits", 2 * setting.tokens * layout.tp * 4, chunks)
    return found


def parameter_traffic(setting: Setting, layer: LayerShape) -> list[Traffic]:
    """FSDP: parameters gathered and gradients reduced of one layer, counted over a step."""
    layout, program = setting.layout, setting.program
    if program.sharded != "all" or layout.shards == 1:
        return []
    found = []
    times = 1.0 if program.once else setting.microbatches
    gathers = times * (1 if layout.keep or program.once else 2 - _still_there(setting))
    own_group = layout.ep > 1  # experts that expert parallelism has cut are gathered on their own
    for experts, axis in ((False, "shards"), (True, "expert shards")):
        chosen = tuple(p for p in layer.parameters if (p.experts and own_group) == experts)
        elements = held(chosen, degrees_of(setting), True).gathered if chosen else 0.0
        if elements:
            small = sum(p.elements for p in chosen if p.elements <= program.persistent)  # gathered once a step
            size = (elements - small * (1 - 1 / gathers)) * program.gathered
            gather = collective(setting, axis, "all-gather", "parameters", size, gathers)
            scatter = collective(setting, axis, "reduce-scatter", "gradients", elements * program.reduced, times)
            found += [gather, scatter]
    return [t for t in found if t.count]


def _still_there(setting: Setting) -> float:
    """Share of the parameters that backward finds gathered still: those needed again within `live` elements, there and
    back."""
    live, whole = setting.program.live, max(1, setting.shape.parameters)
    return min(1.0, live / whole)


def _gather_and_reduce(setting: Setting, elements: float, what: str, size: float) -> list[Traffic]:
    reduced = elements * setting.program.reduced
    return [
        collective(setting, "shards", "all-gather", what, elements * size),
        collective(setting, "shards", "reduce-scatter", f"gradients of {what}", reduced),
    ]


def once_traffic(setting: Setting, part: Part) -> list[Traffic]:
    """What a step sends once for all layers."""
    layout, program = setting.layout, setting.program
    everything, ends = held_by(setting, part), held_ends(setting, part)
    found: list[Traffic] = []
    if program.sharded == "all":
        if program.once and ends.whole:
            found += _gather_and_reduce(setting, ends.gathered, "embedding and head", program.ends)
        if layout.dp_replicate > 1:
            found += _replica_traffic(setting, part)
    else:
        kind: Kind = "all-reduce" if program.sharded == "none" or not program.scatter else "reduce-scatter"
        times = setting.microbatches if program.sharded == "gradients" else 1
        found.append(collective(setting, "shards", kind, "gradients", everything.whole * program.reduced, times))
        if program.sharded != "none":
            size = everything.whole * program.gathered
            found.append(collective(setting, "shards", "all-gather", "parameters", size))
        cut = layout.shards if program.sharded != "none" else 1
        size = everything.whole / cut * program.reduced
        found.append(collective(setting, "dp_replicate", "all-reduce", "gradients of replicas", size))
    found += _partial_traffic(setting, part)
    return [t for t in found if t.count]


def _replica_traffic(setting: Setting, part: Part) -> list[Traffic]:
    """HSDP: one all-reduce for each module that FSDP wraps."""
    kinds = zip(part.layers, setting.shape.layer_kinds, strict=True)
    pieces = [(count, held(layer.parameters, degrees_of(setting), True).cut) for count, layer in kinds]
    pieces.append((1, held_ends(setting, part).cut))
    return [
        collective(setting, "dp_replicate", "all-reduce", "gradients of replicas", cut * setting.program.reduced, count)
        for count, cut in pieces
        if cut
    ]


def _partial_traffic(setting: Setting, part: Part) -> list[Traffic]:
    """Gradients of parameters that all processes of tensor parallelism have, each from its part of the sequence."""
    layout, program, shape = setting.layout, setting.program, setting.shape
    if layout.tp == 1 or not program.sequence:
        return []
    sizes: Counter[float] = Counter()
    for count, layer in zip(part.layers, shape.layer_kinds, strict=True):
        for size, each in _partial_sizes(layer.parameters, degrees_of(setting)).items():
            sizes[size] += each * count
    ends = tuple(stage_parameters(shape, (), part.first, part.last, layout.pp))
    sizes += _partial_sizes(ends, degrees_of(setting))
    if program.sharded != "all":  # one buffer, once
        size = sum(size * count for size, count in sizes.items()) * program.reduced
        return [collective(setting, "tp", "all-reduce", "gradients of norms", size)] if sizes else []
    # Where they are sharded, they are settled before they are reduced: with every micro-batch.
    several = layout.shards * layout.dp_replicate > 1 and not program.once
    times = setting.microbatches if several else 1
    return [
        collective(setting, "tp", "all-reduce", "gradients of norms", size * program.reduced, count * times)
        for size, count in sizes.items()
    ]


@lru_cache(maxsize=1 << 10)
def _partial_sizes(parameters: tuple[Parameter, ...], degrees: Degrees) -> Counter[float]:
    """Elements -> how many of these parameters have so many and are summed."""
    return Counter(p.elements for p in parameters if is_partial(p, degrees))


def pipeline_traffic(setting: Setting, part: Part) -> list[Traffic]:
    """Hidden states to the next stage, their gradients to the one before."""
    layout, shape = setting.layout, setting.shape
    if layout.pp == 1:
        return []
    size, times = setting.tokens * setting.stream * setting.program.residual, setting.microbatches
    found = [
        collective(setting, "pp", "send", what, size, count * times)
        for what, count in (
            ("hidden states to the next stage", part.forward_sends),
            ("gradients to the stage before", part.backward_sends),
        )
    ]
    if shape.tied and part.first != part.last and setting.program.sharded == "all":
        embedding = tuple(p for p in (shape.first if part.first else shape.last) if p.style in ("vocabulary", "head"))
        size = held(embedding, degrees_of(setting), False).cut * setting.program.gradient
        found.append(collective(setting, "pp", "send", "gradients of the tied embedding", size))
    return [t for t in found if t.count]
