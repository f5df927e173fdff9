"""Who may send what: every subject of a secured system, as data. The server's configuration, the table in SECURITY.md
and the tests are made from it; a process that uses a new subject needs a new line here, and nothing else.

Each kind of caller lives in an account of its own. Between accounts a message passes only where the serving account
exports a subject and the calling account imports it, so what is not in this table does not exist for a caller: no
reply subject, no header and no call of the JetStream API leads around it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from dspex.core.subjects import Subjects

__all__ = [
    "AMONG_AGENTS", "API", "LOG_ACCOUNT", "RULES", "SYSTEM", "Role", "Rule", "System", "account_of", "api_prefix",
    "filled", "local_subject", "rules_for",
    "served_subject", "system_table", "table", "valid_name",
]  # fmt: skip

API = "$JS.API."
LOG_ACCOUNT = "LOG"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


class Role(StrEnum):
    """What an identity is for."""

    REGISTRAR = "registrar"
    ARCHIVIST = "archivist"
    OPERATOR = "operator"
    AGENT = "agent"
    CLIENT = "client"
    CONSOLE = "console"


Served = Literal["log", "agent"]
Replies = Literal["none", "one", "many"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One subject that is served to other accounts.

    `subject` is a template: `{p}` the prefix, `{log}` the log's stream, `{timer}` the program's of timers, `{keys}`
    and `{bucket}` its keys and its object store, `{program}` a program. `by` says whose
    account serves it: that of the log, or that of the program's agents. `own` and `all` are who may send there: an
    agent of this very program, or the callers for every program. `long` is for answers that take as long as a task.
    `local`, when given, is what the caller sends to instead. With `tenant` the server writes the caller's account
    behind the subject.
    """

    subject: str
    by: Served
    why: str
    all: tuple[Role, ...] = ()
    own: tuple[Role, ...] = ()
    replies: Replies = "one"
    long: bool = False
    local: str = ""
    tenant: bool = False

    @property
    def callers(self) -> tuple[Role, ...]:
        return (*self.own, *self.all)

    @property
    def per_program(self) -> bool:
        return any(name in self.subject for name in ("{program}", "{timer}", "{keys}", "{bucket}"))


