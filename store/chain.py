"""What an archive's rows are chained by, and the head that is kept outside the file.

A row's chain is sha256 of the chain before it and of everything in the row, so no row can change, go, come or change
places without the rows after it saying so. The last rows have none after them: for these there is the head.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from struct import Struct as Packing
from typing import NamedTuple

import msgspec

from dspex.core.errors import LogCorrupt
from dspex.core.ports import Entry
from dspex.store.rules import microseconds

__all__ = [
    "EMPTY", "GAP", "HEAD_INSIDE", "ArchiveHead", "Gap", "Row", "chained", "digest", "entry_of", "gap_row", "head_path",
    "pack_head", "packed", "read_head", "row_of", "unpack_head", "write_head",
]  # fmt: skip

EMPTY = bytes(32)
"""The chain before the first row."""

GAP = ""
"""The subject of a row that stands for positions which the log did not have when they were to be archived."""

HEAD_INSIDE = "head"
"""Under this name a file that travels alone has its head within."""

_lengths = Packing(">QqIIQ").pack
_encode = msgspec.json.Encoder(order="sorted").encode
_decode_headers = msgspec.json.Decoder(dict[str, str]).decode


class Row(NamedTuple):
    """A row as it is stored; `time` in microseconds since the epoch, `headers` as JSON or None."""

    position: int
    time: int
    subject: str
    headers: str | None
    body: bytes
    chain: bytes = b""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Positions that were never archived, and why; the body of a row whose subject is `GAP`."""

    first: int
    last: int
    reason: str


class ArchiveHead(msgspec.Struct, frozen=True, kw_only=True):
    """How far a file goes, as it is kept outside of it."""

    epoch: str
    count: int = 0
    position: int = 0
    chain: str = EMPTY.hex()


def digest(row: Row) -> bytes:
    """The checksum of what a row says, apart from its place in the chain."""
    subject, headers = row.subject.encode(), (row.headers or "").encode()
    lengths = _lengths(row.position, row.time, len(subject), len(headers), len(row.body))
    return sha256(lengths + subject + headers + row.body).digest()


def chained(before: bytes, row: Row) -> bytes:
    """The chain of a row that stands behind the chain `before`."""
    subject, headers = row.subject.encode(), (row.headers or "").encode()
    lengths = _lengths(row.position, row.time, len(subject), len(headers), len(row.body))
    return sha256(before + lengths + subject + headers + row.body).digest()


def packed(headers: Mapping[str, str]) -> str | None:
    """Headers as they are stored."""
    return _encode(headers).decode() if headers else None


def row_of(entry: Entry) -> Row:
    """An entry as it is stored, not yet chained."""
    return Row(entry.position, round(entry.time * 1e6), entry.subject, packed(entry.headers), entry.body)


def entry_of(row: Row) -> Entry:
    """A row as the log's entry it was. Raises LogCorrupt."""
    try:
        headers = _decode_headers(row.headers) if row.headers else {}
    except (msgspec.MsgspecError, TypeError):
        raise LogCorrupt(f"position {row.position} of the archive is damaged; `dspex verify` says more") from None
    time = microseconds(row.time)
    return Entry(position=row.position, time=time, subject=row.subject, body=row.body, headers=headers)


def gap_row(first: int, last: int, time: int, reason: str) -> Row:
    """The row that says that the positions from `first` to `last` were not there."""
    return Row(first, time, GAP, None, msgspec.json.encode(Gap(first=first, last=last, reason=reason)))


def head_path(file: Path) -> Path:
    """Where the head of an archive is kept: `archive.head` beside `archive.db`."""
    return file.with_suffix(".head")


def read_head(file: Path) -> ArchiveHead | None:
    """The head kept for an archive; None when there is none. Raises LogCorrupt."""
    path = head_path(file)
    try:
        return msgspec.json.decode(path.read_bytes(), type=ArchiveHead)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LogCorrupt(f"{path} cannot be read as the head of an archive: {error}") from None


def pack_head(head: ArchiveHead) -> str:
    """A head as text."""
    return msgspec.json.encode(head).decode()


def unpack_head(text: str) -> ArchiveHead:
    """A head from its text. Raises LogCorrupt."""
    try:
        return msgspec.json.decode(text, type=ArchiveHead)
    except msgspec.DecodeError as error:
        raise LogCorrupt(f"the head in the file cannot be read: {error}") from None


def write_head(file: Path, head: ArchiveHead) -> None:
    """Keep a head: whole or not at all, and on disk when this returns. Raises OSError."""
    path = head_path(file)
    fresh = path.with_suffix(".head.new")
    number = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(number, msgspec.json.encode(head))
        os.fsync(number)
    finally:
        os.close(number)
    fresh.replace(path)
