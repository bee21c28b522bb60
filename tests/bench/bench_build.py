"""Building shards against the bare ``tokenizers`` call on the same text, tokenizer and cores.

    python tests/bench/bench_build.py [--workers 2] [--copies 4] [--rounds 3]

Text is the standard library's sources, several copies of them so that starting the workers does not decide. The bare
call gets all texts in memory and returns encodings; the build reads files, encodes, writes shards, indexes and
checksums. MB/s of UTF-8 text; the two take turns, medians.
"""

import argparse
import contextlib
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer

from data_pipeline.build import TrainTokenizer, build
from data_pipeline.sources.stdlib import stdlib_files


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
        rates: dict[str, list[float]] = {"bare encode_batch_fast": [], "build": []}
        for turn in range(options.rounds):
            begin = time.perf_counter()
            tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            rates["bare encode_batch_fast"].append(megabytes / (time.perf_counter() - begin))
            begin = time.perf_counter()
            out = folder / f"out{turn}"
            build(
                files, out, tokenizer=folder / "first" / "tokenizer", workers=options.workers, seed=turn, progress=False
            )
            rates["build"].append(megabytes / (time.perf_counter() - begin))
            shutil.rmtree(out)
        medians = {label: statistics.median(found) for label, found in rates.items()}
        print(f"{megabytes:.0f} MB, {len(files)} files, {options.workers} workers")
        for label, median in medians.items():
            print(f"{label:<24} {median:6.2f} MB/s  ratio {median / medians['bare encode_batch_fast']:.2f}")


if __name__ == "__main__":
    main()
