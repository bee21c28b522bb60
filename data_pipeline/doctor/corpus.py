"""What is wrong with token shards taken together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.doctor.findings import Findings
from data_pipeline.doctor.minhash import Sketches, groups, near_pairs, similarity
from data_pipeline.doctor.shard import ShardFacts
from data_pipeline.doctor.tokens import TokenFacts
from data_pipeline.doctor.vocabulary import split_of

HELD_OUT = ("heldout", "held-out", "held_out", "val", "valid", "validation", "test", "eval", "dev")
OUTLIER = 8.0  # robust z-score of an entropy
CLASS_SIZE = 30  # documents of about one length that say what is usual
LEAST_SPREAD = 0.05  # nats: smaller differences are none
UNKNOWN_SHARE = 0.005  # of all tokens
NAMED = 3  # members of a group that its finding names


@dataclass(frozen=True)
class Cluster:
    """Documents that are copies, or near copies, of the first one, the most similar ones first."""

    kind: str  # exact or near
    documents: list[int]
    similarities: list[float]


class Corpus:
    """The documents of all token shards, numbered through: n of them.

    Attributes:
        lengths: int64 [n], tokens. entropies: float32 [n], nats a token, NaN where not judged. digests: uint64 [n].
        counts: int64, of each token id. unknown: tokens. searched: documents compared with each other.
    """

    def __init__(self, shards: Sequence[ShardFacts]) -> None:
        pairs = [(shard, shard.tokens) for shard in shards if shard.tokens is not None]
        self.shards: list[ShardFacts] = [shard for shard, _ in pairs]
        self.parts: list[TokenFacts] = [part for _, part in pairs]
        self.first = np.cumsum([0, *(len(part.lengths) for part in self.parts)])
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in self.parts)])
        self.digests = np.concatenate([np.zeros(0, np.uint64), *(part.digests for part in self.parts)])
        self.entropies = np.concatenate([np.zeros(0, np.float32), *(part.entropies for part in self.parts)])
        self.counts = np.zeros(max([len(part.counts) for part in self.parts], default=0), np.int64)
        for part in self.parts:
            self.counts[: len(part.counts)] += part.counts
        self.unknown = sum(part.unknown for part in self.parts)
        self.searched = 0

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def place(self, document: int) -> tuple[str, str]:
        """Shard and key of a document."""
        shard = int(np.searchsorted(self.first, document, side="right")) - 1
        key = self.parts[shard].keys[document - self.first[shard]]
        return self.shards[shard].name, key.decode(errors="replace")

    def check_unknown(self, findings: Findings) -> None:
        """The share of unknown tokens."""
        share = self.unknown / max(1, self.num_tokens)
        if share > UNKNOWN_SHARE:
            findings.add("unknown-share", f"{share:.2%} of {self.num_tokens:,} tokens are unknown")

    def check_entropies(self, findings: Findings) -> None:
        """Documents far from those of about their length: an entropy grows with the length."""
        judged = np.flatnonzero(np.isfinite(self.entropies))
        classes = np.log2(np.maximum(1, self.lengths[judged])).astype(int)
        for power in np.unique(classes).tolist():
            documents = judged[classes == power]
            values = self.entropies[documents].astype(np.float64)
            if len(documents) < CLASS_SIZE:
                continue
            usual = float(np.median(values))
            spread = max(LEAST_SPREAD, 1.4826 * float(np.median(np.abs(values - usual))))  # of a normal distribution
            scores = (values - usual) / spread
            for at in np.flatnonzero(np.abs(scores) > OUTLIER).tolist():
                what = (
                    f"{values[at]:.2f} nats a token, {usual:.2f} are usual at {2**power:,} to {2 ** (power + 1) - 1:,} "
                    f"tokens: robust z-score {scores[at]:.1f}"
                )
                findings.add("entropy-low" if scores[at] < 0 else "entropy-high", what, *self.place(documents[at]))

    def exact_clusters(self) -> list[Cluster]:
        """Documents with the same tokens; those of one token are left out."""
        documents = np.flatnonzero(self.lengths > 1)
        found = [documents[group].tolist() for group in equal_groups(self.digests[documents])]
        return [Cluster("exact", group, [1.0] * len(group)) for group in sorted(found)]

    def near_clusters(self, exact: Sequence[Cluster], threshold: float, limit: int) -> list[Cluster]:
        """Documents like each other, copies left out, searched among at most ``limit``."""
        copies = np.zeros(len(self.lengths), bool)
        for cluster in exact:
            copies[cluster.documents[1:]] = True
        parts = [
            Sketches(part.sketches.documents + first, part.sketches.order, part.sketches.values)
            for part, first in zip(self.parts, self.first.tolist(), strict=False)
        ]
        all_ = Sketches.joined(parts)
        single = ~copies[all_.documents]
        sketches = Sketches(all_.documents[single], all_.order[single], all_.values[single]).smallest(limit)
        self.searched = len(sketches.documents)
        clusters = []
        for group in groups(near_pairs(sketches.values, threshold)):
            numbers = np.array(group)
            alike = similarity(sketches.values, np.full(len(group), group[0]), numbers)
            by = np.argsort(-alike, kind="stable")
            clusters.append(Cluster("near", sketches.documents[numbers[by]].tolist(), alike[by].tolist()))
        return clusters

    def report_clusters(self, clusters: Sequence[Cluster], findings: Findings) -> None:
        """A finding for each, another code where held-out documents are in it."""
        for cluster in clusters:
            places = [self.place(document) for document in cluster.documents[: NAMED + 1]]
            others, more = places[1:], len(cluster.documents) - len(places)
            named = ", ".join(f"{shard} {key!r}" for shard, key in others) + (f" and {more} more" if more else "")
            if cluster.kind == "exact":
                what, code = f"has the same tokens as {named}", "duplicate"
            else:
                what, code = f"is {cluster.similarities[1]:.0%} (estimated) like {named}", "near-duplicate"
            if self._leaks(cluster):
                what, code = f"{what}: in training and held-out shards", "held-out-leak"
            findings.add(code, what, *places[0])

    def _leaks(self, cluster: Cluster) -> bool:
        shards = np.searchsorted(self.first, cluster.documents, side="right") - 1
        return len({split_of(self.shards[shard].path).lower() in HELD_OUT for shard in set(shards.tolist())}) == 2


def equal_groups(values: np.ndarray) -> list[np.ndarray]:
    """Places of equal values, those that are there more than once; each group sorted."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    borders = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    return [group for group in np.split(order, borders) if len(group) > 1] if len(order) else []
