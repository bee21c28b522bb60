"""One process: what a checkpoint holds, how it is committed and pruned, and which damage is noticed."""

import json
import logging
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from checkpoints.collective import CheckpointError
from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore

SHAPES = {"layers.0.attn.q.weight": (5, 4), "layers.0.norm.weight": (4,), "head.weight": (3, 4)}


def make_model(value: float | None = None) -> dict[str, Tensor]:
    if value is not None:
        return {name: torch.full(shape, value) for name, shape in SHAPES.items()}
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in SHAPES.items()}


def save(store: CheckpointStore, step: int, **kwargs) -> Path:
    return store.save(step, make_model(float(step)), {"step": torch.tensor(step)}, {}, **kwargs)


def steps(store: CheckpointStore) -> list[int]:
    return [info.step for info in store.list()]


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_every_kind_of_tensor_and_the_state_come_back_exactly(store: CheckpointStore):
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
    ]
    model = {f"m.{dtype}": (torch.randn(3, 5) * 50).to(dtype) for dtype in kinds}
    model |= {
        "bool": torch.tensor([True, False, True]),
        "uint8": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(1.25),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6).t(),
        "slice": torch.randn(10, 4)[3:7],
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    optimizer = {
        "exp_avg.layers.0.attn.q.weight": torch.randn(4, dtype=torch.float64),
        "step": torch.tensor(7),
    }
    state = {"seed": 1, "nested": {"rng": "AAECAw==", "list": [1, None, True, 0.1]}, "text": "größer"}
    path = store.save(12, model, optimizer, state, rank_state={"cursor": 5})

    into = {name: torch.ones_like(tensor) for name, tensor in model.items()}
    moments = {name: torch.ones_like(tensor) for name, tensor in optimizer.items()}
    loaded = store.load(12, into, moments)
    assert loaded == {**state, "step": 12, "ranks": [{"cursor": 5}]}
    for name, tensor in {**model, **optimizer}.items():
        other = {**into, **moments}[name]
        assert other.dtype == tensor.dtype and torch.equal(bits(other), bits(tensor)), name
    assert path.name == "step-00000012"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "model", "optimizer", "state.json"]


def test_shards_are_plain_safetensors_that_others_read(store: CheckpointStore):
    model = make_model()
    path = store.save(1, model, {}, {})
    with safe_open(path / "model" / "rank-00000.safetensors", "pt") as file:
        assert set(file.keys()) == set(model)
        assert all(torch.equal(file.get_tensor(name), model[name]) for name in model)
    assert list((path / "optimizer").iterdir()) == []


def test_parameters_that_need_gradients_load_in_place(store: CheckpointStore):
    layer = torch.nn.Linear(4, 3)
    store.save(1, layer.state_dict(), {}, {})
    other = torch.nn.Linear(4, 3)
    pointer = other.weight.data_ptr()
    store.load(None, dict(other.named_parameters()))
    assert torch.equal(other.weight, layer.weight) and other.weight.data_ptr() == pointer


def test_a_tie_is_stored_once_and_fills_both_names(store: CheckpointStore):
    weight = torch.randn(6, 4)
    path = store.save(1, {"embed": weight, "head": weight}, {}, {}, ties={"head": "embed"})
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["ties"] == {"head": "embed"} and set(manifest["tensors"]["model"]) == {"embed"}
    both, head_only = {"embed": torch.zeros(6, 4), "head": torch.zeros(6, 4)}, {"head": torch.zeros(6, 4)}
    store.load(1, both)
    store.load(1, head_only)  # as on the last pipeline stage
    assert torch.equal(both["embed"], weight) and torch.equal(both["head"], weight)
    assert torch.equal(head_only["head"], weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"a": torch.ones(2), "b": 3}}, r"model entry 'b' is a int: .* state"),
        ({"model": {"a": torch.ones(2, dtype=torch.complex64)}}, r"'a' has type complex64"),
        ({"model": {"a": torch.ones(2, device="meta")}}, r"'a' is on the meta device"),
        ({"model": dict.fromkeys(("a", "b"), torch.ones(2))}, r"'a' and 'b' share their memory: .*ties"),
        ({"ties": {"head": "nowhere"}}, r"tie 'head' -> 'nowhere'"),
        ({"state": {"a": [{"b": torch.ones(1)}]}}, r"state\.a\[0\]\.b is a Tensor: only JSON"),
        ({"state": {"a": {1: 2}}}, r"state\.a has the key 1: keys must be strings"),
        ({"state": {"ranks": []}}, r"'step' and 'ranks'"),
        ({"rank_state": {"rng": b"x"}}, r"rank_state\.rng is a bytes"),
    ],
)
def test_what_cannot_be_saved_is_named_and_leaves_nothing(store: CheckpointStore, changes: dict, message: str):
    arguments = {"model": {"w": torch.ones(2)}, "optimizer": {}, "state": {}} | changes
    with pytest.raises(CheckpointError, match=message) as caught:
        store.save(1, **arguments)
    assert "\n" not in str(caught.value)
    assert not store.folder.exists() or list(store.folder.iterdir()) == []


