"""The command line. Nothing heavy is imported before a command has been chosen."""

import argparse
import atexit
import errno
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from launch.local import joined, run_folder, start_ranks
from launch.ranks import follow_parent
from launch.slurm.options import add_options

Handler = Callable[[argparse.Namespace], int | None]

# These run as ranks: the process that only starts them imports no torch (2 s).
RANKED = ("launch.commands.run:run", "launch.commands.results:evaluate", "launch.commands.ledger:replay")
# Errors of disks and networks that may pass by themselves: a job goes on from its last checkpoint.
PASSING = {
    *(errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOMEM, errno.ENOTCONN),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
}

atexit.register(gc.freeze)  # else the end of each command searches all of torch for garbage, 0.6 s


def main(argv: list[str] | None = None) -> int:
    """Run `pretrain ...`; returns the exit code: 0 done, 2 a mistake of the user's, 1 anything else."""
    args = parse(argv)
    module, _, function = args.handler.partition(":")
    try:
        if args.handler in RANKED and not joined():
            logs = run_folder(args.recipe, args.overrides) if args.handler == RANKED[0] else None
            return start_ranks(args.nproc, getattr(args, "restarts", 0), logs)
        follow_parent()
        handler: Handler = getattr(importlib.import_module(module), function)
        return handler(args) or 0
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        passing = isinstance(error, ConnectionError | TimeoutError) or getattr(error, "errno", None) in PASSING
        where = getattr(error, "__notes__", [])  # which rank, where the others have no such error
        if where or int(os.environ.get("RANK", "0")) == 0:
            print(f"pretrain: error: {': '.join([*where, ' '.join(str(error).split())])}", file=sys.stderr)
        return 1 if passing else 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of one command; `key=value` overrides may stand before, between and after its options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    strange = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def build_parser() -> argparse.ArgumentParser:
    """The tree of commands; each leaf names its handler as "module:function"."""
    parser = argparse.ArgumentParser(prog="pretrain", description="Pretrain large models from one recipe file.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_data(commands)
    _add_checkpoint(commands)
    _add_results(commands)
    _add_verify(commands)
    _add_plan(commands)
    add_options(_leaf(commands, "submit", "submit:submit", "check a recipe, and queue it with SLURM"))
    _add_jobs(commands)
    return parser


def _leaf(commands: Any, name: str, handler: str, summary: str) -> argparse.ArgumentParser:
    leaf: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    leaf.set_defaults(handler=f"launch.commands.{handler}")
    return leaf


def _group(commands: Any, name: str, summary: str) -> Any:
    group = commands.add_parser(name, help=summary, description=summary)
    return group.add_subparsers(title="commands", required=True, metavar="COMMAND")


def _nproc(leaf: argparse.ArgumentParser) -> None:
    leaf.add_argument("--nproc", type=int, metavar="N", help="processes to start here (default: one a GPU, or 1)")


def _add_run(commands: Any) -> None:
    run = _leaf(commands, "run", "run:run", "train a recipe here, or continue the run in its folder")
    run.add_argument("recipe", help="a recipe's name, or the path of a .toml file")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as train.steps=200")
    _nproc(run)
    summary = "start all anew from the last checkpoint so often when one dies (default: 0)"
    run.add_argument("--restarts", type=int, default=0, metavar="K", help=summary)
    run.add_argument(
        "--explain",
        dest="handler",
        action="store_const",
        const="launch.commands.run:explain",
        help="print each resolved key with its origin, and stop",
    )
    schema = _leaf(commands, "schema", "run:schema", "JSON Schema of recipes, for completion in editors")
    schema.add_argument("out", nargs="?", help="file to write (default: standard output)")


def _add_data(commands: Any) -> None:
    data = _group(commands, "data", "build and inspect shards")
    build = _leaf(data, "build", "data:build", "text, JSONL or parquet -> tokenized WebDataset shards")
    build.add_argument("--input", nargs="+", required=True, help='files, globs, or "stdlib" for Python\'s own sources')
    build.add_argument("--out", required=True, help="folder of the shards")
    build.add_argument(
        "--tokenizer", default="bpe", help="bpe or unigram (trained with SentencePiece), a tokenizer.json, a .model"
    )
    build.add_argument("--vocab-size", type=int, default=8192, help="tokens of a tokenizer trained here")
    build.add_argument("--text-field", default="text", help="field of JSONL and parquet records that holds the text")
    build.add_argument("--held-out", type=float, default=0.0, help="share of documents kept apart, 0 to 1")
    build.add_argument("--workers", type=int, help="processes (default: one a core)")
    build.add_argument("--seed", type=int, default=1, help="seed of the held-out split")
    build.add_argument("--limit-bytes", type=int, help="read about this many bytes of input at most")
    build.add_argument(
        "--max-reject-share", type=float, default=0.05, help="give up when more than this share of records is bad"
    )
    summary = "scikit-learn's handwritten digits -> shards of pictures and captions"
    digits = _leaf(data, "digits", "pictures:digits", summary)
    digits.add_argument("--out", required=True, help="folder of the shards")
    summary = "a folder with a folder of pictures for each class -> shards of pictures and captions"
    pictures = _leaf(data, "pictures", "pictures:class_folders", summary)
    pictures.add_argument("--input", required=True, help="the folder")
    pictures.add_argument("--out", required=True, help="folder of the shards")
    pictures.add_argument("--template", default="a photo of a {name}", help="caption (default: %(default)r)")
    pictures.add_argument("--held-out", type=float, default=0.0, help="share of pictures kept apart, 0 to 1")
    ledger = _leaf(data, "ledger", "ledger:ledger", "which documents went into which step of a run")
    ledger.add_argument("run", help="the run's folder")
    asked = ledger.add_mutually_exclusive_group(required=True)
    asked.add_argument("--step", type=int, help="list the documents of this step: source, shard, key, first token")
    asked.add_argument("--document", metavar="KEY", help="list the steps that this document went into")
    inspect = _leaf(data, "inspect", "data:inspect", "show documents of shards, decoded")
    inspect.add_argument("shards", nargs="+", help="shards, or globs")
    inspect.add_argument("-n", "--num", type=int, default=3, help="documents to show")
    index = _leaf(data, "index", "data:index", "make the indexes of shards, of tokens or of pictures, ahead of time")
    index.add_argument("shards", nargs="+", help="folders, shards, globs, URLs")
    index.add_argument("--force", action="store_true", help="make those anew that are there; fetch what is cached anew")
    index.add_argument("--workers", type=int, help="processes (default: one a core)")
    index.add_argument("--vocab-size", type=int, help="of token shards without a dataset.json")
    index.add_argument("--cache", help="folder for shards elsewhere, and indexes of folders that cannot be written")
    summary = "what is wrong with shards: damage, indexes, ids, copies and near copies; exit code 1 on errors"
    doctor = _leaf(data, "doctor", "data:doctor", summary)
    doctor.add_argument("shards", nargs="+", help="folders, shards, globs, URLs; of tokens or of pictures")
    doctor.add_argument("--json", metavar="FILE", help="write everything found for machines")
    doctor.add_argument("--html", metavar="FILE", help="write a page with histograms")
    doctor.add_argument("--readers", type=int, metavar="N", help="processes that will each read whole shards")
    doctor.add_argument("--tokenizer", help="of token shards (default: what their dataset.json names)")
    doctor.add_argument("--max-tokens", type=int, default=1_000_000, help="report documents of more (%(default)s)")
    doctor.add_argument(
        "--near-documents", type=int, default=200_000, help="documents compared, a sample of more (%(default)s)"
    )
    doctor.add_argument("--similarity", type=float, default=0.8, help="from which two are near copies (%(default)s)")
    doctor.add_argument("--workers", type=int, help="processes (default: one a core)")
    doctor.add_argument("--cache", help="folder for shards elsewhere")


def _add_checkpoint(commands: Any) -> None:
    checkpoint = _group(commands, "checkpoint", "list, verify and convert checkpoints")
    listing = _leaf(checkpoint, "list", "checkpoint:list_", "checkpoints of a run")
    listing.add_argument("run", help="the run's folder")
    verify = _leaf(checkpoint, "verify", "checkpoint:verify", "read every byte and compare checksums")
    verify.add_argument("run", help="the run's folder")
    verify.add_argument("--step", type=int, help="this checkpoint only (default: all)")
    stay = _leaf(checkpoint, "pin", "checkpoint:pin", "keep a checkpoint whatever the recipe says")
    free = _leaf(checkpoint, "unpin", "checkpoint:unpin", "keep a checkpoint only as long as the recipe says")
    back = _leaf(checkpoint, "rewind", "checkpoint:rewind", "go on from an older checkpoint; newer ones are set aside")
    for leaf in (stay, free, back):
        leaf.add_argument("run", help="the run's folder")
        leaf.add_argument("step", type=int, help="the checkpoint's step")
    export = _leaf(checkpoint, "export", "convert:export", "write a Hugging Face model, proven equal by its logits")
    export.add_argument("run", help="the run's folder, or one checkpoint's")
    export.add_argument("out", help="a new folder")
    export.add_argument("--step", type=int, help="checkpoint to export (default: the newest whole one)")
    export.add_argument("--brand", help="Hugging Face model_type (default: the first that fits)")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="dtype of the weights (default: as saved)")
    export.add_argument("--shard-size", default="5GB", help="largest size of one weights file")
    export.add_argument(
        "--no-verify-logits",
        action="store_true",
        help="compare tensors only: the logits need the whole model in memory, in fp32",
    )
    import_ = _leaf(checkpoint, "import", "convert:import_", "make a run out of a Hugging Face model's folder")
    import_.add_argument("model", help="folder with config.json and safetensors files")
    import_.add_argument("run", help="a new run's folder")
    _add_surgery(checkpoint)
    _add_combining(checkpoint)


