"""Every back end against a dense mask written out cell by cell, in fp64: outputs and gradients."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pretrain.models.layers import attention as core
from pretrain.models.layers.attention import BACKENDS, AttentionMask, attention, choose_backend, prepare_mask
from pretrain.models.layers.attention_documents import WINDOW_BLOCK

B, S, H, K, D = 2, 48, 6, 2, 16
needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on CUDA only, and there is no CUDA device"),
]
ON_CPU = ["sdpa", "matmul", "document", "reference", "auto"]
ON_CUDA = ["flash", "varlen", "flex", "sdpa", "matmul", "auto"]
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 20 + [2] * 21, [5] * 48])
PADDED = torch.tensor([[0] * 7 + [1] * 20 + [-1] * 21, [-1] * 3 + [4] * 45])
PREFIX = torch.tensor([5, 0])
SPANS = torch.tensor([[-1] * 3 + [0] * 6 + [-1] * 2 + [1] * 9 + [-1] * 28, [0] * 48])


@dataclass(frozen=True)
class Case:
    mask: AttentionMask
    queries: int = S
    heads: tuple[int, int] = (H, K)
    value_dim: int = D
    softcap: float | None = None
    scale: float | None = None


CASES = {
    "causal": Case(AttentionMask()),
    "bidirectional": Case(AttentionMask(causal=False)),
    "sliding": Case(AttentionMask(window=5)),
    "sliding-bidirectional": Case(AttentionMask(causal=False, window=5)),
    "prefix": Case(AttentionMask(prefix=PREFIX)),
    "prefix-sliding": Case(AttentionMask(prefix=PREFIX, window=3)),
    "spans": Case(AttentionMask(spans=SPANS)),
    "spans-documents-sliding": Case(replace(AttentionMask.packed(DOCUMENTS, window=4), spans=SPANS)),
    "documents": Case(AttentionMask.packed(DOCUMENTS)),
    "documents-not-precomputed": Case(AttentionMask(documents=DOCUMENTS)),
    "documents-bidirectional": Case(AttentionMask.packed(DOCUMENTS, causal=False)),
    "documents-sliding": Case(AttentionMask.packed(DOCUMENTS, window=4)),
    "documents-bidirectional-sliding": Case(AttentionMask.packed(DOCUMENTS, causal=False, window=4)),
    "padding": Case(AttentionMask.packed(PADDED)),
    "padding-bidirectional": Case(AttentionMask.packed(PADDED, causal=False)),
    "multi-head": Case(AttentionMask.packed(DOCUMENTS), heads=(4, 4)),
    "multi-query": Case(AttentionMask.packed(DOCUMENTS), heads=(4, 1)),
    "wide-values": Case(AttentionMask(), value_dim=24),
    "softcap": Case(AttentionMask(window=9), softcap=2.0),
    "scale": Case(AttentionMask(), scale=0.7),
    "decode-one": Case(AttentionMask(), queries=1),
    "decode-some": Case(AttentionMask(), queries=5),
    "decode-sliding": Case(AttentionMask(window=4), queries=5),
    "decode-padded": Case(AttentionMask(documents=PADDED), queries=5),
    "cross": Case(AttentionMask(causal=False), queries=60),
}


def sees(mask: AttentionMask, b: int, i: int, j: int) -> bool:
    """The definition of the mask, for one cell; i and j are positions."""
    seen = j <= i if mask.causal else True
    if mask.window is not None:
        seen = seen and abs(i - j) < mask.window
    if mask.prefix is not None:
        seen = seen or max(i, j) < int(mask.prefix[b])
    if mask.spans is not None:
        spans = mask.spans[b].tolist()
        seen = seen or spans[i] == spans[j] >= 0
    if mask.documents is not None:
        ids = mask.documents[b].tolist()
        seen = seen and ids[i] == ids[j] and ids[i] >= 0
    return seen


def make(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v that want gradients, and a gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    heads, kv_heads = case.heads
    shapes = [(case.queries, heads, D), (S, kv_heads, D), (S, kv_heads, case.value_dim)]
    shapes.append((case.queries, heads, case.value_dim))
    q, k, v, grad = (torch.randn(B, *shape, generator=generator).to(device, dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def truth(case: Case, *inputs: Tensor) -> list[Tensor]:
    """Output and gradients of the defining formula in fp64 on the CPU."""
    q, k, v, grad = (x.detach().cpu().double() for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    heads, kv_heads = case.heads
    offset = max(S - case.queries, 0)
    dense = torch.tensor(
        [[[sees(case.mask, b, i + offset, j) for j in range(S)] for i in range(case.queries)] for b in range(B)]
    )
    wide = [x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v)]
    scores = torch.einsum("bshd,bthd->bhst", q, wide[0]) * (case.scale or D**-0.5)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    weights = torch.where(dense[:, None], scores.exp(), 0.0)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-300)
    out = torch.einsum("bhst,bthd->bshd", weights, wide[1])
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def compute(run, case: Case, backend: str, *inputs: Tensor) -> list[Tensor]:
    q, k, v, grad = inputs
    mask = case.mask.to(q.device)
    out = run(q, k, v, mask, scale=case.scale, softcap=case.softcap, backend=backend)
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative error in norm of the output and each gradient; NaN fails."""
    for name, x, y in zip(("out", "grad_q", "grad_k", "grad_v"), got, expected, strict=True):
        assert x.shape == y.shape, name
        error = (x.detach().cpu().double() - y).norm() / y.norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


