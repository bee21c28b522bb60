"""A build gives equal bytes whatever the workers and kills, and says what it left out."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data_pipeline.build import TrainTokenizer, build
from data_pipeline.reader import TokenDataset
from data_pipeline.sources.stdlib import tiny_files
from data_pipeline.tokenizer import load_tokenizer

TINY = TrainTokenizer(vocab_size=600, sample_bytes=100_000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Source files, and records with a few bad ones."""
    folder = tmp_path_factory.mktemp("corpus")
    records = []
    for number, path in enumerate(tiny_files(300_000)):
        text = path.read_text(encoding="utf-8")
        (folder / path.name).write_text(text)
        records += [json.dumps({"text": part}) for part in text.split("\n\n\n")]
        records += ['{"text": ""}'] if number % 4 == 0 else []
    (folder / "records.jsonl").write_text("\n".join(records))
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = json.loads(files.pop("report.json"))
    facts = {key: value for key, value in report.items() if key not in ("out", "seconds")}
    return {**files, "facts": json.dumps(facts).encode()}


def run(corpus: Path, out: Path, **options):
    settings = {"tokenizer": TINY, "held_out": 0.2, "shard_size": 60_000, "workers": 1, "progress": False, "seed": 5}
    return build([corpus / "*.py", corpus / "*.jsonl", corpus / "*.txt"], out, **settings | options)


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "data"
    run(corpus, out)
    return out


def test_documents_are_in_the_shards_once_with_end_of_text(corpus, built) -> None:
    tokenizer = load_tokenizer(built / "tokenizer")
    found: list[str] = []
    for split in ("train", "heldout"):
        dataset = TokenDataset(built / f"{split}-*.tar", vocab_size=tokenizer.vocab_size)
        for index in range(dataset.num_documents):
            tokens = dataset.document(index)
            assert tokens[-1] == tokenizer.eos_id and tokenizer.eos_id not in tokens[:-1]
            found.append(tokenizer.decode(tokens[:-1]))
    records = [json.loads(line)["text"] for line in (corpus / "records.jsonl").read_text().split("\n")]
    wanted = [path.read_bytes().decode() for path in corpus.glob("*.py")] + [text for text in records if text.strip()]
    assert sorted(found) == sorted(wanted)


def test_report_counts_what_is_there(corpus, built) -> None:
    report = run(corpus, built)  # finished: returned, not built again
    train, heldout = (TokenDataset(built / f"{split}-*.tar") for split in ("train", "heldout"))
    assert report.tokens == train.num_tokens + heldout.num_tokens
    assert report.documents == train.num_documents + heldout.num_documents
    assert report.splits["train"]["shards"] == len(train.paths) > 1
    assert report.bytes_per_token == (train.num_text_bytes + heldout.num_text_bytes) / report.tokens
    assert report.longest_document["tokens"] == max(train.lengths.max(), heldout.lengths.max())
    rejects = [json.loads(line) for line in (built / "rejects.jsonl").read_text().splitlines()]
    assert report.rejects == {"empty": len(rejects) - 1, "invalid UTF-8": 1}
    assert {"source": "latin1.txt", "reason": "invalid UTF-8"}.items() <= rejects[0].items()
    assert 0.05 < heldout.num_documents / report.documents < 0.4
    assert "invalid UTF-8 (see rejects.jsonl)" in str(report) and "bytes/token" in str(report)


def test_split_does_not_depend_on_other_inputs_or_order(corpus, tmp_path) -> None:
    def names(out: Path) -> dict[str, str]:
        found = {}
        for shard in out.glob("*.tar"):
            for line in shard.read_bytes().split(b'{"source":"')[1:]:
                found[line.partition(b'"')[0].decode()] = shard.name.partition("-")[0]
        return found

    run(corpus, tmp_path / "all")
    build(sorted(corpus.glob("*.py"), reverse=True)[:5], tmp_path / "some", tokenizer=TINY, held_out=0.2, seed=5)
    every, some = names(tmp_path / "all"), names(tmp_path / "some")
    assert len(some) == 5 and some.items() <= every.items()
    assert set(every.values()) == {"train", "heldout"}


def test_seed_changes_the_split(corpus, built, tmp_path) -> None:
    run(corpus, tmp_path / "other", seed=6)
    assert contents(built)["heldout-00000.tar"] != contents(tmp_path / "other")["heldout-00000.tar"]


@pytest.mark.slow
def test_same_bytes_with_any_number_of_workers(corpus, built, tmp_path) -> None:
    run(corpus, tmp_path / "three", workers=3)
    assert contents(tmp_path / "three") == contents(built)


