"""Token shards as one list of documents, memory-mapped and addressed through their indexes."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from data_pipeline.cache import CacheOptions
from data_pipeline.folders import load_infos
from data_pipeline.index import INDEX_SUFFIX, ShardIndex, find_key, load_index
from data_pipeline.places import Shard, at_once, find_shards, load_each
from data_pipeline.shards import DatasetInfo, token_dtype


class TokenDataset:
    """Documents of token shards, in the order of the shards and of the documents in them.

    Args:
        shards: a path, URL, command (``pipe:cat a.tar``) or pattern, or several: braces (``text-{000..127}.tar``) and
            globs (``train-*.tar``).
        vocab_size: of the model's tokenizer; checked against the shards. Needed only for shards whose folder
            has no ``dataset.json``.
        progress: show a bar while shards without an index are scanned.
        cache: where shards that are elsewhere are kept; each is fetched when a document of it is first read.

    Attributes:
        lengths: int64 [num_documents], tokens of each document. num_tokens: their sum.
        paths: the shards; those elsewhere: where they lie once they are needed. names: as their user knows them.
        info: the first folder's ``dataset.json``, or None.

    Raises:
        FileNotFoundError: a pattern matches nothing. ValueError: a shard is truncated, disagrees with its
        index, or belongs to another vocabulary. OSError: a shard elsewhere cannot be fetched; reading documents
        raises these too.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        vocab_size: int | None = None,
        progress: bool = True,
        cache: CacheOptions | None = None,
    ) -> None:
        patterns = [shards] if isinstance(shards, str | Path) else list(shards)
        self._files = find_shards(shards, cache)
        self._elsewhere = any(shard.url for shard in self._files)
        self.paths, self.names = [shard.path for shard in self._files], [shard.name for shard in self._files]
        self.info = load_infos(self._files)[self.paths[0].parent]
        dtypes = {folder: _folder_dtype(folder, vocab_size) for folder in {path.parent for path in self.paths}}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"shards {patterns}: folders with different token dtypes {dtypes}; read them separately")
        self.dtype = dtypes[self.paths[0].parent]
        self.vocab_size = vocab_size or (self.info.vocab_size if self.info else 1 << 32)
        self._indexes = load_each(self._checked_index, self._files, INDEX_SUFFIX, progress=progress)
        item = np.dtype(self.dtype).itemsize
        self.lengths = np.concatenate([index.lengths for index in self._indexes])
        self._starts = np.concatenate([index.offsets // item for index in self._indexes])
        self._first = np.cumsum([0] + [len(index.lengths) for index in self._indexes])
        self.num_documents, self.num_tokens = len(self.lengths), int(self.lengths.sum())
        if self.num_tokens == 0:
            raise ValueError(f"shards {patterns}: {len(self.paths)} shards without a single token; build them again")
        self._maps: list[np.ndarray | None] = [None] * len(self.paths)

    def _checked_index(self, shard: Shard, advance: Callable[[int], None]) -> ShardIndex:
        index = load_index(shard, self.dtype, advance)
        if index.max_token >= self.vocab_size:
            raise ValueError(
                f"{shard.name}: holds token {index.max_token}, the tokenizer's vocabulary has {self.vocab_size} (ids 0 "
                f"to {self.vocab_size - 1}); use the tokenizer the shards were built with"
            )
        return index

    @cached_property
    def fingerprint(self) -> str:
        """Equal for the same shards, to the bit, in the same order."""
        digests = "".join(index.sha256 for index in self._indexes)
        return hashlib.sha256(digests.encode()).hexdigest()

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

    def views(self, documents: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """``lengths[k]`` tokens of ``documents[k]`` from its token ``begins[k]`` on, all [k]: views of the maps."""
        if len(self.paths) == 1:
            shards = np.zeros(len(documents), np.int64)
        else:
            shards = self.shards_of(documents)
        wanted = set(shards.tolist())
        maps = self._fetched_maps(wanted) if self._elsewhere else {shard: self._map(shard) for shard in wanted}
        begins = self._starts[documents] + begins
        rows = zip(shards.tolist(), begins.tolist(), (begins + lengths).tolist(), strict=True)
        return [maps[shard][begin:end] for shard, begin, end in rows]

    def _map(self, shard: int) -> np.ndarray:
        tokens = self._maps[shard]
        if tokens is None:
            # torch's private mapping closes its descriptor, numpy's holds one open a shard: thousands of
            # shards work.
            index = self._indexes[shard]
            size = index.shard_size // np.dtype(self.dtype).itemsize
            kind = torch.uint16 if self.dtype == "uint16" else torch.uint32
            with self._files[shard].local(index) as path:
                tokens = torch.from_file(str(path), shared=False, size=size, dtype=kind).numpy()
            tokens.flags.writeable = False
            self._maps[shard] = tokens
        return tokens

    def _fetched_maps(self, wanted: set[int]) -> dict[int, np.ndarray]:
        """Maps of shards, of which some are elsewhere: those that are not there are fetched several at once."""
        maps = {shard: tokens for shard in wanted if (tokens := self._maps[shard]) is not None}
        missing = sorted(wanted - maps.keys())
        numbers = {self._files[shard].name: shard for shard in missing}
        for shard in maps:
            self._files[shard].touch()
        if missing:
            fetched = at_once(lambda file: self._map(numbers[file.name]), [self._files[shard] for shard in missing])
            maps.update(zip(missing, fetched, strict=True))
            # A mapped file that was removed to make room still takes it.
            for shard, file in enumerate(self._files):
                if file.url and self._maps[shard] is not None and not file.path.exists():
                    self._maps[shard] = None
        return maps


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
