"""Memory of a process under a layout, term by term.

Weights, gradients and optimizer state are exact for the torch engine (see `parallel.planner.pieces`), for the others up
to the padding of their buffers (`tests/parallel/planner/test_engines.py`).
Activations are those that autograd keeps: inputs of products, of attention, of norms and of activation functions
(Korthikanti et al. 2022, arXiv:2205.05198, section 4, per kind of matrix instead of per model).
"""

from collections import Counter
from dataclasses import dataclass

from parallel.planner.gpus import GIB
from parallel.planner.layout import Layout, Part, Setting, in_flight, local
from parallel.planner.pieces import Held, degrees_of, held, held_by, held_ends, small_elements
from parallel.planner.shape import LayerShape

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


def activation_bytes(layer: LayerShape, setting: Setting, recompute: str) -> float:
    """Bytes a token of this process's sequence part that a layer keeps for backward."""
    layout, program, stream = setting.layout, setting.program, setting.stream
    if recompute == "full":
        return stream * program.residual
    values = layer.heads * layer.v_dim / layout.tp
    log_sums = 4.0 * layer.heads / layout.tp
    inputs, outputs, activated = _product_elements(layer, setting)
    if recompute == "selective" and not program.attention_again:
        row_outputs = stream * sum(1 for m in layer.matrices if m.style == "row")
        kept = (outputs + row_outputs) * (1 - program.matmul_share)
        return stream * program.residual + program.saved * (kept + values) + log_sums
    norms = layer.norms * stream * program.residual * (1 if program.compiled or program.residual == 2 else 2)
    if program.compute in ("fp8", "fp4") and program.keeps_narrow:
        inputs *= 0.5
    products = inputs + outputs + (0.0 if program.compiled else activated)
    masks = 2.0 * stream if program.dropout else 0.0
    if recompute == "selective":  # attention only
        return norms + program.saved * (products - values) + masks
    return norms + program.saved * products + log_sums + masks


def _product_elements(layer: LayerShape, setting: Setting) -> tuple[float, float, float]:
    """Elements a token that enter products, that leave those of which more is made, and that an activation function
    makes of them (which compiled code makes again)."""
    layout = setting.layout
    inputs = outputs = activated = 0.0
    seen: set[str] = set()
    for m in layer.matrices:
        inner, columns = local(m, layout, layer)
        if m.style == "row":
            inputs += inner * m.active
            continue
        if m.group not in seen:
            inputs += (setting.stream if setting.program.regather or m.copies > 1 else setting.shape.hidden) * m.active
        elif not m.group.endswith("attention"):
            activated += columns * m.active
        seen.add(m.group)
        outputs += columns * m.active
    return inputs, outputs, activated


def score_bytes(layer: LayerShape, setting: Setting) -> float:
    """Bytes a token of attention scores that are kept where attention is not fused: softmax, its dropout and mask."""
    return 0.0 if setting.program.flash else 5.0 * layer.heads / setting.layout.tp * setting.shape.seq_len


def plan_memory(setting: Setting) -> Memory:
    """The fullest process's terms."""
    # Of processes with equal parts the first has most micro-batches in flight.
    first_of: dict[Part, int] = {}
    for rank, part in enumerate(setting.parts):
        first_of.setdefault(part, rank)
    found = [process_memory(setting, part, rank) for part, rank in first_of.items()]
    return max(found, key=lambda memory: memory.total)


def process_memory(setting: Setting, part: Part, rank: int) -> Memory:
    """Of process `rank` of a pipeline, which has `part`; of those that share its parameters, the one with most."""
    program, layout = setting.program, setting.layout
    everything, ends = held_by(setting, part), held_ends(setting, part)
    terms = _states(everything, setting, part)
    terms |= _activations(setting, part, _in_flight(layout, setting.microbatches, rank))
    if part.last:
        terms["logits"] = _logits(setting)
    if program.copies:
        terms["16-bit weights"] = _copies(setting, part)
    if program.sharded == "all":
        terms |= _gathered(setting, part, everything, ends)
    terms["communication buffers"] = program.buckets
    degrees = (layout.pp, layout.shards, layout.dp_replicate, layout.tp, layout.cp)
    terms["context and NCCL"] = CONTEXT + COMMUNICATOR * (1 + sum(degree > 1 for degree in degrees))
    terms["fragmentation"] = FRAGMENTATION * sum(terms.values())
    return Memory(terms)


