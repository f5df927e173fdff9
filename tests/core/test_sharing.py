"""Room that is shared, and turns that are taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dspex.core.sharing import Room, Turns

OWNERS = ("a", "b", "c", "d")


def fill(room: Room, owner: str, size: int = 0) -> int:
    """As much as an owner may have."""
    count = 0
    while room.takes(owner, size):
        room.take((owner, count), owner, size)
        count += 1
    return count


def test_who_is_alone_gets_half_and_who_comes_late_gets_something() -> None:
    room = Room(1000, 1 << 30)
    assert fill(room, "a") == 500
    assert fill(room, "b") == 250
    assert fill(room, "c") == 125


def test_bytes_are_shared_as_things_are() -> None:
    room = Room(1000, 1000)
    assert fill(room, "large", 100) == 5
    assert room.takes("small", 100) and not room.takes("large", 100)


def test_one_that_is_too_large_for_the_room_is_let_in_alone() -> None:
    room = Room(10, 100)
    assert room.takes("a", 1000)
    room.take(1, "a", 1000)
    assert not room.takes("a", 1000)
    assert room.leave(1) and room.takes("a", 1000)


def test_room_that_is_left_can_be_had_again() -> None:
    room = Room(100, 100)
    fill(room, "a")
    assert not room.takes("a")
    assert room.leave(("a", 3)) and not room.leave(("a", 3))
    assert room.takes("a")


@given(st.lists(st.tuples(st.sampled_from(OWNERS), st.integers(0, 50), st.booleans()), max_size=300))
def test_whatever_comes_and_goes_there_is_room_for_somebody_new(steps: list[tuple[str, int, bool]]) -> None:
    room = Room(64, 1 << 20)
    held: list[int] = []
    for number, (owner, size, goes) in enumerate(steps):
        if goes and held:
            assert room.leave(held.pop())
        elif room.takes(owner, size):
            room.take(number, owner, size)
            held.append(number)
        assert len(held) < 64
    assert room.takes("somebody new")
    room.clear()
    assert fill(room, "a") == 32


@given(st.lists(st.sampled_from(OWNERS), max_size=60))
def test_turns_keep_each_line_in_order_and_serve_all_lines_alike(owners: list[str]) -> None:
    turns: Turns[int] = Turns()
    for number, owner in enumerate(owners):
        turns.add(owner, number)
    served: list[tuple[str, int]] = []
    while found := turns.take(lambda _: True):
        served.append(found)
    for owner in OWNERS:
        mine = [number for other, number in served if other == owner]
        assert mine == [number for number, other in enumerate(owners) if other == owner]
    # Before anybody is served a third time, everybody who waits has been served twice, and so on.
    for index, (owner, _) in enumerate(served):
        before = [other for other, _ in served[:index]]
        for other in set(owners):
            if other in [late for late, _ in served[index:]]:
                assert before.count(other) >= before.count(owner) - (other != owner)


def test_who_may_not_is_passed_over_and_what_is_put_back_is_first() -> None:
    turns: Turns[int] = Turns()
    for number in range(3):
        turns.add("a", number)
    turns.add("b", 9)
    assert turns.take(lambda owner: owner == "b") == ("b", 9)
    assert turns.take(lambda owner: owner == "b") is None and not turns.any(lambda owner: owner == "b")
    taken = turns.take(lambda _: True)
    assert taken == ("a", 0) and len(turns) == 2
    turns.put_back(*taken)
    assert turns.take(lambda _: True) == ("a", 0)
