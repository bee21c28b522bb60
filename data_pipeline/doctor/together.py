"""What is wrong with shards of any kind taken together: their keys, sizes and number; pictures and captions."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.doctor.corpus import NAMED, equal_groups
from data_pipeline.doctor.findings import Findings
from data_pipeline.doctor.shard import ShardFacts
from data_pipeline.doctor.vocabulary import Vocabulary, split_of

UNEVEN = 2  # times the median, or a part of it


def check_keys(shards: Sequence[ShardFacts], findings: Findings) -> None:
    """Keys that several shards of a folder have."""
    folders: dict[Path, list[tuple[str, np.ndarray]]] = defaultdict(list)
    for shard in shards:
        facts = shard.tokens or shard.pictures
        if facts is not None and len(facts.keys):
            folders[shard.path.parent].append((shard.name, np.unique(facts.keys)))
    for named in folders.values():
        hashes = np.concatenate([_hashed(keys) for _, keys in named])
        first = np.cumsum([0, *(len(keys) for _, keys in named)])
        shared = sorted(equal_groups(hashes), key=lambda group: int(group[0]))
        if shared:
            owners = (np.searchsorted(first, shared[0], side="right") - 1).tolist()
            key = named[owners[0]][1][shared[0][0] - first[owners[0]]].decode(errors="replace")
            where = ", ".join(named[owner][0] for owner in owners[1 : NAMED + 1])
            more = f" and {len(owners) - NAMED - 1} more" if len(owners) > NAMED + 1 else ""
            what = f"{len(shared):,} keys are in more than one shard of the folder, this one also in {where}{more}"
            findings.add("duplicate-key-across", what, named[owners[0]][0], key)


def _hashed(keys: np.ndarray) -> np.ndarray:
    """A hash uint64 of each key, whatever the width of the array it stands in."""
    letters = keys.view(np.uint8).reshape(len(keys), -1)
    hashes = np.full(len(keys), 0x9E3779B97F4A7C15, np.uint64)
    for column in letters.T:
        inside = column != 0
        hashes[inside] ^= column[inside]
        hashes[inside] *= np.uint64(0x100000001B3)  # FNV-1a
    return hashes


def check_sizes(shards: Sequence[ShardFacts], readers: int | None, findings: Findings) -> None:
    """Shards fewer than their readers, and shards of a split that hold much more or less than others of it."""
    if readers is not None and len(shards) < readers:
        what = f"{len(shards)} shards for {readers} readers: {readers - len(shards)} would have nothing to read"
        findings.add("fewer-shards-than-readers", what)
    splits: dict[tuple[Path, str], list[tuple[Path, int]]] = defaultdict(list)
    for shard in shards:
        size = num_items(shard)
        if size and not shard.findings.counts["torn"]:
            splits[shard.path.parent, split_of(shard.path)].append((shard.path, size))
    for (folder, split), members in splits.items():
        sizes = np.array([size for _, size in members])
        usual = float(np.median(sizes))
        uneven = (sizes * UNEVEN < usual) | (sizes > UNEVEN * usual)
        uneven[-1] &= sizes[-1] > usual  # the last one has the rest
        if len(members) > 2 and uneven.any():
            at = int(np.flatnonzero(uneven)[0])
            what = f"{int(uneven.sum())} of {len(members)} are not within half and twice the median of {usual:,.0f}"
            name, size = members[at][0].name, members[at][1]
            findings.add("uneven-shards", f"{folder / split}*: {what} tokens or samples, such as {name} with {size:,}")


def num_items(shard: ShardFacts) -> int:
    """Tokens of a shard, or samples where it holds pictures."""
    if shard.tokens is not None:
        return int(shard.tokens.lengths.sum())
    return len(shard.pictures.keys) if shard.pictures is not None else 0


def check_vocabularies(vocabularies: dict[Path, Vocabulary], findings: Findings) -> None:
    """Folders that were built with different tokenizers."""
    known = {folder: v.fingerprint for folder, v in vocabularies.items() if v.fingerprint is not None}
    if len(set(known.values())) > 1:
        parts = ", ".join(f"{folder} ({print_[:8]})" for folder, print_ in known.items())
        findings.add("vocabularies-differ", f"the tokenizers of these folders differ: {parts}")


def check_pictures(shards: Sequence[ShardFacts], findings: Findings) -> None:
    """Pictures and captions that come more than once."""
    parts = [(shard.name, shard.pictures) for shard in shards if shard.pictures is not None]
    if not parts:
        return
    places = [(name, facts.keys[owner].decode(errors="replace")) for name, facts in parts for owner in facts.owners]
    for group in sorted(equal_groups(np.concatenate([facts.digests for _, facts in parts])), key=lambda g: int(g[0])):
        others = ", ".join(f"{places[at][0]} {places[at][1]!r}" for at in group[1 : NAMED + 1].tolist())
        more = f" and {len(group) - NAMED - 1} more" if len(group) > NAMED + 1 else ""
        findings.add("picture-duplicate", f"its picture is that of {others}{more} too", *places[group[0]])
    captions = Counter(caption for _, facts in parts for caption in facts.captions.tolist() if caption)
    repeated = sum(count for count in captions.values() if count > 1)
    if repeated:
        most, times = captions.most_common(1)[0]
        example = next(facts.examples[most] for _, facts in parts if most in facts.examples)
        what = f"{repeated} of {captions.total()} captions are not alone with their words: {times} times {example!r}"
        findings.add("caption-duplicate", what)
