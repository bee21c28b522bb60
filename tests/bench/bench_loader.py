"""Reading packed tokens: ours against a bare numpy memmap loop (no shuffling, no documents) and webdataset.

    python tests/bench/bench_loader.py [--seq-len 512 2048] [--document-tokens 300 1000 5000]

Tokens/s; the candidates take turns; medians over the rounds, ratios to the bare loop of the same run.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from data_pipeline.loader import Loader
from data_pipeline.pack import TokenStream
from data_pipeline.reader import TokenDataset
from data_pipeline.shards import ShardWriter

VOCAB = 32_000
BATCH = 32


def write_shards(folder: Path, num_tokens: int, mean: int, num_shards: int = 4) -> np.ndarray:
    """Documents of exponentially distributed lengths; returns all tokens as one array."""
    rng = np.random.default_rng(0)
    parts = []
    for shard in range(num_shards):
        with ShardWriter(folder / f"train-{shard:05d}.tar", "uint16") as writer:
            lengths = rng.exponential(mean, int(num_tokens / mean / num_shards) + 1).astype(int) + 1
            for number, length in enumerate(lengths.tolist()):
                parts.append(rng.integers(0, VOCAB, length).astype(np.uint16))
                writer.add(f"{shard:03d}{number:08d}", parts[-1], {"source": "random"}, text_bytes=4 * length)
    return np.concatenate(parts)


def bare(path: Path, seq_len: int, steps: int) -> int:
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    rows = (len(tokens) - 1) // seq_len
    at = 0
    for _ in range(steps):
        starts = [(at + row) % rows * seq_len for row in range(BATCH)]
        np.stack([tokens[start : start + seq_len + 1].astype(np.int64) for start in starts])
        at += BATCH
    return steps * BATCH * seq_len


def ours(stream: TokenStream, steps: int, prefetch: int) -> int:
    with Loader(stream, global_batch=BATCH, micro_batch=8, prefetch=prefetch) as loader:
        for _ in range(steps):
            next(loader)
    return steps * BATCH * stream.seq_len


def webdataset_pipeline(shards: list[str], seq_len: int, steps: int) -> int:
    """Its own reading, decoding and concatenating of the same shards, cut into the same rows."""
    rest, rows, done = np.empty(0, np.int64), [], 0
    while True:
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            rest = np.concatenate([rest, np.frombuffer(sample["tokens"], "<u2").astype(np.int64)])
            while len(rest) > seq_len:
                rows.append(rest[: seq_len + 1])
                rest = rest[seq_len:]
                if len(rows) == BATCH:
                    np.stack(rows)
                    rows, done = [], done + 1
                    if done == steps:
                        return steps * BATCH * seq_len


def rate(work: Callable[[], int]) -> float:
    begin = time.perf_counter()
    return work() / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--document-tokens", type=int, nargs="+", default=[300, 1000, 5000])
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{'seq':>5} {'tokens/doc':>10} {'candidate':<22} {'M tokens/s':>10} {'ratio':>6}")
    for mean in options.document_tokens:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_shards(folder, options.tokens, mean).tofile(folder / "bare.bin")
            dataset = TokenDataset(folder / "train-*.tar", vocab_size=VOCAB)
            for seq_len in options.seq_len:
                stream = TokenStream(dataset, seq_len=seq_len, seed=1)
                steps = 4_000_000 // (BATCH * seq_len)
                shards = [str(path) for path in dataset.paths]
                candidates: dict[str, Callable[[], int]] = {
                    "bare memmap": lambda p=folder / "bare.bin", s=seq_len, n=steps: bare(p, s, n),
                    "ours, thread": lambda t=stream, n=steps: ours(t, n, 2),
                    "ours, no thread": lambda t=stream, n=steps: ours(t, n, 0),
                    "webdataset": lambda s=seq_len, n=steps // 4, f=shards: webdataset_pipeline(f, s, n),
                }
                rates: dict[str, list[float]] = {label: [] for label in candidates}
                for _ in range(options.rounds + 1):
                    for label, work in candidates.items():
                        rates[label].append(rate(work))
                medians = {label: statistics.median(found[1:]) for label, found in rates.items()}
                for label, median in medians.items():
                    ratio = median / medians["bare memmap"]
                    print(f"{seq_len:>5} {mean:>10} {label:<22} {median / 1e6:>10.1f} {ratio:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
