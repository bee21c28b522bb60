"""A look into token shards."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.reader import TokenDataset
from data_pipeline.tokenizer import Tokenizer, load_tokenizer


def inspect_shards(
    shards: str | Path | Sequence[str | Path], num: int = 3, *, num_tokens: int = 64, tokenizer: Tokenizer | None = None
) -> list[str]:
    """Lines that show what shards hold and the beginning of ``num`` documents spread evenly over them.

    Args:
        num_tokens: tokens shown of each document.
        tokenizer: default the one built beside the shards; without any, ids are shown.
    """
    vocab_size = tokenizer.vocab_size if tokenizer else None
    dataset = TokenDataset(shards, vocab_size=vocab_size)
    if tokenizer is None and dataset.info is not None:
        folder = dataset.paths[0].parent / dataset.info.tokenizer
        tokenizer = load_tokenizer(folder) if folder.is_dir() else None
    per_token = f", {dataset.bytes_per_token:.3f} bytes/token" if dataset.bytes_per_token else ""
    lines = [
        f"{len(dataset.paths)} shards, {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens of "
        f"{dataset.dtype}{per_token}",
        f"tokens a document: shortest {dataset.lengths.min():,}, median {int(np.median(dataset.lengths)):,}, "
        f"longest {dataset.lengths.max():,}",
    ]
    for index in np.linspace(0, dataset.num_documents - 1, min(num, dataset.num_documents)).astype(int).tolist():
        tokens = dataset.document(index)[:num_tokens]
        shard = dataset.paths[dataset.shard_of(index)].name
        lines.append(f"document {index} ({shard}, {dataset.key(index)}): {dataset.lengths[index]:,} tokens")
        lines.append(f"  ids  {' '.join(str(token) for token in tokens.tolist())}")
        if tokenizer is not None:
            lines.append(f"  text {tokenizer.decode(tokens, skip_special_tokens=False)!r}")
    return lines
