"""What the doctor says: findings by code, each with a severity and a cure."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
LISTED = 1000  # findings of one code that are kept; further ones are only counted

RESTORE, REINDEX = "restore the shard or build it again", "remove the index: it is built again when the shard is read"
REBUILD = "build the shards again"
CODES: dict[str, tuple[Severity, str]] = {
    "torn": ("error", RESTORE),
    "unreadable": ("error", "see that it is there and may be read"),
    "after-end": ("error", "write one tar, rather than several behind each other"),
    "member-name": ("error", "write the tar again with plain relative names"),
    "member-kind": ("warning", "write plain files alone; readers pass over all else"),
    "no-sample": ("error", "remove the shard, or build it again"),
    "checksum": ("error", RESTORE),
    "index-broken": ("error", REINDEX),
    "index-mismatch": ("error", f"{RESTORE}, or {REINDEX}"),
    "index-missing": ("note", "it is made when the shard is first read"),
    "description": ("error", REBUILD),
    "description-missing": ("note", "name the shards' tokenizer with --tokenizer to check ids and ends of text"),
    "shard-missing": ("error", "copy the missing shards, or build them again"),
    "tokenizer": ("error", "restore the tokenizer's folder, or name it with --tokenizer"),
    "vocabularies-differ": ("error", "build all sources of a run with one tokenizer"),
    "dtype": ("error", f"{REBUILD} with the tokenizer that the folder names"),
    "id-range": ("error", f"{REBUILD} with the tokenizer that the folder names"),
    "facts-disagree": ("warning", REBUILD),
    "orphan": ("warning", "write .tokens and .json of a document under one key"),
    "duplicate-key": ("error", "give every sample of a shard its own key"),
    "duplicate-key-across": ("warning", "give every sample of a folder its own key, to tell samples apart"),
    "duplicate": ("warning", "keep one of them"),
    "near-duplicate": ("warning", "keep one of them"),
    "held-out-leak": ("warning", "take it out of the training shards, or of the held-out ones"),
    "unknown-share": ("warning", "train the tokenizer on such text, or use one with byte fallback"),
    "no-end-of-text": ("warning", "end every document with the end-of-text token"),
    "inner-end-of-text": ("warning", "write what lies between two ends of text as documents of their own"),
    "padding-inside": ("warning", "write documents without padding"),
    "pad-is-eos": ("warning", "give padding an id of its own: where pads are masked, no end of text is learned"),
    "empty": ("warning", "leave it out"),
    "overlong": ("warning", "split it, or see that it is one document"),
    "entropy-low": ("warning", "look at it: it repeats itself, as tables, logs and boilerplate do"),
    "entropy-high": ("warning", "look at it: it hardly repeats anything, as lists, hashes and base64 do"),
    "fewer-shards-than-readers": ("warning", "write smaller shards: webdataset gives each reader whole ones"),
    "uneven-shards": ("note", "write shards of one size: readers of whole shards finish together"),
    "sample": ("warning", "mend or remove it; training leaves it out"),
    "picture-broken": ("warning", "replace or remove it; training leaves it out"),
    "picture-large": ("warning", "scale it down, or raise data.pictures.max_pixels, max_bytes; training leaves it out"),
    "picture-tiny": ("note", "remove it: little can be seen in it"),
    "picture-thin": ("note", "cut it: most of it is lost when it is scaled"),
    "picture-duplicate": ("warning", "keep one of them"),
    "caption-missing": ("warning", "write a .txt, or a json with 'caption'; training leaves the sample out"),
    "caption-empty": ("warning", "write a caption or remove the sample; training leaves it out"),
    "caption-broken": ("warning", "write it as UTF-8; training leaves the sample out"),
    "caption-places": ("warning", "write <image> once for each picture; training leaves the sample out"),
    "caption-duplicate": ("note", "write captions that tell pictures apart: contrastive training takes them for wrong"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. ``shard`` and ``key`` are empty where it is about all of them."""

    code: str
    shard: str
    key: str
    what: str

    @property
    def severity(self) -> Severity:
        return CODES[self.code][0]

    @property
    def cure(self) -> str:
        return CODES[self.code][1]

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.shard, self.key and f"sample {self.key!r}") if part)
        return f"{self.severity}: {self.code}: {where}{': ' if where else ''}{self.what}; {self.cure}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"severity": self.severity, **asdict(self), "cure": self.cure}


@dataclass
class Findings:
    """Findings of some shards; ``counts`` holds all by code, ``kept`` the first ``LISTED`` of each."""

    kept: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, code: str, what: str, shard: str = "", key: str = "") -> None:
        self.add_all(code, shard, [key], lambda _: what, str)

    def add_all(
        self, code: str, shard: str, items: Iterable[Any], what: Callable[[Any], str], key: Callable[[Any], str]
    ) -> None:
        """A finding for each of ``items``, which tells its ``key`` and ``what`` is wrong."""
        assert code in CODES, code
        for item in items:
            self.counts[code] += 1
            if self.counts[code] <= LISTED:
                self.kept.append(Finding(code, shard, key(item), " ".join(what(item).split())))

    def extend(self, other: "Findings") -> None:
        """Take over those of another part."""
        room = {code: LISTED - count for code, count in self.counts.items()}
        for finding in other.kept:
            room[finding.code] = room.get(finding.code, LISTED) - 1
            if room[finding.code] >= 0:
                self.kept.append(finding)
        self.counts.update(other.counts)

    def number(self, severity: Severity) -> int:
        """How many findings have a severity."""
        return sum(count for code, count in self.counts.items() if CODES[code][0] == severity)

    def in_order(self) -> list[Finding]:
        """The kept ones: errors, warnings, notes, each in the order of the codes."""
        codes = list(CODES)
        return sorted(self.kept, key=lambda f: (SEVERITIES.index(f.severity), codes.index(f.code)))
