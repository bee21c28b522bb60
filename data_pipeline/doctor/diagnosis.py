"""All checks of some shards, and what they found."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.cache import CacheOptions
from data_pipeline.chunk import start_worker
from data_pipeline.doctor.corpus import Cluster, Corpus
from data_pipeline.doctor.findings import Findings
from data_pipeline.doctor.shard import ShardFacts, examine_named, examine_shard
from data_pipeline.doctor.together import check_keys, check_pictures, check_sizes, check_vocabularies
from data_pipeline.doctor.tokens import Limits
from data_pipeline.doctor.vocabulary import Vocabulary, check_splits, read_vocabulary
from data_pipeline.places import Shard, find_shards
from data_pipeline.progress import byte_bar
from data_pipeline.tokenizer import load_tokenizer

NEAR_DOCUMENTS = 200_000  # compared with each other at most: 256 bytes each
MOST_TOKENS = 1_000_000  # of a document
SIMILARITY = 0.8
BYTES_A_WORKER = 64_000_000  # less is read before another process has started


@dataclass(frozen=True)
class Diagnosis:
    """What the checks found. seconds: of all; ``clusters``: of equal and nearly equal documents."""

    shards: list[ShardFacts]
    corpus: Corpus
    clusters: list[Cluster]
    findings: Findings
    seconds: float

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def healthy(self) -> bool:
        """No error was found."""
        return self.findings.number("error") == 0


def diagnose(
    shards: str | Path | Sequence[str | Path],
    *,
    tokenizer: str | Path | None = None,
    readers: int | None = None,
    most_tokens: int = MOST_TOKENS,
    near_documents: int = NEAR_DOCUMENTS,
    near_similarity: float = SIMILARITY,
    workers: int | None = None,
    cache: CacheOptions | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Read shards from end to end, a shard at a time in each of ``workers`` processes, and check them.

    Memory: about 60 bytes and a key for each document, 1 KB for each of the shard that is being read, and 256 bytes
    for each that is searched for near duplicates, up to three times that while they are chosen.

    Args:
        shards: a folder, path, URL or pattern, or several, of token or image-text shards.
        tokenizer: of the token shards, in place of what their folder's dataset.json names.
        readers: processes that will each read whole shards.
        most_tokens: a longer document is reported.
        near_documents: documents among which near duplicates are searched; of more a sample is taken.
        near_similarity: estimated Jaccard similarity of two documents' 5-token shingles from which they are near
            duplicates.
        workers: default one a usable CPU. cache: where shards from elsewhere are kept.
        progress: show a bar.

    Raises:
        FileNotFoundError: a pattern matches nothing. ValueError: a setting out of its range, no such tokenizer.
    """
    counts = {"readers": readers, "most_tokens": most_tokens, "near_documents": near_documents, "workers": workers}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} {count}: must be 1 or more")
    if not 0.5 <= near_similarity <= 1:
        raise ValueError(f"near_similarity {near_similarity}: must be 0.5 to 1")
    began = time.perf_counter()
    patterns = [shards] if isinstance(shards, str | Path) else list(shards)
    patterns = [f"{pattern}/*.tar" if Path(pattern).is_dir() else pattern for pattern in patterns]
    cache = cache or CacheOptions()
    found_shards = find_shards(patterns, cache)
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    firsts = {shard.path.parent: shard for shard in reversed(found_shards)}
    told = {folder: Findings() for folder in firsts}
    vocabularies = {folder: read_vocabulary(shard, given, told[folder]) for folder, shard in firsts.items()}
    limits = Limits(most_tokens, near_documents)
    facts = list(_examined(found_shards, cache, vocabularies, limits, workers, progress))
    findings = Findings()
    with_tokens = {shard.path.parent for shard in facts if shard.tokens is not None}
    for folder, found in told.items():
        if folder in with_tokens or not found.counts["description-missing"]:
            findings.extend(found)
        check_splits(folder, [s.path for s in found_shards if s.path.parent == folder and not s.url], findings)
    for shard in facts:
        findings.extend(shard.findings)
    check_vocabularies({folder: v for folder, v in vocabularies.items() if folder in with_tokens}, findings)
    check_keys(facts, findings)
    check_sizes(facts, readers, findings)
    check_pictures(facts, findings)
    corpus = Corpus(facts)
    corpus.check_unknown(findings)
    corpus.check_entropies(findings)
    clusters = corpus.exact_clusters()
    clusters += corpus.near_clusters(clusters, near_similarity, near_documents)
    corpus.report_clusters(clusters, findings)
    return Diagnosis(facts, corpus, clusters, findings, time.perf_counter() - began)


def _examined(
    shards: list[Shard],
    cache: CacheOptions,
    vocabularies: dict[Path, Vocabulary],
    limits: Limits,
    workers: int | None,
    progress: bool,
) -> Iterator[ShardFacts]:
    """Each shard's facts, in the order of the shards."""
    total = sum(0 if shard.url else shard.path.stat().st_size for shard in shards)
    most = len(shards) if any(shard.url for shard in shards) else 1 + total // BYTES_A_WORKER
    number = min(len(shards), workers or min(len(os.sched_getaffinity(0)), most))
    with byte_bar(f"examining {len(shards)} shards", total, show=progress, keep=False) as advance:
        if number <= 1:
            for shard in shards:
                yield _told(examine_shard(shard, vocabularies[shard.path.parent], limits), advance)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(number, context, start_worker) as pool:
            jobs = [(shard.name, cache, vocabularies[shard.path.parent], limits) for shard in shards]
            futures = [pool.submit(examine_named, *job) for job in jobs]
            try:
                for future in futures:
                    yield _told(future.result(), advance)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _told(facts: ShardFacts, advance: Callable[[int], None]) -> ShardFacts:
    advance(facts.num_bytes)
    return facts
