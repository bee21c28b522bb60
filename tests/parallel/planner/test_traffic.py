"""What the planner says a step communicates, against what it must be on paper and what a run dispatches."""

from collections import Counter
from dataclasses import replace
from math import prod

import pytest

from parallel.planner.gpus import GPUS
from parallel.planner.layout import Layout, Setting
from parallel.planner.traffic import step_traffic
from pretrain.config import resolve
from pretrain.planner import ask, stage_cuts
from tests.parallel.test_communication import CASES, FP32, MODEL, B, E, L, S, V, on_paper, step
from tests.ranks import run_ranks


def setting_of(layout: Layout, microbatches: int, *words: str) -> Setting:
    batch = B * microbatches * layout.data
    config = resolve("tiny", [*MODEL, f"train.global_batch={batch}", f"train.micro_batch={B}", *words])[0]
    question = ask(config, {}, layout.gpus, GPUS["h100"])
    program = replace(question.program, once=layout.pp > 1)
    return Setting(question.space.shape, layout, program, GPUS["h100"], batch, stage_cuts(question)(layout))


def planned(setting: Setting, rank: int = 0) -> dict[str, tuple[float, float]]:
    """Kind -> (calls, bytes of the larger of input and output) of one process."""
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for t in step_traffic(setting, setting.parts[rank]):
        kind = t.kind.replace("-", "_")
        calls[kind] += t.count
        size[kind] += t.count * t.size
    return {kind: (calls[kind], size[kind]) for kind in calls}


def without_scalars(found: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Without the sums of counts and requests, loss and norm, which the planner leaves out."""
    calls, size = found["all_reduce"]
    rest = {kind: value for kind, value in found.items() if kind != "all_reduce"}
    return rest | ({"all_reduce": (calls - 3, size - 24 - FP32 - 8)} if calls > 3 else {})


@pytest.mark.parametrize(("dp", "replicas", "cp", "tp", "microbatches", "recompute"), CASES)
def test_planned_is_what_is_on_paper(dp, replicas, cp, tp, microbatches, recompute):
    """`on_paper` is asserted against the run's own kernels in test_communication."""
    layout = Layout(dp_shard=dp, dp_replicate=replicas, cp=cp, tp=tp, micro_batch=B, recompute=recompute)
    paper = without_scalars(on_paper(dp, replicas, cp, tp, microbatches, recompute))
    assert planned(setting_of(layout, microbatches)) == paper


def test_a_ring_sends_keys_and_values_round_once_and_back_with_their_gradients():
    layout = Layout(cp=4, cp_method="ring", micro_batch=B)
    each = 2 * B * S // 4 * E * FP32
    assert planned(setting_of(layout, 1))["send"] == (L * (3 + 3 + 4), L * (3 + 3 + 4) * each)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"pp": 2}, []),
        ({"pp": 2, "dp_shard": 2}, []),
        ({"pp": 2, "tp": 2}, []),
        ({"pp": 3}, []),
        ({"tp": 2, "dp_shard": 2}, ["model.mlp_bias=true", "model.qkv_bias=true"]),
        ({"tp": 2, "cp": 2}, ["objective.chunk_tokens=8"]),  # a loss in several chunks
        ({"tp": 4}, ["model.kv_heads=2"]),  # keys and values that processes share
        ({"dp_shard": 2}, ["model.tied=false"]),
    ],
    ids=str,
)
def test_planned_is_what_a_run_dispatches_on_every_kind_of_rank(degrees, words):
    """Here the run itself is asked."""
    microbatches = 4
    layout = Layout(**degrees, micro_batch=B, keep="pp" in degrees)
    overrides = [*(f"parallel.{axis}={degree}" for axis, degree in {"dp_shard": 1, **degrees}.items()), *words]
    batch = B * microbatches * layout.data
    overrides += [f"train.global_batch={batch}", f"train.micro_batch={B}"]
    setting = setting_of(layout, microbatches, *words)
    world = prod(degrees.values())
    for rank, found in enumerate(run_ranks(step, world, overrides, microbatches)):
        pp_rank = rank // (world // layout.pp)
        found = without_scalars(found)
        if neighbours := setting.parts[pp_rank].forward_sends + setting.parts[pp_rank].backward_sends:
            calls, size = found["send"]  # in its first step torch greets each neighbour with one number
            found["send"] = (calls - neighbours, size - FP32 * neighbours)
        assert planned(setting, pp_rank) == found, f"rank {rank}"


EXPERTS = {"experts": 4, "top_k": 2, "ffn": 24, "first_dense": 1, "balance": "global"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"dp_shard": 2, "ep": 2}, []),
        ({"dp_shard": 2, "ep": 2}, ["train.recompute=full"]),
        ({"dp_shard": 2, "ep": 2}, ["train.recompute=selective"]),
        ({"tp": 2}, []),
        ({"dp_shard": 2, "tp": 2, "ep": 2}, []),
        ({"dp_shard": 2, "tp": 2, "ep": 2, "expert_tp": False}, []),
        ({"dp_shard": 2, "cp": 2, "ep": 2}, []),
    ],
    ids=str,
)
def test_planned_rows_of_experts_are_those_that_all_ranks_send(degrees, words):
    """How many rows a process gets is the routers' choice; how many all of them send is not."""
    words = [*(f"model.moe.{key}={value}" for key, value in EXPERTS.items()), *words]
    recompute = next((w.partition("=")[2] for w in words if "recompute" in w), "none")
    layout = Layout(**degrees, micro_batch=B, recompute=recompute)
    overrides = [f"parallel.{axis}={str(degree).lower()}" for axis, degree in {"dp_shard": 1, **degrees}.items()]
    overrides += [f"train.global_batch={2 * B * layout.data}", f"train.micro_batch={B}", *words]
    ranks = run_ranks(step, layout.gpus, overrides, 2)
    trips = 2 * (L - EXPERTS["first_dense"]) * (1 if recompute == "none" else 2)
    calls, size = planned(setting_of(layout, 2, *words))["all_to_all"]
    if layout.ep > 1:  # how many rows, of each expert
        calls, size = calls + trips, size + trips * EXPERTS["experts"] * 8
    assert [found["all_to_all"][0] for found in ranks] == [calls] * layout.gpus
    assert sum(found["all_to_all"][1] for found in ranks) == size * layout.gpus


def test_what_is_sent_is_less_than_what_is_gathered():
    setting = setting_of(Layout(dp_shard=4, micro_batch=B), 1)
    gather = next(t for t in step_traffic(setting, setting.parts[0]) if t.what == "embedding and head")
    assert gather.size == (V * E + E) * FP32
    assert gather.sent == gather.size * 3 / 4
