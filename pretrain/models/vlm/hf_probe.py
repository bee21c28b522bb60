"""Random pictures and tokens, as our models and transformers' take them.

Shape letters: N pictures, B rows (one), S tokens, P patches, p pixels of a patch's side, g patches of a picture's side.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from checkpoints.hf.brand import Config
from checkpoints.hf.probe import Probe
from pretrain.models.vlm.model import Pictures

TEXT = 5  # tokens before, between and after pictures


def as_patches(pictures: Tensor, patch: int) -> Tensor:
    """[N, 3, g * p, g * p] -> [N, g * g, 3 * p * p]: row by row; a patch as (channel, y, x)."""
    cells = pictures.unfold(2, patch, patch).unfold(3, patch, patch)  # [N, 3, g, g, p, p]
    return cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def pack(pictures: Tensor, patch: int, class_token: bool) -> tuple[Pictures, Tensor]:
    """Pictures uint8 [N, 3, g * p, g * p] in one row, and the places [N, g * g] of their patches in it."""
    patches = as_patches(pictures, patch)
    N, num, D = patches.shape
    side = round(num**0.5)
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1)
    if class_token:
        patches = torch.cat((torch.zeros(N, 1, D, dtype=torch.uint8), patches), 1)
        grid = torch.cat((torch.full((1, 2), -1), grid))
    images = torch.arange(N)[:, None].expand(N, len(grid))
    places = torch.arange(N * len(grid)).view(N, -1)[:, int(class_token) :]
    packed = Pictures.packed(
        patches.reshape(1, -1, D), images.reshape(1, -1).int(), grid.repeat(N, 1)[None].int().contiguous()
    )
    return packed, places


def picture_probe(native: Config, side: int, seen_by_hf: Callable[[Tensor], dict[str, Tensor]]) -> Probe:
    """A row with two pictures of `side` patches each way, fewer where sequences are short, and text around them.

    seen_by_hf: normalised pictures [N, 3, h, w] -> what transformers' model takes.
    """
    generator, patches = Generator().manual_seed(0), native["patches"]
    count = min(2, (native["max_seq_len"] - TEXT) // (side * side + TEXT))
    length = TEXT + count * (side * side + TEXT)
    tokens = torch.randint(native["vocab_size"] - 1, (1, max(length, 1)), generator=generator)
    tokens += tokens >= native["image_token"]
    tokens = tokens[:, : native["max_seq_len"]]
    if count < 1:
        return Probe(tokens)
    pixels = side * patches["size"]
    pictures = torch.randint(256, (count, 3, pixels, pixels), dtype=torch.uint8, generator=generator)
    packed, places = pack(pictures, patches["size"], bool(native["vision"] and native["vision"]["class_token"]))
    slots = torch.full(tokens.shape, -1, dtype=torch.int32)
    for index in range(count):
        start = TEXT + index * (side * side + TEXT)
        slots[0, start : start + side * side] = places[index].int()
    tokens[slots >= 0] = native["image_token"]
    mean, std = (torch.tensor(patches[key])[:, None, None] for key in ("mean", "std"))
    return Probe(tokens, {"pictures": packed, "slots": slots}, seen_by_hf((pictures / 255 - mean) / std))
