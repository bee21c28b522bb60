"""What the doctor writes: lines, JSON, a page that needs nothing else, and the exit code."""

import argparse
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.doctor.charts import histogram_svg, histograms, ranks_svg, token_ranks
from data_pipeline.doctor.diagnosis import NEAR_DOCUMENTS
from data_pipeline.doctor.findings import LISTED, Findings
from data_pipeline.doctor.report import PRINTED, text_lines, write_json, write_page
from launch.commands.data import doctor
from tests.data_pipeline.doctor_shards import clean_documents, examine, write_corpus, write_split
from tests.data_pipeline.images import captioned, write_tar


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """One shard is cut, seven documents come twice, two without an end."""
    documents = clean_documents()
    for number in range(7):
        documents[20 + number] = documents[number].copy()
    documents[13], documents[14] = documents[13][:-1], documents[14][:-1]
    folder = write_corpus(tmp_path / "corpus", documents)
    last = folder / "train-00002.tar"
    last.write_bytes(last.read_bytes()[:3000])
    return folder


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source, self.tags, self.words = path.read_text(encoding="utf-8"), [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_data(self, data) -> None:
        self.words.append(data)


def test_json_tells_everything(spoilt, tmp_path) -> None:
    diagnosis = examine(spoilt)
    write_json(diagnosis, tmp_path / "out" / "report.json")
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["counts"] == {"torn": 1, "duplicate": 7, "no-end-of-text": 2}
    severities = [finding["severity"] for finding in told["findings"]]
    assert severities == ["error"] + ["warning"] * 9
    first = told["findings"][0]
    assert first["code"] == "torn" and first["shard"].endswith("train-00002.tar") and first["what"] and first["cure"]
    assert [shard["documents"] for shard in told["shards"][:2]] == [20, 20]
    copies = [cluster["members"] for cluster in told["clusters"]]
    assert [[member["key"] for member in pair] for pair in copies] == [[f"doc000{n}", f"doc002{n}"] for n in range(7)]
    about = told["summary"]
    assert about["errors"] == 1 and about["warnings"] == 9 and about["copied_documents"] == 7
    assert about["bytes"] == sum(path.stat().st_size for path in spoilt.glob("*.tar"))
    lengths, counts = told["histograms"]["lengths"], told["token_counts"]
    assert sum(lengths["counts"]) == about["documents"] and len(lengths["edges"]) == len(lengths["counts"]) + 1
    assert counts["most"][0][1] == max(count for _, count in counts["ranks"]) and counts["vocabulary"] == 300


def test_lines_name_some_of_a_code_and_count_the_others(spoilt) -> None:
    lines = text_lines(examine(spoilt))
    assert lines[0].startswith("error: torn: ") and "train-00002.tar" in lines[0] and lines[0].count("; ") >= 1
    assert sum(line.startswith("warning: duplicate: ") for line in lines) == PRINTED + 1
    assert "warning: duplicate: and 2 more" in lines
    assert re.search(r"^3 shards, .* MB/s\): 1 errors, 9 warnings, 0 notes$", lines[-1])


def test_the_page_needs_nothing_from_outside(spoilt, tmp_path) -> None:
    pictures = tmp_path / "pictures"
    write_tar(pictures / "a.tar", [captioned(number) for number in range(4)])
    diagnosis = examine(spoilt, pictures)
    write_page(diagnosis, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert not re.search(r"https?://|url\(|@import|\bsrc=|\bhref=|<!--|<script", page.source)
    names = [histogram.name for histogram in histograms(diagnosis)]
    assert names == ["lengths", "entropies", "pixels", "aspects", "captions", "shards"]
    assert page.tags.count("svg") == page.tags.count("figure") == len(names) + 1
    assert {"Data report: errors", "doc0003", "Length of a document"} <= set(page.words)
    assert any(word.startswith("Occurrences of tokens by rank: 29") for word in page.words)


def test_text_of_a_shard_is_escaped(tmp_path) -> None:
    folder = write_corpus(tmp_path / "x<img>")
    write_split(folder, [clean_documents(1, seed=7)[0][:-1]], "b", num_shards=1, keys="<script>alert(1)</script>")
    write_page(examine(folder), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags and "img" not in page.tags
    assert any("<script>alert(1)</script>" in word for word in page.words)


def test_a_healthy_corpus_and_one_without_anything_have_pages(tmp_path) -> None:
    write_page(examine(write_corpus(tmp_path / "good")), tmp_path / "good.html")
    assert {"Data report: nothing wrong", "Nothing was found."} <= set(Page(tmp_path / "good.html").words)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.tar").write_bytes(b"")
    diagnosis = examine(tmp_path / "bad")
    write_page(diagnosis, tmp_path / "bad.html")
    write_json(diagnosis, tmp_path / "bad.json")
    assert "svg" not in Page(tmp_path / "bad.html").tags


@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [5, 3, 3, 0, 1000], list(range(100_000))])
def test_token_ranks(counts) -> None:
    told = token_ranks(np.array(counts))
    ranks = [rank for rank, _ in told["ranks"]]
    assert len(ranks) <= 200 and ranks == sorted(set(ranks))
    assert told["used"] == sum(count > 0 for count in counts)
    if told["used"]:
        assert ranks[0] == 1 and ranks[-1] == told["used"] and told["most"][0][1] == max(counts)
        assert "nan" not in ranks_svg(told["ranks"])


def test_bars_of_a_histogram_count_all(tmp_path) -> None:
    for histogram in histograms(examine(write_corpus(tmp_path / "c"))):
        assert histogram_svg(histogram).count("<rect") == len(histogram.counts)
        assert sum(histogram.counts) == (3 if histogram.name == "shards" else 60)


def test_findings_without_end_are_counted() -> None:
    findings, other = Findings(), Findings()
    findings.add_all("empty", "a.tar", range(LISTED - 5), lambda _: "x", str)
    other.add_all("empty", "b.tar", range(LISTED + 5), lambda _: "x", str)
    findings.extend(other)
    assert len(findings.kept) == LISTED and findings.counts["empty"] == 2 * LISTED == findings.number("warning")
    assert findings.kept[-1].key == "4"


def arguments(shards: Path, **changed) -> argparse.Namespace:
    options = {"tokenizer": None, "readers": None, "workers": 1, "json": None, "html": None, "cache": None}
    options |= {"max_tokens": 1000, "near_documents": NEAR_DOCUMENTS, "similarity": 0.8}
    return argparse.Namespace(**{**options, "shards": [str(shards)], **changed})


def test_command(spoilt, tmp_path, capsys) -> None:
    names = {"json": str(tmp_path / "a.json"), "html": str(tmp_path / "a.html")}
    assert doctor(arguments(spoilt, **names)) == 1
    assert "1 errors, 9 warnings" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["summary"]["errors"] == 1
    assert "Data report: errors" in (tmp_path / "a.html").read_text()
    assert doctor(arguments(write_corpus(tmp_path / "good"), readers=9)) == 0, "a warning is no error"
