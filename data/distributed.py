"""Ranks on torch.distributed: NCCL between GPUs, gloo between CPUs. Nothing else in the project touches it."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.ranks import Place, Ranks, Work

# PyTorch 2.13 has other names for these, and warns of those before
scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Job(Ranks):
    """The ranks of a job that torchrun or srun have started, on `device`: CUDA (the one GPU that each sees) or CPU."""

    def __init__(self, place: Place, device: str, timeout: float):
        self.rank, self.size = place.rank, place.size
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self.device = torch.device("cuda", 0) if device == "CUDA" else torch.device("cpu")
        if device == "CUDA":
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if device == "CUDA" else "gloo",
            device_id=self.device if device == "CUDA" else None,
            timeout=timedelta(seconds=timeout),
        )

    def leave(self) -> None:
        dist.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def numbers(self, *values: float) -> np.ndarray:
        found = torch.empty(self.size * len(values), dtype=torch.float64, device=self.device)
        gather(found, torch.tensor(values, dtype=torch.float64, device=self.device))
        return found.cpu().numpy().reshape(self.size, len(values))

    def barrier(self) -> None:
        dist.barrier()

    def shared(self, memory: Any) -> torch.Tensor:
        return tensor_of(memory)

    def average(self, whole: Any, dtype: str = "float32") -> Work:
        tensor = tensor_of(whole)
        sent = rounded(tensor, dtype)
        return Mean(dist.all_reduce(sent, op=dist.ReduceOp.AVG, async_op=True), sent, tensor)

    def reduce(self, whole: Any, dtype: str = "float32") -> Work:
        tensor = tensor_of(whole)
        sent = rounded(tensor, dtype)
        own = self._part(sent)
        return Mean(scatter(own, sent, op=dist.ReduceOp.AVG, async_op=True), own, self._part(tensor))

    def collect(self, whole: Any) -> Work:
        tensor = tensor_of(whole)
        work: Work = gather(tensor, self._part(tensor), async_op=True)
        return work

    def whole(self, part: Any, keep: bool) -> np.ndarray | None:
        tensor = tensor_of(part)
        found = tensor.new_empty(self.size * tensor.numel())
        gather(found, tensor)
        return found.cpu().numpy() if keep else None

    def share(self, whole: Any, source: int) -> Work:
        work: Work = dist.broadcast(tensor_of(whole), src=source, async_op=True)
        return work

    def _part(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(self.size, -1)[self.rank]


@dataclass
class Mean:
    """A mean on its way. It arrives in `sent`, and goes into `place` if that is elsewhere."""

    work: Any
    sent: torch.Tensor
    place: torch.Tensor

    def wait(self) -> None:
        self.work.wait()
        if self.sent.data_ptr() != self.place.data_ptr():
            self.place.copy_(self.sent)


def rounded(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """The tensor itself, or a copy in bfloat16."""
    return tensor.bfloat16() if dtype == "bfloat16" else tensor


def tensor_of(memory: Any) -> torch.Tensor:
    """The same memory as a tensor of PyTorch's."""
    if isinstance(memory, np.ndarray | torch.Tensor):
        return torch.as_tensor(memory)
    return torch.as_tensor(memory, device="cuda")
