"""Settings: a flag, then the environment, then `./dspex.toml`, then the NATS context, then the default."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dspex.agents.bounds import Bounds
from dspex.core.doors import Marks
from dspex.core.errors import ConfigurationError, InvalidInput
from dspex.core.limits import limit_of, parse_scope
from dspex.core.scaling import Scale
from dspex.core.supervision import GIVE_UP, Intensity, Restart, Strategy, SupervisorSpec
from dspex.core.upkeep import Named, Upkeep, arranged

__all__ = [
    "DEFAULT_URL", "Place", "ProgramSettings", "RetentionSettings", "Settings", "find_credentials", "find_server",
    "load_settings",
]  # fmt: skip

DEFAULT_URL = "nats://127.0.0.1:4222"
FILE = "dspex.toml"
PLACE = "system.json"
SECURE = "secure"
"""The folder of identities in a data folder."""


MAX_FILE = 1 << 20
"""Bytes of a `dspex.toml`."""
UNSHOWN = ("privacy.key", "nats", "credentials")
"""Settings whose wrong values are not shown."""
MAX_SHOWN = 80
"""Characters that are shown of others."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _measured(units: Mapping[str, int]) -> Callable[[object], object]:
    """Reads `7d` or `10 GiB`; a plain number is in the smallest unit."""

    def read(value: object) -> object:
        found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]+)", value) if isinstance(value, str) else None
        if found is None:
            return value
        if found[2] not in units:
            raise ValueError(f"write it as a number and one of {', '.join(units)}")
        return float(found[1]) * units[found[2]]

    return read


def _scale(value: object) -> object:
    """Reads `8` or `1..8`."""
    if not isinstance(value, int | str):
        return value
    scale = Scale.read(str(value))
    if not scale.least:
        raise ValueError("there must be one at least")
    return scale if scale.automatic else scale.most


def _intensity(value: object) -> object:
    """Reads `1/5s`."""
    return Intensity.read(value) if isinstance(value, str) else value


_Seconds = Annotated[float, Field(ge=0), BeforeValidator(_measured(_TIMES))]
_Bytes = Annotated[int, Field(ge=0), BeforeValidator(_measured(_SIZES))]
_Count = Annotated[int, Field(ge=0), BeforeValidator(_measured({"tasks": 1, "task": 1}))]
_Intensity = Annotated[Intensity, BeforeValidator(_intensity)]


class ProgramSettings(_Frozen):
    """One `[programs.<name>]` table: where the class is, how many agents serve it, and how these are looked after.

    The agents are so many, or between `min_agents` and `max_agents`, so that no task waits longer than `max_wait`
    seconds; there are fewer again when `quiet` seconds have needed fewer.
    """

    app: str
    agents: Annotated[int | None, Field(ge=1, le=1000)] = None
    min_agents: Annotated[int | None, Field(ge=1, le=1000)] = None
    max_agents: Annotated[int | None, Field(ge=1, le=1000)] = None
    max_wait: Annotated[float, Field(ge=0.1, le=3600), BeforeValidator(_measured(_TIMES))] = 1.0
    quiet: Annotated[float, Field(ge=1, le=86_400), BeforeValidator(_measured(_TIMES))] = 30.0
    max_queue: Annotated[int | None, Field(ge=1)] = None
    restart: Restart = "permanent"
    intensity: _Intensity = Intensity()
    give_up: Annotated[int, Field(ge=0)] = GIVE_UP
    shutdown: _Seconds = 10.0
    blocked_after: _Seconds = 0.0
    memory: _Bytes = 0
    cpu: Annotated[float, Field(ge=0)] = 0.0
    recycle_after: _Count = 0
    recycle_memory: _Bytes = 0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.scale.least > self.scale.most:
            raise ValueError(f"min_agents = {self.scale.least} is more than max_agents = {self.scale.most}")
        if self.agents is not None and not self.scale.least <= self.agents <= self.scale.most:
            raise ValueError(f"agents = {self.agents} is not between min_agents and max_agents")
        return self

    @property
    def scale(self) -> Scale:
        fixed = self.agents or 1
        if self.min_agents is None and self.max_agents is None:
            return Scale(fixed, fixed, self.max_wait, self.quiet)
        least = self.min_agents or 1
        return Scale(least, self.max_agents or max(fixed, least), self.max_wait, self.quiet)


