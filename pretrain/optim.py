"""Optimizers: AdamW, and Muon with AdamW beside it."""

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.optim.adamw import adamw

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(BaseModel):
    """The recipe's `[optim]` section."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: Muon on hidden matrices, AdamW on the rest"
    )
    lr: float = Field(default=3e-4, gt=0, description="peak learning rate")
    betas: tuple[DecayRate, DecayRate] = Field(
        default=(0.9, 0.95), description="AdamW: decay rates of the two moments, in [0, 1)"
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW: added to the root of the second moment")
    weight_decay: float = Field(
        default=0.1, ge=0, description="decoupled weight decay of matrices, embeddings too; not norms, biases"
    )
    freeze: tuple[str, ...] = Field(
        default=(), description="parameters that stay as they are, by pattern: vision.*, layers.0.*"
    )
    lr_ratios: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="pattern of parameters -> learning rate as a multiple of lr; the first that matches"
    )
    clip_grad_norm: float = Field(default=1.0, ge=0, description="maximum norm of the whole gradient; 0 = no clipping")
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="decay, a step, of a moving average of the weights kept beside them; 0 = none",
    )
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon: decay rate of the momentum")
    muon_nesterov: bool = Field(default=True, description="Muon: Nesterov momentum")
    muon_ns_steps: int = Field(default=5, ge=1, le=20, description="Muon: Newton-Schulz iterations")
    muon_precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Muon: precision of these products; fp32: layouts agree to rounding"
    )
    muon_adamw_lr_ratio: float = Field(
        default=1.0,
        gt=0,
        description="Muon: learning rate of the parameters left to AdamW, as a multiple of lr",
    )


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates this parameter: a matrix (or a stack of them) that is no embedding and no head.

    Embeddings and heads are known by their module's name, which ends in `embed` or `head`.
    """
    return parameter.ndim >= 2 and not any(part.endswith(("embed", "head")) for part in name.split("."))


def build_optimizer(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig) -> Optimizer:
    """The optimizer of `config` over the parameters that require gradients (tensors or DTensors).

    Weight decay falls on everything of two or more dims, embeddings and head included, as in Megatron-LM.
    The learning rate is then set from outside, by `parallel.optimizer_state.set_lr`.
    Raises ValueError when nothing is trainable.
    """
    groups: dict[tuple[bool, bool, float, Any], list[torch.nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            use_muon = config.name == "muon" and is_hidden_matrix(name, parameter)
            # Fused kernels take DTensors of one mesh only.
            mesh = getattr(parameter, "device_mesh", None)
            matched = (ratio for pattern, ratio in config.lr_ratios.items() if fnmatchcase(name, pattern))
            groups.setdefault((use_muon, parameter.ndim >= 2, next(matched, 1.0), mesh), []).append(parameter)
    if not groups:
        raise ValueError(
            f"optim.freeze = {list(config.freeze)} leaves nothing to train, or nothing on one process of the pipeline; "
            "freeze less, or set parallel.pp = 1"
        )
    param_groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "lr_ratio": ratio * (config.muon_adamw_lr_ratio if config.name == "muon" and not use_muon else 1.0),
            "use_muon": use_muon,
        }
        for (use_muon, decayed, ratio, _), parameters in groups.items()
    ]
    for group in param_groups:
        group["lr"] = config.lr * group["lr_ratio"]
    if config.name == "adamw":
        return torch.optim.AdamW(param_groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    return Muon(param_groups, config)


class Muon(Optimizer):
    """Muon for groups with `use_muon`, AdamW for the others, in one optimizer.

    Muon steps along the orthogonalised momentum. Its rate is scaled by 0.2 sqrt(max(rows, columns)), so that
    an update is as large as AdamW's and AdamW's learning rate and weight decay carry over.
    `torch.optim.Muon` is not used: it takes matrices only, has no precision but bf16, by which sharded and
    whole runs drift apart, and on DTensors each of its matmuls communicates.

    Sources: Jordan et al. 2024, kellerjordan.github.io/posts/muon; scale, Liu et al. arXiv:2502.16982.
    """

    def __init__(self, param_groups: list[dict[str, Any]], config: OptimConfig):
        defaults = {
            "lr": config.lr,
            "betas": config.betas,
            "eps": config.eps,
            "momentum": config.muon_momentum,
            "nesterov": config.muon_nesterov,
            "ns_steps": config.muon_ns_steps,
            "ns_dtype": torch.bfloat16 if config.muon_precision == "bf16" else torch.float32,
        }
        super().__init__(param_groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients in `.grad`; parameters without one are left alone."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["use_muon"] else self._adamw)(group, parameters)

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        updates = []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffer, grad = state["momentum_buffer"], p.grad
            assert grad is not None
            buffer.lerp_(grad, 1 - momentum)
            updates.append(grad.lerp(buffer, momentum) if group["nesterov"] else buffer)
        directions = orthogonalise(updates, group["ns_steps"], group["ns_dtype"])
        for p, update in zip(parameters, directions, strict=True):
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(update.to(p.dtype), alpha=-lr * 0.2 * math.sqrt(max(p.shape[-2:])))

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] = {
                    "step": step,
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in parameters]
        adamw(
            [_local(p) for p in parameters],
            [_local(p.grad) for p in parameters],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(matrices: list[Tensor], steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Replace each matrix [..., rows, columns] by about U V^T of its SVD; singular values land in 0.7 to 1.2.

    DTensors: the whole matrix is orthogonalised, never a shard. Matrices of one shape go as many at a time as
    the mesh has ranks: an all-to-all gives each rank one whole matrix, another takes the results back, so no
    work is done twice. Results are of `dtype`, with their inputs' placements.
    """
    results: list[Tensor] = list(matrices)
    batches: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        if isinstance(matrix, DTensor) and _is_cut(matrix):
            batches.setdefault((matrix.shape, matrix.device_mesh, matrix.placements), []).append(i)
        else:
            results[i] = _placed(_newton_schulz(_local(matrix).to(dtype), steps), matrix, matrix.shape)
    for (shape, mesh, placements), members in batches.items():
        for start in range(0, len(members), mesh.size()):
            chunk = members[start : start + mesh.size()]
            # Stacked along a new last dim, so that the placements of the others stay valid as they are.
            stack = torch.stack([_local(matrices[i]).to(dtype) for i in chunk], dim=-1)
            like = matrices[chunk[0]]
            owned = _placed(stack, like, (*shape, len(chunk))).redistribute(placements=[Shard(len(shape))] * mesh.ndim)
            whole = owned.to_local().movedim(-1, 0).contiguous()
            done = _newton_schulz(whole, steps).movedim(0, -1).contiguous()
            back = _placed(done, owned, owned.shape).redistribute(placements=placements)
            for i, part in zip(chunk, back.to_local().unbind(-1), strict=True):
                results[i] = _placed(part, like, shape)
    return results


def _placed(local: Tensor, like: Tensor, shape: Sequence[int]) -> Any:
    """`local` as this rank's part of a tensor of `shape` placed as `like`; itself when that is no DTensor."""
    if not isinstance(like, DTensor):
        return local
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=torch.Size(shape), stride=stride)


def _is_cut(matrix: DTensor) -> bool:
    """Whether a rank holds less than whole matrices (the last two dims)."""
    return any(
        placement.is_partial() or getattr(placement, "dim", -1) >= matrix.ndim - 2 for placement in matrix.placements
    )


def _newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """Quintic iteration towards the orthogonal factor of matrix [..., rows, columns]; zeros stay zeros."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
