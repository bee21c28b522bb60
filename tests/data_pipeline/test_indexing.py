"""`pretrain data index`: shards of webdataset's writer and of img2dataset, several at once, elsewhere too."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline import places, remote
from data_pipeline.cache import CacheOptions
from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.problems import fatal
from data_pipeline.indexing import holds_pictures, index_shards
from data_pipeline.reader import TokenDataset
from launch.cli import main
from tests.data_pipeline.conftest import make_shards, unique_documents
from tests.data_pipeline.images import captioned, small_tokenizer, write_tar
from tests.data_pipeline.servers import serving

TOKENIZER = small_tokenizer()


def token_shards(folder: Path, num_documents: int = 12) -> list[np.ndarray]:
    """By webdataset's own ShardWriter, 4 documents a shard."""
    folder.mkdir()
    documents = unique_documents(range(1, num_documents + 1))
    with webdataset.ShardWriter(str(folder / "t-%05d.tar"), maxcount=4, verbose=0) as writer:
        for number, tokens in enumerate(documents):
            writer.write({"__key__": f"{number:04d}", "tokens": tokens.astype("<u2").tobytes(), "json": {"n": number}})
    return documents


def picture_shards(folder: Path, num_shards: int = 3) -> Path:
    """As img2dataset leaves them, its parquet and json beside them."""
    for shard in range(num_shards):
        name = f"{shard:05d}"
        more = [{"json": {"caption": "one", "status": "success", "url": "u", "width": 20, "height": 12}}] * 3
        write_tar(folder / f"{name}.tar", [captioned(10 * shard + i, **more[i]) for i in range(3)])
        (folder / f"{name}.parquet").write_bytes(b"PAR1")
        (folder / f"{name}_stats.json").write_text("{}")
    return folder


def run(shards: list, **options) -> list:
    return sorted(index_shards(shards, **({"workers": 1, "progress": False} | options)), key=lambda done: done.shard)


def test_token_shards_of_webdataset(tmp_path, monkeypatch) -> None:
    documents = token_shards(tmp_path / "text")
    done = run([tmp_path / "text"], vocab_size=300)
    assert [each.line.partition(": ")[2] for each in done] == [
        "indexed, 4 documents, 10 tokens",
        "indexed, 4 documents, 26 tokens",
        "indexed, 4 documents, 42 tokens",
    ]
    assert not any(each.made for each in run([tmp_path / "text" / "*"], vocab_size=300)), "they have them now"
    assert all(each.made for each in run([tmp_path / "text"], vocab_size=300, force=True))
    monkeypatch.setattr("data_pipeline.index.scan_shard", lambda *_: pytest.fail("scanned again"))
    dataset = TokenDataset(tmp_path / "text" / "*", vocab_size=300)
    assert [dataset.document(number).tolist() for number in range(12)] == [tokens.tolist() for tokens in documents]


def test_picture_shards_of_img2dataset(tmp_path, monkeypatch) -> None:
    folder = picture_shards(tmp_path / "images")
    assert [each.line.partition(": ")[2] for each in run([folder])] == ["indexed, 3 samples, 3 pictures"] * 3
    monkeypatch.setattr("data_pipeline.images.index.scan_pictures", lambda *_: pytest.fail("scanned again"))
    dataset = ImageTextDataset(folder / "*", TOKENIZER, on_problem=fatal)
    assert dataset.num_samples == 9 and len(dataset.paths) == 3 and dataset.picture(4, 0) == captioned(11)["png"]
    assert holds_pictures(folder / "*") and not holds_pictures(make_shards(tmp_path / "t", [np.arange(3)]) / "*.tar")


