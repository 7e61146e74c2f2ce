"""What tinygrad_impl.bench makes of several ranks: one figure from each rank's, and one GPU's figures beside them."""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.cli import InputError, Lost
from data.ranks import Ranks
from tinygrad_impl.bench_peers import end_with_parent, environment

MEMORY = ("allocated_bytes", "held_bytes")


def of_all(figures: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """This rank's figures of some steps, with the seconds of the slowest rank in each step, the mean of the losses, and
    the memory of the rank that took most beside this one's.
    """
    if ranks.size == 1:
        return figures
    slowest = ranks.numbers(*figures["seconds"]).max(axis=0)
    together = figures | {"seconds": slowest.tolist(), "first_loss": ranks.numbers(figures["first_loss"]).mean()}
    for kind in MEMORY:
        if kind in figures:
            together[f"{kind}_largest"] = int(ranks.numbers(figures[kind]).max())
    return together


def summed(ceiling: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """The rates of all ranks' devices together."""
    flops, moved = ranks.numbers(ceiling["flops"], ceiling["bytes"]).sum(axis=0).tolist()
    return ceiling | {"flops": flops, "bytes": moved}


@contextmanager
def told_of_its_end() -> Iterator[None]:
    """Has SIGTERM, which torchrun sends to the other ranks where one is gone, end this one with a sentence."""

    def end(*_: Any) -> None:
        raise Lost("another rank is gone, or somebody has ended this (SIGTERM); see what is said above")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def one_gpu(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """What this program finds without the other ranks, in a process of its own on this rank's GPU."""
    options = ["--preset", args.preset, "--batch-size", args.batch_size, "--seq-len", args.seq_len]
    options += ["--dtype", args.dtype, "--steps", args.steps, "--kernels", args.kernels, "--device", device]
    options += ["--against", ",".join(args.against) or "none"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "one.json")
        command = [sys.executable, "-m", "tinygrad_impl.bench", *map(str, options), "--json", str(file)]
        started = subprocess.run(
            command, stdout=subprocess.DEVNULL, env=environment(), preexec_fn=end_with_parent, check=False
        )
        code = started.returncode
        if code == 2:
            sys.exit(2)  # it has said why
        if code:
            raise InputError(
                f"measuring one process by itself ended with exit code {code}; try `{shlex.join(command)}`"
            )
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found


def of_one(found: dict[str, Any], one: dict[str, Any], size: int) -> dict[str, dict[str, float]]:
    """Of each contender: the rate, as a share of `size` times one GPU's, and the memory of the GPU that takes most, as
    a share of one's by itself.
    """
    shares: dict[str, dict[str, float]] = {}
    for name, row in found["contenders"].items():
        alone = one["contenders"][name]
        shares[name] = {"rate": row["tokens_per_second"] / (size * alone["tokens_per_second"])}
        if "allocated_bytes" in row:
            shares[name]["memory"] = row["allocated_bytes_largest"] / alone["allocated_bytes"]
    return shares
