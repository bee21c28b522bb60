"""Text to token shards: the same bytes for the same inputs and seed, whatever the number of workers or kills.

    inputs -> pieces -> chunks (about one shard of text each) -> OUT/.building/chunk-000007/   one process a
                                                              chunk -> OUT/train-00003.tar ...       at the
                                                              end, by renames

A chunk's folder is whole or absent, so a build that was killed goes on where it stopped.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.chunk import CHUNK_REJECTS, CHUNK_REPORT, ChunkJob, encode_chunk, is_held_out, unit_hash
from data_pipeline.paths import expand_paths
from data_pipeline.report import REJECTS, BuildReport
from data_pipeline.shards import DATASET_FILE, FORMAT_VERSION, INDEX_SUFFIX, DatasetInfo, write_atomic
from data_pipeline.sources.text import TEXT, Document, Piece, plan_pieces, read_piece
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

WORK, REPORT, TOKENIZER = ".building", "report.json", "tokenizer"
MIN_CHUNK = 1 << 20
CHUNKS_OF_A_SMALL_CORPUS = 16  # so that a few workers end together


@dataclass(frozen=True)
class TrainTokenizer:
    """A tokenizer to be trained with SentencePiece on a sample of the training documents.

    Attributes:
        model: "bpe" or "unigram". vocab_size: pieces. sample_bytes: UTF-8 bytes of text to train on.
    """

    model: str = "bpe"
    vocab_size: int = 8192
    sample_bytes: int = 2_000_000


def build(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: TrainTokenizer | str | Path,
    seed: int = 1,
    text_field: str = "text",
    held_out: float = 0.0,
    shard_size: int = 64 << 20,
    limit_bytes: int | None = None,
    workers: int | None = None,
    max_reject_share: float = 0.05,
    progress: bool = True,
) -> BuildReport:
    """Build token shards, their tokenizer and a report in ``out``. A finished build returns its report at
    once.

    Args:
        inputs: paths and globs of text files (one document each), JSON lines (.jsonl, also .gz/.zst) and
        parquet. tokenizer: one to train, or a path (folder, ``tokenizer.json`` or ``.model``).
        seed: of the held-out split, the training sample and the limit.
        text_field: field or column of the text in records.
        held_out: share of documents that go to ``heldout-*.tar``, chosen by a hash of the file's name, or of
            the record's text.
        shard_size: text bytes a shard, about (a small corpus is cut finer to keep the workers busy).
        limit_bytes: use only so much input, whole files or pieces chosen by a hash; at least one.
        workers: processes; default one a usable CPU. The output does not depend on it.
        max_reject_share: raise if more of the records are bad.

    Raises:
        FileNotFoundError: no input matches. ValueError: ``out`` holds something else, or too many bad
        records.
    """
    started = monotonic()
    if not 0 <= held_out < 1 or shard_size < 1:
        raise ValueError(f"held_out {held_out}: must be 0 or more and below 1; shard_size {shard_size}: 1 or more")
    patterns = [inputs] if isinstance(inputs, str | Path) else inputs
    pieces = plan_pieces(expand_paths(patterns, what="input"), piece_bytes=shard_size, text_field=text_field)
    pieces = _limited(pieces, limit_bytes, seed)
    out = Path(out)
    settings = {"seed": seed, "text_field": text_field, "held_out": held_out, "shard_size": shard_size}
    fingerprint = {**settings, "tokenizer": _describe(tokenizer), "inputs": _inputs_hash(pieces)}
    fingerprint["format_version"] = FORMAT_VERSION
    done = _finished(out, fingerprint)
    if done is not None:
        return done
    work = out / WORK
    with _claimed(out, fingerprint):
        trained = _prepare_tokenizer(tokenizer, work, pieces, text_field=text_field, seed=seed, held_out=held_out)
        size = min(shard_size, max(MIN_CHUNK, sum(piece.num_bytes for piece in pieces) // CHUNKS_OF_A_SMALL_CORPUS))
        jobs = [
            ChunkJob(
                number=number,
                pieces=tuple(part),
                work=str(work),
                tokenizer=str(work / TOKENIZER),
                tokenizer_hash=trained.fingerprint,
                text_field=text_field,
                shard_size=size,
                seed=seed,
                held_out=held_out,
            )
            for number, part in enumerate(_chunks(pieces, size))
        ]
        _run(jobs, workers or len(os.sched_getaffinity(0)), progress)
        chunks = [json.loads((job.folder / CHUNK_REPORT).read_text()) for job in jobs]
        rejects = sum((Counter(chunk["rejects"]) for chunk in chunks), Counter[str]())
        _write_rejects(out, jobs)
        _check_rejects(out, rejects, chunks, max_reject_share, text_field)
        splits = _publish(out, jobs, chunks)
        longest = max((chunk["longest_document"] for chunk in chunks), key=lambda entry: entry["tokens"])
        report = BuildReport(
            out=str(out),
            splits=splits,
            vocab_size=trained.vocab_size,
            unknown_tokens=sum(chunk["unknown_tokens"] for chunk in chunks),
            longest_document=longest,
            rejects=dict(rejects.most_common()),
            seconds=round(monotonic() - started, 2),
            fingerprint=fingerprint,
        )
        report.save(out / REPORT)
        DatasetInfo(trained.vocab_size, trained.dtype, trained.eos_id, TOKENIZER, splits).save(out)
        shutil.rmtree(work)
    return report


def _limited(pieces: list[Piece], limit_bytes: int | None, seed: int) -> list[Piece]:
    if limit_bytes is None:
        return pieces
    kept, total = set(), 0
    for piece in sorted(pieces, key=lambda piece: unit_hash(seed, f"limit:{piece.name}:{piece.start}")):
        if total and total + piece.num_bytes > limit_bytes:
            break
        kept.add(piece)
        total += piece.num_bytes
    return [piece for piece in pieces if piece in kept]


def _chunks(pieces: list[Piece], size: int) -> Iterator[list[Piece]]:
    part: list[Piece] = []
    for piece in pieces:
        part.append(piece)
        if sum(piece.num_bytes for piece in part) >= size:
            yield part
            part = []
    if part:
        yield part


def _describe(tokenizer: TrainTokenizer | str | Path) -> Any:
    if isinstance(tokenizer, TrainTokenizer):
        return asdict(tokenizer)
    return load_tokenizer(tokenizer).fingerprint


def _inputs_hash(pieces: list[Piece]) -> str:
    """Changes when an input is added, removed or rewritten (by size and modification time)."""
    times = {path: os.stat(path).st_mtime_ns for path in {piece.path for piece in pieces}}  # noqa: PTH116
    rows = [(piece.name, piece.start, piece.stop, times[piece.path]) for piece in pieces]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _finished(out: Path, fingerprint: dict[str, Any]) -> BuildReport | None:
    if not (out / DATASET_FILE).is_file() or not (out / REPORT).is_file():
        return None
    report = BuildReport.load(out / REPORT)
    _same_build(out, report.fingerprint, fingerprint)
    shutil.rmtree(out / WORK, ignore_errors=True)
    return report


def _same_build(out: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    differ = sorted(key for key in wanted if there.get(key) != wanted[key])
    if differ:
        raise ValueError(f"{out}: holds a build with another {', '.join(differ)}; remove it or choose another folder")


@contextlib.contextmanager
def _claimed(out: Path, fingerprint: dict[str, Any]) -> Iterator[None]:
    """Own ``out`` while building: one process at a time, and only what belongs to this build in it."""
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
        if plan.is_file():
            _same_build(out, json.loads(plan.read_text()), fingerprint)
        else:
            write_atomic(plan, json.dumps(fingerprint, indent=2).encode())
        for leftover in work.glob("*.partial"):
            shutil.rmtree(leftover)
        yield


def _prepare_tokenizer(
    tokenizer: TrainTokenizer | str | Path, work: Path, pieces: list[Piece], **choice: Any
) -> Tokenizer:
    """The tokenizer in the work folder, trained or copied there first."""
    final, partial = work / TOKENIZER, work / f"{TOKENIZER}.partial"
    published = work.parent / TOKENIZER
    if published.is_dir():  # killed while renaming
        return load_tokenizer(published)
    if not final.is_dir():
        if isinstance(tokenizer, TrainTokenizer):
            texts = _sample(pieces, tokenizer.sample_bytes, **choice)
            made = train_tokenizer(texts, model=tokenizer.model, vocab_size=tokenizer.vocab_size)
        else:
            made = load_tokenizer(tokenizer)
        made.save(partial)
        partial.rename(final)
    return load_tokenizer(final)


def _sample(pieces: list[Piece], num_bytes: int, *, text_field: str, seed: int, held_out: float) -> list[str]:
    """Training documents from many places: pieces in hash order, no more than a 20th of the sample from
    one.
    """
    texts, left = [], num_bytes
    for piece in sorted(pieces, key=lambda piece: unit_hash(seed, f"sample:{piece.name}:{piece.start}")):
        here = min(left, max(num_bytes // 20, left if piece.kind != TEXT and len(pieces) < 20 else 0))
        for entry in read_piece(piece, text_field):
            if isinstance(entry, Document) and not is_held_out(entry, seed, held_out):
                text = entry.text[:here]
                texts.append(text)
                here -= len(text.encode())
                left -= len(text.encode())
            if here <= 0:
                break
        if left <= 0:
            break
    if not texts:
        raise ValueError(f"no training document to train a tokenizer on in {len(pieces)} inputs; check them")
    return texts


def _run(jobs: list[ChunkJob], workers: int, progress: bool) -> None:
    todo = [job for job in jobs if not job.folder.is_dir()]
    columns = (TextColumn("building shards"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("", total=sum(job.num_bytes for job in jobs))
        bar.advance(task, sum(job.num_bytes for job in jobs) - sum(job.num_bytes for job in todo))
        if min(workers, len(todo)) <= 1:
            for job in todo:
                bar.advance(task, encode_chunk(job))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker) as pool:
            futures = [pool.submit(encode_chunk, job) for job in todo]
            try:
                for future in as_completed(futures):
                    bar.advance(task, future.result())
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _start_worker() -> None:
    """One thread a worker, and no worker outlives a killed build."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _write_rejects(out: Path, jobs: list[ChunkJob]) -> None:
    lines = b"".join((job.folder / CHUNK_REJECTS).read_bytes() for job in jobs)
    if lines:
        write_atomic(out / REJECTS, lines)


