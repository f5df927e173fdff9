"""`dspex replay --all PROGRAM`: every recorded task against today's code, the regression test of a program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dspex.console.options import Options
from dspex.console.progress import Progress
from dspex.console.render import bold, compact, duration, green, print_json, print_table, yellow
from dspex.console.sources import code_of, opened

if TYPE_CHECKING:
    from dspex.compose.story import Story
    from dspex.core.program import Program
    from dspex.core.replay import Report

__all__ = ["regress"]

SHOWN = 10
"""Differences that are listed; --json has all."""


def regress(
    options: Options, program: str, log: str | None, app: str | None, values: dict[str, Any], since: str | None,
    limit: int | None,
) -> int:  # fmt: skip
    """Replay every ended task of a program; exit code 1 when one differs."""
    from dspex.core.errors import ConfigurationError, NotFound

    every = options.run(_read(options, log, program))
    if not every:
        raise NotFound(f"the log has no task of {program}")
    wanted = [story for story in every if story.state.ended and (since is None or story.events[0].time >= since)]
    wanted = wanted[-limit:] if limit else wanted
    code = code_of(options, program, every[0].app, app, f"dspex replay --all {program}")
    if isinstance(code, str):
        raise ConfigurationError(code)
    pairs = _run(options, wanted, code, values)
    summary = _summary(program, pairs, len(every))
    if options.json:
        print_json({"summary": summary})
    else:
        _show(summary, pairs)
    return 1 if summary["different"] else 0


async def _read(options: Options, log: str | None, program: str) -> list[Story]:
    from dspex.compose.story import stories

    async with opened(options, log) as source:
        return await stories(source, program)


def _run(
    options: Options, wanted: list[Story], code: type[Program], values: dict[str, Any]
) -> list[tuple[Story, Report]]:
    import msgspec

    from dspex.console.replay import judge

    found = []
    with Progress({code.name: len(wanted)}, silent=options.json) as bars:
        for story in wanted:
            report = judge(story, code, values).report
            found.append((story, report))
            bars.step(code.name)
            if options.json:
                print_json(
                    {
                        "task": story.task, "same": report.same, "effects": report.effects,
                        "performed": report.performed, "difference": msgspec.to_builtins(report.difference),
                        "why": report.why or None,
                        "recorded_seconds": round(story.recorded_seconds, 6), "replay_seconds": report.seconds,
                    }
                )  # fmt: skip
    return found


def _summary(program: str, pairs: list[tuple[Story, Report]], every: int) -> dict[str, Any]:
    """The counts: `failed` are differences in which today's code raised, `not_run` those that cannot be run again."""
    reports = [report for _, report in pairs]
    differ = [report for report in reports if report.same is False]
    return {
        "program": program, "tasks": every, "replayed": len(reports), "same": sum(r.same is True for r in reports),
        "different": len(differ), "failed": sum(r.difference.kind == "error" for r in differ if r.difference),
        "not_run": sum(r.same is None for r in reports), "performed": 0, "effects": sum(r.effects for r in reports),
        "recorded_seconds": round(sum(story.recorded_seconds for story, _ in pairs), 6),
        "replay_seconds": round(sum(r.seconds for r in reports), 6),
    }  # fmt: skip


def _show(summary: dict[str, Any], pairs: list[tuple[Story, Report]]) -> None:
    differ = [(story, report) for story, report in pairs if report.difference]
    rows = []
    for story, report in differ[:SHOWN]:
        difference = report.difference
        assert difference, "those that differ have one"
        change = f"{_text(difference.expected)} → {_text(difference.found)}"
        rows.append([story.task, difference.kind, difference.place, change])
    if rows:
        print_table(["task", "kind", "place", "recorded → today"], rows, right={"task"})
        if len(differ) > SHOWN:
            click.echo(f"and {len(differ) - SHOWN} more; --json has all")
        click.echo(f"look at one: dspex replay {differ[0][0].task}\n")
    counts = [f"{summary['same']} same", f"{summary['different']} different"]
    if summary["failed"]:
        counts[-1] += f" ({summary['failed']} raised)"
    if summary["not_run"]:
        counts.append(f"{summary['not_run']} not run again")
    paint = yellow if differ else green
    click.echo(f"{paint(bold(', '.join(counts)))} of {len(pairs)} ended tasks of {summary['program']}")
    click.echo(
        f"{summary['effects']} effects looked up, 0 performed; recorded {duration(summary['recorded_seconds'])}, "
        f"replayed in {duration(summary['replay_seconds'])}"
    )
    for why in sorted({report.why for _, report in pairs if report.same is None}):
        click.echo(f"not run again: {why}")


def _text(value: Any) -> str:
    return "nothing" if value is None else compact(value)
