"""A run's data, as its recipe says: pictures."""

from pathlib import Path

import pytest

from data_pipeline.images.stream import ImageTextStream
from data_pipeline.loader import Loader
from pretrain.config import RunConfig, resolve
from pretrain.data import open_datasets
from pretrain.mixture import open_stream
from tests.data_pipeline.images import captioned, encoded, picture, small_tokenizer, write_tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards; one picture of the second cannot be decoded, one is larger than 1,000 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    small_tokenizer().save(folder / "tokenizer")
    write_tar(folder / "a.tar", [captioned(number) for number in range(8)])
    torn = {"__key__": "torn", "jpg": encoded(picture(24, 24), "JPEG")[:-300], "txt": "a cat"}
    write_tar(folder / "b.tar", [captioned(8), torn, captioned(9, 25, 48)])
    return folder


def config_of(folder: Path, *overrides: str) -> RunConfig:
    sources = f'data.sources=[{{name = "pets", shards = "{folder}/*.tar"}}]'
    words = (
        "model.patches.size=8",
        "data.pictures.size=16",
        "data.patches=4",
        "data.seq_len=24",
        "model.vocab_size=300",
    )
    path = f"tokenizer.path={folder / 'tokenizer'}"
    return resolve("tiny-vlm-free", [sources, *words, path, "train.global_batch=4", "train.micro_batch=4", *overrides])[
        0
    ]


def open_run(config: RunConfig) -> Loader:
    stream = open_stream(config, open_datasets(config, lambda action: action()))
    return Loader(stream, global_batch=4, micro_batch=4)


@pytest.mark.parametrize(
    ("overrides", "skipped"), [((), 1), (("data.pictures.max_pixels=1000",), 2), (("data.pictures.max_bytes=10",), 11)]
)
def test_limits_of_pictures_and_the_number_left_out(
    folder: Path, overrides: tuple[str, ...], skipped: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder, "data.pictures.workers=2", *overrides)
    if skipped == 11:
        with pytest.raises(ValueError, match="none of 2 shards has a sample that can be used"):
            open_run(config)
        assert "max_bytes is 10" in capsys.readouterr().err
        return
    with open_run(config) as loader:
        for _ in range(3):
            next(loader)
    loader.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert lines[-1] == f"skipped: {skipped} samples of {folder}/*.tar in all" and len(lines) == skipped + 1
    assert any("1200 pixels, max_pixels is 1000" in line for line in lines) == (skipped == 2)


def test_shards_of_pictures_are_shuffled_a_few_together(folder: Path) -> None:
    orders = []
    for together in (0, 1):
        config = config_of(folder, f"data.shuffle_shards={together}")
        stream = next(iter(open_run(config).stream.streams.values()))
        assert isinstance(stream, ImageTextStream)
        orders.append(stream.dataset.shards_of(stream.documents(0, stream.num_samples).documents).tolist())
    assert sorted(orders[1]) in (orders[1], orders[1][::-1]) and orders[0] not in (orders[1], orders[1][::-1])