def test_what_cannot_be_indexed_does_not_end_the_others(tmp_path, capsys) -> None:
    token_shards(tmp_path / "text")
    shards = sorted((tmp_path / "text").glob("*.tar"))
    shards[1].write_bytes(shards[1].read_bytes()[:3000])
    assert main(["data", "index", str(tmp_path / "text"), "--vocab-size", "300", "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert said.count("indexed, 4 documents") == 2 and f"error: {shards[1]}: is no tar that can be read" in said
    assert main(["data", "index", str(shards[0]), "--workers", "1", "--force"]) == 1
    assert "no dataset.json beside it tells the token dtype; give the vocabulary's size" in capsys.readouterr().out
    assert main(["data", "index", str(tmp_path / "none")]) == 2


@pytest.mark.slow
def test_several_processes(tmp_path) -> None:
    folder = picture_shards(tmp_path / "images")
    token_shards(tmp_path / "text")
    done = run([folder, tmp_path / "text"], vocab_size=300, workers=2)
    assert len(done) == 6 and all(each.made for each in done)
    assert len(list(tmp_path.rglob("*.idx"))) == 6


def test_read_only_folders_and_urls_keep_theirs_in_the_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.02)
    folder = picture_shards(tmp_path / "images")
    options = CacheOptions(dir=str(tmp_path / "cache"), retries=1)
    with serving(folder) as server:
        url = f"{server.url}/{{00000..00002}}.tar"
        assert holds_pictures(url, options)
        done = run([url], cache=options)
        assert all(each.made and str(tmp_path / "cache") in each.line for each in done)
        before = dict(server.requests)
        assert not any(each.made for each in run([url], cache=options))
        assert {name: count for name, count in server.requests.items() if name.endswith((".tar", "images.idx"))} == {
            name: count for name, count in before.items() if name.endswith((".tar", "images.idx"))
        }
        write_tar(folder / "00000.tar", [captioned(7)])
        lines = [each.line for each in run([url], cache=options, force=True)]
        assert "1 samples" in lines[0] and server.requests["00000.tar"] == before["00000.tar"] + 1
    monkeypatch.setattr(places.os, "access", lambda path, _: Path(path) != folder)
    done = run([folder], cache=options)
    assert all(each.made and str(tmp_path / "cache") in each.line for each in done)
    assert not list(folder.glob("*.idx"))
    assert not any(each.made for each in run([folder], cache=options))


def test_pictures_elsewhere(tmp_path, monkeypatch, capsys) -> None:
    """With and without an index there; counts of captions are fetched too; broken samples are named by URL."""
    monkeypatch.setattr(remote, "PAUSE", 0.02)
    folder = picture_shards(tmp_path / "images")
    write_tar(folder / "00001.tar", [captioned(10), {"__key__": "bad", "png": b"x", "txt": "a"}, captioned(12)])
    local = ImageTextDataset(folder / "*.tar", TOKENIZER, progress=False)
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    with serving(folder) as server:
        url = f"{server.url}/{{00000..00002}}.tar"
        indexed = ImageTextDataset(url, TOKENIZER, cache=CacheOptions(dir=str(tmp_path / "c1"), gb=1.5 * size / 1e9))
        assert not any(name.endswith(".tar") for name in server.requests)
        assert f"skipped: {server.url}/00001.tar: sample 'bad'" in capsys.readouterr().err
        for path in folder.glob("*.idx"):
            path.unlink()
        bare = ImageTextDataset(url, TOKENIZER, cache=CacheOptions(dir=str(tmp_path / "c2")))
        assert local.fingerprint == indexed.fingerprint == bare.fingerprint
        everything = list(range(local.num_samples))
        for dataset in (indexed, bare):
            assert [len(list(each)) for each in dataset.texts(everything)] == [2] * 8
            for sample in (0, 7, 1, 4, 0):  # back and forth, through a cache of one shard
                assert dataset.picture(sample, 0) == local.picture(sample, 0)
                assert dataset.shard_of(sample) == f"{server.url}/{Path(local.shard_of(sample)).name}"
        assert len(list((tmp_path / "c1").rglob("*.tar"))) == 1
        write_tar(folder / "00002.tar", [captioned(99)])
        (tmp_path / "c1").joinpath(bare.paths[2].parent.name, "00002.tar").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=rf"{server.url}/00002\.tar: fetched twice, and not what its index"):
            indexed.picture(7, 0)
    assert json.loads((folder / "00000_stats.json").read_text()) == {}
