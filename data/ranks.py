"""The processes that train one model together, called ranks: one for each GPU, or several on a CPU.

What they tell each other goes through `Ranks`. A process that neither torchrun nor srun has started with others is
alone, and nothing is sent; PyTorch, whose torch.distributed does the sending (data/distributed.py), is not imported.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data.cli import InputError, counted
from data.gpu import gpus, numbered, show_one_gpu

TURN = 10.0  # seconds in which a host's first rank tells what is wrong


@dataclass(frozen=True)
class Place:
    """Which of a job's ranks a process is, and which of those on its host."""

    rank: int
    size: int
    local_rank: int
    local_size: int


class Work(Protocol):
    """Something being sent."""

    def wait(self) -> Any:
        """Until it is done: the host, or what it has the GPU compute from here on."""


class Done:
    """What needs no sending."""

    def wait(self) -> None:
        pass


class Ranks:
    """This process among those that train together: here, alone. Rank 0 is the one that writes and speaks.

    All ranks have to call the same methods in the same order. `memory` is flat memory (elements,) that `size` divides,
    as numpy's, as PyTorch's, or as an object with `__cuda_array_interface__`; each rank has the rank-th part of it.
    """

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, of whatever can be pickled, in the order of ranks; on all of them."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        return value

    def numbers(self, *values: float) -> np.ndarray:
        """Every rank's numbers: float64 (size, how many)."""
        return np.array([values], np.float64)

    def barrier(self) -> None:
        """Until all ranks are here."""

    def shared(self, memory: Any) -> Any:
        """The same memory as what is sent soonest."""
        return memory

    def average(self, memory: Any, dtype: str = "float32") -> Work:
        """Makes `memory` the mean over ranks, in place, on all of them. It is sent as it is, or in "bfloat16"."""
        return Done()

    def reduce(self, memory: Any, dtype: str = "float32") -> Work:
        """Makes this rank's part of `memory` the mean over ranks, in place. It is sent as in `average`. The other parts
        are not to be read; where they are 0, they stay 0.
        """
        return Done()

    def collect(self, memory: Any) -> Work:
        """Makes each part of `memory` what it is on the rank whose part it is, in place, on all ranks."""
        return Done()

    def share(self, memory: Any, source: int) -> Work:
        """Makes `memory`, of any shape, what it is on rank `source`, in place, on all ranks."""
        return Done()

    def gather_parts(self, part: Any, keep: bool = True) -> np.ndarray:
        """All ranks' parts, which are alike in size, one after another; nothing where a rank does not `keep` them."""
        return np.array(part) if keep else np.empty(0)

    def all_live(self) -> bool:
        """Whether all ranks give signs of life, and none has told why the job ends. Takes seconds; for any thread."""
        return True

    def resume_with(self, command: str) -> None:
        """From here on `command` goes on with what is saved, which is to be said where a rank is lost."""


ALONE = Ranks()


def started_with_others() -> bool:
    """Whether torchrun or srun has started this process, be it with others or alone."""
    return "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ


def place() -> Place | None:
    """Which rank torchrun or srun say that this process is; None where they have not started it, or it alone."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    said = [os.environ.get(name) for name in names]
    if all(value is None for value in said):
        return slurm_place()
    try:
        rank, size, local_rank, local_size = (int(value or "") for value in said)
    except ValueError:
        found = ", ".join(f"{name}={value}" for name, value in zip(names, said, strict=True))
        raise InputError(f"torchrun sets {', '.join(names)}, and here are {found}; start this with torchrun") from None
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise InputError(
            f"RANK={rank} of WORLD_SIZE={size} and LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_size} cannot be: "
            "each counts from 0 and is below the other; start this with torchrun"
        )
    return Place(rank, size, local_rank, local_size) if size > 1 else None


def refuse_ranks(work: str) -> None:
    """Raises `InputError` where torchrun or srun have started several processes for what one does."""
    if found := place():
        raise InputError(
            f"{work} is the work of one process, and this is rank {found.rank} of {found.size}; "
            "start it without torchrun"
        )


def attempt() -> int:
    """How often torchrun has started all ranks of this job again, because it had lost one (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def slurm_place() -> Place | None:
    """The same of a task of srun's. What sbatch runs is no task, whatever SLURM_NTASKS says of those to come."""
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")
    try:
        rank, size, local_rank, node = (int(os.environ[name]) for name in names[:4])
        counts = list[int]()
        for part in os.environ[names[4]].split(","):  # such as 4(x2),3
            count, times = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part).groups()  # type: ignore[union-attr]
            counts += [int(count)] * int(times or 1)
        return Place(rank, size, local_rank, counts[node])
    except (KeyError, ValueError, AttributeError, IndexError):
        found = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise InputError(f"srun sets {', '.join(names)}, and here are {found}; start this with srun") from None


