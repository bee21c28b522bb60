"""Sketches against the shingle sets they stand for."""

import numpy as np
import pytest

from data_pipeline.doctor.minhash import BINS, MIN_TOKENS, Sketches, groups, near_pairs, similarity, sketch


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    sets = [
        {tuple(row) for row in np.lib.stride_tricks.sliding_window_view(each, 5).tolist()} for each in (first, second)
    ]
    return len(set.intersection(*sets)) / len(set.union(*sets))


def pairs_of_documents(count: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Documents 2 i and 2 i + 1 are alike, from hardly to wholly; and how much they are."""
    draw, documents, truth = np.random.default_rng(seed), [], []
    for _ in range(count):
        first = draw.integers(0, 500, int(draw.integers(40, 1500))).astype(np.uint16)
        second = first.copy()
        changed = draw.random(len(second)) < draw.choice([0, 0.005, 0.02, 0.05, 0.2])
        second[changed] = draw.integers(0, 500, int(changed.sum()))
        documents += [first, second]
        truth.append(jaccard(first, second))
    return documents, np.array(truth)


def sketched(documents: list[np.ndarray]) -> Sketches:
    lengths = np.array([len(document) for document in documents])
    return sketch(np.concatenate(documents), lengths, np.arange(len(documents)))


def test_similarity_is_estimated_without_bias() -> None:
    documents, truth = pairs_of_documents(200)
    numbers = np.arange(0, 400, 2)
    errors = similarity(sketched(documents).values, numbers, numbers + 1) - truth
    assert abs(errors.mean()) < 0.01 and errors.std() < 0.045, "the standard deviation of 128 values"
    assert np.abs(errors[truth == 1]).max() == 0


def test_strangers_are_not_alike() -> None:
    draw = np.random.default_rng(1)
    documents = [draw.integers(0, 500, int(draw.integers(MIN_TOKENS, 60))).astype(np.uint16) for _ in range(500)]
    values = sketched(documents).values
    assert similarity(values, np.arange(499), np.arange(1, 500)).max() < 0.05, "also where most bins had to be filled"
    assert len(near_pairs(values, 0.5)) == 0


def test_near_pairs_are_those_of_comparing_all() -> None:
    documents, _ = pairs_of_documents(60)
    values = sketched(documents).values
    first, second = np.triu_indices(len(values), 1)
    alike = similarity(values, first, second) >= 0.8
    assert near_pairs(values, 0.8).tolist() == np.stack([first, second], axis=1)[alike].tolist()


def test_a_document_does_not_see_its_neighbours() -> None:
    documents, _ = pairs_of_documents(3)
    alone = [sketched([document]).values[0] for document in documents]
    assert (sketched(documents).values == np.stack(alone)).all()


def test_short_documents_have_no_sketch() -> None:
    documents = [np.arange(MIN_TOKENS - 1), np.arange(0), np.arange(MIN_TOKENS), np.arange(3)]
    found = sketched([document.astype(np.uint32) for document in documents])
    assert found.documents.tolist() == [2] and found.values.shape == (1, BINS)
    assert sketched([np.arange(3)]).values.shape == (0, BINS)


def test_a_sample_keeps_pairs_together() -> None:
    """A tenth of the documents has about a tenth of the pairs; chosen one by one it would have a hundredth."""
    documents, _ = pairs_of_documents(400, seed=3)
    found = sketched(documents).smallest(80)
    assert len(found.documents) == 80 and (np.diff(found.documents) > 0).all()
    kept = set(found.documents.tolist())
    pairs = [number for number in range(400) if {2 * number, 2 * number + 1} <= kept]
    assert len(pairs) > 15, "of 400 pairs, of which most are alike"
    halves = [sketched(documents[:300]), sketched(documents[300:])]
    halves[1] = Sketches(halves[1].documents + 300, halves[1].order, halves[1].values)
    again = Sketches.joined([half.smallest(80) for half in halves]).smallest(80)
    assert (again.documents == found.documents).all(), "the same sample, however it is reached"


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [([], []), ([[1, 2]], [[1, 2]]), ([[5, 7], [1, 2], [2, 7], [8, 9]], [[1, 2, 5, 7], [8, 9]])],
)
def test_groups(pairs, expected) -> None:
    assert groups(np.array(pairs, np.int64).reshape(-1, 2)) == expected


def test_many_copies_are_one_group() -> None:
    document = np.random.default_rng(0).integers(0, 500, 300)
    values = sketched([document] * 1000).values
    pairs = near_pairs(values, 0.8)
    assert len(pairs) < 2000, "not every pair of them"
    assert groups(pairs) == [list(range(1000))]
