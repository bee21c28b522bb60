"""Chunked cross entropy against torch's, in fp64, with gradients."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.objectives.cross_entropy import IGNORED, chunked_cross_entropy


def naive(hidden, weight, targets, softcap, z_loss):
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    valid = targets != IGNORED
    return nll + z_loss * logits.logsumexp(-1)[valid].square().sum()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk_tokens", [4, 7, 100])
def test_equals_torch_with_gradients(softcap, z_loss, chunk_tokens):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 31, (23,), generator=generator)
    targets[::5] = IGNORED
    expected = naive(hidden, weight, targets, softcap, z_loss)
    expected_grads = torch.autograd.grad(expected * 0.3, (hidden, weight))
    nll, z_sum, losses = chunked_cross_entropy(
        hidden[None], weight, targets[None], softcap=softcap, z_loss=z_loss, chunk_tokens=chunk_tokens
    )
    grads = torch.autograd.grad((nll + z_sum) * 0.3, (hidden, weight))
    torch.testing.assert_close(nll + z_sum, expected)
    alone = torch.stack([naive(hidden[i : i + 1], weight, targets[i : i + 1], softcap, 0.0) for i in range(23)])
    torch.testing.assert_close(losses[0], alone.detach())
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_all_targets_ignored_gives_zero_and_zero_gradients():
    hidden = torch.randn(1, 5, 4, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    nll, _, _ = chunked_cross_entropy(hidden, weight, torch.full((1, 5), IGNORED))
    nll.backward()
    assert nll.item() == 0
    assert not hidden.grad.any() and not weight.grad.any()


def test_under_autocast_stays_near_fp32():
    hidden, weight = torch.randn(2, 32, 32), torch.randn(50, 32) * 0.1
    targets = torch.randint(0, 50, (2, 32))
    exact, _, _ = chunked_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _, _ = chunked_cross_entropy(hidden, weight, targets)
    assert rounded.dtype == torch.float32
    assert abs(rounded - exact) / exact < 5e-3


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        nll, _, _ = chunked_cross_entropy(torch.randn(1, 5, 4), torch.randn(6, 4), torch.arange(5)[None])
    assert not nll.requires_grad
