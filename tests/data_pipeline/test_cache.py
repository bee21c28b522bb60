"""The cache of shards: its bound, its sharing between threads and processes, what a killed fetch leaves."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import cache as cache_module
from data_pipeline import places, remote
from data_pipeline.cache import CacheOptions, ShardCache
from data_pipeline.reader import TokenDataset
from tests.data_pipeline.conftest import make_shards, unique_documents
from tests.data_pipeline.servers import serving
from tests.ranks import run_ranks

DOCUMENTS = unique_documents([5000] * 6)
SHARDS = "train-{00000..00005}.tar"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """6 shards of about 12 KB, and their server."""
    monkeypatch.setattr(remote, "PAUSE", 0.02)
    monkeypatch.setattr(cache_module, "TOUCH_EVERY", 0.0)
    folder = make_shards(tmp_path / "source", DOCUMENTS, num_shards=6, vocab_size=40000)
    with serving(folder) as server:
        yield folder, server


def held(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.tar"))


def test_the_least_recently_used_make_room(source, tmp_path) -> None:
    folder, server = source
    size = (folder / "train-00000.tar").stat().st_size
    options = CacheOptions(dir=str(tmp_path / "cache"), gb=3.5 * size / 1e9)
    dataset = TokenDataset(f"{server.url}/{SHARDS}", cache=options)
    views = []
    for number, kept in [(0, "0"), (1, "01"), (2, "012"), (0, "012"), (3, "023"), (4, "034"), (1, "134")]:
        (view,) = dataset.views(np.array([number]), np.array([0]), np.array([5000]))
        assert np.array_equal(view, DOCUMENTS[number])
        assert held(tmp_path / "cache") == [f"train-0000{name}.tar" for name in kept], number
        views.append((number, dataset.document(number)))
        time.sleep(0.02)  # file systems' clocks are coarse
    assert all(np.array_equal(view, DOCUMENTS[number]) for number, view in views), "removed files stay mapped"
    assert server.requests["train-00001.tar"] == 2 and server.requests["train-00000.tar"] == 1
    assert sum(tokens is not None for tokens in dataset._maps) <= 4, "maps of removed files hold the disk"


def test_more_shards_at_once_than_fit(source, tmp_path) -> None:
    """They wait for one another, and none is fetched twice."""
    folder, server = source
    size = (folder / "train-00000.tar").stat().st_size
    options = CacheOptions(dir=str(tmp_path / "cache"), gb=2.5 * size / 1e9)
    dataset = TokenDataset(f"{server.url}/{SHARDS}", cache=options)
    most, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.002):
            most = max(most, sum(stat.st_size for _, stat in cache_module._files(tmp_path / "cache")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = np.concatenate(dataset.views(np.arange(6), np.zeros(6, int), np.full(6, 5000)))
    stop.set()
    watcher.join()
    assert np.array_equal(out, np.arange(30000)) and most <= 2.5 * size
    assert [server.requests[f"train-0000{number}.tar"] for number in range(6)] == [1] * 6


def test_a_shard_larger_than_the_cache(source, tmp_path) -> None:
    _, server = source
    dataset = TokenDataset(f"{server.url}/{SHARDS}", cache=CacheOptions(dir=str(tmp_path / "cache"), gb=5e-6))
    with pytest.raises(
        ValueError, match=r"train-00000\.tar: .*do not fit the cache .*data\.cache\.gb = 5e-06"
    ) as caught:
        dataset.document(0)
    assert "\n" not in str(caught.value)
    for options in ({"gb": 0}, {"retries": -1}, {"timeout": 0}, {"dir": ""}):
        with pytest.raises(ValueError, match="needs a folder, gb and timeout above 0"):
            CacheOptions(**options)


def test_a_full_disk(source, tmp_path, monkeypatch) -> None:
    """The bound is what the disk has, less what is left free."""
    _, server = source
    usage = cache_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage._replace(free=int(cache_module.SPARE) + 500))
    dataset = TokenDataset(f"{server.url}/{SHARDS}", cache=CacheOptions(dir=str(tmp_path / "cache")))
    with pytest.raises(ValueError, match=r"do not fit the cache .* of 0\.000 GB"):
        dataset.document(0)


def test_many_readers_fetch_a_shard_once(source, tmp_path, monkeypatch) -> None:
    _, server = source
    monkeypatch.setattr(remote, "SAY_EVERY", 0.1)
    options = CacheOptions(dir=str(tmp_path / "cache"))
    for number in range(6):
        server.failures[f"train-0000{number}.tar"] = ["slow"]

    def read(_: int) -> bool:
        dataset = TokenDataset(f"{server.url}/{SHARDS}", cache=options)
        return all(np.array_equal(dataset.document(number), DOCUMENTS[number]) for number in range(6))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    assert {name: count for name, count in server.requests.items() if ".tar" in name and count > 1} == {}


def read_in_rank(url: str, folder: str) -> list[int]:
    dataset = TokenDataset(url, cache=CacheOptions(dir=folder, gb=3.5e-5))
    return [int(dataset.document(number).sum()) for number in range(6) for _ in range(2)]


@pytest.mark.slow
def test_processes_share_the_cache(source, tmp_path) -> None:
    _, server = source
    found = run_ranks(read_in_rank, 2, f"{server.url}/{SHARDS}", str(tmp_path / "cache"), timeout=120)
    assert found == [[int(tokens.sum()) for tokens in DOCUMENTS for _ in range(2)]] * 2
    assert max(server.requests[f"train-0000{number}.tar"] for number in range(6)) <= 2
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= 35000


def test_what_a_killed_fetch_leaves_is_removed(source, tmp_path) -> None:
    _, server = source
    options = CacheOptions(dir=str(tmp_path / "cache"))
    dataset = TokenDataset(f"{server.url}/{SHARDS}", cache=options)
    folder = tmp_path / "cache" / ".partial"
    torn, other = (folder / f"{dataset.paths[0].parent.name}-train-0000{n}.tar.abc.partial" for n in (0, 3))
    for path in (torn, other):
        path.write_bytes(bytes(9000))
    dataset.document(0)
    assert not torn.exists() and other.exists()
    small = TokenDataset(f"{server.url}/{SHARDS}", cache=CacheOptions(dir=options.dir, gb=1.5e-5))
    small.document(1)
    assert not other.exists(), "it counted, and made room"


def test_a_damaged_file_in_the_cache_is_fetched_again(source, tmp_path, capsys) -> None:
    _, server = source
    options = CacheOptions(dir=str(tmp_path / "cache"))
    TokenDataset(f"{server.url}/{SHARDS}", cache=options).document(0)
    dataset = TokenDataset(f"{server.url}/{SHARDS}", cache=options)
    os.truncate(dataset.paths[0], 4096)
    assert np.array_equal(dataset.document(0), DOCUMENTS[0])
    assert "truncated: 4096 bytes, its index was made for" in capsys.readouterr().err


def test_a_folder_that_cannot_be_used(source, tmp_path) -> None:
    _, server = source
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache\.dir = '.*/file': cannot be used .*; choose another"):
        TokenDataset(f"{server.url}/{SHARDS}", cache=CacheOptions(dir=str(tmp_path / "file")))


def test_names_in_the_cache_stay_inside(tmp_path) -> None:
    cache = ShardCache(CacheOptions(dir=str(tmp_path)))
    urls = [
        "http://h/a/train-0.tar",
        "http://h/b/train-0.tar",
        "http://h/a/train-0.tar?x=1",
        "http://h/a/../../..",
        "http://h/a/.tar",
        "http://h/get?file=/../../a.tar",
        "s3://b/k%2F..%2Fa.tar",
        "pipe:cat ../../a.tar",
        "pipe:cat ../../b.tar",
        "http://h/a/TRAIN 0",
    ]
    paths = [cache.path(url) for url in urls]
    assert len(set(paths)) == len(urls)
    for path in paths:
        assert path.resolve().parent.parent == tmp_path.resolve() and path.name.endswith(".tar")
        assert path.name not in (".tar", "..tar") and not path.name.startswith(".")
    assert paths[0].parent == paths[2].parent != paths[1].parent and paths[0].name == "train-0.tar"


def test_indexes_of_folders_that_cannot_be_written(source, tmp_path, monkeypatch) -> None:
    """They are kept in the cache, and found there."""
    folder, _ = source
    for path in folder.glob("*.idx"):
        path.unlink()
    monkeypatch.setattr(places.os, "access", lambda path, _: Path(path) != folder)
    options = CacheOptions(dir=str(tmp_path / "cache"))
    first = TokenDataset(folder / SHARDS, cache=options, progress=False)
    assert not list(folder.glob("*.idx")) and len(list((tmp_path / "cache").rglob("*.idx"))) == 6
    monkeypatch.setattr("data_pipeline.index.scan_shard", lambda *_: pytest.fail("scanned again"))
    assert TokenDataset(folder / SHARDS, cache=options).fingerprint == first.fingerprint
