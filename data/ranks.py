"""The processes that train one model together, called ranks: one for each GPU, or several on a CPU.

What they tell each other goes through `Ranks`. A process that neither torchrun nor srun has started with others is
alone, and nothing is sent; PyTorch, whose torch.distributed does the sending (data/distributed.py), is not imported.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data.cli import InputError


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

    All ranks have to call the same methods in the same order. `whole` is flat memory (elements,) that `size` divides,
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

    def average(self, whole: Any, dtype: str = "float32") -> Work:
        """Makes `whole` the mean over ranks, in place, on all of them. It is sent as it is, or in "bfloat16"."""
        return Done()

    def reduce(self, whole: Any, dtype: str = "float32") -> Work:
        """Makes this rank's part of `whole` the mean over ranks, in place; what the other parts become is undefined.
        It is sent as in `average`.
        """
        return Done()

    def collect(self, whole: Any) -> Work:
        """Makes each part of `whole` what it is on the rank whose part it is, in place, on all ranks."""
        return Done()

    def share(self, whole: Any, source: int) -> Work:
        """Makes `whole`, of any shape, what it is on rank `source`, in place, on all ranks."""
        return Done()

    def whole(self, part: Any, keep: bool) -> np.ndarray | None:
        """All ranks' parts, which are alike in size, one after another; None where a rank does not `keep` them."""
        return np.array(part) if keep else None


ALONE = Ranks()


def place() -> Place | None:
    """Which rank torchrun or srun say that this process is; None where they have not started it, or it alone."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    said = [os.environ.get(name) for name in names]
    if all(value is None for value in said):
        return None
    try:
        rank, size, local_rank, local_size = (int(value or "") for value in said)
    except ValueError:
        found = ", ".join(f"{name}={value}" for name, value in zip(names, said, strict=True))
        raise InputError(f"torchrun sets {', '.join(names)}, and here are {found}; start this with torchrun") from None
    return Place(rank, size, local_rank, local_size) if size > 1 else None


@contextmanager
def joined(device: str, timeout: float) -> Iterator[Ranks]:
    """This process among its ranks, on a device (CUDA is the one GPU that it sees). `timeout`: the seconds after which
    a rank that is waited for counts as lost.
    """
    found = place()
    if found is None:
        yield ALONE
        return
    from data.distributed import Job  # here, because it imports PyTorch

    job = Job(found, device, timeout)
    try:
        yield job
    finally:
        job.leave()
