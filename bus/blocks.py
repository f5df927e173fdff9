"""What the files of a stopped server say of a stream's end, read before the server reads them.

A server that finds a damaged message at the end of its last block cuts the block there and gives the positions behind
it away again, as if nothing had been acknowledged at them. Their records are in the file until then, and say how far
the log went. (Block files as nats-server 2.10 to 2.15 writes them: a record is its length, its position and its time,
the length of the subject, the subject, the message and a checksum, little endian.)
"""

from __future__ import annotations

from pathlib import Path
from struct import unpack_from

from dspex.core.errors import LogCorrupt

__all__ = ["last_position", "stream_folder"]

HEADER = 22
"""Bytes before the subject."""
LEAST = HEADER + 8
"""Bytes of the shortest record: its header and its checksum."""
LARGE = 1 << 31
"""This bit of a length says that the message has headers."""
MARKED = 3 << 62
"""These bits of a position say that the record is of a deleted message: erased, or only a note that it is gone."""
FAR = 1 << 16
"""A position that is farther than this from the one before is taken for damage."""
POISON = 1 << 22
"""One that is even farther keeps a server from loading the stream: it notes every position in between as deleted, and
takes all memory for it."""


def stream_folder(server: Path, stream: str) -> Path | None:
    """Where a server with the data folder `server` keeps a stream, also one that it cannot load; None without one."""
    return next(iter(server.glob(f"jetstream/jetstream/*/streams/{stream}")), None)


def last_position(server: Path, stream: str, prefix: str) -> int:
    """The highest position that stands in the last block of a stream whose subjects begin with `prefix`; 0 when there
    is none, or it cannot be read. Raises LogCorrupt for a block that no server should be given."""
    folder = stream_folder(server, stream)
    blocks = {int(file.stem): file for file in folder.glob("msgs/*.blk") if file.stem.isdecimal()} if folder else {}
    if not blocks:
        return 0
    try:
        data = blocks[max(blocks)].read_bytes()
    except OSError:
        return 0
    return _last(data, f"{prefix}.".encode())


def _last(data: bytes, prefix: bytes) -> int:
    before, last, at = 0, 0, 0
    while at + LEAST <= len(data):
        found = _record(data, at, prefix)
        if not found:
            # Damaged: the next record is where a subject stands behind what may be its header.
            subject = data.find(prefix, at + HEADER + 1)
            if subject < 0:
                break
            at = subject - HEADER
            continue
        position, at = found
        if position & MARKED:
            continue
        if last and position > last + POISON:
            raise LogCorrupt(
                f"behind position {last} of the log is {position}: a damaged block that nats-server would load for ever"
            )
        if last < position <= (last or position) + FAR:
            before, last = last, position
        elif before < position < last:  # it was the one before that had too high a position
            last = position
    return last


def _record(data: bytes, at: int, prefix: bytes) -> tuple[int, int] | None:
    """The position of the record that begins at `at`, and where the next one does; None when none does."""
    length, position = unpack_from("<IQ", data, at)
    length &= LARGE - 1
    subject = unpack_from("<H", data, at + 20)[0]
    if not LEAST <= length <= len(data) - at or subject > length - LEAST:
        return None
    if not position & MARKED and not data.startswith(prefix, at + HEADER):
        return None
    return position, at + length
