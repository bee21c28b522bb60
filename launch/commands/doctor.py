"""pretrain doctor"""

import argparse
import os

import torch

from parallel.hardware import device_peak_flops
from pretrain.compile import has_compiler
from pretrain.environment import describe_environment
from pretrain.models.layers.attention import AttentionMask, choose_backend


def doctor(args: argparse.Namespace) -> None:
    """One line a fact: what a run on this machine would use."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    environment = describe_environment(0, 1, device)
    facts = {
        "python": environment["python"],
        "commit": environment["git"] or "not a checkout",
        **environment["packages"],
        "device": environment["device"] if cuda else f"cpu, {os.cpu_count()} cores",
        "torch.compile": "ready" if has_compiler(device) else "no compiler found (g++ or clang; triton on a GPU)",
    }
    if cuda:
        peak = device_peak_flops(device)
        facts["GPUs"] = str(torch.cuda.device_count())
        facts["bf16 peak"] = f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown: no MFU will be shown"
    for length in (512, 4096):
        name, reason = choose_backend(
            AttentionMask(), device=device, dtype=torch.bfloat16, queries=length, keys=length, head_dim=64
        )
        facts[f"attention at {length}"] = f"{name} ({reason})"
    for name, value in facts.items():
        print(f"{name:18} {value}")
