"""Reading packed tokens: ours against a bare numpy memmap loop (no shuffling, no documents), webdataset, and litdata
and Megatron-Core's dataset where they are installed; and the first batch of a resume.

    python tests/bench/bench_loader.py [--seq-len 512 2048] [--document-tokens 300 1000 5000]

Tokens/s; the candidates take turns; medians over the rounds, ratios to the bare loop of the same run. "mixture, ledger"
is two sources mixed 7 to 3, and what each step is made of written down. Megatron-Core's index is built before the clock
starts; its masks and positions are those that it makes by itself.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import webdataset

from data_pipeline.ledger import Ledger
from data_pipeline.loader import Loader
from data_pipeline.mix import MixedStream
from data_pipeline.pack import TokenStream
from data_pipeline.reader import TokenDataset
from data_pipeline.shards import ShardWriter
from data_pipeline.timeline import Share, Timeline

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


def mixture(dataset_pair: tuple[TokenDataset, TokenDataset], ledger: Path, seq_len: int, steps: int) -> int:
    """Ours with all that a run has on: two sources, packing, the ledger."""
    streams = {name: TokenStream(one, seq_len=seq_len, seed=1) for name, one in zip("ab", dataset_pair, strict=True)}
    mixed = MixedStream(streams, Timeline.of([Share("a", ((0, 0.7),)), Share("b", ((0, 0.3),))]))
    ledger.unlink(missing_ok=True)
    with (
        Loader(mixed, global_batch=BATCH, micro_batch=8, prefetch=0) as loader,
        Ledger(ledger, 0, ["a", "b"], mixed.documents, BATCH) as written,
    ):
        for step in range(steps):
            written.add(step + 1, loader.cursor)
            next(loader)
    return steps * BATCH * seq_len


def litdata_candidate(folder: Path, tokens: np.ndarray, seq_len: int) -> Callable[[int], int] | None:
    """Its token blocks, shuffled, read one by one and stacked."""
    try:
        from litdata import StreamingDataset, TokensLoader, optimize
    except ImportError:
        return None
    out = folder / f"lit-{seq_len}"
    loader = TokensLoader(block_size=seq_len + 1)
    parts = [torch.from_numpy(part.astype(np.int64)) for part in np.array_split(tokens, len(tokens) // 1000)]
    optimize(_same, parts, str(out), chunk_size=(seq_len + 1) * 4096, num_workers=1, item_loader=loader, verbose=False)

    def read(steps: int) -> int:
        dataset = StreamingDataset(str(out), item_loader=TokensLoader(block_size=seq_len + 1), shuffle=True)
        count, at = len(dataset), 0
        for _ in range(steps):
            torch.stack([dataset[(at + row) % count] for row in range(BATCH)])
            at += BATCH
        return steps * BATCH * seq_len

    return read


def _same(part: torch.Tensor) -> torch.Tensor:
    return part


def megatron_candidate(folder: Path, tokens: np.ndarray, seq_len: int, mean: int) -> Callable[[int], int] | None:
    """Its GPT dataset over documents of the same mean length, samples collated by torch."""
    try:
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
        from megatron.core.datasets.utils import Split
    except ImportError:
        return None
    prefix = str(folder / f"megatron-{mean}")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for part in np.array_split(tokens, max(1, len(tokens) // mean)):
        builder.add_document(torch.from_numpy(part.astype(np.int32)), [len(part)])
    builder.finalize(f"{prefix}.idx")
    indexed = IndexedDataset(prefix)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_len,
        blend=([prefix], None),
        split="1,0,0",
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
        path_to_cache=str(folder / "cache"),
        tokenizer=_EndOfText(),
    )
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, documents, 1000 * BATCH, Split.train, config)

    def read(steps: int) -> int:
        count, at = len(dataset), 0
        for _ in range(steps):
            torch.utils.data.default_collate([dataset[(at + row) % count] for row in range(BATCH)])
            at += BATCH
        return steps * BATCH * seq_len

    return read


class _EndOfText:
    """What Megatron-Core's dataset asks a tokenizer for."""

    eod = pad = 0
    vocab_size = VOCAB
    unique_identifiers: ClassVar[dict[str, str]] = {"class": "none"}


class SyntheticIndex:
    """Lengths of a corpus that is not there."""

    def __init__(self, count: int) -> None:
        self.lengths = np.random.default_rng(0).exponential(1000, count).astype(np.int64) + 1
        self.num_documents, self.num_tokens, self.paths = count, int(self.lengths.sum()), [None]
        self._tokens = np.zeros(int(self.lengths.max()), np.uint16)

    def views(self, documents: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        return [self._tokens[:length] for length in lengths.tolist()]


def first_batches(count: int) -> None:
    """Seconds from an index in memory to the first batch, at the start and 10 million samples on."""
    index: Any = SyntheticIndex(count)
    for at in (0, 10_000_000):
        begin = time.perf_counter()
        TokenStream(index, seq_len=512, seed=1).read(at, 64)
        print(f"first batch at sample {at:>10,} of {count:,} documents: {time.perf_counter() - begin:.2f} s")


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
    first_batches(2_000_000)
    print(f"{'seq':>5} {'tokens/doc':>10} {'candidate':<22} {'M tokens/s':>10} {'ratio':>6}")
    for mean in options.document_tokens:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokens = write_shards(folder, options.tokens, mean)
            tokens.tofile(folder / "bare.bin")
            pair = [TokenDataset(folder / f"train-0000{half}.tar", vocab_size=VOCAB) for half in ("[01]", "[23]")]
            dataset = TokenDataset(folder / "train-*.tar", vocab_size=VOCAB)
            for seq_len in options.seq_len:
                stream = TokenStream(dataset, seq_len=seq_len, seed=1)
                steps = options.tokens // (BATCH * seq_len)
                shards = [str(path) for path in dataset.paths]
                candidates: dict[str, Callable[[], int]] = {
                    "bare memmap": lambda p=folder / "bare.bin", s=seq_len, n=steps: bare(p, s, n),
                    "ours, thread": lambda t=stream, n=steps: ours(t, n, 2),
                    "ours, no thread": lambda t=stream, n=steps: ours(t, n, 0),
                    "webdataset": lambda s=seq_len, n=steps // 4, f=shards: webdataset_pipeline(f, s, n),
                }
                candidates["mixture, ledger"] = lambda p=tuple(pair), f=folder / "ledger", s=seq_len, n=steps: mixture(
                    p, f, s, n
                )
                lit = litdata_candidate(folder, tokens[: options.tokens // 4], seq_len)
                mcore = megatron_candidate(folder, tokens[: options.tokens // 4], seq_len, mean)
                fewer = max(1, steps // 8)
                for label, peer in (("litdata", lit), ("Megatron-Core", mcore)):
                    if peer is None:
                        print(f"{label} is not installed: left out")
                    else:
                        candidates[label] = lambda f=peer, n=fewer: f(n)
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