def _add_combining(checkpoint: Any) -> None:
    diff = _leaf(checkpoint, "diff", "diff:diff_", "how far two checkpoints are apart, largest changes by tensor")
    for name in ("a", "b"):
        diff.add_argument(name, help="a run's folder (its newest checkpoint), or one checkpoint's")
    diff.add_argument("--optimizer", action="store_true", help="the optimizer's state too")
    diff.add_argument("--top", type=int, default=20, metavar="K", help="tensors to show (default: %(default)s)")
    diff.add_argument("--json", action="store_true", help="every tensor, as JSON")
    merge = _leaf(checkpoint, "merge", "combine:merge_runs", "make one run out of several of the same shape")
    merge.add_argument("runs", nargs="+", metavar="run", help="folders of runs, or of single checkpoints")
    merge.add_argument("--out", required=True, help="a new run's folder")
    merge.add_argument("--method", default="mean", help="mean, ema, slerp, or over --base: task, ties, dare")
    merge.add_argument("--base", help="task, ties, dare: the run that the others were trained on from")
    merge.add_argument("--weights", type=float, nargs="+", metavar="W", help="one a run (default: 1 each)")
    merge.add_argument("--decay", type=float, help="ema: share that stays when the next run comes (default: 0.9)")
    merge.add_argument("--t", type=float, help="slerp: how far from the first to the second, 0 to 1 (default: 0.5)")
    merge.add_argument("--scale", type=float, help="task, ties, dare: factor of the change from the base (default: 1)")
    merge.add_argument("--keep", type=float, help="ties: share of the largest changes that stay (default: 0.2)")
    merge.add_argument("--drop", type=float, help="dare: share of changes that are dropped at random (default: 0.9)")
    merge.add_argument("--seed", type=int, help="dare: seed of what is dropped (default: 1)")
    average = _leaf(checkpoint, "average", "combine:average", "make a run out of the mean of a run's last checkpoints")
    average.add_argument("--last", type=int, required=True, metavar="K", help="checkpoints to average")
    average.add_argument("--decay", type=float, help="exponential moving average with this decay (default: the mean)")
    ema = _leaf(checkpoint, "ema", "combine:ema", "make a run of the moving average that optim.ema kept of the weights")
    cast = _leaf(checkpoint, "cast", "combine:cast", "make a run whose weights have another type")
    cast.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), required=True, help="type of the model's weights")
    bare = _leaf(checkpoint, "prune-optimizer", "combine:prune_optimizer", "make a run without optimizer state")
    for leaf in (average, ema, cast, bare):
        leaf.add_argument("run", help="the run's folder, or one checkpoint's")
        leaf.add_argument("out", help="a new run's folder")
        leaf.add_argument("--step", type=int, help="checkpoint to take, the newest one of an average (default: newest)")


