"""The packed stream against a plain rebuilding of it, document by document."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.pack import IGNORED, TokenStream, permutation
from data_pipeline.reader import TokenDataset
from tests.data_pipeline.conftest import make_shards, unique_documents


def rebuild(documents: list[np.ndarray], seq_len: int, seed: int, start: int, count: int, shuffle: bool) -> list[dict]:
    """The same samples by concatenating whole epochs and walking over them."""
    stream: list[tuple[int, bool]] = []
    epoch = 0
    while len(stream) < (start + count) * seq_len + 1:
        order = permutation(len(documents), seed, epoch) if shuffle else range(len(documents))
        for index in order:
            stream += [(int(token), place == 0) for place, token in enumerate(documents[index])]
        epoch += 1
    rows = []
    for sample in range(start, start + count):
        part = stream[sample * seq_len : (sample + 1) * seq_len + 1]
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
    epochs = [stream.read(epoch * 240, 240).tokens[:, 0] for epoch in range(3)]
    for tokens in epochs:
        assert sorted(tokens) == list(range(240))
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_seed_changes_order_and_far_samples_need_no_scan(write_shards) -> None:
    folder = write_shards(unique_documents([10] * 50), num_shards=2)
    dataset = TokenDataset(folder / "train-*.tar")
    first, second = (TokenStream(dataset, seq_len=16, seed=seed) for seed in (1, 2))
    assert (first.read(0, 8).tokens != second.read(0, 8).tokens).any()
    far = TokenStream(dataset, seq_len=16, seed=1)
    assert (far.read(10**9, 2).tokens == first.read(10**9, 2).tokens).all()


def test_permutation_is_one_and_never_changes() -> None:
    assert sorted(permutation(1000, 7, 3)) == list(range(1000))
    assert permutation(8, 1, 0).tolist() == PINNED, "the order of every existing run would change"


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
