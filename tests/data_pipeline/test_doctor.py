"""The doctor and token shards: each thing that can be wrong is planted in real shards, and a clean corpus has none."""

import dataclasses
import io
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.cache import CacheOptions
from data_pipeline.doctor.diagnosis import diagnose
from data_pipeline.doctor.findings import CODES
from data_pipeline.index import END_OF_ARCHIVE, ShardIndex, index_path
from data_pipeline.shards import DatasetInfo, ShardWriter
from tests.data_pipeline.doctor_shards import (
    END,
    FIRST,
    PAD,
    UNKNOWN,
    VOCABULARY,
    clean_documents,
    examine,
    found,
    write_corpus,
    write_split,
)
from tests.data_pipeline.servers import serving

SECOND = "train-00001.tar"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def test_a_clean_corpus_has_no_finding(corpus) -> None:
    diagnosis = examine(corpus, readers=3)
    assert found(diagnosis) == [] and diagnosis.healthy
    documents = clean_documents()
    assert diagnosis.corpus.num_tokens == sum(map(len, documents)) and diagnosis.corpus.searched == len(documents)
    expected = np.bincount(np.concatenate(documents), minlength=VOCABULARY)
    assert diagnosis.corpus.counts.tolist() == expected.tolist()
    shares = np.unique(documents[7], return_counts=True)[1] / len(documents[7])
    assert diagnosis.corpus.entropies[7] == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-5)


def test_shards_of_webdatasets_writer(tmp_path) -> None:
    """Without an index and dataset.json, with long names and pax headers: nothing but notes, and ids are still read."""
    documents = clean_documents(6)
    for name, form in (("a", None), ("b", "PAX_FORMAT")):
        with webdataset.TarWriter(str(tmp_path / f"{name}.tar"), format=form) as writer:
            for number, tokens in enumerate(documents[3 * (name == "b") :][:3]):
                key = f"{'long' * 30}/{name}{number}" if form else f"{name}{number}"
                writer.write({"__key__": key, "tokens": tokens.astype("<u2").tobytes(), "json": {"a": 1}})
    diagnosis = examine(tmp_path)
    assert [code for code, _, _ in found(diagnosis)] == ["index-missing"] * 2 + ["description-missing"]
    assert diagnosis.healthy and diagnosis.corpus.num_tokens == sum(map(len, documents))
    assert diagnosis.corpus.place(4)[1] == f"{'long' * 30}/b1"


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def without_end(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: -len(END_OF_ARCHIVE)])


def two_in_one(shard: Path) -> None:
    shard.write_bytes(2 * shard.read_bytes())


def flip(shard: Path, at: int, bit: int = 1) -> None:
    data = bytearray(shard.read_bytes())
    data[at] ^= bit
    shard.write_bytes(bytes(data))


def break_header(shard: Path) -> None:
    flip(shard, int(ShardIndex.load(index_path(shard)).offsets[9]) - 512 + 3)


def change_token(shard: Path) -> None:
    flip(shard, int(ShardIndex.load(index_path(shard)).offsets[9]))


def another_index(shard: Path) -> None:
    shutil.copy(index_path(shard.with_name("train-00000.tar")), index_path(shard))


def wrong_length(shard: Path) -> None:
    index = ShardIndex.load(index_path(shard))
    lengths = index.lengths.copy()
    lengths[4] -= 1
    dataclasses.replace(index, lengths=lengths).save(index_path(shard))


def swapped_keys(shard: Path) -> None:
    index = ShardIndex.load(index_path(shard))
    keys = index.keys.copy()
    keys[[4, 5]] = keys[[5, 4]]
    dataclasses.replace(index, keys=keys).save(index_path(shard))


