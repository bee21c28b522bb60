"""Whether a token shard's index was made for it."""

import hashlib
import mmap
from pathlib import Path

import numpy as np

from data_pipeline.doctor.findings import Findings
from data_pipeline.index import ARRAYS, INDEX_SUFFIX, ShardIndex
from data_pipeline.places import Shard


def read_index(shard: Shard, findings: Findings) -> ShardIndex | None:
    """The index beside a shard, unchecked; None where there is none that can be read."""
    path = shard.beside(INDEX_SUFFIX)
    if not path.is_file():
        findings.add("index-missing", f"there is no {path.name}", shard.name)
        return None
    try:
        return ShardIndex.load(path)
    except (ValueError, OSError) as error:
        findings.add("index-broken", reason(error, path), shard.name)
        return None


def compare_index(
    name: str, path: Path, data: mmap.mmap, index: ShardIndex, found: ShardIndex, findings: Findings
) -> None:
    """Compare an index with ``found``, which was made of the headers and payloads of the shard in ``path``; then the
    checksum. ``name``: of the shard, in findings.
    """
    try:
        index.check(path)
    except ValueError as error:
        findings.add("index-mismatch", reason(error, path), name)
        return
    for array in ARRAYS:
        ours, theirs = getattr(index, array), getattr(found, array)
        if len(ours) != len(theirs):
            findings.add("index-mismatch", f"tells of {len(ours)} documents, there are {len(theirs)}", name)
            return
        if array == "keys":
            width = max(ours.shape[1], theirs.shape[1])
            rows = (_widened(ours, width) != _widened(theirs, width)).any(axis=1)
        else:
            rows = (ours != theirs) & (theirs >= 0)  # text bytes may be unknown
        if rows.any():
            first = int(np.flatnonzero(rows)[0])
            what = f"{array} of {int(rows.sum())} documents differ, first of document {first}"
            findings.add("index-mismatch", what, name, found.key(first))
            return
    if index.max_token != found.max_token:
        what = f"tells of a largest token {index.max_token}, it is {found.max_token}"
        findings.add("checksum", f"{what}: the payload has changed", name)
    elif hashlib.sha256(data).hexdigest() != index.sha256:
        findings.add("checksum", "its bytes are not those that were written", name)


def _widened(keys: np.ndarray, width: int) -> np.ndarray:
    return np.pad(keys, ((0, 0), (0, width - keys.shape[1])))


def reason(error: Exception, path: Path) -> str:
    """What an error says of the file ``path``, without its cure: the finding has both too."""
    return (str(error).rpartition("; ")[0] or str(error)).removeprefix(f"{path}: ")
