"""A tar read member by member, as far as it is whole.

Plain headers are read here, ten times as fast as ``tarfile`` does; all others (long names, pax records) by ``tarfile``.
"""

import mmap
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from data_pipeline.index import BLOCK, END_OF_ARCHIVE

SIZE, CHECKSUM, KIND = slice(124, 136), slice(148, 156), 156  # fields of a header: POSIX ustar
MAGIC, PREFIX = slice(257, 263), slice(345, 500)
PLAIN = b"0\0"  # kinds of a plain file


class Torn(ValueError):
    """The tar cannot be read on from here; the message says where and why, ``code`` which finding it is."""

    code = "torn"


class BytesAfterEnd(Torn):
    """Something follows the end-of-archive mark: no reader sees it."""

    code = "after-end"


class Member(NamedTuple):
    """A member: its payload is ``size`` bytes from byte ``offset`` of the tar on."""

    name: str
    offset: int
    size: int
    plain: bool  # a plain file


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, as WebDataset has them: the extension begins at the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension


def members(file: IO[bytes], data: mmap.mmap) -> Iterator[Member]:
    """The members of a tar, ``file``, of which ``data`` is the mapping; at the first damage raises Torn."""
    position, last = 0, "nothing"
    while True:
        header = data[position : position + BLOCK]
        if header == END_OF_ARCHIVE[:BLOCK]:
            if data[position : position + 2 * BLOCK] != END_OF_ARCHIVE or len(data) % BLOCK:
                raise Torn(f"its end-of-archive mark at byte {position} is cut short")
            if np.frombuffer(data, np.uint8, offset=position).any():  # zeros alone fill a tar up
                raise BytesAfterEnd(f"{len(data) - position} bytes follow its end-of-archive mark at byte {position}")
            return
        if len(header) < BLOCK:
            raise Torn(f"it ends at byte {len(data)} without an end-of-archive mark, after {last}")
        member, position = _plain(header, position) or _special(file, position, last)
        if member.offset + member.size > len(data):
            raise Torn(f"{member.name!r} goes on to byte {member.offset + member.size}, the file has {len(data)}")
        yield member
        last = repr(member.name)


def _plain(header: bytes, position: int) -> tuple[Member, int] | None:
    """Member and position of the next header, for a plain file with a sound header; else None."""
    if header[KIND] not in PLAIN or header[124] & 0x80:
        return None
    try:
        size = int(header[SIZE].strip(b" \0") or b"0", 8)
        checksum = int(header[CHECKSUM].strip(b" \0"), 8)
    except ValueError:
        return None
    if sum(header) - sum(header[CHECKSUM]) + 8 * ord(" ") != checksum:
        return None
    name = header[:100].split(b"\0", 1)[0]
    if header[MAGIC] == b"ustar\0" and header[PREFIX.start]:
        name = header[PREFIX].split(b"\0", 1)[0] + b"/" + name
    begin = position + BLOCK
    member = Member(name.decode(errors="surrogateescape"), begin, size, not name.endswith(b"/"))
    return member, begin + -(-size // BLOCK) * BLOCK


def _special(file: IO[bytes], position: int, last: str) -> tuple[Member, int]:
    file.seek(position)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            found = archive.next()
            if found is not None:
                return Member(found.name, found.offset_data, found.size, found.isreg()), archive.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise Torn(f"no header of a member at byte {position}, after {last} ({error})") from error
    raise Torn(f"no header of a member at byte {position}, after {last}")
