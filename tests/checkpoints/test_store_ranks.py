"""Several ranks: any layout loads any other, replicas are stored once, and all ranks fail together."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from checkpoints.collective import CheckpointError, Ranks
from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore
from tests.ranks import run_ranks

# Dims that 4 and 2 do not divide, dims smaller than the world (some ranks hold no row), all common types.
WEIGHTS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "even.weight": ((8, 4), torch.float32),
    "uneven.weight": ((7, 5), torch.bfloat16),
    "one_row.weight": ((1, 6), torch.float32),
    "three.weight": ((3, 3, 2), torch.float16),
    "bias": ((5,), torch.float32),
    "count": ((6,), torch.int64),
    "scale": ((), torch.float32),
}


def full_tensors() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    model = {name: (torch.randn(shape, generator=generator) * 9).to(d) for name, (shape, d) in WEIGHTS.items()}
    optimizer = {f"exp_avg.{name}": tensor.double() / 3 for name, tensor in model.items()}
    optimizer["step"] = torch.tensor(11)
    return model, optimizer


def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def plain(name: str, tensor: Tensor) -> Tensor:
    return tensor


def on_mesh(shape: tuple[int, ...], *dims: int | None) -> Callable[[str, Tensor], Tensor]:
    """Places every tensor on a mesh of `shape`; `dims` says which dim each mesh axis cuts, None replicates."""
    mesh = init_device_mesh("cpu", shape)

    def place(name: str, tensor: Tensor) -> Tensor:
        cuts = [Replicate() if dim is None or dim >= tensor.ndim else Shard(dim) for dim in dims]
        return distribute_tensor(tensor, mesh, cuts, src_data_rank=None)

    return place


def stages(name: str, tensor: Tensor) -> Tensor | None:
    """Every rank holds every n-th tensor, as pipeline stages do; the scalars are on all."""
    owner = [*WEIGHTS].index(name.removeprefix("exp_avg.")) if name != "step" else -1
    return tensor if owner % dist.get_world_size() == dist.get_rank() or tensor.ndim == 0 else None


def layouts() -> dict[str, Callable[[str, Tensor], Tensor | None]]:
    world = dist.get_world_size()
    found = {"plain": plain, "stages": stages, "rows": on_mesh((world,), 0), "columns": on_mesh((world,), 1)}
    if world == 4:
        found |= {
            "replicated rows": on_mesh((2, 2), None, 0),
            "rows and columns": on_mesh((2, 2), 0, 1),
            "rows twice": on_mesh((2, 2), 0, 0),
        }
    return found


def placed(place: Callable, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: there for name, tensor in tensors.items() if (there := place(name, tensor)) is not None}


def save_all(folder: Path) -> list[int]:
    store = CheckpointStore(folder, keep=99)
    world = dist.get_world_size()
    steps = []
    for index, (name, place) in enumerate(layouts().items()):
        model, optimizer = (placed(place, tensors) for tensors in full_tensors())
        store.save(100 * world + index, model, optimizer, {"layout": name}, rank_state={"rank": dist.get_rank()})
        steps.append(100 * world + index)
    return steps


def load_all(folder: Path, steps: list[int]) -> list[str]:
    store = CheckpointStore(folder)
    wrong = []
    for step in steps:
        for name, place in layouts().items():
            expected = [placed(place, tensors) for tensors in full_tensors()]
            target = [placed(place, zeros(tensors)) for tensors in full_tensors()]
            state = store.load(step, *target)
            assert state["ranks"] == [{"rank": rank} for rank in range(step // 100)]
            for part, reference in zip(target, expected, strict=True):
                for key, tensor in part.items():
                    if not torch.equal(local(tensor), local(reference[key])):
                        wrong.append(f"{state['layout']} of {step // 100} -> {name}: {key}")
    return wrong


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.slow
def test_any_layout_loads_any_other(tmp_path: Path):
    steps = [step for world in (1, 2, 4) for step in run_ranks(save_all, world, tmp_path)[0]]
    assert len(steps) == 15
    for world in (1, 2, 4):
        assert run_ranks(load_all, world, tmp_path, steps) == [[]] * world
    store = CheckpointStore(tmp_path)
    for step in steps:
        assert store.verify(step) == []


def test_replicas_are_stored_once_and_spread_over_ranks(tmp_path: Path):
    run_ranks(save_all, 4, tmp_path)
    content = sum(tensor.nbytes for part in full_tensors() for tensor in part.values())
    for info in CheckpointStore(tmp_path).list():
        headers = sum(
            8 + int.from_bytes(path.open("rb").read(8), "little") for path in info.path.glob("*/*.safetensors")
        )
        stored = sum(path.stat().st_size for path in info.path.glob("*/*.safetensors"))
        assert stored - headers == content, info.step
    assert len(list((tmp_path / "step-00000400" / "model").iterdir())) == 4  # plain tensors, replicated


def reads_with_dcp(folder: Path) -> bool:
    mine = placed(on_mesh((dist.get_world_size(),), 0), zeros(full_tensors()[0]))
    dcp.load(mine, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "step-00000401" / "model")))
    expected = placed(on_mesh((dist.get_world_size(),), 0), full_tensors()[0])
    return all(torch.equal(local(mine[name]), local(expected[name])) for name in mine)


def test_torchs_own_reader_needs_nothing_of_ours(tmp_path: Path):
    run_ranks(save_all, 4, tmp_path)
    for path in tmp_path.rglob("*.json"):
        path.unlink()
    assert run_ranks(reads_with_dcp, 2, tmp_path) == [True, True]


# A real model under FSDP2, and FSDP2 on top of tensor parallelism


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def trained(layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Model and AdamW state after one step."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(6, 10), Block(6, 12))
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh)
    elif layout == "fsdp + tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        for block in model:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    moments = {
        f"{key}.{name}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    return dict(model.named_parameters()), moments


def save_trained(folder: Path, layouts: dict[int, str]) -> None:
    for step, layout in layouts.items():
        CheckpointStore(folder, keep=9).save(step, *trained(layout), {})


def load_trained(folder: Path, layouts: list[str], steps: list[int]) -> list[dict[str, Tensor]]:
    """What each of `steps` gives in each of `layouts`, as full tensors."""
    found = []
    for layout in layouts:
        model, optimizer = trained(layout)
        tensors = {**model, **optimizer}
        for step in steps:
            with torch.no_grad():
                for tensor in tensors.values():
                    local(tensor).zero_()
            CheckpointStore(folder).load(step, model, optimizer)
            full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
            found.append({name: tensor.detach().clone() for name, tensor in full.items()})
    return found


def test_fsdp_and_tensor_parallel_states_move_between_layouts(tmp_path: Path):
    run_ranks(save_trained, 1, tmp_path, {1: "one"})
    run_ranks(save_trained, 2, tmp_path, {2: "fsdp"})
    run_ranks(save_trained, 4, tmp_path, {3: "fsdp", 4: "fsdp + tp"})
    steps = [1, 2, 3, 4]
    expected = run_ranks(load_trained, 1, tmp_path, ["one"], steps)[0]
    assert all(tensor.any() for tensors in expected for tensor in tensors.values())
    for world, layouts in ((2, ["fsdp"]), (4, ["fsdp", "fsdp + tp"])):
        for found in run_ranks(load_trained, world, tmp_path, layouts, steps):
            for tensors, reference in zip(found, expected * len(layouts), strict=True):
                assert all(torch.equal(tensors[name], reference[name]) for name in reference)


# Failing together


def attempt(action: Callable[[], Any]) -> str:
    try:
        return f"no error: {action()}"
    except (ValueError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error}"


def disk_full(folder: Path, failing: int) -> list[Any]:
    """The file size limit stands in for a full disk; Python ignores SIGXFSZ, so that writing raises EFBIG."""
    store = CheckpointStore(folder)
    model = placed(on_mesh((2,), 0), {"weight": torch.ones(4096, 64)})
    store.save(1, model, {}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    error = attempt(lambda: store.save(2, model, {}, {}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    store.save(3, model, {}, {})
    return [error, left]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_on_one_rank_fails_all_and_spares_the_previous_checkpoint(tmp_path: Path, failing: int):
    results = run_ranks(disk_full, 2, tmp_path, failing)
    assert results[0][0] == results[1][0]
    assert results[0][0].startswith("CheckpointError: step 2 was not saved in ")
    assert f"File too large; raise the file size limit (ulimit -f) (rank {failing})" in results[0][0]
    assert results[0][1] == ["step-00000001"]
    store = CheckpointStore(tmp_path)
    assert [store.verify(step) for step in (1, 3)] == [[], []]


def different_mistakes(folder: Path) -> list[str]:
    store, rank = CheckpointStore(folder), dist.get_rank()
    weight = torch.ones(4, 2)
    store.save(7, {f"w{rank}": weight + rank}, {}, {})
    loaded = {f"w{rank}": torch.zeros(4, 2)}
    store.load(7, loaded)
    assert torch.equal(loaded[f"w{rank}"], weight + rank)
    return [
        attempt(lambda: store.save(8, {"w": weight if rank else 3}, {}, {})),  # type: ignore[dict-item]
        attempt(lambda: store.load(7, {"w0": weight})),
        attempt(lambda: store.load(7, {f"w{rank}": weight, **({"v": weight} if rank else {})})),
        attempt(lambda: store.load(6, {})),
    ]


def test_a_mistake_on_one_rank_is_raised_on_all(tmp_path: Path):
    first, second = run_ranks(different_mistakes, 2, tmp_path)
    assert first == second
    assert "model entry 'w' is a int" in first[0] and "(rank 0)" in first[0]
    assert "only it has model w1;" in first[1]
    assert "it lacks model v;" in first[2]
    assert first[3].startswith("FileNotFoundError: no checkpoint of step 6")


def memory_of_a_save(folder: Path) -> int:
    """By how many bytes saving 128 MB of CPU tensors raised the peak of the memory that this process holds."""
    model = {f"w{index}": torch.ones(2**18, 16) for index in range(8)}
    store = CheckpointStore(folder)
    store.save(1, {"small": torch.ones(1)}, {}, {})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store.save(2, model, {}, {})
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_saving_makes_no_copy_of_the_tensors(tmp_path: Path):
    assert run_ranks(memory_of_a_save, 1, tmp_path)[0] < 16 * 2**20


def anonymous_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def memory_of_a_load(folder: Path) -> int:
    """The largest growth of anonymous memory seen whenever a tensor has been filled, of 128 MB of tensors."""
    model = {f"w{index}": torch.ones(2**18, 16) for index in range(8)}
    CheckpointStore(folder).save(1, model, {}, {})
    before, seen = anonymous_memory(), []
    fill = Tensor.copy_

    def watched(target: Tensor, source: Tensor) -> Tensor:
        seen.append(anonymous_memory() - before)
        return fill(target, source)

    Tensor.copy_ = watched  # type: ignore[method-assign, assignment]
    CheckpointStore(folder).load(1, model)
    assert len(seen) == 8
    return max(seen)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_loading_holds_one_piece_at_a_time(tmp_path: Path):
    assert run_ranks(memory_of_a_load, 1, tmp_path)[0] < 2 * 2**24 + 8 * 2**20


def save_beside_nccl(folder: Path) -> tuple[bool, bool]:
    """Where the default backend is another, the store talks over a gloo group of its own."""
    backend = dist.get_backend
    dist.get_backend = lambda *_: dist.Backend("nccl")
    ranks = Ranks()
    dist.get_backend = backend
    store = CheckpointStore(folder)
    store._ranks = ranks
    weight = {"w": torch.ones(4, 2)}
    store.save(1, weight, {}, {})
    weight["w"].zero_()
    store.load(1, weight)
    return ranks.group is not dist.group.WORLD, bool(weight["w"].all())


def test_the_store_needs_no_gloo_as_default_backend(tmp_path: Path):
    assert run_ranks(save_beside_nccl, 2, tmp_path) == [(True, True)] * 2


def save_with_strangers_shape(folder: Path) -> str:
    tensor = DTensor.from_local(
        torch.ones(3 if dist.get_rank() == 0 else 1, 2),
        init_device_mesh("cpu", (2,)),
        [Shard(0)],
        run_check=False,
        shape=torch.Size((4, 2)),
        stride=(2, 1),
    )
    return attempt(lambda: CheckpointStore(folder).save(1, {"w": tensor}, {}, {}))


def test_pieces_of_another_size_than_their_placement_says_are_refused(tmp_path: Path):
    first, second = run_ranks(save_with_strangers_shape, 2, tmp_path)
    assert first == second and "'w' has local shape [3, 2], but its placements imply [2, 2]" in first


def test_the_manifest_lists_whole_tensors(tmp_path: Path):
    run_ranks(save_all, 4, tmp_path)
    model, optimizer = full_tensors()
    for info in CheckpointStore(tmp_path).list():
        tensors = Manifest.read(info.path).tensors
        for part, expected in (("model", model), ("optimizer", optimizer)):
            shapes = {name: entry.shape for name, entry in tensors[part].items()}
            assert shapes == {name: list(tensor.shape) for name, tensor in expected.items()}
        state = json.loads((info.path / "state.json").read_text())
        assert state["step"] == info.step and len(state["ranks"]) == 4


def test_the_error_type_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)  # what the command line prints as one line
