"""What ranks do together before they train: what fails on one of them ends them all, with one sentence.

Work that may take minutes, such as a download, is done by a thread, while all ranks tell each other whether it is
done: none of them waits for another for longer than --timeout allows.
"""

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Generic, TypeVar

from data.cli import REMEDIES, InputError
from data.ranks import Ranks, listed
from data.text.shards import Verification

T = TypeVar("T")

PAUSE = 0.5  # seconds between two questions whether it is done
FIRST_PAUSE = 0.01


class Task(Thread, Generic[T]):
    """A function that is being computed, what it gave, and what it raised."""

    def __init__(self, function: Callable[[], T]):
        super().__init__(daemon=True)  # a program that ends does not wait for it
        self.function = function
        self.value: T | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.function()
        except BaseException as e:
            self.error = e

    def ended(self, seconds: float) -> bool:
        """Whether it is done, after waiting so long for it at most."""
        self.join(seconds)
        return not self.is_alive()


def in_turns(ranks: Ranks, function: Callable[[], T]) -> T:
    """`function()` on every rank: on rank 0, then on one rank of each other host, then on all others. What the first
    of them downloads or prepares, the others find: they never write the same files at once, on a shared disk neither.

    Raises `InputError` on all ranks where one raised something.
    """
    if ranks.size == 1:
        return function()
    turn = 0 if ranks.rank == 0 else 1 if ranks.local_rank == 0 else 2
    values = [_together(ranks, function if turn == whose else None) for whose in range(3)]
    return values[turn]  # type: ignore[return-value]  # it has had its turn


def by_rank_0(ranks: Ranks, function: Callable[[], T]) -> T:
    """Rank 0's `function()`, on all ranks. Raises `InputError` on all of them where it raised something."""
    if ranks.size == 1:
        return function()
    value: T = ranks.broadcast(_together(ranks, function if ranks.rank == 0 else None))
    return value


def on_all(ranks: Ranks, function: Callable[[], object], has_part: bool = True) -> None:
    """Until `function()` has returned on all ranks, or on those that have a part in it. Raises `InputError` on all of
    them where it raised something.
    """
    if ranks.size == 1:
        function()
    else:
        _together(ranks, function if has_part else None)


def _together(ranks: Ranks, function: Callable[[], T] | None) -> T | None:
    """`function()` on the ranks that have one; all return once all are done."""
    task, pause = Task(function) if function else None, FIRST_PAUSE
    while not ranks.numbers(task.ended(pause) if task else True).all():
        pause = min(2 * pause, PAUSE)
    refuse_failed(ranks, task is not None, task.error if task else None)
    return task.value if task else None


@dataclass(frozen=True)
class Report:
    """What a rank tells the others of a piece of work."""

    host: str
    took_part: bool
    error: str | None


def refuse_failed(ranks: Ranks, took_part: bool, error: BaseException | None) -> None:
    """Raises `InputError` on all ranks where one of them has an error, which names the ranks that have it."""
    reports = ranks.gather(Report(socket.gethostname(), took_part, sentence(error) if error else None))
    failed = [rank for rank, report in enumerate(reports) if report.error]
    if not failed:
        return
    if error and not isinstance(error, InputError | OSError):
        raise error  # which is no fault of the input: this rank has more to say than the others
    said = reports[failed[0]].error
    alike = [rank for rank in failed if reports[rank].error == said]
    if len(alike) == sum(report.took_part for report in reports) and alike[0] == 0:
        raise InputError(said) from None  # it is nothing particular to some of them
    hosts = ", ".join(dict.fromkeys(reports[rank].host for rank in alike))
    raise InputError(f"{listed(alike)} on {hosts}: {said}") from None


def sentence(error: BaseException) -> str:
    """What is said of an error: of bad input, and of what the system refuses, with what to do about it."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = f" at {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}; {REMEDIES[error.errno]}"
    return f"{type(error).__name__}: {error}"


def refuse_differences(ranks: Ranks, what: Mapping[str, Any], remedy: str) -> None:
    """Raises `InputError` on all ranks where what a rank has, by name, is not what rank 0 has."""
    if ranks.size == 1:
        return
    (first_host, first), *others = ranks.gather((socket.gethostname(), dict(what)))
    for rank, (host, had) in enumerate(others, 1):
        for name in dict.fromkeys([*first, *had]):
            ours, theirs = (side.get(name, "none") for side in (first, had))
            if ours != theirs:
                raise InputError(
                    f"the ranks differ in {name} (rank 0 on {first_host}: {ours}; rank {rank} on {host}: {theirs}); "
                    f"{remedy}"
                )


class SharedVerification:
    """`Verification` of the data, on one rank of each host."""

    def __init__(self, ranks: Ranks, folder: Path):
        self._ranks = ranks
        self._own = Verification(folder) if ranks.local_rank == 0 else None

    @property
    def failed(self) -> bool:
        """Whether this rank has found damage."""
        return self._own is not None and self._own.failed

    def check(self, timeout: float | None = 0) -> None:
        """As `Verification.check`, of what this rank verifies."""
        if self._own:
            self._own.check(timeout)

    def check_all(self, timeout: float = 0) -> None:
        """As `check`, but raises on all ranks what any of them has found: `InputError`."""
        on_all(self._ranks, lambda: self.check(timeout), has_part=self._own is not None)
