"""Documents and rejects out of every kind of input."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.sources.stdlib import stdlib_files, tiny_files
from data_pipeline.sources.text import Document, Reject, plan_pieces, read_piece

LINES = [
    b'{"text": "first", "id": 1}\n',
    b"\n",
    b'{"text": "second \\u00e9\xc3\xa9"}\r\n',
    b'{"text": "   "}\n',
    b'{"body": "no text"}\n',
    b'{"text": 7}\n',
    b'{"text": null}\n',
    b'{"text": "torn\n',
    b'{"text": "\xff\xfe"}\n',
    b'{"text": "\\ud800"}\n',
    b"[1, 2]\n",
    b'{"text": "last, without a line end"}',
]
TEXTS = ["first", "second éé", "last, without a line end"]
REASONS = [
    "empty",
    "missing field",
    "not text",
    "missing field",
    "invalid JSON",
    "invalid UTF-8",
    "invalid Unicode",
    "missing field",
]


def read(paths: list[Path], *, piece_bytes: int = 10**9, text_field: str = "text") -> list[Document | Reject]:
    pieces = plan_pieces(paths, piece_bytes=piece_bytes, text_field=text_field)
    return [entry for piece in pieces for entry in read_piece(piece, text_field)]


def texts(entries: list[Document | Reject]) -> list[str]:
    return [entry.text for entry in entries if isinstance(entry, Document)]


def reasons(entries: list[Document | Reject]) -> list[str]:
    return [entry.reason for entry in entries if isinstance(entry, Reject)]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst"])
def test_json_lines(tmp_path, suffix) -> None:
    data = b"".join(LINES)
    packed = {"gz": gzip.compress, "zst": zstandard.compress}.get(suffix.rpartition(".")[2], bytes)(data)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(packed)
    entries = read([path])
    assert texts(entries) == TEXTS
    assert reasons(entries) == REASONS
    assert entries[1].source == f"a.{suffix}@{len(LINES[0] + LINES[1])}"


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 26, 27, 28, 50, 1000])
def test_byte_ranges_take_every_line_once(tmp_path, piece_bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(LINES))
    assert read([path], piece_bytes=piece_bytes) == read([path])


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_or_broken_compression_loses_only_the_rest(tmp_path, suffix) -> None:
    data = b"".join(b'{"text": "%d"}\n' % (number**3) for number in range(50_000))
    packed = {"gz": gzip.compress, "zst": zstandard.compress}[suffix](data)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    entries = read([path])
    assert reasons(entries) == ["unreadable"]
    assert entries[-1].lost_bytes == path.stat().st_size
    assert 0 <= len(texts(entries)) < 50_000
    path.write_bytes(packed[: len(packed) // 2] + b"\0" * 100 + packed[len(packed) // 2 + 100 :])
    assert reasons(read([path]))[-1] in ("unreadable", "invalid JSON")
    path.write_bytes(b"garbage")
    assert reasons(read([path])) == ["unreadable"]


def test_several_zstd_frames(tmp_path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(line) for line in LINES))
    assert texts(read([path])) == TEXTS


def test_parquet(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["one", None, "", "two", "three"], "other": [1, 2, 3, 4, 5]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    entries = read([path])
    assert texts(entries) == ["one", "two", "three"]
    assert reasons(entries) == ["missing field", "empty"]
    assert [entry.source for entry in entries if isinstance(entry, Document)] == [
        "a.parquet@0:0",
        "a.parquet@1:1",
        "a.parquet@2:0",
    ]
    assert reasons(read([path], text_field="other")) == ["not text"] * 5
    size = path.stat().st_size
    assert read([path], text_field="body") == [
        Reject("a.parquet", "missing field", "no column 'body', it has text, other", size)
    ]


def test_unreadable_parquet_is_one_reject_beside_the_others(tmp_path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "good.parquet")
    good = (tmp_path / "good.parquet").read_bytes()
    damaged = {
        "nothing": b"",
        "garbage": b"PAR1 nothing",
        "cut": good[:-20],
        "holed": good[:-30] + b"\xff" * 22 + good[-8:],
    }
    for name, data in damaged.items():
        (tmp_path / f"{name}.parquet").write_bytes(data)
    entries = read(list(tmp_path.glob("*.parquet")))
    assert texts(entries) == ["one", "two"]
    rejects = [entry for entry in entries if isinstance(entry, Reject)]
    assert {reject.source.partition(".")[0]: reject.lost_bytes for reject in rejects} == {
        name: len(data) for name, data in damaged.items()
    }
    assert reasons(entries) == ["unreadable"] * 4


def test_broken_page_loses_only_its_row_group(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{number} words" * 20 for number in range(6)]})
    pyarrow.parquet.write_table(table, path, row_group_size=2, compression="gzip", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    entries = read([path])
    assert [text.partition(" ")[0] for text in texts(entries)] == ["0", "1", "4", "5"]
    (reject,) = [entry for entry in entries if isinstance(entry, Reject)]
    assert (reject.source, reject.reason) == ("a.parquet@1", "unreadable") and reject.lost_bytes > 0


def test_parquet_text_that_is_not_utf8(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    array = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), path)
    entries = read([path])
    assert texts(entries) == ["good"] and reasons(entries) == ["invalid UTF-8"]


def test_text_files_are_kept_to_the_byte(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    contents = {"a.py": b"x = 1\r\n\tpass \n", "b/c.txt": "é\n".encode(), "d.txt.gz": gzip.compress(b"packed")}
    contents |= {"empty.txt": b" \n", "bad.txt": b"ok \xe9 bad"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    entries = read([tmp_path / name for name in reversed(contents)])
    assert [entry.source for entry in entries] == ["a.py", "b/c.txt", "bad.txt", "d.txt.gz", "empty.txt"]
    assert texts(entries) == ["x = 1\r\n\tpass \n", "é\n", "packed"]
    assert reasons(entries) == ["invalid UTF-8", "empty"]


def test_file_that_vanishes_is_a_reject(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    (piece,) = plan_pieces([path], piece_bytes=10, text_field="text")
    path.unlink()
    assert reasons(list(read_piece(piece, "text"))) == ["unreadable"]


def test_names_do_not_depend_on_where_the_inputs_lie(tmp_path) -> None:
    for root in ("here", "somewhere/else"):
        (tmp_path / root / "sub").mkdir(parents=True)
        (tmp_path / root / "a.txt").write_text("a")
        (tmp_path / root / "sub" / "b.jsonl").write_text(json.dumps({"text": "b"}))
    here, there = (
        read([tmp_path / root / "sub" / "b.jsonl", tmp_path / root / "a.txt"]) for root in ("here", "somewhere/else")
    )
    assert here == there
    assert [entry.source for entry in here] == ["a.txt", "sub/b.jsonl@0"]


def test_stdlib_lists() -> None:
    files = stdlib_files()
    assert len(files) > 500 and files == sorted(files)
    assert not any({"site-packages", "__pycache__"}.intersection(path.parts) for path in files)
    tiny = tiny_files()
    assert 400_000 <= sum(path.stat().st_size for path in tiny) < 800_000
    assert set(tiny) <= set(files)
