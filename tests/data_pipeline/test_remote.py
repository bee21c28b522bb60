"""Shards that are elsewhere: the same documents, fetched when needed, and sources that fail."""

import re
import sys
import time

import fsspec
import numpy as np
import pytest

from data_pipeline import remote
from data_pipeline.cache import CacheOptions
from data_pipeline.inspection import inspect_shards
from data_pipeline.loader import Loader
from data_pipeline.pack import TokenStream
from data_pipeline.reader import TokenDataset
from data_pipeline.shards import DatasetInfo
from tests.data_pipeline.conftest import make_shards, unique_documents
from tests.data_pipeline.images import small_tokenizer
from tests.data_pipeline.servers import serving

LENGTHS = [400, 1, 900, 300, 200, 800, 700, 650]
DOCUMENTS = unique_documents(LENGTHS)
BRACES = "train-{00000..00003}.tar"


@pytest.fixture
def source(tmp_path):
    """A folder with 4 shards, and its server."""
    folder = make_shards(tmp_path / "source", DOCUMENTS, num_shards=4, vocab_size=5000)
    with serving(folder) as server:
        yield folder, server


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.02)
    return CacheOptions(dir=str(tmp_path / "cache"), retries=2, timeout=5.0)


def read(dataset: TokenDataset) -> list[list[int]]:
    return [dataset.document(index).tolist() for index in range(dataset.num_documents)]


def test_every_way_gives_the_same_documents(source, options) -> None:
    folder, server = source
    small_tokenizer().save(folder / "tokenizer")
    local = TokenDataset(folder / BRACES)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/corpus", recursive=True)
    patterns = [
        f"{server.url}/{BRACES}",
        f"{server.url}/train-*.tar",
        f"{server.url}/*",  # sidecars are left out
        "memory://corpus/train-*.tar",
        f"memory://corpus/{BRACES}",
        f"pipe:cat '{folder}/{BRACES}'",
        f"file://{folder}/train-*.tar",
    ]
    for pattern in patterns:
        dataset = TokenDataset(pattern, vocab_size=5000, cache=options)
        assert read(dataset) == [tokens.tolist() for tokens in DOCUMENTS], pattern
        assert dataset.fingerprint == local.fingerprint
        assert (dataset.info is None) == pattern.startswith("pipe:")
        assert [dataset.key(index) for index in range(8)] == [local.key(index) for index in range(8)]
    memory.rm("/corpus", recursive=True)
    assert TokenDataset(f"{server.url}/train-{{00001,00000}}.tar", cache=options).fingerprint != local.fingerprint
    dataset = TokenDataset(f"{server.url}/{BRACES}", cache=options)
    assert dataset.names[1] == f"{server.url}/train-00001.tar"
    assert small_tokenizer().fingerprint and (dataset.paths[0].parent / "tokenizer" / "tokenizer.json").is_file()
    assert inspect_shards(folder / BRACES)[3] == "  ids  " + " ".join(map(str, range(64)))


def test_a_shard_is_fetched_when_it_is_needed_and_once(source, options) -> None:
    _, server = source
    dataset = TokenDataset(f"{server.url}/{BRACES}", cache=options)
    assert not any(name.endswith(".tar") for name in server.requests)
    out = np.concatenate(dataset.views(np.array([3, 6]), np.array([100, 50]), np.array([200, 400])))
    assert out.tolist() == [*DOCUMENTS[3][100:300].tolist(), *DOCUMENTS[6][50:450].tolist()]
    assert server.requests["train-00001.tar"] == server.requests["train-00003.tar"] == 1
    assert not server.requests["train-00000.tar"]
    read(dataset)
    again = TokenDataset(f"{server.url}/{BRACES}", cache=options)
    read(again)
    assert {name: count for name, count in server.requests.items() if ".tar" in name and count > 1} == {}
    assert not again.paths[0].parent.joinpath("tokenizer").exists(), "what the source lacks leaves no empty folder"


def test_without_an_index_the_shard_is_scanned_once(source, options) -> None:
    folder, server = source
    for path in [*folder.glob("*.idx"), folder / "dataset.json"]:
        path.unlink()
    for _ in range(2):
        dataset = TokenDataset(f"{server.url}/{BRACES}", vocab_size=5000, cache=options)
        assert dataset.lengths.tolist() == LENGTHS
    assert [server.requests[f"train-0000{number}.tar"] for number in range(4)] == [1] * 4
    assert server.requests["train-00000.tar.idx"] == 1
    with pytest.raises(ValueError, match=r"has no dataset\.json to tell the token dtype"):
        TokenDataset(f"{server.url}/{BRACES}", cache=options)


