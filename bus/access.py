"""The access rules of `core.access` as a nats-server reads them: accounts, users, exports and imports.

The text holds public keys only. Whoever runs a server of their own includes it in their configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dspex.core.access import (
    AMONG_AGENTS,
    LOG_ACCOUNT,
    RULES,
    SYSTEM,
    Role,
    Rule,
    account_of,
    filled,
    local_subject,
    rules_for,
    served_subject,
)
from dspex.core.subjects import Subjects

__all__ = ["LONGEST", "MAX_PROGRAMS", "SYSTEM_ACCOUNT", "User", "accounts_text", "permissions"]

SYSTEM_ACCOUNT = "SYS"
LONGEST = 86_400
"""Seconds for which the server remembers where an answer goes that takes as long as its task."""
MAX_PROGRAMS = 100
"""Programs of one secured system: each may call each, so the configuration grows with their square."""


@dataclass(frozen=True, slots=True)
class User:
    """An identity as the server knows it; `name` is the program or the client, or the role's own name."""

    role: Role
    name: str
    public: str
    inbox: str = "_INBOX"

    @property
    def account(self) -> str:
        return account_of(self.role, self.name)


def permissions(user: User, subjects: Subjects, programs: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a user may publish and subscribe to, within its own account."""
    p = subjects.prefix
    if user.role in SYSTEM:
        rules = SYSTEM[user.role]
        return [filled(each, subjects) for each in rules.publish], [filled(each, subjects) for each in rules.subscribe]
    if user.role is Role.AGENT:
        sends = [local_subject(rule, subjects, name) for rule, name in _sends(user, programs)]
        served = [filled(rule.subject, subjects, user.name) for rule in RULES if rule.by == "agent"]
        says = [filled(each, subjects, user.name) for each in AMONG_AGENTS.publish]
        hears = [filled(each, subjects, user.name) for each in AMONG_AGENTS.subscribe]
        return [*sends, *says], [*served, *hears]
    # What is not imported does not exist, so a wide permission opens nothing; it makes a subject that is not there
    # say so at once instead of never. Inboxes are what users of one account have in common.
    return [f"{p}.>", "$SRV.>"], [f"{user.inbox}.>"]


def accounts_text(users: Iterable[User], subjects: Subjects) -> str:
    """The accounts, as a part of a nats-server configuration."""
    known = sorted(users, key=lambda user: (user.account, user.name))
    programs = [user.name for user in known if user.role is Role.AGENT]
    lines = [f"system_account: {SYSTEM_ACCOUNT}", "accounts {", f"  {SYSTEM_ACCOUNT} {{ }}"]
    for account in sorted({user.account for user in known} | {LOG_ACCOUNT}):
        members = [user for user in known if user.account == account]
        lines.append(f"  {account} {{")
        if account == LOG_ACCOUNT:
            lines.append("    jetstream: enabled")
        lines += _block("users", [_user(user, subjects, programs) for user in members])
        lines += _block("exports", _exports(account, members, known, subjects, programs))
        lines += _block("imports", _imports(members, subjects, programs))
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


# -- inside


def _sends(user: User, programs: Sequence[str]) -> list[tuple[Rule, str]]:
    """What a user of an account beside the log's sends, rule by rule, and for which program."""
    pairs: list[tuple[Rule, str]] = []
    for rule in rules_for(user.role):
        whose = programs if user.role in rule.all else [user.name]
        if not rule.per_program and rule.by == "log":
            whose = ["*"]
        if user.role is Role.AGENT and rule.by == "agent":  # its own program it finds in its own account
            whose = [name for name in whose if name != user.name]
        pairs += [(rule, name) for name in whose]
    return pairs


def _user(user: User, subjects: Subjects, programs: Sequence[str]) -> str:
    publish, subscribe = permissions(user, subjects, programs)
    allowed = f"publish: {{ allow: {_list(publish)} }}, subscribe: {{ allow: {_list(subscribe)} }}"
    return f"{{ nkey: {user.public}, permissions: {{ {allowed} }} }}  # {user.role} {user.name}"


def _exports(
    account: str, members: Sequence[User], users: Sequence[User], subjects: Subjects, programs: Sequence[str]
) -> list[str]:
    """What an account serves, each subject to the accounts that may call it and to no other."""
    serves = "log" if account == LOG_ACCOUNT else "agent"
    own = [user.name for user in members if user.role is Role.AGENT]
    if serves == "agent" and not own:
        return []
    lines = []
    for rule in (rule for rule in RULES if rule.by == serves):
        for program in (programs if serves == "log" else own) if rule.per_program else ["*"]:
            callers = sorted({
                user.account for user in users
                if user.account != account
                and (user.role in rule.all or (user.role in rule.own and user.name == program))
            })  # fmt: skip
            if rule.tenant:
                lines += [_export(rule, served_subject(rule, subjects, program, one), [one]) for one in callers]
            elif callers:
                lines.append(_export(rule, filled(rule.subject, subjects, program), callers))
    return lines


def _export(rule: Rule, subject: str, callers: list[str]) -> str:
    kind = {"many": ", response_type: stream", "one": "", "none": ""}[rule.replies]
    wait = f", response_threshold: '{LONGEST}s'" if rule.long else ""
    return f"{{ service: {json.dumps(subject)}{kind}{wait}, accounts: {_list(callers)} }}"


def _imports(members: Sequence[User], subjects: Subjects, programs: Sequence[str]) -> list[str]:
    if not members or members[0].role in SYSTEM:
        return []
    lines = []
    for rule, program in _sends(members[0], programs):
        source = LOG_ACCOUNT if rule.by == "log" else account_of(Role.AGENT, program)
        subject = served_subject(rule, subjects, program, members[0].account)
        local = local_subject(rule, subjects, program)
        renamed = f", to: {json.dumps(local)}" if local != subject else ""
        lines.append(f"{{ service: {{ account: {source}, subject: {json.dumps(subject)} }}{renamed} }}")
    return lines


def _block(name: str, entries: Sequence[str]) -> list[str]:
    return [f"    {name} = [", *(f"      {entry}" for entry in entries), "    ]"] if entries else []


def _list(subjects: Sequence[str]) -> str:
    return json.dumps(list(subjects))
