"""The code of a run as it was when the run was submitted."""

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import launch

CODE = "code"  # below the snapshot
PACKAGES = ("launch", "pretrain", "parallel", "data_pipeline", "checkpoints")
SECONDS = 60
MOST_BYTES = 64 << 20  # of a diff: data that was committed by mistake is no code


def copy_code(folder: Path) -> None:
    """Copy this package into folder/code, from where a job runs it however long it waits."""
    code = folder / CODE
    shutil.rmtree(code, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(_home() / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))


def write_snapshot(folder: Path) -> str:
    """Write commit.txt, status.txt, diff.patch and versions.txt; returns a line about it. Never fails for lack of git:
    commit.txt says then why there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = sorted(f"{dist.name}=={dist.version}" for dist in metadata.distributions() if dist.name)
    text = "\n".join([f"# Python {sys.version.split()[0]}", *dict.fromkeys(versions)])
    (folder / "versions.txt").write_text(text + "\n", encoding="utf-8")
    code = _home()
    try:
        _git(code, "ls-files", "--error-unmatch", "launch/__init__.py")  # the repository around a venv is another's
        commit = _git(code, "rev-parse", "HEAD").decode().strip()
        status = _git(code, "status", "--porcelain")
        diff = _git(code, "diff", "--binary", "HEAD") + _untracked(code)
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", None) or str(error).encode()
        words = " ".join(why.decode(errors="replace").split())
        (folder / "commit.txt").write_text(f"none: {code} is not in a git repository ({words})\n", encoding="utf-8")
        return "code: not in a git repository; package versions kept"
    (folder / "commit.txt").write_text(commit + "\n", encoding="utf-8")
    (folder / "status.txt").write_bytes(status)
    whole = len(diff) <= MOST_BYTES
    (folder / "diff.patch").write_bytes(diff if whole else b"")
    changed = "" if not diff else " + diff.patch" if whole else f" (a diff of {len(diff) >> 20} MiB is not kept)"
    return f"code: commit {commit[:12]}{changed}"


def _untracked(code: Path) -> bytes:
    """Modules that are not committed yet, as a diff that adds them."""
    names = _git(code, "ls-files", "-z", "--others", "--exclude-standard", "--", *PACKAGES).decode().split("\0")
    added = (
        # 1: they differ, as they do
        subprocess.run(
            ["git", "-C", str(code), "diff", "--binary", "--no-index", "--", "/dev/null", name],
            capture_output=True,
            timeout=SECONDS,
            check=False,
        ).stdout
        for name in names
        if name
    )
    return b"".join(added)


def _home() -> Path:
    return Path(launch.__file__).resolve().parent.parent


def _git(folder: Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=SECONDS).stdout
