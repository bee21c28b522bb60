"""Naming classes and finding pairs by features alone, against a dense calculation by hand."""

import pytest
import torch
from torch.nn import functional as F

from pretrain import zero_shot
from pretrain.zero_shot import accuracy, class_vectors, classify, prompts, recall, retrieval


def features(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_class_is_the_mean_direction_of_its_prompts():
    known = {"a cat": [1.0, 0.0], "the cat": [0.0, 1.0], "a dog": [0.0, -1.0], "the dog": [0.0, -1.0]}
    asked = []

    def encode(texts):
        asked.append(list(texts))
        return torch.tensor([known[text] for text in texts])

    vectors = class_vectors(encode, prompts(["cat", "dog"], ["a {}", "the {}"]), at_once=3)  # a class in two batches
    torch.testing.assert_close(vectors, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))
    assert asked == [["a cat", "the cat", "a dog"], ["the dog"]]


def test_nearest_classes_come_first_and_count_as_right_among_k(monkeypatch):
    monkeypatch.setattr(zero_shot, "AT_ONCE", 7)  # rows of similarities in several pieces
    images, classes = features(40, 0), features(5, 1)
    labels = torch.arange(40) % 5
    order = (images @ classes.T).argsort(dim=1, descending=True)
    assert torch.equal(classify(images, classes, 3), order[:, :3])
    for k in (1, 3, 5):
        assert accuracy(images, classes, labels, k) == pytest.approx(
            (order[:, :k] == labels[:, None]).any(1).float().mean()
        )
    assert accuracy(images, classes, labels, 5) == 1.0


def test_recall_both_ways_with_several_texts_of_an_image(monkeypatch):
    monkeypatch.setattr(zero_shot, "AT_ONCE", 4)
    images, texts = features(10, 2), features(30, 3)
    owner = torch.arange(30) // 3
    similar = images @ texts.T
    found = retrieval(images, texts, torch.arange(len(images)), owner, ks=(1, 4))
    for k in (1, 4):
        to_text = [bool((owner[row.argsort(descending=True)[:k]] == i).any()) for i, row in enumerate(similar)]
        to_image = [owner[i] in column.argsort(descending=True)[:k] for i, column in enumerate(similar.T)]
        assert found[f"image_to_text_r{k}"] == pytest.approx(sum(to_text) / 10)
        assert found[f"text_to_image_r{k}"] == pytest.approx(sum(to_image) / 30)
    assert retrieval(images, images, torch.arange(10), torch.arange(10), ks=(1,)) == {
        "text_to_image_r1": 1.0,
        "image_to_text_r1": 1.0,
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompts(["a", "b", "a"], ["{}"]), "'a' is there twice"),
        (lambda: prompts(["a"], ["a photo"]), "'a photo' has no {}"),
        (lambda: prompts([], ["{}"]), "0 class names"),
        (lambda: classify(features(2, 0), features(3, 1), 4), "k = 4: must be 1 to 3"),
        (lambda: accuracy(features(2, 0), features(3, 1), torch.zeros(3)), "2 images and 3 labels"),
        (
            lambda: recall(features(2, 0), features(3, 1), torch.tensor([0, 7]), torch.arange(3), (1,)),
            "nothing belongs",
        ),
        (lambda: recall(features(2, 0), features(3, 1), torch.tensor([0]), torch.arange(3), (1,)), "one each"),
        (lambda: recall(features(2, 0), features(3, 1), torch.tensor([0, 1]), torch.arange(3), (0,)), "k = 0"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
