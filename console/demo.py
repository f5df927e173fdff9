"""`dspex demo`: the main job on real input, told as a story. It is also the shortest proof that the promises hold."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import textwrap
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from dspex.console.options import Options
from dspex.console.render import (
    EventLines,
    bold,
    dim,
    green,
    print_json,
    yellow,
)
from dspex.console.scenes import answer, lines_to_paste, show_counts, show_images

if TYPE_CHECKING:
    from dspex.compose.caller import Caller
    from dspex.console.workload import Job, Part, Running, Tally

__all__ = ["demo"]

REPEATS, IMAGES = 4, 320
PACE = 0.007
"""Seconds between submissions while the answers are to be read."""
SHOWN = 6
IN_HAND = 12
"""Acknowledgements into the burst after which an agent is killed: it has tasks then, and there are more."""
PATIENCE = 30.0


@click.command(short_help="See it work on real input, with a process killed in the middle.")
@click.option("--keep", is_flag=True, help="Leave the system running afterwards, until Ctrl-C.")
@click.option("--json", "json_", is_flag=True, help="Print one object with the figures instead of the story.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def demo(keep: bool, json_: bool, debug: bool) -> int:
    """See the main job done on real input: no key, no network, under a minute.

    Starts a server and agents in a folder of their own, sends questions about dspex's own documents and images of
    handwritten digits, kills an agent in the middle, counts in the log what became of every task, and replays one.
    Exit code 1 if anything was lost, done twice, or replayed differently.
    """
    try:
        return Options(json=json_, debug=debug).run(_tidily(_Demo(json_, keep).play()))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _tidily(work: Coroutine[Any, Any, int]) -> int:
    """Run `work`; the first SIGINT or SIGTERM cancels it, and further ones don't break into its tidying up."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    told: list[bool] = []

    def stop() -> None:
        if not told:
            told.append(task.cancel())

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    return await task


