"""Token shards as one list of documents, memory-mapped and addressed through their indexes."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from data_pipeline.index import ShardIndex, find_key, index_path, load_index
from data_pipeline.paths import expand_paths
from data_pipeline.progress import byte_bar
from data_pipeline.shards import DatasetInfo, token_dtype


class TokenDataset:
    """Documents of token shards, in the order of the shards and of the documents in them.

    Args:
        shards: a path or pattern, or several: braces (``text-{000..127}.tar``) and globs (``train-*.tar``).
        vocab_size: of the model's tokenizer; checked against the shards. Needed only for shards whose folder
            has no ``dataset.json``.
        progress: show a bar while shards without an index are scanned.

    Attributes:
        lengths: int64 [num_documents], tokens of each document. num_tokens: their sum.
        paths: the shards. info: the folder's ``dataset.json``, or None.

    Raises:
        FileNotFoundError: a pattern matches nothing. ValueError: a shard is truncated, disagrees with its
        index, or belongs to another vocabulary.
    """

    def __init__(
        self, shards: str | Path | Sequence[str | Path], *, vocab_size: int | None = None, progress: bool = True
    ) -> None:
        patterns = [shards] if isinstance(shards, str | Path) else list(shards)
        self.paths = expand_paths(patterns, what="shards")
        self.info = DatasetInfo.load(self.paths[0].parent)
        dtypes = {folder: _folder_dtype(folder, vocab_size) for folder in {path.parent for path in self.paths}}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"shards {patterns}: folders with different token dtypes {dtypes}; read them separately")
        self.dtype = dtypes[self.paths[0].parent]
        self.vocab_size = vocab_size or (self.info.vocab_size if self.info else 1 << 32)
        self._indexes = self._load_indexes(progress)
        item = np.dtype(self.dtype).itemsize
        self.lengths = np.concatenate([index.lengths for index in self._indexes])
        self._starts = np.concatenate([index.offsets // item for index in self._indexes])
        self._first = np.cumsum([0] + [len(index.lengths) for index in self._indexes])
        self.num_documents, self.num_tokens = len(self.lengths), int(self.lengths.sum())
        if self.num_tokens == 0:
            raise ValueError(f"shards {patterns}: {len(self.paths)} shards without a single token; build them again")
        self._maps: list[np.ndarray | None] = [None] * len(self.paths)

    def _load_indexes(self, progress: bool) -> list[ShardIndex]:
        bare = [path for path in self.paths if not index_path(path).is_file()]
        total = sum(path.stat().st_size for path in bare)
        what = f"indexing {len(bare)} shards"
        with byte_bar(what, total, show=progress and bool(bare), keep=False) as advance:
            return [self._checked_index(path, advance) for path in self.paths]

    def _checked_index(self, path: Path, advance: Callable[[int], None]) -> ShardIndex:
        index = load_index(path, self.dtype, advance)
        if index.max_token >= self.vocab_size:
            raise ValueError(
                f"{path}: holds token {index.max_token}, the tokenizer's vocabulary has {self.vocab_size} "
                f"(ids 0 to "
                f"{self.vocab_size - 1}); use the tokenizer the shards were built with"
            )
        return index

    @cached_property
    def num_text_bytes(self) -> int | None:
        """UTF-8 bytes of all documents' text, or None where a shard does not say."""
        counts = [index.text_bytes for index in self._indexes]
        return None if any((count < 0).any() for count in counts) else sum(int(count.sum()) for count in counts)

    @property
    def bytes_per_token(self) -> float | None:
        """Text bytes a token (end-of-text tokens counted): bits/byte = nats/token / ln 2 / this. None if
        unknown.
        """
        return None if self.num_text_bytes is None else self.num_text_bytes / self.num_tokens

    def document(self, index: int) -> np.ndarray:
        """Tokens [n] of one document: a read-only view of the mapped shard."""
        shard = self.shard_of(index)
        start = int(self._starts[index])
        return self._map(shard)[start : start + int(self.lengths[index])]

    def shard_of(self, index: int) -> int:
        """Position in ``paths`` of the shard that holds a document."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def shards_of(self, documents: np.ndarray) -> np.ndarray:
        """Positions in ``paths`` of the shards that hold documents [k]."""
        return np.searchsorted(self._first, documents, side="right") - 1

    def key(self, index: int) -> str:
        """The document's WebDataset key."""
        shard = self.shard_of(index)
        return self._indexes[shard].key(index - int(self._first[shard]))

    def find(self, key: str) -> np.ndarray:
        """Numbers of the documents with this key, int64, in whatever shard."""
        found = [find_key(i.keys, key) + first for i, first in zip(self._indexes, self._first[:-1], strict=True)]
        return np.concatenate(found)

    def gather(self, documents: np.ndarray, begins: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
        """Write ``lengths[k]`` tokens of ``documents[k]`` from its token ``begins[k]`` on, one after the
        other, to out.

        All [k]; ``out`` [sum of lengths] of any integer dtype wide enough.
        """
        if len(self.paths) == 1:
            shards = np.zeros(len(documents), np.int64)
        else:
            shards = self.shards_of(documents)
        maps = {shard: self._map(shard) for shard in set(shards.tolist())}
        begins = self._starts[documents] + begins
        rows = zip(shards.tolist(), begins.tolist(), (begins + lengths).tolist(), strict=True)
        np.concatenate([maps[shard][begin:end] for shard, begin, end in rows], out=out)

    def _map(self, shard: int) -> np.ndarray:
        tokens = self._maps[shard]
        if tokens is None:
            # torch's private mapping closes its descriptor, numpy's holds one open a shard: thousands of
            # shards work.
            size = self._indexes[shard].shard_size // np.dtype(self.dtype).itemsize
            kind = torch.uint16 if self.dtype == "uint16" else torch.uint32
            tokens = torch.from_file(str(self.paths[shard]), shared=False, size=size, dtype=kind).numpy()
            tokens.flags.writeable = False
            self._maps[shard] = tokens
        return tokens


def _folder_dtype(folder: Path, vocab_size: int | None) -> str:
    info = DatasetInfo.load(folder)
    if info is None and vocab_size is None:
        raise ValueError(f"{folder}: has no dataset.json to tell the token dtype; give vocab_size")
    if info is None:
        assert vocab_size is not None
        return token_dtype(vocab_size)
    if vocab_size is not None and vocab_size < info.vocab_size:
        raise ValueError(
            f"{folder}: was built with a vocabulary of {info.vocab_size}, the model's has {vocab_size}; "
            f"use the tokenizer "
            f"in {folder / info.tokenizer} or build the shards again"
        )
    return info.dtype
