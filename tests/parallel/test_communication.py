"""What a training step communicates, by count and bytes, against the count on paper: no hidden all-gather.

B rows a micro-batch, S tokens, E hidden, F feed-forward, H heads, K key/value heads, D head dim, V vocabulary,
L layers.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from parallel import ring
from parallel.world import World
from pretrain.config import resolve
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from pretrain.train import train_step
from tests.parallel.ledger import Ledger
from tests.ranks import run_ranks

B, S, E, F, H, K, D, V, L = 2, 16, 32, 48, 4, 4, 8, 64, 3
MODEL = [
    "train.precision=fp32",
    f"model.vocab_size={V}",
    f"model.hidden={E}",
    f"model.layers={L}",
    f"model.heads={H}",
    f"model.kv_heads={K}",
    f"model.ffn={F}",
    f"data.seq_len={S}",
]
FP32 = 4  # bytes


def on_paper(dp: int, replicas: int, cp: int, tp: int, microbatches: int, recompute: str) -> dict[str, tuple[int, int]]:
    """Kind of collective -> (calls, bytes of the larger of its input and output) on one rank in one step."""
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()

    def add(kind: str, number: int, each: int) -> None:
        calls[kind] += number
        size[kind] += number * each

    shards = dp * cp
    block = (2 * E * H * D + 2 * E * K * D + 3 * E * F) // tp + 2 * E
    ends = V * E // tp + E  # the head is tied to the embedding
    for _ in range(microbatches):
        if shards > 1:
            add("all_gather", 2 * L, block * FP32)  # forward, and backward again
            add("all_gather", 1, ends * FP32)
        if shards > 1 or replicas > 1:
            add("reduce_scatter", L, block * FP32)
            add("reduce_scatter", 1, ends * FP32)
        if tp > 1:
            whole = B * S // cp * E * FP32
            add("all_gather", 4 * L, whole)  # forward: into attention and feed-forward; backward: out of both
            add("reduce_scatter", 4 * L, whole)
            add("all_gather", 2, whole)  # embedding's backward; hidden states for the loss
            add("reduce_scatter", 2, whole)  # embedding; gradient of the hidden states
            add("all_gather", 1, 2 * B * S // cp * tp * FP32)  # log-sum-exp and logit of the target of each token
            if recompute == "full":
                add("all_gather", 2 * L, whole)
                add("reduce_scatter", L, whole)  # of attention; nothing needs that of the feed-forward again
            if recompute == "selective":
                add("all_gather", 2 * L, whole)
        if cp > 1:
            heads = H // tp, K // tp
            add("all_to_all", 2 * L, B * S // cp * (heads[0] + 2 * heads[1]) * D * FP32)
            add("all_to_all", 2 * L, B * S // cp * heads[0] * D * FP32)
    if tp > 1:  # norms see a part of the sequence each; sharded gradients are settled in each micro-batch
        add("all_reduce", (2 * L + 1) * (microbatches if shards * replicas > 1 else 1), E * FP32)
    if replicas > 1:
        add("all_reduce", 1, (L * block + ends) * FP32 // shards)
        calls["all_reduce"] += L
    add("all_reduce", 1, 24)  # targets, requests to stop and to save, int64
    add("all_reduce", 1, FP32)  # the loss
    add("all_reduce", 1, 8)  # square of the gradient's norm, fp64
    return {kind: (calls[kind], size[kind]) for kind in calls}


def step(layout: list[str], microbatches: int) -> dict[str, tuple[int, int]]:
    config = resolve("tiny", [*MODEL, *layout])[0]
    objective = OBJECTIVES["causal"][1](config.objective)
    engine = build_engine(config, World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")), objective)
    zeros = {name: torch.zeros(B, S, dtype=torch.int64) for name in ("tokens", "targets", "positions", "documents")}
    batches = [objective.collate(zeros)] * microbatches
    with Ledger() as ledger:
        train_step(engine, objective, batches, 1e-3, {"stop": False, "save": False})
    return {kind: (ledger.calls[kind], ledger.bytes[kind]) for kind in ledger.calls}


CASES = [
    (2, 1, 1, 1, 2, "none"),
    (2, 2, 1, 1, 2, "none"),
    (1, 1, 2, 1, 1, "none"),
    (1, 1, 1, 2, 2, "none"),
    (2, 1, 1, 2, 2, "none"),
    (1, 1, 2, 2, 1, "none"),
    (1, 1, 1, 2, 1, "full"),
    (2, 1, 1, 2, 1, "selective"),
]


@pytest.mark.parametrize(("dp", "replicas", "cp", "tp", "microbatches", "recompute"), CASES)
def test_a_step_communicates_what_it_must_and_no_more(dp, replicas, cp, tp, microbatches, recompute):
    layout = {"dp_shard": dp, "dp_replicate": replicas, "cp": cp, "tp": tp}
    overrides = [*(f"parallel.{axis}={degree}" for axis, degree in layout.items()), f"train.recompute={recompute}"]
    expected = on_paper(dp, replicas, cp, tp, microbatches, recompute)
    for found in run_ranks(step, dp * replicas * cp * tp, overrides, microbatches):
        assert found == expected


def _ring_traffic() -> tuple[int, int]:
    sent: list[int] = []
    shift = ring._Shift

    class Counted(shift):
        def __init__(self, tensor: torch.Tensor, *args: object):
            sent.append(tensor.nbytes)
            super().__init__(tensor, *args)

    ring._Shift = Counted
    step(["parallel.cp=4", "parallel.cp_method=ring"], 1)
    return len(sent), sum(sent)


def test_the_ring_sends_keys_and_values_round_once_and_back_with_their_gradients():
    each = 2 * B * S // 4 * K * D * FP32
    for found in run_ranks(_ring_traffic, 4):
        assert found == (L * (3 + 3 + 4), L * (3 + 3 + 4) * each)
