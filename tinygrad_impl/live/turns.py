"""One visitor after the other: requests wait in a queue, and the thread that computes answers them."""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

from data.cli import ending
from tinygrad_impl.live.settings import Asked, Refused

MOST_WAITING = 50

Event = dict[str, Any]  # "event" is its kind
Events = Generator[Event, None, None]


class Visit:
    """A request. `send` gets its events, and None after the last; several threads call it, and it must not wait."""

    def __init__(self, asked: Asked, send: Callable[[Event | None], None]):
        self.asked, self.send = asked, send
        self.stopped = False
        self.place: int | None = None  # how many come before it, as it was told


class Turns:
    """The queue. Web server's threads call `join` and `leave`; the thread that computes is in `answer`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Visit] = deque()
        self._writing: Visit | None = None
        self._closed = False

    def join(self, visit: Visit) -> None:
        """Puts a visit at the end of the queue. It is told its place, now and whenever that changes. Raises `Refused`
        where too many wait.
        """
        with self._changed:
            if len(self._waiting) >= MOST_WAITING or self._closed:
                why = f"{MOST_WAITING} visitors are waiting already" if not self._closed else "The server is ending"
                raise Refused({"": f"{why}; try again later."})
            self._waiting.append(visit)
            self._tell_places()
            self._changed.notify_all()

    def leave(self, visit: Visit) -> None:
        """Ends a visit, wherever it is: nothing more is computed for it."""
        with self._changed:
            visit.stopped = True
            if visit in self._waiting:
                self._waiting.remove(visit)
                self._tell_places()

    def close(self) -> None:
        """Ends every visit, and `answer`."""
        with self._changed:
            self._closed = True
            for visit in [self._writing, *self._waiting]:
                if visit:
                    visit.stopped = True
                    visit.send({"event": "failed", "says": "The server was stopped."})
                    visit.send(None)
            self._waiting.clear()
            self._changed.notify_all()

    def answer(self, events: Callable[[Asked], Events]) -> None:
        """Answers visits one by one until `close`. An error ends the visit alone, which is told so."""
        while visit := self._next():
            try:
                with closing(events(visit.asked)) as answers:
                    for event in answers:
                        if visit.stopped:
                            break
                        visit.send(event)
            except Exception as e:
                visit.send({"event": "failed", "says": self._said(e)})
            visit.send(None)

    def _next(self) -> Visit | None:
        with self._changed:
            self._writing = None
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._writing = self._waiting.popleft()
            self._tell_places()
            return self._writing

    def _tell_places(self) -> None:
        for place, visit in enumerate(self._waiting, 1 if self._writing else 0):
            if place and place != visit.place:
                visit.place = place
                visit.send({"event": "waiting", "before": place})

    @staticmethod
    def _said(e: Exception) -> str:
        """What a visitor is told of an error; the terminal is told all of it."""
        found = ending(e)
        if found and found[1]:
            sys.stderr.write(found[1])
            return found[1].removeprefix("error: ").strip() + "."
        traceback.print_exception(e)
        return "The program failed; its terminal says why."
