"""pretrain generate, evaluate, report"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from rich.progress import track

from checkpoints.hf.folder import KEPT, Kept
from checkpoints.store import CheckpointStore
from parallel.world import join_world
from pretrain.config import override_config
from pretrain.data import open_held_out
from pretrain.engine import build_engine
from pretrain.evaluate import held_out_loss
from pretrain.generate import generate as generate_tokens
from pretrain.load import load_trained, run_tokenizer
from pretrain.objectives import OBJECTIVES
from pretrain.report import write_report


def generate(args: argparse.Namespace) -> None:
    """Print the prompt's continuation token by token."""
    run_dir = Path(args.run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_trained(run_dir, args.step, device)
    tokenizer = run_tokenizer(run_dir)
    prompt = torch.tensor(tokenizer.encode_prompt(args.prompt).tolist(), dtype=torch.int64, device=device)
    kept = Kept.load(run_dir / KEPT) if (run_dir / KEPT).is_file() else None
    new = generate_tokens(
        trained.model,
        prompt,
        max_new_tokens=args.max_new_tokens,
        eos_ids=[tokenizer.eos_id] if kept is None else kept.eos_ids,  # an imported model may have several, or none
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
    )
    tokens = prompt.tolist()
    shown = tokenizer.decode(tokens)
    print(shown, end="", flush=True)
    for token in new:
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else: the first bytes of a character
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(tokens)[len(shown) :])


def evaluate(args: argparse.Namespace) -> None:
    """Held-out loss of a checkpoint; every rank calls it."""
    run_dir = Path(args.run)
    config = override_config(run_dir, args.overrides)
    if not config.eval.shards:
        raise ValueError("eval.shards is not set in the run; add eval.shards=PATH to name held-out shards")
    with join_world() as world:
        objective = OBJECTIVES[config.objective.name][1](config.objective)
        engine = build_engine(config, world, objective)
        state = engine.state_dict()
        step = CheckpointStore(run_dir / "checkpoints").load(args.step, state["model"])["step"]
        engine.load_state_dict(state)
        hidden = world.rank > 0 or not sys.stdout.isatty()
        watch = partial(track, description="evaluating", transient=True, disable=hidden)
        values = held_out_loss(engine, objective, open_held_out(config), config, watch)
        if world.rank == 0:
            print("  ".join([f"step {step}", *(f"{name} {value:.4f}" for name, value in values.items())]))


def report(args: argparse.Namespace) -> None:
    """Write the HTML page and say where."""
    runs = [Path(run) for run in args.runs]
    out = Path(args.out) if args.out else runs[0] / "report.html"
    write_report(runs, out)
    print(f"wrote {out}")
