"""`dspex up`: runs a system in this process, and says what happens.

This process is the root of the system: it forks, so it has no event loop and starts no thread, and what it prints are
plain lines.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspex.console.bodies import example_of
from dspex.console.options import Options, common
from dspex.console.render import bold, clean, dim, green, print_json, red, shorten, yellow
from dspex.core.masking import masked

if TYPE_CHECKING:
    from dspex.compose.root import Plan
    from dspex.compose.settings import Settings

__all__ = ["ask_line", "data_flag", "exposed", "nats_line", "up"]

MAX_SHOWN = 5
LOOPBACK = "127.0.0.1"


@click.command(short_help="Run programs as supervised agents.")
@click.argument("app", required=False, type=click.Path())
@click.option("--agents", metavar="N", help="Processes that serve each program: 4, or 1..8 by load (default: 1).")
@click.option(
    "--durability",
    type=click.Choice(["power", "process"]),
    help="What an acknowledged task survives: loss of power (the default), or any crash of ours.",
)
@click.option("--log", metavar="NAME", help="Where the log is: jetstream (the default), sqlite, or an added one.")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="The port of our own server; when taken, the next free one."
)
@click.option("--host", metavar="ADDRESS", help="The address our own server listens on (default: 127.0.0.1).")
@click.option("--secure", is_flag=True, help="Run with access rules and TLS; made when they are missing.")
@click.option("--reload", "watch", is_flag=True, help="Reload the programs when their files change.")
@click.option("--replace", is_flag=True, help="Let changed schemas take the place of those registered.")
@common
def up(
    options: Options, app: str | None, agents: str | None, durability: str | None, log: str | None, port: int | None,
    host: str | None, secure: bool, watch: bool, replace: bool,
) -> int:  # fmt: skip
    """Run programs as supervised agents, until Ctrl-C.

    APP is file.py, file.py:Program, or a dspex.toml; without it ./dspex.toml names the programs. Starts a NATS server
    in the data folder, unless --nats names one.

    With --json one line is printed, when everything serves: {"ready": true, "nats": "nats://…", …}.
    """
    from dspex.compose.root import SystemSpec, run_root

    settings, plans = _plans(options, app, agents, durability, log)
    if port and settings.nats:
        raise click.UsageError(f"--port is for our own server, but {masked(settings.nats)} is to be used")
    if host and settings.nats:
        raise click.UsageError(f"--host is for our own server, but {masked(settings.nats)} is to be used")
    warning = exposed(settings.nats or f"nats://{host or LOOPBACK}", settings.nats, secure)
    if warning:
        click.echo(f"{yellow('dspex:')} {warning}", err=True)
    spec = SystemSpec(
        plans, data=settings.data, nats=settings.nats, port=port or 0, credentials=settings.credentials,
        prefix=settings.prefix, durability=settings.durability, log=settings.log, replace=replace, debug=options.debug,
        retention=settings.retention.bounds(), secure=secure, host=host or LOOPBACK, master=settings.privacy.key,
        limits=settings.limit_texts(), marks=settings.doors.marks(), watch=watch,
        supervisors=settings.named() if not app or app.endswith(".toml") else (),
    )  # fmt: skip
    teller = _Teller(options.json, port or 0, settings, secure)
    teller.begin()
    status = run_root(spec, on_event=teller.hear)
    teller.end(status)
    return status


def exposed(url: str, given: str | None, secure: bool) -> str:
    """What is to be said of a server that others can reach and that lets everybody in; "" when there is nothing.

    `given` is the URL of somebody else's server, which is asked where it listens and whether it wants credentials."""
    if secure:
        return ""
    reached = [place for place in url.split(",") if _open_to_others(place, bool(given))]
    if not reached:
        return ""
    return (
        f"{masked(','.join(reached))} is reached from other machines and lets everybody in: whoever connects can read, "
        "forge and erase everything. Use --secure, or listen on 127.0.0.1"
    )