@pytest.mark.parametrize(
    ("spoil", "codes", "documents"),
    [
        (cut, ["torn"], None),
        (without_end, ["torn"], 60),
        (break_header, ["torn"], 49),
        (lambda shard: shard.write_bytes(b""), ["torn"], 40),
        (lambda shard: shard.write_bytes(b"no tar" * 400), ["torn"], 40),
        (lambda shard: shard.write_bytes(END_OF_ARCHIVE), ["no-sample"], 40),
        (two_in_one, ["after-end", "index-mismatch"], 60),
        (change_token, ["checksum"], 60),
        (another_index, ["index-mismatch"], 60),
        (wrong_length, ["index-mismatch"], 60),
        (swapped_keys, ["index-mismatch"], 60),
        (lambda shard: index_path(shard).write_bytes(b"{}"), ["index-broken"], 60),
        (lambda shard: index_path(shard).unlink(), ["index-missing"], 60),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_spoilt_shard_is_told_and_the_others_are_read(corpus, spoil, codes, documents) -> None:
    spoil(corpus / SECOND)
    diagnosis = examine(corpus)
    assert [(code, name) for code, name, _ in found(diagnosis)] == [(code, SECOND) for code in codes]
    assert diagnosis.healthy == (codes == ["index-missing"])
    number = len(diagnosis.corpus.lengths)
    assert number == documents if documents else 40 < number < 60
    for finding in diagnosis.findings.kept:
        assert "\n" not in str(finding) and finding.cure in str(finding)


def test_the_document_that_an_index_has_wrong_is_named(corpus) -> None:
    wrong_length(corpus / SECOND)
    assert found(examine(corpus)) == [("index-mismatch", SECOND, "doc0024")]


@pytest.mark.parametrize("name", [SECOND, f"{SECOND}.idx", "dataset.json"])
def test_any_damage_is_an_error(corpus, name) -> None:
    """Bits that change and files that end early, wherever it happens: found each time, and never more than reported."""
    path = corpus / name
    whole, draw = path.read_bytes(), random.Random(7)
    for trial in range(25):
        at = draw.randrange(len(whole))
        damaged = bytearray(whole) if trial % 2 else bytearray(whole[:at])
        if trial % 2:
            damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(damaged))
        assert not examine(corpus).healthy, f"byte {at} of {len(whole)}, trial {trial}"


def test_shards_from_elsewhere(corpus, tmp_path) -> None:
    cut(corpus / SECOND)
    with serving(corpus) as server:
        options = CacheOptions(dir=str(tmp_path / "cache"), retries=0)
        urls = [f"{server.url}/train-{{00000..00002}}.tar", f"{server.url}/none.tar"]
        diagnosis = diagnose(urls, progress=False, workers=1, cache=options)
    assert found(diagnosis) == [("torn", SECOND, ""), ("unreadable", "none.tar", "")]
    assert diagnosis.findings.kept[0].shard == f"{server.url}/{SECOND}"
    assert 40 < len(diagnosis.corpus.lengths) < 60 and len(diagnosis.corpus.counts) == VOCABULARY


def test_shard_that_cannot_be_opened(corpus, monkeypatch) -> None:
    real = Path.open

    def refuse(path: Path, *arguments, **options):
        if path.name == SECOND:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert found(examine(corpus)) == [("unreadable", SECOND, "")]


def test_missing_shards_and_tokenizer(corpus) -> None:
    (corpus / SECOND).unlink()
    assert [code for code, _, _ in found(examine(corpus))] == ["shard-missing"]
    shutil.rmtree(corpus / "tokenizer")
    assert {code for code, _, _ in found(examine(corpus))} == {"shard-missing", "tokenizer"}


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({"dtype": "uint8"}, ["description"]),
        ({"eos_id": 7}, ["description", "inner-end-of-text", "no-end-of-text"]),
        ({"vocab_size": 299}, ["description", "id-range"]),
        ({"dtype": "uint32"}, ["description", "dtype"]),
    ],
)
def test_description_that_does_not_fit(corpus, change, codes) -> None:
    path = corpus / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    diagnosis = examine(corpus)
    assert sorted({code for code, _, _ in found(diagnosis)}) == codes
    assert not diagnosis.healthy


def spoilt(change: dict[int, np.ndarray]) -> list[np.ndarray]:
    documents = clean_documents()
    for number, tokens in change.items():
        documents[number] = tokens
    return documents


BASE = clean_documents(1, seed=5)[0]


