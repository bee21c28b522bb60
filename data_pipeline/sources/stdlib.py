"""The running interpreter's standard library as a corpus: real text that every machine has."""

import sysconfig
from pathlib import Path

SUFFIXES = (".py", ".txt", ".rst", ".md", ".toml", ".cfg")
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "config",
}  # installed packages and build leftovers


def stdlib_files() -> list[Path]:
    """Sources and text files of the standard library, sorted by path: the same list on equal installations.

    A few test files are not valid UTF-8 on purpose; the build rejects and reports them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix in SUFFIXES and not LEFT_OUT.intersection(path.relative_to(root).parts) and path.is_file()
    )


def tiny_files(num_bytes: int = 400_000) -> list[Path]:
    """A few hundred KB of the standard library's top-level modules, for a first run without any shards.

    In path order, until ``num_bytes`` are reached.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    left = num_bytes
    for path in sorted(root.glob("*.py")):
        if left > 0:
            files.append(path)
            left -= path.stat().st_size
    return files
