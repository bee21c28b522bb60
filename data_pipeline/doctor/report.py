"""A diagnosis as lines of text, as JSON and as one HTML page that needs nothing else."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from data_pipeline.doctor.charts import histogram_svg, histograms, ranks_svg, token_ranks
from data_pipeline.doctor.diagnosis import Diagnosis
from data_pipeline.doctor.findings import LISTED, SEVERITIES, Finding
from data_pipeline.doctor.shard import ShardFacts
from data_pipeline.paths import write_atomic

FORMAT_VERSION = 1
PRINTED = 5  # findings of a code on the terminal
SHOWN = 100  # and on the page
MEMBERS = 100  # of a cluster that are listed


def summary(diagnosis: Diagnosis) -> dict[str, Any]:
    """Numbers of all shards together."""
    corpus, clusters = diagnosis.corpus, diagnosis.clusters
    exact = [document for c in clusters if c.kind == "exact" for document in c.documents[1:]]
    pictures = [shard.pictures for shard in diagnosis.shards if shard.pictures is not None]
    return {
        "shards": len(diagnosis.shards),
        "bytes": diagnosis.num_bytes,
        "documents": len(corpus.lengths),
        "tokens": corpus.num_tokens,
        "unknown_tokens": corpus.unknown,
        "image_text_samples": sum(len(facts.keys) for facts in pictures),
        "pictures": sum(len(facts.owners) for facts in pictures),
        "pictures_decoded": sum(facts.decoded for facts in pictures),
        "copied_documents": len(exact),
        "copied_tokens": int(corpus.lengths[exact].sum()) if exact else 0,
        "near_duplicates": sum(len(c.documents) - 1 for c in clusters if c.kind == "near"),
        "searched_for_near_duplicates": corpus.searched,
        **{f"{severity}s": diagnosis.findings.number(severity) for severity in SEVERITIES},
        "seconds": round(diagnosis.seconds, 3),
        "megabytes_per_s": round(diagnosis.num_bytes / 1e6 / diagnosis.seconds, 1),
    }


def text_lines(diagnosis: Diagnosis) -> list[str]:
    """The findings, a few of each code, and a summary."""
    facts, lines = summary(diagnosis), []
    for code, found in _by_code(diagnosis.findings.in_order()):
        lines += [str(finding) for finding in found[:PRINTED]]
        more = diagnosis.findings.counts[code] - min(PRINTED, len(found))
        lines += [f"{found[0].severity}: {code}: and {more:,} more"] if more else []
    if facts["documents"]:
        lines.append(
            f"{facts['documents']:,} documents, {facts['tokens']:,} tokens, {facts['copied_tokens']:,} of them in "
            f"copies; {facts['searched_for_near_duplicates']:,} documents searched for near duplicates"
        )
    if facts["image_text_samples"]:
        lines.append(
            f"{facts['image_text_samples']:,} samples with {facts['pictures']:,} pictures, "
            f"{facts['pictures_decoded']:,} of them decoded"
        )
    lines.append(
        f"{facts['shards']:,} shards, {facts['bytes'] / 1e6:,.1f} MB in {facts['seconds']:.1f} s "
        f"({facts['megabytes_per_s']:,.0f} MB/s): {facts['errors']:,} errors, {facts['warnings']:,} warnings, "
        f"{facts['notes']:,} notes"
    )
    return lines


def _by_code(findings: Iterable[Finding]) -> list[tuple[str, list[Finding]]]:
    codes: dict[str, list[Finding]] = {}
    for finding in findings:
        codes.setdefault(finding.code, []).append(finding)
    return list(codes.items())


def as_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything that was found, for machines; at most ``LISTED`` findings of a code and clusters."""
    return {
        "format_version": FORMAT_VERSION,
        "summary": summary(diagnosis),
        "counts": dict(diagnosis.findings.counts),
        "findings": [finding.as_dict() for finding in diagnosis.findings.in_order()],
        "clusters": _clusters(diagnosis),
        "shards": [_shard(shard) for shard in diagnosis.shards],
        "histograms": {histogram.name: histogram.as_dict() for histogram in histograms(diagnosis)},
        "token_counts": token_ranks(diagnosis.corpus.counts),
    }


