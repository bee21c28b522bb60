"""What DeepSpeed is given: its configuration, and the native model with its initial values, cut from the start."""

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.engine import Batch, EngineSpec, Sums
from parallel.engines.deepspeed_options import DeepSpeedOptions
from parallel.materialise import init_parameters
from parallel.parallelize import Stage
from parallel.plan import freeze, match_modules, styles_of
from parallel.remat import apply_remat

LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's own choice, which it allocates however small the model is


class Computation(Stage):
    """Model and loss as one module: micro-batch -> sums. Autocast stands inside: DeepSpeed turns off one around it."""

    def __init__(self, model: nn.Module, spec: EngineSpec, device: torch.device):
        super().__init__(model, spec.forward, spec.loss)
        self._device_type, self._bf16 = device.type, spec.precision == "bf16"

    def forward(self, batch: Batch, x: Tensor | None = None) -> Sums:
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            sums: Sums = super().forward(batch, x)
        return sums


def check_options(options: DeepSpeedOptions, compiling: bool) -> None:
    """Raises ValueError where state is to lie on nvme and DeepSpeed cannot read and write there, and for blocks that
    are to be compiled while their parameters come and go.
    """
    if compiling and options.zero == 3:
        raise ValueError(
            "deepspeed.zero = 3 gathers parameters within blocks, which torch cannot compile; set train.compile = "
            '"off", or deepspeed.zero = 2'
        )
    places = {"offload_optimizer": options.offload_optimizer, "offload_parameters": options.offload_parameters}
    for key, place in places.items():
        if place == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
            raise ValueError(
                f'deepspeed.{key} = "nvme" needs libaio and its headers (Debian: libaio-dev), which DeepSpeed does not '
                'find on this machine; install them, or set it to "cpu"'
            )


def build_model(spec: EngineSpec) -> Any:
    """On meta: frozen, recomputing and compiling as asked. Raises ValueError for a plan that does not fit it."""
    with torch.device("meta"):
        model: Any = spec.build()
    freeze(model, spec.frozen)
    styles_of(model, spec.plan)
    for pattern in (spec.plan.blocks, *spec.plan.towers):
        for number, block in enumerate(match_modules(model, pattern).values()):
            if number % spec.recompute_every == 0:
                apply_remat(block, spec.recompute)
            if spec.compile:
                block.compile()
    return model


def make_config(spec: EngineSpec, options: DeepSpeedOptions, accumulation: int, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration. elements: of all parameters."""
    zero: dict[str, Any] = {"stage": options.zero, "reduce_bucket_size": min(LARGEST_BUCKET, elements)}
    if options.zero == 3:
        zero |= {
            "stage3_param_persistence_threshold": options.persistent,
            "memory_efficient_linear": False,  # replaces torch's linear function for the whole process
        }
    pinned = torch.cuda.is_available()
    for key, place in (("offload_optimizer", options.offload_optimizer), ("offload_param", options.offload_parameters)):
        if place != "none":
            zero[key] = {"device": place, "pin_memory": pinned}
        if place == "nvme":
            zero[key]["nvme_path"] = options.nvme_path
    return {
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": spec.clip_grad_norm if options.zero else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW updates on the host too, and in the same way
        "steps_per_print": None,
    }


def fill(model: Any, spec: EngineSpec, device: torch.device, config: dict[str, Any], optimizer: Optimizer) -> None:
    """Allocate parameters and give them their initial values.

    ZeRO 3 cuts each as soon as it has them, so that no process ever holds the whole model. optimizer: made for the
    parameters on meta, since the cut ones have no dims to go by; it gets the new ones.
    """
    made: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, meta in list(module.named_parameters(recurse=False)):
            if id(meta) not in made:
                parameter = nn.Parameter(torch.empty_like(meta, device=device), requires_grad=meta.requires_grad)
                full_name = f"{module_name}.{name}" if module_name else name
                init_parameters(_One(model, full_name, parameter), spec.seed, spec.plan.tied)
                made[id(meta)] = parameter
            module.register_parameter(name, made[id(meta)])
        if config["zero_optimization"]["stage"] == 3:
            deepspeed.zero.Init(_Holder(module), config_dict_or_path=config, dtype=torch.float32)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty_like(buffer, device=device)
    init_parameters(_One(model), spec.seed, spec.plan.tied)
    for group in optimizer.param_groups:
        group["params"] = [made[id(meta)] for meta in group["params"]]


class _Holder(nn.Module):
    """The parameters of a module without those below it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


class _One:
    """What `init_parameters` sees of a model: one parameter, or its buffers."""

    def __init__(self, model: Any, name: str = "", parameter: nn.Parameter | None = None):
        self.init_parameter = model.init_parameter
        self._model, self._name, self._parameter = model, name, parameter

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        if self._parameter is not None:
            yield self._name, self._parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        if self._parameter is None:
            yield from self._model.named_buffers()