def meeting_point() -> tuple[str, int]:
    """The host and the port where ranks meet: rank 0's host. Raises `InputError` where nothing tells them."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None and "SLURM_STEP_NUM_TASKS" in os.environ:
        host = first_host(os.environ.get("SLURM_STEP_NODELIST", ""))
    if port is None and "SLURM_JOB_ID" in os.environ:  # one that jobs on one host do not share
        port = str(20000 + (int(os.environ["SLURM_JOB_ID"]) * 16 + int(os.environ.get("SLURM_STEP_ID", "0"))) % 10000)
    if host is None or port is None or not (port.isdigit() and 0 < int(port) < 1 << 16):
        raise InputError(
            f"the ranks do not know where to meet, with MASTER_ADDR={host} and MASTER_PORT={port}; "
            "export the host of rank 0 as MASTER_ADDR, and a free port of it (1 to 65535) as MASTER_PORT"
        )
    return host, int(port)


def first_host(hosts: str) -> str | None:
    """The first of SLURM's list of hosts, such as node[07-09,12]; None where nothing here can read it."""
    if hosts and "[" not in hosts:
        return hosts.partition(",")[0]
    if hosts and shutil.which("scontrol"):
        found = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=False)
        return next(iter(found.stdout.split()), None)
    return None


def rank_device(device: str | None, place: Place) -> str:
    """The device of a rank, of which `device` (CPU, CUDA; None: the best there is) is asked for. On GPUs it makes that
    of the local rank the only one that this process sees; on CPUs it keeps to this rank's share of the cores.

    It comes before anything opens CUDA or starts threads. Raises `InputError` where there are too few GPUs.
    """
    found = gpus()
    name, number = numbered(device) if device else ("CUDA" if found else "CPU", None)
    if number is not None:
        raise InputError(f"each rank has a GPU of its own, so there is no --device {device}; give --device CUDA")
    if name == "CPU":
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // place.local_size)
        first = place.local_rank * share % len(cores)
        os.sched_setaffinity(0, cores[first : first + share])
    elif name == "CUDA":
        bound = len(found) == 1 and "SLURM_STEP_NUM_TASKS" in os.environ  # srun shows each task its own GPU
        if len(found) < place.local_size and not bound:
            raise InputError(
                f"this host has {counted(len(found), 'GPU')} for {place.local_size} processes; start "
                f"{len(found)} on it (torchrun --nproc-per-node {len(found)}), or give --device CPU"
                if found
                else f"this host has no GPU for its {counted(place.local_size, 'process')}; give --device CPU"
            )
        show_one_gpu(0 if bound else place.local_rank)
    else:
        raise InputError(f"several ranks compute on NVIDIA's GPUs or on CPUs, not on {device}; give --device CPU")
    return name


def listed(ranks: list[int]) -> str:
    """rank 3; ranks 1, 2 and 3."""
    *others, last = map(str, ranks)
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"


def shared_out(place: Place, device: str) -> str:
    """What each rank has of the machine, in words."""
    hosts = f", {place.local_size} of them on this host" if place.local_size < place.size else ""
    cores = len(os.sched_getaffinity(0))
    each = "a GPU each" if device == "CUDA" else f"on CPUs, {counted(cores, 'core')} each"
    return f"{place.size} ranks{hosts}, {each}"


def wait_for_turn() -> None:
    """Before an error is told that came before the ranks were together. Mostly all have the same, so the first of a
    host tells it, and whatever started them ends the others then. Who is not ended has an error of its own.
    """
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    if started_with_others() and local_rank != "0":
        time.sleep(TURN)


def quieten_pytorch() -> None:
    """Before PyTorch is imported: what is amiss is said once, in a sentence of ours, and not by its C++ as well."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


@contextmanager
def joined(device: str, timeout: float) -> Iterator[Ranks]:
    """This process among its ranks, on a device (CUDA is the one GPU that it sees). `timeout`: the seconds after which
    a rank that is waited for counts as lost.

    An error that comes out of it ends the process, where there are several: one rank tells it for all.
    """
    found = place()
    if found is None:
        yield ALONE
        return
    quieten_pytorch()
    # nor is anything said of what Python has to tidy up after a sudden end
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    from data.distributed import Job  # here, because it imports PyTorch

    job = Job(found, device, timeout, meeting_point())
    try:
        job.join()
        try:
            yield job
        except SystemExit:
            job.leave()
            raise
        job.leave()
    except (Exception, KeyboardInterrupt) as e:
        job.fail(e)