UNABLE_ON_CPU = {
    "sdpa": {"softcap"},
    "document": {
        *("prefix", "prefix-sliding", "spans", "spans-documents-sliding", "wide-values", "softcap", "cross"),
        *("decode-one", "decode-some", "decode-sliding", "decode-padded"),
    },
}


@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "auto"])
def test_back_ends_refuse_what_they_cannot_do_and_nothing_else(backend: str) -> None:
    """The other tests skip what a back end refuses: here it is said which cases those are."""
    refused = set()
    for name, case in CASES.items():
        sizes = {"queries": case.queries, "keys": S, "head_dim": D, "value_dim": case.value_dim}
        try:
            choose_backend(case.mask, device="cpu", dtype=torch.float32, softcap=case.softcap, backend=backend, **sizes)
        except ValueError:
            refused.add(name)
    assert refused == UNABLE_ON_CPU.get(backend, set())


def skip_if_unable(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    if backend == "auto":
        return
    sizes = {"queries": case.queries, "keys": S, "head_dim": D, "value_dim": case.value_dim}
    try:
        choose_backend(case.mask, device=device, dtype=dtype, softcap=case.softcap, backend=backend, **sizes)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", CASES)
def test_equals_definition(name: str, backend: str) -> None:
    case = CASES[name]
    skip_if_unable(case, backend, "cpu", torch.float32)
    inputs = make(case)
    assert_close(compute(attention, case, backend, *inputs), truth(case, *inputs), 1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "document"])
