"""`dspex completion`: what a shell needs to complete our commands."""

from __future__ import annotations

import click

__all__ = ["completion"]


@click.command(short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash   eval "$(dspex completion bash)"                            in ~/.bashrc
    zsh    eval "$(dspex completion zsh)"                             in ~/.zshrc
    fish   dspex completion fish > ~/.config/fish/completions/dspex.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, "the choice has only what click knows"
    script = kind(context.find_root().command, {}, "dspex", "_DSPEX_COMPLETE")
    click.echo(script.source_template % script.source_vars())