# Another architecture, missing checkpoints


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(extra=torch.zeros(2)), r"it lacks model extra; "),
        (lambda m: m.pop("head.weight"), r"only it has model head\.weight; "),
        (
            lambda m: m.update({"head.weight": torch.zeros(4, 4)}),
            r"model head\.weight \(float32 \[3, 4\] there, float32 \[4, 4\] here\)",
        ),
        (lambda m: m.update({"head.weight": torch.zeros(3, 4, dtype=torch.int64)}), r"int64 \[3, 4\] here"),
        (lambda m: m.update({"head.weight": torch.zeros(3, 4, device="meta")}), r"head.weight \(on the meta device"),
        (
            lambda m: m.update({f"n{i}": torch.zeros(1) for i in range(9)}),
            r"n0, model n1, model n2 and 6 more",
        ),
    ],
)
def test_another_architecture_is_refused_before_anything_changes(store: CheckpointStore, change, message: str):
    save(store, 5)
    target = make_model(-1.0)
    change(target)
    before = {name: tensor.clone() for name, tensor in target.items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        store.load(5, target)
    assert "\n" not in str(caught.value) and "step-00000005" in str(caught.value)
    assert all(torch.equal(target[name], before[name]) for name in target if not target[name].is_meta)


def test_a_missing_optimizer_tensor_is_named(store: CheckpointStore):
    save(store, 5)
    with pytest.raises(CheckpointError, match=r"it lacks optimizer exp_avg\.w; only it has optimizer step"):
        store.load(5, make_model(0.0), {"exp_avg.w": torch.zeros(2)})


def test_loading_as_another_float_type_converts(store: CheckpointStore):
    save(store, 5)
    target = {name: tensor.bfloat16() for name, tensor in make_model(0.0).items()}
    store.load(5, target)
    assert all((tensor == 5).all() for tensor in target.values())


def test_missing_checkpoints_are_named(store: CheckpointStore, tmp_path: Path):
    assert store.newest_whole() is None and store.list() == []
    with pytest.raises(FileNotFoundError, match="no whole checkpoint in"):
        store.load(None, {})
    save(store, 5)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 6 in .*: it has steps 5"):
        store.load(6, make_model(0.0))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        store.load(tmp_path / "nowhere", make_model(0.0))


def test_a_checkpoint_loads_by_its_path(store: CheckpointStore, tmp_path: Path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(save(store, 5), moved)
    target = make_model(0.0)
    assert store.load(moved, target)["step"] == 5 and (target["head.weight"] == 5).all()


# Damage


def test_damaged_checkpoints_are_refused_and_passed_over(store: CheckpointStore, caplog):
    for step in (1, 2, 3, 4):
        save(CheckpointStore(store.folder, keep=9), step)
    shard = store.folder / "step-00000002" / "model" / "rank-00000.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    (store.folder / "step-00000003" / "manifest.json").unlink()
    (store.folder / "step-00000004" / "optimizer" / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002/model/rank-00000.safetensors is truncated: \d+ bytes"):
        store.load(2, make_model(0.0))
    with pytest.raises(FileNotFoundError, match=r"step-00000003 has no manifest.json: not a whole checkpoint"):
        store.load(3, make_model(0.0))
    with pytest.raises(CheckpointError, match=r"step-00000004/optimizer/rank-00000.safetensors is missing"):
        store.load(4, make_model(0.0))
    with caplog.at_level(logging.WARNING):
        assert store.newest_whole() == 1
    assert all(f"step-0000000{step}" in caplog.text for step in (2, 3, 4))
    assert [info.problem is None for info in store.list()] == [True, False, False, False]
    assert store.load(None, make_model(0.0))["step"] == 1


def test_a_newer_format_is_refused_with_the_cure(store: CheckpointStore):
    path = save(store, 5) / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 3'))
    with pytest.raises(CheckpointError, match=r"format_version 3, this program reads up to 2: upgrade"):
        store.load(5, make_model(0.0))


def test_a_manifest_cannot_point_outside_its_folder(store: CheckpointStore):
    path = save(store, 5)
    manifest = Manifest.read(path)
    files = {"../secret.safetensors": manifest.files["state.json"], **manifest.files}
    (path / "manifest.json").write_bytes(replace(manifest, files=files).encode())
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(5, make_model(0.0))


def test_verify_finds_every_flipped_bit(store: CheckpointStore):
    path = save(store, 5)
    assert store.verify(5) == []
    files = [file for file in path.rglob("*") if file.is_file()]
    rng = random.Random(0)
    for _ in range(1000):
        file = rng.choice(files)
        bit = rng.randrange(file.stat().st_size * 8)
        flip_bit(file, bit)
        assert any(str(file) in problem for problem in store.verify(5)), (file, bit)
        flip_bit(file, bit)
    assert store.verify(5) == []


def test_a_flipped_bit_in_the_state_is_noticed_when_loading(store: CheckpointStore):
    flip_bit(save(store, 5) / "state.json", 20)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        store.load(5, make_model(0.0))


def test_verify_names_missing_truncated_and_foreign_files(store: CheckpointStore):
    path = save(store, 5)
    (path / "model" / "rank-00000.safetensors").unlink()
    os.truncate(path / "state.json", 3)
    (path / "model" / "notes.txt").write_text("?")
    (path / "extra").mkdir()
    problems = store.verify(5)
    assert len(problems) == 4
    expected_problems = (
        "00000.safetensors is missing",
        "state.json is truncated",
        "notes.txt does",
        "extra does",
    )
    for expected in expected_problems:
        assert any(expected in problem for problem in problems), expected
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 6"):
        store.verify(6)


def test_verify_reports_progress_of_all_bytes(store: CheckpointStore):
    save(store, 5)
    seen: list[int] = []
    store.verify(5, seen.append)
    assert sum(seen) == store.list()[0].bytes


# Commit and retention


def test_the_newest_and_every_nth_are_kept(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=2, keep_every=20)
    for step in range(10, 80, 10):
        save(store, step)
    assert steps(store) == [20, 40, 60, 70]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-000000{step}" for step in (20, 40, 60, 70)]


def test_broken_checkpoints_do_not_push_out_whole_ones(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        save(store, step)
    (tmp_path / "step-00000003" / "state.json").unlink()
    save(store, 4)
    assert steps(store) == [2, 3, 4]


def test_the_step_just_saved_is_kept_below_older_runs_steps(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 50)
    save(store, 10)
    assert 10 in steps(store)


def test_the_same_step_is_replaced(store: CheckpointStore):
    save(store, 5)
    store.save(5, make_model(8.0), {}, {"new": True})
    target = make_model(0.0)
    assert store.load(5, target)["new"] and (target["head.weight"] == 8).all()
    assert [p.name for p in store.folder.iterdir()] == ["step-00000005"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step 5 was not saved in .*file.*Not a directory") as caught:
        save(CheckpointStore(tmp_path / "file" / "checkpoints"), 5)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"Permission denied.*make the folder writable"):
        save(CheckpointStore(tmp_path / "checkpoints"), 5)