def test_failures_are_tried_again_and_said(source, options, capsys) -> None:
    _, server = source
    url = f"{server.url}/train-00000.tar"
    server.failures["train-00000.tar"] = ["503", "cut"]
    server.failures["train-00000.tar.idx"] = ["500", "429"]
    dataset = TokenDataset(url, cache=options)
    assert read(dataset) == [tokens.tolist() for tokens in DOCUMENTS[:2]]
    said = capsys.readouterr().err
    assert f"{url}: attempt 1 of 3 failed (HTTP Error 503: Service Unavailable); again in " in said
    assert re.search(rf"{url}: attempt 2 of 3 failed \(ConnectionError: ended after \d+ of \d+ bytes\); again", said)
    assert server.requests["train-00000.tar"] == server.requests["train-00000.tar.idx"] == 3
    server.failures["train-00001.tar"] = ["503"] * 3
    dataset = TokenDataset(f"{server.url}/train-00001.tar", cache=options)
    with pytest.raises(OSError, match=rf"{server.url}/train-00001\.tar: 3 attempts failed, the last one: HTTP Error"):
        read(dataset)
    assert read(dataset), "asked again, it is there"


def test_what_is_not_there_is_not_tried_again(source, options) -> None:
    _, server = source
    url = f"{server.url}/none.tar"
    with pytest.raises(FileNotFoundError, match=rf"{url}: not there, or not allowed \(HTTP Error 404") as caught:
        TokenDataset(url, vocab_size=5000, cache=options)
    assert server.requests["none.tar"] == 1 and "\n" not in str(caught.value)
    server.failures["train-00000.tar"] = ["400"]
    dataset = TokenDataset(f"{server.url}/train-00000.tar", cache=options)
    with pytest.raises(ValueError, match=r"cannot be read \(HTTP Error 400"):
        read(dataset)
    assert server.requests["train-00000.tar"] == 1
    with pytest.raises(FileNotFoundError, match=r"nothing there matches http.*none-\*"):
        TokenDataset(f"{server.url}/none-*.tar", cache=options)
    with pytest.raises(ValueError, match="unbalanced braces"):
        TokenDataset(f"{server.url}/train-{{0..3.tar", cache=options)


def test_one_bad_shard_of_many_ends_the_others(source, options) -> None:
    folder, server = source
    dataset = TokenDataset(f"{server.url}/{BRACES}", cache=options)
    server.failures = {f"train-0000{number}.tar": ["stall"] * 3 for number in (0, 2, 3)}
    (folder / "train-00001.tar").unlink()
    begun = time.monotonic()
    with pytest.raises(FileNotFoundError, match=rf"{server.url}/train-00001.tar: not there"):
        dataset.views(np.arange(8), np.zeros(8, int), np.array(LENGTHS))
    assert time.monotonic() - begun < 3
    server.failures.clear()
    assert dataset.document(0).tolist() == DOCUMENTS[0].tolist(), "others are not given up for ever"


def test_a_source_that_stalls_or_is_slow_says_so(source, options, monkeypatch, capsys) -> None:
    _, server = source
    monkeypatch.setattr(remote, "SAY_EVERY", 0.2)
    impatient = CacheOptions(dir=options.dir, retries=1, timeout=0.6)
    url = f"{server.url}/train-00000.tar"
    dataset = TokenDataset(url, cache=impatient)
    server.failures["train-00000.tar"] = ["stall", "stall"]
    with pytest.raises(OSError, match=rf"{url}: 2 attempts failed, the last one: TimeoutError: .*"):
        read(dataset)
    said = capsys.readouterr().err
    assert re.search(rf"fetching {url}: \d\.\d of 0\.0 MB after \d+ s, attempt 1 of 2", said)
    server.failures["train-00000.tar"] = ["slow"]  # 0.4 s without an end, but never 0.6 s without a byte
    assert read(dataset) == [tokens.tolist() for tokens in DOCUMENTS[:2]]


