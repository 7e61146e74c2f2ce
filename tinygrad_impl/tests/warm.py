"""Training programs without the seconds that a start takes to import: forked from a process that has imported them.

They are real processes all the same, and torchrun's launcher and its ranks are parent and children, as ever.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn

from data.cli import run

IMPORTED = {  # by package; torch._dynamo is what PyTorch imports for the first optimizer
    "torch_ref": ["torch_ref.train", "torch._dynamo", "data.distributed", "torch.distributed.launcher.api"],
    "tinygrad_impl": ["tinygrad_impl.train", "data.distributed", "torch.distributed.launcher.api"],
}
BY_ALL = ["data.testing", "matplotlib.figure", "tokenizers", "tqdm"]


@dataclass(frozen=True)
class Program:
    """A program that runs, or has; what it says of errors goes to the file `said`."""

    process: Any
    said: Path

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def poll(self) -> int | None:
        """Its exit code, or None while it runs; below 0: the signal that has killed it."""
        code: int | None = self.process.exitcode
        return code

    def wait(self, timeout: float) -> None:
        """Until it has ended. Raises `TimeoutError` where it has not in so many seconds."""
        self.process.join(timeout)
        if self.poll() is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout:g} s")

    def errors(self) -> str:
        return self.said.read_text(errors="replace")


def start(package: str, words: list[str], folder: Path, said: Path, cold: bool) -> Program:
    """`python -m PACKAGE.train WORDS` in a folder; `cold`: in a new interpreter, as a user starts it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED[package], *BY_ALL])
    process = context.Process(target=_train, args=(f"{package}.train", words, folder, said, cold))
    process.start()
    return Program(process, said)


def _train(module: str, words: list[str], folder: Path, said: Path, cold: bool) -> None:
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if cold:
        os.execv(sys.executable, [sys.executable, "-m", module, *words])
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    setattr(subprocess_handler, "Popen", Rank)  # noqa: B010  # what torchrun's launcher starts ranks with
    _run(module, words)


def _run(module: str, words: list[str]) -> NoReturn:
    sys.argv = [module, *words]
    main: Callable[[], None] = importlib.import_module(module).main
    run(main)


class Rank:
    """A rank that torchrun's launcher forks, where it would start `python -m MODULE WORDS`: as much of
    `subprocess.Popen` as it uses.
    """

    def __init__(self, args: tuple[str, ...], env: dict[str, str], **_: Any):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code: Any = 1
        try:
            os.setsid()
            os.closerange(3, 4096)  # the launcher's sockets, which a new program would not have either,
            resource_tracker._resource_tracker = resource_tracker.ResourceTracker()  # nor the pipe to this
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(env)
            _python, _m, module, *words = args
            _run(module, words)
        except SystemExit as e:
            code = e.code
        finally:
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.02)
        return code
