"""GPUs and links as the planner knows them: one table of datasheet facts, one of calibrated figures.

Datasheets: NVIDIA A100, H100, H200, L40S, HGX B200/B300, GB200 and GB300 NVL72 (sparse figures halved); AMD Instinct
MI300X. Calibrated figures are properties of a GPU, of its kernels or of a link, fitted to published runs by
`python -m tests.bench.fit_plan`; `tests/bench/RESULTS.md` has the cross-validation.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

Compute = Literal["fp32", "bf16", "fp8", "fp4"]
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in the machine it is usually sold in.

    memory: bytes that the driver offers. peak_fp32: FLOP/s without tensor cores; peak_bf16, peak_fp8, peak_fp4: dense
    tensor-core peaks (0: cannot).
    sustained_*: share of that peak which large matrix products keep up in a long run, clocks lowered by power included
    (calibrated). attention: share of the bf16 peak that fused attention reaches at head width 128 (calibrated).
    hbm: bytes/s. sms: processors over which the tiles of a product are spread. nvlink: bytes/s of a GPU, one direction,
    inside a domain. domain: GPUs that nvlink connects. network: bytes/s of a GPU between domains, one direction.
    """

    name: str
    memory: float
    peak_fp32: float
    peak_bf16: float
    peak_fp8: float
    peak_fp4: float
    hbm: float
    sms: int
    nvlink: float
    domain: int
    network: float
    sustained_bf16: float
    sustained_fp8: float
    sustained_fp4: float
    attention: float

    def sustained(self, compute: Compute) -> float:
        """FLOP/s that large matrix products keep up in the narrowest format that this GPU has, `compute` or wider."""
        if compute == "fp32":
            return self.peak_fp32 * self.sustained_bf16
        if compute == "fp4" and self.peak_fp4:
            return self.peak_fp4 * self.sustained_fp4
        if compute != "bf16" and self.peak_fp8:
            return self.peak_fp8 * self.sustained_fp8
        return self.peak_bf16 * self.sustained_bf16


def _gpu(
    name: str,
    gib: float,
    peaks: tuple[float, float, float, float],
    hbm: float,
    sms: int,
    links: tuple[float, int, float],
    shares: tuple[float, float, float, float],
) -> Gpu:
    """Peaks in TFLOP/s, hbm in GB/s, links (nvlink GB/s, GPUs in a domain, network GB/s)."""
    fp32, bf16, fp8, fp4 = (peak * 1e12 for peak in peaks)
    nvlink, domain, network = links
    return Gpu(name, gib * GIB, fp32, bf16, fp8, fp4, hbm * 1e9, sms, nvlink * 1e9, domain, network * 1e9, *shares)


# name, memory GiB, peaks fp32 bf16 fp8 fp4, HBM, SMs, (NVLink, domain, network), (sustained bf16 fp8 fp4, attention)
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40", 39.4, (19.5, 312, 0, 0), 1555, 108, (300, 8, 25), (0.78, 0, 0, 0.45)),
        _gpu("a100-80", 79.2, (19.5, 312, 0, 0), 2039, 108, (300, 8, 25), (0.78, 0, 0, 0.45)),
        _gpu("h100", 79.1, (66.9, 989.5, 1979, 0), 3350, 132, (450, 8, 50), (0.63, 0.75, 0, 0.42)),
        _gpu("h100-500w", 94.5, (66.9, 989.5, 1979, 0), 2400, 132, (450, 8, 50), (0.60, 0.67, 0, 0.42)),
        _gpu("h200", 139.8, (66.9, 989.5, 1979, 0), 4800, 132, (450, 8, 50), (0.63, 0.75, 0, 0.42)),
        _gpu("b200", 178.0, (75, 2250, 4500, 9000), 7700, 148, (900, 8, 50), (0.63, 0.73, 0.75, 0.42)),
        _gpu("gb200", 184.0, (80, 2450, 4900, 9800), 7900, 148, (900, 72, 50), (0.63, 0.73, 0.75, 0.42)),
        _gpu("b300", 267.0, (75, 2250, 4500, 13500), 7700, 148, (900, 8, 100), (0.63, 0.75, 0.55, 0.45)),
        _gpu("gb300", 277.0, (80, 2450, 4900, 14700), 7900, 148, (900, 72, 100), (0.63, 0.75, 0.55, 0.45)),
        _gpu("l40s", 44.4, (91.6, 362, 733, 0), 864, 142, (25, 8, 12.5), (0.55, 0.5, 0, 0.4)),
        _gpu("mi300x", 191.5, (163.4, 1307, 2614, 0), 5300, 304, (336, 8, 50), (0.5, 0.45, 0, 0.3)),
    )
}


@dataclass(frozen=True)
class Kernels:
    """Calibrated figures that hold for every GPU.

    hbm: share of the memory bandwidth that elementwise kernels reach.
    nvlink, network: share of a link's bandwidth that a ring collective reaches.
    latency: seconds of one hop between domains; latency_near: inside one.
    host: seconds from one kernel launch of the host to the next. gap: seconds a kernel starts late on the device.
    contention: of the shorter of two overlapping pieces of work, the share that adds to the longer.
    tile: in a product, elements of operands that cost as much time to load as one row or column of a tile computes.
    depth: inner dim of a product in bf16 at which half its time goes into filling the pipeline.
    misaligned: slowdown of a product whose rows do not start at multiples of 16 bytes.
    width: of an attention head, at which half the time is not spent in tensor cores.
    backward: fused attention's backward over its forward, in time for equal FLOPs.
    ported: speed of attention kernels of an older generation of GPU, over those written for it.
    tp_hidden, ep_hidden: of the traffic of tensor and expert parallelism, the share hidden where it overlaps.
    """

    hbm: float = 0.9
    nvlink: float = 0.61
    network: float = 0.75
    latency: float = 1.5e-05
    latency_near: float = 3e-6
    host: float = 9.9e-06
    gap: float = 3.6e-06
    contention: float = 0.15
    tile: float = 13
    depth: float = 1.7e02
    misaligned: float = 3.7
    width: float = 36
    backward: float = 1.3
    ported: float = 0.53
    tp_hidden: float = 0.6
    ep_hidden: float = 0.45


KERNELS = Kernels()


def find_gpu(name: str) -> Gpu:
    """Raises ValueError that lists them for an unknown one."""
    known = name.lower().replace("_", "-")
    if known not in GPUS:
        near = difflib.get_close_matches(known, GPUS, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"--gpu {name} is unknown{hint}: one of {', '.join(GPUS)}")
    return GPUS[known]
