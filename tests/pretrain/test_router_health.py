"""Router health: figures against a direct computation, heat maps, warnings, and what a real run shows."""

import io
import json
import math
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.metrics import HostCopy, Metrics
from pretrain.models.layers.moe import MoE, Routing
from pretrain.router_health import POINTS, RouterHealth
from tests.small import small_overrides

EVEN = [[10.0] * 4, [10.0] * 4]


def tables(rows: list[list[float]], **others: list[float]) -> dict[str, torch.Tensor]:
    """As the engine returns them, per target of 40."""
    names = ("router_entropy", "router_dropped", "balance_loss", "z_loss")
    values = {"router_rows": rows, **{name: [0.0] * len(rows) for name in names}, **others}
    return {name: torch.tensor(value, dtype=torch.float64) / 40 for name, value in values.items()}


def health(**moe: Any) -> RouterHealth:
    return RouterHealth(MoE(**{"experts": 4, "top_k": 1, **moe}), [1, 3], tokens=40, seq_len=20)


def read(routers: RouterHealth, rows: list[list[float]], **others: list[float]) -> Any:
    return routers.read({name: value.numpy() for name, value in tables(rows, **others).items()})


def test_figures_by_hand() -> None:
    routers = health(capacity=1.0, z_weight=0.1)
    found = read(
        routers,
        [[10, 10, 10, 10], [30, 6, 0, 0]],
        router_entropy=[40 * 1.2, 40 * 0.8],
        router_dropped=[0, 4],
        balance_loss=[4, 8],
        z_loss=[2, 2],
    )
    assert found.load == pytest.approx(np.array([[1, 1, 1, 1], [30 / 9, 6 / 9, 0, 0]]))
    spread = math.sqrt(((30 / 9 - 1) ** 2 + (6 / 9 - 1) ** 2 + 2) / 4)
    assert found.overall == pytest.approx(
        {
            "load_max": 30 / 9,
            "load_cv": spread / 2,
            "dead": 2,
            "entropy": 1.0,  # per token, those with dropped rows too, whatever share of tokens are targets
            "entropy_share": 1 / math.log(4),
            "dropped": 0.05,
            "balance_loss": 0.3,
            "z_loss": 0.1,
        }
    )
    assert found.by_layer["dropped"].tolist() == pytest.approx([0, 0.1])


def test_only_what_the_recipe_has_is_shown() -> None:
    plain = read(health(balance="none"), EVEN).overall
    assert set(plain) == {"load_max", "load_cv", "dead", "entropy", "entropy_share"}
    biased = read(health(bias=True), EVEN, router_bias=[40 * 0.5, 40 * 2.0])
    assert biased.overall["bias"] == 2.0 and biased.by_layer["bias"].tolist() == [0.5, 2.0]
    assert health().read({}) is None


