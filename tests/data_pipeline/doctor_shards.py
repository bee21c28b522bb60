"""A clean corpus for the doctor's tests to spoil."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from data_pipeline.doctor.diagnosis import Diagnosis, diagnose
from data_pipeline.shards import DatasetInfo, ShardWriter
from data_pipeline.tokenizer import Tokenizer
from tests.data_pipeline.images import small_tokenizer

SHARDS, DOCUMENTS = 3, 60
UNKNOWN, END, PAD = 0, 2, 3  # of the tokenizer
FIRST, VOCABULARY = 4, 300


@cache
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def clean_documents(count: int = DOCUMENTS, seed: int = 0, ids: int = VOCABULARY) -> list[np.ndarray]:
    """Documents of 70 to 120 tokens below ``ids``, each with its end of text."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(70, 120, count)
    return [np.append(draw.integers(FIRST, ids, length), END) for length in lengths]


def write_split(
    folder: Path, documents: Sequence[np.ndarray], name: str = "train", *, num_shards: int = SHARDS, keys: str = "doc"
) -> None:
    for number, part in enumerate(np.array_split(np.arange(len(documents)), num_shards)):
        with ShardWriter(folder / f"{name}-{number:05d}.tar", "uint16") as writer:
            for document in part:
                tokens = np.asarray(documents[document])
                writer.add(f"{keys}{document:04d}", tokens, {"source": "x"}, text_bytes=4 * len(tokens))


def write_corpus(folder: Path, documents: Sequence[np.ndarray] | None = None) -> Path:
    """Three shards of ``documents``, with all that belongs to them."""
    folder.mkdir(parents=True)
    write_split(folder, clean_documents() if documents is None else documents)
    tokenizer().save(folder / "tokenizer")
    DatasetInfo(VOCABULARY, "uint16", END, counts={"train": {"shards": SHARDS}}).save(folder)
    return folder


def examine(*folders: Path, **options) -> Diagnosis:
    return diagnose([f"{folder}/*.tar" for folder in folders], progress=False, **{"workers": 1, **options})


def found(diagnosis: Diagnosis) -> list[tuple[str, str, str]]:
    """Code, name of the shard and key of all findings."""
    return [(finding.code, Path(finding.shard).name, finding.key) for finding in diagnosis.findings.in_order()]
