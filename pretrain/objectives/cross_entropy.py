"""Cross entropy straight from hidden states, in chunks of tokens: the logits of the batch never exist at once.

The gradient with respect to the hidden states and the head is made in the forward pass, chunk by chunk, while the
chunk's logits are still there; backward only scales it. N tokens, E hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # target of a position that has no loss

ChunkResult = tuple[Tensor, Tensor, Tensor]  # sum of cross entropy, sum of z-loss, gradient of their sum by the logits


def chunk_loss(logits: Tensor, targets: Tensor, softcap: float, z_loss: float) -> ChunkResult:
    """logits [N, V] as they leave the head, targets [N]. The gradient has the logits' dtype."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        capped = torch.tanh(wide / softcap)
        wide = softcap * capped
    valid = targets != IGNORED
    index = torch.where(valid, targets, 0).long()[:, None]
    log_z = torch.logsumexp(wide, dim=-1, keepdim=True)
    nll = torch.where(valid, (log_z - wide.gather(-1, index))[:, 0], 0.0).sum()
    z_sum = torch.where(valid, log_z[:, 0].square(), 0.0).sum() * z_loss
    # d nll = softmax - onehot; d z_loss = 2 z log_z softmax
    vocabulary = torch.arange(wide.shape[-1], device=wide.device)
    grad = torch.exp(wide - log_z) * (1 + 2 * z_loss * log_z) - (vocabulary == index).to(wide.dtype)
    if softcap:
        grad = grad * (1 - capped.square())
    return nll, z_sum, torch.where(valid[:, None], grad, 0.0).to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float,
        z_loss: float,
        chunk_tokens: int,
        chunk: Callable[..., ChunkResult],
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        matrix = weight.to(dtype)
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        weight_grad = torch.zeros_like(weight) if needs_grad else None
        nll = torch.zeros((), dtype=torch.promote_types(torch.float32, dtype), device=hidden.device)
        z_sum = torch.zeros_like(nll)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            part = hidden[rows].to(dtype)
            part_nll, part_z, grad = chunk(part @ matrix.T, targets[rows], softcap, z_loss)
            nll += part_nll
            z_sum += part_z
            if hidden_grad is not None and weight_grad is not None:
                hidden_grad[rows] = grad @ matrix
                weight_grad += grad.T @ part
        ctx.save_for_backward(hidden_grad, weight_grad)
        return nll, z_sum

    @staticmethod
    def backward(ctx: Any, nll_grad: Tensor, z_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * nll_grad, weight_grad * nll_grad, None, None, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
    chunk: Callable[..., ChunkResult] = chunk_loss,
) -> tuple[Tensor, Tensor]:
    """Sums over valid targets of the cross entropy and of z_loss * logsumexp^2 (PaLM), as fp32 scalars.

    hidden [N, E], weight [V, E], targets [N] int32 or int64, -100 where there is no loss. `softcap` c replaces logits l
    by c * tanh(l / c). Only the sum of the two results may be differentiated: the gradient was made for that sum.
    `chunk` is `chunk_loss` or a compiled version of it.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, softcap, z_loss, chunk_tokens, chunk, needs_grad)
