"""Memory of a process under a layout, term by term.

Parameters, gradients and optimizer state are exact for this project's own program: FSDP2 cuts each parameter's rows into
ceil(rows / processes) pieces, tensor parallelism as `parallel.tensor` places them, and the pipeline as its stages say.
Activations are those that autograd keeps: inputs of products, of attention, of norms and of activation functions
(Korthikanti et al. 2022, arXiv:2205.05198, section 4, per kind of matrix instead of per model).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from parallel.planner.gpus import GIB
from parallel.planner.layout import Layout, Program, in_flight, local
from parallel.planner.shape import LayerShape, ModelShape, Parameter

# What a process takes beside tensors: the CUDA context with its loaded kernels, cuBLAS workspaces; buffers of NCCL for
# each communicator (default NCCL_BUFFSIZE of 4 MiB a channel, 16 to 32 channels, send and receive); and the part of the
# caching allocator's blocks that no tensor fills. Sources: CUDA and NCCL defaults; the share is calibrated.
CONTEXT, COMMUNICATOR, FRAGMENTATION = 1.2 * GIB, 0.25 * GIB, 0.08


@dataclass(frozen=True)
class Memory:
    """terms: name -> bytes of the fullest process."""

    terms: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.terms.values())

    @property
    def tensors(self) -> float:
        """What the allocator calls allocated: without context, NCCL and fragmentation."""
        return self.total - self.terms["context and NCCL"] - self.terms["fragmentation"]


def held_elements(parameters: Iterable[Parameter], shape: ModelShape, layout: Layout) -> tuple[float, float]:
    """(plain, expert) elements of these parameters on one process before sharding over data: after tp and ep."""
    plain = experts = 0.0
    for p in parameters:
        if p.experts:
            experts += p.elements / layout.ep / (layout.tp if p.style in ("column", "row") else 1)
        else:
            plain += p.elements / tensor_share(p, shape, layout.tp)
    return plain, experts


def tensor_share(parameter: Parameter, shape: ModelShape, tp: int) -> int:
    """Processes over which tensor parallelism cuts a parameter; 1 where each has all of it."""
    style = parameter.style
    if style == "row":
        return tp if len(parameter.shape) > 1 else 1
    if style == "key_value":
        return tp if shape.kv_heads % tp == 0 else 1
    return tp if style in ("column", "vocabulary", "head", "width_norm") else 1


def piece(rows: int, pieces: int, index: int) -> int:
    """Rows of piece `index` when `rows` are cut as torch.chunk does."""
    each = ceil(rows / pieces)
    return max(0, min(each, rows - index * each))


def local_elements(parameter: Parameter, shape: ModelShape, layout: Layout, tp_rank: int, shard_rank: int) -> int:
    """Exactly the elements that process (tp_rank, shard_rank) holds under this project's program."""
    dims, tp = list(parameter.shape), tensor_share(parameter, shape, layout.tp)
    cut = 1 if parameter.style == "row" else 0
    rows = dims[0]
    if tp > 1:
        dims[cut] = piece(dims[cut], tp, tp_rank)
    uneven = tp > 1 and cut == 0 and rows % (tp * layout.shards)
    where = 1 if uneven and len(dims) > 1 and dims[1] % layout.shards == 0 else 0
    dims[where] = piece(dims[where], layout.shards, shard_rank)
    total = 1
    for dim in dims:
        total *= dim
    return total


def stage_parameters(shape: ModelShape, layers: Iterable[int], first: bool, last: bool) -> list[Parameter]:
    """Parameters of a pipeline stage; a tied head on another process than the embedding is a parameter of its own."""
    found = [p for layer in layers for p in shape.layers[layer].parameters]
    found += shape.first if first else ()
    found += (p for p in shape.last if not (first and shape.tied and p.style == "head")) if last else ()
    return found


def activation_bytes(layer: LayerShape, hidden: int, layout: Layout, program: Program, recompute: str) -> float:
    """Bytes a token of this process's sequence part that a layer keeps for backward."""
    stream = hidden / (layout.tp if program.sequence else 1)
    width = program.saved
    if recompute == "full":
        return stream * program.residual
    norms = layer.norms * stream * program.residual * (1 if program.layers_compiled or program.residual == 2 else 2)
    inputs = outputs = attention = activated = products = 0.0
    seen: set[str] = set()
    feeds: dict[str, float] = {}
    for m in layer.matrices:
        inner, columns = local(m, layout, layer)
        if m.style == "row":
            inputs += inner * m.active
            continue
        if m.group not in seen:
            inputs += (stream if program.regather or m.copies > 1 else hidden) * m.active
        elif not m.group.endswith("attention"):
            feeds[m.group] = feeds.get(m.group, 0.0) + inner * 0 + columns * m.active
        seen.add(m.group)
        outputs += columns * m.active
    if layer.heads:
        attention = 4.0 * layer.heads / layout.tp  # log-sum-exp
        if not program.flash:
            attention += 5.0 * layer.heads / layout.tp * 1.0 * 0
    if not program.layers_compiled:
        activated = sum(feeds.values())  # silu(gate), which eager autograd keeps beside gate
    if recompute == "selective" and not program.attention_again:
        row_outputs = stream * sum(1 for m in layer.matrices if m.style == "row")
        kept = outputs * (1 - program.matmul_share) + row_outputs * (1 - program.matmul_share)
        values = layer.heads * layer.v_dim / layout.tp
        return stream * program.residual + width * (kept + values) + attention
    narrow = 0.5 if program.compute != "bf16" and program.keeps_narrow else 1.0  # inputs of products, in 8 bits
    products = inputs * narrow + outputs + activated
    if recompute == "selective":
        products -= layer.heads * layer.v_dim / layout.tp
        attention = 0.0
    masks = (2.0 * stream + 0.0) if program.dropout else 0.0
    return norms + width * products + attention + masks