def _states(everything: Held, setting: Setting, part: Part) -> dict[str, float]:
    program, shards = setting.program, setting.layout.shards
    whole, cut = everything.whole, everything.cut
    if program.sharded == "none":
        cut = whole
    elif program.sharded != "all" or program.flat:  # one flat buffer, cut evenly
        cut = (whole - everything.experts) / shards + everything.experts / max(1, shards // setting.layout.ep)
    optimizer = cut * program.state
    if program.matrix_state:
        optimizer += everything.matrices * (program.matrix_state - program.state)
    weights = cut if program.sharded == "all" else whole
    if program.persistent and shards > 1:
        weights += small_elements(setting, part)
    return {
        "weights": program.weight * weights,
        "gradients": program.gradient * (cut if program.sharded in ("all", "gradients") else whole),
        "optimizer": optimizer,
    }


def _in_flight(layout: Layout, microbatches: int, rank: int) -> float:
    if layout.pp > 1 and layout.chunks == 1 and layout.schedule.lower() == "1f1b":
        return min(layout.pp - rank, microbatches)
    return in_flight(layout, microbatches)


def _activations(setting: Setting, part: Part, flying: float) -> dict[str, float]:
    layout, saved = setting.layout, setting.program.saved
    share = 1 / layout.recompute_every if layout.recompute != "none" else 0.0
    kept = largest = 0.0
    for count, layer in zip(part.layers, setting.shape.layer_kinds, strict=True):
        scores = score_bytes(layer, setting)
        none = activation_bytes(layer, setting, "none") + scores
        kept += count * (share * activation_bytes(layer, setting, layout.recompute) + (1 - share) * none)
        # While a layer goes backward its own activations exist, and gradients of the widest of them.
        wide = max((local(m, layout, layer)[1] * m.active for m in layer.matrices), default=0.0)
        largest = max(largest, (none if layout.recompute != "none" else 0.0) + 2 * saved * wide + 2 * scores)
    return {"activations": kept * setting.tokens * flying, "recomputed layer": largest * setting.tokens}


def _copies(setting: Setting, part: Part) -> float:
    """Of layers that are not recomputed, all; of the others those in autocast's cache, which has them to the end of
    forward: where code is not compiled, of matrices that are no experts and share their product with none. And those of
    a layer while it is recomputed."""
    layout, program = setting.layout, setting.program
    share = 1 / layout.recompute_every if layout.recompute != "none" else 0.0
    kept = largest = 0.0
    for count, layer in zip(part.layers, setting.shape.layer_kinds, strict=True):
        groups = Counter(m.group for m in layer.matrices)
        every = sum(m.inputs * m.outputs * m.copies for m in layer.matrices)
        alone = sum(m.inputs * m.outputs for m in layer.matrices if groups[m.group] == m.copies == 1)
        kept += count * ((1 - share) * every + share * (0 if program.compiled else alone))
        largest = max(largest, every if share and count else 0.0)
    return program.copies * (kept + largest)


def _gathered(setting: Setting, part: Part, everything: Held, ends: Held) -> dict[str, float]:
    """FSDP: whole parameters of the layers at work, gradients on their way, embedding and head. ZeRO-3: what is kept
    because it is needed again soon, and the largest module at work."""
    layout, program = setting.layout, setting.program
    kinds = zip(part.layers, setting.shape.layer_kinds, strict=True)
    biggest = max(held(layer.parameters, degrees_of(setting), True).whole for count, layer in kinds if count)
    if program.live:
        if layout.shards == 1:
            return {}
        most = program.live + max(biggest, setting.shape.vocab * setting.shape.hidden)
        kept = min(everything.whole, most) * program.gathered
        return {"gathered parameters": kept + biggest * program.gradient}
    blocks = everything.whole - ends.whole
    if layout.shards == 1:
        gathered = blocks * program.gathered if program.gathered < program.weight else 0.0
    elif layout.keep:
        gathered = blocks * program.gathered + biggest * (program.gathered + program.reduced)
    else:
        gathered = biggest * (3 * program.gathered + program.reduced)
    found = {
        "gathered parameters": gathered,
        "embedding and head": 0.0 if layout.shards == 1 else 2 * ends.whole * program.ends,
    }
    if program.once:  # summed over micro-batches before they travel
        found["gathered gradients"] = everything.whole * program.gradient
    return found


def _logits(setting: Setting) -> float:
    """Logits in 16 bits, in fp32, and the gradient. In chunks, the gradients of hidden states and head beside them."""
    shape, layout, program = setting.shape, setting.layout, setting.program
    columns = shape.vocab / layout.tp
    if not program.chunk:
        return setting.tokens * columns * program.logits
    gradients = setting.tokens * shape.hidden / layout.tp * 4 + shape.hidden * columns * (program.gradient + 2)
    return min(setting.tokens, program.chunk) * columns * 12.0 + gradients
