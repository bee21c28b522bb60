"""Classification: the loss by the formula, and rows without a class without a say."""

from typing import Any

import torch
from torch import Tensor

from pretrain.objectives.classification import ClassificationConfig, ClassificationObjective
from pretrain.objectives.cross_entropy import IGNORED


class Fixed:
    """A model whose logits are known."""

    def __init__(self, logits: Tensor):
        self._logits = logits

    def logits(self, hidden: Tensor, held: Tensor) -> Tensor:
        return self._logits


def batch(classes: list[int], images: Tensor) -> dict[str, Any]:
    targets = torch.full((len(classes), 4), IGNORED, dtype=torch.int32)
    targets[:, 0] = torch.tensor(classes)
    patches, grid = torch.zeros(len(classes), 4, 12, dtype=torch.uint8), torch.zeros(len(classes), 4, 2)
    return {"targets": targets, "images": images, "patches": patches, "grid": grid, "tokens": targets}


def test_loss_and_accuracy_are_sums_over_pictures() -> None:
    objective = ClassificationObjective(ClassificationConfig())
    logits = torch.tensor([[2.0, 0, 1], [0, 3, 1], [9, 9, 9], [1, 0, 4]], dtype=torch.float64, requires_grad=True)
    ready = objective.collate(batch([0, 2, IGNORED, 2], torch.zeros(4, 4, dtype=torch.int32)))
    assert objective.count([ready, ready]) == 6 and "tokens" not in ready
    sums = objective.loss(Fixed(logits), torch.zeros(4, 4, 8, dtype=torch.float64), ready)
    expected = -sum(logits[row].log_softmax(0)[column] for row, column in ((0, 0), (1, 2), (3, 2)))
    torch.testing.assert_close(sums["loss"], expected)
    assert sums["accuracy"] == 2 and not sums["accuracy"].requires_grad
    sums["loss"].backward()
    assert logits.grad is not None and not logits.grad[2].any() and logits.grad[1].any()


def test_patches_see_their_own_picture_alone() -> None:
    objective = ClassificationObjective(ClassificationConfig())
    whole = torch.zeros(2, 4, dtype=torch.int32)
    assert objective.collate(batch([0, 1], whole))["mask"].is_full
    padded = whole.clone()
    padded[1, 3:] = -1
    mask = objective.collate(batch([0, 1], padded))["mask"]
    assert not mask.causal and torch.equal(mask.documents, padded)


def test_logits_of_bf16_are_compared_in_fp32() -> None:
    objective = ClassificationObjective(ClassificationConfig())
    ready = objective.collate(batch([0], torch.zeros(1, 4, dtype=torch.int32)))
    logits = torch.tensor([[8.0, 8.03125]]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(Fixed(logits), torch.zeros(1, 4, 8), ready)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, -logits.float().log_softmax(1)[0, 0])
