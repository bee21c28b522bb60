"""The processor's file in a Hugging Face folder: how pictures and text become a model's inputs.

Brands treat it as one more key of the config, `processor`, with its content as value.
"""

import json
import math
from pathlib import Path
from typing import Any

from checkpoints.hf.brand import Config, Misfit, misfit
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


def write_processor(folder: Path, content: Config) -> None:
    """Write it. Beside a tokenizer, the image token is called as that calls it; if it has all others, it gets this one.

    content: as the file's, but for `image_token_id`, the token that stands for pictures, if there is one;
    `fixed_image_token`, its name where the processor takes no other; and `side`, to which an image processor without a
    class of its own brings pictures. Raises ValueError where the tokenizer does not read the image token's name as this
    token, or as the fixed one.
    """
    content = dict(content)
    side, token, fixed = (content.pop(key, None) for key in ("side", "image_token_id", "fixed_image_token"))
    if "image_processor_type" not in content[IMAGES]:
        content[IMAGES] = {**fixed_size(side), **content[IMAGES]}
    beside = token is not None and (folder / ABOUT).is_file()
    if token is not None and fixed is None:
        content["image_token"] = _name(folder, token) if beside else content.get("image_token", IMAGE)
    elif beside and load_tokenizer(folder).convert_tokens_to_ids(fixed) != token:
        raise ValueError(
            f"tokenizer: model.image_token = {token} must be {fixed!r} for a {content['processor_class']}; move the "
            "run's tokenizer folder away to export without it"
        )
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


def fixed_size(side: int) -> Config:
    """An image processor that gives squares: the shorter side to `side` pixels, the middle of the longer."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }


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