def plain_score_bytes(layer: LayerShape, layout: Layout, seq_len: int, program: Program) -> float:
    """Bytes a token of attention scores that are kept where attention is not fused: softmax, its dropout and mask."""
    return 0.0 if program.flash else 5.0 * layer.heads / layout.tp * seq_len


def plan_memory(
    shape: ModelShape, layout: Layout, program: Program, microbatches: int, stages: list[list[int]]
) -> Memory:
    """The fullest process's terms. stages: for each pipeline process, how many layers of each kind it has."""
    found = [
        _process(shape, layout, program, microbatches, counts, rank, len(stages)) for rank, counts in enumerate(stages)
    ]
    return max(found, key=lambda memory: memory.total)


def _process(
    shape: ModelShape, layout: Layout, program: Program, microbatches: int, counts: list[int], rank: int, pp: int
) -> Memory:
    first, last = rank == 0, rank == pp - 1
    blocks = [held_elements(layer.parameters, shape, layout) for layer in shape.layer_kinds]
    ends = sum(sum(held_elements([p], shape, layout)) for p in stage_parameters(shape, (), first, last))
    whole = sum(n * sum(b) for n, b in zip(counts, blocks, strict=True)) + ends
    expert = sum(n * b[1] for n, b in zip(counts, blocks, strict=True))
    shards, expert_shards = layout.shards, max(1, layout.shards // layout.ep)
    cut = (whole - expert) / shards + expert / expert_shards
    weights = cut if program.sharded == "all" else whole
    gradients = cut if program.sharded in ("all", "gradients") else whole
    states = whole if program.sharded == "none" else cut
    terms = {
        "weights": weights * program.weight,
        "gradients": gradients * program.gradient,
        "optimizer": states * program.state,
    }
    tokens = layout.micro_batch * shape.seq_len / layout.cp
    flying = in_flight(layout, microbatches)
    if layout.pp > 1 and layout.chunks == 1 and layout.schedule.lower() == "1f1b":
        flying = min(pp - rank, microbatches)
    kept, largest = 0.0, 0.0
    for count, layer in zip(counts, shape.layer_kinds, strict=True):
        plain = plain_score_bytes(layer, layout, shape.seq_len, program)
        none = activation_bytes(layer, shape.hidden, layout, program, "none") + plain
        share = 1 / layout.recompute_every if layout.recompute != "none" else 0.0
        again = activation_bytes(layer, shape.hidden, layout, program, layout.recompute)
        kept += count * (share * again + (1 - share) * none)
        # While a layer goes backward its own activations exist, and gradients of the widest of them.
        wide = max((local(m, layout, layer)[1] * m.active for m in layer.matrices), default=0.0)
        work = (none if layout.recompute != "none" else 0.0) + 2 * program.saved * wide + 2 * plain
        largest = max(largest, work)
    terms["activations"] = kept * tokens * flying
    terms["recomputed layer"] = largest * tokens
    if last:
        terms["logits"] = _logits(shape, layout, program, tokens)
    if program.sharded == "all":
        biggest = max(sum(b) for b in blocks)
        gathered = 2 * biggest * program.gathered + biggest * (program.gathered + program.reduced)
        if layout.keep:
            gathered = (whole - ends) * program.gathered + biggest * (program.gathered + program.reduced)
        if shards == 1:
            gathered = (whole - ends) * program.gathered if program.gathered < program.weight else 0.0
        terms["gathered parameters"] = gathered
        terms["embedding and head"] = 0.0 if shards == 1 else 2 * ends * program.ends
    groups = sum(1 for degree in (layout.pp, layout.shards, layout.dp_replicate, layout.tp, layout.cp) if degree > 1)
    if program.sharded == "all" and program.once:  # summed over micro-batches before they travel
        terms["gathered gradients"] = whole * program.gradient
    terms["communication buffers"] = program.buckets
    terms["context and NCCL"] = CONTEXT + COMMUNICATOR * (1 + groups)
    terms["fragmentation"] = FRAGMENTATION * sum(terms.values())
    return Memory(terms)


def _logits(shape: ModelShape, layout: Layout, program: Program, tokens: float) -> float:
    """Logits in 16 bits, in fp32, and the gradient; in chunks, the hidden states' and the head's gradient beside them."""
    columns = shape.vocab / layout.tp
    if program.chunk:
        rows = min(tokens, program.chunk)
        gradients = tokens * shape.hidden / layout.tp * 4 + shape.hidden * columns * (program.gradient + 2)
        return rows * columns * 12.0 + gradients
    return tokens * columns * program.logits
