"""Context parallelism against one process with a dense mask: outputs and the gradients of queries, keys and values."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import parallel.ring
from parallel.context import apply_context, check_context, split_sequence
from pretrain.models.layers.attention import AttentionCore, AttentionMask, attention
from tests.ranks import run_ranks

B, S, D = 2, 48, 8
METHODS = ["ulysses", "ring"]


def mask_of(name: str) -> AttentionMask:
    """Rows of 48 tokens; with cp 2 the zig-zag chunks are 12 tokens long, with cp 3 8, with cp 4 6."""
    lengths = {
        "crossing": [[2, 45, 1], [20, 28]],
        "on chunk edges": [[12, 12, 24], [6, 6, 36]],
        "single tokens": [[1] * 48, [23, 1, 1, 1, 22]],
        "padding": [[30, 18], [48, 0]],
    }
    kind, _, way = name.partition(", ")
    causal, window = way != "both ways", None
    if kind.startswith("window"):
        kind, window = kind.removeprefix("window").strip(), 7
    if kind not in lengths:
        return AttentionMask(causal=causal, window=window)
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths[kind]])
    if kind == "padding":
        documents[0, 30:], documents[1, :] = -1, 0
    return AttentionMask.packed(documents, causal=causal, window=window)


MASKS = [
    "causal",
    "plain, both ways",
    "crossing",
    "crossing, both ways",
    "on chunk edges",
    "on chunk edges, both ways",
    "single tokens",
    "padding",
    "window",
    "window, both ways",
    "window crossing",
    "window crossing, both ways",
]


def inputs(dtype: torch.dtype, heads: int, kv_heads: int, value_dim: int = D) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    torch.manual_seed(0)
    sizes = (heads, D), (kv_heads, D), (kv_heads, value_dim), (heads, value_dim)
    return [torch.randn(B, S, *size, dtype=torch.float64).to(dtype) for size in sizes]


def part(x: Tensor, cp: int, method: Any) -> Tensor:
    return split_sequence(x, 1, dist.get_rank(), cp, method)


def error(method: Any, cp: int, core: nn.Module, mask: AttentionMask, tensors: list[Tensor], **options: Any) -> float:
    """Of this rank: the largest difference from one process, over the output and the three gradients."""
    *given, grad = tensors
    whole = [x.clone().requires_grad_() for x in given]
    expected = attention(*whole, mask, backend="reference", **options)
    expected.backward(grad)
    local = [part(x, cp, method).clone().requires_grad_() for x in given]
    out = core(*local, mask)
    out.backward(part(grad, cp, method))
    pairs = zip([out, *(x.grad for x in local)], [expected, *(x.grad for x in whole)], strict=True)
    return max(float((own - part(right, cp, method)).abs().max()) for own, right in pairs)


def core_of(method: Any, cp: int, **options: Any) -> AttentionCore:
    core = AttentionCore(**options)
    apply_context(core, init_device_mesh("cpu", (cp,), mesh_dim_names=("cp",)), method)
    return core


def errors(method: Any, cp: int) -> dict[str, float]:
    core, found = core_of(method, cp), {}
    for name in MASKS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            found[f"{name} {dtype}"] = error(method, cp, core, mask_of(name), inputs(dtype, 12, 3))
    for kv_heads in (1, 2, 4, 6, 12):
        tensors = inputs(torch.float64, 12, kv_heads)
        found[f"{kv_heads} kv heads torch.float64"] = error(method, cp, core, mask_of("crossing"), tensors)
    for value_dim in (5, 11):
        tensors = inputs(torch.float64, 12, 3, value_dim)
        found[f"values of {value_dim} torch.float64"] = error(method, cp, core, mask_of("crossing"), tensors)
    scaled = core_of(method, cp, scale=0.3)
    found["scale torch.float64"] = error(method, cp, scaled, AttentionMask(), inputs(torch.float64, 12, 3), scale=0.3)
    return found


@pytest.mark.parametrize(
    ("method", "cp"), [("ulysses", 2), ("ulysses", 3), ("ulysses", 4), *(("ring", n) for n in (2, 3, 4))]
)
def test_equals_one_process(method, cp):
    tolerance = {"torch.float64": 1e-13, "torch.float32": 1e-5, "torch.bfloat16": 0.1}  # of values up to about 5
    for rank, found in enumerate(run_ranks(errors, cp, method, cp, timeout=120)):
        assert len(found) == 3 * len(MASKS) + 8
        off = {name: value for name, value in found.items() if not value < tolerance[name.rpartition(" ")[2]]}
        assert not off, f"rank {rank}"


def ulysses_only() -> list[float]:
    prefix = AttentionMask(prefix=torch.tensor([20, 3]))
    tensors = inputs(torch.float64, 4, 2)
    capped = core_of("ulysses", 2, softcap=2.0)
    return [
        error("ulysses", 2, core_of("ulysses", 2), prefix, tensors),
        error("ulysses", 2, capped, AttentionMask(), tensors, softcap=2.0),
    ]


def test_ulysses_does_what_the_core_does():
    for prefix, softcap in run_ranks(ulysses_only, 2):
        assert prefix < 1e-13 and softcap < 1e-13


def planted(bug: str) -> float:
    """The error when ring attention has a bug."""
    if bug == "merge without rescale":

        def merge(out, lse, part, part_lse):
            out.add_(part)
            lse.copy_(torch.logaddexp(lse, part_lse))

        parallel.ring._merge = merge
    elif bug == "a gradient is lost on its way":
        arrive, arrived = parallel.ring._Shift.wait, []

        def wait(shift):
            arrived.append(shift)  # keys and values in forward, then in backward; then the gradients
            return arrive(shift).mul_(len(arrived) != 3)

        parallel.ring._Shift.wait = wait
    elif bug == "contiguous parts":
        return error("ulysses", 2, core_of("ring", 2), AttentionMask(), inputs(torch.float64, 4, 2))
    return error("ring", 2, core_of("ring", 2), AttentionMask(), inputs(torch.float64, 4, 2))


@pytest.mark.parametrize("bug", ["merge without rescale", "a gradient is lost on its way", "contiguous parts"])
def test_the_comparison_sees_a_planted_bug(bug):
    assert max(run_ranks(planted, 2, bug)) > 1e-2


def messages(causal: bool) -> list[int]:
    """Bytes of each message of a forward and a backward in fp32."""
    sent = []
    start = parallel.ring._Shift.__init__

    def count(shift, tensor, ring):
        sent.append(tensor.nbytes)
        start(shift, tensor, ring)

    parallel.ring._Shift.__init__ = count
    error("ring", 3, core_of("ring", 3), AttentionMask(causal=causal), inputs(torch.float32, 4, 2))
    return sent


def test_ring_sends_keys_and_values_round_once_and_their_gradients_home():
    one = 2 * B * (S // 3) * 2 * D * 4  # keys and values of 2 heads
    for sent in run_ranks(messages, 3, True):
        assert sent == [one] * (2 + 2 + 3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * 4 * D)
        self.core = AttentionCore()

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (12, D)).chunk(3, dim=2)
        return self.core(q, k, v, mask).flatten(-2)


def block_errors(method: Any, recompute: bool, compile: bool, bf16: bool) -> float:
    torch.manual_seed(0)
    block, x, mask = Block(), torch.randn(B, S, D), mask_of("crossing")
    expected = block(x, mask)
    expected.square().sum().backward()
    gradient, block.qkv.weight.grad = block.qkv.weight.grad, None
    apply_context(block.core, init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)), method)
    inner = block.forward
    if recompute:
        block.forward = lambda *args: checkpoint(inner, *args, use_reentrant=False)
    if compile:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = block(part(x, 2, method), mask)
    out.float().square().sum().backward()
    dist.all_reduce(block.qkv.weight.grad)
    off = (block.qkv.weight.grad - gradient).abs().max() / gradient.abs().max()
    return max(float(off), float((out - part(expected, 2, method)).abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_and_under_autocast(method):
    assert max(run_ranks(block_errors, 2, method, True, False, False)) < 1e-5
    assert max(run_ranks(block_errors, 2, method, False, False, True)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recompute", [False, True])
def test_compiles_into_one_graph(method, recompute):
    assert max(run_ranks(block_errors, 2, method, recompute, True, False, timeout=200)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_128k_tokens_without_memory(method):
    length, cp = 128 * 1024, 8
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=cp)
    try:
        core = AttentionCore()
        apply_context(core, init_device_mesh("cpu", (cp,), mesh_dim_names=("cp",)), method)
        with FakeTensorMode():
            q, k = (torch.empty(1, length // cp, n, 128, requires_grad=True) for n in (64, 8))
            out = core(q, k, k, AttentionMask())
            out.backward(torch.empty_like(out))
    finally:
        dist.destroy_process_group()
    assert out.shape == q.shape and k.grad is not None and k.grad.shape == k.shape


@pytest.mark.parametrize("cp", [2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_parts_are_the_whole(method, cp):
    whole = torch.arange(2 * 24).view(2, 24)
    parts = [split_sequence(whole, 1, rank, cp, method) for rank in range(cp)]
    assert {tuple(x.shape) for x in parts} == {(2, 24 // cp)}
    assert torch.equal(torch.cat(parts, dim=1).sort(dim=1).values, whole)


def test_the_order_of_the_parts():
    tokens = torch.arange(8)
    assert split_sequence(tokens, 0, 1, 2, "ulysses").tolist() == [4, 5, 6, 7]
    assert split_sequence(tokens, 0, 0, 2, "ring").tolist() == [0, 1, 6, 7]
    assert split_sequence(tokens, 0, 1, 2, "ring").tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 8, "ulysses", 8), r"data\.seq_len = 100 is not a multiple of 8, .*; set it to 96, for instance"),
        ((100, 2, "ring", 1), None),
        ((102, 2, "ring", 1), r"data\.seq_len = 102 is not a multiple of 4, which parallel\.cp = 2 \(ring\)"),
        ((100, 2, "ulysses", 8, 4), r"not a multiple of 8, .* with parallel\.tp = 4 needs; set it to 96"),
        ((100, 2, "ring", 8, 2), None),
        (
            (96, 4, "ulysses", 6),
            r"parallel\.cp = 4 \(ulysses\) does not divide the 6 query heads .*\[1, 2, 3, 6\].*ring",
        ),
        ((96, 2, "ulysses", 6, 2), r"does not divide the 3 query heads that parallel\.tp = 2 leaves"),
        ((96, 4, "ring", 6), None),
        ((97, 1, "ring", 6), None),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(arguments, message):
    if message is None:
        check_context(*arguments)
        return
    with pytest.raises(ValueError, match=message) as caught:
        check_context(*arguments)
    assert "\n" not in str(caught.value)


def refusals() -> list[str]:
    documents = torch.zeros(B, S, dtype=torch.int64)
    cases = [
        (S, {}, AttentionMask(prefix=torch.tensor([3, 3]))),
        (S - 2, {}, AttentionMask()),
        (S, {}, AttentionMask.packed(documents[:, : S // 2])),
        (S, {"softcap": 2.0}, AttentionMask()),
    ]
    said = []
    for length, options, mask in cases:
        q = torch.randn(B, length // 2, 2, D)
        try:
            core_of("ring", 2, **options)(q, q, q, mask)
        except ValueError as refused:
            said.append(str(refused))
    return said


def test_what_ring_cannot_do_names_the_cure():
    for said in run_ranks(refusals, 2):
        prefix, odd, split, softcap = said
        for line, reason in ((prefix, "a prefix mask"), (softcap, "softcap")):
            assert reason in line and line.endswith('set parallel.cp_method = "ulysses"')
        assert "got 23 tokens" in odd and "a multiple of 4" in odd
        assert "do not split the mask" in split and "[2, 48]" in split
