"""Agents as NATS services (ADR-32), found by a client that knows nothing of dspex."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tests.e2e.plain import Plain
from tests.e2e.running import Running

PLANS = [("Strict", 2), ("Nap", 1)]

SEMVER = re.compile(r"\d+\.\d+\.\d+")


async def test_every_agent_of_a_program_answers_under_its_own_id(shared: Running, plain: Plain) -> None:
    await shared.agents(plain, "strict")
    for verb in ("PING", "PING.strict"):
        answers = [a for a in await plain.discover(verb) if a["name"] == "strict"]
        assert len({a["id"] for a in answers}) == len(answers) == 2
    one = answers[0]["id"]
    assert [a["id"] for a in await plain.discover(f"PING.strict.{one}")] == [one]
    assert await plain.discover("PING.strict.nobody") == []


@pytest.mark.parametrize(
    ("verb", "kind"), [("PING", "ping_response"), ("INFO", "info_response"), ("STATS", "stats_response")]
)
async def test_an_answer_has_the_fields_that_the_standard_asks_for(plain: Plain, verb: str, kind: str) -> None:
    answers = await plain.discover(verb)
    assert {a["name"] for a in answers} >= {"strict", "nap", "dspex-registrar"}
    for answer in answers:
        assert answer["type"] == f"io.nats.micro.v1.{kind}"
        assert isinstance(answer["id"], str) and answer["id"]
        assert re.fullmatch(r"[a-zA-Z0-9_-]+", answer["name"])
        assert SEMVER.fullmatch(answer["version"])
        assert all(isinstance(value, str) for value in answer["metadata"].values())


async def test_info_describes_the_endpoints(plain: Plain) -> None:
    info = (await plain.discover("INFO.strict"))[0]
    assert info["description"] == "Has an input with one of each kind of rule."
    endpoints = {endpoint["name"]: endpoint for endpoint in info["endpoints"]}
    assert endpoints["ask"]["subject"] == "dspex.ask.strict"
    for endpoint in endpoints.values():
        assert re.fullmatch(r"[a-zA-Z0-9_-]+", endpoint["name"])
        assert endpoint["queue_group"] and isinstance(endpoint["metadata"], dict)


async def test_the_schemas_in_the_metadata_are_json_schema_and_true(plain: Plain) -> None:
    info = (await plain.discover("INFO.strict"))[0]
    (ask,) = [endpoint for endpoint in info["endpoints"] if endpoint["name"] == "ask"]
    takes, gives = (json.loads(ask["metadata"][name]) for name in ("input_schema", "output_schema"))
    for schema in (takes, gives):
        Draft202012Validator.check_schema(schema)
    for body, good in (({"question": "why"}, True), ({"question": 5}, False), ({}, False), ({"question": "", "x": 1}, False)):
        assert Draft202012Validator(takes).is_valid(body) is good
        assert ((await plain.ask("strict", body)).code is None) is good
    reply = await plain.ask("strict", {"question": "why", "chance": 0.25})
    Draft202012Validator(gives).validate(reply.json)


async def test_stats_count_requests_and_errors(shared: Running, plain: Plain) -> None:
    await shared.agents(plain, "nap")

    async def ask() -> dict[str, Any]:
        (stats,) = await plain.discover("STATS.nap")
        assert datetime.fromisoformat(stats["started"]).tzinfo
        (endpoint,) = [endpoint for endpoint in stats["endpoints"] if endpoint["name"] == "ask"]
        assert all(isinstance(endpoint[name], int) for name in ("num_requests", "num_errors", "processing_time"))
        found: dict[str, Any] = endpoint
        return found

    before = await ask()
    await plain.ask("nap", {"n": 1})
    await plain.ask("nap", {"n": "one"})
    after = await ask()
    assert after["num_requests"] == before["num_requests"] + 2
    assert after["num_errors"] == before["num_errors"] + 1
    assert after["last_error"].startswith("400:") and after["processing_time"] > before["processing_time"]
    assert after["average_processing_time"] == after["processing_time"] // after["num_requests"]
