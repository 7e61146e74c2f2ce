"""What a rank does about others that are gone: a thread that looks on while the rank waits for them.

A rank that waits for others sits in a call of NCCL's or gloo's, where no exception and no signal handler of Python's
reaches it. So a thread of each rank tells the others, through the store that all ranks share, that it lives. It knows
how long its own rank has been waiting; after a time limit, or when the job is asked to end and somebody no longer
answers, it says which rank is missing, for all of them, and ends the process.
"""

import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from data.cli import counted
from data.ranks import Place

BEAT = 0.5  # seconds between two signs of life
DOUBT = 3.0  # seconds without one, after which a rank is gone or stopped
PATIENCE = 10.0  # seconds that ranks have to come out of waiting when the job is asked to end
WRITING = 30.0  # seconds that threads have to finish the files that they write
SAVING = "saving"  # the name of threads that write files
DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl


class Watch:
    """The thread of one rank. `store` is a connection of its own to what all ranks share (`set`, `get`, `check` and
    `compare_set`), and `has_store` tells whether this process keeps that; `since` tells since when (monotonic seconds)
    the rank has been waiting for others, None: it has not; `calls` how many times it has.
    """

    def __init__(
        self,
        place: Place,
        store: Any,
        has_store: bool,
        timeout: float,
        since: Callable[[], float | None],
        calls: Callable[[], int],
    ):
        self.has_store = has_store
        self.place, self.store, self.timeout, self.since, self.calls = place, store, timeout, since, calls
        self.parent = os.getppid()
        self.of_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if self.of_torchrun and sys.platform == "linux":  # wakes a rank that is stopped when torchrun is killed
            ctypes.CDLL(None).prctl(DEATH, signal.SIGCONT)
        self.signals, written = socket.socketpair()
        self.signals.setblocking(False)
        written.setblocking(False)
        self._written = written
        self._before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        self._leaving = threading.Event()
        self._stopped = threading.Event()
        self._claimed = threading.Lock()  # for good, by the first thread of this process that claims
        self._beats = 0
        self._lost: list[int] = []  # the ranks that gave no sign of life
        self.resuming = ""  # the command that goes on with what is saved, once there is something
        self.beat()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def start(self) -> None:
        self.thread.start()

    def leave(self) -> None:
        """From here on ranks may go, with the store."""
        self._leaving.set()

    def stop(self) -> None:
        self._leaving.set()
        self._stopped.set()
        self.thread.join()
        signal.set_wakeup_fd(self._before)

    def beat(self) -> None:
        self._beats += 1
        self.store.set(f"beat/{self.place.rank}", f"{self._beats} {self.calls()}")

    def _run(self) -> None:
        asked: float | None = None  # since when to end
        told: float | None = None  # since when a rank has told why the job ends
        while not self._stopped.is_set():
            if select.select([self.signals], [], [], BEAT)[0]:
                numbers = self.signals.recv(4096)
                if {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} & set(numbers):
                    asked = asked or time.monotonic()
            if self.of_torchrun and os.getppid() != self.parent:
                self.end(f"torchrun, which started this job (process {self.parent}), is gone; {self.remedy}")
            try:
                self.beat()
                told = told or (time.monotonic() if self.store.check(["told"]) else None)
            except RuntimeError:
                if not self._leaving.is_set():
                    self.end("" if told else self.gone)
                continue
            try:
                self._judge(asked, told)
            except RuntimeError:  # the store went away meanwhile
                if not self._leaving.is_set():
                    self.end(self.gone)

    def _judge(self, asked: float | None, told: float | None) -> None:
        """Ends the process where others are gone. `asked` and `told` are since when the job is to end."""
        now, since = time.monotonic(), self.since()
        patience = DOUBT if self.place.rank else PATIENCE  # rank 0 may have files to write
        if told and not self._leaving.is_set() and now - told > patience:
            self.end("")
        if since is None:
            return
        if now - since > self.timeout:
            said = self.missing() or self.behind()
        elif asked and now - asked > PATIENCE and now - since > DOUBT:
            said = self.missing()
        else:
            return
        # to find that out took seconds, in which the others may have come, and even have ended
        if said and self.since() == since and not (said == self.gone and self._leaving.is_set()):
            self.end(said)

    @property
    def remedy(self) -> str:
        """What to do when a rank is lost."""
        return f"what is saved is not lost: go on with `{self.resuming}`" if self.resuming else "start the job again"

    @property
    def gone(self) -> str:
        """That the store is."""
        return f"the ranks have lost where they meet: rank 0 or its torchrun was killed; {self.remedy}"

    def missing(self) -> str:
        """Which ranks give no sign of life, in a sentence; nothing where all do. Takes `DOUBT` seconds."""
        self._lost = []
        try:
            before = self._all("beat")
            for _ in range(2):
                time.sleep(DOUBT / 2)
                self.beat()
            after = self._all("beat")
        except RuntimeError:
            return self.gone
        self._lost = [rank for rank, beat in enumerate(after) if beat == before[rank] and rank != self.place.rank]
        if not self._lost:
            return ""
        were = "was" if len(self._lost) == 1 else "were"
        return f"{self._named(self._lost)} {were} killed (dmesg tells if memory ran out) or stopped; {self.remedy}"

    def behind(self) -> str:
        """Which ranks live, but have not come to where the others wait for them."""
        calls = [int(beat.split()[1]) for beat in self._all("beat")]
        last = [rank for rank, count in enumerate(calls) if count == min(calls)]
        waited = f"within the --timeout of {counted(self.timeout, 'second')}"
        if len(last) == len(calls):
            return f"the ranks wait for each other's data, which did not come {waited}; mend the network; {self.remedy}"
        late = f"{self._named(last)} did not come to where the others wait {waited}"
        return f"{late}; {self.remedy}, with a longer --timeout if it is only slow"

    def _all(self, what: str) -> list[str]:
        return [self.store.get(f"{what}/{rank}").decode() for rank in range(self.place.size)]

    def _named(self, ranks: Iterable[int]) -> str:
        who = self._all("who")
        return " and ".join(f"rank {rank} ({who[rank]})" for rank in ranks)

    def claim(self) -> bool:
        """Whether this rank is the one that tells why the job ends: the first that asks. Where the store is gone, with
        rank 0 or its torchrun, rank 1 tells.
        """
        if not self._claimed.acquire(blocking=False):
            return False
        try:
            mine = str(self.place.rank)
            return bool(self.store.compare_set("told", "", mine).decode() == mine)
        except RuntimeError:
            return self.place.rank == 1

    def told(self) -> bool:
        """Whether a rank has told why the job ends, as far as this one can know."""
        try:
            return bool(self.store.check(["told"]))
        except RuntimeError:
            return False

    def end(self, sentence: str) -> NoReturn:
        """Ends the process, whatever its main thread waits for; threads that write files finish first."""
        if sentence and self.claim():
            sys.stderr.write(f"error: {sentence}\n")
            sys.stderr.flush()
        self.kill_lost()
        until = time.monotonic() + WRITING
        # not all threads: those of pools that compile never end
        for thread in threading.enumerate():
            if thread.name == SAVING:
                thread.join(max(0.0, until - time.monotonic()))
        self.linger()
        os._exit(1)

    def kill_lost(self) -> None:
        """Kills the ranks that `missing` has found and this rank's own launcher has started. One that is stopped heeds
        no request to end, and torchrun would wait half a minute for it.
        """
        for rank in self._lost:
            with suppress(OSError, RuntimeError):
                _, pid, _, host = self.store.get(f"who/{rank}").decode().split(" ", 3)
                if host == socket.gethostname() and parent_of(int(pid)) == self.parent:
                    os.kill(int(pid), signal.SIGKILL)

    def linger(self) -> None:
        """Where the store is this process's, until the others have seen why the job ends."""
        if self.has_store:
            time.sleep(DOUBT)


def parent_of(pid: int) -> int:
    """The process that has started `pid`. Raises `OSError` where there is none, and where there is no /proc."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