def test_same_bytes_after_a_failure_at_every_step(corpus, built, tmp_path, monkeypatch) -> None:
    """The process 'dies' at the n-th rename, for every n, and is started again until it ends."""
    out, deaths = tmp_path / "out", 0
    budget = 0

    def die_after(count: int):
        left = [count]
        for name in ("replace", "rename"):
            original = getattr(Path, name)

            def step(self, target, original=original):
                if left[0] == 0:
                    raise InterruptedError
                left[0] -= 1
                return original(self, target)

            monkeypatch.setattr(Path, name, step)

    while True:
        with monkeypatch.context():
            die_after(budget)
            try:
                run(corpus, out)
                break
            except InterruptedError:
                deaths += 1
                budget += 1
            finally:
                monkeypatch.undo()
    assert deaths > 10
    assert contents(out) == contents(built)


KILLED = """
import sys
from data_pipeline.build import TrainTokenizer, build
if __name__ == "__main__":
    corpus, out = sys.argv[1:]
    patterns = [f"{corpus}/*.{end}" for end in ("py", "jsonl", "txt")]
    tokenizer = TrainTokenizer(vocab_size=600, sample_bytes=100_000)
    build(patterns, out, tokenizer=tokenizer, held_out=0.2, shard_size=60_000, workers=2, progress=False, seed=5)
"""