def _add_surgery(checkpoint: Any) -> None:
    upcycle = _leaf(checkpoint, "upcycle", "surgery:upcycle", "make a mixture of experts out of a dense run")
    prune = _leaf(checkpoint, "prune", "surgery:prune", "make a run with fewer experts, the most used ones")
    for leaf in (upcycle, prune):
        leaf.add_argument("run", help="the run's folder, or one checkpoint's")
        leaf.add_argument("out", help="a new run's folder")
        leaf.add_argument("overrides", nargs="*", metavar="key=value", help="of the new run, such as model.moe.top_k=2")
        leaf.add_argument("--step", type=int, help="checkpoint to take (default: the newest whole one)")
    upcycle.add_argument(
        "--method", default="copy", help="copy, or cut its width into experts: contiguous, random, clustering"
    )
    upcycle.add_argument("--noise", type=float, default=0.0, help="on copies, in standard deviations of each tensor")
    upcycle.add_argument("--noise-share", type=float, default=1.0, help="share of entries that get noise, 0 to 1")
    upcycle.add_argument("--router", choices=("normal", "zero"), default="normal", help="its initial weights")
    prune.add_argument("--keep", type=int, required=True, metavar="M", help="experts that stay in each layer")
    prune.add_argument("--by", choices=("load", "norm"), default="load", help="rows logged last, or the router's norms")