@pytest.mark.parametrize("name", ["causal", "documents", "documents-sliding", "padding", "sliding"])
def test_bf16_autocast(name: str, backend: str) -> None:
    """Under autocast fp32 inputs are computed in bf16: 8 bits of mantissa, so errors of about 2^-8."""
    case = CASES[name]
    inputs = make(case)
    expected = truth(case, *(x.detach().bfloat16() for x in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(inputs[0], inputs[1], inputs[2], case.mask, backend=backend)
    assert out.dtype == torch.bfloat16
    got = [out, *torch.autograd.grad(out, inputs[:3], inputs[3].bfloat16())]
    assert_close(got, expected, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "matmul", "document"])
@pytest.mark.parametrize("name", ["causal", "documents", "documents-sliding", "prefix", "padding"])
def test_compiles_without_breaks(name: str, backend: str) -> None:
    case = CASES[name]
    skip_if_unable(case, backend, "cpu", torch.float32)
    torch._dynamo.reset()
    inputs = make(case)
    compiled = torch.compile(attention, fullgraph=True)
    assert_close(compute(compiled, case, backend, *inputs), truth(case, *inputs), 1e-5)


@pytest.mark.slow
def test_new_boundaries_do_not_recompile() -> None:
    """Batches with other document lengths, and about as many documents, reuse the compiled code."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for cut in (20, 25, 30):
        documents = (torch.arange(S) >= cut).long().expand(B, S)
        inputs = make(CASES["documents"])
        case = Case(AttentionMask.packed(documents))
        assert_close(compute(compiled, case, "document", *inputs), truth(case, *inputs), 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["matmul", "document"])
@pytest.mark.parametrize("mask", [AttentionMask(window=100), AttentionMask(causal=False, window=300)])
def test_blocks_over_long_rows(mask: AttentionMask, backend: str) -> None:
    """Rows long enough that queries are cut into several blocks, the last one shorter."""
    length = 2 * WINDOW_BLOCK + 60
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, length, 2, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(1, length, 1, 8, generator=generator, requires_grad=True) for _ in range(2))
    results = []
    for name in ("reference", backend):
        out = attention(q, k, v, mask, backend=name)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert_close(results[1], [x.detach().double() for x in results[0]], 1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "document", "reference"])
def test_padding_gives_zeros(backend: str) -> None:
    inputs = make(CASES["padding"])
    out, *gradients = compute(attention, CASES["padding"], backend, *inputs)
    padding = PADDED < 0
    assert torch.equal(out[padding], torch.zeros_like(out[padding]))
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
        assert not gradient[padding].any()


def test_packing_is_shared_and_padded() -> None:
    mask = AttentionMask.packed(DOCUMENTS)
    assert mask.packing is not None
    assert mask.packing.cu_seqlens.tolist() == [0, 7, 27, 48, 96, 96, 96, 96]
    assert mask.packing.max_length == S
    assert not mask.packing.has_padding
    assert mask.with_window(4).packing is mask.packing
    assert mask.with_window(4).window == 4
    assert mask.with_window(None) is mask
    prepared = prepare_mask(AttentionMask(documents=PADDED), "document", queries=S, keys=S, device="cpu")
    assert prepared.packing is not None and prepared.packing.has_padding


def test_rows_end_documents() -> None:
    """The same id at the end of a row and the start of the next is two documents."""
    packing = AttentionMask.packed(torch.zeros(3, 4, dtype=torch.long)).packing
    assert packing is not None and packing.cu_seqlens.tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AttentionMask(window=0), "window is 0"),
        (lambda: AttentionMask(causal=False, prefix=PREFIX), "prefix needs causal=True"),
        (lambda: AttentionMask(causal=False, spans=SPANS), "spans needs causal=True"),
        (lambda: AttentionMask(prefix=PREFIX, documents=DOCUMENTS), "prefix and documents cannot be combined"),
        (lambda: AttentionMask.packed(torch.tensor([[0, 1, 0]])), "comes back"),
        (lambda: AttentionMask.packed(torch.tensor([0, 1])), r"\[2\]: must be \[batch, sequence\]"),
    ],
)
def test_bad_masks(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("case", "backend", "message"),
    [
        (replace(CASES["causal"], heads=(5, 2)), "auto", "5 query heads and 2 key-value heads"),
        (replace(CASES["causal"], queries=S + 1), "auto", "49 queries and 48 keys"),
        (Case(AttentionMask(documents=DOCUMENTS[:, :-1])), "auto", r"documents has shape \(2, 47\)"),
        (Case(AttentionMask(prefix=torch.tensor([1]))), "auto", r"prefix has shape \(1,\)"),
        (CASES["causal"], "fast", "'fast' is unknown: must be auto, flash"),
        (CASES["softcap"], "sdpa", "has no softcap: use auto or one of matmul, reference"),
        (CASES["prefix"], "document", "has no prefix mask: use auto or one of sdpa, matmul, reference"),
        (CASES["decode-some"], "document", "as many queries as keys, got 5 and 48"),
        (CASES["causal"], "varlen", "runs on cuda, not cpu"),
    ],
)
def test_bad_calls(case: Case, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute(attention, case, backend, *make(case))


def choose(mask: AttentionMask, device: str, dtype: torch.dtype, length: int, **options) -> str:
    sizes = {"queries": length, "keys": length, "head_dim": 64}
    return choose_backend(mask, device=device, dtype=dtype, **{**sizes, **options})[0]


def test_auto_on_cpu() -> None:
    long_documents = torch.zeros(1, 4096, dtype=torch.long)
    packed, bf16 = AttentionMask.packed(long_documents), torch.bfloat16
    assert choose(AttentionMask(), "cpu", bf16, 512) == "matmul"
    assert choose(AttentionMask(), "cpu", torch.float32, 4096) == "sdpa"
    assert choose(packed, "cpu", bf16, 512) == "matmul"
    assert choose(packed, "cpu", bf16, 4096) == "document"
    assert choose(packed, "cpu", torch.float32, 512) == "document"
    assert choose(AttentionMask(window=128), "cpu", bf16, 4096) == "document"
    assert choose(AttentionMask(), "cpu", torch.float32, 4096, softcap=50.0) == "matmul"


def test_auto_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, bf16 = AttentionMask.packed(DOCUMENTS), torch.bfloat16
    monkeypatch.setattr(core.backends, "HAS_FLASH_ATTN", True)
    assert choose(packed, "cuda", bf16, S) == "flash"
    assert choose(packed, "cuda", bf16, S, softcap=50.0) == "flash"
    monkeypatch.setattr(core.backends, "HAS_FLASH_ATTN", False)
    assert choose(AttentionMask(), "cuda", bf16, S) == "sdpa"
    assert choose(packed, "cuda", bf16, S) == "varlen"
    assert choose(AttentionMask(window=8), "cuda", bf16, S) == "varlen"
    assert choose(packed, "cuda", torch.float32, S) == "flex"
    assert choose(AttentionMask(prefix=PREFIX), "cuda", bf16, S) == "flex"
    assert choose(packed, "cuda", bf16, S, softcap=50.0) == "flex"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("name", CASES)
def test_auto_picks_what_can(name: str, device: str) -> None:
    """Whatever auto picks accepts the call by name, for every case and kind of device."""
    case = CASES[name]
    for dtype in (torch.float32, torch.bfloat16):
        for length in (S, 100 * S):
            call = core.Call(
                case.mask, device, dtype, min(case.queries, length), length, D, case.value_dim, case.softcap
            )
            chosen, reason = core._choose(call)
            assert BACKENDS[chosen].obstacle(call) is None
            assert reason


@pytest.mark.parametrize("backend", [pytest.param(name, marks=needs_cuda) for name in ON_CUDA])
@pytest.mark.parametrize("name", CASES)
def test_cuda_bf16(name: str, backend: str) -> None:
    case = CASES[name]
    skip_if_unable(case, backend, "cuda", torch.bfloat16)
    inputs = make(case, torch.bfloat16, "cuda")
    assert_close(compute(attention, case, backend, *inputs), truth(case, *inputs), 2e-2)
