"""The packed stream against a plain rebuilding of it, document by document."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.pack import IGNORED, TokenStream, permutation, permuted
from data_pipeline.reader import TokenDataset
from tests.data_pipeline.conftest import make_shards, unique_documents


def rebuild(documents: list[np.ndarray], seq_len: int, seed: int, start: int, count: int, shuffle: bool) -> list[dict]:
    """The same samples by laying out whole epochs and walking over them."""
    rows = []
    total = sum(map(len, documents))
    per_epoch = max(1, -(-(total - 1) // seq_len))
    for sample in range(start, start + count):
        epoch, place = divmod(sample, per_epoch)
        order = permutation(len(documents), seed, epoch) if shuffle else range(len(documents))
        once = [(int(t), at == 0) for index in order for at, t in enumerate(documents[index])]
        stream = once * (2 + seq_len // total)
        if shuffle:
            place = int(permuted(np.array([place]), per_epoch, seed, epoch)[0])
        part = stream[place * seq_len : (place + 1) * seq_len + 1]
        tokens = [token for token, _ in part]
        targets = [IGNORED if first else token for token, first in part[1:]]
        positions, ordinals, position, ordinal = [], [], -1, 0
        for place, (_, first) in enumerate(part[:-1]):
            restart = first and place > 0
            position, ordinal = (0, ordinal + 1) if restart else (position + 1, ordinal)
            positions.append(position)
            ordinals.append(ordinal)
        rows.append({"tokens": tokens, "targets": targets, "positions": positions, "documents": ordinals})
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    num_shards=st.integers(1, 3),
    seq_len=st.integers(1, 9),
    seed=st.integers(0, 2**64),
    start=st.integers(0, 40),
    count=st.integers(1, 6),
    shuffle=st.booleans(),
)
def test_stream_equals_walking_over_the_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths, num_shards, seq_len, seed, start, count, shuffle
) -> None:
    documents = unique_documents(lengths)
    folder = make_shards(tmp_path_factory.mktemp("s") / "d", documents, num_shards=num_shards)
    stream = TokenStream(TokenDataset(folder / "train-*.tar"), seq_len=seq_len, seed=seed, shuffle=shuffle)
    samples = stream.read(start, count)
    for row, expected in enumerate(rebuild(documents, seq_len, seed, start, count, shuffle)):
        for name, values in expected.items():
            assert getattr(samples, name)[row].tolist() == values, name


def test_every_epoch_holds_every_token_once_in_another_order(write_shards) -> None:
    folder = write_shards(unique_documents([7, 1, 30, 4, 18] * 4), num_shards=3)
    dataset = TokenDataset(folder / "train-*.tar")
    stream = TokenStream(dataset, seq_len=1, seed=5)
    assert stream.num_samples == 239  # the first token is no target
    epochs = [stream.read(epoch * 239, 239).tokens for epoch in range(3)]
    for tokens in epochs:
        assert len(set(tokens[:, 0])) == len(set(tokens[:, 1])) == 239
        assert set(tokens.flat) == set(range(240))
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_seed_changes_order_and_far_samples_need_no_scan(write_shards) -> None:
    folder = write_shards(unique_documents([10] * 50), num_shards=2)
    dataset = TokenDataset(folder / "train-*.tar")
    first, second = (TokenStream(dataset, seq_len=16, seed=seed) for seed in (1, 2))
    assert (first.read(0, 8).tokens != second.read(0, 8).tokens).any()
    far = TokenStream(dataset, seq_len=16, seed=1)
    assert (far.read(10**9, 2).tokens == first.read(10**9, 2).tokens).all()


def test_samples_of_a_batch_come_from_all_over_the_corpus(write_shards) -> None:
    """One document far longer than the others must not fill whole batches."""
    dataset = TokenDataset(write_shards(unique_documents([900, *[1] * 99])) / "train-*.tar")
    samples = TokenStream(dataset, seq_len=2, seed=3).read(0, 100)
    neighbours = np.abs(np.diff(samples.tokens[:, 0])) <= 4
    assert neighbours.mean() < 0.1


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 4097])
def test_permuted_is_a_permutation_in_any_slices(size) -> None:
    whole = permuted(np.arange(size), size, 7, 3)
    assert sorted(whole) == list(range(size))
    for part in np.array_split(np.arange(size), 3):
        assert (permuted(part, size, 7, 3) == whole[part]).all()
    if size > 100:
        assert (whole != permuted(np.arange(size), size, 7, 4)).any()
        assert abs(np.corrcoef(whole, np.arange(size))[0, 1]) < 0.1


def test_permuted_never_changes() -> None:
    assert permuted(np.arange(8), 8, 1, 0).tolist() == PINNED_PIECES, "the order of every existing run would change"


def test_permutation_is_one_and_never_changes() -> None:
    assert sorted(permutation(1000, 7, 3)) == list(range(1000))
    assert permutation(8, 1, 0).tolist() == PINNED, "the order of every existing run would change"


PINNED_PIECES = [2, 1, 5, 3, 0, 4, 7, 6]
PINNED = [0, 1, 4, 3, 7, 2, 6, 5]


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 0)])
def test_impossible_samples_are_refused(write_shards, start, count) -> None:
    stream = TokenStream(TokenDataset(write_shards([np.arange(5)]) / "train-00000.tar"), seq_len=2)
    with pytest.raises(ValueError, match="start must be 0 or more"):
        stream.read(start, count)


def test_sequence_length_must_be_positive(write_shards) -> None:
    with pytest.raises(ValueError, match="seq_len 0"):
        TokenStream(TokenDataset(write_shards([np.arange(5)]) / "train-00000.tar"), seq_len=0)


def test_shards_are_found_by_path_object_and_string(write_shards) -> None:
    folder: Path = write_shards([np.arange(5)])
    assert TokenDataset(str(folder / "train-00000.tar")).num_tokens == 5


def test_groups_of_shards_are_shuffled_among_themselves(write_shards) -> None:
    """What is read at one time lies in few shards, and an epoch still has every token once."""
    dataset = TokenDataset(write_shards(unique_documents([10] * 96), num_shards=8) / "train-*.tar")
    stream = TokenStream(dataset, seq_len=8, seed=3, together=2)
    count = stream.num_samples
    epochs = [stream.read(epoch * count, count).tokens[:, :-1] for epoch in range(2)]
    for tokens in epochs:
        assert len(set(tokens.flat)) >= 959, "each token but the last, which is a target alone"
    assert (epochs[0] != epochs[1]).any()
    for start in range(0, count, 10):
        documents = stream.documents(start, 10).documents
        assert len(set(dataset.shards_of(documents).tolist())) <= 4, "two groups of two at most"
    first = stream.documents(0, count // 4).documents
    assert (np.abs(np.diff(first)) > 1).mean() > 0.5, "shuffled inside a group"
    assert len(set(dataset.shards_of(stream.documents(0, 3).documents).tolist())) <= 2
    whole = TokenStream(dataset, seq_len=8, seed=3, together=8).read(0, count)
    assert (whole.tokens == TokenStream(dataset, seq_len=8, seed=3).read(0, count).tokens).all()


def test_skipped_documents_are_no_targets_and_nothing_else_changes(write_shards) -> None:
    documents = unique_documents([7, 1, 30, 4, 18] * 4)
    dataset = TokenDataset(write_shards(documents, num_shards=3) / "train-*.tar")
    plain, without = (TokenStream(dataset, seq_len=8, seed=5, skipped=skipped) for skipped in ((), (2, 8)))
    left_out = set(documents[2].tolist()) | set(documents[8].tolist())
    for start in (0, 17, 29):
        one, other = plain.read(start, 30), without.read(start, 30)
        for name in ("tokens", "positions", "documents"):
            assert (getattr(one, name) == getattr(other, name)).all(), name
        gone = np.isin(one.targets, list(left_out))
        assert gone.any() and (other.targets[gone] == IGNORED).all()
        assert (other.targets[~gone] == one.targets[~gone]).all()


def test_a_thread_that_reads_elsewhere_takes_nothing_away(write_shards) -> None:
    """The loader reads ahead in one thread, while the ledger names earlier documents in another."""

    class Raced(TokenStream):
        """What it keeps, the other thread has replaced before it can be looked at."""

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, {} if name in ("_pieces", "_epochs") else value)

    dataset = TokenDataset(write_shards(unique_documents([20] * 20)) / "train-*.tar")
    raced, alone = (kind(dataset, seq_len=8, seed=1) for kind in (Raced, TokenStream))
    for start in (0, alone.num_samples - 1, 1):
        assert raced.read(start, 3).tokens.tolist() == alone.read(start, 3).tokens.tolist()
