"""Small token shards with known contents."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards import DatasetInfo, ShardWriter


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., Path]:
    return lambda documents, name="shards", **options: make_shards(tmp_path / name, documents, **options)


def make_shards(folder: Path, documents: Sequence[np.ndarray], *, num_shards: int = 1, vocab_size: int = 1000) -> Path:
    """Write documents in order, evenly over ``num_shards`` shards, with a dataset.json; returns the folder."""
    folder.mkdir(parents=True)
    dtype = "uint16" if vocab_size <= 65536 else "uint32"
    for number, part in enumerate(np.array_split(np.arange(len(documents)), num_shards)):
        with ShardWriter(folder / f"train-{number:05d}.tar", dtype) as writer:
            for index in part:
                tokens = np.asarray(documents[index])
                writer.add(f"{index:06d}", tokens, {"source": f"file-{index}"}, text_bytes=3 * len(tokens))
    DatasetInfo(vocab_size=vocab_size, dtype=dtype, eos_id=0).save(folder)
    return folder


def unique_documents(lengths: Sequence[int]) -> list[np.ndarray]:
    """Documents of these lengths in which every token is different, so that a token tells where it came from."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
