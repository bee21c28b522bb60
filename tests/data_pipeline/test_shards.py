"""Shards on disk: what webdataset reads in ours, what we read in webdataset's, and what is refused."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.index import ShardIndex
from data_pipeline.reader import TokenDataset
from data_pipeline.shards import ShardWriter, tar_header
from tests.data_pipeline.conftest import make_shards, unique_documents


def webdataset_shard(path: Path, documents: list[np.ndarray], dtype: str = "uint16") -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for number, tokens in enumerate(documents):
            about = {"text_bytes": 4 * len(tokens)}
            payload = np.asarray(tokens, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
            writer.write({"__key__": f"sub/doc{number}", "tokens": payload, "json": about})
    return path


def test_webdataset_reads_our_shards(write_shards) -> None:
    documents = unique_documents([5, 600, 1, 0, 33])
    folder = write_shards(documents)
    samples = list(webdataset.WebDataset(str(folder / "train-00000.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{number:06d}" for number in range(5)]
    for sample, tokens in zip(samples, documents, strict=True):
        assert np.frombuffer(sample["tokens"], "<u2").tolist() == tokens.tolist()
        assert sample["json"]["num_tokens"] == len(tokens)
        assert sample["json"]["text_bytes"] == 3 * len(tokens)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, "uint16"), (100_000, "uint32")])
def test_shards_of_webdatasets_writer_are_indexed_on_first_use(tmp_path, vocab_size, dtype) -> None:
    documents = [np.array([1, 2, 999]), np.arange(700), np.array([5])]
    shard = webdataset_shard(tmp_path / "made-elsewhere.tar", documents, dtype)
    for _ in range(2):  # scanned, then from the kept index
        dataset = TokenDataset(shard, vocab_size=vocab_size)
        assert [dataset.document(index).tolist() for index in range(3)] == [tokens.tolist() for tokens in documents]
        assert dataset.key(1) == "sub/doc1"
        assert dataset.num_text_bytes == 4 * 704
    index = ShardIndex.load(tmp_path / "made-elsewhere.tar.idx")
    assert index.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert index.max_token == 999


def test_our_index_equals_a_scan(write_shards) -> None:
    shard = write_shards(unique_documents([3, 500, 0, 7])) / "train-00000.tar"
    path = shard.with_name(shard.name + ".idx")
    written = ShardIndex.load(path)
    path.unlink()
    TokenDataset(shard)
    scanned = ShardIndex.load(path)
    for name, value in vars(written).items():
        assert np.array_equal(value, getattr(scanned, name)), name


def test_shards_without_any_description_need_a_vocabulary(tmp_path) -> None:
    shard = webdataset_shard(tmp_path / "a.tar", [np.arange(4)])
    with pytest.raises(ValueError, match="give vocab_size"):
        TokenDataset(shard)


def test_wrong_dtype_is_noticed(tmp_path) -> None:
    odd = webdataset_shard(tmp_path / "odd.tar", [np.arange(3)])
    with pytest.raises(ValueError, match=r"6 bytes, not a multiple of uint32's 4"):
        TokenDataset(odd, vocab_size=100_000)
    even = webdataset_shard(tmp_path / "even.tar", [np.array([70_000, 3])], "uint32")
    with pytest.raises(ValueError, match=r"holds token 4464, the tokenizer's vocabulary has 1000"):
        TokenDataset(even, vocab_size=1000)
    folder = make_shards(tmp_path / "wide", [np.arange(4)], vocab_size=100_000)
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(description | {"dtype": "uint16"}))
    with pytest.raises(ValueError, match="holds uint32 tokens, uint16 is expected"):
        TokenDataset(folder / "train-*.tar")


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("kept", [0.4, 0.97])
def test_truncated_tar(write_shards, indexed, kept) -> None:
    shard = write_shards(unique_documents([900])) / "train-00000.tar"
    if not indexed:
        shard.with_name(shard.name + ".idx").unlink()
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=r"train-00000\.tar: truncated"):
        TokenDataset(shard)


def test_tar_cut_between_members_is_truncated_too(write_shards) -> None:
    shard = write_shards(unique_documents([10, 10])) / "train-00000.tar"
    shard.with_name(shard.name + ".idx").unlink()
    shard.write_bytes(shard.read_bytes()[: 4 * 512])  # the first document, whole
    with pytest.raises(ValueError, match="no end-of-archive mark"):
        TokenDataset(shard)


def test_tar_of_something_else(tmp_path) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("1.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(ValueError, match=r"no \.tokens member \(found: jpg\)"):
        TokenDataset(path, vocab_size=10)
    path.write_bytes(b"not a tar at all" * 100)
    with pytest.raises(ValueError, match="truncated or not a tar"):
        TokenDataset(path, vocab_size=10)


def test_failed_write_leaves_nothing(tmp_path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a.tar", "uint16") as writer:
        writer.add("1", np.arange(3), {}, text_bytes=3)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_token_beyond_the_dtype_is_refused_not_wrapped(tmp_path) -> None:
    with pytest.raises(ValueError, match="70000"), ShardWriter(tmp_path / "a.tar", "uint16") as writer:
        writer.add("1", np.array([70_000]), {}, text_bytes=3)


@pytest.mark.parametrize(("name", "size"), [("a.tokens", 5), ("x" * 100, 8**11 - 1), ("ü.json", 0)])
def test_headers_are_tarfiles(name, size) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    header = tar_header(name.encode(), size)
    assert len(header) == 512
    read = tarfile.TarInfo.frombuf(header, "utf-8", "strict")  # checks the checksum
    assert (read.name, read.size, read.mode, read.mtime, read.isreg()) == (name, size, 0o644, 0, True)


@pytest.mark.parametrize(("name", "size"), [("x" * 101, 5), ("a", 8**11)])
def test_headers_that_do_not_fit_are_refused(name, size) -> None:
    with pytest.raises(ValueError, match="at most 100 bytes"):
        tar_header(name.encode(), size)
