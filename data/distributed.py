"""Ranks on torch.distributed: NCCL between GPUs, gloo between CPUs. Nothing else in the project touches it."""

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

    def average(self, whole: Any) -> Work:
        return self._sent(dist.all_reduce(tensor_of(whole), op=dist.ReduceOp.AVG, async_op=True))

    def reduce(self, whole: Any) -> Work:
        tensor = tensor_of(whole)
        return self._sent(scatter(self._part(tensor), tensor, op=dist.ReduceOp.AVG, async_op=True))

    def collect(self, whole: Any) -> Work:
        tensor = tensor_of(whole)
        return self._sent(gather(tensor, self._part(tensor), async_op=True))

    def share(self, whole: Any, source: int) -> Work:
        return self._sent(dist.broadcast(tensor_of(whole), src=source, async_op=True))

    def _part(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(self.size, -1)[self.rank]

    def _sent(self, work: Any) -> Work:
        assert work is not None  # as it is for ranks that take no part
        return work


def tensor_of(memory: Any) -> torch.Tensor:
    """The same memory as a tensor of PyTorch's."""
    if isinstance(memory, np.ndarray | torch.Tensor):
        return torch.as_tensor(memory)
    return torch.as_tensor(memory, device="cuda")
