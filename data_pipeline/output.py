"""The folder of a build: claimed by one process, refused to another build, published by renames."""

import contextlib
import fcntl
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.chunk import CHUNK_REJECTS, ChunkJob
from data_pipeline.index import index_path
from data_pipeline.paths import write_atomic
from data_pipeline.report import REJECTS, REPORT, BuildReport, count_rejects
from data_pipeline.shards import DATASET_FILE

WORK, TOKENIZER = ".building", "tokenizer"


def finished(out: Path, fingerprint: dict[str, Any]) -> BuildReport | None:
    """The report of a finished build of the same inputs and settings; None if there is none, or its files are gone or
    changed: then the folder is made ready to be built again.
    """
    if not (out / DATASET_FILE).is_file() or not (out / REPORT).is_file():
        return None
    report = BuildReport.load(out / REPORT)
    _same_build(out, report.fingerprint, fingerprint)
    bad = [name for name, size in report.files.items() if not _has_size(out / name, size)]
    bad += [] if (out / TOKENIZER).is_dir() else [TOKENIZER]
    if bad:
        names = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        print(f"{out}: missing or changed: {names}; building the shards again", file=sys.stderr)
        _reopen(out)
        return None
    shutil.rmtree(out / WORK, ignore_errors=True)
    return report


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _reopen(out: Path) -> None:
    """Undo the last steps of a build, in an order that a kill may interrupt; the tokenizer is kept."""
    (out / WORK).mkdir(exist_ok=True)
    if (out / TOKENIZER).is_dir():
        shutil.rmtree(out / WORK / TOKENIZER, ignore_errors=True)
        (out / TOKENIZER).rename(out / WORK / TOKENIZER)
    for name in (DATASET_FILE, REPORT):
        (out / name).unlink(missing_ok=True)


def shard_files(out: Path, splits: dict[str, dict[str, int]]) -> dict[str, int]:
    """Bytes of each shard and index of a build, by name."""
    shards = [
        out / f"{split}-{number:05d}.tar" for split, counts in splits.items() for number in range(counts["shards"])
    ]
    return {path.name: path.stat().st_size for shard in shards for path in (shard, index_path(shard))}


def _same_build(out: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    differ = sorted(key for key in wanted if there.get(key) != wanted[key])
    if differ:
        raise ValueError(f"{out}: holds a build with another {', '.join(differ)}; remove it or choose another folder")


@contextlib.contextmanager
def claimed(out: Path, fingerprint: dict[str, Any]) -> Iterator[Path]:
    """Own ``out`` while building, and give its work folder; refuse a second process and what another build left."""
    work, plan = out / WORK, out / WORK / "plan.json"
    if out.is_dir() and any(out.iterdir()) and not work.is_dir():
        raise ValueError(f"{out}: is not empty and holds no build; choose another folder")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{out}: another process is building here; wait for it or choose another folder"
            ) from error
        # A plan that failed before it had a tokenizer has built nothing: the corrected command takes its place.
        if plan.is_file() and any((folder / TOKENIZER).is_dir() for folder in (work, out)):
            _same_build(out, json.loads(plan.read_text()), fingerprint)
        else:
            write_atomic(plan, json.dumps(fingerprint, indent=2).encode())
        for leftover in work.glob("*.partial"):
            shutil.rmtree(leftover)
        yield work


def write_rejects(out: Path, jobs: list[ChunkJob]) -> None:
    """All chunks' bad records in one file; none when there is none."""
    lines = b"".join((job.folder / CHUNK_REJECTS).read_bytes() for job in jobs)
    if lines:
        write_atomic(out / REJECTS, lines)


def check_rejects(
    out: Path, chunks: list[dict[str, Any]], max_share: float, *, input_bytes: int, text_field: str
) -> None:
    """Raise if more than ``max_share`` of the records are bad, or of the input's bytes are in files that cannot be read
    to their end (one bad record, but nobody knows of how many good ones), or nothing is left.
    """
    rejects = count_rejects(chunks)
    documents = sum(split["documents"] for chunk in chunks for split in chunk["splits"].values())
    bad = sum(rejects.values())
    share = bad / max(1, bad + documents)
    lost = sum(chunk["lost_bytes"] for chunk in chunks) / max(1, input_bytes)
    if max(share, lost) > max_share or not documents:
        torn = f" and {lost:.1%} of the input's bytes are in files that cannot be read to their end" if lost else ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.items()) or "no record at all"
        raise ValueError(
            f"{out}: {share:.1%} of the records are bad{torn}, at most {max_share:.1%} are allowed: {reasons} "
            f"(text_field is {text_field!r}; each is listed in {out / REJECTS}); cure them or raise "
            f"max_reject_share"
        )


def publish(out: Path, jobs: list[ChunkJob], chunks: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Give the chunks' shards their final names, numbered through; again after a kill in the middle."""
    totals: dict[str, Counter[str]] = {}
    for job, chunk in zip(jobs, chunks, strict=True):
        for split, counts in chunk["splits"].items():
            total = totals.setdefault(split, Counter())
            for part in range(counts["shards"]):
                source = job.folder / f"{split}-{part:05d}.tar"
                target = out / f"{split}-{total['shards'] + part:05d}.tar"
                for made, final in ((index_path(source), index_path(target)), (source, target)):
                    with contextlib.suppress(FileNotFoundError):
                        made.replace(final)
                if not target.is_file():
                    raise FileNotFoundError(f"{source}: vanished during the build; remove {out} and build again")
            total.update(counts)
    if (jobs[0].folder.parent / TOKENIZER).is_dir():
        (jobs[0].folder.parent / TOKENIZER).rename(out / TOKENIZER)
    return {split: dict(total) for split, total in sorted(totals.items(), reverse=True)}
