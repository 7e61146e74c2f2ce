"""tinygrad's part in a comparison of speed. `python -m tinygrad_impl.bench_port` is it in a process of its own, which
reads and answers the same lines as torch_ref.bench_worker; but for "ceilings".
"""

import math
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Device, Tensor, dtypes

from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import weights_in
from data.cli import InputError
from data.ranks import ALONE, Ranks
from data.requests import answer
from tinygrad_impl.backend import Backend, choose
from tinygrad_impl.device import open_device
from tinygrad_impl.internals import HighWater, captured_at_once, compiled_kernels, free_memory
from tinygrad_impl.kernels import GPU
from tinygrad_impl.trainer import Trainer

LR = 1e-4  # torch_ref/bench_worker.py's too
TURNS, CALLS = 5, 10  # where a ceiling is measured; the first turn does not count
WARM_UP = 3  # steps: compilers, captures and caches are through with their work then


class Port:
    """tinygrad's side: a trainer as `tinygrad_impl.train` has it, of the weights in the file `weights`. `tokens` are
    integers (batches, B, T + 1), which the steps take in turn. Its first `warm_up` steps are done.
    """

    def __init__(
        self,
        config: GPT2Config,
        weights: str,
        tokens: np.ndarray,
        device: str,
        backend: Backend,
        ranks: Ranks = ALONE,
        warm_up: int = WARM_UP,
    ):
        self.device, self.first_loss = device, math.nan
        self.memory = HighWater()
        self.free = free_memory(device)
        self.batches = [(batch[:, :-1].copy(), batch[:, 1:].copy()) for batch in tokens]
        cached, started = compiled(), time.perf_counter()
        self.trainer = Trainer(config, weights_in(weights, config), backend=backend, ranks=ranks)
        built = time.perf_counter() - started
        self.figures = self.run(warm_up)
        self.figures["seconds"][0] += built
        self.figures["compiled"] = compiled() - cached

    def ready(self) -> dict[str, Any]:
        """As torch_ref.bench_worker's `Peer.ready`."""
        self.step()
        return {}

    def run(self, steps: int) -> dict[str, Any]:
        """As torch_ref.bench_worker's `Peer.run`."""
        started = time.perf_counter()
        figures: dict[str, Any] = {"seconds": [self.step() for _ in range(steps)]}
        figures |= {"wall_seconds": time.perf_counter() - started, "first_loss": self.first_loss}
        figures["allocated_bytes"] = self.memory.highest[self.device]
        if self.device == "CUDA":
            figures["held_bytes"] = self.free - free_memory(self.device)
        else:
            figures["held_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return figures

    def step(self) -> float:
        """One update of the weights. Returns the seconds that it took."""
        Device[self.device].synchronize()
        started = time.perf_counter()
        loss, norm = self.trainer.step([self.batches[self.trainer.steps % len(self.batches)]], LR)
        Device[self.device].synchronize()
        seconds = time.perf_counter() - started
        if not math.isfinite(loss + norm):  # such a step leaves out AdamW
            raise InputError(f"tinygrad's loss became {loss} and the gradient's norm {norm}; this measures nothing")
        if self.trainer.steps == 1:
            self.first_loss = loss
        return seconds


def compiled() -> int:
    """How many kernels are in the caches of tinygrad's compiler and of Triton's."""
    count = compiled_kernels()
    triton = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return count + sum(1 for _ in triton.glob("*/*.cubin"))


def product_ceiling(gpu: GPU, device: str, n: int = 8192) -> dict[str, float]:
    """What a plain GEMM of (n, n) bfloat16 matrices, compiled for such a GPU, reaches on the device: FLOP/s."""
    from tinygrad_impl.kernels import matmul  # here, because they import Triton
    from tinygrad_impl.kernels.launch import launch, new

    kernel = matmul.head(gpu, n, n, n)
    a, b = (Tensor.randn(n, n, device=device).cast(dtypes.bfloat16).contiguous().realize() for _ in range(2))
    product = captured_at_once(lambda a, b: launch(gpu, kernel, [new(a, n, n)], a, b)[0].realize())
    seconds = []
    for _ in range(TURNS):
        Device[device].synchronize()
        started = time.perf_counter()
        for _ in range(CALLS):
            product(a, b)
        Device[device].synchronize()
        seconds.append(time.perf_counter() - started)
    return {"n": n, "flops": kernel.flops * CALLS / statistics.median(seconds[1:])}


def build(
    config: dict[str, Any],
    weights: str,
    tokens: str,
    dtype: str,
    device: str,
    kernels: str,
    warm_up: int,
    arch: str | None = None,
) -> Port:
    sizes = GPT2Config(**config)
    backend = choose(kernels, sizes, open_device(device), bfloat16=dtype == "bfloat16", arch=arch)
    return Port(sizes, weights, np.load(tokens), device, backend, warm_up=warm_up)


def main() -> None:
    built: list[Port] = []

    def do(what: str, request: dict[str, Any]) -> dict[str, Any]:
        if what == "build":
            built.append(build(**request))
            return built[-1].figures
        return built[-1].run(**request) if what == "run" else built[-1].ready()

    answer(do)


if __name__ == "__main__":
    main()
