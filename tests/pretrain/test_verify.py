"""The runs that a layout is compared with: really fp64, well conditioned, sensitive to what a layout can get wrong."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Shard, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.mesh import AXES
from parallel.verify import Distance, typical_error
from parallel.world import World
from pretrain.config import RunConfig, recipe_names, resolve
from pretrain.shrink import shrink
from pretrain.verify import (
    OPTIMIZERS,
    Reference,
    adamw_eps,
    changed,
    check_layout,
    compare_layout,
    compares_samples,
    from_text,
    make_reference,
    measure_layout,
    run_steps,
    to_text,
    whole,
)
from tests.ranks import run_ranks

ALONE = World(0, 1, torch.device("cpu"))
ONE = dict.fromkeys(AXES, 1)


def small(recipe: str = "tiny", *overrides: str) -> RunConfig:
    config = resolve(recipe, ["train.precision=fp32", *overrides])[0]
    config, _ = shrink(config, ONE, 2)
    micro_batch = 4 if compares_samples(config) else 2
    return changed(config, {"train.global_batch": 4, "train.micro_batch": micro_batch, "parallel.dp_shard": 1})


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So small a model is many times slower with more, where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_thread):
    """The reference of `small()`, and its folder."""
    folder = tmp_path_factory.mktemp("reference")
    return make_reference(ALONE, to_text(small()), 2, str(folder)), folder


class Narrowing(TorchDispatchMode):
    """Names the operators that turn fp64 into less."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = {x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        if torch.float64 in given and made & {torch.float32, torch.bfloat16, torch.float16}:
            self.found.add(str(func))
        return result


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name not in ("gpu-defaults", "llama3-70b")])
def test_fp64_stays_fp64_in_every_recipe(recipe):
    config = changed(small(recipe), {"train.precision": "fp64", "optim.name": "adamw"})  # Muon's products are narrow
    with Narrowing() as narrowing:
        outcome = run_steps(config, ALONE, 1)
    assert not narrowing.found
    assert all(tensor.dtype == torch.float64 for tensor in outcome.tensors["gradients"].values())


def test_fp64_stays_fp64_with_softcaps_and_z_loss():
    config = small("tiny", "model.attention_softcap=20", "model.logit_softcap=10", "objective.z_loss=1e-3")
    with Narrowing() as narrowing:
        run_steps(changed(config, {"train.precision": "fp64"}), ALONE, 1)
    assert not narrowing.found


def test_rounding_is_small_and_a_run_agrees_with_itself(made):
    config, (report, folder) = small(), made
    for optimizer in OPTIMIZERS:
        distances = {name: Distance(*fields) for name, fields in report[optimizer]["gradients"].items()}
        assert 1e-8 < typical_error(distances) < 3e-6  # of fp32, and of nothing less
        assert all(fields[0] == 0 for fields in report[optimizer]["initial weights"].values())
    chosen = changed(config, {"optim.name": "muon", "train.micro_batch": 4})
    (record,) = measure_layout(ALONE, [to_text(chosen)], 2, str(folder), report["eps"])
    json.dumps(record)
    comparison = compare_layout(chosen, 1, [record], report["muon"])
    assert comparison.agrees, comparison.diagnosis()
    assert comparison.layout.accumulation == 1
    assert comparison.layout.tied == ("embed.weight",)
    assert {kind: len(rows) for kind, rows in comparison.rows.items()} == {
        "initial weights": 20,
        "losses": 3,
        "gradients": 20,
        "norms": 2,
        "weights": 20,
    }


@pytest.mark.parametrize(
    "other",
    [{"objective.document_mask": False}, {"run.seed": 2}, {"optim.weight_decay": 0.2}, {"optim.betas": (0.9, 0.951)}],
    ids=str,
)
def test_what_is_a_little_different_does_not_agree(made, other):
    config, (report, folder) = small(), made
    chosen = changed(config, {"optim.name": "adamw", **other})
    (record,) = measure_layout(ALONE, [to_text(chosen)], 2, str(folder), report["eps"])
    comparison = compare_layout(chosen, 1, [record], report["adamw"])
    assert not comparison.agrees
    kinds = {kind for kind in comparison.rows if comparison.off(kind)}
    assert ("gradients" in kinds) == ("optim" not in next(iter(other)))
    assert "weights" in kinds


def test_eps_is_the_gradients_scale_after_clipping():
    config = small()
    outcome = run_steps(config, ALONE, 1)
    norm = outcome.numbers["norms"]["gradient norm of step 1"]
    gradients = outcome.tensors["gradients"].values()
    count = sum(gradient.numel() for gradient in gradients)
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-6)
    unclipped = changed(config, {"optim.clip_grad_norm": 0.0})
    assert adamw_eps(unclipped, outcome) == pytest.approx(norm / count**0.5)
    assert adamw_eps(changed(config, {"optim.clip_grad_norm": norm / 2}), outcome) == pytest.approx(
        norm / 2 / count**0.5
    )
    assert adamw_eps(changed(config, {"optim.eps": 5.0}), outcome) == 5.0


def test_weights_are_compared_by_their_change(made):
    """A weight of 1 that moves by 1e-4 instead of 2e-4 is off by half, not by 1e-4."""
    report, folder = made
    outcome = run_steps(changed(small(), {"train.precision": "fp64", "optim.eps": report["eps"]}), ALONE, 2)
    start, end = outcome.tensors["initial weights"], outcome.tensors["weights"]
    outcome.tensors["weights"] = {name: (start[name] + end[name]) / 2 for name in end}
    weights = Reference(Path(folder), "adamw").distances(outcome)["weights"]
    assert Distance(*weights["norm.weight"]).relative == pytest.approx(0.5)
    assert Distance(*weights["norm.weight"]).factor == pytest.approx(0.5)


def gathered() -> list[list[float]]:
    mesh = init_device_mesh("cpu", (2,))
    mine = torch.tensor([1.0, 2.0]) + mesh.get_local_rank()
    tensors = {
        "cut": DTensor.from_local(mine, mesh, [Shard(0)], run_check=False),
        "partial": DTensor.from_local(mine, mesh, [Partial()], run_check=False),
        "plain": mine,
    }
    return [tensor.tolist() for tensor in whole(tensors).values()]


def test_tensors_are_gathered_but_sums_left_undone_stay_so():
    """The optimizer would not add up a partial gradient either; doing it here would hide the bug."""
    first, second = run_ranks(gathered, 2)
    assert first == [[1, 2, 2, 3], [1, 2], [1, 2]]
    assert second == [[1, 2, 2, 3], [2, 3], [2, 3]]


def test_processes_follow_from_the_degrees():
    config = resolve("tiny", ["model.heads=4", "parallel.tp=2"])[0]
    assert check_layout(config, None)[0] == 4  # dp_shard = -1 counts 2
    assert check_layout(config, 4) == (4, {**ONE, "dp_shard": 2, "tp": 2, "ep": 1})
    with pytest.raises(ValueError, match=r"need a multiple of 2 processes, but 3 run"):
        check_layout(config, 3)
    assert from_text(to_text(config)) == config