@pytest.mark.slow
def test_same_bytes_after_sigkill(corpus, built, tmp_path) -> None:
    script, out = tmp_path / "job.py", tmp_path / "out"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(corpus), str(out)]
    with subprocess.Popen(command, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob(".building/chunk-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
        workers = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
    assert not (out / "dataset.json").exists()
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(worker) for worker in workers), "workers outlive a killed build"
    subprocess.run(command, check=True, timeout=120)
    assert contents(out) == contents(built)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_other_inputs_or_settings_are_not_mixed_in(corpus, built, tmp_path) -> None:
    for changes, name in [({"seed": 9}, "seed"), ({"tokenizer": TrainTokenizer(vocab_size=700)}, "tokenizer")]:
        with pytest.raises(ValueError, match=f"holds a build with another {name}; remove it"):
            run(corpus, built, **changes)
    with pytest.raises(ValueError, match="another inputs"):
        build(corpus / "*.py", built, tokenizer=TINY, held_out=0.2, shard_size=60_000, seed=5)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty and holds no build"):
        run(corpus, tmp_path / "taken")


def test_too_many_bad_records_stop_the_build_and_more_patience_finishes_it(corpus, tmp_path) -> None:
    (tmp_path / "bad.jsonl").write_text("\n".join(['{"text": "fine words"}', '{"txt": "typo"}'] * 30))
    options = {"tokenizer": corpus.parent, "workers": 1, "progress": False}
    run(corpus, tmp_path / "tokenizer-source")
    options["tokenizer"] = tmp_path / "tokenizer-source" / "tokenizer"
    with pytest.raises(ValueError, match=r"50\.0% of the records are bad, at most 5\.0% are allowed: 30 missing field"):
        build(tmp_path / "bad.jsonl", tmp_path / "out", **options)
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 30
    assert not (tmp_path / "out" / "dataset.json").exists()
    report = build(tmp_path / "bad.jsonl", tmp_path / "out", max_reject_share=0.6, **options)
    assert report.rejects == {"missing field": 30} and report.documents == 30


def test_wrong_field_is_named_before_training_a_tokenizer(corpus, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no training document .* missing field no field 'body'"):
        build(corpus / "*.jsonl", tmp_path / "out", tokenizer=TINY, text_field="body")


def test_empty_glob_and_bad_settings(corpus, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"input .*none-\*'.*no file matches"):
        build(corpus / "none-*", tmp_path / "out", tokenizer=TINY)
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        build(corpus, tmp_path / "out", tokenizer=TINY)
    nothing = TrainTokenizer(vocab_size=0)
    cases = [
        ({"held_out": 2}, "held_out 2: must be 0 or more and below 1"),
        ({"held_out": float("nan")}, "held_out nan"),
        ({"max_reject_share": -1}, "max_reject_share -1: must be 0 to 1"),
        ({"max_reject_share": 5}, "max_reject_share 5"),
        ({"workers": -1}, "workers -1: must be 1 or more"),
        ({"workers": 0}, "workers 0"),
        ({"limit_bytes": -5}, "limit_bytes -5: must be 1 or more"),
        ({"shard_size": 0}, "shard_size 0"),
        ({"tokenizer": nothing}, "vocab_size 0: must be 1 or more"),
        ({"tokenizer": TrainTokenizer(sample_bytes=0)}, "sample_bytes 0"),
        ({"tokenizer": TrainTokenizer(model="wordpiece")}, "tokenizer model 'wordpiece': must be bpe or unigram"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            run(corpus, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def given(built) -> dict:
    return {"tokenizer": built / "tokenizer", "workers": 1, "progress": False}


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_torn_file_counts_with_its_size_not_as_one_record(tmp_path, given, pack) -> None:
    lines = [json.dumps({"text": f"{number**5} words"}) for number in range(5_000)]
    whole = pack("\n".join(lines).encode())
    path = tmp_path / f"a.jsonl.{'gz' if pack is gzip.compress else 'zst'}"
    path.write_bytes(whole[: len(whole) // 4])
    with pytest.raises(ValueError, match=r"and 100\.0% of the input's bytes are in files .*: 1 unreadable"):
        build(path, tmp_path / "out", **given)
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert reject["reason"] == "unreadable" and reject["lost_bytes"] == path.stat().st_size
    (tmp_path / "big.jsonl").write_text("\n".join(lines * 10))
    report = build([path, tmp_path / "big.jsonl"], tmp_path / "both", **given)
    assert report.rejects == {"unreadable": 1} and report.lost_bytes == path.stat().st_size
    assert "cannot be read to their end" in str(report)


def test_unreadable_parquet_ends_no_build_unless_it_is_too_much(tmp_path, given) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" * 10)
    (tmp_path / "good.txt").write_text("fine words " * 300)
    report = build([tmp_path / "bad.parquet", tmp_path / "good.txt"], tmp_path / "out", max_reject_share=0.5, **given)
    assert report.documents == 1 and report.rejects == {"unreadable": 1} and report.lost_bytes == 40
    assert json.loads((tmp_path / "out" / "rejects.jsonl").read_text())["source"] == "bad.parquet"
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" * 4000)
    with pytest.raises(ValueError, match=r"8\d\.\d% of the input's bytes .* at most 50\.0% are allowed: 1 unreadable"):
        build([tmp_path / "bad.parquet", tmp_path / "good.txt"], tmp_path / "out2", max_reject_share=0.5, **given)


@pytest.mark.parametrize("damage", ["train-00000.tar", "train-00001.tar.idx", "cut", "tokenizer"])
def test_finished_build_is_looked_at_and_made_whole_again(corpus, built, tmp_path, capsys, damage) -> None:
    out = shutil.copytree(built, tmp_path / "out")
    if damage == "cut":
        os.truncate(out / "heldout-00000.tar", 1024)
    elif damage == "tokenizer":
        shutil.rmtree(out / "tokenizer")
    else:
        (out / damage).unlink()
    report = run(corpus, out)
    assert "building the shards again" in capsys.readouterr().err
    assert contents(out) == contents(built) and not (out / ".building").exists()
    before = (out / "train-00000.tar").stat().st_mtime_ns
    assert run(corpus, out) == report and (out / "train-00000.tar").stat().st_mtime_ns == before


def test_limit_takes_whole_inputs_up_to_its_size(corpus, tmp_path) -> None:
    report = build(corpus / "*.py", tmp_path / "out", tokenizer=TINY, limit_bytes=100_000, progress=False)
    assert 30_000 < sum(split["text_bytes"] for split in report.splits.values()) <= 100_000


def test_large_vocabulary_is_written_as_uint32(corpus, tmp_path) -> None:
    run(corpus, tmp_path / "small")
    folder = tmp_path / "small" / "tokenizer"
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["never-seen"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    report = run(corpus, tmp_path / "wide", tokenizer=folder)
    assert report.vocab_size == 70_001
    small, wide = (TokenDataset(tmp_path / name / "train-*.tar") for name in ("small", "wide"))
    assert wide.dtype == "uint32"
    assert all(np.array_equal(small.document(index), wide.document(index)) for index in range(small.num_documents))


def test_a_build_that_failed_at_once_does_not_block_the_corrected_one(corpus, tmp_path) -> None:
    with pytest.raises(ValueError, match="vocab_size 10"):
        run(corpus, tmp_path / "out", tokenizer=TrainTokenizer(vocab_size=10))
    assert run(corpus, tmp_path / "out", tokenizer=TrainTokenizer(vocab_size=400)).vocab_size == 400