def _open_to_others(place: str, given: bool) -> bool:
    from dspex.bus.probe import is_loopback, probe

    if not given:
        return not is_loopback(place)
    info = probe(place)
    if info is None or info.get("auth_required") or info.get("tls_verify"):
        return False
    return not is_loopback(place) or not is_loopback(str(info.get("host") or "127.0.0.1"))


def _plans(
    options: Options, app: str | None, agents: str | None, durability: str | None, log: str | None
) -> tuple[Settings, list[Plan]]:
    """The settings, and what is to be served."""
    from dspex.compose.app import split_app
    from dspex.compose.root import Plan
    from dspex.core.errors import ConfigurationError

    toml = Path(app) if app and app.endswith(".toml") else None
    settings = options.settings(file=toml, durability=durability, log=log, agents=agents)
    if app and not toml:
        path, _ = split_app(app)
        if not path.is_file():
            raise ConfigurationError(f"there is no file {path}; give one like qa.py or qa.py:QABot")
        return settings, [Plan(app, settings.scale.least, scale=settings.scale)]
    folder = toml.parent if toml else Path()
    plans = []
    for name, program in settings.programs.items():
        scale = settings.scale if agents else program.scale
        begins = scale.least if agents else (program.agents or scale.least)
        plans.append(
            Plan(
                str(folder / program.app), begins, name, scale=scale, max_queue=program.max_queue,
                upkeep=settings.upkeep(name),
            )
        )
    if not plans:
        where = str(toml) if toml else "no file was given and ./dspex.toml"
        raise ConfigurationError(
            f'{where} names no programs; try dspex up qa.py, or add [programs.qabot] with app = "qa.py"'
        )
    return settings, plans


