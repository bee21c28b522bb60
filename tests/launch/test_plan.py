"""`pretrain plan` as a user meets it: what it prints, that a run takes what it proposes, and errors in one line."""

import re
import shlex

import pytest
import torch

from launch import cli
from parallel.context import check_context
from parallel.engines.megatron_checks import check_layout
from parallel.mesh import resolve_degrees
from parallel.pipeline_cut import check_microbatches, plan_stages
from parallel.planner.gpus import GPUS
from parallel.planner.search import MARGIN
from parallel.tensor import check_tensor
from pretrain.config import resolve
from pretrain.engine import make_spec
from pretrain.models import FAMILIES
from pretrain.objectives import OBJECTIVES
from pretrain.planner import answer, ask


def plan(capsys, *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) in (None, 0)
    return capsys.readouterr().out


def check_proposal(line: str, gpus: int) -> None:
    """As the engine checks a run before it starts."""
    command, verb, recipe, *overrides = shlex.split(line)
    assert (command, verb) == ("pretrain", "run")
    config = resolve(recipe, overrides)[0]
    degrees = resolve_degrees(config.parallel, gpus)
    family, seq_len, parallel = FAMILIES[config.model.family], config.data.seq_len, config.parallel
    facts, data = family.plan(config.model), degrees["dp_replicate"] * degrees["dp_shard"]
    check_tensor(facts, degrees["tp"], seq_len // degrees["cp"])
    check_context(seq_len, degrees["cp"], parallel.cp_method, facts.heads, degrees["tp"])
    assert config.train.global_batch % (data * config.train.micro_batch) == 0
    if config.engine == "megatron":
        spec = make_spec(config, OBJECTIVES["causal"][1](config.objective))
        check_layout(spec, spec.options["facts"], degrees)
    elif degrees["pp"] > 1:
        with torch.device("meta"):
            model = family.build(config.model)
        stages = plan_stages(model, facts, parallel, degrees["pp"], seq_len)
        batch = config.train.global_batch
        check_microbatches(parallel, degrees["pp"], len(stages), batch, config.train.micro_batch, data)


@pytest.mark.parametrize(
    ("recipe", "gpus", "more"),
    [
        ("gpt2", 1, []),
        ("gpt2", 8, ["parallel.pp=2", "parallel.schedule=interleaved1f1b"]),
        ("gpt2", 8, ["parallel.tp=2", "train.recompute=full", "optim.name=muon"]),
        ("gpt2", 16, ["parallel.dp_replicate=2", "parallel.reshard_after_forward=true"]),
        ("qwen3-0.6b", 8, ["parallel.cp=2", "parallel.cp_method=ring"]),
        ("gemma3-1b", 4, ["train.precision=fp32"]),
        ("tiny-moe", 8, ["model.vocab_size=4096", "parallel.ep=4"]),
    ],
    ids=str,
)
def test_a_run_takes_the_layout_that_is_proposed(recipe, gpus, more, capsys):
    printed = plan(capsys, recipe, "--gpus", str(gpus), "--explain", *more)
    proposal = printed.splitlines()[-1]
    check_proposal(proposal, gpus)
    for word in more:  # what was pinned stays
        assert word in proposal or word in ("parallel.reshard_after_forward=true",)
    for term in ("weights", "gradients", "optimizer", "activations", "logits", "matrix products", "tokens/s", "MFU"):
        assert term in printed


@pytest.mark.parametrize(
    ("gpus", "more"),
    [
        (8, ["--engine", "megatron"]),
        (8, ["engine=megatron", "parallel.pp=2", "parallel.schedule=interleaved1f1b"]),
        (8, ["--engine", "megatron", "parallel.pp=2", "parallel.dp_replicate=4"]),  # nothing is cut over data
        (8, ["--engine", "deepspeed", "deepspeed.zero=3"]),
        (8, ["--engine", "deepspeed", "parallel.dp_replicate=2", "parallel.dp_shard=4"]),  # one axis to it
    ],
    ids=str,
)
def test_a_run_takes_what_is_proposed_for_another_engine(gpus, more, capsys):
    printed = plan(capsys, "gpt2", "--gpus", str(gpus), *more)
    proposal = printed.splitlines()[-1]
    check_proposal(proposal, gpus)
    assert f"engine={'megatron' if 'megatron' in ' '.join(more) else 'deepspeed'}" in proposal
    assert "predictions that no published run" in printed
    if "deepspeed.zero=3" in more:  # whose blocks cannot be compiled, which "auto" would try
        assert "train.compile=off" in proposal
    if "parallel.dp_shard=4" in more:
        assert "parallel.dp_shard=8" in proposal


def test_engines_stand_side_by_side(capsys):
    """The best of each stage of ZeRO but 0; what the command line says of one engine alone is kept to."""
    printed = plan(capsys, "llama3-1b", "--gpus", "8", "--engine", "all")
    rows = {line.split()[0]: line for line in printed.splitlines() if re.match("torch|megatron|deepspeed", line)}
    assert set(rows) == {"torch", "megatron", "deepspeed"}
    for row in rows.values():  # GiB/GPU = weights + ... + other
        total, terms = re.search(r"([\d.]+) = +(.+?)   [a-z]", row).groups()
        assert float(total) == pytest.approx(sum(map(float, terms.split("+"))), abs=0.3)
    assert re.search("deepspeed.zero=[123]", rows["deepspeed"])
    speeds = [float(row.split()[1].replace(",", "")) for row in rows.values()]
    assert speeds == sorted(speeds, reverse=True)
    proposal = printed.splitlines()[-1]
    assert f"engine={next(iter(rows))}" in proposal
    check_proposal(proposal, 8)


def test_an_engine_that_cannot_says_why(capsys):
    more = ["model.vocab_size=4096", "model.qk_norm=full", "deepspeed.zero=1"]
    printed = plan(capsys, "tiny", "--gpus", "4", "--engine", "all", *more)
    assert re.search('^megatron: .*cannot do model.qk_norm: .*take engine = "torch"', printed, re.MULTILINE)
    assert re.search("^deepspeed .*deepspeed.zero=1 ", printed, re.MULTILINE)


def test_the_best_fits_and_none_that_fits_is_much_faster():
    question = ask(*resolve("llama3-8b", []), 16, GPUS["h100"])
    found = answer(question)
    assert all(planned.memory.total <= MARGIN * GPUS["h100"].memory for planned in found)
    assert all(planned.layout.gpus == 16 for planned in found)
    assert found[0].step.seconds <= 1.02 * min(planned.step.seconds for planned in found)
    assert sum(found[0].step.parts.values()) == pytest.approx(found[0].step.seconds)


def test_more_gpus_take_less_time_and_larger_ones_too():
    def seconds(gpus: int, gpu: str) -> float:
        return answer(ask(*resolve("llama3-1b", []), gpus, GPUS[gpu]))[0].step.seconds

    assert seconds(16, "h100") < seconds(8, "h100") < seconds(8, "a100-80")


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [64, 512, 4096])
def test_seventy_billion_parameters_on_many_gpus(gpus, capsys):
    printed = plan(capsys, "llama3-70b", "--gpus", str(gpus), "--gpu", "h100")
    check_proposal(printed.splitlines()[-1], gpus)
    best = ask_best(gpus)
    assert 0.25 < best.step.mfu < 0.55  # what such runs report
    assert best.layout.tp <= 8