@pytest.mark.parametrize(
    ("code", "tokens"),
    [
        ("id-range", np.append(BASE[:-1], [VOCABULARY, END])),
        ("no-end-of-text", BASE[:-1]),
        ("inner-end-of-text", np.insert(BASE, 10, END)),
        ("padding-inside", np.insert(BASE, 10, [PAD, PAD])),
        ("empty", np.zeros(0, int)),
        ("empty", np.array([END])),
        ("overlong", np.append(np.tile(BASE[:-1], 6), END)),
        ("unknown-share", np.where(np.arange(len(BASE)) % 3 == 0, UNKNOWN, BASE)),
    ],
)
def test_spoilt_document(tmp_path, code, tokens) -> None:
    tokens = tokens.copy()
    if code == "unknown-share":
        tokens[-1] = END
    diagnosis = examine(write_corpus(tmp_path / "c", spoilt({31: tokens})), most_tokens=400)
    told = found(diagnosis)
    if code == "unknown-share":  # of the document, and of all
        assert ("unknown-share", "", "") in told
        told.remove(("unknown-share", "", ""))
    assert told == [(code, SECOND, "doc0031")]


def test_no_document_ends(tmp_path) -> None:
    diagnosis = examine(write_corpus(tmp_path / "c", [document[:-1] for document in clean_documents()]))
    assert found(diagnosis) == [("no-end-of-text", f"train-0000{number}.tar", "") for number in range(3)]
    assert "20 of 20 documents" in diagnosis.findings.kept[0].what


def test_odd_entropies(tmp_path) -> None:
    documents = clean_documents(ids=60)
    draw = np.random.default_rng(3)
    documents[12] = np.append(np.full(100, 17), END)
    documents[45] = np.append(draw.permutation(np.arange(FIRST, VOCABULARY))[:110], END)
    told = found(examine(write_corpus(tmp_path / "c", documents)))
    assert told == [("entropy-low", "train-00000.tar", "doc0012"), ("entropy-high", "train-00002.tar", "doc0045")]


def test_copies_and_near_copies(tmp_path) -> None:
    documents = clean_documents()
    documents[50] = documents[3].copy()
    documents[22] = documents[3].copy()
    near = documents[30].copy()
    near[40] = FIRST
    documents[55] = near
    diagnosis = examine(write_corpus(tmp_path / "c", documents))
    assert found(diagnosis) == [
        ("duplicate", "train-00000.tar", "doc0003"),
        ("near-duplicate", SECOND, "doc0030"),
    ]
    exact, close = diagnosis.clusters
    assert exact.documents == [3, 22, 50] and close.documents == [30, 55]
    assert "doc0022" in diagnosis.findings.kept[0].what and "doc0050" in diagnosis.findings.kept[0].what
    shingles = [{tuple(row) for row in np.lib.stride_tricks.sliding_window_view(d, 5)} for d in (documents[30], near)]
    assert close.similarities[1] == pytest.approx(len(set.intersection(*shingles)) / len(set.union(*shingles)), abs=0.1)


def test_held_out_documents_in_the_training_shards(corpus) -> None:
    write_split(corpus, [*clean_documents(5, seed=9), clean_documents()[8]], "heldout", num_shards=1, keys="held")
    told = found(examine(corpus))
    assert told == [("held-out-leak", "heldout-00000.tar", "held0005")]


def test_keys_that_come_twice(corpus, tmp_path) -> None:
    documents = clean_documents(24, seed=2)
    with ShardWriter(corpus / "extra-00000.tar", "uint16") as writer:
        for number, tokens in enumerate(documents):
            writer.add(f"x{number % 23}", tokens, {}, text_bytes=1)
    told = found(examine(corpus))
    assert told == [("duplicate-key", "extra-00000.tar", "x0")] * 2  # its .tokens and its .json
    (corpus / "extra-00000.tar").unlink()
    write_split(corpus, documents, "extra", num_shards=1)
    diagnosis = examine(corpus)
    assert found(diagnosis) == [("duplicate-key-across", "extra-00000.tar", "doc0000")]
    assert diagnosis.findings.kept[0].what.startswith("24 keys")


def add_member(shard: Path, info: tarfile.TarInfo, data: bytes = b"") -> None:
    info.size = len(data)
    with tarfile.open(shard, "a") as archive:
        archive.addfile(info, io.BytesIO(data))
    index_path(shard).unlink(missing_ok=True)


