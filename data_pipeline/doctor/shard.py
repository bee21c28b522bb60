"""One shard from end to end; nothing that is wrong with it stops the examination of the others."""

import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.doctor.archive import Torn
from data_pipeline.doctor.findings import Findings
from data_pipeline.doctor.layout import map_file, read_layout
from data_pipeline.doctor.pictures import PictureFacts, examine_pictures
from data_pipeline.doctor.tokens import Limits, TokenFacts, examine_tokens
from data_pipeline.doctor.vocabulary import Vocabulary


@dataclass
class ShardFacts:
    """What was found in a shard; neither ``tokens`` nor ``pictures`` where nothing could be read."""

    path: Path
    num_bytes: int
    findings: Findings
    tokens: TokenFacts | None = None
    pictures: PictureFacts | None = None
    seconds: float = 0.0


def examine_shard(path: Path, vocabulary: Vocabulary, limits: Limits) -> ShardFacts:
    """Read a shard and check it by itself."""
    began, findings = time.perf_counter(), Findings()
    facts = ShardFacts(path, 0, findings)
    try:
        with path.open("rb") as file:
            facts.num_bytes = path.stat().st_size
            data = map_file(file)
            layout = read_layout(str(path), file, data, findings)
            if layout.kind == "tokens":
                facts.tokens = examine_tokens(path, data, layout, vocabulary, limits, findings)
            elif layout.kind == "pictures":
                facts.pictures = examine_pictures(path, data, findings)
    except (Torn, OSError) as error:
        findings.add("torn", str(error), str(path))
    facts.seconds = time.perf_counter() - began
    return facts
