"""The bugs that cost people months, planted one by one: each must be caught, and called by its name."""

import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from launch.commands.verify import Certifier, Verdict
from parallel import parallelize
from parallel.engines import native
from parallel.mesh import ParallelConfig
from parallel.pipeline import Pipeline
from parallel.world import World
from pretrain.config import resolve
from pretrain.models.decoder.model import Block
from pretrain.shrink import shrink
from pretrain.verify import changed, from_text, measure_layout, to_text

ALONE = {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def certifier(tmp_path_factory):
    config = resolve("tiny", ["train.precision=fp32", "model.heads=4", "model.kv_heads=2"])[0]
    small, _ = shrink(config, {**ALONE, "pp": 2}, 2)
    small = changed(small, {"train.global_batch": 12, "train.micro_batch": 2})
    return Certifier(small, 2, str(tmp_path_factory.mktemp("reference")), timeout=60, device="cpu")


def check(certifier: Certifier, bug, **degrees) -> Verdict:
    """The verdict on a layout in whose processes `bug(world)` was called first."""
    parallel = ParallelConfig(**{**ALONE, **degrees})
    certifier.measure = partial(planted, bug)
    data = parallel.dp_replicate * parallel.dp_shard
    return certifier.verify(parallel, {"adamw": 4 // data})  # 3 micro-batches: a factor of 2 is not theirs


def planted(bug, world: World, *args):
    found = bug(world)
    if found is not None:  # settings of this rank
        args = ([to_text(changed(from_text(text), found)) for text in args[0]], *args[1:])
    return measure_layout(world, *args)


def nothing(world: World) -> None:
    pass


@pytest.mark.parametrize("degrees", [{"dp_shard": 2}, {"cp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_without_a_bug_all_agree(certifier, degrees):
    verdict = check(certifier, nothing, **degrees)
    assert verdict.agrees, verdict.diagnosis()
    assert max(c.share for c in verdict.comparisons.values()) < 0.5


def average_gradients(world: World) -> None:
    divide = FSDPModule.set_gradient_divide_factor
    FSDPModule.set_gradient_divide_factor = lambda self, factor: divide(self, float(world.size))


def test_gradients_averaged_instead_of_summed(certifier):
    lines = check(certifier, average_gradients, dp_shard=2).diagnosis()
    assert lines[0].startswith("embed.weight: its gradient is 0.5 times what it should be")
    assert lines[1].startswith("Every gradient is 0.5 times: exactly 1 / parallel.dp_shard: gradients averaged over it")
    assert lines[2].startswith("The losses agree")


def count_context_twice(world: World) -> None:
    count = native.NativeEngine.sum_over_data
    native.NativeEngine.sum_over_data = lambda self, values: count(self, values) * self.copies


def test_the_loss_under_context_parallelism_divided_by_too_much(certifier):
    lines = check(certifier, count_context_twice, cp=2).diagnosis()
    assert any("Every gradient is 0.5 times: exactly 1 / parallel.cp" in line for line in lines)
    assert any("factor 0.5): exactly 1 / parallel.cp: the loss averaged" in line for line in lines)


def count_own_part_only(world: World) -> None:
    count = native.NativeEngine.sum_over_data
    native.NativeEngine.sum_over_data = lambda self, values: count(self, values) / self.copies


def test_the_loss_under_context_parallelism_not_divided_by_it(certifier):
    lines = check(certifier, count_own_part_only, cp=2).diagnosis()
    assert any("Every gradient is 2.0 times: exactly parallel.cp: gradients summed once too often" in x for x in lines)
    assert any(
        "factor 2.0): exactly parallel.cp: the loss summed once too often over it, or divided" in x for x in lines
    )


def restart_positions(world: World) -> None:
    to_device = native.NativeEngine._to_device

    def unshifted(self, batch):
        moved = to_device(self, batch)
        return {**moved, "positions": torch.arange(moved["tokens"].shape[1])[None]}

    native.NativeEngine._to_device = unshifted


def test_positions_that_are_not_shifted_under_context_parallelism(certifier):
    lines = check(certifier, restart_positions, cp=2).diagnosis()
    assert "embed.weight: its gradient is off by" in lines[0]
    assert "the forward pass computes another function; under cp: positions, mask and targets" in lines[-1]


def double_one_gradient(world: World) -> None:
    settle = native.settle

    def doubled(parameters):
        parameters = list(parameters)
        settle(parameters)
        parameters[3].grad.mul_(2)

    native.settle = doubled


def test_one_gradient_twice_too_big(certifier):
    lines = check(certifier, double_one_gradient, dp_shard=2).diagnosis()
    assert lines[0].startswith(
        "layers.0.attention.v.weight: its gradient is 2.0 times what it should be (the first of 1"
    )
    assert "2.0 times: exactly parallel.dp_shard: gradients summed once too often" in lines[1]


def leave_partial_sums(world: World) -> None:
    native.settle = lambda parameters: None


def test_norms_whose_gradients_are_not_summed_over_tensor_parallelism(certifier):
    lines = check(certifier, leave_partial_sums, tp=2).diagnosis()
    assert lines[0].startswith("layers.0.attention_norm.weight: its gradient is off by")


def other_seed_on_rank_1(world: World) -> dict[str, int] | None:
    return {"run.seed": 77} if world.rank == 1 else None


@pytest.mark.parametrize("degrees", [{"dp_shard": 2}, {"dp_replicate": 2}, {"tp": 2}], ids=str)
def test_another_seed_on_one_rank(certifier, degrees):
    lines = check(certifier, other_seed_on_rank_1, **degrees).diagnosis()
    assert len(lines) == 1
    assert lines[0].startswith("embed.weight is the first of")
    assert "look for another seed on a process" in lines[0]
    assert ("on rank 1 only" in lines[0]) == ("dp_replicate" in degrees)


def read_the_first_part(world: World) -> None:
    build = native.NativeEngine.__init__

    def init(self, spec, world):
        build(self, spec, world)
        self.data_rank = 0

    native.NativeEngine.__init__ = init


def test_all_ranks_reading_the_same_part_of_the_batch(certifier):
    lines = check(certifier, read_the_first_part, dp_shard=2).diagnosis()
    assert "each process must read its own part of the batch" in lines[-1]


def skip_a_layer(world: World) -> None:
    forward = Block.forward
    Block.forward = lambda self, x, *args: x if self.attention.layer == "1" else forward(self, x, *args)


def test_a_layer_that_does_not_run(certifier):
    lines = check(certifier, skip_a_layer, dp_shard=2).diagnosis()
    assert any(line.startswith("No gradient at all: layers.1.*: does not run") for line in lines), lines


def lose_a_layer(world: World) -> None:
    cut = parallelize.cut_stages

    def without_one(spec, mesh):
        first, *others = cut(spec, mesh)
        return [range(first.start, first.stop - 1), *others]

    parallelize.cut_stages = without_one


def test_a_layer_that_no_stage_has(certifier):
    lines = check(certifier, lose_a_layer, pp=2).diagnosis()
    assert lines == [line for line in lines if line.startswith("layers.1.*: on no process, so it does not run")]
    assert lines


def test_a_layer_that_a_stage_leaves_out(certifier):
    lines = check(certifier, skip_a_layer, pp=2).diagnosis()
    assert any(line.startswith("No gradient at all: layers.1.*: does not run") for line in lines), lines


def drop_the_tied_sum(world: World) -> None:
    Pipeline.sum_tied = lambda self, first, last: None


def test_a_tied_embedding_whose_gradients_are_not_summed(certifier):
    lines = check(certifier, drop_the_tied_sum, pp=2).diagnosis()
    assert lines[0].startswith("embed.weight: its gradient is off by")
    assert "(the first of 1 gradients" in lines[0]
    assert lines[1].startswith("embed.weight is used twice (embedding and head share it)")


def sum_the_tied_twice(world: World) -> None:
    once = Pipeline.sum_tied

    def twice(self, first, last):
        once(self, first, last)
        once(self, first, last)

    Pipeline.sum_tied = twice


def test_a_tied_embedding_whose_gradients_are_summed_twice(certifier):
    lines = check(certifier, sum_the_tied_twice, pp=2).diagnosis()
    assert lines[0].startswith("embed.weight: its gradient is 2.0 times what it should be (the first of 1 gradients")
    assert "2.0 times: exactly parallel.pp" in lines[1]


def wait_on_rank_1(world: World) -> None:
    if world.rank == 1:
        time.sleep(600)


def test_a_layout_that_hangs(certifier, monkeypatch):
    monkeypatch.setattr(certifier, "timeout", 8.0)
    verdict = check(certifier, wait_on_rank_1, dp_shard=2)
    assert verdict.failed
    assert verdict.word == "broke"
    assert verdict.diagnosis()[0].startswith("hangs: no end after 8 s; rank 0 in parallel/mesh.py:")
    assert "rank 1 in launch/test_verify_bugs.py" in verdict.diagnosis()[0]


def fail_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def test_a_rank_that_fails_alone_is_no_refusal(certifier):
    verdict = check(certifier, fail_on_rank_1, dp_shard=2)
    assert verdict.failed
    assert verdict.diagnosis()[0].startswith("rank 1 of 2 failed: ")
    assert "the reason" in verdict.diagnosis()[0]


def refuse(world: World) -> None:
    raise ValueError("parallel.tp = 2: no")


def test_what_all_ranks_refuse_is_no_failure(certifier):
    verdict = check(certifier, refuse, tp=2)
    assert not verdict.failed
    assert not verdict.agrees
    assert verdict.refused == "parallel.tp = 2: no"