class SupervisorSettings(_Frozen):
    """One `[supervisors.<name>]` table: programs, or other supervisors, that are looked after together."""

    children: list[str]
    strategy: Strategy = "one_for_one"
    intensity: _Intensity = Intensity()
    restart: Restart = "permanent"
    give_up: Annotated[int, Field(ge=0)] = GIVE_UP


class RetentionSettings(_Frozen):
    """The `[retention]` table: what the log keeps of tasks that have ended and are archived. All of it, unless told."""

    age: Annotated[float | None, Field(gt=0), BeforeValidator(_measured(_TIMES))] = None
    count: Annotated[int | None, Field(ge=0)] = None
    bytes: Annotated[int | None, Field(ge=0), BeforeValidator(_measured(_SIZES))] = None

    def bounds(self) -> Bounds:
        return Bounds(self.age, self.count, self.bytes)


class LimitSettings(_Frozen):
    """One `[limits.<scope>]` table, such as `[limits.qabot]` or `[limits."model:small"]`."""

    rate: str | None = None
    concurrency: int | str | None = None
    usd: float | str | None = None
    tokens: int | str | None = None
    calls: int | str | None = None
    when_exhausted: Literal["fail", "wait"] | None = None

    @model_validator(mode="after")
    def _readable(self) -> LimitSettings:
        try:
            limit_of(self.texts())
        except InvalidInput as error:
            raise ValueError(str(error)) from None
        return self

    def texts(self) -> dict[str, str]:
        """As a limit is written."""
        return {name: str(value) for name, value in self if value is not None}


def _share(value: object) -> object:
    """Reads `80%`; a plain number is a share of 1."""
    found = re.fullmatch(r"([0-9.]+)\s*%", value) if isinstance(value, str) else None
    return float(found[1]) / 100 if found else value


class DoorsSettings(_Frozen):
    """The `[doors]` table: when new tasks are refused so that those that run have room to end. Shares of what the log
    has or could have, the bytes that it may have, those of the disk that stay free, and open tasks of one program."""

    high_water: Annotated[float, Field(gt=0, le=1), BeforeValidator(_share)] = Marks.high_water
    low_water: Annotated[float | None, Field(gt=0, le=1), BeforeValidator(_share)] = None
    max_bytes: Annotated[int | None, Field(gt=0), BeforeValidator(_measured(_SIZES))] = None
    room: Annotated[int, Field(ge=0), BeforeValidator(_measured(_SIZES))] = Marks.room
    max_open: Annotated[int | None, Field(ge=1)] = Marks.max_open

    @model_validator(mode="after")
    def _sound(self) -> DoorsSettings:
        self.marks()
        return self

    def marks(self) -> Marks:
        low = round(self.high_water * 0.875, 4) if self.low_water is None else self.low_water
        return Marks(self.high_water, low, self.max_bytes, self.room, self.max_open)


class PrivacySettings(_Frozen):
    """The `[privacy]` table: a reference to the master key that the keys of private values are sealed with."""

    key: Annotated[str, Field(pattern=r"^([a-z][a-z0-9_]*:.+)?$")] = ""


def _scope(text: str) -> str:
    try:
        return str(parse_scope(text))
    except InvalidInput as error:
        raise ValueError(str(error)) from None


class Settings(_Frozen):
    """Everything that can be set. `nats` None means the embedded server."""

    data: Path = Path(".dspex")
    nats: str | None = None
    credentials: str | None = None
    prefix: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")] = "dspex"
    durability: Literal["power", "process"] = "power"
    log: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")] = "jetstream"
    agents: Annotated[int | Scale, BeforeValidator(_scale)] = 1
    programs: dict[str, ProgramSettings] = {}
    supervisors: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")], SupervisorSettings] = {}
    retention: RetentionSettings = RetentionSettings()
    privacy: PrivacySettings = PrivacySettings()
    doors: DoorsSettings = DoorsSettings()
    limits: dict[Annotated[str, AfterValidator(_scope)], LimitSettings] = {}

    def limit_texts(self) -> dict[str, dict[str, str]]:
        """The limits as they are set, by scope."""
        return {scope: limit.texts() for scope, limit in self.limits.items()}

    @property
    def scale(self) -> Scale:
        """`agents` as bounds."""
        return Scale(self.agents, self.agents) if isinstance(self.agents, int) else self.agents

    def upkeep(self, program: str) -> Upkeep:
        """How a program's agents are looked after. Raises ConfigurationError."""
        wanted = self.programs[program]
        try:
            return Upkeep(**{each.name: getattr(wanted, each.name) for each in fields(Upkeep)})
        except ConfigurationError as error:
            raise ConfigurationError(f"[programs.{program}]: {error}") from None

    def named(self) -> tuple[Named, ...]:
        """The supervisors that were asked for. Raises ConfigurationError when they are no tree over the programs."""
        named = tuple(
            Named(name, tuple(it.children), it.strategy, it.intensity, it.restart, it.give_up)
            for name, it in self.supervisors.items()
        )
        arranged(tuple(SupervisorSpec(name) for name in self.programs), named)
        for one in named:
            for child in one.children:
                own = self.programs[child].model_fields_set if child in self.programs else set()
                for setting in sorted(own & {"intensity", "give_up"}):
                    raise ConfigurationError(
                        f"[programs.{child}]: {setting} is not its own, because [supervisors.{one.name}] looks after "
                        "it; set it there"
                    )
        return named


