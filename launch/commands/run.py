"""pretrain run, pretrain schema"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from launch.flight import record_collectives
from launch.watchdog import watching
from parallel.world import join_world
from pretrain.config import explain_origins, recipe_schema, resolve
from pretrain.train import train


def run(args: argparse.Namespace) -> None:
    """Train as one of the ranks."""
    config, _ = resolve(args.recipe, args.overrides)
    again = ["pretrain", *sys.argv[1:], *(["run.resume=auto"] if config.run.resume == "never" else [])]
    record_collectives()
    stall_s = config.watchdog.stall_s
    # The watchdog ends a run that stands still: it must see it before a collective gives up.
    with join_world(max(10.0, 4 * stall_s / 60)) as world:
        train(config, world, shlex.join(again), watching(Path(config.run.dir), world, stall_s))


def explain(args: argparse.Namespace) -> None:
    """Print each resolved key with its value and where it comes from."""
    rows = explain_origins(*resolve(args.recipe, args.overrides))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for key, value, origin in rows:
        print(f"{key:{widths[0]}}  {value:{widths[1]}}  {origin}")


def schema(args: argparse.Namespace) -> None:
    """JSON Schema of recipes."""
    text = json.dumps(recipe_schema(), indent=2) + "\n"
    if args.out is None:
        print(text, end="")
    else:
        Path(args.out).write_text(text)
