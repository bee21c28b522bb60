"""pretrain data ledger: of runs whose sources went or changed."""

import shutil
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.config import load_run_config
from pretrain.replay import replay
from pretrain.train import train
from tests.data_pipeline.conftest import make_shards, unique_documents
from tests.pretrain.test_train import ALONE, small_config


@pytest.fixture
def run(tmp_path, tiny_shards) -> Path:
    """A run that read a and b, and then a alone."""
    entries = []
    for name in "ab":
        folder = make_shards(tmp_path / name, unique_documents([40, 13, 90, 7] * 9), num_shards=2, vocab_size=2048)
        entries.append(f'{{name = "{name}", shards = "{folder}/train-*.tar"}}')
    for count, stop in ((2, 2), (1, 4)):
        sources = f"data.sources=[{', '.join(entries[:count])}]"
        train(small_config(tmp_path / "run", tiny_shards, sources, "train.steps=4", f"train.stop_at={stop}"), ALONE)
    return tmp_path / "run"


def lines(capsys, *words: str) -> list[list[str]]:
    capsys.readouterr()
    assert main(["data", "ledger", *words]) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_documents_of_a_source_that_went_are_given_by_number(run, capsys) -> None:
    note, *documents = lines(capsys, str(run), "--step", "1")
    assert note == ["# source 'b' is not in the run's recipe any more: its documents are known by number alone"]
    gone = [document for document in documents if document[0] == "b"]
    assert gone and all(shard == "?" and key.startswith("document ") for _, shard, key, _ in gone)
    kept = [document for document in documents if document[0] == "a"]
    assert kept and all(shard.startswith("train-0000") for _, shard, _, _ in kept)
    assert {document[0] for document in lines(capsys, str(run), "--step", "3")} == {"a"}, "no note where it is not due"
    *found, note = lines(capsys, str(run), "--document", kept[0][2])
    assert ["step 1", *kept[0]] in found and note[0].startswith("# source 'b' is not in")
    with pytest.raises(ValueError, match="source 'b' is no longer in the mixture"):
        replay(load_run_config(run), ALONE, 2)


def test_numbers_are_not_looked_up_in_other_data(run, tmp_path, capsys) -> None:
    """A shard that came before the others and matches the glob."""
    before = lines(capsys, str(run), "--step", "3")
    make_shards(tmp_path / "more", unique_documents([50] * 9), vocab_size=2048)
    for file in (tmp_path / "more").glob("train-00000*"):
        shutil.copy(file, tmp_path / "a" / file.name.replace("00000", "0000"))
    note, *after = lines(capsys, str(run), "--step", "3")
    assert note == ["# source 'a' holds other data than the run has read: its documents are known by number alone"]
    assert {shard for _, shard, _, _ in after} == {"?"}
    assert [start for *_, start in after] == [start for *_, start in before]
    assert main(["data", "ledger", str(run), "--document", before[0][2]]) == 2
    assert "has a document with the key" in capsys.readouterr().err
