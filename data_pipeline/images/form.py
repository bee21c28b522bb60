"""The form in which pictures reach a model: their size in patches, the order of the patches, the tokens that stand for
them.

    picture 32 x 48, patch 8, merge 2:   4 x 6 patches   0 1 | 4 5 | 8 9       tokens  A B C
                                                         2 3 | 6 7 | ...               D E F
                                                         ----+-----+-----
                                                         12 ...                A stands for patches 0 1 2 3
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Resize = Literal["crop", "squash", "native"]


@dataclass(frozen=True)
class PictureForm:
    """How a picture becomes patches and tokens.

    Attributes:
        patch: p, pixels of a patch's side.
        image_token: id that stands at the places of a picture.
        resize: crop: the shorter side to ``size``, the middle of the longer; squash: both sides to ``size``, whatever
            the aspect; native: near its own size and aspect, at most ``max_patches`` patches.
        size: pixels of a side, for crop and squash. max_patches: of one picture, for native.
        merge: m; m x m patches make one token, and lie side by side.
        class_slot: an empty place stands before each picture's patches.
        queries: tokens of a picture that a resampler makes; 0: one for m x m patches.
        newline_token: id after each row of image tokens, in the picture's span; None: nothing.

    Raises:
        ValueError: choices that exclude each other, or a size that is not made of whole tokens.
    """

    patch: int
    image_token: int
    resize: Resize = "crop"
    size: int = 224
    max_patches: int = 1024
    merge: int = 1
    class_slot: bool = False
    queries: int = 0
    newline_token: int | None = None

    def __post_init__(self) -> None:
        if self.resize not in ("crop", "squash", "native"):
            raise ValueError(f"pictures: resize {self.resize!r}: must be crop, squash or native")
        if self.patch < 1 or self.merge < 1 or self.queries < 0:
            raise ValueError(f"pictures: patch {self.patch}, merge {self.merge}, queries {self.queries}: too small")
        unit = self.patch * self.merge
        if self.resize != "native" and (self.size < 1 or self.size % unit):
            raise ValueError(
                f"pictures: size {self.size}: must be a multiple of patch {self.patch} x merge {self.merge} = {unit}"
            )
        least = max(self.merge**2, self.queries)
        if self.fullest < least:
            limit = f"max_patches {self.max_patches}" if self.resize == "native" else f"size {self.size}"
            raise ValueError(f"pictures: {limit} gives {self.fullest} patches, a picture needs {least}; raise it")
        together = [self.merge > 1 and "merge", self.class_slot and "class_slot"]
        if all(together) or (self.queries and (self.merge > 1 or self.newline_token is not None)):
            raise ValueError("pictures: merge goes with neither class_slot nor queries, nor newline_token with queries")

    @property
    def values(self) -> int:
        """D: numbers in a patch."""
        return 3 * self.patch**2

    @property
    def fullest(self) -> int:
        """Patches of the largest picture, its class slot included."""
        if self.resize != "native":
            return (self.size // self.patch) ** 2 + self.class_slot
        return self.max_patches // self.merge**2 * self.merge**2 + self.class_slot

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest picture."""
        if self.queries:
            return self.queries
        if self.resize != "native":
            return int(self.num_tokens(self.grids(np.ones((1, 2))))[0])
        most = self.max_patches // self.merge**2
        return most * (2 if self.newline_token is not None else 1)  # a single column has a newline after each token

    def grids(self, sizes: np.ndarray) -> np.ndarray:
        """Rows and columns of patches [k, 2] of pictures of so many pixels: ``sizes`` [k, 2], height and width."""
        if self.resize != "native":
            return np.full((len(sizes), 2), self.size // self.patch, np.int64)
        # Whole tokens from here on.
        most = self.max_patches // self.merge**2
        exact = np.maximum(sizes, 1) / (self.patch * self.merge)
        area = exact[:, 0] * exact[:, 1]
        least = max(1, self.queries - self.class_slot)
        exact = exact * np.sqrt(np.clip(area, least, most) / area)[:, None]
        return _nearest(exact, least, most) * self.merge

    def num_patches(self, grids: np.ndarray) -> np.ndarray:
        """Places [k] that pictures of these grids take in a row of patches."""
        return grids[:, 0] * grids[:, 1] + self.class_slot

    def num_tokens(self, grids: np.ndarray) -> np.ndarray:
        """Tokens [k] that stand for pictures of these grids."""
        if self.queries:
            return np.full(len(grids), self.queries)
        rows, columns = grids[:, 0] // self.merge, grids[:, 1] // self.merge
        return rows * (columns + (self.newline_token is not None))

    def cells(self, grid: tuple[int, int]) -> np.ndarray:
        """Row and column [places, 2] int32 of each place of a picture; (-1, -1) for the class slot."""
        (rows, columns), m = grid, self.merge
        cells = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).astype(np.int32)
        cells = cells.reshape(rows // m, m, columns // m, m, 2).swapaxes(1, 2).reshape(-1, 2)
        return np.concatenate([np.full((1, 2), -1, np.int32), cells]) if self.class_slot else cells

    def patches(self, picture: np.ndarray) -> np.ndarray:
        """A picture uint8 [rows * p, columns * p, 3] as patches uint8 [places, D], each (channel, y, x)."""
        p, m = self.patch, self.merge
        rows, columns = picture.shape[0] // (p * m), picture.shape[1] // (p * m)
        blocks = picture.reshape(rows, m, p, columns, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        patches = blocks.reshape(-1, self.values)
        return np.concatenate([np.zeros_like(patches[:1]), patches]) if self.class_slot else patches

    def tokens(self, grid: tuple[int, int], place: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and slots [tokens], int32, of a picture whose first place in the row of patches is ``place``."""
        if self.queries:
            return np.full(self.queries, self.image_token, np.int32), place + np.arange(self.queries, dtype=np.int32)
        rows, columns = grid[0] // self.merge, grid[1] // self.merge
        slots = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns) * self.merge**2
        slots += place + self.class_slot
        ids = np.full((rows, columns), self.image_token, np.int32)
        if self.newline_token is not None:
            ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=self.newline_token)
            slots = np.pad(slots, ((0, 0), (0, 1)), constant_values=-1)
        return ids.ravel(), slots.ravel()


def _nearest(exact: np.ndarray, least: int, most: int) -> np.ndarray:
    """Whole rows and columns [k, 2] with ``least`` to ``most`` cells, near ``exact`` [k, 2] in aspect, then in area.

    Only arithmetic that IEEE 754 rounds in one way: all machines must pack alike.
    """
    best, cost = np.ones(exact.shape, np.int64), np.full(len(exact), np.inf)
    for up in ((0, 0), (0, 1), (1, 0), (1, 1)):
        sides = np.maximum(np.floor(exact) + up, 1)
        # A picture thinner than one cell: the other side is all there is to choose.
        sides[:, 0] = np.minimum(sides[:, 0], np.maximum(most // sides[:, 1], 1))
        sides[:, 1] = np.minimum(sides[:, 1], np.maximum(most // sides[:, 0], 1))
        short = sides[:, 0] * sides[:, 1] < least
        wide = exact[:, 1] >= exact[:, 0]
        sides[:, 1] = np.where(short & wide, np.ceil(least / sides[:, 0]), sides[:, 1])
        sides[:, 0] = np.where(short & ~wide, np.ceil(least / sides[:, 1]), sides[:, 0])
        allowed = sides[:, 0] * sides[:, 1] <= most
        scale = sides / exact
        aspect = np.maximum(scale[:, 0] / scale[:, 1], scale[:, 1] / scale[:, 0])
        area = scale[:, 0] * scale[:, 1]
        found = np.where(allowed, aspect * np.sqrt(np.maximum(area, 1 / area)), np.inf)
        better = found < cost
        best[better], cost[better] = sides[better].astype(np.int64), found[better]
    return best