def _clusters(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    corpus, listed = diagnosis.corpus, []
    for cluster in diagnosis.clusters[:LISTED]:
        members = []
        for document, alike in zip(cluster.documents[:MEMBERS], cluster.similarities, strict=False):
            shard, key = corpus.place(document)
            tokens = int(corpus.lengths[document])
            members.append({"shard": shard, "key": key, "tokens": tokens, "similarity": round(alike, 4)})
        listed.append({"kind": cluster.kind, "documents": len(cluster.documents), "members": members})
    return listed


def _shard(shard: ShardFacts) -> dict[str, Any]:
    facts: dict[str, Any] = {"path": shard.name, "bytes": shard.num_bytes, "seconds": round(shard.seconds, 3)}
    if shard.tokens is not None:
        facts |= {"documents": len(shard.tokens.lengths), "tokens": int(shard.tokens.lengths.sum())}
    if shard.pictures is not None:
        facts |= {"samples": len(shard.pictures.keys), "pictures": len(shard.pictures.owners)}
    return facts


def write_json(diagnosis: Diagnosis, out: Path) -> None:
    """Write ``as_dict`` to a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(as_dict(diagnosis), indent=1, ensure_ascii=False).encode(errors="replace") + b"\n")


def write_page(diagnosis: Diagnosis, out: Path) -> None:
    """Write the page: summary, findings, histograms and the distribution of tokens."""
    facts = summary(diagnosis)
    figures = [_figure(histogram.title, histogram_svg(histogram)) for histogram in histograms(diagnosis)]
    tokens = token_ranks(diagnosis.corpus.counts)
    if tokens["ranks"]:
        title = f"Occurrences of tokens by rank: {tokens['used']:,} of {tokens['vocabulary']:,} ids occur"
        figures.insert(1, _figure(title, ranks_svg(tokens["ranks"])))
    verdict = "errors" if facts["errors"] else "warnings" if facts["warnings"] else "nothing wrong"
    names = [(name.replace("_", " "), f"{value:,}") for name, value in facts.items()]
    filled = {
        "TITLE": escape(f"Data report: {verdict}"),
        "SUMMARY": "".join(f"<div><b>{value}</b>{escape(name)}</div>" for name, value in names),
        "FINDINGS": "".join(_section(code, found, diagnosis) for code, found in _by_code(diagnosis.findings.in_order()))
        or "<p>Nothing was found.</p>",
        "CHARTS": "".join(figures),
        "SHARDS": _table(
            ["Shard", "Bytes", "Documents or samples", "Tokens or pictures"],
            [[str(cell) for cell in _row(_shard(shard))] for shard in diagnosis.shards[:LISTED]],
        ),
    }
    # Split first, so that what a shard's text says can never be taken for a marker.
    head, *rest = files("data_pipeline.doctor").joinpath("page.html").read_text(encoding="utf-8").split("<!--")
    pieces = [piece.split("-->", 1) for piece in rest]
    page = head + "".join(filled[marker] + text for marker, text in pieces)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode(errors="replace"))


def _figure(title: str, drawn: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawn}</figure>"


def _section(code: str, found: Sequence[Finding], diagnosis: Diagnosis) -> str:
    number, first = diagnosis.findings.counts[code], found[0]
    head = (
        f'<summary><span class="{first.severity}">{first.severity}</span> <b>{code}</b> ({number:,}): '
        f"{escape(first.cure)}</summary>"
    )
    rows = [[finding.shard, finding.key, finding.what] for finding in found[:SHOWN]]
    more = f"<p>{number - len(rows):,} more are not shown.</p>" if number > len(rows) else ""
    opened = " open" if first.severity == "error" else ""
    return f'<details class="card"{opened}>{head}{_table(["Shard", "Key", "What"], rows)}{more}</details>'


def _row(facts: dict[str, Any]) -> list[str]:
    first = facts.get("documents", facts.get("samples"))
    second = facts.get("tokens", facts.get("pictures"))
    return [facts["path"], *("-" if value is None else f"{value:,}" for value in (facts["bytes"], first, second))]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + f"</tr>{body}</table>"
