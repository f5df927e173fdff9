"""verify and restore: is the archive what was written, and a log made of it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspex.console.options import Options, common
from dspex.console.render import green, print_json, red

if TYPE_CHECKING:
    from dspex.bus.client import Client
    from dspex.compose.settings import Settings
    from dspex.core.subjects import Subjects
    from dspex.store.verify import Report

    Found = tuple[Report, list[int], list[int]]

__all__ = ["restore", "verify"]

ARCHIVE, LOG_FILE = "archive.db", "log.db"
MAX_SHOWN = 10
PATIENCE = 3600.0


@click.command(short_help="Check an archive, and mend it.")
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--against-log", is_flag=True, help="Also compare every row with the log of the running system.")
@click.option("--repair", is_flag=True, help="Fetch what is wrong or missing from the log.")
@common
def verify(options: Options, file: Path | None, against_log: bool, repair: bool) -> int:
    """Check every row of an archive against the chain of checksums and the head kept beside it.

    FILE is an archive, a log in SQLite or an export; by default the archive of the data folder, or its log when that is
    in SQLite. Names what is wrong; exit code 1 when something is.
    --repair and --against-log need the log: of the system that runs, or of the data folder when none does.
    """
    from dspex.store.verify import verify as check

    settings = options.settings()
    own = settings.data / ARCHIVE
    if not own.is_file() and (settings.data / LOG_FILE).is_file():
        own = settings.data / LOG_FILE
    place = file or own
    _refuse_old(place)
    if (against_log or repair) and place.name == LOG_FILE:
        raise click.UsageError(f"{place} is the log itself: there is nothing to compare it with, or to mend it from")
    if not (against_log or repair):
        report = check(place)
        _show(options, report, [], [])
        return 0 if report.ok else 1
    report, fetched, lost = _with_log(options, settings, place, against_log, repair)
    mended = bool(fetched) and not lost and not against_log
    _show(options, report, fetched, lost)
    return 0 if report.ok or mended else 1


def _refuse_old(file: Path) -> None:
    """Raise UsageError for what an older `dspex export` wrote: it has no checksums to verify."""
    import sqlite3
    from contextlib import closing

    if not file.is_file():
        return
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            columns = {row[1] for row in connection.execute("PRAGMA table_info(log)")}
    except sqlite3.Error:
        return  # damaged: verifying it says how
    if columns and "chain" not in columns:
        raise click.UsageError(f"{file} was exported by an older dspex, before rows had checksums")


def _with_log(options: Options, settings: Settings, file: Path, against_log: bool, repair: bool) -> Found:
    """Verify with the log at hand: of the system that runs, else of the data folder's own server, started for it."""
    from dspex.bus.server import Server
    from dspex.compose.folder import Folder
    from dspex.compose.secure import operator_of
    from dspex.core.errors import ConnectionFailed

    own = file.absolute() == (settings.data / ARCHIVE).absolute()
    try:
        return options.run(_of_system(options, file, own, against_log, repair))
    except ConnectionFailed as error:
        if settings.nats or not (settings.data / "server").is_dir():
            raise ConnectionFailed(f"{error}; --repair and --against-log need the log") from None
    folder = Folder(settings.data)
    try:
        access, credentials = operator_of(folder.path)
        with Server(folder.path / "server", durability="power", access=access) as server:
            return options.run(_of_server(server.url, settings.prefix, credentials, file, against_log, repair))
    finally:
        folder.close()


async def _of_system(options: Options, file: Path, own: bool, against_log: bool, repair: bool) -> Found:
    """The archivist verifies the file that it writes; any other file is ours to do."""
    import msgspec

    from dspex.core import headers as h
    from dspex.core.errors import LogError
    from dspex.store.verify import Report

    async with options.connect() as caller:
        if own:
            wanted = msgspec.json.encode({"against_log": against_log, "repair": repair})
            reply = await caller.client.request(caller.subjects.archive("verify"), wanted, timeout=PATIENCE)
            if reply.headers.get(h.ERROR_CODE):
                raise LogError(reply.headers.get(h.ERROR, "the archivist refused"))
            if not reply.status:
                body = msgspec.json.decode(reply.data)
                return msgspec.convert(body["report"], Report), body["mended"]["fetched"], body["mended"]["lost"]
        return await _beside(caller.client, caller.subjects, file, against_log, repair)


async def _of_server(
    url: str, prefix: str, credentials: str | None, file: Path, against_log: bool, repair: bool
) -> Found:
    from dspex.bus.client import Client
    from dspex.bus.identity import subjects_of

    async with await Client.connect(url, name="dspex verify", wait=10.0, credentials=credentials) as client:
        return await _beside(client, subjects_of(prefix, credentials), file, against_log, repair)


