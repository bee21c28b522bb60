"""The fixed order in which a model is spread over processes, written once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parallel.context import apply_context
from parallel.engine import EngineSpec
from parallel.expert import apply_experts, share_routing
from parallel.fsdp import apply_fsdp
from parallel.materialise import init_parameters, materialise
from parallel.mesh import SHARD_AXIS, Mesh
from parallel.pipeline_cut import check_microbatches, cut, cut_by_hand, plan_stages, schedule_class, stages_of
from parallel.plan import freeze, match_modules, styles_of
from parallel.remat import apply_remat, hide_hooks
from parallel.tensor import apply_tensor


class Stage(nn.Module):
    """Model, or a pipeline stage of it, and loss as one module, so that sharding wraps the head's use in the loss too.

    `stage(batch)`, `stage(batch, x)` with the output of the stage before: the sums of the loss, or hidden states where
    another stage follows.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Tensor], loss: Callable[..., Any] | None):
        super().__init__()
        self.model = model
        self._forward, self._loss = forward, loss

    def forward(self, batch: Any, x: Tensor | None = None) -> Any:
        hidden = self._forward(self.model, batch, x)
        return hidden if self._loss is None else self._loss(self.model, hidden, batch)


def parallelize(spec: EngineSpec, mesh: Mesh | None, device: torch.device) -> dict[int, Stage]:
    """The pipeline stages of this process by their index; one that is the whole model without pipeline parallelism.

    `mesh` None: one process. Raises ValueError for a plan that does not fit its model, and for degrees of pipeline
    parallelism that model or batch cannot have.
    """
    stages = cut_stages(spec, mesh)
    pp, pp_rank = (1, 0) if mesh is None else (mesh["pp"].size(), mesh["pp"].get_local_rank())
    held = stages_of(spec.parallel.schedule, pp_rank, pp, len(stages)) if pp > 1 else [0]
    return {index: _make_stage(spec, mesh, device, stages, index) for index in held}


def cut_stages(spec: EngineSpec, mesh: Mesh | None) -> list[range]:
    """Layers of every pipeline stage, of all processes."""
    model = _build(spec)
    schedule_class(spec.parallel.schedule)
    if mesh is None or mesh["pp"].size() == 1:
        layers = len(match_modules(model, spec.plan.blocks))
        return cut_by_hand(spec.parallel.stage_layers or (layers,), layers, 1)
    pp, data = mesh["pp"].size(), mesh["dp_replicate"].size() * mesh[SHARD_AXIS].size() // mesh["cp"].size()
    stages = plan_stages(model, spec.plan, spec.parallel, pp, spec.seq_len)
    check_microbatches(spec.parallel, pp, len(stages), spec.global_batch, spec.micro_batch, data)
    return stages


def modules_on_meta(spec: EngineSpec, pattern: str) -> dict[str, nn.Module]:
    """What `pattern` matches in the whole model; nothing for an empty pattern."""
    return match_modules(_build(spec), pattern) if pattern else {}


def _build(spec: EngineSpec) -> Any:
    with torch.device("meta"):
        model = spec.build()
    return model.double() if spec.precision == "fp64" else model


def _make_stage(spec: EngineSpec, mesh: Mesh | None, device: torch.device, stages: list[range], index: int) -> Stage:
    """Build on meta; cut matrices, then layers, then the sequence; recompute, compile, shard; then allocate and fill.

    Matrices come first because the plan names modules of the whole model. Compile comes before FSDP so that each block
    is one compiled graph and collectives stay outside; recomputation before compile, which then plans it.
    """
    model = _build(spec)
    freeze(model, spec.frozen)
    styles = styles_of(model, spec.plan)
    if mesh is not None and mesh["tp"].size() > 1:
        apply_tensor(model, spec.plan, mesh["tp"])
        model.tie_weights()
    if mesh is not None and spec.plan.experts:
        apply_experts(model, spec.plan, mesh, spec.parallel.expert_tp)
        share_routing(model, spec.plan, mesh)
    experts = {model.get_submodule(name) for name, style in styles.items() if style == "experts"}
    last = index == len(stages) - 1
    cut(model, spec.plan, stages[index], first=index == 0, last=last)
    blocks = match_modules(model, spec.plan.blocks).values() if stages[index] else ()
    if mesh is not None and stages[index]:
        for core in match_modules(model, spec.plan.attention).values():
            apply_context(core, mesh["cp"], spec.parallel.cp_method)
    towers = [block for pattern in spec.plan.towers if index == 0 for block in match_modules(model, pattern).values()]
    numbered = [*zip(stages[index], blocks, strict=True), *enumerate(towers)]
    for number, block in numbered:
        if number % spec.recompute_every == 0:
            apply_remat(block, spec.recompute)
    if spec.compile:
        for _, block in numbered:
            block.compile()
    stage = Stage(model, spec.forward, spec.loss if last else None)
    # On CPU autocast's own cast is cheaper than gathering in bf16.
    bf16 = spec.precision == "bf16" and device.type == "cuda"
    if mesh is not None and (bf16 or mesh["dp_replicate"].size() * mesh[SHARD_AXIS].size() > 1):
        options = spec.parallel
        held = [module for module in model.modules() if module in experts]
        apply_fsdp(
            stage,
            [block for _, block in numbered],
            mesh,
            experts=held,
            bf16=bf16,
            # In a pipeline each micro-batch would gather all parameters again.
            reshard_after_forward=options.reshard_after_forward and len(stages) == 1,
            cpu_offload=options.cpu_offload,
        )
        if spec.recompute == "selective":
            for module in held:
                hide_hooks(module)
    materialise(model, torch.device("cpu") if spec.parallel.cpu_offload else device)
    init_parameters(model, spec.seed, spec.plan.tied)
    return stage
