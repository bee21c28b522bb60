"""Whether the routers of a mixture of experts use their experts: figures, heat maps, warnings. Rank 0, on the host.

Load is rows over the mean of the layer: 1 for every expert where it is even. Shape letters: L sparse layers, E experts.
"""

import json
import math
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.models.layers.moe import MoE

Array = NDArray[np.float64]

POINTS = 256  # rows of a heat map at most
SIDE = 128  # pixels, about, of a heat map with fewer rows or columns
COLLAPSED, RECOVERED = 0.9, 0.8  # share of rows that the top_k fullest experts take
FEWEST = 8  # rows an expert gets on average, below which an empty one says nothing
WIDEST = 4.0  # load at which the colours end; 1 / WIDEST at the other end


@dataclass(frozen=True)
class Routed:
    """What the routers did in one step. load: [L, E]; by_layer: figures of each layer [L]; overall: of all."""

    load: Array
    by_layer: dict[str, Array]
    overall: dict[str, float]

    def rounded_load(self) -> list[list[float]]:
        return [[round(value, 4) for value in row] for row in self.load.tolist()]


class RouterHealth:
    """Reads what the engine says about routers.

    Args:
        moe: the recipe's.
        layers: the numbers of the sparse layers, in order.
        tokens: of one global batch.
        seq_len: of its sequences.
    """

    def __init__(self, moe: MoE, layers: Sequence[int], tokens: int, seq_len: int):
        self.moe, self.layers, self.tokens = moe, tuple(layers), tokens
        by_expert = moe.choice == "expert"
        self.routes = moe.rows(seq_len, 1.0) * moe.experts / seq_len if by_expert else moe.top_k  # of a token
        self._history: deque[NDArray[np.float32]] = deque(maxlen=POINTS)
        self._collapsed: set[int] = set()

    def read(self, tables: Mapping[str, Array]) -> Routed | None:
        """tables: `router_rows` [L, E] and `router_entropy`, `router_dropped`, `balance_loss`, `z_loss` [L], sums over
        the global batch on one scale; `router_bias` [L], norms, where routers have one. None without `router_rows`.
        """
        if "router_rows" not in tables:
            return None
        moe, rows = self.moe, tables["router_rows"]
        load = np.nan_to_num(rows / np.maximum(rows.mean(1, keepdims=True), 1e-300))
        asked = np.maximum(rows.sum(1) + tables["router_dropped"], 1e-300)
        by_layer = {
            "load_max": load.max(1),
            "load_cv": load.std(1),
            "dead": (rows == 0).sum(1).astype(np.float64),
            "entropy": tables["router_entropy"] * self.routes / asked,
        }
        if moe.capacity:
            by_layer["dropped"] = tables["router_dropped"] / asked
        if moe.balance != "none" and moe.balance_weight:
            by_layer["balance_loss"] = tables["balance_loss"]
        if moe.z_weight:
            by_layer["z_loss"] = tables["z_loss"]
        if "router_bias" in tables:
            by_layer["bias"] = tables["router_bias"]
        overall = {name: float(_OVERALL[name](values)) for name, values in by_layer.items()}
        overall["entropy_share"] = overall["entropy"] / math.log(moe.experts) if moe.experts > 1 else 1.0
        return Routed(load, by_layer, overall)

    def warnings(self, routed: Routed) -> Iterator[str]:
        """A line for each layer that collapsed since the last call, and one when it has recovered.

        Collapsed: the top_k fullest of at least 2 top_k experts take over 90 % of the rows (until under 80 %), or at
        least half of the experts get none.
        """
        moe = self.moe
        if self.tokens * self.routes / moe.experts < FEWEST:
            return
        fullest = np.sort(routed.load, 1)[:, -moe.top_k :].sum(1) / moe.experts
        for layer, share, dead in zip(self.layers, fullest, routed.by_layer["dead"], strict=True):
            known = layer in self._collapsed
            crowded = moe.experts >= 2 * moe.top_k and share > (RECOVERED if known else COLLAPSED)
            now = bool(crowded or 2 * dead >= moe.experts > 1)
            (self._collapsed.add if now else self._collapsed.discard)(layer)
            figures = (
                f"its {moe.top_k} fullest of {moe.experts} experts take {share:.0%} of the rows, {dead:.0f} get none"
            )
            if now and not known:
                yield f"warning: the router of layer {layer} collapsed: {figures}; {self._cure()}"
            elif known and not now:
                yield f"the router of layer {layer} has recovered: {figures}"

    def _cure(self) -> str:
        moe = self.moe
        if moe.bias:
            return f"raise model.moe.bias_rate ({moe.bias_rate:g}), or lower optim.lr"
        if moe.balance == "none":
            return 'set model.moe.balance = "global" with a balance_weight, or model.moe.bias = true'
        return f"raise model.moe.balance_weight ({moe.balance_weight:g}), or lower optim.lr"

    def restore(self, path: Path) -> None:
        """Rows of the heat maps from a metrics file, if it is there; those of other layers or experts are left out."""
        if not path.exists():
            return
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                load = json.loads(line)["router_load"] if '"router_load"' in line else []
                if [len(row) for row in load] == [self.moe.experts] * len(self.layers):
                    self._history.append(np.array(load, dtype=np.float32))

    def remember(self, routed: Routed) -> None:
        """Another row of the heat maps."""
        self._history.append(routed.load.astype(np.float32))

    @property
    def points(self) -> int:
        """How many rows the heat maps have."""
        return len(self._history)

    def heat_maps(self) -> Iterator[tuple[int, bytes]]:
        """For each layer its number and a PNG: rows are points, the newest at the bottom, columns experts; grey is the
        mean load, red four times, blue a quarter, black none.
        """
        history = np.stack(self._history, 1)
        for layer, loads in zip(self.layers, history, strict=True):
            rows, columns = (max(1, SIDE // size) for size in loads.shape)
            yield layer, _png(_colour(loads).repeat(rows, 0).repeat(columns, 1))


_OVERALL: dict[str, Callable[[Array], np.floating[Any]]] = {
    "load_max": np.max,
    "load_cv": np.mean,
    "dead": np.sum,
    "entropy": np.mean,
    "dropped": np.mean,
    "balance_loss": np.sum,
    "z_loss": np.sum,
    "bias": np.max,
}


def _colour(load: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Places in the palette: 0 for no row, 1 ... 255 for log(load), 128 for the mean."""
    part = np.log(np.maximum(load, 1e-30)) / math.log(WIDEST)
    place = np.rint(128 + 127 * part.clip(-1, 1)).astype(np.uint8)
    return np.where(load > 0, place, 0).astype(np.uint8)


@cache
def _palette() -> bytes:
    """256 sRGB colours: black, then blue over light grey to red in equal steps of Oklab (Ottosson 2020,
    https://bottosson.github.io/posts/oklab/), in which equal distances look equal.
    """
    part = np.linspace(-1, 1, 255)[:, None]
    ends = [[0.45, 0.15 * math.cos(hue), 0.15 * math.sin(hue)] for hue in (math.radians(258), math.radians(25))]
    lab = np.array([0.95, 0, 0]) * (1 - abs(part)) + np.where(part < 0, ends[0], ends[1]) * abs(part)
    to_lms = [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    to_rgb = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    linear = ((lab @ np.transpose(to_lms)) ** 3 @ np.transpose(to_rgb)).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
    return bytes(3) + np.rint(255 * srgb).astype(np.uint8).tobytes()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """pixels [height, width]: places in the palette."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, palette
    lines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # each begins with its filter: none
    parts = ((b"IHDR", header), (b"PLTE", _palette()), (b"IDAT", zlib.compress(lines, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def image_record(tag: str, png: bytes) -> Any:
    """TensorBoard's record of an image. SummaryWriter.add_image would need Pillow."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])