class Place(BaseModel):
    """Where a running system is, as its data folder tells the commands."""

    nats: str
    pid: int
    prefix: str = "dspex"


_ENVIRONMENT = {
    "DSPEX_DATA": "data", "DSPEX_PREFIX": "prefix", "DSPEX_DURABILITY": "durability", "DSPEX_AGENTS": "agents",
    "DSPEX_LOG": "log",
    "NATS_URL": "nats", "NATS_CREDS": "credentials",
}  # fmt: skip


def load_settings(
    flags: Mapping[str, object], *, file: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Settings:
    """The settings in force. `flags` holds what was given on the command line (None: not given).

    Raises ConfigurationError with one sentence that names the setting, its value and where it came from.
    """
    values: dict[str, object] = {}
    origin: dict[str, str] = {}
    path = file or Path(FILE)
    if path.is_file():
        if path.stat().st_size > MAX_FILE:
            raise ConfigurationError(f"{path} has {path.stat().st_size:,} bytes; {MAX_FILE:,} are allowed")
        try:
            values = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigurationError(f"{path}: {error}") from None
        origin = dict.fromkeys(values, str(path))
    elif file:
        raise ConfigurationError(f"there is no file {file}")
    for variable, name in _ENVIRONMENT.items():
        if environment.get(variable):
            values[name], origin[name] = environment[variable], variable
    for name, value in flags.items():
        if value is not None:
            values[name], origin[name] = value, f"--{name.replace('_', '-')}"
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        source = origin.get(str(first["loc"][0]), str(path))
        if first["type"] == "extra_forbidden":
            raise ConfigurationError(f"{source}: {where} is not a setting of this version") from None
        if first["type"] == "missing":
            raise ConfigurationError(f"{source}: {where} is missing") from None
        # What is no reference where one is due may be the secret itself, and an address may hold a password.
        shown = "" if where in UNSHOWN else f" = {_short(first['input'])}"
        raise ConfigurationError(f"{source}: {where}{shown}: {first['msg'].lower()}") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def find_server(settings: Settings) -> tuple[str, str]:
    """The address and the prefix of the system a command means: the one named, else the one whose data folder is
    here, else the NATS context, else the default port."""
    if settings.nats:
        return settings.nats, settings.prefix
    try:
        place = Place.model_validate_json((settings.data / PLACE).read_bytes())
        return place.nats, place.prefix
    except (OSError, ValidationError):
        return _url_in(settings.credentials) or _url_in(_context()) or DEFAULT_URL, settings.prefix


def find_credentials(settings: Settings) -> str | None:
    """Who a command is to the system that it means: whoever was named; the console of the data folder that is here,
    when it has access rules; whoever the NATS context names. None: nobody in particular."""
    if settings.credentials or settings.nats:
        return settings.credentials
    console = settings.data / SECURE / "console.json"
    if console.is_file():
        return str(console)
    context = _context()
    return context if not (settings.data / PLACE).is_file() and _url_in(context) else None


def _context() -> str | None:
    """The file of the context that the `nats` command line has selected, if any."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nats"
    name = os.environ.get("NATS_CONTEXT")
    try:
        name = name or (home / "context.txt").read_text().strip()
    except (OSError, ValueError):
        return None
    return str(home / "context" / f"{name}.json")


def _url_in(context: str | None) -> str | None:
    if not context or not context.endswith(".json"):
        return None
    try:
        url = json.loads(Path(context).read_text()).get("url")
    except (OSError, ValueError, AttributeError):
        return None
    return str(url) if url else None
