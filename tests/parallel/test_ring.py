"""Ring attention without processes: what the plan computes, how even it is, and the kernels of a device."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.ring import _merge
from parallel.ring_kernels import KERNELS
from parallel.ring_plan import Mask, Piece, chunks_of, ring_plan, work


def edges_of(batch: int, length: int, cuts: set[int]) -> tuple[int, ...]:
    return tuple(sorted({*range(0, batch * length + 1, length), *cuts}))


def dense(mask: Mask) -> torch.Tensor:
    """[N, N] whether a query sees a key, all rows end to end."""
    N = mask.batch * mask.length
    document = torch.zeros(N + 1, dtype=torch.int64)
    document[list(mask.edges)] = 1
    document = document[:N].cumsum(0)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    seen = document[:, None] == document
    if mask.causal:
        seen &= j <= i
    if mask.window is not None:
        seen &= (i - j).abs() < mask.window
    return seen


def tokens_of(mask: Mask, rank: int, cp: int) -> torch.Tensor:
    """Where the tokens of `rank` stand, all whole rows end to end."""
    rows = torch.arange(mask.batch * mask.length).view(mask.batch, 2 * cp, -1)
    return rows[:, list(chunks_of(rank, cp))].flatten()


def computed(piece: Piece, mask: Mask) -> list[tuple[int, int]]:
    """(query, key) pairs of a piece, in the tokens of its ranks: what a kernel does with it."""
    q, k = range(piece.queries.start, piece.queries.stop), range(piece.keys.start, piece.keys.stop)
    if piece.band is not None:
        reach = 0 if mask.causal else mask.window - 1
        return [
            (q[i], k[j]) for i in range(len(q)) for j in range(len(k)) if -reach <= piece.band + i - j < mask.window
        ]
    parts = pairwise(piece.documents) if piece.documents else [(0, len(q))] if piece.causal else []
    squares = [(q[i], k[j]) for a, b in parts for i in range(a, b) for j in range(a, i + 1 if piece.causal else b)]
    return squares or [(i, j) for i in q for j in k]


@settings(max_examples=60, deadline=None)
@given(
    cp=st.integers(1, 4),
    batch=st.integers(1, 2),
    cuts=st.sets(st.integers(1, 47), max_size=12),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 30),
    varlen=st.booleans(),
)
def test_the_plan_computes_each_visible_pair_once(cp, batch, cuts, causal, window, varlen):
    mask = Mask(edges_of(batch, 24, {cut for cut in cuts if cut < batch * 24}), batch, 24, causal, window)
    count = torch.zeros(batch * 24, batch * 24, dtype=torch.int64)
    for rank in range(cp):
        queries = tokens_of(mask, rank, cp)
        for step, pieces in enumerate(ring_plan(mask, rank, cp, varlen=varlen)):
            keys = tokens_of(mask, (rank - step) % cp, cp)
            for piece in pieces:
                for i, j in computed(piece, mask):
                    count[queries[i], keys[j]] += 1
    assert torch.equal(count, dense(mask).long())


def test_a_window_is_cut_into_blocks_that_skip_what_it_hides():
    mask = Mask((0, 8192), 1, 8192, True, 256)
    pieces = [piece for step in ring_plan(mask, 1, 2) for piece in step]
    assert work(pieces) < 4096 * 3 * 256


@pytest.mark.parametrize("cp", [2, 8, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_every_rank_works_alike_at_128k_tokens(cp, causal):
    mask = Mask((0, 2**17), 1, 2**17, causal, None)
    plans = [ring_plan(mask, rank, cp, varlen=True) for rank in range(cp)]
    for step in range(cp):
        shares = [work(plan[step]) for plan in plans]
        assert max(shares) <= 1.02 * min(shares)
    total = sum(work(step) for plan in plans for step in plan)
    assert total == (2**17 * (2**17 + 1) // 2 if causal else 2**34)


def test_what_sees_nothing_costs_nothing():
    mask = Mask(edges_of(2, 64, set(range(0, 128, 8))), 2, 64, True, None)  # a document a chunk
    for rank in range(4):
        own, *others = ring_plan(mask, rank, 4)
        assert work(own) == 2 * 2 * (8 * 9 // 2)
        assert others == [(), (), ()]


def test_one_document_over_a_border_is_one_rectangle():
    mask = Mask((0, 13, 27, 32), 1, 32, True, None)
    plan = ring_plan(mask, 1, 2)  # holds chunks 1 and 2, tokens 8 to 23; rank 0 holds 0 to 7 and 24 to 31
    assert plan[1] == (Piece(slice(0, 5), slice(0, 8)),)  # the first document only; keys 24 to 31 come later
    assert [piece for piece in plan[0] if not piece.causal] == [Piece(slice(8, 16), slice(5, 8))]


GPU = pytest.param("cuda", torch.bfloat16, 0.03, marks=pytest.mark.gpu)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), [("cpu", torch.float64, 1e-12), GPU])
@pytest.mark.parametrize("causal", [True, False])
def test_kernels_add_up_to_attention(device, dtype, tolerance, causal):
    """The ring of two ranks walked through in one process, so that a machine with one GPU checks its kernels."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    mask, cp, kernel = Mask(edges_of(2, 64, {5, 50, 51, 90}), 2, 64, causal, None), 2, KERNELS[device]
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(128, heads, 16, device=device, dtype=dtype) for heads in (4, 2, 2, 4))
    found = [torch.zeros(x.shape, dtype=torch.float64, device=device) for x in (q, q, k, v)]
    for rank in range(cp):
        own, plan = tokens_of(mask, rank, cp), ring_plan(mask, rank, cp, varlen=kernel.varlen)
        out = torch.zeros(64, 4, 16, device=device, dtype=torch.promote_types(dtype, torch.float32))
        lse = torch.full((64, 4), float("-inf"), device=device, dtype=out.dtype)
        for step, pieces in enumerate(plan):
            other = tokens_of(mask, (rank - step) % cp, cp)
            for piece in pieces:
                a, b = own[piece.queries], other[piece.keys]
                part = kernel.forward(q[a], k[b], v[b], piece, mask, 0.25)
                _merge(out[piece.queries], lse[piece.queries], *part)
        found[0][own] = out.double()
        for step, pieces in enumerate(plan):
            other = tokens_of(mask, (rank - step) % cp, cp)
            for piece in pieces:
                a, b = own[piece.queries], other[piece.keys]
                final = out[piece.queries].to(dtype), lse[piece.queries]
                grads = kernel.backward(grad[a], q[a], k[b], v[b], *final, piece, mask, 0.25)
                for total, where, term in zip(found[1:], (a, b, b), grads, strict=True):
                    total[where] += term
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wide = [x.repeat_interleave(4 // x.shape[1], dim=1).transpose(0, 1) for x in leaves]
    scores = (wide[0] @ wide[1].transpose(1, 2) * 0.25).masked_fill(~dense(mask).to(device), float("-inf"))
    expected = (scores.softmax(-1) @ wide[2]).transpose(0, 1)
    expected.backward(grad.double())
    for own_value, right in zip(found, [expected, *(x.grad for x in leaves)], strict=True):
        torch.testing.assert_close(own_value, right, rtol=tolerance, atol=tolerance)


def test_merging_is_attention_over_both_halves():
    torch.manual_seed(0)
    scores, values = torch.randn(5, 3, 12, dtype=torch.float64) * 20, torch.randn(12, 4, dtype=torch.float64)
    out = torch.zeros(5, 3, 4, dtype=torch.float64)
    lse = torch.full((5, 3), float("-inf"), dtype=torch.float64)
    for part in (slice(0, 7), slice(7, 12)):
        _merge(out, lse, scores[..., part].softmax(-1) @ values[part], scores[..., part].logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ values)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
