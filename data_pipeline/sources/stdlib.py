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


def tiny_corpus(num_bytes: int = 400_000) -> list[str]:
    """A few hundred KB of the standard library's top-level modules, for a first run without any shards.

    Whole documents, in path order, until ``num_bytes`` of UTF-8 are reached.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: list[str] = []
    left = num_bytes
    for path in sorted(root.glob("*.py")):
        if left <= 0:
            break
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text:
            documents.append(text)
            left -= len(text.encode())
    return documents
