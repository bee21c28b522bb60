"""The pipeline alone, around a small model: every schedule gives the sums and gradients of one process, in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from parallel.fsdp import apply_fsdp
from parallel.mesh import Mesh, ParallelConfig
from parallel.parallelize import Stage
from parallel.pipeline import Pipeline, _MicrobatchStage
from parallel.pipeline_cut import cut, cut_layers, num_stages, schedule_names, stages_of
from tests.parallel.pipeline_model import WIDTH, SmallModel, batches, forward, loss, plan
from tests.ranks import RankError, run_ranks

CPU = torch.device("cpu")
COUNT = torch.tensor(7.0, dtype=torch.float64)
SUMS = ("loss", "square")


def stages_in(schedule: str, pp: int) -> int:
    return num_stages(ParallelConfig(schedule=schedule), pp, 99)


def whole_model(layers: int, tied: bool) -> SmallModel:
    torch.manual_seed(0)
    return SmallModel(layers, tied).double()


def make(schedule: str, tied: bool = False, dp: int = 1, **options: Any) -> tuple[dict[int, Stage], Pipeline, Mesh]:
    """One layer more than stages, so that one stage has two."""
    pp = dist.get_world_size() // dp
    mesh = Mesh({"pp": pp, "dp_replicate": 1, "dp_shard": dp, "cp": 1, "tp": 1}, "cpu")
    stages = stages_in(schedule, pp)
    cuts = cut_layers([1.0] * (stages + 1), stages, head_cost=0.5)
    modules = {}
    for index in stages_of(schedule, mesh["pp"].get_local_rank(), pp, stages):
        model = whole_model(stages + 1, tied)
        cut(model, plan(tied), cuts[index], first=index == 0, last=index == stages - 1)
        modules[index] = Stage(model, forward, loss if index == stages - 1 else None)
        if dp > 1:
            apply_fsdp(modules[index], model.layers.values(), mesh, bf16=False, reshard_after_forward=False)
    pipeline = Pipeline(
        modules,
        schedule=schedule,
        num_stages=stages,
        group=mesh["pp"].get_group(),
        device=CPU,
        hidden_shape=lambda batch: (*batch["tokens"].shape, WIDTH),
        dtype=torch.float64,
        sums=SUMS,
        **options,
    )
    return modules, pipeline, mesh


def one_step(schedule: str, tied: bool, dp: int, split: bool = True) -> dict[str, Any]:
    """An evaluation and a step, both twice; what the second ones gave."""
    modules, pipeline, mesh = make(schedule, tied, dp, split_backward=split)
    # FSDP puts gathered parameters in their place: these are the ones that are trained.
    named = {name: parameter for stage in modules.values() for name, parameter in stage.model.named_parameters()}
    number, rank = micro_batches(schedule, pipeline.size), mesh["dp_shard_cp"].get_local_rank()
    mine = batches(number * dp)[rank * number : (rank + 1) * number]
    for _ in range(2):
        for parameter in named.values():
            parameter.grad = None
        evaluated = pipeline.evaluate(iter(batches(3, rows=1 + rank, seed=1)))
        sums = pipeline.forward_backward(mine, COUNT)
    if tied:
        pipeline.sum_tied(named.get("embed.weight"), named.get("head.weight"))
    found = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in named.items()}
    return {"sums": sums, "evaluated": evaluated, "gradients": found}


def micro_batches(schedule: str, pp: int) -> int:
    return 2 * stages_in(schedule, pp)


def all_steps(cases: list[tuple]) -> list[dict[str, Any]]:
    return [one_step(*case) for case in cases]


def expected_step(schedule: str, tied: bool, dp: int, world: int) -> dict[str, Any]:
    pp = world // dp
    model = whole_model(stages_in(schedule, pp) + 1, tied)
    result: dict[str, Any] = {"sums": dict.fromkeys(SUMS, 0.0), "evaluated": dict.fromkeys(SUMS, 0.0)}
    for batch in batches(micro_batches(schedule, pp) * dp):
        sums = loss(model, forward(model, batch), batch)
        (sums["loss"] / COUNT).backward()
        result["sums"] = {name: result["sums"][name] + sums[name].detach() for name in SUMS}
    for rank in range(dp):
        for batch in batches(3, rows=1 + rank, seed=1):
            sums = loss(model, forward(model, batch), batch)
            result["evaluated"] = {name: result["evaluated"][name] + sums[name].detach() for name in SUMS}
    result["gradients"] = {name: p.grad for name, p in model.named_parameters()}
    if tied:
        result["gradients"]["head.weight"] = model.embed.weight.grad
    return result


CASES = [(schedule, tied) for schedule in schedule_names() for tied in (False, True)]


@pytest.mark.parametrize(
    ("world", "dp", "cases"),
    [
        (2, 1, [*((*case, 1) for case in CASES), *((name, True, 1, False) for name in schedule_names())]),
        (4, 1, [(*case, 1) for case in CASES]),
        (4, 2, [(*case, 2) for case in CASES]),
    ],
    ids=["pp2", "pp4", "pp2 x dp_shard2"],
)
def test_equals_one_process(world, dp, cases):
    by_rank = run_ranks(all_steps, world, cases, timeout=90)
    for index, case in enumerate(cases):
        expected = expected_step(case[0], case[1], dp, world)
        found = [results[index] for results in by_rank]
        for kind in ("sums", "evaluated"):  # on the last stage; zeros elsewhere
            for name in SUMS:
                total = sum(result[kind][name] for result in found)
                torch.testing.assert_close(total, expected[kind][name], rtol=1e-12, atol=0, msg=f"{case} {kind} {name}")
        covered = set()
        for result in found:
            for name, gradient in result["gradients"].items():
                error = (gradient - expected["gradients"][name]).abs().max()
                assert error <= 1e-12 * expected["gradients"][name].abs().max(), f"{case}: {name} is off by {error}"
                covered.add(name)
        assert covered == expected["gradients"].keys(), case
        if case[1]:
            copies = [r["gradients"][n] for r in found for n in ("embed.weight", "head.weight") if n in r["gradients"]]
            assert all(torch.equal(copy, copies[0]) for copy in copies), f"{case}: the copies drift apart"


def test_1f1b_keeps_no_more_micro_batches_alive_than_stages():
    peaks = run_ranks(_peaks, 4, ["1f1b", "gpipe"], 12)
    assert [peak for peak, _ in peaks] == [4, 3, 2, 1]
    assert [peak for _, peak in peaks] == [12, 12, 12, 12]


def _peaks(schedules: list[str], number: int) -> list[int]:
    events: list[int] = []
    for name, change in (("forward_one_chunk", 1), ("backward_one_chunk", -1)):
        _watch(name, lambda _stage, change=change: events.append(change))
    peaks = []
    for schedule in schedules:
        events.clear()
        make(schedule)[1].forward_backward(batches(number), COUNT)
        peaks.append(max(sum(events[: i + 1]) for i in range(len(events))))
    return peaks


def test_what_was_received_is_let_go():
    """Of 12 micro-batches one at a time is held besides the graphs, where torch alone would keep all 24 tensors."""
    assert max(run_ranks(_most_buffers, 4, 12)) <= 1


def _most_buffers(number: int) -> int:
    held = []

    def note(stage: _MicrobatchStage) -> None:
        infos = [
            i for by_chunk in (stage.args_recv_info, stage.grad_recv_info) for each in by_chunk.values() for i in each
        ]
        held.append(sum(i.buffer is not None and i.buffer.numel() > 0 for i in infos))

    _watch("forward_one_chunk", note)
    _watch("backward_one_chunk", note)
    _, pipeline, _ = make("1f1b")
    for _ in range(2):
        pipeline.forward_backward(batches(number), COUNT)
    return max(held)


def _watch(name: str, note: Callable[[_MicrobatchStage], None]) -> None:
    original = getattr(_MicrobatchStage, name)

    def watched(stage: _MicrobatchStage, *args: Any, **kwargs: Any) -> Any:
        note(stage)
        return original(stage, *args, **kwargs)

    setattr(_MicrobatchStage, name, watched)


def test_evaluation_overlaps_micro_batches():
    """12 micro-batches in 4 stages: 4 after one another fill the pipeline, and the next 4 follow without a gap."""
    assert run_ranks(_slots, 4) == [{"1f1b": (15, 1), "interleaved1f1b": (27, 1)}] * 4


def _slots() -> dict[str, tuple[int, int]]:
    """Number of slots, and how often this process computed in the busiest."""
    found = {}
    for schedule in ("1f1b", "interleaved1f1b"):
        modules, pipeline, _ = make(schedule)
        computed, move = [0], pipeline._move

        def next_slot(under_way: list[Any], computed: list[int] = computed, move: Any = move) -> list[Any]:
            computed.append(0)
            return move(under_way)

        def compute(*_: Any, computed: list[int] = computed) -> None:
            computed[-1] += 1

        pipeline._move = next_slot  # type: ignore[method-assign]
        for module in modules.values():
            module.register_forward_pre_hook(compute)
        pipeline.evaluate(batches(12))
        found[schedule] = (len(computed) - 1, max(computed))
    return found


def test_evaluation_of_nothing_has_no_sums():
    assert run_ranks(_evaluate_nothing, 2) == [{}, {}]


def _evaluate_nothing() -> dict[str, Any]:
    return make("1f1b")[1].evaluate([])


def test_a_users_mistake_within_a_stage_comes_out_as_it_is():
    with pytest.raises(RankError, match=r"(?m)^ValueError: this mask cannot be had"):
        run_ranks(_refuse, 2)


def _refuse() -> None:
    modules, pipeline, _ = make("1f1b")

    def refuse(*_: Any) -> None:
        raise ValueError("this mask cannot be had")

    for module in modules.values():
        module.register_forward_pre_hook(refuse)
    pipeline.forward_backward(batches(4), COUNT)
