"""What a build of shards says about itself."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from data_pipeline.paths import write_atomic

REPORT, REJECTS = "report.json", "rejects.jsonl"


@dataclass(frozen=True)
class BuildReport:
    """What a build made. ``splits`` maps train and heldout to shards, documents, tokens and text_bytes."""

    out: str
    splits: dict[str, dict[str, int]]
    vocab_size: int
    unknown_tokens: int
    longest_document: dict[str, Any]  # source, tokens
    rejects: dict[str, int]  # reason -> records
    seconds: float
    fingerprint: dict[str, Any] = field(repr=False)
    lost_bytes: int = 0  # size of the inputs that could not be read to their end
    files: dict[str, int] = field(default_factory=dict, repr=False)  # shards and indexes -> bytes

    @property
    def tokens(self) -> int:
        return sum(split["tokens"] for split in self.splits.values())

    @property
    def documents(self) -> int:
        return sum(split["documents"] for split in self.splits.values())

    @property
    def bytes_per_token(self) -> float:
        return sum(split["text_bytes"] for split in self.splits.values()) / self.tokens

    @property
    def unknown_share(self) -> float:
        """Unknown tokens among all."""
        return self.unknown_tokens / self.tokens

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.documents:,} documents, {self.tokens:,} tokens in {self.seconds:.1f} s"]
        for name, split in self.splits.items():
            lines.append(
                f"  {name}: {split['shards']} shards, {split['documents']:,} documents, "
                f"{split['tokens']:,} tokens, "
                f"{split['text_bytes']:,} bytes of text"
            )
        lines.append(
            f"  vocabulary {self.vocab_size:,}, {self.bytes_per_token:.3f} bytes/token, unknown tokens "
            f"{self.unknown_share:.4%}"
        )
        lines.append(
            f"  longest document: {self.longest_document['tokens']:,} tokens, {self.longest_document['source']}"
        )
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.rejects.items())
        lines.append(f"  rejected: {reasons} (see {REJECTS})" if reasons else "  rejected: none")
        if self.lost_bytes:
            lines.append(f"  {self.lost_bytes:,} bytes of input lie in files that cannot be read to their end")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        write_atomic(path, json.dumps(asdict(self), indent=2, ensure_ascii=False).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text()))


def count_rejects(chunks: list[dict[str, Any]]) -> dict[str, int]:
    """Bad records by reason over all chunks, the most frequent first."""
    total = sum((Counter(chunk["rejects"]) for chunk in chunks), Counter[str]())
    return dict(total.most_common())