def test_members_that_do_not_belong_there(corpus) -> None:
    add_member(corpus / SECOND, tarfile.TarInfo("../up.json"), b"{}")
    link = tarfile.TarInfo("link.tokens")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    add_member(corpus / SECOND, link)
    add_member(corpus / SECOND, tarfile.TarInfo("alone.json"), b"{}")
    add_member(corpus / SECOND, tarfile.TarInfo("odd.tokens"), b"abc")
    told = found(examine(corpus))
    assert ("member-name", SECOND, "") in told and ("member-kind", SECOND, "") in told
    assert ("orphan", SECOND, "alone") in told and ("dtype", SECOND, "odd") in told


def test_facts_that_do_not_fit(corpus) -> None:
    add_member(corpus / SECOND, tarfile.TarInfo("a.tokens"), np.array([5, END], "<u2").tobytes())
    add_member(corpus / SECOND, tarfile.TarInfo("a.json"), b'{"num_tokens": 3}')
    add_member(corpus / SECOND, tarfile.TarInfo("b.tokens"), np.array([6, END], "<u2").tobytes())
    add_member(corpus / SECOND, tarfile.TarInfo("b.json"), b"[1]")
    told = found(examine(corpus))
    assert told == [
        ("facts-disagree", SECOND, "a"),
        ("facts-disagree", SECOND, "b"),
        ("index-missing", SECOND, ""),
    ]


def test_padding_that_is_the_end_of_text(corpus) -> None:
    config = corpus / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "</s>"}))
    assert [code for code, _, _ in found(examine(corpus))] == ["pad-is-eos"]


def test_folders_of_two_tokenizers(corpus, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_split(other, clean_documents(seed=8))
    shutil.copytree(corpus / "tokenizer", other / "tokenizer")
    DatasetInfo(VOCABULARY, "uint16", END).save(other)
    assert found(examine(corpus, other)) == []
    data = (other / "tokenizer" / "tokenizer.json").read_text()
    (other / "tokenizer" / "tokenizer.json").write_text(data + "\n")
    assert [code for code, _, _ in found(examine(corpus, other))] == ["vocabularies-differ"]


def test_few_and_uneven_shards(corpus) -> None:
    diagnosis = examine(corpus, readers=4)
    assert [code for code, _, _ in found(diagnosis)] == ["fewer-shards-than-readers"] and diagnosis.healthy
    write_split(corpus, clean_documents(90, seed=4), "train", num_shards=3)
    write_split(corpus, clean_documents(3, seed=6), "small", num_shards=1, keys="s")
    (corpus / "small-00000.tar").rename(corpus / "train-00001.tar")
    index_path(corpus / "small-00000.tar").rename(index_path(corpus / "train-00001.tar"))
    diagnosis = examine(corpus)
    assert [code for code, _, _ in found(diagnosis)] == ["uneven-shards"]
    assert "such as train-00001.tar" in diagnosis.findings.kept[0].what


def test_every_code_has_a_severity_and_a_cure() -> None:
    for code, (severity, cure) in CODES.items():
        assert severity in ("error", "warning", "note") and cure and "\n" not in cure, code


@pytest.mark.parametrize(
    "options", [{"readers": 0}, {"most_tokens": 0}, {"near_documents": 0}, {"workers": 0}, {"near_similarity": 0.2}]
)
def test_settings_out_of_range(corpus, options) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))} .*: must be"):
        diagnose(corpus / "*.tar", progress=False, **options)


def test_no_shards_there(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no file matches"):
        diagnose(tmp_path / "*.tar", progress=False)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(corpus) -> None:
    cut(corpus / SECOND)
    assert found(examine(corpus, workers=2)) == found(examine(corpus))


def test_of_many_documents_a_sample_is_compared(tmp_path) -> None:
    documents = clean_documents(30)
    folder = write_corpus(tmp_path / "c", [copy for document in documents for copy in (document, document[1:])])
    assert len(examine(folder).clusters) == 30
    diagnosis = examine(folder, near_documents=8)
    assert diagnosis.corpus.searched == 8
    assert 2 <= len(diagnosis.clusters) <= 4, "near copies are chosen together"
    assert diagnosis.corpus.num_tokens == sum(2 * len(document) - 1 for document in documents), "all else is of all"
