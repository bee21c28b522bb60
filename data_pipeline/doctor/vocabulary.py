"""What token ids of a folder's shards may be, and which of them are special."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.doctor.findings import Findings
from data_pipeline.folders import load_infos
from data_pipeline.places import Shard
from data_pipeline.shards import DATASET_FILE, DatasetInfo
from data_pipeline.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """Of the shards in a folder; None: unknown. ``fingerprint`` is the tokenizer's."""

    size: int | None = None
    dtype: str | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    fingerprint: str | None = None


def read_vocabulary(shard: Shard, given: Tokenizer | None, findings: Findings) -> Vocabulary:
    """From the dataset.json of a shard's folder and its tokenizer, or the one ``given`` in its place."""
    folder = shard.path.parent
    try:
        info = load_infos([shard])[folder]
    except (ValueError, OSError) as error:
        findings.add("description", str(error))
        info = None
    else:
        if info is None and given is None:
            findings.add("description-missing", f"{folder} has no {DATASET_FILE}")
    tokenizer = given
    if tokenizer is None and info is not None:
        try:
            tokenizer = load_tokenizer(folder / info.tokenizer)
        except (ValueError, OSError) as error:
            findings.add("tokenizer", str(error))
    if tokenizer is None:
        return Vocabulary() if info is None else Vocabulary(info.vocab_size, info.dtype, info.eos_id)
    if info is not None:
        for fact in ("vocab_size", "eos_id", "dtype"):
            theirs, ours = getattr(tokenizer, fact), getattr(info, fact)
            if theirs != ours:
                findings.add("description", f"{folder / DATASET_FILE}: {fact} {ours}, its tokenizer has {theirs}")
    if tokenizer.pad_id is not None and tokenizer.pad_id == tokenizer.eos_id:
        findings.add("pad-is-eos", f"{folder}: {tokenizer.special['pad_token']!r} is padding and end of text")
    about = info or tokenizer
    return Vocabulary(
        about.vocab_size,
        about.dtype,
        about.eos_id,
        tokenizer.unk_id,
        tokenizer.pad_id,
        tokenizer.fingerprint,
    )


def check_splits(folder: Path, shards: list[Path], findings: Findings) -> None:
    """Whether all shards are there that dataset.json tells of; only of those splits that ``shards`` belong to."""
    try:
        info = DatasetInfo.load(folder)
    except (ValueError, OSError):
        return  # reported where the vocabulary is read
    for split, counts in (info.counts if info else {}).items():
        if any(split_of(shard) == split for shard in shards):
            there = sum(1 for _ in folder.glob(f"{split}-*.tar"))
            if there < counts.get("shards", 0):
                findings.add("shard-missing", f"{folder}: {there} of {counts['shards']} shards {split}-*.tar are there")


def split_of(shard: Path) -> str:
    """The name of a shard without its number."""
    return shard.name.removesuffix(".tar").rstrip("0123456789").rstrip("-_.")
