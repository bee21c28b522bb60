"""An index is believed only if it fits its shard."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipeline.index import ShardIndex, scan_shard
from data_pipeline.reader import TokenDataset
from tests.data_pipeline.conftest import unique_documents


def corrupt(shard: Path, **changes) -> None:
    path = shard.with_name(shard.name + ".idx")
    index = ShardIndex.load(path)
    ShardIndex(**{**vars(index), **changes}).save(path)


def test_index_that_disagrees_with_its_shard(write_shards) -> None:
    shard = write_shards(unique_documents([10, 20])) / "train-00000.tar"
    path = shard.with_name(shard.name + ".idx")
    good = path.read_bytes()
    index = ShardIndex.load(path)
    cases = [
        ({"shard_size": index.shard_size + 512}, "truncated: .* its index was made for"),
        ({"shard_size": index.shard_size - 512}, "changed: .* its index was made for"),
        ({"lengths": index.lengths + 10**6}, "index disagrees with it: document 0 at bytes 512"),
        ({"offsets": index.offsets * [1, -1]}, "index disagrees with it: document 1"),
        ({"offsets": index.offsets + 1}, "index disagrees with it"),
        ({"lengths": index.lengths[:1]}, "arrays of different lengths"),
    ]
    for changes, message in cases:
        path.write_bytes(good)
        corrupt(shard, **changes)
        with pytest.raises(ValueError, match=message):
            TokenDataset(shard)
    path.write_bytes(good[:50])
    with pytest.raises(ValueError, match="not a shard index"):
        TokenDataset(shard)


def test_index_of_another_place_in_the_same_tar(write_shards) -> None:
    """Inside the file, and on blocks: only the tar's own headers tell."""
    shard = write_shards(unique_documents([300, 1, 300, 1])) / "train-00000.tar"
    path = shard.with_name(shard.name + ".idx")
    good = path.read_bytes()
    index = ShardIndex.load(path)
    ones = np.ones(4, np.int64)
    keys = index.keys.copy()
    keys[-1] = keys[0]
    cases = [
        ({"offsets": index.offsets + 512}, "document 0 is '000000.tokens' with 600 bytes at 1024, there is no member"),
        ({"offsets": index.offsets + 512 * np.array([0, 0, 0, 1])}, "document 3 is .*, there is no member"),
        ({"offsets": index.offsets + 1024 * np.array([0, 0, 0, 1])}, "document 3 .* there is '000003.json'"),
        ({"lengths": index.lengths - ones}, "document 0 is .* with 598 bytes at 512, there is .* with 600 bytes"),
        ({"keys": keys}, "document 3 is '000000.tokens' with 2 bytes .* there is '000003.tokens'"),
        ({"offsets": index.offsets[[0, 2, 1, 3]]}, "document 2 at bytes"),
    ]
    for changes, message in cases:
        path.write_bytes(good)
        corrupt(shard, **changes)
        with pytest.raises(ValueError, match=f"its index disagrees with it: {message}.*remove train-00000.tar.idx"):
            TokenDataset(shard)
    path.unlink()  # the cure
    assert TokenDataset(shard).num_documents == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "banana"}, "dtype 'banana', must be uint16 or uint32"),
        ({"dtype": "float64"}, "dtype 'float64'"),
        ({"shard_size": "512"}, "shard_size is '512', not of type int"),
        ({"max_token": None}, "max_token is None"),
        ({"format_version": 99}, "newer version"),
        ({"format_version": "x"}, "not supported between"),
    ],
)
def test_index_with_nonsense_facts(write_shards, changes, message) -> None:
    shard = write_shards(unique_documents([10, 20])) / "train-00000.tar"
    path = shard.with_name(shard.name + ".idx")
    index = ShardIndex.load(path)
    facts = {name: getattr(index, name) for name in ("dtype", "shard_size", "sha256", "max_token")}
    blob = json.dumps({"format_version": 1, **facts, **changes})
    save_file(load_file(path), path, metadata={"shard": blob})
    with pytest.raises(ValueError, match=f"not a shard index .*{message}.*; remove it") as caught:
        TokenDataset(shard)
    assert "\n" not in str(caught.value)
    save_file(load_file(path), path, metadata={"shard": "3"})
    with pytest.raises(ValueError, match="not a shard index"):
        TokenDataset(shard)


def test_index_with_arrays_of_another_type(write_shards) -> None:
    shard = write_shards(unique_documents([10, 20])) / "train-00000.tar"
    for changes in ({"lengths": np.array([10.0, 20.0])}, {"keys": np.zeros(2, np.uint8)}):
        corrupt(shard, **changes)
        with pytest.raises(ValueError, match=r"not a shard index \(array (lengths|keys) is"):
            TokenDataset(shard)
        shard.with_name(shard.name + ".idx").unlink()
        TokenDataset(shard)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("key", ["short", "./a/b", "x" * 60 + "/" + "y" * 60, "\u00fcber", "\udcff"])
def test_tars_of_others_fit_their_own_index(tmp_path, form, key) -> None:
    """Long and foreign names stand in extended headers."""
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w", format=form) as archive:
        for number in range(3):
            info = tarfile.TarInfo(f"{key}{number}.tokens")
            info.size = 2 * (number + 1)
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    for _ in range(2):  # scanned, then from the kept index, with its check
        dataset = TokenDataset(shard, vocab_size=10)
        assert dataset.lengths.tolist() == [1, 2, 3]
        assert dataset.key(2) == f"{key}2".encode(errors="surrogateescape").decode(errors="replace")


def test_scan_says_how_far_it_is(write_shards, monkeypatch) -> None:
    shard = write_shards(unique_documents([5] * 50)) / "train-00000.tar"
    monkeypatch.setattr("data_pipeline.index.MEMBERS_AT_ONCE", 10)
    steps: list[int] = []
    scan_shard(shard, "uint16", steps.append)
    assert len(steps) == 11 and min(steps) > 0 and sum(steps) == shard.stat().st_size
