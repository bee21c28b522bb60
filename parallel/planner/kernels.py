"""How long products, attention and elementwise work take on a GPU: a roofline with tiles and launch gaps.

Roofline: Williams et al. 2009 (doi:10.1145/1498765.1498785). Tiles and waves: NVIDIA, "Matrix Multiplication Background
User's Guide". Fused attention: Dao 2023 (arXiv:2307.08691): backward has five products for the two of forward.
"""

from functools import lru_cache
from math import ceil

from parallel.planner.gpus import Compute, Gpu, Kernels

# Rows and columns of the output that a block of threads makes.
TILES = ((128, 256), (256, 128), (128, 128), (64, 128), (128, 64), (64, 64))
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.6}  # of an operand; fp4 with its scales


@lru_cache(maxsize=1 << 18)
def product(rows: float, inner: float, columns: float, compute: Compute, gpu: Gpu, kernels: Kernels) -> float:
    """Seconds of [rows, inner] x [inner, columns].

    The output is cut into tiles, `Gpu.sms` of which are made at a time: the last wave may be nearly empty. Small tiles
    read more for each FLOP.
    """
    best = 0.0
    for height, width in TILES:
        tiles = ceil(rows / height) * ceil(columns / width)
        waves = ceil(tiles / gpu.sms)
        full = rows * columns / (waves * gpu.sms * height * width)
        reuse = height * width / (height + width)
        best = max(best, full * reuse / (reuse + kernels.tile))
    reuse = 128 * 256 / (128 + 256)
    share = best * (reuse + kernels.tile) / reuse
    speed = gpu.sustained(compute) * max(share, 0.02) * inner / (inner + kernels.depth * BYTES["bf16"] / BYTES[compute])
    if any(round(side) % 8 for side in (inner, columns)):
        speed /= kernels.misaligned
    read = (rows * inner + inner * columns) * BYTES[compute] + rows * columns * 2.0
    return max(2.0 * rows * inner * columns / speed, read / (gpu.hbm * kernels.hbm)) + kernels.gap


def fused_attention(
    flops: float, qk_dim: int, v_dim: int, compute: Compute, native: bool, gpu: Gpu, kernels: Kernels
) -> tuple[float, float]:
    """Seconds forward and backward of attention whose forward has `flops`, in 16 bits unless `compute` is wider.
    native: by kernels written for this generation of GPU (FlashAttention 3, cuDNN).
    """
    width = (qk_dim + v_dim) / 2
    peak = gpu.peak_fp32 if compute == "fp32" else gpu.peak_bf16
    speed = peak * gpu.attention * min(1.0, width / (width + kernels.width) * (128 + kernels.width) / 128)
    if gpu.peak_fp8 and not native:
        speed *= kernels.ported
    return flops / speed, 2.5 * kernels.backward * flops / speed


def plain_attention(
    batch: float, heads: float, length: int, dim: int, gpu: Gpu, kernels: Kernels
) -> tuple[float, float]:
    """Seconds forward and backward of attention that writes its scores, in 16 bits, to memory: scores, scale and mask,
    softmax, dropout, each read and written; nothing is skipped under a causal mask.
    """
    flops = 4.0 * batch * heads * length * length * dim
    speed = gpu.sustained("bf16") * dim / (dim + kernels.depth)
    if dim % 8:
        speed /= kernels.misaligned
    passes = batch * heads * length * length / (gpu.hbm * kernels.hbm)
    return flops / speed + 13.0 * passes, 2 * flops / speed + 15.0 * passes
