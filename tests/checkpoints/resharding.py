"""Real engines whose state has known values, saved and loaded under any layout."""

import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from checkpoints.store import CheckpointStore
from parallel.engine import Engine
from parallel.layouts import all_layouts, describe_layout
from parallel.mesh import AXES
from parallel.world import World
from pretrain.config import RunConfig, resolve
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from pretrain.verify import count_experts
from tests.ranks import run_ranks

Parts = dict[str, dict[str, Tensor]]  # "model", "optimizer" -> name -> tensor


def start(config: RunConfig) -> Engine:
    """The engine of a config on the ranks there are."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return build_engine(config, world, OBJECTIVES[config.objective.name][1](config.objective))


def known_values(part: str, name: str, like: Tensor) -> Tensor:
    """A whole tensor of the shape and type of `like`, whose elements follow from its name and their place alone.

    All are multiples of 1/512 below 8, so that fp32 holds them exactly. Single numbers count steps.
    """
    if not like.ndim:
        return torch.full_like(like, 3)
    numbers = torch.arange(like.numel(), dtype=torch.int64) * 7919 + zlib.crc32(f"{part} {name}".encode())
    return ((numbers % 4093) / 512).to(like.dtype).reshape(like.shape)


def tensors(parts: Parts) -> Iterator[tuple[str, str, Tensor]]:
    """(part, name, tensor) of all."""
    for part, named in parts.items():
        for name, tensor in named.items():
            yield part, name, tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parts: Parts) -> None:
    """Give every tensor its known values."""
    for part, name, tensor in tensors(parts):
        whole = known_values(part, name, tensor)
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        local(tensor).copy_(whole)


@torch.no_grad()
def wrong(parts: Parts) -> list[str]:
    """Collective. Tensors that are not bit for bit their known values once they are gathered."""
    found = []
    for part, name, tensor in tensors(parts):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(whole, known_values(part, name, tensor)):
            found.append(f"{part} {name}")
    return found


# The models: dims that no number of processes divides (vocabulary, feed-forward, key/value heads), so that pieces are
# uneven or empty; a tied embedding, whose copy lies in another pipeline stage; state that is no parameter.
SMALL = [
    "model.vocab_size=29",
    "model.layers=4",
    "model.hidden=24",
    "model.heads=12",
    "model.kv_heads=2",
    "model.ffn=14",
    "model.max_seq_len=96",
    "data.seq_len=96",
    "train.global_batch=24",
    "train.micro_batch=1",
    "train.precision=fp32",
    "train.compile=off",
]
SPARSE = ["model.moe.experts=4", "model.moe.ffn=10", "model.moe.bias=true", "model.moe.first_dense=1"]
SEEING = ["model.vision.hidden=24", "model.vision.heads=12", "model.vision.layers=2", "model.vision.ffn=20"]
MODELS = {
    "dense": ["tiny", *SMALL],
    "experts": ["tiny-moe", *SMALL, *SPARSE, "model.tied=false", "optim.name=muon"],
    "pictures": ["tiny-vlm", *SMALL, *SEEING, "data.patches=96", "optim.name=muon"],
}
SCHEDULES = ("1f1b", "interleaved1f1b", "zbvzerobubble")  # one stage a process, stages in turns, stages in a V
OF_8 = (  # some of the layouts of 8 processes
    {"dp_shard": 8},
    {"dp_replicate": 2, "dp_shard": 2, "cp": 2},
    {"pp": 2, "dp_shard": 2, "tp": 2},
    {"pp": 2, "dp_shard": 2, "cp": 2, "schedule": "zbvzerobubble"},
    {"dp_shard": 2, "tp": 4},
)


def layouts(model: str, processes: int, schedules: Sequence[str]) -> list[RunConfig]:
    """The model's config in every layout of so many processes; of 8, in a few. Not all of them are legal."""
    name, *overrides = MODELS[model]
    config, _ = resolve(name, overrides)
    if processes == 8:
        ep = {"ep": 4} if count_experts(config) else {}
        one = dict.fromkeys(AXES, 1)
        chosen = [{**one, **degrees, **ep} if "tp" not in degrees else {**one, **degrees} for degrees in OF_8]
        return [config.model_copy(update={"parallel": config.parallel.model_copy(update=c)}) for c in chosen]
    found = all_layouts(config.parallel, processes, schedules, count_experts(config))
    # The method says how attention communicates, not where tensors lie.
    found = [parallel for parallel in found if parallel.cp_method == "ulysses"]
    return [config.model_copy(update={"parallel": parallel}) for parallel in found]


