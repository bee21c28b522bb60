"""Text to token shards: the same bytes for the same inputs and seed, whatever the number of workers or kills.

    inputs -> pieces -> chunks (about one shard of text each) -> OUT/.building/chunk-000007/   one process a
                                                              chunk -> OUT/train-00003.tar ...       at the
                                                              end, by renames

A chunk's folder is whole or absent, so a build that was killed goes on where it stopped.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from time import monotonic
from typing import Any

from data_pipeline.chunk import CHUNK_REPORT, ChunkJob, encode_chunk, inputs_hash, sample_texts, start_worker, unit_hash
from data_pipeline.index import FORMAT_VERSION
from data_pipeline.output import TOKENIZER, check_rejects, claimed, finished, publish, shard_files, write_rejects
from data_pipeline.paths import expand_paths
from data_pipeline.progress import byte_bar, elapsed
from data_pipeline.report import REPORT, BuildReport, count_rejects
from data_pipeline.sentencepiece_model import TRAINABLE
from data_pipeline.shards import DatasetInfo
from data_pipeline.sources.text import Piece, plan_pieces
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

MIN_CHUNK = 1 << 20
CHUNKS_OF_A_SMALL_CORPUS = 32  # so that a few workers end together


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
    """Build token shards, their tokenizer and a report in ``out``; a finished build returns its report at once.

    Args:
        inputs: paths and globs of text files (one document each), JSON lines (.jsonl, .gz, .zst) and parquet.
        tokenizer: one to train, or a path (folder, ``tokenizer.json`` or ``.model``).
        seed: of the held-out split, the training sample and the limit.
        text_field: field or column of the text in records.
        held_out: share of documents that go to ``heldout-*.tar``, chosen by a hash of the file's name, or of
            the record's text.
        shard_size: text bytes a shard, about (a small corpus is cut finer to keep the workers busy).
        limit_bytes: use only so much input, whole files or pieces chosen by a hash; at least one.
        workers: processes; default one a usable CPU. The output does not depend on it.
        max_reject_share: raise if more of the records are bad, or more of the input's bytes are in files that cannot
            be read to their end.

    Raises:
        FileNotFoundError: no input matches. ValueError: a setting is out of its range, ``out`` holds something else,
        or too many bad records.
    """
    started = monotonic()
    _check_settings(tokenizer, held_out, shard_size, limit_bytes, workers, max_reject_share)
    paths = expand_paths([inputs] if isinstance(inputs, str | Path) else inputs, what="input")
    total = sum(path.stat().st_size for path in paths)
    size = min(shard_size, max(MIN_CHUNK, min(total, limit_bytes or total) // CHUNKS_OF_A_SMALL_CORPUS))
    pieces = _limited(plan_pieces(paths, piece_bytes=size, text_field=text_field), limit_bytes, seed)
    out = Path(out)
    fingerprint = {
        "format_version": FORMAT_VERSION,
        "inputs": inputs_hash(pieces),
        "tokenizer": _describe(tokenizer),
        "text_field": text_field,
        "seed": seed,
        "held_out": held_out,
        "shard_size": shard_size,
    }
    done = finished(out, fingerprint)
    if done is not None:
        return done
    choice: dict[str, Any] = {"text_field": text_field, "seed": seed, "held_out": held_out}
    with claimed(out, fingerprint) as work:
        trained = _prepare_tokenizer(tokenizer, work, pieces, progress, **choice)
        folder: dict[str, Any] = {
            "work": str(work),
            "tokenizer": str(work / TOKENIZER),
            "tokenizer_hash": trained.fingerprint,
        }
        jobs = [
            ChunkJob(number=number, pieces=tuple(part), shard_size=size, **folder, **choice)
            for number, part in enumerate(_chunks(pieces, size))
        ]
        _run(jobs, workers or len(os.sched_getaffinity(0)), progress)
        chunks = [json.loads((job.folder / CHUNK_REPORT).read_text()) for job in jobs]
        write_rejects(out, jobs)
        num_bytes = sum(job.num_bytes for job in jobs)
        check_rejects(out, chunks, max_reject_share, input_bytes=num_bytes, text_field=text_field)
        splits = publish(out, jobs, chunks)
        report = BuildReport(
            out=str(out),
            splits=splits,
            vocab_size=trained.vocab_size,
            unknown_tokens=sum(chunk["unknown_tokens"] for chunk in chunks),
            longest_document=max((chunk["longest_document"] for chunk in chunks), key=itemgetter("tokens")),
            rejects=count_rejects(chunks),
            seconds=round(monotonic() - started, 2),
            fingerprint=fingerprint,
            lost_bytes=sum(chunk["lost_bytes"] for chunk in chunks),
            files=shard_files(out, splits),
        )
        report.save(out / REPORT)
        DatasetInfo(trained.vocab_size, trained.dtype, trained.eos_id, TOKENIZER, splits).save(out)
        shutil.rmtree(work)
    return report


def _check_settings(
    tokenizer: TrainTokenizer | str | Path,
    held_out: float,
    shard_size: int,
    limit_bytes: int | None,
    workers: int | None,
    max_reject_share: float,
) -> None:
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out {held_out}: must be 0 or more and below 1")
    if not 0 <= max_reject_share <= 1:
        raise ValueError(f"max_reject_share {max_reject_share}: must be 0 to 1")
    counts = {"shard_size": shard_size, "limit_bytes": limit_bytes, "workers": workers}
    if isinstance(tokenizer, TrainTokenizer):
        if tokenizer.model not in TRAINABLE:
            raise ValueError(f"tokenizer model {tokenizer.model!r}: must be {' or '.join(TRAINABLE)}")
        counts |= {"vocab_size": tokenizer.vocab_size, "sample_bytes": tokenizer.sample_bytes}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} {count}: must be 1 or more")


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
    filled = 0
    for piece in pieces:
        part.append(piece)
        filled += piece.num_bytes
        if filled >= size:
            yield part
            part, filled = [], 0
    if part:
        yield part


def _describe(tokenizer: TrainTokenizer | str | Path) -> Any:
    if isinstance(tokenizer, TrainTokenizer):
        return asdict(tokenizer)
    return load_tokenizer(tokenizer).fingerprint


def _prepare_tokenizer(
    tokenizer: TrainTokenizer | str | Path, work: Path, pieces: list[Piece], progress: bool, **choice: Any
) -> Tokenizer:
    """The tokenizer in the work folder, trained or copied there first."""
    final, partial = work / TOKENIZER, work / f"{TOKENIZER}.partial"
    published = work.parent / TOKENIZER
    if published.is_dir():  # killed while renaming
        return load_tokenizer(published)
    if not final.is_dir():
        if isinstance(tokenizer, TrainTokenizer):
            texts = sample_texts(pieces, tokenizer.sample_bytes, **choice)
            size = sum(len(text.encode()) for text in texts) / 1e6
            what = (
                f"training the tokenizer ({tokenizer.model}, {tokenizer.vocab_size:,} pieces) on {size:.1f} MB of text"
            )
            with elapsed(what, show=progress):
                made = train_tokenizer(texts, model=tokenizer.model, vocab_size=tokenizer.vocab_size)
        else:
            made = load_tokenizer(tokenizer)
        made.save(partial)
        partial.rename(final)
    return load_tokenizer(final)


def _run(jobs: list[ChunkJob], workers: int, progress: bool) -> None:
    todo = [job for job in jobs if not job.folder.is_dir()]
    total = sum(job.num_bytes for job in jobs)
    with byte_bar("building shards", total, show=progress) as advance:
        advance(total - sum(job.num_bytes for job in todo))
        if min(workers, len(todo)) <= 1:
            for job in todo:
                advance(encode_chunk(job))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(todo)), context, start_worker) as pool:
            futures = [pool.submit(encode_chunk, job) for job in todo]
            try:
                for future in as_completed(futures):
                    advance(future.result())
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