def _add_results(commands: Any) -> None:
    generate = _leaf(commands, "generate", "results:generate", "continue a prompt with a run's newest checkpoint")
    generate.add_argument("run", help="the run's folder")
    generate.add_argument("prompt", help="text to continue")
    generate.add_argument("--step", type=int, help="checkpoint to use (default: the newest whole one)")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="tokens to add at most")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: from all")
    generate.add_argument("--seed", type=int, default=1, help="seed of sampling")
    evaluate = _leaf(commands, "evaluate", "results:evaluate", "held-out loss of a run's newest checkpoint")
    evaluate.add_argument("run", help="the run's folder")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="such as eval.shards=data/heldout-*.tar")
    evaluate.add_argument("--step", type=int, help="checkpoint to use (default: the newest whole one)")
    _nproc(evaluate)
    replay = _leaf(commands, "replay", "ledger:replay", "losses of a step's documents, as they were then")
    replay.add_argument("run", help="the run's folder")
    replay.add_argument("--step", type=int, required=True, help="the step")
    _nproc(replay)
    summary = "what a vision-language model says of held-out pictures, and how often it is right"
    caption = _leaf(commands, "caption", "pictures:captions", summary)
    caption.add_argument("--max-new-tokens", type=int, default=32, help="longest caption (default: %(default)s)")
    summary = "which class a dual encoder takes held-out pictures for, and how often it is right"
    zero_shot = _leaf(commands, "zero-shot", "pictures:zero_shot", summary)
    zero_shot.add_argument("--classes", help="JSON list of class names (default: classes.json beside the shards)")
    zero_shot.add_argument(
        "--template", action="append", required=True, help="caption of a class, {} for its name; may be repeated"
    )
    summary = "how often a dual encoder finds held-out pictures by their captions, and the other way round"
    retrieve = _leaf(commands, "retrieve", "pictures:retrieval", summary)
    for looking in (caption, zero_shot, retrieve):
        looking.add_argument("run", help="the run's folder")
        looking.add_argument("--shards", help="held-out shards (default: the run's eval.shards)")
        looking.add_argument("--limit", type=int, default=1000, help="pictures at most (default: %(default)s)")
        looking.add_argument("--step", type=int, help="checkpoint to use (default: the newest whole one)")
    for showing in (caption, zero_shot):
        showing.add_argument("--out", help="HTML page with each picture, to write")
    summary = "the same steps under several engines in turn: losses, speed, memory, start"
    compare = _leaf(commands, "compare", "compare:compare", summary)
    compare.add_argument("recipe", help="a recipe's name, or the path of a .toml file")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    compare.add_argument("--engines", default="torch,megatron,deepspeed", help="the first is what others are held to")
    compare.add_argument("--steps", type=int, default=20, help="steps of each (default: %(default)s)")
    compare.add_argument("--out", default="runs/compare", help="a new folder of runs (default: %(default)s)")
    _nproc(compare)
    report = _leaf(commands, "report", "results:report", "one HTML page of curves and config, several runs overlaid")
    report.add_argument("runs", nargs="+", metavar="run", help="folders of runs")
    report.add_argument("--out", help="file to write (default: report.html in the first run's folder)")
    _leaf(commands, "doctor", "doctor:doctor", "versions, devices, compiler and attention back ends of this machine")


