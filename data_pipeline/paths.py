"""Files: found by the patterns a user writes, and written whole or not at all."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from braceexpand import braceexpand


def expand_paths(patterns: Iterable[str | Path], *, what: str) -> list[Path]:
    """Existing files for paths, brace patterns (``text-{000..127}.tar``) and globs (``src/**/*.py``).

    The order of the patterns is kept, each glob is sorted, repeats are dropped.

    Raises:
        FileNotFoundError: a pattern, or one of its brace members, matches no file; ``what`` says what was
        sought.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        if Path(pattern).is_file():
            found[Path(pattern)] = None
            continue
        try:
            members = list(braceexpand(str(pattern)))
        except ValueError as error:
            raise ValueError(f"{what} {str(pattern)!r}: unbalanced braces; write text-{{000..127}}.tar") from error
        for member in members:
            path = Path(member)
            matches = [path]
            if any(letter in member for letter in "*?["):
                matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
            files = [match for match in matches if match.is_file()]
            if not files:
                hint = "it is a folder: add a pattern such as /*" if path.is_dir() else "check the path"
                raise FileNotFoundError(f"{what} {str(pattern)!r}: no file matches {member}; {hint}")
            found.update(dict.fromkeys(files))
    if not found:
        raise FileNotFoundError(f"{what}: the list of patterns is empty; name at least one file")
    return list(found)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; safe when several processes write the same one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
