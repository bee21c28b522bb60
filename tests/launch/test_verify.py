"""pretrain verify-layout: what it prints and returns, and that all our layouts compute what one process computes."""

from functools import partial

import pytest

from launch.cli import main
from launch.commands.verify import Certifier, Verdict
from parallel.layouts import all_layouts, describe_layout
from parallel.mesh import AXES, ParallelConfig
from parallel.pipeline_cut import V_SHAPED, schedule_names
from pretrain.config import resolve
from pretrain.shrink import shrink
from pretrain.verify import changed
from tests.launch.test_verify_bugs import double_one_gradient, planted

FIVE_HEADS = ["tiny", "model.heads=5", "model.kv_heads=1"]
SMALL = ["model.layers=2", "train.micro_batch=4", "train.global_batch=8"]


def test_a_layout_that_agrees(capsys):
    assert main(["verify-layout", "tiny", *SMALL, "parallel.dp_shard=2", "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "model.hidden 160 -> " in shown
    assert "2 processes on cpu, engine torch: dp_shard 2; 1 micro-batches a step" in shown
    assert "allowed: 16 x (the error of one fp32 process" in shown
    lines = shown.splitlines()
    assert any(line.split()[:3] == ["initial", "weights", "equal"] for line in lines)
    for name in ("embed.weight", "layers.1.mlp.down.weight", "loss of step 2, muon", "gradient norm of step 2, adamw"):
        (line,) = (line for line in lines if line.startswith(name))
        assert line.endswith("%")
    assert lines[-1] == "1 of 1 layouts agree with one process"


@pytest.mark.slow
def test_a_layout_that_differs_and_which_axis_it_is(capsys, monkeypatch):
    monkeypatch.setattr(Certifier, "measure", staticmethod(partial(planted, double_one_gradient)))
    # Micro-batches stay, so that 2 is neither their number nor a degree: 3 of them.
    options = ["train.micro_batch=2", "train.global_batch=12", "parallel.dp_shard=2", "parallel.tp=2"]
    assert main(["verify-layout", "tiny", *SMALL, "model.heads=2", *options, "--steps", "1"]) == 1
    shown = capsys.readouterr().out
    assert "layers.0.attention.v.weight: its gradient is 2.0 times what it should be" in shown
    assert "off, x 2.0" in shown
    assert "1 of 1 layouts differ from one process" in shown
    assert "dp_shard 2 alone: differs" in shown
    assert "tp 2 alone: differs" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "recipe 'nothing' is unknown"),
        ([*FIVE_HEADS, "parallel.tp=3"], "parallel.tp = 3 does not divide the model's 5 heads"),
        ([*FIVE_HEADS, "parallel.cp=2"], "parallel.cp = 2 (ulysses) does not divide the 5 query heads"),
        (["tiny", "parallel.cp=3", "parallel.cp_method=ring"], "data.seq_len = 256 is not a multiple of 6"),
        (["tiny", "parallel.pp=5", "parallel.dp_shard=1"], "needs at least 5 layers, but the model has 4"),
        (["tiny", "parallel.pp=4", "parallel.dp_shard=1"], "but parallel.schedule = '1f1b' with parallel.pp = 4"),
        (["tiny", "parallel.schedule=no", "parallel.pp=2"], "parallel.schedule = 'no' is unknown: one of 1f1b"),
        (["tiny", "parallel.dp_shard=3"], "train.global_batch = 16 is not a multiple of"),
        (["tiny", "parallel.dp_shard=2", "--nproc", "3"], "need 2 processes, but 3 run"),
        (["tiny", "--all", "0"], "--all 0: must be at least 1"),
        (["tiny", "--all", "2", "--full-size"], "--all goes neither with --full-size"),
        (["tiny", "--steps", "0"], "--steps 0"),
        (["tiny", "--timeout", "0.01"], "the one-process reference takes longer than --timeout"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_in_one_line(arguments, said, capsys):
    assert main(["verify-layout", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_it_is_no_job_of_torchrun(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert main(["verify-layout", "tiny"]) == 2
    assert "without torchrun" in capsys.readouterr().err


def certify(
    folder, processes: int, layouts: list[ParallelConfig], *overrides: str, rounds: dict[str, int]
) -> dict[str, Verdict]:
    """rounds: optimizer -> micro-batches a step; under pp as many times what every schedule can do with."""
    settings = ["train.precision=fp32", "model.layers=5", "model.heads=8", "model.kv_heads=2", "model.hidden=32"]
    config = resolve("tiny", [*settings, *overrides])[0]
    small, _ = shrink(config, {**dict.fromkeys(AXES, 1), "pp": processes, "cp": processes}, processes)
    small = changed(small, {"train.global_batch": 4 * processes, "train.micro_batch": 4})
    certifier = Certifier(small, 2, str(folder), timeout=300, device="cpu")
    verdicts = {}
    for layout in layouts:
        data, least = layout.dp_replicate * layout.dp_shard, 2 * layout.pp if layout.pp > 1 else 1
        sizes = {name: 4 * processes // (data * least * count) for name, count in rounds.items()}
        verdicts[describe_layout(layout)] = certifier.verify(layout, sizes)
    return verdicts


def assert_all_agree(verdicts: dict[str, Verdict]) -> None:
    wrong = {name: verdict.diagnosis() for name, verdict in verdicts.items() if verdict.failed}
    assert not wrong
    shares = [c.share for verdict in verdicts.values() for c in verdict.comparisons.values()]
    assert len(shares) >= 12
    assert max(shares) < 0.5  # far from the limit: it is no lottery


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_all_layouts_of_4_processes(tmp_path, tied):
    """Every product of degrees and both methods of cp; beside pp, sharding meets all schedules, others one or two."""
    some = schedule_names() if tied == "true" else ["1f1b", "zbvzerobubble"]
    layouts = [
        layout
        for layout in all_layouts(ParallelConfig(), 4, some)
        if layout.schedule == "1f1b"
        or layout.pp == 4
        or layout.dp_shard == 2
        or (layout.tp == 2 and layout.schedule == "zbvzerobubble")
    ]
    rounds = {"adamw": 1, "muon": 2} if tied == "true" else {"adamw": 2}
    verdicts = certify(tmp_path, 4, layouts, f"model.tied={tied}", rounds=rounds)
    assert_all_agree(verdicts)
    refused = {name: verdict.refused for name, verdict in verdicts.items() if verdict.refused}
    assert set(refused) == {f"pp 4 ({name})" for name in some if name in V_SHAPED}
    assert all("needs at least 8 layers, but the model has 5" in why for why in refused.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dozen_layouts_of_8_processes(tmp_path):
    chosen = [
        {"dp_shard": 8},
        {"dp_replicate": 2, "dp_shard": 2, "tp": 2},
        {"dp_shard": 2, "cp": 2, "tp": 2},
        {"dp_shard": 2, "cp": 2, "tp": 2, "cp_method": "ring"},
        {"cp": 8, "cp_method": "ring"},
        {"cp": 4, "tp": 2},
        {"tp": 8},
        {"pp": 2, "dp_shard": 2, "tp": 2},
        {"pp": 2, "cp": 2, "tp": 2, "cp_method": "ring", "schedule": "zbvzerobubble"},
        {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "schedule": "interleaved1f1b"},
        {"pp": 4, "dp_shard": 2, "schedule": "gpipe"},
        {"pp": 2, "dp_shard": 2, "cp": 2, "schedule": "dualpipev"},
    ]
    layouts = [ParallelConfig(**{**dict.fromkeys(AXES, 1), **degrees}) for degrees in chosen]
    verdicts = certify(tmp_path, 8, layouts, rounds={"muon": 2})  # whose other parameters are AdamW's
    assert not [verdict.refused for verdict in verdicts.values() if verdict.refused]
    assert len(verdicts) == 12
    assert_all_agree(verdicts)
