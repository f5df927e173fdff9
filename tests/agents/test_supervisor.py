"""A supervisor and its children, as processes: who is started again, who is not, and in which order all end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspex.agents.supervisor import exit_reason

SCRIPT = Path(__file__).with_name("supervise.py")
Line = dict[str, Any]


class Family:
    """A supervisor in a process of its own, and what it and its children have said."""

    def __init__(self, *children: str, **options: Any) -> None:
        command = [sys.executable, str(SCRIPT), json.dumps({"children": children, **options})]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[Line] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def wait_for(self, condition: Callable[[list[Line]], Any], timeout: float = 60.0) -> Any:
        deadline = time.monotonic() + timeout
        while not (found := condition(list(self.lines))):
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.01)
        return found

    def births(self, name: str, count: int = 1) -> list[Line]:
        """The first `count` times a child was born."""

        def look(lines: list[Line]) -> list[Line]:
            found = [line for line in lines if line.get("born") == name]
            return found[:count] if len(found) >= count else []

        births: list[Line] = self.wait_for(look)
        return births

    def event(self, kind: str, count: int = 1) -> list[Line]:
        def look(lines: list[Line]) -> list[Line]:
            found = [line for line in lines if line.get("event") == kind]
            return found[:count] if len(found) >= count else []

        events: list[Line] = self.wait_for(look)
        return events

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(30)
        assert self.process.stdout and self.process.stderr
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def family() -> Iterator[Callable[..., Family]]:
    made: list[Family] = []

    def make(*children: str, **options: Any) -> Family:
        made.append(Family(*children, **options))
        return made[-1]

    yield make
    for one in made:
        one.end()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_all_serve_when_all_have_said_so(family: Callable[..., Family]) -> None:
    one = family("serve", "serve")
    one.event("all-serving")
    assert {line["agent"] for line in one.event("serving", 2)} == {"serve-0", "serve-1"}


def test_a_killed_child_is_started_again_at_once(family: Callable[..., Family]) -> None:
    one = family("serve", "serve")
    (first,) = one.births("serve-0")
    os.kill(first["pid"], signal.SIGKILL)
    second = one.births("serve-0", 2)[1]
    assert second["pid"] != first["pid"] and second["restarts"] == 1
    (crashed,) = one.event("crashed")
    assert (crashed["agent"], crashed["reason"], crashed["pid"], crashed["delay"]) == ("serve-0", "SIGKILL", first["pid"], 0)
    assert len(one.births("serve-1")) == 1


def test_a_program_that_is_not_ours_is_started_again_too(family: Callable[..., Family]) -> None:
    one = family("stranger")
    (first,) = one.births("stranger-0")
    os.kill(first["pid"], signal.SIGKILL)
    assert one.births("stranger-0", 2)[1]["restarts"] == 1


def test_a_child_that_keeps_dying_is_started_less_and_less_often(family: Callable[..., Family]) -> None:
    one = family("crash", "serve")
    delays = [event["delay"] for event in one.event("crashed", 6)]
    assert delays[::2] == [0, 0, 0], "the intensity allows one restart"
    assert 0 < delays[1] < delays[3] < delays[5]
    assert {event["reason"] for event in one.event("crashed", 6)} == {"exit 7"}
    assert one.event("escalated", 3)[0]["reason"].startswith("2 restarts within 5 s, more than 1")
    assert len(one.births("serve-1")) == 1


def test_a_child_that_cannot_be_born_is_tried_again(family: Callable[..., Family]) -> None:
    one = family("unborn", "serve")
    assert one.births("unborn-0")[0]["restarts"] == 2
    assert [event["reason"] for event in one.event("crashed", 2)] == ["no room", "no room"]
    one.event("all-serving")


def test_a_child_that_raises_has_died(family: Callable[..., Family]) -> None:
    one = family("raise")
    assert one.event("crashed")[0]["reason"] == "exit 70"


def test_a_child_that_refuses_is_not_started_again(family: Callable[..., Family]) -> None:
    one = family("refuse", "voice")
    (refused,) = one.event("refused")
    assert refused["reason"] == "I cannot be what I was meant to be"
    states = one.wait_for(lambda lines: [line["heard"] for line in lines if "heard" in line][-1:])[0]
    assert {state["agent"]: state["state"] for state in states}["refuse-0"] == "gave up"
    time.sleep(0.3)
    assert len([line for line in one.lines if line.get("event") == "refused"]) == 1
    assert not any(line.get("event") == "crashed" for line in one.lines)


def test_a_child_that_wants_to_be_replaced_is_without_a_crash(family: Callable[..., Family]) -> None:
    one = family("recycle", "voice")
    assert one.births("recycle-0", 2)[1]["restarts"] == 1
    one.event("all-serving")
    time.sleep(0.2)
    assert not any(line.get("event") == "crashed" for line in one.lines)
    assert not any(line.get("notices") for line in one.lines)


def test_the_voice_hears_how_things_stand_and_of_each_death_until_it_says_that_it_has_it(
    family: Callable[..., Family],
) -> None:
    one = family("serve", "voice")
    one.event("all-serving")
    (first,) = one.births("serve-0")
    os.kill(first["pid"], signal.SIGKILL)
    notice = one.wait_for(lambda lines: [n for line in lines for n in line.get("notices", ())])[0]
    assert (notice["agent"], notice["pid"], notice["reason"]) == ("serve-0", first["pid"], "SIGKILL")
    assert notice["id"]
    heard = one.wait_for(
        lambda lines: [
            line for line in lines for p in line.get("heard", ())
            if p["agent"] == "serve-0" and p["restarts"] == 1 and p["state"] == "serving"
        ]
    )  # fmt: skip
    assert heard


def test_a_new_voice_hears_what_the_one_before_did_not_write_down(family: Callable[..., Family]) -> None:
    one = family("voice", "serve")
    one.event("all-serving")
    (voice,) = one.births("voice-0")
    os.kill(voice["pid"], signal.SIGSTOP)
    (serve,) = one.births("serve-1")
    os.kill(serve["pid"], signal.SIGKILL)
    one.births("serve-1", 2)
    os.kill(voice["pid"], signal.SIGKILL)
    one.births("voice-0", 2)
    agents = one.wait_for(
        lambda lines: {n["agent"] for line in lines for n in line.get("notices", ())} >= {"voice-0", "serve-1"}
    )
    assert agents


def test_all_end_in_reverse_order_when_told_to_stop(family: Callable[..., Family]) -> None:
    one = family("serve", "serve", "serve")
    one.event("all-serving")
    assert [line["born"] for line in one.lines if "born" in line] == ["serve-0", "serve-1", "serve-2"]
    assert one.stop() == 0
    assert [line["ended"] for line in one.lines if "ended" in line] == ["serve-2", "serve-1", "serve-0"]
    assert one.lines[-1]["over"] == 0


def test_a_child_that_does_not_listen_is_killed_after_the_grace(family: Callable[..., Family]) -> None:
    one = family("stubborn", "serve", grace=0.5)
    one.event("all-serving")
    (stubborn,) = one.births("stubborn-0")
    assert one.stop() == 0
    assert gone(stubborn["pid"]) and {"ignored": "stubborn-0"} in one.lines


def test_told_twice_it_hurries(family: Callable[..., Family]) -> None:
    one = family("stubborn", grace=60.0)
    one.event("all-serving")
    one.process.terminate()
    one.wait_for(lambda lines: {"ignored": "stubborn-0"} in lines)
    one.process.terminate()
    assert one.process.wait(20) == 0


def test_ctrl_c_from_the_terminal_and_from_the_parent_is_told_once(family: Callable[..., Family]) -> None:
    one = family("stubborn", grace=60.0)
    one.event("all-serving")
    one.process.send_signal(signal.SIGINT)
    one.wait_for(lambda lines: {"ignored": "stubborn-0"} in lines)
    one.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        one.process.wait(3)
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(60) == 0


def test_a_crash_loop_does_not_keep_it_from_stopping(family: Callable[..., Family]) -> None:
    one = family("crash", "serve")
    one.event("crashed", 4)
    assert one.stop() == 0


def test_a_frozen_child_is_ended_too(family: Callable[..., Family]) -> None:
    one = family("serve", grace=0.5)
    one.event("all-serving")
    (frozen,) = one.births("serve-0")
    os.kill(frozen["pid"], signal.SIGSTOP)
    assert one.stop() == 0
    assert gone(frozen["pid"])


@pytest.mark.parametrize("child", ["serve", "stubborn"])
def test_its_children_end_when_its_own_parent_dies(family: Callable[..., Family], child: str) -> None:
    one = family(child, below=True, grace=60.0)
    supervisor = one.wait_for(lambda lines: [line["supervisor"] for line in lines if "supervisor" in line])[0]
    (born,) = one.births(f"{child}-0")
    one.process.kill()
    deadline = time.monotonic() + 20
    while not (gone(supervisor) and gone(born["pid"])):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_notices_that_its_supervisor_was_killed(family: Callable[..., Family]) -> None:
    one = family("serve")
    one.event("all-serving")
    (born,) = one.births("serve-0")
    one.process.kill()
    one.wait_for(lambda lines: {"ended": "serve-0", "orphan": True} in lines)
    assert gone(born["pid"]) or born


def test_children_that_come_and_go_leave_no_descriptor_behind(family: Callable[..., Family]) -> None:
    quiet = family("serve")
    quiet.event("all-serving")
    quiet.stop()
    busy = family("serve")
    for count in range(1, 6):
        born = busy.births("serve-0", count)[-1]
        os.kill(born["pid"], signal.SIGKILL)
        busy.event("crashed", count)
    busy.births("serve-0", 6)
    busy.stop()
    assert busy.lines[-1]["descriptors"] == quiet.lines[-1]["descriptors"]


@pytest.mark.parametrize(("status", "words"), [(9, "SIGKILL"), (0, "exit 0"), (7 << 8, "exit 7"), (40, "signal 40")])
def test_a_wait_status_in_words(status: int, words: str) -> None:
    assert exit_reason(status) == words


def test_one_for_all_takes_the_others_down_in_reverse_and_starts_all_in_order(family: Callable[..., Family]) -> None:
    one = family("serve", "serve", "serve", strategy="one_for_all")
    one.event("all-serving")
    (victim,) = one.births("serve-1")
    os.kill(victim["pid"], signal.SIGKILL)
    one.births("serve-2", 2)
    told = [line.get("born") or line.get("ended") for line in one.lines if "born" in line or "ended" in line][3:]
    assert told == ["serve-2", "serve-0", "serve-0", "serve-1", "serve-2"]
    assert len(one.event("crashed")) == 1, "those that were stopped did not crash"


def test_one_that_escalates_ends_with_all_of_its_children(family: Callable[..., Family]) -> None:
    one = family("serve", "crash", beyond="escalate")
    assert one.process.wait(60) == 1
    one.wait_for(lambda lines: {"ended": "serve-0", "orphan": False} in lines)
    assert one.event("gave-up")[0]["agent"] == "top"


def test_a_crash_loop_is_given_up_and_the_others_go_on(family: Callable[..., Family]) -> None:
    one = family("crash", "voice", give_up=4)
    (gave_up,) = one.event("gave-up")
    assert gave_up["agent"] == "crash-0" and gave_up["reason"].startswith("4 times in a row")
    assert gave_up["reason"].endswith("exit 7")
    (notice,) = one.wait_for(
        lambda lines: [n for line in lines for n in line.get("notices", ()) if n.get("gave_up")][:1]
    )
    assert (notice["agent"], notice["restarts"]) == ("crash-0", 4)
    assert one.event("nothing-serves")[0]["reason"] == gave_up["reason"], "it was the only program"
    states = one.wait_for(lambda lines: [line["heard"] for line in lines if "heard" in line][-1:])[0]
    shown = {state["agent"]: (state["state"], state["why"]) for state in states}
    assert shown["crash-0"] == ("gave up", gave_up["reason"]) and shown["voice-1"][0] == "serving"


def test_children_come_and_go_at_runtime(family: Callable[..., Family]) -> None:
    one = family("serve", "serve", coming="voice")
    one.births("voice-9")
    one.wait_for(lambda lines: {"ended": "serve-0", "orphan": False} in lines)
    assert one.stop() == 0
    assert [line["ended"] for line in one.lines if "ended" in line] == ["serve-0", "voice-9", "serve-1"]
    assert not any(line.get("event") == "crashed" for line in one.lines)


def test_never_two_of_one_identity_whatever_becomes_of_their_supervisor(
    family: Callable[..., Family], tmp_path: Path
) -> None:
    """One child is stopped and cannot notice that its supervisor is gone, another one does not look."""
    one = family("serve", "forgetful", above=True, ordered=False, identities=str(tmp_path), grace=1)
    for count in (1, 2, 3):
        pids = [one.births(name, count)[-1]["pid"] for name in ("serve-0", "forgetful-1")]
        supervisor = one.wait_for(lambda lines, n=count: [it["supervisor"] for it in lines if "supervisor" in it][n - 1 :])
        os.kill(pids[0], signal.SIGSTOP)
        os.kill(supervisor[0], signal.SIGKILL)
        for name, pid in zip(("serve-0", "forgetful-1"), pids, strict=True):
            one.births(name, count + 1)
            assert gone(pid), "its predecessor still lives"
    born = one.births("serve-0", 4)
    assert [line["restarts"] for line in born] == [0, 0, 0, 0], "the child did not die under a supervisor"


def test_restarts_are_counted_over_the_death_of_the_supervisor(family: Callable[..., Family], tmp_path: Path) -> None:
    one = family("serve", "serve", above=True, identities=str(tmp_path))
    (first,) = one.births("serve-0")
    one.births("serve-1")
    os.kill(first["pid"], signal.SIGKILL)
    one.births("serve-0", 2)
    one.event("serving", 3)  # said after the counts were handed up
    (supervisor,) = one.wait_for(lambda lines: [line["supervisor"] for line in lines if "supervisor" in line])
    os.kill(supervisor, signal.SIGKILL)
    assert one.births("serve-0", 3)[2]["restarts"] == 1
    assert one.births("serve-1", 2)[1]["restarts"] == 0


def test_a_child_that_is_told_to_end_before_it_has_begun_ends() -> None:
    code = """
import os, signal, time
from dspex.agents.supervisor import fork_child
signal.signal(signal.SIGTERM, lambda *_: None)
lost = 0
for _ in range(300):
    pid, link = fork_child(lambda line: time.sleep(60) or 0, lambda: None)
    os.kill(pid, signal.SIGTERM)
    link.close()
    status = os.waitpid(pid, 0)[1]
    assert os.WTERMSIG(status) == signal.SIGTERM, status
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
