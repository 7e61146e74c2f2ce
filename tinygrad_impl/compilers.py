"""The processes that compile kernels, tinygrad's own and Triton's, and the cache of what tinygrad compiles.

As internals.py, this is for tinygrad 0.14.0, and tests/test_internals.py has its tests.
"""

import importlib.util
import multiprocessing
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import tinygrad.device
from tinygrad import helpers
from tinygrad.engine import worker
from tinygrad.helpers import PARALLEL

from data.cli import InputError

PATIENCE = 600.0  # seconds for a kernel, with those that are compiled before it


def shield_compilers() -> None:
    """Keeps the processes that compile for tinygrad from dying of a SIGTERM to all processes, as `timeout` sends it.

    They would die while they hold the lock of the queue that they wait for, and the program would never end.
    """
    worker._init_worker = begin_compiler
    worker._WorkerProcess.terminate = worker._WorkerProcess.kill  # what the pool calls in the end


def begin_compiler(begin: Callable[[], None] = worker._init_worker) -> None:
    """What such a process does first."""
    begin()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=fall_silent_with_parent, daemon=True, name="fall silent").start()
    KernelCache(warn=False).install()
    if os.environ.get("DEV") == "CUDA" and importlib.util.find_spec("triton"):
        with suppress(ImportError):  # raised again where they are used; here it would end one process after another
            for module in ("tinygrad_impl.kernels.fused", "triton.experimental.gluon._runtime"):
                importlib.import_module(module)  # while there is nothing to compile yet


def fall_silent_with_parent() -> None:
    """Has this process say nothing more once the one that started it is gone, however that ended. It ends after the
    kernel that it compiles, with a traceback, as nobody reads what it has.

    Were it killed, a compiler that it has started would complain; and the signal of Linux's PR_SET_PDEATHSIG would come
    too soon to those that a thread of the pool's has started, which ends before the pool does.
    """
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


@contextmanager
def none_begins() -> Iterator[None]:
    """While this lasts no process that compiles is started. To start one, tinygrad takes `__file__` from `__main__`;
    PyTorch cannot be imported by another thread meanwhile, as it asks where the functions that it registers are from.
    """
    with worker._spawn_lock:
        yield


def start_compilers(most: int) -> None:
    """Starts the processes that compile, `most` at most, before they are needed: the first kernels would wait for them
    for a second or two.
    """
    PARALLEL.value = min(PARALLEL.value, most)
    worker.get_worker_pool()


def in_a_compiler(function: Callable[..., Any], *args: Any) -> Any:
    """Calls function(*args) in one of the processes that compile (in this one, where there are none), and waits for
    what it returns. Function, arguments, result and exceptions have to be picklable. Raises `InputError` where it does
    not return within PATIENCE seconds: of a process that was killed, for memory for instance, the pool says nothing.
    """
    pool = worker.get_worker_pool()
    if pool is None:
        return function(*args)
    try:
        return pool.apply_async(function, args).get(PATIENCE)
    except multiprocessing.TimeoutError:
        raise InputError(
            f"a kernel was not compiled within {PATIENCE:.0f} s: the process that compiles it hangs or was killed, for "
            "memory perhaps; with PARALLEL=0 in the environment this process compiles all itself"
        ) from None


class KernelCache:
    """tinygrad's cache of compiled kernels, on disk, which it would stop for where the cache cannot be used: a home
    folder that is read-only or missing, a full disk, a damaged file. Here it goes on without, and says so once.
    """

    def __init__(self, warn: bool = True):
        self.warn, self.reads, self.writes = warn, True, True

    def install(self) -> None:
        """Has tinygrad's compilers use this."""
        tinygrad.device.diskcache_get = self.get
        tinygrad.device.diskcache_put = self.put

    def get(self, table: str, key: Any) -> Any:
        """What is kept under the key; None where there is nothing, or where it cannot be read."""
        if self.reads:
            try:
                return helpers.diskcache_get(table, key)
            except Exception as e:  # sqlite3's, the system's, and what unpickling damaged bytes raises
                self._give_up(e)
                self.reads = False
        return None

    def put(self, table: str, key: Any, value: Any, prepickled: bool = False) -> Any:
        """Keeps a value under the key, if that can be. Returns the value."""
        if self.writes:
            try:
                helpers.diskcache_put(table, key, value, prepickled)
            except (sqlite3.Error, OSError) as e:
                self._give_up(e)
        return value

    def _give_up(self, e: Exception) -> None:
        self.writes = False  # what it has can still be read
        if self.warn:
            self.warn = False
            print(
                f"note: {helpers.CACHEDB}, tinygrad's cache of kernels, cannot be used ({e}); going on without it, so "
                "every run compiles anew. Delete the file, or set CACHEDB to one that can be written",
                file=sys.stderr,
            )
