"""What single values look like."""

from __future__ import annotations

from dspex.console.render import clock, gist
from dspex.console.tasks import end_of
from dspex.core.find import TaskRow


def test_a_time_of_another_day_has_its_date() -> None:
    noon = "2026-11-23T12:00:00.000000Z"
    assert clock(1795435200.0, noon) == "12:00:00 UTC"
    assert clock(1795435200.0 + 86_400, noon) == "2026-11-24 12:00:00 UTC"
    data = {"key": "order.signal.yes#0", "signal": "yes", "until": 1795435200.0 + 86_400}
    said = gist({"type": "TaskSleeping", "time": noon, "data": data})
    assert said == "at order.signal.yes#0 for the signal yes until 2026-11-24 12:00:00 UTC"


def test_a_sleeping_task_is_not_said_to_be_held() -> None:
    def row(state: str, waits: list[str] | None = None) -> TaskRow:
        return TaskRow(task="1", program="a", state=state, agent="a-1", waits=waits)

    assert end_of(row("sleeping", ["yes"])) == "waits for the signal yes"
    assert end_of(row("sleeping", [])) == "waits for a time"
    assert end_of(row("running")) == "held by a-1"
    assert "sealed" in end_of(row("completed")), "and not held by the agent that ended it"


def test_one_variable_is_not_many() -> None:
    data = {"program": "qa", "variables": {"variables": {"letters": {}}}, "app": "qa.py"}
    assert gist({"type": "ProgramRegistered", "time": "", "data": data}) == "qa, 1 variable, from qa.py"