def ask_best(gpus: int):
    return answer(ask(*resolve("llama3-70b", []), gpus, GPUS["h100"]))[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt2", "--gpus", "8", "--gpu", "h300"], ("h300", "did you mean h200", "b200", "a100-80")),
        (["gpt2", "--gpus", "0"], ("--gpus 0", "at least 1")),
        (["llama3-8b", "--gpus", "37"], ("--gpus 37", "train.global_batch", "36")),
        (["llama3-70b", "--gpus", "8"], ("nothing fits", "GiB more", "--gpus", "optimizer")),
        (["tiny", "--gpus", "8"], ("model.vocab_size",)),
        (["gpt2", "--gpus", "8", "train.precision=fp64"], ("fp64", "bf16")),
        (["gpt2", "--gpus", "8", "parallel.tp=3"], ("parallel.tp = 3", "--gpus 8", "2 or 4")),
        (["gpt2", "--gpus", "8", "parallel.tp=8"], ("parallel.tp = 8", "12 heads")),
        (["gpt2", "--gpus", "16", "parallel.pp=16"], ("parallel.pp = 16", "12")),
        (["mistral-7b", "--gpus", "8", "parallel.cp=2", "parallel.cp_method=ring"], ("ring", "sliding", "ulysses")),
        (["gpt2", "--gpus", "8", "parallel.cpu_offload=true"], ("parallel.cpu_offload",)),
        (["gpt2", "--gpus", "8", "--engine", "jax"], ("jax", "torch, megatron, deepspeed")),
        (["gpt2", "--gpus", "8", "--engine", "all", "optim.name=sgd"], ("no engine can", "optim.name")),
        (["gpt2", "--gpus", "10", "--engine", "megatron", "parallel.pp=5"], ("model.layers = 12", "5 stages")),
        (["gpt2", "--gpus", "8", "--engine", "deepspeed", "parallel.tp=2"], ("parallel.tp = 2", "deepspeed")),
        (
            ["gpt2", "--gpus", "8", "--engine", "deepspeed", "deepspeed.offload_optimizer=cpu"],
            ("deepspeed.offload_optimizer", "none"),
        ),
        (
            ["gpt2", "--gpus", "8", "--engine", "deepspeed", "deepspeed.zero=3", "train.compile=on"],
            ("deepspeed.zero", "train.compile"),
        ),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_mistakes_are_one_line_and_exit_2(arguments, words, capsys):
    assert cli.main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("pretrain: error: ")
    assert "\n" not in error
    for word in words:
        assert word in error
