"""A checkpoint of the first format version, two ranks wide, is read for ever, under any layout.

`fixtures/format-1` was written with tensor parallelism over 2 ranks, step 3, tensors as `known_values` says. Never
write it anew: what this test guards is that files on somebody's disk stay readable.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore
from checkpoints.tensors import open_checkpoint
from parallel.world import World
from pretrain.config import RunConfig, resolve
from pretrain.train import resume
from tests.checkpoints.resharding import known_values, start, wrong
from tests.ranks import run_ranks

FIXTURE = Path(__file__).parent / "fixtures/format-1"
STEP = 3
MODEL = [
    "model.vocab_size=18",
    "model.hidden=8",
    "model.layers=2",
    "model.heads=2",
    "model.kv_heads=2",
    "model.ffn=10",
    "model.max_seq_len=32",
    "data.seq_len=16",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.precision=fp32",
    "train.compile=off",
    "train.steps=20",
]
LAYOUTS = (["parallel.tp=2"], ["parallel.dp_shard=2"], ["parallel.cp=2"], ["parallel.pp=2"])


def config(*layout: str) -> RunConfig:
    return resolve("tiny", [*MODEL, *layout])[0]


def test_it_is_whole_and_of_the_first_version():
    folder = FIXTURE / f"step-{STEP:08d}"
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == 1
    store = CheckpointStore(FIXTURE)
    assert store.newest_whole() == STEP and store.verify(STEP) == []
    manifest = Manifest.read(folder)
    assert manifest.ties == {"head.weight": "embed.weight"} and manifest.lineage == ()
    assert sorted(manifest.files) == [
        *(f"{part}/rank-0000{rank}.safetensors" for part in ("model", "optimizer") for rank in (0, 1)),
        "state.json",
    ]


def test_every_tensor_has_its_values():
    files = open_checkpoint(FIXTURE / f"step-{STEP:08d}")
    assert len(list(files)) == 20
    assert all(torch.equal(tensor := files.read(name), known_values("model", name, tensor)) for name in files)
    halves = [piece.shape for piece in files._pieces["layers.1.mlp.down.weight"]]
    assert halves == [(8, 5), (8, 5)]  # cut along columns, so reading them takes more than one run of bytes


def resumed(layouts: list[list[str]], rng: list[int]) -> list[list[str]]:
    """What is wrong after resuming under each of the layouts."""
    found = []
    for layout in layouts:
        torch.manual_seed(0)
        engine = start(config(*layout))
        position = resume(CheckpointStore(FIXTURE), STEP, engine, World(dist.get_rank(), 2, torch.device("cpu")))
        assert (position.step, position.cursor) == (STEP, 12)
        assert int(torch.randint(1 << 30, ())) == rng[dist.get_rank()]  # each rank's own generator goes on
        found.append(wrong(engine.state_dict()))
    return found


@pytest.mark.slow
def test_layouts_of_today_resume_from_it():
    expected = []
    for rank in range(2):
        torch.manual_seed(17 + rank)
        expected.append(int(torch.randint(1 << 30, ())))
    assert run_ranks(resumed, 2, LAYOUTS, expected) == [[[]] * len(LAYOUTS)] * 2
