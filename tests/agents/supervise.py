"""A supervisor over children that do what their name says, for `test_supervisor.py`.

`python supervise.py '["serve", "serve@1", "crash"]'`: a behaviour, and behind `@` the stage. Prints every event, every
change of the processes and every child's end as lines of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dspex.agents.link import Link
from dspex.agents.supervisor import EXIT_RECYCLE, EXIT_REFUSED, Child, CloseOthers, Life, Supervisor, fork_child


def say(**what: Any) -> None:
    os.write(1, (json.dumps(what) + "\n").encode())


def behave(kind: str, name: str, life: Life, link: Link) -> int:
    """What a child does."""
    stopped: list[int] = []
    if kind == "stubborn":
        signal.signal(signal.SIGTERM, lambda *_: say(ignored=name))
    else:
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    if kind == "refuse":
        link.send({"refused": "I cannot be what I was meant to be"})
        return EXIT_REFUSED
    if kind == "crash":
        return 7
    say(born=name, pid=os.getpid(), restarts=life.restarts)
    link.send({"state": "serving"})
    if kind == "recycle" and not life.restarts:
        return EXIT_RECYCLE
    if kind == "raise":
        raise RuntimeError("boom")
    while not stopped and link.open:
        time.sleep(0.01)
        for message in link.receive():
            if kind == "voice" and "processes" in message:
                say(heard=message["processes"], notices=message["notices"])
                if message["notices"]:
                    link.send({"ack": message["notices"][-1]["notice"]})
    say(ended=name, orphan=not link.open)
    return 0


def child(index: int, text: str) -> Child:
    kind, _, stage = text.partition("@")
    name = f"{kind}-{index}"

    def start(life: Life, close: CloseOthers) -> tuple[int, Link | None]:
        if kind == "unborn" and life.restarts < 2:
            raise OSError("no room")
        if kind == "stranger":
            pid = os.fork()
            if not pid:
                os.execv("/bin/sleep", ["sleep", "1000"])
            say(born=name, pid=pid, restarts=life.restarts)
            return pid, None
        return fork_child(lambda link: behave(kind, name, life, link), close)

    return Child(name, "tester", start, stage=int(stage or 0))


def main() -> int:
    children = [child(index, text) for index, text in enumerate(json.loads(sys.argv[1]))]
    voice = next((c.name for c in children if c.name.startswith("voice")), None)
    grace = float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    supervisor = Supervisor(children, voice=voice, on_event=lambda event: say(**event), grace=grace)
    if len(sys.argv) > 3:  # between us and the test: somebody whose death we have to notice
        pid, _ = fork_child(lambda link: run_below(supervisor, link), lambda: None)
        say(supervisor=pid)
        time.sleep(1000)
    code = supervisor.run()
    say(over=code, descriptors=len(list(Path("/proc/self/fd").iterdir())))
    return code


def run_below(supervisor: Supervisor, link: Link) -> int:
    supervisor.parent = link
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
