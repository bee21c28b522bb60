"""The DeepSpeed engine against the native one: steps, state, checkpoints of each resumed by the other."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoints.store import CheckpointStore
from parallel.world import World
from pretrain.config import resolve
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from pretrain.resume import resume
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs pip install 'pretrain-stack[deepspeed]'"
    ),
]

SMALL = [
    "train.precision=fp32",
    "train.global_batch=8",
    "train.micro_batch=2",
    "model.vocab_size=67",  # no number of processes divides it
    "model.hidden=32",
    "model.layers=2",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn=48",
    "data.seq_len=16",
    "optim.eps=1e-3",  # AdamW divides near-zero gradients by themselves: rounding would become weights
    "deepspeed.persistent=0",  # or ZeRO 3 would cut none of parameters as small as these
]
NATIVE = "engine=torch"
DENSE = ["model.tied=true", "objective.z_loss=1e-3"]
SPARSE = ["model.moe.bias=true", "model.moe.z_weight=0.01", "model.moe.ffn=16", "model.moe.shared_ffn=16"]
LEARNING_RATE = 1e-3


def zero(stage: int, *more: str) -> list[str]:
    return ["engine=deepspeed", f"deepspeed.zero={stage}", *more]


EVERY = [[NATIVE], *(zero(stage) for stage in range(4)), zero(3, "deepspeed.persistent=2000")]


class Trained:
    """An engine on synthetic batches, those of a step the same whatever the layout."""

    def __init__(self, overrides: list[str], recipe: str = "tiny", compiling: bool = False):
        self.config = resolve(recipe, [*SMALL, *overrides])[0]
        self.objective = OBJECTIVES["causal"][1](self.config.objective)
        self.world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
        self.engine: Any = build_engine(self.config, self.world, self.objective, compiling)

    def batches(self, step: int) -> list[dict[str, Any]]:
        generator, size = torch.Generator().manual_seed(step), self.config.train.global_batch
        tokens = torch.randint(0, 67, (size, 17), generator=generator)
        documents = (torch.rand(size, 16, generator=generator) < 0.2).cumsum(1).int()
        targets = tokens[:, 1:].masked_fill(tokens[:, 1:] < 20, -100)
        own = torch.arange(size).chunk(self.engine.data_world)[self.engine.data_rank]
        return [
            self.objective.collate(
                {
                    "tokens": tokens[rows, :-1],
                    "targets": targets[rows],
                    "positions": torch.arange(16)[None],
                    "documents": documents[rows],
                }
            )
            for rows in own.split(self.config.train.micro_batch)
        ]

    def steps(self, numbers: range, evaluate: bool = True) -> dict[str, Tensor]:
        """What each step reports, and an evaluation after it."""
        found = {}
        for step in numbers:
            batches = self.batches(step)
            count = self.engine.sum_over_data(torch.tensor(self.objective.count(batches)))
            for name, value in self.engine.forward_backward(batches, count).items():
                found[f"{name} of step {step}"] = value
            if step == numbers[0]:
                found |= {f"gradient {name}": whole(value) for name, value in self.engine.gradients().items()}
            found[f"norm of step {step}"] = self.engine.clip_grad_norm()
            self.engine.step(LEARNING_RATE)
            if evaluate:
                found[f"evaluation after step {step}"] = self.engine.evaluate(self.batches(1000))["loss"]
        return found

    def state(self) -> dict[str, Tensor]:
        state = self.engine.state_dict()
        return {f"{part} {name}": whole(value) for part, tensors in state.items() for name, value in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(layouts: list[list[str]], steps: int, recipe: str = "tiny") -> list[dict[str, Tensor]]:
    results = []
    for layout in layouts:
        trained = Trained(layout, recipe)
        start = {f"initial {name}": value for name, value in trained.state().items()}
        results.append(start | trained.steps(range(steps)) | trained.state())
        trained.engine.close()
    return results


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, layout: Any) -> None:
    """Initial values to the bit; weights and moments, which rounding makes drift apart, to 20 times `tolerance`."""
    assert found.keys() == expected.keys(), (layout, found.keys() ^ expected.keys())
    off = []
    for name, value in expected.items():
        error, size = (float(t.abs().max()) for t in (found[name].double() - value.double(), value.double()))
        drift = 20 if name.startswith(("model", "optimizer")) else 1
        if not error <= (0 if name.startswith("initial") else drift * tolerance * size):
            off.append(f"{name} by {error:.1e} of {size:.1e}")
    assert not off, f"{layout}: {len(off)} of {len(expected)} are off: {'; '.join(off[:5])}"


def check(layouts: list[list[str]], steps: int, tolerance: float, recipe: str = "tiny", world: int = 2) -> None:
    """The layouts after the first compute what the first does."""
    for by_layout in run_ranks(train, world, layouts, steps, recipe, timeout=280):
        for layout, found in zip(layouts[1:], by_layout[1:], strict=True):
            check_same(found, by_layout[0], tolerance, layout)


def test_every_stage_equals_native():
    check([[*DENSE, *layout] for layout in EVERY], steps=4, tolerance=2e-5)


def test_experts_and_their_routers_equal_native():
    check([[*SPARSE, *layout] for layout in EVERY], steps=4, tolerance=2e-5, recipe="tiny-moe")


def test_three_processes_that_divide_nothing_equal_native():
    """Averages over three are undone, and flat parts end in padding."""
    batch = ["train.global_batch=6", "train.micro_batch=1", *DENSE]
    check([[*batch, *layout] for layout in (EVERY[0], *EVERY[2:5])], steps=3, tolerance=2e-5, world=3)


OPTIONS = {
    "bf16": (["train.precision=bf16"], 1e-2),
    "no clipping, one micro-batch": (["optim.clip_grad_norm=0", "train.micro_batch=4"], 2e-5),
    "recomputed": (["train.recompute=full"], 2e-5),
    "trained in part": (['optim.freeze=["layers.0.mlp.*"]', 'optim.lr_ratios={"*.attention.*"=0.3}'], 2e-5),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_run_equal_native(name):
    more, tolerance = OPTIONS[name]
    layouts = [[NATIVE], zero(0), zero(2), zero(3)]
    check([["model.tied=false", *more, *layout] for layout in layouts], steps=3, tolerance=tolerance)


def test_what_is_kept_on_the_host_changes_nothing():
    on_host = "deepspeed.offload_optimizer=cpu"
    layouts = [
        zero(1, on_host),
        zero(2, on_host),
        zero(3, on_host),
        zero(3, on_host, "deepspeed.offload_parameters=cpu"),
    ]
    check([[NATIVE], *layouts], steps=3, tolerance=2e-5)


def test_any_checkpoint_is_resumed_by_any(tmp_path):
    """All ordered pairs of native and each stage."""
    expected, *pairs = run_ranks(resume_all, 2, tmp_path, timeout=290)[0]
    for pair, found in pairs:
        check_same(found, expected, 2e-5, pair)


def resume_all(folder: Path) -> list[Any]:
    results: list[Any] = []
    engines = [Trained([*DENSE, *layout]) for layout in EVERY]
    stores = [CheckpointStore(folder / str(number)) for number in range(len(engines))]
    for trained, store in zip(engines, stores, strict=True):
        trained.steps(range(3))
        state = trained.engine.state_dict()
        store.save(3, **state, state={"cursor": 0}, ties=trained.engine.ties)
    for trained in engines:
        for number, store in enumerate(stores):
            trained.steps(range(100, 102), evaluate=False)  # what is resumed must go over what is there
            assert resume(store, 3, trained.engine, trained.world).step == 3
            results.append(
                ((EVERY[number], trained.config.deepspeed.zero), trained.steps(range(3, 6)) | trained.state())
            )
    return [results[0][1], *results]


def test_a_step_of_other_micro_batches_is_refused():
    assert "2 micro-batches in a step that was set up for 1" in run_ranks(_other_batches, 1)[0]


def _other_batches() -> str:
    trained = Trained(zero(2, "train.micro_batch=8"))
    batches = trained.batches(0)
    with pytest.raises(ValueError, match="micro-batches") as raised:
        trained.engine.forward_backward([*batches, *batches], torch.tensor(1))
    return str(raised.value)


def test_what_cannot_work_here_is_refused(tmp_path):
    compiled, on_disk = run_ranks(_refused, 1, str(tmp_path))[0]
    assert 'set train.compile = "off", or deepspeed.zero = 2' in compiled
    assert 'deepspeed.offload_optimizer = "nvme" needs libaio' in on_disk and 'or set it to "cpu"' in on_disk


def _refused(folder: str) -> list[str]:
    disk = ["deepspeed.offload_optimizer=nvme", f"deepspeed.nvme_path={folder}"]
    from deepspeed.ops.op_builder import AsyncIOBuilder  # in the rank alone, as it may not be installed

    AsyncIOBuilder.is_compatible = lambda *_, **__: False  # as where libaio is missing
    messages = []
    for overrides, compiling in ((zero(3), True), (zero(3, *disk), False)):
        try:
            Trained(overrides, compiling=compiling)
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("")
    return messages
