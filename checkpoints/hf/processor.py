"""The processor's file in a Hugging Face folder: how pictures and text become a model's inputs.

Brands treat it as one more key of the config, `processor`, with its content as value.
"""

import json
import math
from pathlib import Path
from typing import Any

from checkpoints.hf.brand import Config, Misfit, misfit
from checkpoints.hf.pictures import PictureSteps, check_newline, check_square, fuyu_size, read_steps, square
from checkpoints.hf.tokenizer import ABOUT, FAST, load_tokenizer

KEY = "processor"
PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"
IMAGE = "<image>"
IMAGES = "image_processor"  # key of the first file; older models have a second file in its place


def read_processor(folder: Path) -> Config:
    """What the folder says, {} where it says nothing. Raises ValueError for a damaged file."""
    content = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    if IMAGES not in content and (folder / IMAGE_PROCESSOR).is_file():
        content[IMAGES] = read_json(folder / IMAGE_PROCESSOR)
    return content


def write_processor(folder: Path, content: Config, steps: PictureSteps) -> None:
    """Write it. Beside a tokenizer, the image token is called as that calls it; if it has all others, it gets this one.

    content: as the file's, but for `image_token_id`, the token that stands for pictures, if there is one;
    `fixed_image_token`, its name where the processor takes no other; and `side`, pixels of the squares that the model
    takes, if it takes no other pictures. steps: what became of pictures in training. An import's image processor stays
    where it does the same.

    Raises ValueError where the tokenizer does not read the image token's name as this token, or as the fixed one, and
    where the model's image processors do something else than the steps.
    """
    content = dict(content)
    side, token, fixed = (content.pop(key, None) for key in ("side", "image_token_id", "fixed_image_token"))
    beside = token is not None and (folder / ABOUT).is_file()
    if token is not None and fixed is None:
        content["image_token"] = _name(folder, token) if beside else content.get("image_token", IMAGE)
    elif beside and load_tokenizer(folder).convert_tokens_to_ids(fixed) != token:
        raise ValueError(
            f"tokenizer: model.image_token = {token} must be {fixed!r} for a {content['processor_class']}; move the "
            "run's tokenizer folder away to export without it"
        )
    if side is None:
        content[IMAGES] = {**content[IMAGES], "size": fuyu_size(steps, content[IMAGES])}
        if beside:
            check_newline(steps, folder)
    else:
        check_square(steps, side, content.get("processor_class", ""))
        images = {key: content[IMAGES][key] for key in ("image_mean", "image_std")}
        if not _does(folder, content, steps):
            content[IMAGES] = {**square(steps.resize, side), **images}
    _write(folder, content)


def _does(folder: Path, content: Config, steps: PictureSteps) -> bool:
    """Whether it has an image processor already, which does these steps."""
    if "image_processor_type" not in content[IMAGES]:
        return False
    _write(folder, content)
    known = read_steps(folder, patch=1)
    return (known.resize, known.side) == (steps.resize, steps.side)


def _write(folder: Path, content: Config) -> None:
    (folder / PROCESSOR).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _name(folder: Path, token: int) -> str:
    """What the tokenizer beside calls the image token; the one after its last becomes IMAGE there."""
    tokenizer = load_tokenizer(folder)
    if token == len(tokenizer) and IMAGE not in tokenizer.get_vocab() and (folder / FAST).is_file():
        whole = read_json(folder / FAST)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        whole["added_tokens"].append({"id": token, "content": IMAGE, **flags, "special": True})
        (folder / FAST).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        tokenizer = load_tokenizer(folder)
    name = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    if name is not None and tokenizer.encode(name, add_special_tokens=False) == [token]:
        return str(name)
    what = "which it lacks" if name is None else f"its {name!r}, is not what it reads that text as"
    raise ValueError(
        f"tokenizer: model.image_token = {token}, {what}; add it there as a special token, or move the run's tokenizer "
        "folder away to export without it"
    )


def mean_and_std(config: Config) -> tuple[Any, Any]:
    """Of an image processor, whose values from 0 to 255 must have been divided by 255. Raises Misfit."""
    images = config.get(KEY, {}).get(IMAGES)
    if images is None or "image_mean" not in images or "image_std" not in images:
        raise Misfit(
            f"a model without the mean and standard deviation of its pictures: {PROCESSOR} or {IMAGE_PROCESSOR} is "
            "missing beside it; download it too"
        )
    for key in ("do_rescale", "do_normalize"):
        if not images.get(key, True):
            raise misfit(f"{IMAGES}.{key}", images[key], [True])
    if not math.isclose(images.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise misfit(f"{IMAGES}.rescale_factor", images["rescale_factor"], [1 / 255])
    return images["image_mean"], images["image_std"]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content