@dataclass
class _Demo:
    as_json: bool
    keep: bool

    async def play(self) -> int:
        from dspex.compose.caller import Caller
        from dspex.console.workload import examples_folder, running

        began = time.perf_counter()
        folder = examples_folder()
        programs = [("qabot", folder / "docs_qa.py", 2)]
        self.title("dspex demo", "two programs, real input, one killed process")
        if _has_sklearn():
            programs.append(("digits", folder / "digits.py", 1))
        else:
            self.say(yellow("scikit-learn is not installed, so there are questions only and no images of digits"))
            self.say(yellow("(pip install 'dspex[examples]' brings it)"))
        self.chapter("Start a system", f"dspex up: {', '.join(f'{name} x {agents}' for name, _, agents in programs)}")
        async with running(programs) as system:
            started = time.perf_counter() - began
            parts = await asyncio.to_thread(_load_parts, len(programs) > 1)
            caller = await Caller.connect(system.url)
            try:
                figures = await self._story(caller, system, parts, started)
            finally:
                await caller.close()
            figures["seconds"] = round(time.perf_counter() - began, 2)
            figures["nats"] = system.url if self.keep else None
            if self.as_json:
                print_json(figures)
            self._farewell(system, figures)
            if self.keep:
                sys.stdout.flush()
                await system.process.wait()
        return 0 if figures["ok"] else 1

    async def _story(self, caller: Caller, system: Running, parts: list[Part], started: float) -> dict[str, Any]:
        from dspex.compose.story import BusSource, story_of
        from dspex.console.replay import judge
        from dspex.console.workload import Tally

        self._processes(await caller.processes(), started)
        tally = Tally(position=(await caller.read_log(limit=1))["head"])
        victim = await self._work(caller, parts, tally)
        self.chapter("Count, in the log", "what became of every task")
        rows = [tally.summary(part) for part in parts]
        processes = await caller.processes()
        restarts = sum(process["restarts"] for process in processes)
        whole = all(row["submitted"] == row["completed"] and not row["twice"] for row in rows)
        if not self.as_json:
            show_counts(rows)
            away = tally.away(victim["agent"])
            soon = f", its successor served {away * 1e3:.0f} ms later" if away is not None else ""
            held = len(tally.taken_over)
            self.say(f"{victim['agent']} died{soon}.")
            if held:
                self.say(f"It held {held} task{'' if held == 1 else 's'}; others, or its successor, took over.")
            self.say(
                green("Nothing was lost, and every task ended exactly once.") if whole else yellow("That is not right.")
            )
        plain = next(task for task, _ in tally.of(parts[0]))
        task = min(tally.taken_over & tally.outputs.keys(), key=int, default=plain)
        past = await story_of(BusSource(caller), task)
        again = task in tally.taken_over
        self.chapter(f"Look at task {task}", "the agent that held it was killed" if again else "its events")
        if not self.as_json:
            lines = EventLines()
            for event in past.shown:
                lines.show(event)
        verdict = (await asyncio.to_thread(judge, past, _program(parts, past.program))).report
        self.chapter("Replay it", f"dspex replay {task}")
        if verdict.same:
            self.say(f"{green('same')}: run again on the recorded input, its output is the same, byte for byte.")
        else:
            self.say(yellow(f"not the same: {verdict.why or verdict.difference}"))
        return {
            "ok": whole and verdict.same is True, "submitted": sum(row["submitted"] for row in rows),
            "completed": sum(row["completed"] for row in rows), "lost": sum(row["lost"] for row in rows),
            "twice": sum(row["twice"] for row in rows), "programs": rows, "start_seconds": round(started, 2),
            "killed": victim | {"taken_over": len(tally.taken_over), "away_seconds": tally.away(victim["agent"])},
            "restarts": restarts, "replay": {"task": task, "same": verdict.same},
        }  # fmt: skip

    async def _work(self, caller: Caller, parts: list[Part], tally: Tally) -> dict[str, Any]:
        """Submit everything, half of it slowly, the rest at once; kill an agent then. Gives who was killed."""
        from dspex.console.progress import Progress
        from dspex.core.errors import Unavailable

        jobs = _jobs(parts)
        half = len(jobs) // 2
        counts = ", ".join(f"{sum(job.part is part for job in jobs)} {_things(part)}" for part in parts)
        self.chapter("Give it work", f"{counts}, as any NATS client would")
        victim = next(p for p in await caller.processes() if p["program"] == parts[0].name)
        with Progress({part.name: sum(job.part is part for job in jobs) for part in parts}, self.as_json) as progress:

            async def submit(job: Job) -> None:
                task = await caller.submit(job.part.name, job.body)
                tally.jobs[task] = job
                if tally.ends[task]:
                    progress.step(job.part.name)  # the log was faster than the acknowledgement

            async def submit_all() -> None:
                for job in jobs[:half]:
                    await submit(job)
                    await asyncio.sleep(PACE)
                burst = [asyncio.create_task(submit(job)) for job in jobs[half:]]
                for number, stored in enumerate(asyncio.as_completed(burst)):
                    await stored
                    if number == IN_HAND:
                        os.kill(victim["pid"], signal.SIGKILL)
                        progress.write([yellow(f"kill -9 {victim['pid']}  {victim['agent']}, with work in its hands")])

            submitting = asyncio.create_task(submit_all())
            shown = 0
            try:
                async with asyncio.timeout(PATIENCE + PACE * half):
                    async for task in tally.follow(caller):
                        job = tally.jobs.get(task)
                        if job is not None:
                            progress.step(job.part.name)
                            if job.part is parts[0] and shown < SHOWN and len(tally.ends) >= 30 * shown:
                                shown += 1
                                progress.write(answer(tally, task))
                        if len(tally.ends) >= len(jobs):
                            break
            except TimeoutError:
                submitting.cancel()
                raise Unavailable(f"{len(tally.ends)} of {len(jobs)} tasks had ended after {PATIENCE:.0f} s") from None
            await submitting
        if not self.as_json and len(parts) > 1:
            show_images(tally, parts[1])
        await self._until_back(caller, tally, victim["agent"])
        return {"agent": victim["agent"], "pid": victim["pid"]}

    async def _until_back(self, caller: Caller, tally: Tally, agent: str) -> None:
        """Wait until the killed agent's successor is in the log."""
        until = time.perf_counter() + 10
        while agent not in tally.back and time.perf_counter() < until:
            page = await caller.read_log(after=tally.position, limit=500)
            for event in page["events"]:
                tally.hear(event)
            await asyncio.sleep(0.05)

    # -- telling

    def say(self, text: str = "") -> None:
        if not self.as_json:
            click.echo(f"  {text}" if text else "")

    def title(self, text: str, more: str) -> None:
        if not self.as_json:
            click.echo(f"\n{bold(text)}  {more}")

    def chapter(self, text: str, more: str) -> None:
        if not self.as_json:
            click.echo(f"\n{bold(text)}  {dim(more)}")

    def _processes(self, processes: list[dict[str, Any]], started: float) -> None:
        names = [f"{p['program'] or p['role']} {p['pid']}" for p in processes]
        self.say(f"{len(processes)} processes serve after {started:.1f} s, each known to the one above it:")
        for line in textwrap.wrap(", ".join(names), 76, break_on_hyphens=False):
            self.say(dim(line))

    def _farewell(self, system: Running, figures: dict[str, Any]) -> None:
        if self.as_json:
            return
        state = "It is running: paste these." if self.keep else "With `dspex demo --keep` it stays up, to paste these."
        self.chapter("Your turn", state)
        click.echo(lines_to_paste(system.url, system.data))
        if self.keep:
            click.echo(dim("\nCtrl-C ends it and removes its folder."))
        else:
            click.echo(
                dim(f"\nDone in {figures['seconds']:.1f} s; everything is stopped and removed. Next: dspex up yours.py")
            )


def _load_parts(with_digits: bool) -> list[Part]:
    from dspex.console.workload import load

    parts = [load("docs_qa.py", 2, ("question",))]
    return [*parts, load("digits.py", 1, ("image",))] if with_digits else parts


def _program(parts: list[Part], name: str) -> Any:
    from dspex.compose.app import load_app

    part = next(part for part in parts if part.name == name)
    return load_app(str(part.app))[0]


def _jobs(parts: list[Part]) -> list[Job]:
    """Every question several times and some images, mixed, the same way each time."""
    from dspex.console.workload import Job

    jobs = [Job(parts[0], number) for number in range(len(parts[0].inputs))] * REPEATS
    for part in parts[1:]:
        jobs += [Job(part, number) for number in range(min(IMAGES, len(part.inputs)))]
    random.Random(4).shuffle(jobs)
    return jobs


def _has_sklearn() -> bool:
    from importlib.util import find_spec

    return find_spec("sklearn") is not None


def _things(part: Part) -> str:
    return "questions" if part.name == "qabot" else "images of digits"
