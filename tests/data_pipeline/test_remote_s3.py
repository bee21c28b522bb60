"""Shards in an S3 bucket, of a server on this machine."""

import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from data_pipeline import remote
from data_pipeline.cache import CacheOptions
from data_pipeline.reader import TokenDataset
from tests.data_pipeline.conftest import make_shards, unique_documents

pytestmark = pytest.mark.slow
LENGTHS = [400, 1, 900, 300, 200, 800]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A server with the bucket "corpus"; a client as its users have it, set up by the environment."""
    folder = make_shards(
        tmp_path_factory.mktemp("s3") / "text", unique_documents(LENGTHS), num_shards=3, vocab_size=5000
    )
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        patch.setattr(remote, "PAUSE", 0.02)
        s3fs.S3FileSystem.clear_instance_cache()
        store = fsspec.filesystem("s3")
        store.mkdir("corpus")
        store.put(str(folder), "corpus/text", recursive=True)
        yield folder
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_shards_in_a_bucket(bucket, tmp_path) -> None:
    local = TokenDataset(bucket / "train-*.tar")
    for number, pattern in enumerate(("s3://corpus/text/train-*.tar", "s3://corpus/text/train-{00000..00002}.tar")):
        dataset = TokenDataset(pattern, cache=CacheOptions(dir=str(tmp_path / str(number)), timeout=30))
        assert dataset.fingerprint == local.fingerprint and dataset.info == local.info
        assert [dataset.document(index).tolist() for index in range(6)] == [
            local.document(index).tolist() for index in range(6)
        ]
        assert dataset.names[0] == "s3://corpus/text/train-00000.tar"


def test_what_a_bucket_does_not_have(bucket, tmp_path) -> None:
    options = CacheOptions(dir=str(tmp_path), timeout=30)
    with pytest.raises(FileNotFoundError, match=r"s3://corpus/none\.tar: not there, or not allowed"):
        TokenDataset("s3://corpus/none.tar", vocab_size=9, cache=options)
    with pytest.raises(FileNotFoundError, match=r"nothing there matches s3://corpus/none-\*\.tar"):
        TokenDataset("s3://corpus/none-*.tar", vocab_size=9, cache=options)


def test_no_key_is_said_at_once(bucket, tmp_path, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match=r"s3://corpus/text/\S+: cannot be read \(NoCredentialsError") as caught:
        TokenDataset("s3://corpus/text/train-00000.tar", vocab_size=9, cache=CacheOptions(dir=str(tmp_path)))
    assert "\n" not in str(caught.value)
