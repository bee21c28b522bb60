"""Whether a token shard's index was made for it."""

import hashlib
import mmap
from pathlib import Path

import numpy as np

from data_pipeline.doctor.findings import Findings
from data_pipeline.index import ARRAYS, ShardIndex, index_path


def read_index(shard: Path, findings: Findings) -> ShardIndex | None:
    """The index beside a shard, unchecked; None where there is none that can be read."""
    path = index_path(shard)
    if not path.is_file():
        findings.add("index-missing", f"there is no {path.name}", str(shard))
        return None
    try:
        return ShardIndex.load(path)
    except (ValueError, OSError) as error:
        findings.add("index-broken", _reason(error), str(shard))
        return None


def compare_index(shard: Path, data: mmap.mmap, index: ShardIndex, found: ShardIndex, findings: Findings) -> None:
    """Compare an index with ``found``, which was made of the shard's headers and payloads; then the checksum."""
    try:
        index.check(shard)
    except ValueError as error:
        findings.add("index-mismatch", _reason(error), str(shard))
        return
    for name in ARRAYS:
        ours, theirs = getattr(index, name), getattr(found, name)
        if len(ours) != len(theirs):
            findings.add("index-mismatch", f"tells of {len(ours)} documents, there are {len(theirs)}", str(shard))
            return
        if name == "keys":
            width = max(ours.shape[1], theirs.shape[1])
            rows = (_widened(ours, width) != _widened(theirs, width)).any(axis=1)
        else:
            rows = (ours != theirs) & (theirs >= 0)  # text bytes may be unknown
        if rows.any():
            first = int(np.flatnonzero(rows)[0])
            what = f"{name} of {int(rows.sum())} documents differ, first of document {first}"
            findings.add("index-mismatch", what, str(shard), found.key(first))
            return
    if index.max_token != found.max_token:
        what = f"tells of a largest token {index.max_token}, it is {found.max_token}"
        findings.add("checksum", f"{what}: the payload has changed", str(shard))
    elif hashlib.sha256(data).hexdigest() != index.sha256:
        findings.add("checksum", "its bytes are not those that were written", str(shard))


def _widened(keys: np.ndarray, width: int) -> np.ndarray:
    return np.pad(keys, ((0, 0), (0, width - keys.shape[1])))


def _reason(error: Exception) -> str:
    """The message without the cure that the finding has too."""
    return str(error).rpartition("; ")[0] or str(error)
