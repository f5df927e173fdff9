"""The demo: nothing is lost when an agent is killed, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

from tests.console.shells import Shell, until


def test_the_demo_loses_nothing_and_cleans_up(shell: Shell) -> None:
    temporary = shell.folder / "tmp"
    temporary.mkdir()
    ran = shell("demo", "--json", env={"TMPDIR": str(temporary)})
    assert (ran.code, ran.err) == (0, "")
    found = ran.json
    assert found["ok"] is True
    assert found["submitted"] == found["completed"] >= 192
    assert (found["lost"], found["twice"], found["restarts"]) == (0, 0, 1)
    assert found["replay"]["same"] is True
    assert found["programs"][0]["accuracy"] > 0.5
    assert found["seconds"] < 60
    assert list(temporary.iterdir()) == []


def test_the_story_ends_with_lines_that_work_while_it_is_kept(shell: Shell) -> None:
    temporary = shell.folder / "tmp"
    temporary.mkdir()
    process = shell.start("demo", "--keep", TMPDIR=str(temporary))
    assert process.stdout is not None
    story = []
    while not story or "Ctrl-C" not in story[-1]:
        line = process.stdout.readline()
        assert line, process.communicate()
        story.append(line.rstrip())
    text = "\n".join(story)
    assert "kill -9" in text
    assert "Nothing was lost, and every task ended exactly once." in text
    assert "nats req dspex.ask.qabot" in text
    script = text[text.index("import { connect }") :].splitlines()
    assert script.index("await nc.drain();") == 9, "ten lines of JavaScript"
    (line,) = (line for line in story if line.startswith("dspex ask"))
    url = line.rpartition(" ")[2]
    reply = shell("ask", "qabot", "question=What is a commit?", "--nats", url)
    assert "answer" in reply.json["output"]
    pids = [row["pid"] for row in shell("ps", "--nats", url, "--json").lines]
    for _ in range(3):  # more than once, as `timeout` and impatient people do
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    until(lambda: not any(_runs(pid) for pid in pids))
    assert list(temporary.iterdir()) == []


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")


def test_without_scikit_learn_there_are_questions_only(shell: Shell) -> None:
    hidden = shell.folder / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'sklearn' else found(name, *more)\n"
    )
    from tests.console.shells import SRC

    ran = shell("demo", env={"PYTHONPATH": f"{hidden}{os.pathsep}{SRC}"})
    assert (ran.code, ran.err) == (0, "")
    assert "scikit-learn is not installed" in ran.out
    assert "images" not in ran.out.partition("Give it work")[2].partition("\n")[0]
    assert json.dumps("digits") not in ran.out