def _add_verify(commands: Any) -> None:
    summary = "prove that a parallel layout computes what one process computes"
    verify = _leaf(commands, "verify-layout", "verify:verify_layout", summary)
    verify.add_argument("recipe", help="a recipe's name, or the path of a .toml file")
    verify.add_argument("overrides", nargs="*", metavar="key=value", help="such as parallel.tp=2 parallel.cp=2")
    verify.add_argument("--engine", metavar="NAME", help="torch, megatron or deepspeed (default: the recipe's)")
    verify.add_argument("--all", type=int, metavar="N", help="every layout of N processes, not the recipe's")
    verify.add_argument("--nproc", type=int, metavar="N", help="processes (default: the degrees multiplied)")
    verify.add_argument("--steps", type=int, default=3, help="optimizer steps before weights are compared")
    verify.add_argument("--full-size", action="store_true", help="keep the model's dims, sequence and batch")
    verify.add_argument(
        "--timeout", type=float, metavar="S", help="seconds after which a layout hangs (120; full size 3600)"
    )


def _add_plan(commands: Any) -> None:
    plan = _leaf(commands, "plan", "plan:plan", "layouts that fit on N GPUs, fastest first, without a GPU")
    plan.add_argument("recipe", help="a recipe's name, or the path of a .toml file")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="parallel.* and train.* pin what is planned")
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    summary = "plan for this engine, as engine=NAME does; all: the best layout of each (speed: a prediction not held "
    summary += "against published runs of engines other than torch)"
    plan.add_argument("--engine", metavar="NAME", help=summary)
    plan.add_argument(
        "--gpu", default="h100", help="kind of GPU, such as a100-80, h100, h200, b200, gb200 (default: h100)"
    )
    plan.add_argument("--top", type=int, default=10, metavar="K", help="layouts to show")
    plan.add_argument("--explain", action="store_true", help="show all terms of the best one")


def _add_jobs(commands: Any) -> None:
    summary = "how runs stand: state, step, loss, speed, restarts and why; of a sweep, a table of results"
    status = _leaf(commands, "status", "status:status", summary)
    status.add_argument("runs", nargs="*", metavar="run", help="folders of runs or sweeps (default: all below runs/)")
    status.add_argument("--watch", action="store_true", help="show it anew until all of them have ended")
    status.add_argument("--interval", type=float, default=3.0, metavar="S", help="of --watch (default: %(default)s s)")
    status.add_argument("--json", action="store_true", help="a list with all that is known of each run")
    cancel = _leaf(commands, "cancel", "cancel:cancel", "ask a run, or all of a sweep, to save and leave")
    cancel.add_argument("run", help="the run's folder")
    cancel.add_argument("--now", action="store_true", help="end it without a last checkpoint")
    logs = _leaf(commands, "logs", "logs:logs", "what a rank prints; of a run that died, the first error on top")
    logs.add_argument("run", help="the run's folder")
    logs.add_argument("--rank", type=int, default=0, metavar="R", help="the rank (default: 0)")
    logs.add_argument("--follow", "-f", action="store_true", help="go on printing until the run has ended")
    logs.add_argument("-n", dest="lines", type=int, default=50, metavar="LINES", help="last lines (default: 50)")
    logs.add_argument("--job", metavar="ID", help="of this job, such as 12, or 12.1 for its second start")


if __name__ == "__main__":
    sys.exit(main())
