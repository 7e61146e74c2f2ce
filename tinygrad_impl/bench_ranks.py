"""What tinygrad_impl.bench makes of several ranks' figures, and what it keeps of them however it ends."""

import argparse
import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from data.cli import Lost
from data.files import atomic_write
from data.ranks import Ranks

MEMORY = ("allocated_bytes", "held_bytes")
GRACE = 3.0  # seconds in which the other ranks still compute, so that rank 0 comes out of its step and can tell


class Contender(Protocol):
    """A model that can be trained: tinygrad_impl.bench_port.Port, or the process of one."""

    def ready(self) -> object: ...
    def run(self, steps: int) -> dict[str, Any]: ...


def turn(contender: Contender, steps: int, ranks: Ranks) -> dict[str, Any]:
    """So many steps, which all ranks begin at once, after one that does not count: it comes after another's turn.

    `wall_seconds` pass until the last rank is through. They are less than the sum of each step's seconds on the rank
    that took longest in it: who is late in one step may be early in the next.
    """
    contender.ready()
    ranks.barrier()
    figures = of_all(contender.run(steps) | {"steps": steps}, ranks)
    figures["wall_seconds"] = float(ranks.numbers(figures["wall_seconds"]).max())
    return figures


def of_all(figures: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """This rank's figures of some steps, with the seconds of each rank's steps by its own clock, step by step, the mean
    of the losses, and the memory of the rank that took most beside this one's.
    """
    if ranks.size == 1:
        return figures
    seconds = ranks.numbers(*figures["seconds"]).T.reshape(-1)  # those of the first step of all ranks come first
    together = figures | {"seconds": seconds.tolist(), "first_loss": ranks.numbers(figures["first_loss"]).mean()}
    for kind in MEMORY:
        if kind in figures:
            together[f"{kind}_largest"] = int(ranks.numbers(figures[kind]).max())
    return together


def summed(ceiling: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """The rates of all ranks' devices together."""
    flops, moved = ranks.numbers(ceiling["flops"], ceiling["bytes"]).sum(axis=0).tolist()
    return ceiling | {"flops": flops, "bytes": moved}


def of_this_host(file: str | None, ranks: Ranks) -> str:
    """The file of the rank of this host that has one."""
    files = {host: path for host, path in ranks.gather((socket.gethostname(), file)) if path}
    return str(files[socket.gethostname()])


class Kept:
    """What is known so far. Each time there is more, it is written to --json, as not finished until the end."""

    def __init__(self, args: argparse.Namespace, said: dict[str, Any]):
        self.file, self.found = args.json, said | {"finished": False}

    def add(self, **more: Any) -> None:
        """Rates of all, and what they are of one GPU's, are worked out anew."""
        self.found = self.found | more
        if "one" in self.found:
            self.found = self.found | {"scaling": scaling(self.found)}
        if self.file:
            with atomic_write(self.file, "w") as f:
                f.write(json.dumps(self.found, indent=1) + "\n")


def scaling(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each contender, as far as it is known. The rates of all GPUs as shares: `rate`, of `ranks` times one GPU's by
    itself, which falls short of 1 by what communication costs and by what is lost as all are busy; `at_once`, the same
    of GPUs that train each by itself at the same time, which falls short by the latter; `of_at_once`, the one of the
    other, by the former. And `memory`: of the GPU that takes most, of one's by itself.
    """
    shares: dict[str, dict[str, float]] = {}
    for name, alone in found["one"].get("contenders", {}).items():
        share, size = shares.setdefault(name, {}), found["ranks"]
        row, apart = found.get("contenders", {}).get(name), found.get("at_once", {}).get("contenders", {}).get(name)
        if row:
            share["rate"] = row["tokens_per_second"] / (size * alone["tokens_per_second"])
        if apart:
            share["at_once"] = apart["tokens_per_second"] / (size * alone["tokens_per_second"])
        if row and apart:
            share["of_at_once"] = row["tokens_per_second"] / apart["tokens_per_second"]
        if row and "allocated_bytes" in row:
            share["memory"] = row["allocated_bytes_largest"] / alone["allocated_bytes"]
    return shares


@contextmanager
def told_of_its_end(rank: int = 0) -> Iterator[None]:
    """Has SIGTERM end this process with a sentence; torchrun sends it to all ranks where it is itself asked to end, or
    where one of them is gone. Other ranks than the first end later, so that it can come out of a step with them.
    """

    def end(*_: Any) -> None:
        raise Lost(
            "cut off by SIGTERM, which is sent to a rank also where another one is gone; "
            "whatever was measured by then is shown above"
        )

    def end_later(*_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    handlers = {signal.SIGTERM: end_later if rank else end, signal.SIGALRM: end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
