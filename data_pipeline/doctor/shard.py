"""One shard from end to end; nothing that is wrong with it stops the examination of the others."""

import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.cache import CacheOptions
from data_pipeline.doctor.archive import Torn
from data_pipeline.doctor.findings import Findings
from data_pipeline.doctor.layout import map_file, read_layout
from data_pipeline.doctor.pictures import PictureFacts, examine_pictures
from data_pipeline.doctor.tokens import Limits, TokenFacts, examine_tokens
from data_pipeline.doctor.vocabulary import Vocabulary
from data_pipeline.places import Shard, find_shards


@dataclass
class ShardFacts:
    """What was found in a shard; neither ``tokens`` nor ``pictures`` where nothing could be read. path: where it lies,
    or lay in the cache.
    """

    name: str
    path: Path
    findings: Findings
    num_bytes: int = 0
    tokens: TokenFacts | None = None
    pictures: PictureFacts | None = None
    seconds: float = 0.0


def examine_named(name: str, cache: CacheOptions, vocabulary: Vocabulary, limits: Limits) -> ShardFacts:
    """``examine_shard`` for another process, which can be given plain values."""
    return examine_shard(find_shards(name, cache)[0], vocabulary, limits)


def examine_shard(shard: Shard, vocabulary: Vocabulary, limits: Limits) -> ShardFacts:
    """Read a shard and check it by itself."""
    began, findings = time.perf_counter(), Findings()
    facts = ShardFacts(shard.name, shard.path, findings)
    try:
        with shard.local() as path, path.open("rb") as file:
            facts.num_bytes = path.stat().st_size
            data = map_file(file)
            layout = read_layout(shard.name, file, data, findings)
            if layout.kind == "tokens":
                facts.tokens = examine_tokens(shard, path, data, layout, vocabulary, limits, findings)
            elif layout.kind == "pictures":
                facts.pictures = examine_pictures(shard, path, data, findings)
    except Torn as error:
        findings.add("torn", str(error), shard.name)
    except (ValueError, OSError) as error:  # what is wrong in a shard is told above: here it is with getting it
        findings.add("unreadable", str(error), shard.name)
    facts.seconds = time.perf_counter() - began
    return facts
