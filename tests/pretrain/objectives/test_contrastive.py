"""Contrastive losses against their definitions, and on several processes against one with the whole batch, in fp64."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from parallel.across import check_across, over_data
from parallel.mesh import Mesh
from pretrain.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from tests.ranks import run_ranks

BATCH, WIDTH = 12, 7
PARTS = ("images", "texts", "scale", "bias")


def samples() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = F.normalize(torch.randn(2, BATCH, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    valid = torch.ones(BATCH, dtype=torch.bool)
    valid[[4, 9]] = False
    return images, texts, valid


def definition(kind: str, images: Tensor, texts: Tensor, valid: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = (images[valid] @ texts[valid].T) * scale + bias
    own = torch.eye(len(logits), dtype=logits.dtype)
    if kind == "sigmoid":
        return -F.logsigmoid((2 * own - 1) * logits).sum()
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels, reduction="sum") + F.cross_entropy(logits.T, labels, reduction="sum")) / 2


def with_gradients(loss, images, texts, valid) -> dict[str, Tensor]:
    scale, bias = torch.tensor([9.0], dtype=torch.float64), torch.tensor([-3.0], dtype=torch.float64)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (images, texts, scale, bias)]
    value = loss(leaves[0], leaves[1], valid, leaves[2], leaves[3])
    gradients = torch.autograd.grad(value * 0.3, leaves)
    return {"loss": value.detach(), **dict(zip(PARTS, gradients, strict=True))}


def objective(kind: str, chunk_rows: int) -> ContrastiveObjective:
    return ContrastiveObjective(ContrastiveConfig(loss=kind, chunk_rows=chunk_rows))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_equals_its_definition_without_rows_that_are_no_pair(kind, chunk_rows):
    images, texts, valid = samples()
    expected = with_gradients(lambda *parts: definition(kind, *parts), images, texts, valid)
    found = with_gradients(objective(kind, chunk_rows).compare, images, texts, valid)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10)


def part_of_a_batch(replicates: int) -> dict[str, dict[str, Tensor]]:
    """Losses and gradients of the samples of this rank; scale's and bias's are sums over them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = Mesh({"pp": 1, "dp_replicate": replicates, "dp_shard": world // replicates, "cp": 1, "tp": 1}, "cpu")
    images, texts, valid = (whole.chunk(world)[rank] for whole in samples())
    results = {}
    for kind in ("softmax", "sigmoid"):
        loss = objective(kind, 2)
        loss.across(over_data(mesh))
        results[kind] = with_gradients(loss.compare, images, texts, valid)
    return results


@pytest.mark.parametrize(("world", "replicates"), [(2, 1), (4, 2)])
def test_processes_equal_one_with_the_whole_batch(world, replicates):
    ranks = run_ranks(part_of_a_batch, world, replicates)
    for kind in ("softmax", "sigmoid"):
        expected = with_gradients(objective(kind, 100).compare, *samples())
        for name, tensor in expected.items():
            parts = [rank[kind][name] for rank in ranks]
            found = torch.cat(parts) if name in ("images", "texts") else torch.stack(parts).sum(0)
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-10)


def test_the_full_matrix_of_similarities_never_exists():
    """Of 64 own and 6,400 samples in all, chunks of 8: 51,200 similarities at once, not 409,600."""
    largest = 0

    def watched(logits, *rest):
        nonlocal largest
        largest = max(largest, logits.numel())
        return ordinary(logits, *rest)

    for kind in ("softmax", "sigmoid"):
        loss = objective(kind, 8)
        loss.across(lambda rows: (rows.repeat(100, *[1] * (rows.ndim - 1)), 64))
        ordinary, loss._chunk = loss._chunk, watched
        features = F.normalize(torch.randn(2, 64, WIDTH), dim=-1)
        loss.compare(features[0], features[1], torch.ones(64).bool(), torch.ones(1), torch.zeros(1))
    assert largest == 8 * 6400


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({}, r"train.global_batch = 64, but .* 16 x 2 = 32; make them equal"),
        ({"pp": 2}, "parallel.pp = 2"),
        ({"cp": 2}, "parallel.cp = 2"),
    ],
)
def test_layouts_that_would_miss_negatives_are_refused(degrees, message):
    plain = {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1}
    with pytest.raises(ValueError, match=message) as caught:
        check_across({**plain, **degrees}, global_batch=64, micro_batch=16)
    assert "\n" not in str(caught.value)
    check_across(plain, global_batch=32, micro_batch=16)
