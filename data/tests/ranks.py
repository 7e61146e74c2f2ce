"""Functions of tests that run on several ranks at once, each in a process of its own."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from typing import Any

from data.ranks import joined

# Processes are forked from one that has imported these, which takes seconds; not from the tests', which has threads.
PRELOADED = [
    *("numpy", "torch.distributed", "tinygrad", "data.distributed"),
    *("pytest", "matplotlib.figure", "tokenizers", "tiktoken", "huggingface_hub"),
]
PATIENCE = 120.0  # seconds for all of it, on a busy machine


def in_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(ranks, *args)` returns on each of so many ranks on CPUs, in their order. The function is one of a
    module's, and its results can be pickled. Raises `AssertionError` with the traceback of each rank that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
                    if not replies[rank][0]:  # the others would wait for it
                        said = [f"rank {r}: {text}" for r, (right, text) in replies.items() if not right]
                        raise AssertionError("\n".join(said))
        return [replies[rank][1] for rank in range(size)]


def _run(
    replies: Connection, rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with joined("CPU", PATIENCE) as ranks:
        try:
            replies.send((True, function(ranks, *args)))
        except BaseException:
            replies.send((False, traceback.format_exc()))
