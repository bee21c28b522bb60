"""Merging, comparing and exporting a checkpoint that is larger than all the memory that the process takes."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints.derived import new_checkpoint
from checkpoints.manifest import Manifest
from checkpoints.tensors import TensorInfo, open_checkpoint
from launch.commands.convert import native_tensors
from parallel.materialise import generator_for
from pretrain.config import resolve, write_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc"),
]

MODEL = ["model.vocab_size=4096", "model.hidden=1024", "model.ffn=10240", "model.heads=8", "model.kv_heads=4"]
LARGEST = 4 * 1024 * 10240
OVERHEAD = 40 << 20  # what a command takes beside tensors: modules it imports, buffers
COMMAND = """
import sys
from pathlib import Path
from launch.cli import main
from launch.commands import combine, convert, diff  # what --help already takes is not counted
from transformers import AutoConfig

def memory(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

before = memory("VmRSS")
code = main(sys.argv[1:])
print(before, memory("VmHWM"))  # ru_maxrss would count the parent's
sys.exit(code)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs of 170 M parameters: more than the memory that any command here may take, torch included."""
    return [make_run(tmp_path_factory.mktemp("large") / "run", seed) for seed in (1, 2)]


def make_run(folder: Path, seed: int) -> Path:
    config = resolve("tiny", [*MODEL, "model.layers=5", f"run.dir={folder}"])[0]
    shapes, ties = native_tensors(config.model)
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
    with new_checkpoint(folder / "checkpoints", infos, ties) as writer:
        for name, shape in shapes.items():
            # One row drawn and shared by all keeps this quick.
            row = torch.randn(shape[-1], generator=generator_for(seed, name))
            writer.write(name, row.expand(shape).contiguous())
    write_config(config, folder / "config.toml")
    return folder


@pytest.mark.parametrize(
    ("command", "largest"),
    [
        (["checkpoint", "merge", "A", "B", "--out", "OUT"], 2),
        (["checkpoint", "merge", "A", "B", "--out", "OUT", "--method", "ties", "--base", "A"], 5.5),
        (["checkpoint", "diff", "A", "B"], 2),
        (["checkpoint", "export", "A", "OUT", "--no-verify-logits"], 2),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else None,
)
def test_memory_is_that_of_a_few_tensors(runs, tmp_path, command, largest):
    places = {"A": runs[0], "B": runs[1], "OUT": tmp_path / "out"}
    arguments = [str(places.get(word, word)) for word in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.splitlines()[-1].split())
    size = Manifest.read(runs[0] / "checkpoints/step-00000000").num_bytes
    print(f"{command[1]}: {before / 1e6:.0f} MB before, peak {peak / 1e6:.0f} MB, checkpoint {size / 1e6:.0f} MB")
    assert size > peak, "the checkpoint is larger than all memory of the process"
    assert peak - before < largest * LARGEST + OVERHEAD
    if command[1] == "merge":
        a, b, out = (open_checkpoint(run / "checkpoints/step-00000000") for run in (*runs, tmp_path / "out"))
        name = "layers.3.mlp.up.weight"
        expected = (a.read(name) + b.read(name)) / 2 if "ties" not in command else None
        assert expected is None or math.isclose(float((out.read(name) - expected).abs().max()), 0, abs_tol=1e-6)
