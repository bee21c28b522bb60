"""pretrain data build, inspect, index, doctor"""

import argparse
from pathlib import Path

from data_pipeline.build import TrainTokenizer
from data_pipeline.build import build as build_shards
from data_pipeline.cache import CacheOptions
from data_pipeline.doctor.diagnosis import diagnose
from data_pipeline.doctor.report import text_lines, write_json, write_page
from data_pipeline.indexing import index_shards
from data_pipeline.inspection import inspect_shards
from data_pipeline.sources.stdlib import stdlib_files


def build(args: argparse.Namespace) -> None:
    """Build shards and print the report."""
    inputs = stdlib_files() if args.input == ["stdlib"] else args.input
    trained = args.tokenizer in ("unigram", "bpe")
    tokenizer = TrainTokenizer(args.tokenizer, args.vocab_size) if trained else Path(args.tokenizer)
    report = build_shards(
        inputs,
        args.out,
        tokenizer=tokenizer,
        seed=args.seed,
        text_field=args.text_field,
        held_out=args.held_out,
        limit_bytes=args.limit_bytes,
        workers=args.workers,
        max_reject_share=args.max_reject_share,
    )
    print(report)


def inspect(args: argparse.Namespace) -> None:
    """Print documents, decoded."""
    for line in inspect_shards(args.shards, args.num):
        print(line)


def index(args: argparse.Namespace) -> int:
    """Make the indexes that shards lack; 1 when one could not be made."""
    cache = CacheOptions(dir=args.cache) if args.cache else CacheOptions()
    failed = 0
    for done in index_shards(
        args.shards, cache=cache, vocab_size=args.vocab_size, force=args.force, workers=args.workers
    ):
        failed += bool(done.error)
        print(f"error: {done.error}" if done.error else done.line, flush=True)
    return 1 if failed else 0


def doctor(args: argparse.Namespace) -> int:
    """Print what is wrong with shards; 1 when there is an error among it."""
    diagnosis = diagnose(
        args.shards,
        tokenizer=args.tokenizer,
        readers=args.readers,
        most_tokens=args.max_tokens,
        near_documents=args.near_documents,
        near_similarity=args.similarity,
        workers=args.workers,
        cache=CacheOptions(dir=args.cache) if args.cache else None,
    )
    for line in text_lines(diagnosis):
        print(line)
    for out, write in ((args.json, write_json), (args.html, write_page)):
        if out:
            write(diagnosis, Path(out))
    return 0 if diagnosis.healthy else 1
