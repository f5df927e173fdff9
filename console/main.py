"""The `dspex` command: finds the commands, and turns every error into one sentence and an exit code.

Exit codes: 0 done, 1 refused, 2 usage (flags, files, settings), 3 no connection, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from dspex.console.render import is_terminal, print_json, red

__all__ = ["cli", "main", "run"]

REFUSED, USAGE, NO_CONNECTION, INTERRUPTED, PIPE_CLOSED = 1, 2, 3, 130, 141

COMMANDS = {
    "demo": ("demo", "demo"),
    "up": ("up", "up"),
    "ask": ("doors", "ask"),
    "submit": ("doors", "submit"),
    "result": ("doors", "result"),
    "score": ("doors", "score"),
    "signal": ("doors", "signal"),
    "cancel": ("cancel", "cancel"),
    "dlq": ("dlq", "dlq"),
    "ps": ("look", "ps"),
    "scale": ("fleet", "scale"),
    "reload": ("fleet", "reload"),
    "drain": ("fleet", "drain"),
    "restart": ("fleet", "restart"),
    "stop": ("fleet", "stop"),
    "tasks": ("tasks", "tasks"),
    "cost": ("cost", "cost"),
    "limits": ("limits", "limits"),
    "events": ("look", "events"),
    "replay": ("replay", "replay"),
    "diff": ("diff", "diff"),
    "fork": ("fork", "fork"),
    "export": ("export", "export"),
    "verify": ("archive", "verify"),
    "restore": ("archive", "restore"),
    "forget": ("forget", "forget"),
    "views": ("views", "views"),
    "vars": ("variables", "variables"),
    "breakers": ("breakers", "breakers"),
    "secure": ("secure", "secure"),
    "doctor": ("doctor", "doctor"),
    "completion": ("completion", "completion"),
}
"""Every command, in the order of the help: its module in this folder, and its name there."""


class _Commands(click.Group):
    """Imports a command's module when the command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name]
        command: click.Command = getattr(import_module(f"dspex.console.{module}"), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else "`dspex --help` lists the commands"
            raise click.UsageError(f"there is no command {args[0]}; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command. What click would say about a closed pipe or Ctrl-C is left unsaid."""
        try:
            status: object = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            if is_terminal(sys.stderr):
                click.echo(err=True)  # after the ^C
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # Whoever read us has enough. What is still in the buffer must go nowhere, silently.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(PIPE_CLOSED)
        return status


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from dspex import __version__

        click.echo(f"dspex {__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Say which dspex.")
def cli() -> None:
    """ML programs as production software: typed, durable, replayable, on NATS.

    \b
    See it work:          dspex demo
    Run a program:        dspex up qa.py
    Ask it:               dspex ask qabot question="What is a log?"

    Settings come from the flag, then the environment (DSPEX_DATA, NATS_URL, …), then ./dspex.toml.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if any("@" in word for word in words):
        from dspex.agents.titles import hide_addresses

        hide_addresses(words)
    sys.exit(run(words))


def run(arguments: list[str]) -> int:
    """Run one command; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = cli.main(arguments or ["--help"], prog_name="dspex", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except Exception as error:
        flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
        if "--debug" in flags:
            import traceback

            traceback.print_exc()
        return _tell(error, as_json="--json" in flags)
    return status if isinstance(status, int) else 0


def _tell(error: Exception, *, as_json: bool) -> int:
    """The error in one sentence on stderr, with --json also as an object on stdout; the exit code."""
    code, sentence = _translated(error)
    kind = "UsageError" if isinstance(error, click.ClickException) else type(error).__name__
    click.echo(f"{red('dspex:')} {sentence}", err=True)
    if as_json:
        about = {
            "type": getattr(error, "type", "") or kind, "message": sentence, "task": getattr(error, "task", None),
            "code": getattr(error, "code", None),
        }  # fmt: skip
        print_json({"error": about})
    return code


def _translated(error: Exception) -> tuple[int, str]:
    from dspex.core.errors import ConfigurationError, ConnectionFailed, DefinitionError, DspexError, InvalidAssignment

    sentence = " ".join(str(error).split())
    match error:
        case click.UsageError():
            return USAGE, _usage(error)
        case click.ClickException():
            return USAGE, error.format_message()
        case ConnectionFailed():
            return NO_CONNECTION, sentence
        case ConfigurationError() | DefinitionError() | InvalidAssignment():
            return USAGE, sentence
        case DspexError():
            return REFUSED, sentence
        case OSError() if error.filename:
            return REFUSED, f"{error.filename}: {error.strerror}"
        case _:
            return REFUSED, f"{type(error).__name__}: {sentence} (that is dspex's own mistake; --debug shows where)"


def _usage(error: click.UsageError) -> str:
    text = error.format_message()
    where = error.ctx.command_path if error.ctx else "dspex"
    if "`" in text:
        return text
    return f"{text[:1].lower()}{text[1:].rstrip('.')}; see `{where} --help`"
