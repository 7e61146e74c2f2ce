"""Ranks that are threads of one process, of which one at a time runs. For tests in which processes would spend their
time on compiling the same kernels; what torch.distributed does is tested with processes (data/tests/ranks.py).
"""

import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tinygrad import helpers

from data.ranks import Ranks, Work

PATIENCE = 120.0  # seconds that a rank waits for the others


@dataclass
class Table:
    """What the ranks have told each other: by how many times each had told something, and by rank."""

    size: int
    told: defaultdict[int, dict[int, Any]] = field(default_factory=lambda: defaultdict(dict))
    turn: threading.Condition = field(default_factory=threading.Condition)
    failed: bool = False


class LockstepRanks(Ranks):
    """One of the ranks at a table."""

    def __init__(self, table: Table, rank: int):
        self.rank = self.local_rank = rank
        self.size = self.local_size = table.size
        self.table, self.count = table, 0

    def tell(self, value: Any) -> Callable[[], list[Any]]:
        """Puts a value on the table. What it returns waits for, and gives, all ranks' values."""
        self.count += 1
        place = self.table.told[self.count]
        place[self.rank] = value
        self.table.turn.notify_all()

        def all_of_them() -> list[Any]:
            there = self.table.turn.wait_for(lambda: self.table.failed or len(place) == self.size, PATIENCE)
            assert there, "the other ranks have not told theirs"
            assert not self.table.failed, "another rank failed"
            return [place[rank] for rank in range(self.size)]

        return all_of_them

    def gather(self, value: Any) -> list[Any]:
        return self.tell(value)()

    def broadcast(self, value: Any) -> Any:
        return self.tell(value)()[0]

    def numbers(self, *values: float) -> np.ndarray:
        return np.array(self.tell(values)(), np.float64)

    def barrier(self) -> None:
        self.tell(None)()

    def average(self, memory: Any, dtype: str = "float32") -> Work:
        here = np.asarray(memory)
        told = self.tell(rounded(here, dtype))
        return Arriving(lambda: np.copyto(here, mean(told(), dtype)))

    def reduce(self, memory: Any, dtype: str = "float32") -> Work:
        told = self.tell(rounded(memory, dtype))

        def arrive() -> None:
            means = np.split(mean(told(), dtype), self.size)
            memory[:] = 3 * memory  # what other ranks have is undefined here, but 0 where all of them have 0
            self.part(memory)[:] = means[self.rank]

        return Arriving(arrive)

    def collect(self, memory: Any) -> Work:
        told = self.tell(self.part(memory).copy())
        return Arriving(lambda: np.copyto(memory, np.concatenate(told())))

    def gather_parts(self, part: Any, keep: bool = True) -> np.ndarray:
        found = np.concatenate(self.tell(np.array(part))())
        return found if keep else np.empty(0)

    def share(self, memory: Any, source: int) -> Work:
        told = self.tell(np.asarray(memory).copy())
        return Arriving(lambda: np.copyto(np.asarray(memory), told()[source]))

    def part(self, memory: np.ndarray) -> np.ndarray:
        return np.split(memory, self.size)[self.rank]


@dataclass
class Arriving:
    """What has been sent, and is put where it belongs when it is waited for."""

    wait: Callable[[], None]


def rounded(memory: np.ndarray, dtype: str) -> np.ndarray:
    """A copy, rounded to bfloat16 where it is sent as that."""
    if dtype != "bfloat16":
        return memory.copy()
    return torch.tensor(memory).bfloat16().to(torch.tensor(memory).dtype).numpy()


def mean(values: list[np.ndarray], dtype: str) -> np.ndarray:
    total = values[0]
    for value in values[1:]:
        total = rounded(total + value, dtype)
    return rounded(total / len(values), dtype)


def in_lockstep(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(ranks, *args)` returns on each of so many ranks, in their order. Raises what the first one that
    failed has raised.
    """
    table, results, errors = Table(size), dict[int, Any](), list[BaseException]()

    def run(rank: int) -> None:
        with table.turn:
            try:
                results[rank] = function(LockstepRanks(table, rank), *args)
            except BaseException as e:
                errors.append(e)
                table.failed = True
                table.turn.notify_all()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    # tinygrad's cache of compiled kernels, for any thread: one at a time runs
    with suppress(sqlite3.Error, OSError):  # where there can be none
        helpers.db_connection()  # makes the file
        helpers._db_connection = sqlite3.connect(helpers.CACHEDB, 60, 0, "IMMEDIATE", check_same_thread=False)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
