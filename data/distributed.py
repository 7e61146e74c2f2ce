"""Ranks on torch.distributed: NCCL between GPUs, gloo between CPUs. Nothing else in the project touches it."""

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from data.cli import InputError, Lost, counted, ending
from data.ranks import Place, Ranks, Work, attempt, listed
from data.watch import BEAT, Watch

# PyTorch 2.13 has other names for these, and warns of those before
scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

LATER = 120.0  # seconds after ours that the time limits of NCCL and gloo come, which name no rank


class Job(Ranks):
    """The ranks of a job that torchrun or srun have started, on `device`: CUDA (the one GPU that each sees) or CPU.

    They meet at `point` (host, port). Raises `InputError` where that fails, or not all are there in `timeout` seconds.
    """

    def __init__(self, place: Place, device: str, timeout: float, point: tuple[str, int]):
        self.rank, self.size = place.rank, place.size
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self.device = torch.device("cuda", 0) if device == "CUDA" else torch.device("cpu")
        if device == "CUDA":
            torch.cuda.set_device(self.device)
        self._calls = 0  # how many times something was asked of all ranks
        self._since: float | None = None  # when this thread began to wait for the others
        self._sent = deque[tuple[float, Any]]()  # what is under way, and since when
        has_store = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._store, self._timeout = connected(point, has_store, timeout), timeout
        own = connected(point, False, timeout)
        self._watch = Watch(place, own, has_store, timeout, self._waiting_since, lambda: self._calls)
        try:
            meet(place, self._store, timeout)
        except InputError:
            self._watch.linger()
            raise
        except RuntimeError:
            raise InputError("rank 0 or its torchrun ended before all ranks were there; see what it said") from None
        self._watch.start()

    def join(self) -> None:
        """Connects the ranks; nothing else can be asked of them before."""
        on_gpu = self.device.type == "cuda"
        timeout = timedelta(seconds=self._timeout + LATER)
        options = None
        if on_gpu:  # what is sent goes first where kernels wait for a place on the GPU
            options = dist.ProcessGroupNCCL.Options()
            options.is_high_priority_stream = True
            options._timeout = timeout  # another one than below would be warned of
        with self._together():
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                device_id=self.device if on_gpu else None,
                pg_options=options,
                timeout=timeout,
            )

    def leave(self) -> None:
        """Once all ranks are at their end."""
        self._watch.leave()
        self.barrier()
        self._watch.stop()
        dist.destroy_process_group()

    def fail(self, e: BaseException) -> NoReturn:
        """Ends this process for an error. One rank tells it: the first that had one, since the others' may follow from
        that.
        """
        self._watch.leave()
        where = f" on rank {self.rank} ({who()})"
        code, said = ending(e, where) or (1, "".join(traceback.format_exception(e)))
        if self._watch.claim():
            sys.stderr.write(said)
        else:
            time.sleep(BEAT)  # whatever started the ranks ends them all when the first is gone
        self._watch.linger()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without waiting for NCCL, which waits for the others

    @contextmanager
    def _together(self) -> Iterator[None]:
        """While all ranks do something, and so wait for each other."""
        self._calls += 1
        self._since = time.monotonic()
        try:
            yield
        except RuntimeError:  # of gloo or NCCL
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # they come because of the same
                signal.signal(number, signal.SIG_IGN)
            if not self._watch.told() and (missing := self._watch.missing()):
                raise Lost(missing) from None
            raise
        finally:
            self._since = None

    def _waiting_since(self) -> float | None:
        while self._sent and self._sent[0][1].is_completed():
            self._sent.popleft()
        began = [since for since in (self._since, self._sent[0][0] if self._sent else None) if since is not None]
        return min(began, default=None)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        values = [value]
        with self._together():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def numbers(self, *values: float) -> np.ndarray:
        found = torch.empty(self.size * len(values), dtype=torch.float64, device=self.device)
        with self._together():
            gather(found, torch.tensor(values, dtype=torch.float64, device=self.device))
            numbers = found.cpu().numpy()
        return numbers.reshape(self.size, len(values))

    def barrier(self) -> None:
        with self._together():
            dist.barrier()

    def shared(self, memory: Any) -> torch.Tensor:
        return tensor_of(memory)

    def average(self, memory: Any, dtype: str = "float32") -> Work:
        tensor = tensor_of(memory)
        sent = rounded(tensor, dtype)
        return self._send(dist.all_reduce(sent, op=dist.ReduceOp.AVG, async_op=True), sent, tensor)

    def reduce(self, memory: Any, dtype: str = "float32") -> Work:
        tensor = tensor_of(memory)
        sent = rounded(tensor, dtype)
        own = self._part(sent)
        return self._send(scatter(own, sent, op=dist.ReduceOp.AVG, async_op=True), own, self._part(tensor))

    def collect(self, memory: Any) -> Work:
        tensor = tensor_of(memory)
        return self._send(gather(tensor, self._part(tensor), async_op=True), tensor, tensor)

    def gather_parts(self, part: Any, keep: bool = True) -> np.ndarray:
        tensor = tensor_of(part)
        found = tensor.new_empty(self.size * tensor.numel())
        with self._together():
            gather(found, tensor)
            return found.cpu().numpy() if keep else np.empty(0)

    def share(self, memory: Any, source: int) -> Work:
        tensor = tensor_of(memory)
        return self._send(dist.broadcast(tensor, src=source, async_op=True), tensor, tensor)

    def all_live(self) -> bool:
        return not self._watch.told() and not self._watch.missing()

    def resume_with(self, command: str) -> None:
        self._watch.resuming = command

    def _part(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(self.size, -1)[self.rank]

    def _send(self, work: Any, sent: torch.Tensor, place: torch.Tensor) -> Work:
        self._calls += 1
        self._sent.append((time.monotonic(), work))
        return Sending(self, work, sent, place)


@dataclass
class Sending:
    """What is being sent, for which a rank waits for the others. It arrives in `sent`, and goes into `place` if that is
    elsewhere.
    """

    job: Job
    work: Any
    sent: torch.Tensor
    place: torch.Tensor

    def wait(self) -> None:
        with self.job._together():
            self.work.wait()
        if self.sent.data_ptr() != self.place.data_ptr():
            self.place.copy_(self.sent)


def connected(point: tuple[str, int], serve: bool, timeout: float) -> Any:
    """A connection to the store where ranks meet, which `serve` begins. Raises `InputError` where there is none."""
    host, port = point

    def connect() -> Any:
        return dist.TCPStore(
            host, port, is_master=serve, wait_for_workers=False, timeout=timedelta(seconds=timeout), multi_tenant=serve
        )

    try:
        # PyTorch's own time limit ends at the first byte: something else that listens there may never answer
        store = connect() if serve else within(timeout, connect)
    except (RuntimeError, ValueError) as e:
        reason = str(e).partition("\n")[0]
        if "EADDRINUSE" in str(e):
            raise InputError(
                f"port {port}, where the ranks were to meet, is in use on this host; export another one as MASTER_PORT"
            ) from None
        if serve:
            raise InputError(f"the ranks cannot meet at {host}:{port} ({reason}); mend MASTER_ADDR") from None
        raise InputError(
            f"rank 0 did not answer at {host}:{port} within {counted(timeout, 'second')}; see what rank 0 says, and "
            "whether MASTER_ADDR and MASTER_PORT are the same everywhere"
        ) from None
    return dist.PrefixStore(f"attempt {attempt()}", store)


def within(seconds: float, compute: Callable[[], Any]) -> Any:
    """What `compute` gives or raises. Raises `RuntimeError` where it takes longer; it is then left alone."""
    done: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def work() -> None:
        try:
            done.put((compute(), None))
        except Exception as e:
            done.put((None, e))

    threading.Thread(target=work, daemon=True).start()
    try:
        found, error = done.get(timeout=seconds)
    except queue.Empty:
        raise RuntimeError(f"no answer within {counted(seconds, 'second')}") from None
    if error is not None:
        raise error
    return found


def meet(place: Place, store: Any, timeout: float) -> None:
    """Until all ranks are there. Raises `InputError` where some do not come, or are of another job."""
    own = json.dumps([who(), job_name(), place.size])
    first = store.compare_set(f"joined/{place.rank}", "", own).decode()
    if first != own:
        other, _, _ = json.loads(first)
        raise InputError(
            f"two processes are rank {place.rank} ({other}; {who()}); give each job a MASTER_PORT of its own, and each "
            "process of a job its own RANK"
        )
    store.set(f"who/{place.rank}", who())
    try:
        store.wait([f"joined/{rank}" for rank in range(place.size)], timedelta(seconds=timeout))
    except RuntimeError:
        late = [rank for rank in range(place.size) if not store.check([f"joined/{rank}"])]
        raise InputError(
            f"{listed(late)} of {place.size} did not come within {counted(timeout, 'second')}; see what is said there, "
            "or give a longer --timeout"
        ) from None
    for rank in range(place.size):
        other, job, size = json.loads(store.get(f"joined/{rank}").decode())
        if (job, size) != (job_name(), place.size):
            raise InputError(
                f"two jobs meet at one port: rank {rank} ({other}) is one of {size} of job {job}, and rank "
                f"{place.rank} ({who()}) one of {place.size} of job {job_name()}; give each job a MASTER_PORT of its "
                "own"
            )


def who() -> str:
    """This process, for people who look for it, and for `Watch.kill_lost`."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def job_name() -> str:
    """The job that this process belongs to, as whatever started it calls it."""
    names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    return ".".join(os.environ[name] for name in names if name in os.environ) or "none"


def rounded(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """The tensor itself, or a copy in bfloat16."""
    return tensor.bfloat16() if dtype == "bfloat16" else tensor


def tensor_of(memory: Any) -> torch.Tensor:
    """The same memory as a tensor of PyTorch's."""
    if isinstance(memory, np.ndarray | torch.Tensor):
        return torch.as_tensor(memory)
    return torch.as_tensor(memory, device="cuda")
