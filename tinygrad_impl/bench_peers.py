"""The processes of PyTorch's that tinygrad_impl.bench measures: each runs torch_ref.bench_worker."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from data.cli import InputError

PEERS = ("torch-eager", "torch-compile")
OURS = ("CC", "ZIG", "DEV", "CUDA_PATH", "NVRTC_PATH")  # variables that tinygrad_impl sets for tinygrad
STORE = ("TORCHELASTIC_USE_AGENT_STORE",)  # says that it is torchrun's own port where ranks meet


def peers(text: str) -> list[str]:
    """An argparse type: names of peers."""
    names = [] if text in ("", "none") else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"there is no {name!r}; name some of {', '.join(PEERS)}, or none")
    return names


class Worker:
    """A process of torch_ref.bench_worker. `ask` raises `InputError` where it cannot do what it is asked."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", errors: IO[str]):
        assert process.stdin
        assert process.stdout
        self.name, self.process, self.errors = name, process, errors
        self.requests, self.replies = process.stdin, process.stdout

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # there will be no answer then
            print(json.dumps({"do": do, **arguments}), file=self.requests, flush=True)
        line = self.replies.readline()
        if not line.endswith("\n"):
            code = self.process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.errors.seek(0)
            last = (self.errors.read().strip().split("\n")[-1] or "without a word")[:200]
            raise InputError(f"the process of {self.name} ended with {how} ({last}); leave it out of --against")
        reply = json.loads(line)
        if error := reply.get("error"):
            less = "use a smaller --batch-size, or " if error == "out of memory" else ""
            raise InputError(f"{self.name} cannot be measured here ({error}); {less}leave it out of --against")
        return reply

    def run(self, steps: int) -> dict[str, Any]:
        return self.ask("run", steps=steps)


def environment(without: Sequence[str]) -> dict[str, str]:
    """Of a process that is to find this project, and nothing that tinygrad_impl has set for tinygrad."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    kept = {key: value for key, value in os.environ.items() if key not in (*OURS, *without)}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextmanager
def worker(name: str, port: int | None = None) -> Iterator[Worker]:
    """With a `port` it can train with the other ranks' workers, which meet there, on rank 0's host."""
    meeting = {} if port is None else {"MASTER_PORT": str(port)}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch_ref.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(without=STORE) | meeting,
        )
        try:
            yield Worker(name, process, errors)
        finally:
            process.kill()  # whatever it is at: it has nothing to save
            process.communicate()


def free_port() -> int:
    """A port of this host that nothing uses."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
