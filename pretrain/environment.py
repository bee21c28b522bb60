"""What a run was made with: versions, commit, machine."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "webdataset", "sentencepiece", "tokenizers", "safetensors", "transformers", "flash-attn")


def describe_environment(seed: int, world_size: int, device: torch.device) -> dict[str, Any]:
    """JSON record of the software and hardware of this run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "world_size": world_size,
        "seed": seed,
        "command": sys.argv,
        "git": git_commit(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def git_commit() -> str | None:
    """Commit of the code that runs, with "+changes" when files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
