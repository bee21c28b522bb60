"""One self-contained HTML page about one or several runs: curves, configuration, environment."""

import json
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from pretrain import charts
from pretrain.charts import Chart, Point, Series, Style, downsample, hover_data, smooth, svg

NUM_COLOURS = 8
SUMMARY_HEADS = (
    "Run",
    "Steps",
    "Last loss",
    "Held-out loss",
    "Best held-out",
    "Bits/byte",
    "Median tokens/s",
    "Training minutes",
)


@dataclass
class Run:
    """What a run folder says. `metrics` maps a key to its finite points (step, value)."""

    folder: Path
    label: str = ""
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write the page about the run folders `runs` to the file `out`.

    A run that is still going or was killed is fine: torn lines, and a missing config or environment, are noted on
    the page. Raises ValueError without runs, FileNotFoundError for a folder that holds none.
    """
    if not runs:
        raise ValueError("no run to report on: name one or more run folders, such as runs/demo")
    read = [read_run(folder) for folder in runs]
    for run, label in zip(read, _labels([run.folder for run in read]), strict=True):
        run.label = label
    page = _page(read)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(out)


def read_run(folder: Path) -> Run:
    """Read metrics.jsonl, config.toml and env.json of a run folder.

    When a step stands there twice, the later line counts. Raises FileNotFoundError when there is no metrics.jsonl.
    """
    if not (folder / "metrics.jsonl").is_file():
        found = "has no metrics.jsonl" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"no run at {folder}: the folder {found}; name a run folder, such as runs/demo")
    run = Run(folder)
    values: dict[str, dict[int, float | None]] = {}
    broken = 0
    with (folder / "metrics.jsonl").open(encoding="utf-8", errors="replace") as file:
        for line in file:
            entry = _parse(json.loads, line)
            step = entry.pop("step", None) if entry else None
            if entry is None or not isinstance(step, int):
                broken += bool(line.strip())
                continue
            for key, value in entry.items():
                if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                    values.setdefault(key, {})[step] = value
    missing = 0
    for key, by_step in values.items():
        finite = [(float(s), float(v)) for s, v in sorted(by_step.items()) if v is not None and math.isfinite(v)]
        missing += len(by_step) - len(finite)
        if finite:
            run.metrics[key] = finite
    run.config = _read_flat(run, "config.toml", tomllib.loads)
    run.environment = _read_flat(run, "env.json", json.loads)
    notes = {
        "no complete line in metrics.jsonl yet": not values,
        f"{broken} torn or unreadable lines of metrics.jsonl left out": broken,
        f"{missing} values were not finite (NaN or infinity) and are not drawn": missing,
    }
    run.notes += [note for note, applies in notes.items() if applies]
    return run


def _parse(loads: Callable[[str], Any], text: str) -> dict[str, Any] | None:
    try:
        value = loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_flat(run: Run, name: str, loads: Callable[[str], Any]) -> dict[str, str]:
    """A nested file as {dotted key: JSON text}; noted when absent or unreadable."""
    path = run.folder / name
    content = _parse(loads, path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    if content is None:
        run.notes.append(f"{name} is {'unreadable' if path.is_file() else 'missing'}")
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
            for i, inner in enumerate(value):
                walk(f"{prefix}[{i}]", inner)
        else:
            flat[prefix] = value if isinstance(value, str) else json.dumps(value, default=str)

    walk("", content or {})
    flat.pop("", None)
    return flat


def _labels(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{'/'.join(p[-1:])} ({i + 1})" for i, p in enumerate(parts)]


def make_charts(runs: Sequence[Run]) -> list[Chart]:
    """Loss, bits per byte, learning rate, gradient norm and throughput; those without a point are left out.

    All share one range of steps.
    """

    def curve(i: int, key: str, label: str, style: Style = "line") -> list[Series]:
        return [Series(i, label, downsample(runs[i].metrics.get(key, [])), style)]

    def noisy(i: int, key: str, label: str) -> list[Series]:
        points = runs[i].metrics.get(key, [])
        if len(points) < 50:
            return curve(i, key, label)
        mean = downsample(smooth(points, max(5, len(points) // 100)))
        return [*curve(i, key, label, "faint"), Series(i, f"{label}, mean", mean)]

    per_run: dict[str, Callable[[int, str], list[Series]]] = {
        "Loss (nats/token; held out: dashed)": lambda i, name: (
            noisy(i, "loss", f"{name} train") + curve(i, "eval_loss", f"{name} held out", "dots")
        ),
        "Held-out bits per byte": lambda i, name: curve(i, "eval_bits_per_byte", name, "dots"),
        "Learning rate": lambda i, name: curve(i, "lr", name),
        "Gradient norm before clipping (log scale)": lambda i, name: noisy(i, "grad_norm", name),
        "Router: fullest expert over mean": lambda i, name: noisy(i, "router_load_max", name),
        "Router: experts without a row": lambda i, name: noisy(i, "router_dead", name),
        "Tokens per second": lambda i, name: noisy(i, "tokens_per_s", name),
    }
    steps = [x for run in runs for points in run.metrics.values() for x in (points[0][0], points[-1][0])]
    made = []
    for title, series_of in per_run.items():
        series = [s for i, run in enumerate(runs) for s in series_of(i, run.label) if s.points]
        if series:
            made.append(Chart(title, series, (min(steps), max(steps)), log=title.endswith("(log scale)")))
    return made


def _page(runs: Sequence[Run]) -> str:
    drawn = make_charts(runs)
    figures = [
        f'<figure><figcaption>{escape(c.title)}</figcaption>{svg(c)}<div class="tip"></div></figure>' for c in drawn
    ]
    frame = {"width": charts.WIDTH, "height": charts.HEIGHT, "left": charts.LEFT, "right": charts.RIGHT}
    frame |= {"top": charts.TOP, "bottom": charts.BOTTOM}
    data = json.dumps({"frame": frame, "charts": [hover_data(chart) for chart in drawn]}, separators=(",", ":"))
    notes = [f"{run.label}: {note}" for run in runs for note in run.notes]
    filled = {
        "TITLE": escape("Run report: " + ", ".join(run.label for run in runs)),
        "SUMMARY": _summary(runs),
        "NOTES": "".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        "CHARTS": "".join(figures),
        "CONFIG": _keys(runs, [run.config for run in runs]),
        "ENVIRONMENT": _keys(runs, [run.environment for run in runs]),
        "COLOURS": "\n".join(_colour(i) for i in range(len(runs))),
        "DATA": data.replace("<", "\\u003c"),
    }
    # Split first, so that a run's own text can never be taken for a marker.
    head, *rest = files("pretrain").joinpath("report.html").read_text(encoding="utf-8").split("<!--")
    pieces = [piece.split("-->", 1) for piece in rest]
    return head + "".join(filled[marker] + text for marker, text in pieces)


def _colour(run: int) -> str:
    dash = f" stroke-dasharray: {2 + 2 * (run // NUM_COLOURS)} 2;" if run >= NUM_COLOURS else ""
    return f'[data-run="{run}"] {{ --colour: var(--run-{run % NUM_COLOURS});{dash} }}'


def _summary(runs: Sequence[Run]) -> str:
    """One row a run; the check box hides its curves."""

    def last(run: Run, key: str) -> float | None:
        return run.metrics[key][-1][1] if key in run.metrics else None

    rows = []
    for i, run in enumerate(runs):
        steps = max((points[-1][0] for points in run.metrics.values()), default=0)
        speed = median(y for _, y in run.metrics["tokens_per_s"]) if "tokens_per_s" in run.metrics else None
        seconds = sum(y for _, y in run.metrics.get("seconds", [])) or None
        best = min((y for _, y in run.metrics.get("eval_loss", [])), default=None)
        cells = [
            f"{steps:,.0f}",
            *(_number(v, ".4f") for v in (last(run, "loss"), last(run, "eval_loss"), best)),
            _number(last(run, "eval_bits_per_byte"), ".4f"),
            _number(speed, ",.0f"),
            _number(seconds and seconds / 60, ",.1f"),
        ]
        name = (
            f'<label><input type="checkbox" data-toggle="{i}" checked> '
            f'<span class="swatch" data-run="{i}"></span>{escape(run.label)}</label>'
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in (name, *cells)) + "</tr>")
    return "<table><tr>" + "".join(f"<th>{head}</th>" for head in SUMMARY_HEADS) + "</tr>" + "".join(rows) + "</table>"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _keys(runs: Sequence[Run], columns: list[dict[str, str]]) -> str:
    """A row a key, a column a run; rows that differ between runs are marked."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if not keys:
        return '<span class="note">not recorded</span>'
    rows = []
    for key in keys:
        values = [column.get(key) for column in columns]
        kind = "differs" if len(set(values)) > 1 else "same"
        cells = [f"<td><code>{'-' if value is None else escape(value)}</code></td>" for value in values]
        rows.append(f'<tr class="{kind}"><th>{escape(key)}</th>{"".join(cells)}</tr>')
    table = f'<table class="keys">{"".join(rows)}</table>'
    if len(runs) == 1:
        return table
    names = "".join(
        f'<td><span class="swatch" data-run="{i}"></span>{escape(r.label)}</td>' for i, r in enumerate(runs)
    )
    toggle = '<label><input type="checkbox"> only what differs</label>'
    return toggle + table.replace("<tr", f"<tr><th></th>{names}</tr><tr", 1)
