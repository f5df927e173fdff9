"""A log on a real nats-server, damaged at one random place each time: is it noticed, is it named, does it come back?

    python benchmarks/damage.py [--flips 200] [--seed 1] [--short] [--json]

A part of the log was archived, the rest was not yet. The server is stopped or killed, its files are damaged, and it is
started again; then the archivist's steps are taken: it looks whether the log is still the one it knows, archives what
is new, compares everything, and the log is restored from the archive. What is found is held against what the log
really gives and what was once written. Exit code 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from struct import unpack_from
from typing import Any

from dspex.agents.journal import events_for
from dspex.agents.restoring import keep_positions, restore
from dspex.bus.blocks import last_position
from dspex.bus.client import Client
from dspex.bus.health import end_of_stream
from dspex.bus.server import Server
from dspex.bus.streams import Known, ensure_log, set_doors
from dspex.core.errors import ConfigurationError, LogCorrupt, LogError
from dspex.core.events import EffectRecorded, Head
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects
from dspex.store.archive import Archive
from dspex.store.jetstream import JetStreamLog
from dspex.store.mend import compare
from dspex.store.verify import Report, verify

SUBJECTS = Subjects()
ENTRIES, FEW = 3000, 600
STARTS = 5.0
"""Seconds that a server gets to come up."""
HEAD = 22
"""Bytes of a record in a block before its subject: length, position, time, length of the subject."""
SUM = 8
"""Bytes of its checksum, at its end."""
PLACES = (
    "length", "sequence", "time", "subject", "body", "checksum", "anywhere", "index", "description", "zeros", "cut",
)  # fmt: skip


@dataclass
class Whole:
    """A log as it was written, and the folders of servers that ended in one way or the other."""

    entries: list[Entry]
    epoch: str
    archived: int
    archive: Path
    folders: dict[str, Path]


@dataclass
class Trial:
    """One damage, and what came of it."""

    place: str
    ending: str
    archived: bool
    """The damaged record was in the archive."""
    lost: int = 0
    """Archived positions that the log does not give any more, or otherwise."""
    unnoticed: int = 0
    """Of these, how many nothing pointed at."""
    lost_new: int = 0
    """Positions behind the archive that the log does not give any more."""
    unnamed: int = 0
    """Of these, how many are neither a gap nor in a refusal."""
    gone: int = 0
    """Positions behind the archive whose records were cut off with the end of the file: nothing can tell of them."""
    stuck: bool = False
    """The server did not come up."""
    spoilt: int = 0
    """Rows of the archive that are not what was written, afterwards."""
    unrestored: int = 0
    said: list[str] = field(default_factory=list)


# -- the log


async def build(folder: Path, entries: int, archived: int) -> Whole:
    """Write a log of submissions and commits and archive its first part; folders as a stop and as a kill leave them."""
    server = Server(folder / "killed")
    server.start()
    async with await Client.connect(server.url) as client:
        epoch = await ensure_log(client, SUBJECTS, ["qabot"])
        log = JetStreamLog(client, SUBJECTS, epoch)
        while await log.head() < entries:
            await asyncio.gather(*(_task(log) for _ in range(50)))
        written = await everything(log)
        archive = await Archive.open(folder / "archive.db", epoch=epoch)
        await archive.add(written[:archived])
        await archive.close()
    server.kill()
    server.stop()
    shutil.copytree(folder / "killed", folder / "stopped")
    again = Server(folder / "stopped")
    again.start()
    again.stop()
    return Whole(written, epoch, archived, archive.file, {name: folder / name for name in ("killed", "stopped")})


async def _task(log: JetStreamLog) -> None:
    task = await log.store("dspex.task.qabot", random.randbytes(random.randrange(50, 3000)).hex().encode(), {"A": "b"})
    head = Head()
    for number in range(2):
        record = EffectRecorded(key=f"~0/qabot.fetch#{number}", name="fetch", digest="0" * 16)
        events = events_for(f"task.qabot.{task}", head, [record] * random.randrange(1, 4), source="/x", correlation="1")
        head = (await log.append(f"task.qabot.{task}", events, head)).head


async def everything(log: JetStreamLog) -> list[Entry]:
    found: list[Entry] = []
    while more := await log.scan(found[-1].position if found else 0):
        found += more
    return found


# -- the damage


def records(block: bytes) -> Iterator[tuple[int, int, int]]:
    """Start, end and position of each record of an undamaged block."""
    at = 0
    while at + HEAD <= len(block):
        length, position = unpack_from("<IQ", block, at)
        length &= 0x7FFFFFFF
        yield at, at + length, position
        at += length


def damage(folder: Path, place: str, chance: random.Random) -> int:
    """Damage one file of the log's stream; the position that is hit, 0 when it is none of the messages."""
    stream = next(folder.glob("jetstream/jetstream/*/streams/DSPEX"))
    if place in ("index", "description"):
        names = ["msgs/index.db"] if place == "index" else ["meta.inf", "meta.sum"]
        files = [stream / name for name in names if (stream / name).exists()]
        if files:
            _flip(file := chance.choice(files), chance.randrange(file.stat().st_size), chance)
            return 0
    blocks = sorted(stream.glob("msgs/*.blk"))
    block = chance.choices(blocks, [file.stat().st_size for file in blocks])[0]
    data = block.read_bytes()
    start, end, position = chance.choice(list(records(data)))
    subject = unpack_from("<H", data, start + 20)[0]
    spans = {
        "length": (start, start + 4), "sequence": (start + 4, start + 12), "time": (start + 12, start + 20),
        "subject": (start + 20, start + HEAD + subject), "body": (start + HEAD + subject, end - SUM),
        "checksum": (end - SUM, end),
    }  # fmt: skip
    if place == "zeros":
        block.write_bytes(data[:start] + bytes(min(4096, len(data) - start)) + data[start + 4096 :])
    elif place == "cut":
        block.write_bytes(data[: chance.randrange(start, end)])
    else:
        _flip(block, chance.randrange(*spans.get(place, (start, end))), chance)
    return position


