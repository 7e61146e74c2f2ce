"""The processes that tinygrad_impl.bench measures: PyTorch's run torch_ref.bench_worker; tinygrad's, where it is not to
be in the process of the bench, tinygrad_impl.bench_port, which understands the same.
"""

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from data.cli import InputError
from data.ranks import Ranks, meeting_point

PEERS = ("torch-eager", "torch-compile")
OURS = ("CC", "ZIG", "DEV", "CUDA_PATH", "NVRTC_PATH")  # variables that tinygrad_impl sets for tinygrad
STARTED = (  # what makes a process a rank, by torchrun or srun, and says that ranks meet at torchrun's own port
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
    "TORCHELASTIC_USE_AGENT_STORE",
)
LIBC = ctypes.CDLL(None)
DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl


def end_with_parent() -> None:
    """In a new process: it is killed when this one ends, however that ends, and whatever the other is waiting for."""
    if sys.platform == "linux":
        LIBC.prctl(DEATH, signal.SIGKILL)


def peers(text: str) -> list[str]:
    """An argparse type: names of peers."""
    names = [] if text in ("", "none") else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"there is no {name!r}; name some of {', '.join(PEERS)}, or none")
    return names


class Worker:
    """A process that answers as torch_ref.bench_worker does. `ask` raises `InputError` where it cannot do what
    it is asked.
    """

    def __init__(self, name: str, process: "subprocess.Popen[str]", errors: IO[str]):
        assert process.stdin
        assert process.stdout
        self.name, self.process, self.errors = name, process, errors
        self.requests, self.replies = process.stdin, process.stdout
        self.remedy = "leave it out of --against" if name in PEERS else "see whether it trains: tinygrad_impl.train"

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # there will be no answer then
            print(json.dumps({"do": do, **arguments}), file=self.requests, flush=True)
        line = self.replies.readline()
        if not line.endswith("\n"):
            code = self.process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.errors.seek(0)
            last = (self.errors.read().strip().split("\n")[-1] or "without a word")[:200]
            raise InputError(f"the process of {self.name} ended with {how} ({last}); {self.remedy}")
        reply = json.loads(line)
        if error := reply.get("error"):
            less = "use a smaller --batch-size, or " if error == "out of memory" else ""
            raise InputError(f"{self.name} cannot be measured here ({error}); {less}{self.remedy}")
        return reply

    def ready(self) -> None:
        self.ask("ready")

    def run(self, steps: int) -> dict[str, Any]:
        return self.ask("run", steps=steps)


def environment() -> dict[str, str]:
    """Of a process that finds this project, but not what tinygrad_impl set for tinygrad, nor what makes a rank."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    kept = {key: value for key, value in os.environ.items() if key not in (*OURS, *STARTED)}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextmanager
def worker(name: str, meeting: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """By a `meeting` it can train with the workers of the other ranks."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch_ref.bench_worker" if name.startswith("torch") else "tinygrad_impl.bench_port",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment() | dict(meeting or {}),
            preexec_fn=end_with_parent,
            start_new_session=True,  # torchrun asks a rank to end by its group, and the rank then ends this
        )
        try:
            yield Worker(name, process, errors)
        finally:
            process.kill()  # whatever it is at: it has nothing to save
            process.communicate()


def meeting(ranks: Ranks) -> dict[str, str]:
    """The variables by which a process is the rank that this one is, among processes that meet at a port of their own
    on rank 0's host; none where this one is alone.
    """
    if ranks.size == 1:
        return {}
    with socket.socket() as free:
        free.bind(("", 0))
        port = ranks.broadcast(free.getsockname()[1])
    found: dict[str, Any] = {"RANK": ranks.rank, "WORLD_SIZE": ranks.size}
    found |= {"LOCAL_RANK": ranks.local_rank, "LOCAL_WORLD_SIZE": ranks.local_size}
    found |= {"MASTER_ADDR": meeting_point()[0], "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()}
