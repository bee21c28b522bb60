"""pretrain checkpoint list, pin, unpin and rewind."""

from pathlib import Path

import pytest
import torch

from checkpoints.remote import Remote
from checkpoints.store import CheckpointStore
from launch.cli import main
from pretrain.lock import RunLock


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "run/checkpoints", keep=9)
    for step in (10, 20, 30):
        store.save(step, {"w": torch.ones(2)}, {}, {"metrics": {"eval_loss": 1.0 / step}})
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 30}\n')
    return tmp_path / "run"


def cli(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


def test_pins_and_metrics_are_listed(run: Path, capsys: pytest.CaptureFixture):
    assert cli("pin", run, 10) == 0
    assert f"pretrain checkpoint unpin {run} 10" in capsys.readouterr().out
    cli("list", run)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["10", "20", "30"]
    assert "pinned" in lines[1] and "pinned" not in lines[2] and "eval_loss 0.0500" in lines[2]
    CheckpointStore(run / "checkpoints", keep=1).save(40, {"w": torch.ones(2)}, {}, {})
    assert [info.step for info in CheckpointStore(run / "checkpoints").list()] == [10, 40]
    assert cli("unpin", run, 10) == 0
    CheckpointStore(run / "checkpoints", keep=1).save(50, {"w": torch.ones(2)}, {}, {})
    assert [info.step for info in CheckpointStore(run / "checkpoints").list()] == [50]


def test_rewind_sets_newer_ones_aside_and_says_where(run: Path, capsys: pytest.CaptureFixture):
    assert cli("rewind", run, 10) == 0
    said = capsys.readouterr().out
    (aside,) = (run / "checkpoints").glob("rewound-*")
    assert str(aside) in said and "goes on from step 10" in said
    assert CheckpointStore(run / "checkpoints").newest_whole() == 10
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "step-00000020", "step-00000030"]
    assert cli("rewind", run, 10) == 0
    assert "the newest already" in capsys.readouterr().out


def test_copies_elsewhere_are_pinned_and_set_aside_with_them(tmp_path: Path, capsys: pytest.CaptureFixture):
    url = f"file://{tmp_path}/copies"
    for name, value in (("run", 1.0), ("other", 2.0)):
        store = CheckpointStore(tmp_path / name / "checkpoints", remote=url if name == "run" else None)
        for step in (10, 20):
            store.save(step, {"w": torch.full((2,), value)}, {}, {})
        (tmp_path / name / "config.toml").write_text(f'[checkpoint]\nremote = "{url}"\n')
    run, copies = tmp_path / "run", Remote(url)
    pins = tmp_path / "copies/step-00000010.pinned"
    assert cli("pin", run, 10) == 0 and pins.exists()
    assert cli("unpin", run, 10) == 0 and not pins.exists()
    capsys.readouterr()
    for words in (("pin", tmp_path / "other", 10), ("rewind", tmp_path / "other", 10)):
        assert cli(*words) == 2
        assert "has the checkpoints of another run" in capsys.readouterr().err
    assert copies.newest_whole() == 20
    assert cli("rewind", run, 10) == 0 and copies.newest_whole() == 10


def test_mistakes_are_one_line(run: Path, capsys: pytest.CaptureFixture):
    for arguments, said in (
        (("rewind", run, 15), "no checkpoint of step 15 in"),
        (("pin", run, 15), "it has steps 10, 20, 30"),
        (("unpin", run.parent / "nothing", 1), "it has no checkpoint"),
        (("rewind", run.parent / "nothing", 1), "no checkpoints there; give the folder of a run"),
    ):
        assert cli(*arguments) == 2
        errors = capsys.readouterr().err
        assert said in errors and errors.count("\n") == 1
    assert not (run.parent / "nothing").exists()
    lock = RunLock(run)
    lock.take()
    assert cli("rewind", run, 10) == 2
    assert "another process is training there" in capsys.readouterr().err
    lock.release()
    assert CheckpointStore(run / "checkpoints").newest_whole() == 30
