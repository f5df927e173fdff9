"""What a process is called in `ps` and `top`: its role and name, and nothing of the command line that began it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from dspex.core.masking import masked_words

__all__ = ["be_called", "hide_addresses"]


def be_called(name: str, role: str = "") -> None:
    """Show as `dspex: agent qabot-ab12-1`. Processes are forked, so they would all show the command line of `dspex up`,
    which may hold a server's password. `/proc/PID/environ` is overwritten, too."""
    from setproctitle import setproctitle

    setproctitle(f"dspex: {role} {name}" if role else f"dspex: {name}")
    with suppress(OSError):  # Linux: 15 characters, for what shows no command lines
        Path("/proc/self/comm").write_text(name[:15])


def hide_addresses(words: list[str]) -> None:
    """Mask addresses on our own command line, as soon as it has been read."""
    from setproctitle import setproctitle

    setproctitle(" ".join(["dspex", *masked_words(words)]))