def _check_rejects(
    out: Path, rejects: Counter[str], chunks: list[dict[str, Any]], max_share: float, text_field: str
) -> None:
    documents = sum(split["documents"] for chunk in chunks for split in chunk["splits"].values())
    share = rejects.total() / max(1, rejects.total() + documents)
    if share > max_share or not documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.most_common()) or "no record at all"
        raise ValueError(
            f"{out}: {share:.1%} of the records are bad, at most {max_share:.1%} are allowed: {reasons} "
            f"(text_field is {text_field!r}; each is listed in {out / REJECTS}); cure them or raise "
            f"max_reject_share"
        )


def _publish(out: Path, jobs: list[ChunkJob], chunks: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Give the chunks' shards their final names, numbered through; again after a kill in the middle."""
    totals: dict[str, Counter[str]] = {}
    for job, chunk in zip(jobs, chunks, strict=True):
        for split, counts in chunk["splits"].items():
            total = totals.setdefault(split, Counter())
            for part in range(counts["shards"]):
                source = job.folder / f"{split}-{part:05d}.tar"
                target = out / f"{split}-{total['shards'] + part:05d}.tar"
                for suffix in (INDEX_SUFFIX, ""):
                    with contextlib.suppress(FileNotFoundError):
                        source.with_name(source.name + suffix).replace(target.with_name(target.name + suffix))
                if not target.is_file():
                    raise FileNotFoundError(f"{source}: vanished during the build; remove {out} and build again")
            total.update(counts)
    if (jobs[0].folder.parent / TOKENIZER).is_dir():
        (jobs[0].folder.parent / TOKENIZER).rename(out / TOKENIZER)
    return {split: dict(total) for split, total in sorted(totals.items(), reverse=True)}