def test_a_file_that_changes(source, options, capsys, tmp_path) -> None:
    folder, server = source
    url = f"{server.url}/train-00000.tar"
    dataset = TokenDataset(url, cache=options)
    server.failures["train-00000.tar"] = ["flip"]
    assert read(dataset) == [tokens.tolist() for tokens in DOCUMENTS[:2]]
    assert re.search(
        rf"{url}: not what its index was made for \(\d+ bytes with sha256 .*once more", capsys.readouterr().err
    )
    dataset.paths[0].unlink()
    dataset = TokenDataset(url, cache=options)
    other = make_shards(folder / "other", unique_documents([5, 5]), vocab_size=5000)
    (other / "train-00000.tar").replace(folder / "train-00000.tar")
    with pytest.raises(ValueError, match=rf"{url}: fetched twice, and not what its index .*; restore it there"):
        read(dataset)
    assert not list(dataset.paths[0].parent.glob("*.tar")) and not list(tmp_path.rglob("*.*.partial"))


def test_an_index_elsewhere_with_nonsense(source, options) -> None:
    folder, server = source
    (folder / "train-00000.tar.idx").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a shard index"):
        TokenDataset(f"{server.url}/train-00000.tar", cache=options)
    DatasetInfo(vocab_size=5000, dtype="uint16", eos_id=0, tokenizer="../../other").save(folder)
    with pytest.raises(ValueError, match=r"names the tokenizer '\.\./\.\./other', outside its folder"):
        TokenDataset(f"{server.url}/train-00001.tar", cache=CacheOptions(dir=options.dir + "2"))


def test_commands(source, options, tmp_path) -> None:
    folder, _ = source
    bad = [
        ("pipe:no-such-program x", FileNotFoundError, "pipe:no-such-program x: not there"),
        ("pipe:cat x | gzip", ValueError, "without a shell"),
        ("pipe:", ValueError, "without a shell"),
        (f"pipe:{sys.executable} -c 'import sys; sys.exit(chr(66))'", OSError, r"3 attempts failed.*exit status 1: B"),
        ("pipe:echo $HOME", ValueError, "truncated or not a tar"),
    ]
    for command, error, message in bad:
        with pytest.raises(error, match=message):
            TokenDataset(command, vocab_size=5000, cache=options)
    marker = tmp_path / "a;touch b"
    marker.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (marker / path.name).write_bytes(path.read_bytes())
    dataset = TokenDataset(f"pipe:cat '{marker}/train-00000.tar'", vocab_size=5000, cache=options)
    assert read(dataset) == [tokens.tolist() for tokens in DOCUMENTS[:2]]
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"1 attempts failed, the last one: TimeoutError: no byte for 0\.4 s"):
        TokenDataset("pipe:sleep 30", vocab_size=9, cache=CacheOptions(dir=options.dir, retries=0, timeout=0.4))
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("world", [2, 4])
def test_fewer_shards_than_ranks(source, options, world) -> None:
    _, server = source
    stream = TokenStream(TokenDataset(f"{server.url}/train-00001.tar", cache=options), seq_len=16, seed=3)
    whole = next(Loader(stream, global_batch=8, micro_batch=8, prefetch=0))[0][0]["tokens"].numpy()
    parts = []
    for rank in range(world):
        dataset = TokenDataset(f"{server.url}/train-00001.tar", cache=options)
        loader = Loader(
            TokenStream(dataset, seq_len=16, seed=3), global_batch=8, micro_batch=2, rank=rank, world=world, prefetch=1
        )
        with loader:
            parts += [batch["tokens"].numpy() for batch in next(loader)[0]]
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_store_whose_library_is_missing(options, monkeypatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote.fsspec.core, "url_to_fs", missing)
    with pytest.raises((ValueError, OSError), match=r"s3://b/dataset\.json: .*pip install 'pretrain-stack\[remote\]'"):
        TokenDataset("s3://b/a.tar", vocab_size=9, cache=options)
    with pytest.raises((ValueError, OSError), match=r"pip install 'pretrain-stack\[remote\]'"):
        TokenDataset("s3://b/*.tar", vocab_size=9, cache=options)


def test_secrets_are_not_said() -> None:
    assert remote.shown("https://me:word@host/a.tar?X-Signature=abc") == "https://host/a.tar"
    assert remote.beside("https://host/a.tar?key=1", ".idx") == "https://host/a.tar.idx?key=1"
    assert remote.beside("s3://bucket/a?b.tar", ".idx") == "s3://bucket/a?b.tar.idx"