def legal(configs: list[RunConfig]) -> Iterator[tuple[str, Engine, Parts]]:
    """Collective. (layout in words, engine, its live state) for each config whose layout the model can have."""
    for config in configs:
        try:
            engine = start(config)
        except ValueError:
            continue
        yield describe_layout(config.parallel), engine, engine.state_dict()


def save_and_load(
    model: str, folder: Path, sources: dict[int, str], every: int, schedules: Sequence[str], saving: bool
) -> tuple[dict[int, str], list[str], int]:
    """Collective. If `saving`, save the known values under every layout of as many processes as there are. Load each
    `every`-th of that and of `sources` (step -> layout), others for each layout, under all of these layouts.

    Returns what was saved, what this rank found to differ, and the number of pairs.
    """
    os.fsync = lambda _: None  # type: ignore[assignment]  # hundreds of small files; other tests look at durability
    world = dist.get_world_size()
    built = list(legal(layouts(model, world, schedules)))
    saved: dict[int, str] = {}
    problems: list[str] = []
    for number, (layout, engine, state) in enumerate(built):
        fill(state)
        if saving:
            # What a layout holds is what it should, gathered; moments lie as their parameters do.
            problems += [f"{layout} before saving: {name}" for name in wrong({"model": state["model"]})]
            step = 1000 * world + number
            store_of(folder, step).save(step, state["model"], state["optimizer"], {}, ties=engine.ties)
            saved[step] = f"{world} x {layout}"
    steps = list(sources | saved)
    pairs = 0
    for number, (layout, engine, state) in enumerate(built):
        for step in steps[number % every :: every]:
            found = load(store_of(folder, step), step, engine, state)
            problems += [f"{(sources | saved)[step]} -> {world} x {layout}: {name}" for name in found]
            pairs += 1
    return saved, problems, pairs


def store_of(folder: Path, step: int) -> CheckpointStore:
    """One for each checkpoint: listing hundreds at every save would take longer than all else."""
    return CheckpointStore(folder / str(step))


@torch.no_grad()
def load(store: CheckpointStore, step: int, engine: Engine, state: Parts) -> list[str]:
    """Collective. Names of tensors that a checkpoint does not bring back, on this rank, to what they are."""
    expected = {(part, name): local(tensor).clone() for part, name, tensor in tensors(state)}
    for _, _, tensor in tensors(state):
        local(tensor).fill_(-1)
    store.load(step, state["model"], state["optimizer"])
    engine.load_state_dict(state)
    found = []
    for part, name, tensor in tensors(state):
        if not torch.equal(local(tensor), expected[part, name]):
            found.append(f"{part} {name}")
            local(tensor).copy_(expected[part, name])
    return found


def reshard(
    model: str, folder: Path, processes: Sequence[int], every: int = 1, schedules: Sequence[str] = SCHEDULES
) -> tuple[list[str], int, int]:
    """Save under all layouts of these numbers of processes, ascending, and load each `every`-th under all: (problems,
    number of layouts, number of pairs).
    """
    saved: dict[int, str] = {}
    problems: list[str] = []
    pairs = 0
    largest = processes[-1]
    for saving in (True, False):  # the smaller ones once more, for what the larger ones have saved since
        for world in processes if saving else processes[:-1]:
            sources = saved if saving else {step: layout for step, layout in saved.items() if step // 1000 > world}
            arguments = (model, folder, sources, every, schedules, saving)
            by_rank = run_ranks(save_and_load, world, *arguments, timeout=300 * largest)
            saved |= by_rank[0][0]
            problems += [problem for _, found, _ in by_rank for problem in found]
            pairs += by_rank[0][2]
    return problems, len(saved), pairs


def main(models: Sequence[str], processes: Sequence[int]) -> None:
    """The full square, for `python -m tests.checkpoints.resharding dense experts pictures 1 2 3 4 8`."""
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            problems, number, pairs = reshard(model, Path(folder), processes)
            seconds = time.monotonic() - begin
            print(f"{model}: {number} layouts, {pairs} pairs, {len(problems)} problems, {seconds:.0f} s", flush=True)
            print("".join(f"{problem}\n" for problem in problems), end="", flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    main([word for word in words if word in MODELS], [int(word) for word in words if word.isdigit()])
