"""Pipeline parallelism in the engine, with every other axis: steps, norms and weights equal those of one process."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import parallelize
from parallel.engines.native import NativeEngine
from parallel.gradients import local
from parallel.world import World
from pretrain.config import resolve
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from tests.ranks import run_ranks

SMALL = [
    "train.precision=fp64",
    "train.global_batch=16",
    "train.micro_batch=1",
    "model.vocab_size=67",
    "model.hidden=32",
    "model.layers=5",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn=48",
    "model.tied=true",
    "data.seq_len=16",
    "optim.eps=1e-3",  # AdamW divides near-zero gradients by themselves: rounding would become weights
]


def make_engine(overrides: list[str], compiling: bool = False) -> tuple[NativeEngine, Any, list[dict[str, Any]]]:
    """Engine, objective, and this process's micro-batches of 16 fixed packed rows."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = resolve("tiny", [*SMALL, *overrides])[0]
    objective = OBJECTIVES["causal"][1](config.objective)
    engine: Any = build_engine(config, World(rank, size, torch.device("cpu")), objective, compiling)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 67, (16, 17), generator=generator)
    documents = (torch.rand(16, 16, generator=generator) < 0.2).cumsum(1).int()
    microbatches = []
    for row in torch.arange(16).chunk(engine.data_world)[engine.data_rank].tolist():
        batch = {
            "tokens": tokens[row : row + 1, :-1],
            "targets": tokens[row : row + 1, 1:].masked_fill(tokens[row : row + 1, 1:] < 5, -100),
            "positions": torch.arange(16)[None],
            "documents": documents[row : row + 1],
        }
        microbatches.append(objective.collate(batch))
    return engine, objective, microbatches


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def two_steps(overrides: list[str], compiling: bool = False) -> dict[str, Tensor]:
    """Two steps with an evaluation between: losses, norms, gradients of the first, weights after the second."""
    engine, objective, microbatches = make_engine(overrides, compiling)
    count = engine.sum_over_data(torch.tensor(objective.count(microbatches)))
    result: dict[str, Tensor] = {}
    for step in range(2):
        result[f"loss {step}"] = engine.forward_backward(microbatches, count)["loss"]
        if not step:
            result |= {f"gradient {name}": whole(gradient) for name, gradient in engine.gradients().items()}
        result[f"norm {step}"] = engine.clip_grad_norm()
        engine.step(1e-2)
        result[f"evaluated {step}"] = engine.evaluate(microbatches)["loss"]
    for copy in engine._named.copies.values():
        result["copy"] = whole(copy)
    return result | {f"weight {name}": whole(weight) for name, weight in engine.state_dict()["model"].items()}


def all_layouts(layouts: list[list[str]], compiling: bool = False) -> list[dict[str, Tensor]]:
    return [two_steps(layout, compiling) for layout in layouts]


def check(world: int, layouts: list[list[str]], compiling: bool = False, timeout: float = 120) -> None:
    expected = two_steps([])
    expected["copy"] = expected["weight embed.weight"]
    by_rank = run_ranks(all_layouts, world, layouts, compiling, timeout=timeout)
    for index, layout in enumerate(layouts):
        found = [results[index] for results in by_rank]
        for result in found:
            for name, value in result.items():
                error = (value - expected[name]).abs().max()
                assert error <= 1e-11 * expected[name].abs().max(), f"{layout}: {name} is off by {error}"
        assert {name for result in found for name in result} == expected.keys(), layout
        copies = [r[name] for r in found for name in ("copy", "weight embed.weight") if name in r]
        assert len(copies) > 1 and all(torch.equal(copy, copies[0]) for copy in copies), f"{layout}: copies drift"


def test_two_processes_equal_one():
    check(
        2,
        [
            ["parallel.pp=2"],
            ["parallel.pp=2", "parallel.stage_layers=[4,1]"],
            ["parallel.pp=2", "parallel.schedule=ZBVZeroBubble"],
            ["parallel.pp=2", "parallel.schedule=interleavedzerobubble", "train.recompute=full"],
        ],
    )


@pytest.mark.slow
def test_four_processes_equal_one():
    two = "parallel.pp=2"
    check(
        4,
        [
            ["parallel.pp=4", "parallel.schedule=gpipe"],
            [two, "parallel.schedule=zbvzerobubble"],  # the rest is dp_shard
            [two, "parallel.schedule=1f1b", "train.recompute=selective"],
            [two, "parallel.schedule=loopedbfs", "parallel.dp_replicate=2"],
            [two, "parallel.schedule=interleaved1f1b", "parallel.tp=2"],
            [two, "parallel.schedule=zbvzerobubble", "parallel.tp=2"],
            [two, "parallel.schedule=dualpipev", "parallel.cp=2"],
            [two, "parallel.schedule=interleavedzerobubble", "parallel.cp=2", "parallel.cp_method=ring"],
        ],
    )


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones():
    check(2, [["parallel.pp=2"], ["parallel.pp=2", "parallel.schedule=zbvzerobubble"]], compiling=True, timeout=280)


