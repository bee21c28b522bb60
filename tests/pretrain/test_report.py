"""The report: one page that needs nothing else, from whole, torn and incomplete runs."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pretrain.report import make_charts, read_run, write_report


def make_run(folder: Path, steps: int = 5, config: str = "", tail: str = "", **first: Any) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"step": s, "loss": 5 - s / steps, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 100.0, "seconds": 6.0}
        for s in range(1, steps + 1)
    ]
    lines[0] |= first
    lines.append({"step": steps, "eval_loss": 3.25, "eval_bits_per_byte": 1.125})
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.toml").write_text(config or '[optim]\nname = "adamw"\n[run]\nseed = 1\n')
    (folder / "env.json").write_text(json.dumps({"torch": "2.13.0", "git": {"commit": "abc123"}}))
    return folder


class Page(HTMLParser):
    """Text, tags and the embedded numbers of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(self.source)
        self.data = json.loads(next(text for text in self.text if text.startswith('{"frame"')))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)

    def rows(self, kind: str) -> int:
        return sum(tag == "tr" and attrs.get("class") == kind for tag, attrs in self.tags)


def report(tmp_path: Path, *runs: Path) -> Page:
    write_report(runs, tmp_path / "out" / "report.html")
    return Page(tmp_path / "out" / "report.html")


def test_one_run_shows_curves_numbers_config_and_environment(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "demo"))
    assert page.count("svg") == page.count("figure") == len(page.data["charts"]) == 5
    for text in ("optim.name", "adamw", "git.commit", "abc123", "4.0000", "3.2500", "1.1250", "0.5"):
        assert text in page.text, text
    loss, *_ = page.data["charts"]
    assert [s["label"] for s in loss["series"]] == ["demo train", "demo held out"]
    assert loss["series"][1]["points"] == [[5.0, 3.25]]


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "demo"))
    addresses = set(re.findall(r"https?://[^\s\"')]+|url\(|@import|\bsrc=|\bhref=", page.source))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "<!--" not in page.source


def test_runs_overlay_and_their_differences_are_marked(tmp_path: Path) -> None:
    muon = '[optim]\nname = "muon"\nextra = 1\n[run]\nseed = 1\n'
    page = report(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", config=muon))
    assert {s["run"] for s in page.data["charts"][0]["series"]} == {0, 1}
    assert page.rows("differs") == 2  # optim.name, optim.extra
    assert page.rows("same") == 3  # run.seed, torch, git.commit
    assert sum(attrs.get("data-toggle") is not None for _, attrs in page.tags) == 2


def test_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><!--DATA-->"
    folder = make_run(tmp_path / "x<img>", config=f"[run]\nnote = '{evil}'\n", tail='{"step": 5, "<b>": 1}\n')
    page = report(tmp_path, folder)
    assert page.count("script") == 2 and page.count("img") == 0 and page.count("b") == 0
    assert evil in "".join(page.text)
    assert "<img" not in page.source.replace("&lt;img", "")


def test_a_killed_run_is_shown_with_a_note(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "demo", tail='not json\n[1]\n\n{"step": 6, "lo', loss=None))
    assert "demo: 3 torn or unreadable lines of metrics.jsonl left out" in page.text
    assert "demo: 1 values were not finite (NaN or infinity) and are not drawn" in page.text
    assert page.data["charts"][0]["series"][0]["points"][0][0] == 2


@pytest.mark.parametrize("content", ["", '{"step": 1, "lo'])
def test_a_run_without_a_whole_line_is_a_page_without_curves(tmp_path: Path, content: str) -> None:
    folder = make_run(tmp_path / "new")
    (folder / "metrics.jsonl").write_text(content)
    page = report(tmp_path, folder)
    assert page.count("svg") == 0
    assert "new: no complete line in metrics.jsonl yet" in page.text


def test_missing_and_broken_config_are_noted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "demo", config="not toml")
    (folder / "env.json").unlink()
    page = report(tmp_path, folder)
    assert "demo: config.toml is unreadable" in page.text
    assert "demo: env.json is missing" in page.text
    assert page.text.count("not recorded") == 2


def test_a_step_written_twice_counts_once_the_later_line(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "demo", tail='{"step": 3, "loss": 9.0}\n'))
    assert [x for x, _ in run.metrics["loss"]] == [1, 2, 3, 4, 5]
    assert run.metrics["loss"][2] == (3, 9.0)
    assert run.metrics["lr"][2] == (3, 0.1)


def test_big_runs_keep_their_spikes_in_a_small_page(tmp_path: Path) -> None:
    spike = json.dumps({"step": 15_000, "loss": 77.0}) + "\n"
    folder = make_run(tmp_path / "big", steps=30_000, tail=spike)
    page = report(tmp_path, folder)
    assert len(page.source) < 300_000
    raw = next(s for s in make_charts([read_run(folder)])[0].series if s.style == "faint")
    assert (15_000.0, 77.0) in raw.points and len(raw.points) < 1_100


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run"))
    assert {"a/run", "b/run"} <= set(page.text)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run at .*nowhere: the folder does not exist"):
        write_report([tmp_path / "nowhere"], tmp_path / "out.html")
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "out.html")
    with pytest.raises(ValueError, match="no run to report on"):
        write_report([], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()
