"""Building shards against the bare ``tokenizers`` call on the same text, tokenizer and cores.

    python tests/bench/bench_build.py [--workers 2] [--copies 4] [--rounds 3]

Text is the standard library's sources, several copies of them so that starting the workers does not decide. The bare
call gets texts in memory, some hundred at a time (its fastest), and drops the encodings; the build reads files,
encodes, writes shards, indexes and checksums. MB/s of UTF-8 text; the two take turns, medians. MB a CPU second counts
all threads and processes, and is the steadier figure where others use the cores too.
"""

import argparse
import contextlib
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from data_pipeline.build import TrainTokenizer, build
from data_pipeline.sources.stdlib import stdlib_files

BATCH = 256  # documents; one call with all of them runs at a third of the speed, for the memory of its results


def copy_corpus(folder: Path, copies: int) -> list[Path]:
    files = []
    for path in stdlib_files():
        with contextlib.suppress(UnicodeDecodeError):
            if path.read_bytes().decode().strip():
                files.append(path)
    for copy in range(copies):
        (folder / str(copy)).mkdir(parents=True)
        for number, path in enumerate(files):
            shutil.copyfile(path, folder / str(copy) / f"{number:05d}-{path.name}")
    return sorted(folder.rglob("*-*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=["bpe", "unigram"], default="bpe")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = copy_corpus(folder / "text", options.copies)
        texts = [path.read_bytes().decode() for path in files]
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        begin = time.perf_counter()
        trained = TrainTokenizer(model=options.model)
        build(files[: len(files) // options.copies], folder / "first", tokenizer=trained, progress=False)
        print(f"one copy, tokenizer trained on it: {time.perf_counter() - begin:.1f} s")
        tokenizer = Tokenizer.from_file(str(folder / "first" / "tokenizer" / "tokenizer.json"))
        first = folder / "first" / "tokenizer"

        def bare(turn: int) -> None:
            for at in range(0, len(texts), BATCH):
                tokenizer.encode_batch_fast(texts[at : at + BATCH], add_special_tokens=False)

        def ours(turn: int) -> None:
            out = folder / f"out{turn}"
            build(files, out, tokenizer=first, workers=options.workers, seed=turn, progress=False)
            shutil.rmtree(out)

        print(f"{megabytes:.0f} MB, {len(files)} files, {options.workers} workers")
        candidates: dict[str, Callable[[int], None]] = {"bare encode_batch_fast": bare, "build": ours}
        spent: dict[str, list[tuple[float, float]]] = {label: [] for label in candidates}
        for turn in range(options.rounds):
            for label, work in candidates.items():
                begin, cpu = time.perf_counter(), cpu_seconds()
                work(turn)
                spent[label].append((time.perf_counter() - begin, cpu_seconds() - cpu))
        medians = {
            label: [statistics.median(column) for column in zip(*rows, strict=True)] for label, rows in spent.items()
        }
        base = medians["bare encode_batch_fast"]
        for label, (wall, cpu) in medians.items():
            print(
                f"{label:<24} {megabytes / wall:6.2f} MB/s, ratio {base[0] / wall:.2f}; {megabytes / cpu:6.2f} MB a "
                f"CPU second, ratio {base[1] / cpu:.2f}"
            )


def cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    main()
