"""A loop that had no core to run on has not stood still; one that computes has."""

from __future__ import annotations

from pathlib import Path

from dspex.agents.stillness import Stillness


def test_waiting_for_a_core_does_not_count(tmp_path: Path) -> None:
    stat = tmp_path / "schedstat"
    stat.write_text("5000000000 1000000000 10\n")
    stillness = Stillness(stat)
    assert stillness.seconds(100.0, 100.1) == 100.1 - 100.0
    stat.write_text("5100000000 3000000000 11\n")
    assert round(stillness.seconds(100.0, 102.2), 6) == 0.2
    stat.write_text("7100000000 3000000000 12\n")
    assert round(stillness.seconds(100.0, 104.2), 6) == 2.2
    assert round(stillness.seconds(104.0, 104.2), 6) == 0.2, "a new pulse begins anew"


def test_where_the_kernel_does_not_say_it_all_time_counts(tmp_path: Path) -> None:
    stillness = Stillness(tmp_path / "nothing")
    assert stillness.seconds(1.0, 1.5) == 0.5
    assert stillness.seconds(1.0, 3.0) == 2.0


def test_the_kernel_says_it_of_this_thread() -> None:
    assert 0.0 <= Stillness().seconds(10.0, 11.0) <= 1.0