@pytest.mark.parametrize("options", [{}, {"capacity": 1.0}, {"choice": "expert", "balance": "none"}, {"top_k": 3}])
def test_figures_of_a_real_router(options: dict[str, Any]) -> None:
    """In a sequence of 18 no capacity divides evenly; a third of the positions are no targets."""
    moe = MoE(**{"experts": 4, "top_k": 2, **options})
    routing, logits = Routing(moe), torch.randn(3, 18, 4, generator=torch.Generator().manual_seed(1)) * 2
    routing.begin(1.0)
    routes = routing(logits.requires_grad_())
    routes.weight.sum().backward()
    assert routing.seen is not None
    seen = (routing.seen / 36).split([4, 1, 1, 1, 1])
    names = ("router_rows", "router_entropy", "router_dropped", "balance_loss", "z_loss")
    found = RouterHealth(moe, [0], 54, 18).read(
        {
            name: (value[None] if name == "router_rows" else value).numpy()
            for name, value in zip(names, seen, strict=True)
        }
    )
    assert found is not None
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert found.overall["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert found.load[0].tolist() == pytest.approx((routes.counts / routes.counts.double().mean()).tolist())
    if moe.capacity:
        assert found.overall["dropped"] == pytest.approx(1 - routes.counts.sum().item() / 108)


def test_a_collapse_is_said_once_until_it_has_recovered() -> None:
    routers = health()
    said = [
        list(routers.warnings(read(routers, [EVEN[0], rows])))
        for rows in (
            [35.0, 3, 1, 1],
            [37.0, 1, 1, 1],
            [38.0, 1, 1, 0],
            [33.0, 3, 2, 2],
            [31.0, 3, 3, 3],
            [37.0, 1, 1, 1],
        )
    ]
    assert [len(lines) for lines in said] == [0, 1, 0, 0, 1, 1]
    assert said[1] == [
        "warning: the router of layer 3 collapsed: its 1 fullest of 4 experts take 92% of the rows, 0 get none; "
        "raise model.moe.balance_weight (0.01), or lower optim.lr"
    ]
    assert said[4][0].startswith("the router of layer 3 has recovered: ")


@pytest.mark.parametrize(
    ("options", "rows", "cure"),
    [
        ({"top_k": 2, "balance": "none"}, [21, 19, 0, 0], 'set model.moe.balance = "global"'),
        ({"top_k": 3, "bias": True}, [20, 20, 0, 0], "raise model.moe.bias_rate (0.001)"),  # 4 experts < 2 x 3
        ({"top_k": 3}, [39, 1, 1, 1], None),
    ],
)
def test_half_without_a_row_is_a_collapse_and_the_cure_fits(
    options: dict[str, Any], rows: list[float], cure: str | None
) -> None:
    routers = health(**options)
    lines = list(routers.warnings(read(routers, [rows, EVEN[1]])))
    assert [line.count("layer 1") for line in lines] == ([1] if cure else [])
    assert all(cure in line for line in lines if cure)


def test_too_few_rows_to_judge() -> None:
    routers = RouterHealth(MoE(experts=4, top_k=1), [1, 3], tokens=31, seq_len=31)
    assert list(routers.warnings(read(routers, [[40, 0, 0, 0]] * 2))) == []


def decode(png: bytes) -> np.ndarray[Any, Any]:
    """Colours [height, width, 3] of a PNG with a palette and no filters; checks every chunk's sum."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(256, 3)[lines[:, 1:]].astype(int)


def test_heat_map_shows_load_by_point_and_expert() -> None:
    routers = health()
    for rows in ([10.0, 10, 10, 10], [30.0, 6, 4, 0]):
        routers.remember(read(routers, [EVEN[0], rows]))
    maps = dict(routers.heat_maps())
    assert list(maps) == [1, 3]
    image = decode(maps[3])
    assert image.shape == (128, 128, 3)
    cells = image[32::64, 16::32]
    assert (image.reshape(2, 64, 4, 32, 3) == cells[:, None, :, None]).all()
    grey = cells[0, 0]
    assert (cells[0] == grey).all() and np.ptp(grey) < 3 and grey.min() > 220
    full, under, lower, none = cells[1]
    assert full[0] > full[2] + 60  # red
    assert under[2] > under[0] and lower[2] - lower[0] > under[2] - under[0]  # blue, and bluer
    assert none.tolist() == [0, 0, 0]


def test_heat_maps_keep_the_newest_points_only() -> None:
    routers = health()
    for rows in [[40.0, 0, 0, 0]] * 5 + [EVEN[0]] * POINTS:
        routers.remember(read(routers, [EVEN[0], rows]))
    assert routers.points == POINTS
    image = decode(dict(routers.heat_maps())[3])
    assert image.shape == (POINTS, 128, 3) and (image == image[0, 0]).all()


class Run:
    def __init__(self, folder: Path, done: int = 0, **settings: Any):
        self.folder, self.text = folder, io.StringIO()
        console = Console(file=self.text, width=200)
        self.metrics = Metrics(
            folder, tokens_per_step=40, console=console, **{"every": 2, "routers": health(), **settings}
        )
        self.metrics.start(done, 60)

    def steps(self, first: int, last: int, rows: list[list[float]] = EVEN) -> None:
        for step in range(first, last + 1):
            self.metrics.log(step, {"loss": torch.tensor(1.0), **tables(rows, balance_loss=[4, 8])})

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def test_console_lines_and_tensorboard(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(1, 3, [EVEN[0], [30.0, 6, 4, 0]])
    run.steps(4, 24)
    run.metrics.close()
    lines = run.lines()
    assert [line["step"] for line in lines if "router_load" in line] == [1, *range(2, 25, 2)]
    assert lines[1]["router_load"] == [[1, 1, 1, 1], [3, 0.6, 0.4, 0]]
    assert (lines[2]["router_load_max"], lines[2]["router_dead"]) == (3, 1)
    assert lines[2]["balance_loss"] == pytest.approx(0.3)
    second = next(line for line in run.text.getvalue().splitlines() if line.startswith("step  2/60"))
    assert second.startswith("step  2/60  loss 1.0000  load max/mean 3.00  dead 1  balance 0.3000  ")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    assert [(e.step, e.value) for e in events.Scalars("router/load_max/layer_3")][:3] == [(1, 3), (2, 3), (4, 1)]
    assert [e.value for e in events.Scalars("router/dead")][:3] == [1, 1, 0]
    assert events.Scalars("router/balance_loss")[0].value == pytest.approx(0.3)
    assert not {tag for tag in tags["scalars"] if "router" in tag and not tag.startswith("router/")}
    assert tags["images"] == ["router/load/layer_1", "router/load/layer_3"]
    (image,) = events.Images("router/load/layer_3")  # at the tenth of thirteen points
    assert image.step == 18 and (image.width, image.height) == (128, 120)
    assert decode(image.encoded_image_string).shape == (120, 128, 3)


def test_resume_continues_the_heat_map_and_drops_what_comes_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(1, 24)
    run.metrics.close()
    again = Run(tmp_path, done=10)
    assert again.metrics.routers is not None and again.metrics.routers.points == 6  # steps 1, 2, 4, ... 10
    again.steps(11, 14)
    again.metrics.close()
    assert [line["step"] for line in again.lines() if "router_load" in line] == [1, 2, 4, 6, 8, 10, 11, 12, 14]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("router/dead")] == [1, 2, 4, 6, 8, 10, 11, 12, 14]
    assert events.Images("router/load/layer_1") == []
    other = Run(tmp_path, done=14, routers=RouterHealth(MoE(experts=8), [1, 3], 40, 20))
    assert other.metrics.routers is not None and other.metrics.routers.points == 0
    other.metrics.close()


def test_a_collapse_reaches_the_console(tmp_path: Path) -> None:
    run = Run(tmp_path, tensorboard=False)
    run.steps(1, 6, [EVEN[0], [40.0, 0, 0, 0]])
    run.steps(7, 8)
    run.metrics.close()
    text = run.text.getvalue()
    assert text.count("warning: the router of layer 3 collapsed") == text.count("layer 3 has recovered") == 1
    assert "layer 1" not in text


def test_numbers_that_are_none_do_not_break_a_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.metrics.log(1, {"loss": 1.0, **tables(EVEN, router_entropy=[math.nan, 1])})
    run.metrics.log(2, {"loss": 1.0, **tables([[0.0] * 4] * 2)})
    run.metrics.close()
    lines = [json.loads(x, parse_constant=pytest.fail) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["router_entropy"] is None and lines[1]["router_load"] == [[0.0] * 4] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies off a GPU")
def test_tables_come_off_a_gpu_beside_scalars() -> None:
    rows = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    held = HostCopy({"loss": torch.tensor(2.5, device="cuda"), "rows": rows.cuda(), "lr": 0.1})
    assert held.read() == {"loss": 2.5, "lr": 0.1}
    assert held.tables()["rows"].tolist() == rows.tolist()


@pytest.mark.slow
def test_a_run_over_two_processes_shows_its_routers(tmp_path: Path, tiny_shards: Path) -> None:
    moe = ["model.moe.experts=4", "model.moe.ffn=64", "model.moe.first_dense=1", "parallel.ep=2", "optim.lr=1e-3"]
    settings = [*small_overrides(tmp_path / "run", tiny_shards), *moe, "train.steps=4", "log.every=2"]
    command = [sys.executable, "-m", "launch.cli", "run", "tiny", "--nproc", "2", *settings, "log.tensorboard=true"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    assert "load max/mean " in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    loads = np.array([line["router_load"] for line in lines if "router_load" in line])
    assert loads.shape == (3, 1, 4) and loads.mean(-1) == pytest.approx(1, abs=1e-3)
    assert all(0 < line["router_entropy"] <= math.log(4) and line["balance_loss"] >= 0.009 for line in lines)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [e.step for e in events.Scalars("router/load_max/layer_1")] == [1, 2, 4]
    assert [image.step for image in events.Images("router/load/layer_1")] == [4]
