"""Where the members of a shard lie, and what is wrong with the tar itself."""

import mmap
from collections import Counter
from dataclasses import dataclass, field
from typing import IO

from data_pipeline.doctor.archive import Torn, members, split_name
from data_pipeline.doctor.findings import Findings
from data_pipeline.images.index import PICTURES

Place = tuple[int, int]  # bytes from the start of the tar, bytes


@dataclass
class Layout:
    """Members of a shard up to its first damage, which ``torn`` tells."""

    tokens: list[tuple[str, Place]] = field(default_factory=list)  # of documents: key and place
    tables: dict[str, Place] = field(default_factory=dict)  # .json by key
    pictures: int = 0
    others: Counter[str] = field(default_factory=Counter)  # extensions
    torn: bool = False
    outside: bool = False  # a member's name leads out of the tar

    @property
    def kind(self) -> str:
        if self.tokens:
            return "tokens"
        return "pictures" if self.pictures or self.tables or self.others["txt"] else ""


def read_layout(name: str, file: IO[bytes], data: mmap.mmap, findings: Findings) -> Layout:
    """Read the headers of a shard called ``name``; ``data`` is the mapping of ``file``."""
    layout = Layout()
    seen: dict[str, set[str]] = {}
    current = ""
    try:
        for member in members(file, data):
            if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
                findings.add("member-name", f"{member.name!r} is absolute or has '..' in it", name)
                layout.outside = True
            if not member.plain:
                if not member.name.endswith("/"):
                    findings.add("member-kind", f"{member.name!r} is no plain file", name)
                continue
            key, extension = split_name(member.name)
            if not extension or not key or key.endswith("/"):  # its name has no dot, or begins with one
                continue
            extension = extension.lower()
            before = seen.get(key)
            if before is not None and (extension in before or key != current):
                twice = "twice" if extension in before else "again, apart from its other members"
                findings.add("duplicate-key", f".{extension} comes {twice}, at byte {member.offset}", name, key)
            seen.setdefault(key, set()).add(extension)
            current = key
            _sort_in(layout, key, extension, (member.offset, member.size))
    except Torn as damage:
        layout.torn = damage.code == "torn"
        findings.add(damage.code, str(damage), name)
    for key in seen.keys() - {key for key, _ in layout.tokens} if layout.tokens and not layout.torn else ():
        findings.add("orphan", f"has .{' .'.join(sorted(seen[key]))} and no .tokens", name, key)
    if not layout.kind and not layout.torn:
        found = ", ".join(sorted(layout.others)) or "nothing"
        findings.add("no-sample", f"holds no .tokens and no pictures with texts (found: {found})", name)
    return layout


def _sort_in(layout: Layout, key: str, extension: str, place: Place) -> None:
    if extension == "tokens":
        layout.tokens.append((key, place))
    elif extension == "json":
        layout.tables[key] = (0, 0) if key in layout.tables else place  # of two, nobody knows which is whose
    elif extension.rpartition(".")[2] in PICTURES:
        layout.pictures += 1
    else:
        layout.others[extension] += 1


def map_file(file: IO[bytes]) -> mmap.mmap:
    """A read-only mapping, closed when nothing views it any more. Raises Torn for an empty file."""
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise Torn("it is empty") from error
