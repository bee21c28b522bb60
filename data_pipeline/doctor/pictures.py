"""What is wrong with one image-text shard, and what the checks over all shards need of it."""

import hashlib
import mmap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.doctor.findings import Findings
from data_pipeline.doctor.indexes import reason
from data_pipeline.images.captions import caption_text
from data_pipeline.images.decode import MAX_BYTES, MAX_PIXELS, PictureError, check_limits, decode
from data_pipeline.images.index import ARRAYS, MAX_TEXT, SUFFIX, PictureIndex, scan_pictures
from data_pipeline.places import Shard

PLACEHOLDER = "<image>"
TINY = 16  # pixels of the shorter side
THIN = 8  # times the longer side is the shorter one
DECODED = 500  # pictures of a shard that are decoded, spread evenly over it
SEEN = 32  # pixels a side they are decoded to: JPEGs at a reduced scale


@dataclass
class PictureFacts:
    """Usable samples of a shard, n of them with m pictures."""

    keys: np.ndarray  # bytes [n]
    owners: np.ndarray  # int64 [m]: the sample of each picture
    sizes: np.ndarray  # int64 [m, 3]: bytes, height, width
    digests: np.ndarray  # uint64 [m], of the pictures' bytes
    captions: np.ndarray  # uint64 [n], digests of the captions; 0 where there is none
    caption_bytes: np.ndarray  # int64 [n], UTF-8
    examples: dict[int, str] = field(default_factory=dict)  # captions by digest, cut short
    decoded: int = 0


def examine_pictures(source: Shard, path: Path, data: mmap.mmap, findings: Findings) -> PictureFacts | None:
    """Check the samples of a shard, which lies in ``path`` and is mapped as ``data``, and its index; None where it
    cannot be read at all.
    """
    try:
        index = scan_pictures(path)
    except ValueError:
        return None  # torn or led out of the tar, which its layout told already
    _compare_index(source, path, index, findings)
    for key, why in index.problems:
        missing = "caption-missing" if why.startswith("no caption") else "sample"
        findings.add(missing, why, source.name, key)
    facts = _read(source.name, data, index, findings)
    _check_sizes(source.name, index, facts, findings)
    return facts


def _read(shard: str, data: mmap.mmap, index: PictureIndex, findings: Findings) -> PictureFacts:
    """Texts and pictures in the order of the samples, from one end of the tar to the other."""
    num_samples, num_pictures = len(index.texts), len(index.images)
    facts = PictureFacts(
        keys=np.array([index.key(sample).encode() for sample in range(num_samples)]),
        owners=np.repeat(np.arange(num_samples), np.diff(index.first)),
        sizes=index.images[:, 1:],
        digests=np.zeros(num_pictures, np.uint64),
        captions=np.zeros(num_samples, np.uint64),
        caption_bytes=np.zeros(num_samples, np.int64),
    )
    for sample in range(num_samples):
        _read_caption(shard, data, index, sample, facts, findings)
    decoded = set(np.linspace(0, num_pictures - 1, min(DECODED, num_pictures)).astype(int).tolist())
    facts.decoded = len(decoded)
    for picture, (offset, size, height, width) in enumerate(index.images.tolist()):
        blob = data[offset : offset + size]
        facts.digests[picture] = _digest(blob)
        key = index.key(int(facts.owners[picture]))
        try:
            check_limits(size, width, height, MAX_PIXELS, MAX_BYTES)
            if picture in decoded:
                decode(blob, SEEN, SEEN, crop=False)
        except PictureError as error:
            large = size > MAX_BYTES or width * height > MAX_PIXELS
            findings.add("picture-large" if large else "picture-broken", str(error), shard, key)
    return facts


def _read_caption(
    shard: str, data: mmap.mmap, index: PictureIndex, sample: int, facts: PictureFacts, findings: Findings
) -> None:
    offset, size = index.texts[sample].tolist()
    try:
        text = caption_text(data[offset : offset + min(size, MAX_TEXT + 1)], int(index.kinds[sample]))
    except PictureError as error:
        code = "caption-empty" if "empty" in str(error) else "caption-broken"
        findings.add(code, str(error), shard, index.key(sample))
        return
    digest = _digest(text.encode())
    facts.captions[sample] = digest
    facts.caption_bytes[sample] = len(text.encode())
    facts.examples.setdefault(digest, text[:80])
    places, pictures = text.count(PLACEHOLDER), int(index.first[sample + 1] - index.first[sample])
    if places != pictures and not (places == 0 and pictures == 1):
        what = f"{places} placeholders {PLACEHOLDER} for {pictures} pictures"
        findings.add("caption-places", what, shard, index.key(sample))


def _check_sizes(shard: str, index: PictureIndex, facts: PictureFacts, findings: Findings) -> None:
    sides = np.sort(facts.sizes[:, 1:], axis=1)
    tiny = sides[:, 0] < TINY
    for code, mask in (("picture-tiny", tiny), ("picture-thin", ~tiny & (sides[:, 1] > THIN * sides[:, 0]))):
        findings.add_all(
            code,
            shard,
            np.flatnonzero(mask).tolist(),
            lambda picture: f"{facts.sizes[picture, 2]} x {facts.sizes[picture, 1]} pixels",
            lambda picture: index.key(int(facts.owners[picture])),
        )


def _compare_index(source: Shard, path: Path, found: PictureIndex, findings: Findings) -> None:
    beside = source.beside(SUFFIX)
    if not beside.is_file():
        findings.add("index-missing", f"there is no {beside.name}", source.name)
        return
    try:
        index = PictureIndex.load(beside)
    except (ValueError, OSError) as error:
        findings.add("index-broken", reason(error, beside), source.name)
        return
    try:
        index.check(path)
    except ValueError as error:
        findings.add("index-mismatch", reason(error, path), source.name)
        return
    for name in ARRAYS:
        if not np.array_equal(getattr(index, name), getattr(found, name)):
            findings.add("index-mismatch", f"{name} are not those of its {len(found.texts)} samples", source.name)
            return


def _digest(blob: bytes) -> int:
    return int.from_bytes(hashlib.sha256(blob).digest()[:8], "little")
