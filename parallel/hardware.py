"""What the devices can do: datasheet peaks and memory in use."""

import re

import psutil
import torch

# Dense bf16 peak (fp32 accumulation, no sparsity), FLOP/s; the first pattern found in the name counts.
# Sources: NVIDIA's A100, H100, H200, L40S and HGX B200 datasheets (their sparse figures halved), NVIDIA's Ada
# whitepaper (RTX 4090), AMD's Instinct MI300X datasheet.
PEAK_BF16_FLOPS: dict[str, float] = {
    r"A100": 312e12,
    r"H100 PCIe": 756e12,
    r"H[12]00 NVL": 835e12,
    r"H100": 989.5e12,
    r"H200": 989.5e12,
    r"B200": 2250e12,
    r"L40S": 362e12,
    r"RTX 4090(?! (D|Ti))": 165e12,
    r"MI300X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s by `torch.cuda.get_device_name`; None when it is not known."""
    for pattern, peak in PEAK_BF16_FLOPS.items():
        if re.search(rf"\b{pattern}\b", device_name, re.IGNORECASE):
            return peak
    return None


def device_peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device` in FLOP/s; None for CPUs and unknown GPUs, for which no MFU is shown."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a CUDA device so far; on CPU the process's resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
