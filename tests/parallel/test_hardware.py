"""Datasheet peaks by the names that drivers report."""

import psutil
import pytest
import torch

from parallel.hardware import device_peak_flops, peak_flops, peak_memory


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_known_devices(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize(
    "name", ["NVIDIA GB200", "NVIDIA GeForce RTX 4090 D", "NVIDIA L40", "Tesla T4", "NVIDIA GeForce RTX 4090 Ti", ""]
)
def test_unknown_devices_get_no_figure(name: str) -> None:
    assert peak_flops(name) is None


def test_a_cpu_has_no_peak_and_reports_resident_memory() -> None:
    cpu = torch.device("cpu")
    assert device_peak_flops(cpu) is None
    assert peak_memory(cpu) == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
