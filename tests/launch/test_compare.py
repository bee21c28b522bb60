"""pretrain compare: engines in turn on the same data."""

import importlib.util
import re
from dataclasses import replace

import pytest

from launch.cli import main
from launch.commands.compare import Result, table
from parallel.engine import ENGINES
from tests.small import small_overrides

NEEDED = [name for name in ("deepspeed", "megatron") if importlib.util.find_spec(name) is None]


def test_differences_are_relative_to_the_first() -> None:
    first = Result("torch", {1: 2.0, 2: 4.0}, 1000.0, 0.5, 3.0)
    other = Result("deepspeed", {1: 2.0, 2: 4.004}, 500.0, 0.75, 4.5)
    lines = [line.split() for line in table([first, other])]
    assert lines[1] == ["1", "2.000000", "+0.0e+00"] and lines[2] == ["2", "4.000000", "+1.0e-03"]
    assert lines[-1] == ["deepspeed", "1.0e-03", "500", "0.50", "0.75", "4.5"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engines", "torch,jax"], "--engines: 'jax' is unknown; any of torch,megatron,deepspeed"),
        (["--steps", "3"], "--steps 3: must be more than 3"),
        (["--steps", "6"], "schedule.warmup is 10 steps but the run has train.steps = 6"),
        (["--engines", "torch,deepspeed", "parallel.pp=2"], r'engine = "deepspeed" cannot do parallel.pp = 2'),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, capsys, words, message) -> None:
    assert main(["compare", "tiny", "--out", str(tmp_path / "out"), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_missing_engine_is_named_before_anything_runs(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(ENGINES, "deepspeed", replace(ENGINES["deepspeed"], package="no-such-distribution"))
    assert main(["compare", "tiny", "--out", str(tmp_path / "out"), "--engines", "torch,deepspeed"]) == 2
    assert 'engine = "deepspeed" needs the package' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(bool(NEEDED), reason=f"not installed: {', '.join(NEEDED)}")
def test_all_engines_compute_the_same(tmp_path, tiny_shards, capsys) -> None:
    overrides = small_overrides(tmp_path / "unused", tiny_shards)[:-1]
    words = [*overrides, "train.precision=fp32", "--steps", "5", "--nproc", "2", "--out", str(tmp_path / "out")]
    assert main(["compare", "tiny", *words]) == 0
    out = capsys.readouterr().out
    steps = re.findall(r"^ +(\d+) +\d\.\d{6} +(\S+) +(\S+)$", out, re.MULTILINE)
    assert [int(step) for step, _, _ in steps] == [1, 2, 3, 4, 5]
    assert all(abs(float(one)) < 1e-4 and abs(float(other)) < 1e-4 for _, one, other in steps)
    assert (tmp_path / "out/compare.html").is_file()
