"""One visitor after the other. Nothing here needs a second thread: whoever computes is what calls back."""

from collections.abc import Callable

import pytest

from data.cli import InputError
from tinygrad_impl.live.settings import Asked, Refused
from tinygrad_impl.live.tests.support import asked
from tinygrad_impl.live.turns import MOST_WAITING, Event, Events, Turns, Visit


class Visitor:
    """A visit, what it was sent, and what it does then."""

    def __init__(self, name: str, then: Callable[[], object] = int):
        self.sent: list[Event | None] = []
        self.then = then
        self.visit = Visit(asked(name), self.send)

    def send(self, event: Event | None) -> None:
        self.sent.append(event)
        if event and event["event"] == "piece":
            self.then()

    @property
    def kinds(self) -> list[object]:
        return [event and (event.get("before") or event.get("says") or event["event"]) for event in self.sent]


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def ended() -> list[str]:
    """The prompts whose events came to an end, whichever way."""
    return []


@pytest.fixture
def write(turns: Turns, ended: list[str]) -> Callable[[Asked], Events]:
    """Three pieces for each prompt; "last" ends the server, "bad" and "worse" are errors."""

    def events(given: Asked) -> Events:
        try:
            if given.prompt == "bad":
                raise InputError("this is no prompt; give another")
            if given.prompt == "worse":
                raise ZeroDivisionError
            for i in range(3):
                yield {"event": "piece", "text": i}
            yield {"event": "done"}
        finally:
            ended.append(given.prompt)
            if given.prompt == "last":
                turns.close()

    return events


WHOLE = ["piece", "piece", "piece", "done", None]


def joining(turns: Turns, other: Visitor) -> Callable[[], None]:
    """Has another visitor come, once."""

    def join() -> None:
        if other.visit.place is None:
            turns.join(other.visit)

    return join


def test_first_come_first_served(turns: Turns, write: Callable[[Asked], Events], ended: list[str]) -> None:
    """And whoever waits knows after how many others."""
    late = Visitor("last")
    second = Visitor("second", joining(turns, late))
    first = Visitor("first", joining(turns, second))
    third = Visitor("third")
    turns.join(first.visit)
    turns.join(third.visit)
    turns.answer(write)
    assert ended == ["first", "third", "second", "last"]
    assert first.kinds == WHOLE
    assert third.kinds == [1, *WHOLE]
    assert second.kinds == [2, 1, *WHOLE]
    assert late.kinds[0] == 1
    assert late.kinds[1:4] == WHOLE[:3]


def test_a_visit_can_be_stopped(turns: Turns, write: Callable[[Asked], Events], ended: list[str]) -> None:
    first = Visitor("first", lambda: turns.leave(first.visit))
    last = Visitor("last")
    turns.join(first.visit)
    turns.join(last.visit)
    turns.answer(write)
    assert first.kinds == ["piece", None]
    assert ended == ["first", "last"]  # the first before the last began
    assert last.kinds[:5] == [1, *WHOLE[:4]]


def test_who_leaves_the_queue_is_not_answered(turns: Turns, write: Callable[[Asked], Events], ended: list[str]) -> None:
    second, last = Visitor("second"), Visitor("last")
    first = Visitor("first", lambda: turns.leave(second.visit))
    for visitor in (first, second, last):
        turns.join(visitor.visit)
    turns.answer(write)
    assert ended == ["first", "last"]
    assert second.kinds == [1]
    assert last.kinds[:3] == [2, 1, "piece"]


def test_an_error_ends_one_visit_alone(
    turns: Turns, write: Callable[[Asked], Events], capsys: pytest.CaptureFixture[str]
) -> None:
    visitors = [Visitor(name) for name in ("bad", "worse", "last")]
    for visitor in visitors:
        turns.join(visitor.visit)
    turns.answer(write)
    bad, worse, last = visitors
    assert bad.kinds == ["this is no prompt; give another.", None]
    assert worse.kinds == [1, "The program failed; its terminal says why.", None]
    assert last.kinds[2:6] == WHOLE[:4]
    said = capsys.readouterr().err
    assert said.startswith("error: this is no prompt; give another\n")
    assert "ZeroDivisionError" in said


def test_the_end_is_told_to_all(turns: Turns, write: Callable[[Asked], Events], ended: list[str]) -> None:
    waiting = Visitor("waiting")
    first = Visitor("first", turns.close)
    turns.join(first.visit)
    turns.join(waiting.visit)
    turns.answer(write)
    stopped = "The server was stopped."
    assert first.kinds == ["piece", stopped, None, None]
    assert waiting.kinds == [1, stopped, None]
    assert ended == ["first"]
    with pytest.raises(Refused, match="The server is ending; try again later"):
        turns.join(Visitor("late").visit)


def test_a_full_queue(turns: Turns) -> None:
    for _ in range(MOST_WAITING):
        turns.join(Visitor("one").visit)
    with pytest.raises(Refused, match="50 visitors are waiting already; try again later"):
        turns.join(Visitor("one more").visit)
