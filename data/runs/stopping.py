"""Requests to stop: by Ctrl-C, by `kill`, by a queue whose time is up, or by a terminal that goes away."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Event, Thread
from types import FrameType

from data.cli import Stopped, leave_lost_terminal
from data.interrupt import leave
from data.launch import LAST, UNTRAINED, leave_last_words
from data.ranks import Ranks, started_with_others

REPEATED = 2.0  # seconds within which a signal to several ranks is taken for the same request
STOPPING = "stopping after this step"
AGAIN = f"{STOPPING}; once more to stop at once"


class StopRequests:
    """The signals with which this rank was asked to stop, and what is said of them, once, by rank 0.

    Several ranks are also sent SIGTERM by torchrun when one of them has failed: then there is nothing to say, and no
    step that could end. So it is said when they have `agreed`, or else once all have given a sign of life.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.several = ranks.size > 1 or started_with_others()
        self.caught: list[int] = []
        self.asked, self.told = Event(), Event()
        if self.several and ranks.rank == 0:
            Thread(target=self._tell_later, daemon=True, name="stop requests").start()

    def request(self, number: int) -> None:
        """Of a signal's handler."""
        self.caught.append(number)
        self.asked.set()
        if not self.several:
            self._tell(AGAIN)

    def agreed(self) -> None:
        """All ranks are going to stop after the step that has just ended."""
        if self.ranks.rank == 0:
            self._tell(STOPPING)

    def leave(self) -> None:
        self.told.set()
        self.asked.set()  # which ends the thread

    def _tell_later(self) -> None:
        self.asked.wait()
        again = time.monotonic() + REPEATED  # from when on another signal is another request
        if not self.told.is_set() and self.ranks.all_live() and not self.told.wait(max(0.0, again - time.monotonic())):
            self._tell(AGAIN)

    def _tell(self, sentence: str) -> None:
        if not self.told.is_set():
            self.told.set()
            os.write(2, f"\n{sentence}\n".encode())  # print is not for signal handlers


@contextmanager
def stop_requests(ranks: Ranks) -> Iterator[StopRequests]:
    """SIGINT, SIGTERM and SIGHUP (the terminal is gone), collected while this lasts instead of acted upon.

    A second SIGINT or SIGTERM acts. Of several ranks it does only after a while, because one request may reach a rank
    twice: from a queue that signals all processes, and from torchrun, which passes on what it was sent. A second SIGHUP
    does not act: the shell and the kernel may each send one. A SIGHUP that is ignored from the beginning, as with
    nohup, stays ignored.
    """
    requests = StopRequests(ranks)
    patience, begin = (REPEATED if requests.several else 0.0), 0.0

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal begin
        if requests.caught and time.monotonic() < begin + patience:
            return
        again = bool(requests.caught)
        begin = time.monotonic()
        if again or not patience:
            for other, handler in previous.items():
                signal.signal(other, signal.SIG_IGN if other == signal.SIGHUP else handler)
        if again:
            signal.raise_signal(number)
            return
        leave_lost_terminal()
        requests.request(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        requests.leave()


class BeforeTraining:
    """SIGINT, SIGTERM and SIGHUP before the first step, in a process that is alone: they end it by `Stopped`, once what
    it computes lets it, and that is said at once.

    `said` is what is said in the end; of ranks that --gpus has started, by their launcher. Once training begins,
    `over`, they do what they did.
    """

    def __init__(self) -> None:
        self.said = UNTRAINED
        self._held = ExitStack()
        self._asked: list[int] = []  # signals

    @contextmanager
    def stops(self, ranks: Ranks) -> Iterator[None]:
        """While this lasts. Other ranks' launcher ends them, and says why."""
        try:
            with self._held:
                if ranks.size == 1 and not started_with_others():
                    self._held.enter_context(self._caught())
                yield
                self._obey()
        except KeyboardInterrupt:
            if self.said and ranks.rank == 0 and LAST not in os.environ:
                print(self.said, file=sys.stderr)
            raise

    def say(self, sentence: str) -> None:
        self.said = sentence
        leave_last_words(sentence)

    def over(self) -> None:
        self._obey()
        self.say("")
        self._held.close()

    def _obey(self) -> None:
        """Python discards the `Stopped` of a handler that runs inside a `__del__`, as tinygrad's nodes have one."""
        if self._asked:
            raise Stopped(self._asked[0])

    @contextmanager
    def _caught(self) -> Iterator[None]:
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        self._asked.clear()
        reading, writing = socket.socketpair()
        writing.setblocking(False)

        def stop(number: int, frame: FrameType | None) -> None:
            for other, handler in previous.items():  # a second one acts
                signal.signal(other, handler)
            leave_lost_terminal()
            self._asked.append(number)
            raise Stopped(number)

        def tell() -> None:
            """In a thread: a handler has to wait for what is being computed. A second request does not."""
            caught = {*reading.recv(64)} & {*numbers}
            if caught and self.said:
                with suppress(OSError):
                    os.write(2, b"\nstopping\n")
            while caught:
                caught = {*reading.recv(64)} & {*numbers}
                if again := caught & {signal.SIGINT, signal.SIGTERM}:
                    leave(min(again), None)

        previous = {number: signal.signal(number, stop) for number in numbers}
        before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        teller = Thread(target=tell, daemon=True, name="stopping")
        teller.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in previous.items():
                signal.signal(number, handler)
            writing.close()  # after all that was written, the thread reads nothing, which ends it
            teller.join()
            reading.close()