async def _beside(client: Client, subjects: Subjects, file: Path, against_log: bool, repair: bool) -> Found:
    from dspex.agents.registered import log_of
    from dspex.agents.vault import Vault
    from dspex.agents.veiled import VeiledLog
    from dspex.bus.objects import NatsKeys, NatsObjects
    from dspex.bus.streams import restored_to
    from dspex.store.jetstream import JetStreamLog
    from dspex.store.mend import examine

    log = await log_of(client, subjects)
    restored = await restored_to(client, subjects) if isinstance(log, JetStreamLog) else 0
    vault = Vault(NatsKeys(client, subjects), NatsObjects(client, subjects))
    veiled = VeiledLog(log, subjects, vault)
    report, mended = await examine(file, veiled, mend=repair, against_log=against_log, restored=restored)
    return report, mended.fetched, mended.lost


def _show(options: Options, report: Report, fetched: list[int], lost: list[int]) -> None:
    import msgspec

    if options.json:
        said: dict[str, Any] = msgspec.to_builtins(report)
        first = report.first
        brief = {"ok": report.ok, "first": msgspec.to_builtins(first) if first else None}
        print_json({**brief, **said, "fetched": fetched, "lost": lost})
        return
    for gap in report.gaps[:MAX_SHOWN]:
        click.echo(f"gap: positions {gap.first} to {gap.last}: {gap.reason}")
    for fault in sorted(report.faults, key=lambda fault: fault.position)[:MAX_SHOWN]:
        click.echo(red(fault.what))
    if report.bad > MAX_SHOWN:
        click.echo(f"and {report.bad - MAX_SHOWN:,} more")
    if report.ok:
        rows = f"{report.rows:,} rows up to position {report.position:,}"
        click.echo(f"{green('ok')}  {report.file}: {rows}, none changed")
    elif lost:
        click.echo(f"not mended: position {lost[0]} is in the archive no more, and not in the log; nothing was changed")
    elif fetched:
        click.echo(f"{green('mended')}  {len(fetched):,} rows were put right from the log; verify again to see")


@click.command(short_help="Make a log of an archive again.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--replace", is_flag=True, help="Put a damaged log of the data folder aside, and take its place.")
@common
def restore(options: Options, file: Path, replace: bool) -> int:
    """Rebuild the log from an archive: the same positions, the same epoch.

    Into the server that --nats names, else into the data folder (--data), where no system may run meanwhile. A log
    that is there already is never touched; with --replace it is kept beside the new one.
    """
    from dspex.bus.blocks import stream_folder
    from dspex.bus.server import Server
    from dspex.compose.folder import Folder
    from dspex.compose.secure import operator_of
    from dspex.compose.settings import load_settings
    from dspex.core.errors import LogError
    from dspex.core.subjects import Subjects
    from dspex.store.verify import verify as check

    settings = load_settings({"nats": options.nats, "data": options.data, "prefix": options.prefix})
    if not file.exists():
        raise FileNotFoundError(2, "there is no such archive", str(file))
    if settings.nats and replace:
        raise click.UsageError("--replace is for the log of the data folder; delete the stream on your own server")
    if settings.nats:
        return options.run(_restore(options, file, settings.nats, settings.prefix, settings.credentials))
    folder = Folder(settings.data)
    try:
        place = folder.path / "server"
        access, credentials = operator_of(folder.path)
        old = stream_folder(place, Subjects(settings.prefix).stream)
        if old and replace:
            first = check(file).first
            if first:
                raise LogError(f"{file} is not right, so nothing is put aside for it: {first.what}")
            click.echo(f"the log that was there is kept as {old.replace(_aside(place))}", err=True)
        with Server(place, durability="power", access=access) as server:
            work = _restore(options, file, server.url, settings.prefix, credentials, taken=bool(old) and not replace)
            return options.run(work)
    finally:
        folder.close()


def _aside(server: Path) -> Path:
    number = 1
    while (place := server / f"damaged-{number}").exists():
        number += 1
    return place


async def _restore(
    options: Options, file: Path, url: str, prefix: str, credentials: str | None, *, taken: bool = False
) -> int:
    """`taken` says that the server has a folder for the log already, whether or not it could load it."""
    from dspex.agents.restoring import restore as rebuild
    from dspex.bus.client import Client
    from dspex.bus.identity import subjects_of
    from dspex.bus.streams import has_stream, jetstream_api
    from dspex.core.errors import LogError

    subjects = subjects_of(prefix, credentials)
    client = await Client.connect(url, name="dspex restore", credentials=credentials)
    try:
        if taken and "error" in await jetstream_api(client, f"STREAM.INFO.{subjects.stream}"):
            raise LogError("there is a log that the server cannot load; --replace puts it aside and takes its place")
        if await has_stream(client, subjects.queue_stream):
            raise LogError(f"a log process owns the log of {prefix} on this server; nothing is put in its place")
        last = await rebuild(file, client, subjects)
    finally:
        await client.close()
    if options.json:
        print_json({"restored": str(file), "position": last})
    else:
        click.echo(f"{green('restored')}  the log up to position {last:,}; start its system with `dspex up`")
    return 0