def _flip(file: Path, at: int, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


# -- what comes of it


async def trial(whole: Whole, folder: Path, place: str, ending: str, chance: random.Random) -> Trial:
    shutil.copytree(whole.folders[ending], folder / "server")
    for file in whole.archive.parent.glob("archive.*"):
        shutil.copy(file, folder)
    archive = folder / whole.archive.name
    top = verify(archive).position
    hit = damage(folder / "server", place, chance)
    found = Trial(place, ending, 0 < hit <= top)
    server = Server(folder / "server")
    try:
        end = last_position(server.data, SUBJECTS.stream, SUBJECTS.prefix)
        server.start(STARTS)
    except (ConfigurationError, LogCorrupt) as error:  # it loads for ever; restoring puts the folder aside
        found.said.append(str(error))
        found.stuck, found.lost, found.lost_new = True, top, len(whole.entries) - top
        await _restored(whole, folder, archive, found, top)
        return found
    try:
        if (end_of_stream(server, SUBJECTS.stream) or end) < end:  # as the root does when it starts its server
            await keep_positions(server.url, SUBJECTS, end)
        async with await Client.connect(server.url) as client:
            end = max(end, end_of_stream(server, SUBJECTS.stream) or 0)
            await _look(client, whole, archive, top, found, max(end, top))
    finally:
        server.stop()
    await _restored(whole, folder, archive, found, max(end, top))
    return found


async def _look(client: Client, whole: Whole, archive: Path, top: int, found: Trial, end_known: int) -> None:
    """Take the archivist's steps, and hold what they say against what the log gives."""
    try:
        epoch = await ensure_log(client, SUBJECTS, known=Known(whole.epoch, top))
    except LogError as error:
        found.said.append(str(error))
        found.lost, found.lost_new = top, len(whole.entries) - top
        return
    await set_doors(client, SUBJECTS, ["qabot"])
    log = JetStreamLog(client, SUBJECTS, epoch, patience=5.0)
    have = {entry.position: entry for entry in await everything(log)}
    wrong = {entry.position for entry in whole.entries if have.get(entry.position) != entry}
    await _task(log)  # the system goes on
    refused = await _follow(log, archive, found)
    report = verify(archive, epoch=epoch)
    await compare(archive, log, report)
    named = {at for fault in report.faults for at in range(fault.position, (fault.last or fault.position) + 1)}
    end = await log.head()
    if end < report.position:
        named |= set(range(end + 1, report.position + 1))
    gaps = {position for gap in report.gaps for position in range(gap.first, gap.last + 1)}
    old, new = {position for position in wrong if position <= top}, {position for position in wrong if position > top}
    found.lost, found.unnoticed = len(old), len(old - named)
    found.lost_new, found.gone = len(new), max(0, len(whole.entries) - end_known)
    found.unnamed = 0 if refused else len({position for position in new if position <= end_known} - gaps - named)
    found.said += [fault.what for fault in report.faults[:2]]


async def _follow(log: JetStreamLog, archive: Path, found: Trial) -> bool:
    """Archive what is new; whether that was refused."""
    file = await Archive.open(archive, epoch=log.epoch)
    try:
        await file.check(log)
        while entries := await log.scan(file.position, 1000):
            await file.add(entries, log)
    except LogError as error:
        found.said.append(str(error))
        return True
    finally:
        await file.close()
    return False


async def _restored(whole: Whole, folder: Path, archive: Path, found: Trial, end_known: int) -> None:
    """Restore, and compare with what was once written: all that was archived has to be there."""
    report: Report = verify(archive)
    gaps = {position for gap in report.gaps for position in range(gap.first, gap.last + 1)}
    server = Server(folder / "restored")
    server.start()
    try:
        async with await Client.connect(server.url) as client:
            await restore(archive, client, SUBJECTS)
            log = JetStreamLog(client, SUBJECTS, whole.epoch)
            have = {entry.position: entry for entry in await everything(log)}
    finally:
        server.stop()
    for entry in whole.entries[:end_known]:
        mine = have.get(entry.position)
        if entry.position > report.position or (mine is None and entry.position in gaps):
            found.unrestored += entry.position <= whole.archived
        elif mine is None or (mine.subject, mine.body, mine.headers) != (entry.subject, entry.body, entry.headers):
            found.spoilt += 1


async def campaign(flips: int, seed: int, entries: int) -> dict[str, Any]:
    chance = random.Random(seed)  # not the common one, of which servers take their ports
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as place:
        whole = await build(Path(place), entries, entries * 4 // 5)
        for number in range(flips):
            kind, ending = PLACES[number % len(PLACES)], chance.choice(("stopped", "killed"))
            folder = Path(place, "trial")
            folder.mkdir()  # noqa: ASYNC240
            trials.append(await trial(whole, folder, kind, ending, chance))
            shutil.rmtree(folder)
    harmed = [trial for trial in trials if trial.lost or trial.lost_new]
    return {
        "trials": len(trials), "seed": seed, "harmless": len(trials) - len(harmed),
        "archived_lost": sum(trial.lost for trial in trials),
        "archived_unnoticed": sum(trial.unnoticed for trial in trials),
        "archived_unrestored": sum(trial.unrestored for trial in trials),
        "new_lost": sum(trial.lost_new for trial in trials), "cut_off": sum(trial.gone for trial in trials),
        "new_unnamed": sum(trial.unnamed for trial in trials),
        "archive_spoilt": sum(trial.spoilt for trial in trials),
        "harmed_in": Counter(f"{trial.place}, {trial.ending}" for trial in harmed),
        "server_stuck_in": Counter(f"{trial.place}, {trial.ending}" for trial in trials if trial.stuck),
        "unnamed_in": Counter(f"{trial.place}, {trial.ending}" for trial in trials if trial.unnamed),
        "unnoticed_in": Counter(f"{trial.place}, {trial.ending}" for trial in trials if trial.unnoticed),
        "spoilt_in": Counter(f"{trial.place}, {trial.ending}" for trial in trials if trial.spoilt),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=220)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="one damage of each kind, to a small log")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    flips, entries = (len(PLACES), FEW) if options.short else (options.flips, ENTRIES)
    found = asyncio.run(campaign(flips, options.seed, entries))
    broken = [name for name in (
        "archived_unnoticed", "archived_unrestored", "new_unnamed", "archive_spoilt",
    ) if found[name]]  # fmt: skip
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"{name.replace('_', ' '):22} {shown}")
        print(f"broken: {', '.join(broken)}" if broken else "every promise held")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
