"""Functions of tests that run on several ranks at once, each in a process of its own."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import data.ranks
import data.watch
from data.cli import run
from data.ranks import joined, quieten_pytorch

# Processes are forked from one that has imported these, which takes seconds; not from the tests', which has threads.
# PyTorch imports its _dynamo when the first optimizer is made.
PRELOADED = [
    *("numpy", "torch.distributed", "torch._dynamo", "tinygrad", "data.distributed", "data.runs.loop"),
    *("pytest", "matplotlib.figure", "tokenizers"),
]
PATIENCE = 600.0  # seconds for all of it, on a busy machine


def forkserver() -> Any:
    quieten_pytorch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def in_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(ranks, *args)` returns on each of so many ranks on CPUs, in their order. The function is one of a
    module's, and its results can be pickled. Raises `AssertionError` with the traceback of each rank that failed.
    """
    context, port = forkserver(), free_port()
    with ExitStack() as stack:
        pipes, processes = list[Connection](), list[Any]()
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(theirs, rank, size, port, function, args), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.kill)
            pipes.append(ours)
            processes.append(process)
        replies: dict[int, tuple[bool, Any]] = {}
        while len(replies) < size:
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in replies], PATIENCE)
            assert ready, f"ranks {sorted(set(range(size)) - replies.keys())} did not end within {PATIENCE} s"
            for rank, pipe in enumerate(pipes):
                if pipe in ready:
                    try:
                        replies[rank] = pipe.recv()
                    except EOFError:
                        replies[rank] = False, f"ended with exit code {processes[rank].exitcode}"
            if not all(right for right, _ in replies.values()):  # the others wait for it, or fail because of it
                for rank, pipe in enumerate(pipes):
                    if rank not in replies and pipe.poll(5):
                        with suppress(EOFError):
                            replies[rank] = pipe.recv()
                said = [f"rank {r}: {text}" for r, (right, text) in sorted(replies.items()) if not right]
                raise AssertionError("\n".join(said))
        return [replies[rank][1] for rank in range(size)]


def _run(
    replies: Connection, rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= environment(rank, size, port)
    with joined("CPU", PATIENCE) as ranks:
        try:
            replies.send((True, function(ranks, *args)))
        except BaseException:
            replies.send((False, traceback.format_exc()))


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """That of a rank which torchrun has started."""
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


@dataclass(frozen=True)
class Ended:
    """How the process of a rank ended: its exit code (below 0: the signal that killed it; None: it is stopped, and has
    not), and what it wrote.
    """

    code: int | None
    err: str


def ended(
    folder: Path,
    environments: Sequence[Mapping[str, str]],
    function: Callable[..., Any],
    timeout: float = PATIENCE,
    terminated: int | None = None,
) -> list[Ended]:
    """How the processes end that are the ranks of these environments, whose commands are `function(ranks)`. They have a
    tenth of the patience of data/watch.py. `terminated` is one that gets a SIGTERM when the others have ended.
    """
    context = forkserver()
    files = [folder / f"{number}.err" for number in range(len(environments))]
    processes = [
        context.Process(target=_command, args=(file, dict(environment), function, timeout), daemon=True)
        for file, environment in zip(files, environments, strict=True)
    ]
    for process in processes:
        process.start()
    if terminated is not None:
        for number, process in enumerate(processes):
            if number != terminated:
                process.join(PATIENCE)
        processes[terminated].terminate()
    until = time.monotonic() + 20
    while any(process.exitcode is None and not stopped(process.pid) for process in processes):
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    left = [stopped(process.pid) for process in processes]
    for process in processes:
        process.kill()
        process.join()
    codes = [None if is_left else process.exitcode for process, is_left in zip(processes, left, strict=True)]
    return [Ended(code, file.read_text()) for code, file in zip(codes, files, strict=True)]


def stopped(pid: int) -> bool:
    """Whether a SIGSTOP has stopped the process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except FileNotFoundError:
        return False


def _command(file: Path, environment: dict[str, str], function: Callable[..., Any], timeout: float) -> None:
    os.environ |= environment
    for name in ("BEAT", "DOUBT", "PATIENCE"):
        setattr(data.watch, name, getattr(data.watch, name) / 10)
    data.ranks.TURN = data.watch.DOUBT
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)

    def main() -> None:
        with joined("CPU", timeout) as ranks:
            function(ranks)

    run(main)