def test_untied_heads_stay_apart():
    engine_names = run_ranks(_names, 2, ["parallel.pp=2", "model.tied=false"])
    assert "embed.weight" in engine_names[0] and "head.weight" not in engine_names[0]
    assert "head.weight" in engine_names[1] and "embed.weight" not in engine_names[1]


def _names(overrides: list[str]) -> list[str]:
    return list(make_engine(overrides)[0].state_dict()["model"])


class Ledger(TorchDispatchMode):
    """Counts collectives."""

    def __enter__(self) -> "Ledger":
        self.counts: Counter[str] = Counter()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_parameters_are_gathered_and_gradients_reduced_once_a_step():
    """Of 5 layers the first process has 3 and the embedding, the second 2 and the head: 4 and 3 groups."""
    layouts = [["parallel.pp=2", f"parallel.schedule={name}"] for name in ("1f1b", "interleaved1f1b", "zbvzerobubble")]
    for rank, found in enumerate(run_ranks(_ledgers, 4, layouts, timeout=120)):
        groups = 4 if rank < 2 else 3
        for counts, crossings in zip(found, (8, 24, 16), strict=True):
            # One tensor more each way: the embedding's gradient, where its two copies are on two processes.
            tied = int(crossings != 16)
            assert counts == {
                "_allgather_base_": groups,
                "_reduce_scatter_base_": groups,
                "allreduce_": 1,  # the sums
                "send": crossings + tied,
                "recv_": crossings + tied,
            }


def _ledgers(layouts: list[list[str]]) -> list[dict[str, int]]:
    found = []
    for layout in layouts:
        engine, _, microbatches = make_engine(layout)
        for _ in range(2):  # the first makes connections
            with Ledger() as ledger:
                engine.forward_backward(microbatches, torch.tensor(7))
            engine.step(0.0)
        found.append(dict(ledger.counts))
    return found


def test_bf16_parameters_accumulate_in_fp32():
    """A zero-bubble's weights' part passes FSDP's hooks: without care it would add up bf16 gradients in bf16."""
    for plain, zero_bubble in run_ranks(_bf16_gradients, 4, timeout=120):
        assert plain.keys() == zero_bubble.keys()
        for name, gradient in plain.items():
            assert (gradient - zero_bubble[name]).norm() <= 1e-5 * gradient.norm(), name


def _bf16_gradients() -> list[dict[str, Tensor]]:
    shard = parallelize.apply_fsdp
    parallelize.apply_fsdp = lambda *args, **options: shard(*args, **(options | {"bf16": True}))  # as on a GPU
    found = []
    for schedule in ("interleaved1f1b", "interleavedzerobubble"):
        layout = ["train.precision=bf16", "parallel.pp=2", f"parallel.schedule={schedule}"]
        engine, _, microbatches = make_engine(layout)
        engine.forward_backward(microbatches, torch.tensor(7))
        found.append({name: whole(gradient) for name, gradient in engine.gradients().items()})
    return found


def test_loading_reaches_both_copies_of_a_tied_embedding():
    for same in run_ranks(_load, 2, ["parallel.pp=2", "parallel.schedule=dualpipev"]):
        assert same


def _load(layout: list[str]) -> bool:
    engine, _, _ = make_engine(layout)
    state = engine.state_dict()
    assert not any("head.weight" in name for part in state.values() for name in part)
    for part in state.values():
        for tensor in part.values():
            local(tensor).fill_(3.0)
    engine.load_state_dict(state)
    tensors = [p for group in engine.optimizer.param_groups for p in group["params"]]
    moments = [value for p in tensors for value in engine.optimizer.state[p].values()]
    return all(bool((local(tensor) == 3.0).all()) for tensor in [*tensors, *moments])


REFUSED = {
    "parallel.pp = 2 .* the model has 1; set parallel.pp to 1": ["parallel.pp=2", "model.layers=1"],
    "is 1 micro-batches a step on each of 1 data ranks": ["parallel.pp=2", "train.global_batch=1"],
    "stage_layers = .* sums to 4": ["parallel.pp=2", "parallel.stage_layers=[2,2]"],
    "stage_layers = .* has 2 entries, but needs 1": ["parallel.stage_layers=[2,3]"],
    "parallel.schedule = 'zigzag' is unknown": ["parallel.schedule=zigzag"],
}


def test_refused_before_anything_runs():
    for messages in run_ranks(_refusals, 2, list(REFUSED.values()), timeout=120):
        for message, pattern in zip(messages, REFUSED, strict=True):
            assert re.search(pattern, message), message


def _refusals(layouts: list[list[str]]) -> list[str]:
    messages = []
    for layout in layouts:
        with pytest.raises(ValueError) as error:
            make_engine(layout)
        messages.append(str(error.value))
    return messages
