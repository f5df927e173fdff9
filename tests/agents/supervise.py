"""A supervisor over children that do what their name says, for `test_supervisor.py`.

`python supervise.py '{"children": ["serve", "voice", "crash"]}'`, with `grace` (seconds), `strategy`, `beyond`,
`give_up`, `identities` (a folder) and `below` (a process in between). Prints every event, every change of the processes
and every child's end as lines of JSON.
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
from dspex.core.supervision import SupervisorSpec


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
    if kind == "forgetful":  # sees neither that it should end nor that its supervisor is gone
        time.sleep(1000)
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


def child(index: int, kind: str, grace: float) -> Child:
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

    program = kind if kind in ("crash", "refuse") else None
    return Child(name, "tester", start, program=program, shutdown=grace)


def main() -> int:
    asked = json.loads(sys.argv[1])
    children = [child(index, kind, asked.get("grace", 10.0)) for index, kind in enumerate(asked["children"])]
    voice = next((c.name for c in children if c.name.startswith("voice")), None)
    shape = {name: asked[name] for name in ("strategy", "give_up", "ordered") if name in asked}
    spec = SupervisorSpec("top", tuple(children), beyond=asked.get("beyond", "retry"), **shape)
    identities = Path(asked["identities"]) if "identities" in asked else None
    supervisor = Supervisor(spec, voice=voice, on_event=lambda event: say(**event), identities=identities)
    if "coming" in asked:  # one more child when all serve, and the first goes
        supervisor.on_event = lambda event: change(supervisor, asked["coming"], event)
    if asked.get("below"):  # between us and the test: somebody whose death we have to notice
        pid, _ = fork_child(lambda link: run_below(supervisor, link), lambda: None)
        say(supervisor=pid)
        time.sleep(1000)
    if asked.get("above"):
        return run_above(spec, identities)
    code = supervisor.run()
    say(over=code, descriptors=len(list(Path("/proc/self/fd").iterdir())))
    return code


def change(supervisor: Supervisor, kind: str, event: dict[str, Any]) -> None:
    say(**event)
    if event["event"] == "all-serving" and not any("-9" in name for name in supervisor.tree.names()):
        first = supervisor.tree.names()[0]
        supervisor.add(child(9, kind, 10.0), "top")
        supervisor.remove(first)


def run_above(spec: SupervisorSpec, identities: Path | None) -> int:
    """A supervisor over a supervisor."""

    def start(life: Life, close: CloseOthers) -> tuple[int, Link | None]:
        def run(link: Link) -> int:
            return Supervisor(
                spec, parent=link, on_event=lambda event: say(**event), identities=identities, life=life
            ).run()

        pid, link = fork_child(run, close)
        say(supervisor=pid)
        return pid, link

    tree = SupervisorSpec("root", (Child("supervisor", "supervisor", start, shutdown=20.0),), beyond="retry")
    return Supervisor(tree).run()


def run_below(supervisor: Supervisor, link: Link) -> int:
    supervisor.parent = link
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
