"""pretrain caption, zero-shot, retrieve, data digits, data pictures"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.pairs import PairStream
from data_pipeline.images.write import CLASSES, write_image_folder
from data_pipeline.sources.digits import write_digits
from pretrain.caption import Said, caption, name, retrieve, write_page
from pretrain.data import open_held_out, picture_form
from pretrain.load import Trained, load_trained
from pretrain.zero_shot import prompts


def captions(args: argparse.Namespace) -> None:
    """What a vision-language model says of held-out pictures."""
    trained, stream = _open(args, "vlm")
    said = caption(trained, stream, args.limit, args.max_new_tokens)
    _show(said, args, f"{args.run} at step {trained.step}: captions")


def zero_shot(args: argparse.Namespace) -> None:
    """Which class a dual encoder takes held-out pictures for."""
    trained, stream = _open(args, "dual")
    classes = Path(args.classes) if args.classes else stream.dataset.folder_file(CLASSES)
    names = json.loads(classes.read_text())
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise ValueError(f"{classes}: must be a JSON list of class names")
    said = name(trained, stream, args.limit, prompts(names, args.template))
    _show(said, args, f"{args.run} at step {trained.step}: nearest of {len(names)} classes")


def retrieval(args: argparse.Namespace) -> None:
    """How often a dual encoder finds held-out pictures by their captions, and captions by their pictures."""
    trained, stream = _open(args, "dual")
    found = retrieve(trained, stream, args.limit)
    print("  ".join([f"step {trained.step}", *(f"{name} {share:.4f}" for name, share in found.items())]))


def digits(args: argparse.Namespace) -> None:
    """Write the digits as shards of pictures and captions."""
    splits = write_digits(args.out)
    print(f"wrote {', '.join(f'{count:,} {split}' for split, count in splits.items())} digits to {args.out}")


def class_folders(args: argparse.Namespace) -> None:
    """Write a folder with a folder for each class as shards of pictures and captions."""
    splits = write_image_folder(args.input, args.out, caption=args.template, held_out=args.held_out)
    print(f"wrote {', '.join(f'{count:,} {split}' for split, count in splits.items())} pictures to {args.out}")


def _open(args: argparse.Namespace, family: str) -> tuple[Trained, PairStream]:
    trained = load_trained(Path(args.run), args.step)
    config = trained.config
    if config.model.family != family:
        other = "zero-shot" if family == "vlm" else "caption"
        raise ValueError(
            f'{args.run} is of model.family = "{config.model.family}", not "{family}"; see pretrain {other}'
        )
    if args.shards:
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"shards": args.shards})})
    if not config.eval.shards:
        raise ValueError(f"{args.run}: eval.shards is not set; name held-out shards with --shards")
    dataset = open_held_out(config)
    if not isinstance(dataset, ImageTextDataset):
        raise ValueError(f"{config.eval.shards}: hold text alone; name shards with pictures")
    return trained, PairStream(dataset, picture_form(config), seq_len=config.data.seq_len, shuffle=False)


def _show(said: Iterator[Said], args: argparse.Namespace, title: str) -> None:
    found = list(said)
    right = sum(one.right for one in found)
    if args.out:
        write_page(found, title, Path(args.out))
        print(f"wrote {args.out}")
    for one in [one for one in found if not one.right][:5]:
        print(f"wrong: {one.said!r} for {one.expected!r}")
    print(f"{title}: {right} of {len(found)} right ({right / len(found):.1%})")