@dataclass
class _Teller:
    """Says what the root hears."""

    as_json: bool
    port: int
    settings: Settings
    secure: bool = False
    ready: bool = False
    started: float = field(default_factory=time.monotonic)
    programs: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, Any] | None = None
    down: set[str] = field(default_factory=set)

    def begin(self) -> None:
        if not self.as_json:
            where = masked(self.settings.nats or "") or f"a NATS server in {self.settings.data}"
            click.echo(dim(f"starting on {where} …"))
            sys.stdout.flush()

    def hear(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "loaded":
                self.programs = event["programs"]
            case "ready":
                self.ready = True
                self._say_ready(event["nats"], event["data"])
            case "refused" if not self.ready:
                self.refused = self.refused or event
            case "gave-up":
                click.echo(red(f"dspex: gave up {event['agent']}, because {event['reason']}"), err=True)
            case "nothing-serves":
                click.echo(red("dspex: nothing is left that serves"), err=True)
            case "escalated" if event.get("delay") is None:
                self._line(yellow(f"{event['agent']} restarts with all of its children: {event['reason']}"))
            case "refused":
                self._line(red(f"{event['agent']} cannot serve: {event['reason']}"))
            case "crashed":
                self.down.add(event["agent"])
                soon = f" in {event['delay']:g} s" if event.get("delay") else ""
                who = f"{event['agent']} (process {event['pid']}) died" if "pid" in event else event["agent"]
                self._line(yellow(f"{who}: {event['reason']}; starting it again{soon}"))
            case "draining":
                tasks = f"{event['tasks']} task{'' if event['tasks'] == 1 else 's'}"
                self._line(dim(f"{event['agent']} lets {tasks} end, for at most {event['grace']:g} s; again to hurry"))
            case "scaled":
                who = f" ({', '.join(part for part in (event['by'], event['reason']) if part)})"
                self._line(f"{event['program']} gets {event['agents']} agents{who}")
            case "reloaded":
                for it in event["programs"]:
                    self._line(green(f"{it['program']} serves with code {it['code']}, reloaded by {event['by']}"))
            case "not-reloaded":
                self._line(red(f"not reloaded: {event['reason']}; the code that serves goes on"))
            case "limit":
                self._line(yellow(clean(event["reason"])))
            case "trouble":
                self._line(red(event["reason"]))
            case "better" | "rules":
                self._line(green(event["reason"]))
            case "serving" if event["agent"] in self.down:
                self.down.discard(event["agent"])
                self._line(green(f"{event['agent']} serves again"))

    def end(self, status: int) -> None:
        """After the system ended: raise what it was refused for, or say goodbye."""
        from dspex.core.errors import ConfigurationError, Conflict

        if self.refused:
            kind = Conflict if self.refused.get("role") == "agent" else ConfigurationError
            raise kind(self.refused["reason"])
        if status == 0 and self.ready:
            self._line("drained and stopped")

    def _line(self, text: str) -> None:
        click.echo(f"{dim(time.strftime('%H:%M:%S'))} {text}", err=self.as_json)

    def _say_ready(self, url: str, data: str) -> None:
        url = masked(url)
        if self.port and not url.endswith(f":{self.port}"):
            click.echo(
                f"dspex: port {self.port} is taken; the server listens on {url.rpartition(':')[2]} instead", err=True
            )
        if self.as_json:
            print_json({"ready": True, "nats": url, "console": None, "data": data})
            return
        click.echo(f"{green('ready')} in {time.monotonic() - self.started:.1f} s\n")
        self._say_programs()
        click.echo(f"\n  nats   {url}\n  data   {data}\n")
        click.echo("Try, in another terminal:\n")
        flag = data_flag(self.settings.data)
        for program in self.programs[:MAX_SHOWN]:
            body = example_of(program["input_schema"])
            click.echo(f"  {ask_line(program['program'], body, flag)}")
            click.echo(f"  {nats_line(program['program'], body, url, self.settings.prefix)}{self._nats_flags(data)}")
        click.echo(f"  dspex events --follow{flag}\n")
        click.echo(dim("Ctrl-C drains the agents and stops."))
        sys.stdout.flush()


    def _nats_flags(self, data: str) -> str:
        """Who the `nats` command is to be, on a system with access rules."""
        import shlex

        folder = Path(data) / "secure"
        if not self.secure:
            return ""
        return f" --nkey {shlex.quote(str(folder / 'console.nk'))} --tlsca {shlex.quote(str(folder / 'ca.pem'))}"

    def _say_programs(self) -> None:
        """A line for each program, cut where 80 columns or the terminal end."""
        counts = [f"{it['agents']} agent{'' if it['agents'] == 1 else 's'}" for it in self.programs]
        wide, most = max(len(it["program"]) for it in self.programs), max(map(len, counts))
        room = max(shutil.get_terminal_size().columns - wide - most - 6, 16)
        for program, count in zip(self.programs, counts, strict=True):
            name, doc = program["program"].ljust(wide), shorten(clean(program["doc"]), room)
            click.echo(f"  {bold(name)}  {dim(count.ljust(most))}  {doc}".rstrip())
            if program["confined"]:
                click.echo(dim(f"  {' ' * wide}  {program['confined']}"))


def data_flag(data: Path) -> str:
    """` --data DIR` as a command needs it to find the system, "" for the folder it looks in anyway."""
    import shlex

    return "" if data == Path(".dspex") else f" --data {shlex.quote(str(data))}"


def ask_line(program: str, body: dict[str, Any], flag: str) -> str:
    """A paste-ready `dspex ask`."""
    import shlex

    if body and all(isinstance(value, str | int | float) for value in body.values()):
        fields = " ".join(f"{name}={_quoted(value)}" for name, value in body.items())
    else:
        fields = shlex.quote(json.dumps(body, ensure_ascii=False, separators=(",", ":")))
    return f"dspex ask {program} {fields}{flag}"


def nats_line(program: str, body: dict[str, Any], url: str, prefix: str) -> str:
    """A paste-ready request with the `nats` command line."""
    import shlex

    content = shlex.quote(json.dumps(body, ensure_ascii=False, separators=(",", ":")))
    return f"nats req {prefix}.ask.{program} {content} -s {url}"


def _quoted(value: object) -> str:
    import shlex

    if not isinstance(value, str):
        return json.dumps(value)
    text = value if '"' in value or "$" in value or "`" in value or "\\" in value or "!" in value else ""
    return shlex.quote(text) if text else f'"{value}"'
