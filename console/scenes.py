"""What the demo shows: answers, pictures of digits, the count, and lines to paste."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspex.console.render import bold, clean, dim, green, print_table, shorten, yellow

if TYPE_CHECKING:
    from dspex.console.workload import Part, Tally

__all__ = ["answer", "lines_to_paste", "show_counts", "show_images"]


def answer(tally: Tally, task: str) -> list[str]:
    """A question and its answer, in two lines that fit 80 columns."""
    job = tally.jobs[task]
    if task not in tally.outputs:
        return []
    answer = json.loads(tally.outputs[task]).get("answer") or "no answer"
    mark = green("✓") if tally.score(task) == 1.0 else yellow("✗")
    question = shorten(clean(job.part.inputs[job.number]["question"]), 72)
    return [bold(question), f"  {mark} {shorten(clean(answer), 70)}"]


def show_images(tally: Tally, part: Part) -> None:
    """Six images as their pixels are, with what was read in them."""
    chosen = [(task, job) for task, job in tally.of(part) if task in tally.outputs][:6]
    pictures = [_picture(job.part.inputs[job.number]["image"]) for _, job in chosen]
    click.echo()
    for row in zip(*pictures, strict=True):
        click.echo("  " + "    ".join(row).rstrip())
    read = [f"reads {json.loads(tally.outputs[task])['digit']}".center(8) for task, _ in chosen]
    click.echo("  " + "    ".join(read).rstrip())


def _picture(pixels: list[float]) -> list[str]:
    """8 rows of 8 as four lines of half blocks."""
    marks = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
    rows = [[pixel >= 7 for pixel in pixels[start : start + 8]] for start in range(0, 64, 8)]
    return ["".join(marks[pair] for pair in zip(rows[i], rows[i + 1], strict=True)) for i in range(0, 8, 2)]


def show_counts(rows: list[dict[str, Any]]) -> None:
    names = ["program", "submitted", "completed", "failed", "lost", "twice", "right"]
    print_table(
        names, [[*(row[name] for name in names[:-1]), f"{row['accuracy']:.0%}"] for row in rows], right=set(names[1:])
    )


def lines_to_paste(url: str, data: Path) -> str:
    question = "What is a commit?"
    return f"""\
{dim("# dspex")}
dspex ask qabot question="{question}" --nats {url}
dspex events --follow --nats {url}

{dim("# the nats command line")}
nats req dspex.ask.qabot '{{"question": "{question}"}}' -s {url}

{dim("// JavaScript: npm install @nats-io/transport-node @nats-io/jetstream")}
import {{ connect }} from "@nats-io/transport-node";
import {{ jetstream }} from "@nats-io/jetstream";
const nc = await connect({{ servers: "{url}" }});
const body = JSON.stringify({{ question: "{question}" }});
const wait = {{ timeout: 30000 }};
console.log((await nc.request("dspex.ask.qabot", body, wait)).json());
const {{ seq }} = await jetstream(nc).publish("dspex.task.qabot", body);
const result = await nc.request("dspex.result.qabot", `${{seq}}`, wait);
console.log(seq, result.json());
await nc.drain();"""
