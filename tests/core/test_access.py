"""The table of who may send what."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from dspex.console.main import cli
from dspex.core.access import (
    API,
    RULES,
    SYSTEM,
    Role,
    account_of,
    filled,
    local_subject,
    rules_for,
    served_subject,
    valid_name,
)
from dspex.core.subjects import Subjects

SUBJECTS = Subjects("other", tenants=True)
SECURITY = Path(__file__).resolve().parents[2] / "SECURITY.md"


def test_every_subject_is_filled_with_the_names_of_its_installation() -> None:
    for rule in RULES:
        subject = filled(rule.subject, SUBJECTS, "qabot")
        assert "{" not in subject and "dspex" not in subject.lower()
        assert ("qabot" in subject) == rule.per_program


def test_an_account_of_its_own_for_each_program_and_client_and_one_for_the_log() -> None:
    assert account_of(Role.AGENT, "qabot") != account_of(Role.AGENT, "other") != account_of(Role.CLIENT, "other")
    assert {account_of(role) for role in SYSTEM} == {"LOG"}
    assert account_of(Role.CONSOLE) not in {"LOG", account_of(Role.CLIENT, "console")}


def test_a_client_may_send_to_doors_and_nowhere_else() -> None:
    sent = {local_subject(rule, SUBJECTS, "qabot") for rule in rules_for(Role.CLIENT)}
    assert sent == {f"other.{door}.qabot" for door in ("ask", "submit", "result", "task", "outcome", "signal")} | {
        "other.variables.qabot.get", "other.registry.guard.qabot", "other.dlq.qabot.retry", "other.dlq.qabot.drop",
    }


def test_only_agents_write_events_and_each_only_its_programs() -> None:
    for rule in RULES:
        if ".event." in rule.subject or ".timer." in rule.subject or ".wake." in rule.subject:
            assert (rule.own, rule.all) == ((Role.AGENT,), ()), rule
            assert rule.per_program, rule


def test_the_tenant_is_written_by_the_server_and_read_from_the_subject() -> None:
    door = next(rule for rule in RULES if rule.subject == "{p}.task.{program}")
    stored = served_subject(door, SUBJECTS, "qabot", account_of(Role.CLIENT, "alice"))
    assert stored == "other.task.qabot.CLIENT_alice"
    assert local_subject(door, SUBJECTS, "qabot") == "other.task.qabot"
    assert SUBJECTS.tenant_of(stored) == "CLIENT_alice" and SUBJECTS.door_of(stored) == ("task", "qabot")
    assert SUBJECTS.tenant_of("other.task.qabot") == "" == Subjects("other").tenant_of(stored)
    assert SUBJECTS.tenant_of("other.event.task.qabot") == ""
    assert stored.rsplit(".", 1)[0] + ".*" in SUBJECTS.doors("qabot")


def test_no_caller_sends_to_the_real_api_of_jetstream() -> None:
    """Outside the log's account the server answers it itself, for an account that has none."""
    for rule in RULES:
        assert not local_subject(rule, SUBJECTS, "qabot").startswith(API)


def test_names_of_clients() -> None:
    assert all(map(valid_name, ("a", "alice-2", "0_x", "a" * 32)))
    assert not any(map(valid_name, ("", "Alice", "a.b", "a b", "a*", ">", "-a", "a" * 33, "é")))


def test_the_page_on_security_shows_the_table_that_is_in_force() -> None:
    shown = CliRunner().invoke(cli, ["secure", "rules"], standalone_mode=False).output
    page = SECURITY.read_text()
    for line in shown.splitlines():
        assert line in page, "the table in SECURITY.md is another one: put in what `dspex secure rules` prints"
