"""What stands in a run's folder: whole files, lines of several writers, the first error of any rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.rundir import (
    append_end,
    append_line,
    error_in,
    first_error,
    log_folder,
    log_folders,
    rank_log,
    read_ends,
    read_json,
    read_lines,
    write_json,
)
from launch.starts import read_story
from pretrain.history import append_start, this_start

DIED = {
    "from": ("try:\n  {}['a']\nexcept KeyError as e:\n  raise ValueError('no key a') from e", "ValueError: no key a"),
    "closing": ("try:\n  raise ValueError('bad batch')\nfinally:\n  raise OSError('close')", "ValueError: bad batch"),
    "bare": ("assert False", "AssertionError"),
    "lines": ("raise RuntimeError('first line\\n  second line')", "RuntimeError: first line"),
    "late": (
        "class A:\n  def __del__(self): raise TypeError('late')\na = A()\nb = a\nraise ValueError('first')",
        "ValueError: first",
    ),
    "caught": (
        "import traceback\ntry:\n  1/0\nexcept ZeroDivisionError:\n  traceback.print_exc()\nraise ValueError('then')",
        "ValueError: then",
    ),
    "crash": ("import ctypes, faulthandler\nfaulthandler.enable()\nctypes.string_at(0)", "Fatal Python error"),
    "nothing": ("print('step 1/10  loss: 3')", None),
}


@pytest.mark.parametrize("case", DIED)
def test_the_line_that_says_what_a_process_died_of(case):
    code, expected = DIED[case]
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
    prefixed = "\n".join(f"[rank3]: {line}" for line in said.splitlines())
    for text in (said, prefixed, f"step 1: fine\n{said}[W1121 10:00:00 x.cpp:1] Warning: later\n"):
        found = error_in(text)
        assert (found is None) if expected is None else (found or "").startswith(expected)


def test_the_first_error_is_that_of_the_rank_which_failed_by_itself_and_first(tmp_path):
    folder = log_folder(tmp_path, "7", 0)
    folder.mkdir(parents=True)
    said = {
        0: "pretrain: error: rank 0 of 4, another process is gone or does not answer (gloo); its own output says why\n",
        1: "Traceback (most recent call last):\n  File\nRuntimeError: [gloo/transport/tcp] Connection closed by peer\n",
        2: "Traceback (most recent call last):\n  File\nValueError: bad sample\n",
        3: "Traceback (most recent call last):\n  File\nKeyError: 'later'\n",
        4: "step 1\n",
    }
    for rank, text in said.items():
        rank_log(folder, rank).write_text(text)
        os.utime(rank_log(folder, rank), (1000 + rank, 1000 + rank))
    assert first_error(folder) == (2, "ValueError: bad sample", rank_log(folder, 2))
    for rank in (2, 3):
        rank_log(folder, rank).unlink()
    assert first_error(folder).rank == 0
    assert first_error(tmp_path) is None


def test_the_newest_log_folder_is_the_one_written_to_last(tmp_path):
    for age, (job, restart) in enumerate([("9", 0), ("10", 1), ("10", 0)]):
        folder = log_folder(tmp_path, job, restart)
        folder.mkdir(parents=True)
        rank_log(folder, 0).touch()
        for path in (rank_log(folder, 0), folder):
            os.utime(path, (5000 - age, 5000 - age))
    assert [folder.name for folder in log_folders(tmp_path)] == ["10.0", "10.1", "9.0"]
    assert [folder.name for folder in log_folders(tmp_path, "10")] == ["10.0", "10.1"]
    assert [folder.name for folder in log_folders(tmp_path, "10.1")] == ["10.1"]
    assert log_folders(tmp_path / "none") == []


def test_files_are_whole_and_torn_lines_left_out(tmp_path):
    write_json(tmp_path / "a/b.json", {"x": 1})
    assert read_json(tmp_path / "a/b.json") == {"x": 1}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    (tmp_path / "a/b.json").write_text('{"x": ')
    assert read_json(tmp_path / "a/b.json") is None and read_json(tmp_path / "c.json") is None
    append_line(tmp_path / "lines", {"n": "a\nb"})
    with (tmp_path / "lines").open("a") as file:
        file.write('{"n": \n[1]\n')
    append_line(tmp_path / "lines", {"n": 2})
    assert read_lines(tmp_path / "lines") == [{"n": "a\nb"}, {"n": 2}]


def test_each_start_gets_the_end_that_says_most(tmp_path, monkeypatch):
    """Ranks that lost another one, and a bare signal, do not hide why."""
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    append_start(tmp_path, step=0, hosts=["n1", "n2"])
    append_end(tmp_path, "error", detail="another process is gone (gloo)", rank=0, step=4)
    append_end(tmp_path, "rank lost", detail="rank 1 of 4 died (signal 9)", restart=0)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    append_start(tmp_path, step=2)
    append_end(tmp_path, "signal", detail="SIGTERM", rank=0, step=9)
    append_end(tmp_path, "time limit")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    append_end(tmp_path, "unhealthy", detail="n2 is slow")  # no training was started
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    append_start(tmp_path, step=9)
    append_end(tmp_path, "node lost", job="5")  # late, and of the job before
    found = [(start.job, start.restart, start.step, start.reason, start.end_step) for start in read_story(tmp_path)]
    assert found == [
        ("5", 0, 0, "rank lost", 4),
        ("5", 1, 2, "time limit", 9),
        ("5", 2, None, "unhealthy", None),
        ("6", 2, 9, None, None),
    ]
    assert read_story(tmp_path)[0].hosts == ("n1", "n2")


def test_unknown_reasons_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"reason = 'tired'.*allowed: finished"):
        append_end(tmp_path, "tired")
    assert read_ends(tmp_path) == []
    assert this_start({"SLURM_RESTART_COUNT": "2", "TORCHELASTIC_RESTART_COUNT": "1"})["restart"] == 3
