"""Cross entropy straight from hidden states, in chunks of tokens: the logits of the batch never exist at once.

The gradient with respect to the hidden states and the head is made in the forward pass, chunk by chunk, while the
chunk's logits are still there; backward only scales it. N tokens, E hidden, V vocabulary.

A head that is cut over tensor-parallel processes is never gathered, and neither are logits: each process has the logits
of its part of the vocabulary for all tokens of the group, and only two numbers a token are exchanged (Shoeybi et al.
2019, arXiv:1909.08053).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from pretrain.models.layers.linear import product_dtype

IGNORED = -100  # target of a position that has no loss

ChunkResult = tuple[Tensor, Tensor, Tensor]  # cross entropy [N], z-loss [N], gradient of their sum by the logits [N, V]


class Vocabulary(NamedTuple):
    """The part of the vocabulary that this process has: tokens from `first` on, of those that `mesh` shares."""

    first: int = 0
    mesh: DeviceMesh | None = None

    @property
    def size(self) -> int:
        """Number of processes that share the vocabulary."""
        return 1 if self.mesh is None else self.mesh.size()


def chunk_loss(logits: Tensor, targets: Tensor, softcap: float, z_loss: float, part: Vocabulary) -> ChunkResult:
    """logits [N, V] of `part` as they leave the head, targets [N]. The gradient has the logits' dtype."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        capped = torch.tanh(wide / softcap)
        wide = softcap * capped
    valid = targets != IGNORED
    index = targets.long()[:, None] - part.first
    held = (index >= 0) & (index < wide.shape[-1])
    log_z = torch.logsumexp(wide, dim=-1, keepdim=True)
    of_target = torch.where(held, wide.gather(-1, torch.where(held, index, 0)), 0.0)
    if part.mesh is not None:
        log_z, of_target = _over_parts(log_z, of_target, part)
    nll = torch.where(valid, (log_z - of_target)[:, 0], 0.0)
    z = torch.where(valid, log_z[:, 0].square() * z_loss, 0.0)
    # d nll = softmax - onehot; d z_loss = 2 z log_z softmax
    vocabulary = torch.arange(wide.shape[-1], device=wide.device)
    grad = torch.exp(wide - log_z) * (1 + 2 * z_loss * log_z) - (vocabulary == index).to(wide.dtype)
    if softcap:
        grad = grad * (1 - capped.square())
    return nll, z, torch.where(valid[:, None], grad, 0.0).to(logits.dtype)


def _over_parts(log_z: Tensor, of_target: Tensor, part: Vocabulary) -> tuple[Tensor, Tensor]:
    """Of the whole vocabulary from those of each part: [N, 1] both."""
    parts = _gather_rows(torch.cat((log_z, of_target), dim=1), part).unflatten(0, (part.size, -1))
    return torch.logsumexp(parts[..., 0], dim=0)[:, None], parts[..., 1].sum(dim=0)[:, None]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        part: Vocabulary,
        softcap: float,
        z_loss: float,
        chunk_tokens: int,
        chunk: Callable[..., ChunkResult],
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [N / size, E], this process's rows; targets [size, N / size], those of all the group's rows."""
        dtype = product_dtype(hidden)
        matrix = weight.to(dtype)
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        weight_grad = torch.zeros_like(weight) if needs_grad else None
        losses = torch.zeros(targets.shape, dtype=torch.promote_types(torch.float32, dtype), device=hidden.device)
        z_sum = losses.new_zeros(())
        step = max(1, chunk_tokens // part.size)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            inputs = _gather_rows(hidden[rows].to(dtype), part)
            part_nll, part_z, grad = chunk(inputs @ matrix.T, targets[:, rows].flatten(), softcap, z_loss, part)
            losses[:, rows] = part_nll.view(part.size, -1)
            z_sum += part_z.sum()
            if hidden_grad is not None and weight_grad is not None:
                hidden_grad[rows] = _scatter_rows(grad @ matrix, part)
                weight_grad += grad.T @ inputs
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), z_sum, losses

    @staticmethod
    def backward(ctx: Any, nll_grad: Tensor, z_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * nll_grad, weight_grad * nll_grad, None, None, None, None, None, None, None


def _gather_rows(rows: Tensor, part: Vocabulary) -> Tensor:
    """The rows of all processes that share the vocabulary, one process's after the other's."""
    return rows if part.mesh is None else DTensor.from_local(rows, part.mesh, [Shard(0)]).full_tensor()


def _scatter_rows(rows: Tensor, part: Vocabulary) -> Tensor:
    """Those of the rows that are this process's, summed over all."""
    if part.mesh is None:
        return rows
    return DTensor.from_local(rows, part.mesh, [Partial()]).redistribute(placements=[Shard(0)]).to_local()


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
    chunk: Callable[..., ChunkResult] = chunk_loss,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over valid targets of the cross entropy and of z_loss * logsumexp^2 (PaLM), as fp32 scalars; and the cross
    entropy of each target, [B, S], which has no gradient.

    hidden [B, S, E], weight [V, E], targets [B, S] int32 or int64, -100 where there is no loss. Where the weight is
    distributed over tensor-parallel processes (a DTensor, its rows cut), hidden [B, S / tp, E] is this process's part
    of each sequence, and the sums are over whole sequences on each of them. `softcap` c replaces logits l by
    c * tanh(l / c). Only the sum of the two sums may be differentiated: the gradient was made for that sum. `chunk`
    is `chunk_loss` or a compiled version of it.
    """
    part = Vocabulary()
    if isinstance(weight, DTensor):
        mesh, rows = weight.device_mesh, -(-weight.shape[0] // weight.device_mesh.size())  # torch.chunk's
        part = Vocabulary(mesh.get_local_rank() * rows, mesh)
        weight = weight.to_local()
    by_process = targets.unflatten(1, (part.size, -1)).transpose(0, 1).flatten(1)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    nll, z_sum, losses = _ChunkedCrossEntropy.apply(
        hidden.flatten(0, -2), weight, by_process, part, softcap, z_loss, chunk_tokens, chunk, needs_grad
    )
    return nll, z_sum, losses.unflatten(1, (targets.shape[0], -1)).transpose(0, 1).flatten(1)