@dataclass(frozen=True, slots=True)
class System:
    """What a role may publish and subscribe to in its own account."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


_CLIENTS = (Role.CLIENT, Role.CONSOLE)
_AGENT, _CONSOLE = (Role.AGENT,), (Role.CONSOLE,)

RULES: tuple[Rule, ...] = (
    Rule("{p}.ask.{program}", "agent", "run a task and wait for it", all=_CLIENTS, long=True),
    Rule("{p}.submit.{program}", "agent", "submit a task that an agent checks first", all=(*_CLIENTS, Role.AGENT)),
    Rule("{p}.result.{program}", "agent", "the result of a task of one's own", all=(*_CLIENTS, Role.AGENT)),
    Rule("{p}.variables.{program}.get", "agent", "the values in force", all=_CLIENTS),
    Rule("{p}.variables.{program}.propose", "agent", "propose values", all=_CONSOLE),
    Rule("{p}.breakers.{program}.reset", "agent", "close a circuit breaker by hand", all=_CONSOLE),
    Rule("{p}.dlq.{program}.retry", "agent", "submit a dead letter of one's own again", all=_CLIENTS),
    Rule("{p}.dlq.{program}.drop", "agent", "drop a dead letter of one's own", all=_CLIENTS),
    Rule("$SRV.>", "agent", "what runs", all=_CONSOLE, replies="many"),
    Rule("{p}.task.{program}", "log", "submit a task", all=(*_CLIENTS, Role.AGENT), tenant=True),
    Rule("{p}.task.{program}.*", "log", "store an ask for whoever asks", own=_AGENT),
    Rule("{p}.outcome.{program}", "log", "score a task", all=_CLIENTS, tenant=True),
    Rule("{p}.signal.{program}", "log", "tell a task of one's own something", all=(*_CLIENTS, Role.AGENT), tenant=True),
    Rule("{p}.event.task.{program}.*", "log", "the life of its tasks", own=_AGENT),
    Rule("{p}.event.inbox.{program}.*", "log", "signals that arrived", own=_AGENT),
    Rule("{p}.event.dlq.{program}.*", "log", "what was done about its dead letters", own=_AGENT),
    Rule("{p}.event.key.{program}.*", "log", "whose an idempotency key is", own=_AGENT),
    Rule("{p}.event.variables.{program}.*", "log", "proposals of values", own=_AGENT),
    Rule("{p}.event.breaker.{program}.*", "log", "changes of its circuit breakers", own=_AGENT),
    Rule("{p}.event.agent.{program}.*", "log", "that it started and stopped", own=_AGENT),
    Rule("{p}.timer.{program}.*", "log", "timers of sleeping tasks", own=_AGENT),
    Rule("{p}.wake.{program}", "log", "wake a task", own=_AGENT),
    Rule(
        "{p}.registry.register.{program}", "log", "make its program known", own=_AGENT, local="{p}.registry.register"
    ),
    Rule("$JS.API.CONSUMER.MSG.NEXT.{log}.task-{program}", "log", "ask for tasks", own=_AGENT, replies="many"),
    Rule("$JS.API.CONSUMER.MSG.NEXT.{log}.signal-{program}", "log", "ask for signals", own=_AGENT, replies="many"),
    Rule("$JS.API.CONSUMER.MSG.NEXT.{timer}.wake-{program}", "log", "ask for wakes", own=_AGENT, replies="many"),
    Rule("$JS.API.CONSUMER.INFO.{log}.task-{program}", "log", "how many of its tasks wait", own=_AGENT),
    Rule("$JS.ACK.{log}.task-{program}.>", "log", "acknowledge tasks", own=_AGENT, replies="none"),
    Rule("$JS.ACK.{log}.signal-{program}.>", "log", "acknowledge signals", own=_AGENT, replies="none"),
    Rule("$JS.ACK.{timer}.wake-{program}.>", "log", "acknowledge wakes", own=_AGENT, replies="none"),
    Rule("{p}.limits.lease.{program}", "log", "lend it parts of limits", own=_AGENT),
    Rule("{p}.limits.*", "log", "see and change limits", all=_CONSOLE),
    Rule("{p}.rows.{program}", "log", "read what is of its program in the log", own=_AGENT),
    Rule("{p}.key.{program}.*", "log", "keep keys of private values", own=_AGENT),
    Rule("$JS.API.STREAM.MSG.GET.{keys}", "log", "read its keys", own=_AGENT),
    Rule("$JS.API.STREAM.MSG.DELETE.{keys}", "log", "forget its keys", own=_AGENT),
    Rule("$O.{bucket}.>", "log", "keep large values", own=_AGENT),
    Rule("$JS.API.STREAM.MSG.GET.OBJ_{bucket}", "log", "read its large values", own=_AGENT),
    Rule("$JS.API.STREAM.MSG.DELETE.OBJ_{bucket}", "log", "remove its large values", own=_AGENT),
    Rule("{p}.registry.guard.{program}", "log", "which of its fields are private", all=(*_CLIENTS, Role.AGENT)),
    Rule("{p}.privacy.*", "log", "have a task forgotten", all=_CONSOLE, long=True),
    Rule("{p}.log.*", "log", "read and follow the log", all=_CONSOLE),
    Rule("{p}.archive.*", "log", "search and verify the archive", all=_CONSOLE, long=True),
    Rule("$SRV.>", "log", "what runs", all=_CONSOLE, replies="many"),
    Rule("{p}.control.*.*", "log", "scale and reload programs, drain and stop agents", all=_CONSOLE, long=True),
    Rule("$JS.API.INFO", "log", "how much is stored", all=_CONSOLE),
    Rule("$JS.API.STREAM.INFO.{log}", "log", "how the log is set up", all=_CONSOLE),
    Rule("$JS.API.CONSUMER.INFO.{log}.*", "log", "how many tasks wait", all=_CONSOLE),
)

_ANSWERS = ("_R_.>", "_INBOX.>")
_KEEPS = (
    "$JS.API.STREAM.INFO.*", "$JS.API.STREAM.CREATE.*", "$JS.API.STREAM.DELETE.{log}",
    "$JS.API.STREAM.MSG.GET.*", "$JS.API.DIRECT.GET.*", "$JS.API.CONSUMER.CREATE.{log}.>",
    "$JS.API.CONSUMER.DELETE.{log}.*", "$JS.API.CONSUMER.MSG.NEXT.{log}.*",
)  # fmt: skip

SYSTEM: dict[Role, System] = {
    Role.REGISTRAR: System(
        publish=(
            *_KEEPS, "$JS.API.STREAM.UPDATE.*", "$JS.API.STREAM.DELETE.{timers}", "$JS.API.CONSUMER.CREATE.*.>",
            "$JS.API.CONSUMER.INFO.{log}.*", "$JS.API.INFO",
            "{p}.event.program.*.*", "{p}.event.fleet.*.*", "{p}.event.limits.*.*", "{p}.event.budget.*.*",
            "{p}.event.agent.*.*", "{p}.event.doors.*.*", "{p}.key.>", "{p}.wake.*",
            "$JS.API.STREAM.MSG.DELETE.{log}", "{p}.archive.*", "{p}.lease.registrar", *_ANSWERS,
        ),
        subscribe=("{p}.>", "$SRV.>", "_INBOX.>"),
    ),
    Role.ARCHIVIST: System(
        publish=(
            *_KEEPS, "$JS.API.STREAM.MSG.DELETE.*", "$JS.API.STREAM.PURGE.{log}", "$O.>", "{p}.key.>",
            "$JS.API.CONSUMER.INFO.*.*", "$JS.API.STREAM.NAMES",
            "{p}.event.agent.archivist.*", "{p}.event.privacy.*.*", "{p}.wake.*", "{p}.lease.archivist", *_ANSWERS,
        ),
        subscribe=("{p}.archive.*", "{p}.privacy.*", "$SRV.>", "_INBOX.>"),
    ),
    Role.OPERATOR: System(publish=(">",), subscribe=(">",)),
}
"""The roles inside the log's account. The operator is nobody's while a system runs: `dspex verify` and `restore` use
it on a system that is down."""

AMONG_AGENTS = System(
    publish=("{p}.result.{program}", "{p}.control.{program}.*", *_ANSWERS),
    subscribe=("{p}.control.{program}.*", "{p}.event.*.{program}.*", "_INBOX.>"),
)
"""What the agents of one program say among themselves, in the account that they share."""


def valid_name(name: str) -> bool:
    """Whether `name` may name a client: a lower-case letter or digit, then also `_` and `-`, at most 32."""
    return _NAME.fullmatch(name) is not None


def account_of(role: Role, name: str = "") -> str:
    """The account an identity lives in; `name` is the program or the client."""
    match role:
        case Role.AGENT:
            return f"PROGRAM_{name}"
        case Role.CLIENT:
            return f"CLIENT_{name}"
        case Role.CONSOLE:
            return "CONSOLE"
        case _:
            return LOG_ACCOUNT


def rules_for(role: Role, by: Served | None = None) -> Iterator[Rule]:
    """The rules under which a role may send."""
    return (rule for rule in RULES if role in rule.callers and by in (None, rule.by))


def filled(template: str, subjects: Subjects, program: str = "*") -> str:
    """A template with its names put in."""
    return template.format(
        p=subjects.prefix, log=subjects.stream, timer=subjects.timers(program), timers=subjects.timer_stream,
        program=program, keys=subjects.key_stream_of(program), bucket=subjects.bucket_of(program),
    )  # fmt: skip


def table(subjects: Subjects) -> list[tuple[str, str, str, str]]:
    """Every rule for people: the subject, who may send there, whose account serves it, and what for."""
    rows = []
    for rule in RULES:
        own = [f"{role} of the program" for role in rule.own]
        who = ", ".join([*own, *(str(role) for role in rule.all)])
        subject = filled(rule.subject, subjects, "<program>") + (".<account>" if rule.tenant else "")
        rows.append((subject, who, "the log" if rule.by == "log" else "the program", rule.why))
    return rows


def system_table(subjects: Subjects) -> list[tuple[str, str, str]]:
    """What is said within one account: the role, what it may publish, what it may subscribe to."""
    said = [(str(role), system) for role, system in SYSTEM.items()] + [("agents of one program", AMONG_AGENTS)]
    return [
        (
            role,
            " ".join(filled(each, subjects, "<program>") for each in system.publish),
            " ".join(filled(each, subjects, "<program>") for each in system.subscribe),
        )
        for role, system in said
    ]


def served_subject(rule: Rule, subjects: Subjects, program: str, account: str) -> str:
    """Where a message of an account arrives under a rule."""
    subject = filled(rule.subject, subjects, program)
    return f"{subject}.{account}" if rule.tenant else subject


def api_prefix(subjects: Subjects) -> str:
    """What stands for `$JS.API.` outside the log's account: there the server itself answers the real one."""
    return f"{subjects.prefix}.api."


def local_subject(rule: Rule, subjects: Subjects, program: str = "*") -> str:
    """Where a caller of another account sends to under a rule."""
    if rule.local:
        return filled(rule.local, subjects, program)
    subject = filled(rule.subject, subjects, program)
    return subject.replace(API, api_prefix(subjects), 1) if subject.startswith(API) else subject
