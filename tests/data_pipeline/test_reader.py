"""Documents by number over many shards, and the mistakes of naming them."""

import numpy as np
import pytest

from data_pipeline.inspection import inspect_shards
from data_pipeline.paths import expand_paths
from data_pipeline.reader import TokenDataset
from tests.data_pipeline.conftest import make_shards, unique_documents


def test_documents_by_number_over_shards(write_shards) -> None:
    documents = unique_documents([4, 1, 9, 300, 2, 8, 7])
    folder = write_shards(documents, num_shards=3)
    dataset = TokenDataset(str(folder / "train-{00000..00002}.tar"), vocab_size=1000)
    assert [dataset.document(index).tolist() for index in range(7)] == [tokens.tolist() for tokens in documents]
    assert dataset.lengths.tolist() == [4, 1, 9, 300, 2, 8, 7]
    assert dataset.num_tokens == 331
    assert dataset.bytes_per_token == 3.0
    assert [dataset.key(index) for index in range(7)] == [f"{index:06d}" for index in range(7)]
    with pytest.raises(IndexError):
        dataset.document(7)


def test_mapped_tokens_cannot_be_written(write_shards) -> None:
    dataset = TokenDataset(write_shards([np.arange(4)]) / "train-00000.tar")
    with pytest.raises(ValueError, match="read-only"):
        dataset.document(0)[0] = 1


def test_several_patterns_keep_their_order_and_repeats_count_once(write_shards, tmp_path) -> None:
    folder = write_shards(unique_documents([1, 1, 1]), num_shards=3)
    last, every = str(folder / "train-00002.tar"), str(folder / "train-*.tar")
    paths = TokenDataset([last, every]).paths
    assert [path.name for path in paths] == ["train-00002.tar", "train-00000.tar", "train-00001.tar"]


@pytest.mark.parametrize("pattern", ["none-*.tar", "train-{00000..00002}.tar", "train-00009.tar", ""])
def test_missing_shards(write_shards, pattern) -> None:
    folder = write_shards(unique_documents([3, 3]), num_shards=2)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        TokenDataset(str(folder / pattern))


def test_no_pattern_at_all() -> None:
    with pytest.raises(FileNotFoundError, match="list of patterns is empty"):
        TokenDataset([])


def test_unbalanced_braces() -> None:
    with pytest.raises(ValueError, match="unbalanced braces"):
        TokenDataset("train-{0..3.tar")


def test_file_whose_name_looks_like_a_pattern(tmp_path) -> None:
    (tmp_path / "a[1]{b}.txt").write_text("x")
    assert expand_paths([tmp_path / "a[1]{b}.txt"], what="input") == [tmp_path / "a[1]{b}.txt"]


def test_vocabulary_smaller_than_the_shards(write_shards) -> None:
    folder = write_shards([np.arange(4)], vocab_size=1000)
    with pytest.raises(ValueError, match="vocabulary of 1000, the model's has 500"):
        TokenDataset(folder / "train-00000.tar", vocab_size=500)
    TokenDataset(folder / "train-00000.tar", vocab_size=1024)  # a padded embedding is fine


def test_empty_shards(tmp_path) -> None:
    folder = make_shards(tmp_path / "empty", [np.arange(0)])
    with pytest.raises(ValueError, match="without a single token"):
        TokenDataset(folder / "train-*.tar")


def test_inspect_shows_documents_from_first_to_last(write_shards) -> None:
    folder = write_shards(unique_documents([4, 6, 8]), num_shards=2)
    lines = inspect_shards(folder / "train-*.tar", 2, num_tokens=3)
    assert lines[0] == "2 shards, 3 documents, 18 tokens of uint16, 3.000 bytes/token"
    assert "shortest 4, median 6, longest 8" in lines[1]
    assert lines[2].startswith("document 0 (train-00000.tar, 000000): 4 tokens")
    assert lines[3] == "  ids  0 1 2"
    assert lines[-1] == "  ids  10 11 12"


def test_documents_are_found_by_their_keys(write_shards) -> None:
    dataset = TokenDataset(write_shards(unique_documents([3, 1, 4, 1, 5]), num_shards=2) / "train-*.tar")
    for number in range(5):
        assert dataset.find(dataset.key(number)).tolist() == [number]
    assert dataset.find("none").tolist() == dataset.find("0" * 99).tolist() == []
