import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpoints.store import CheckpointStore
from checkpoints.tensors import TensorInfo, TensorWriter, open_checkpoint, open_hf, parse_size, split_files
from tests.ranks import run_ranks


def wanted() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "rows": torch.randn(7, 5, generator=generator),  # uneven over 3 ranks
        "columns": torch.randn(4, 6, generator=generator).bfloat16(),
        "whole": torch.randn(3, generator=generator),
        "scalar": torch.tensor(2.5),
    }


def _save_sharded(folder: str) -> None:
    mesh = init_device_mesh("cpu", (3,))
    tensors = wanted()
    tensors["rows"] = distribute_tensor(tensors["rows"], mesh, [Shard(0)])
    tensors["columns"] = distribute_tensor(tensors["columns"], mesh, [Shard(1)])
    CheckpointStore(Path(folder)).save(1, tensors, {}, {}, ties={"alias": "whole"})


def test_tensors_in_pieces_over_files_are_read_whole(tmp_path: Path) -> None:
    run_ranks(_save_sharded, 3, str(tmp_path))
    files = open_checkpoint(tmp_path / "step-00000001")
    assert set(files) == set(wanted())
    for name, tensor in wanted().items():
        assert torch.equal(files.read(name), tensor) and files.infos[name].dtype == tensor.dtype, name


def test_a_checkpoint_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path).save(1, wanted(), {}, {})
    (path / "model/rank-00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"rank-00000.safetensors is missing; use another step"):
        open_checkpoint(path)


def test_written_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6).reshape(2, 3),
        "b": torch.randn(5).half(),
        "c": torch.randn(4, 2),
        "d": torch.ones(0, 3),
    }
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with TensorWriter(tmp_path, {"x.safetensors": infos}, {"x.safetensors": {"format": "pt"}}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in read)


def test_a_file_never_stays_half_filled_unnoticed(tmp_path: Path) -> None:
    info = {"a": TensorInfo((2,), torch.float32), "b": TensorInfo((2,), torch.float32)}
    with (
        pytest.raises(AssertionError, match="never written"),
        TensorWriter(tmp_path, {"x.safetensors": info}, {"x.safetensors": {}}) as writer,
    ):
        writer.write("a", torch.ones(2))


def test_split_keeps_order_and_limit() -> None:
    infos = {str(i): TensorInfo((size,), torch.uint8) for i, size in enumerate((4, 4, 3, 20, 1, 9))}
    assert [list(part) for part in split_files(infos, 10)] == [["0", "1"], ["2"], ["3"], ["4", "5"]]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("700kb", 700_000), ("12", 12)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-3GB", "0", "nan", "5G5B"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"shard size .*: write a number above 0 and a unit"):
        parse_size(text)


def _index(folder: Path, files: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_hf_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing: give a folder with safetensors files$"):
        open_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="pickles and are not read"):
        open_hf(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated: "):
        open_hf(tmp_path)
    path.write_bytes(whole[:20])
    with pytest.raises(ValueError, match="header cannot be read"):
        open_hf(tmp_path)
    _index(tmp_path, {"a": "../secret.safetensors"})
    with pytest.raises(ValueError, match="only files in the same folder are read"):
        open_hf(tmp_path)
    _index(tmp_path, {"a": "model-00001-of-00002.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002.safetensors is missing"):
        open_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        open_hf(tmp_path)


def test_holds_sees_a_single_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints.tensors.PIECE", 64)
    tensor = torch.randn(7, 11)  # 308 bytes: the last part is no multiple of 8
    save_file({"a": tensor, "nan": torch.full((4,), float("nan"))}, tmp_path / "model.safetensors")
    files = open_hf(tmp_path)
    assert files.holds("a", tensor) and files.holds("nan", torch.full((4,), float("nan")))
    for place in (0, 40, 76):
        other = tensor.clone()
        other.view(-1).view(torch.int32)[place] ^= 1
        assert not files.holds("a", other)
    assert not files.holds("a", tensor.double()) and not files.holds("a", tensor.reshape(11, 7))
