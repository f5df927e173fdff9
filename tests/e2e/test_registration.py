"""Programs that become known: many at once, and two that want the same name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from tests.e2e.plain import Plain
from tests.e2e.running import Running

from dspex.bus.server import Server

MANY = 40

SOURCE = """
from dspex import Program, Schema


def make(number: int) -> type[Program]:
    class One(Program):
        name = f"many{number}"

        class Input(Schema):
            n: int

        class Output(Schema):
            n: int

        def predict(self, input: Input) -> Output:
            return self.Output(n=input.n + number)

    return One


"""


async def test_forty_programs_that_register_at_once_are_all_served(
    systems: Callable[..., Running], tmp_path: Path
) -> None:
    app = tmp_path / "many.py"
    lines = [f"P{number} = make({number})\nP{number}.__module__ = __name__" for number in range(MANY)]
    app.write_text(SOURCE + "\n".join(lines))
    with systems((str(app), 1)) as system:
        async with await system.plain() as plain:
            replies = await asyncio.gather(*(plain.ask(f"many{n}", {"n": 1}) for n in range(MANY)))
            assert [reply.json["n"] for reply in replies] == [n + 1 for n in range(MANY)]
            story = await plain.story()
            assert len(story.all_of("ProgramRegistered")) == MANY
            info = await plain.nc.jetstream().stream_info("DSPEX")
            doors = {f"dspex.{door}.many{n}" for door in ("task", "outcome", "signal") for n in range(MANY)}
            assert set(info.config.subjects or ()) == doors | {"dspex.event.>"}


async def test_systems_that_start_at_once_on_one_server_are_all_served(
    systems: Callable[..., Running], server: Server
) -> None:
    made = [systems((app, 1), folder=app.lower(), nats=server.url).launch() for app in ("Nap", "Work", "Thread", "Strict")]
    for system in made:
        system.event("ready")
    async with await Plain.connect(server.url) as plain:
        assert (await plain.ask("nap", {"n": 1})).code is None
        assert (await plain.ask("work", {})).code is None
        assert (await plain.ask("thread", {})).code is None
        assert (await plain.ask("strict", {"question": "why"})).code is None
        assert len((await plain.story()).all_of("ProgramRegistered")) == 4


async def test_another_registrar_takes_over_when_the_leading_one_is_gone(
    systems: Callable[..., Running], server: Server
) -> None:
    first = systems(("Nap", 1), folder="first", nats=server.url).start()
    second = systems(("Work", 1), folder="second", nats=server.url).start()
    first.end()
    third = systems(("Strict", 1), folder="third", nats=server.url).start()
    async with await Plain.connect(server.url) as plain:
        assert (await plain.ask("work", {})).code is None
        assert (await plain.ask("strict", {"question": "why"})).code is None
    third.end()
    second.end()


async def test_the_same_name_with_another_schema_is_refused(systems: Callable[..., Running], server: Server) -> None:
    with systems(("Strict", 1), folder="a", nats=server.url) as first:
        other = systems(("Changed", 1), folder="b", nats=server.url).launch()
        refused = other.event("refused")
        assert "strict" in refused["reason"] and "--replace" in refused["reason"] and "input field" in refused["reason"]
        assert other.wait() == 1
        async with await first.plain() as plain:
            assert (await plain.ask("strict", {"question": "why"})).json["answer"] == "why"


async def test_the_same_name_with_another_schema_replaces_it_when_told_to(
    systems: Callable[..., Running], server: Server
) -> None:
    with systems(("Strict", 1), folder="a", nats=server.url) as old:
        async with await old.plain() as plain:
            await plain.ask("strict", {"question": "why"})
    with systems(("Changed", 1), folder="b", nats=server.url, replace=True) as new:
        async with await new.plain() as plain:
            assert (await plain.ask("strict", {"question": "why"})).json["answer"] == "en: why"
            assert len((await plain.story()).all_of("ProgramRegistered")) == 2


async def test_the_same_program_again_is_no_news(systems: Callable[..., Running]) -> None:
    for _ in range(2):
        with systems(("Nap", 2)) as system:
            async with await system.plain() as plain:
                story = await plain.story()
    assert len(story.all_of("ProgramRegistered")) == 1


async def test_rubbish_at_the_registry_is_refused(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 1)) as system:
        async with await system.plain() as plain:
            for body in (b"", b"{}", b"\xff", b"[" * 100_000, b'{"registration": {"program": "a b"}}'):
                message = await plain.nc.request("dspex.registry.register", body, timeout=10)
                assert message.headers and message.headers["Nats-Service-Error-Code"] == "400"
            assert (await plain.ask("nap", {"n": 1})).code is None
