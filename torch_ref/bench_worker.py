"""PyTorch's part in a comparison of speed: `python -m torch_ref.bench_worker`, which tinygrad_impl.bench starts.

It is a process of its own, so that neither framework is loaded beside the other. It reads a request a line from stdin
and answers it with a line on stdout, both JSON objects:

    {"do": "build", "warm_up": n, ...}         what `build` returns, which is of what `Peer` is given
    {"do": "ready"}                            nothing: a step that does not count, before those that do
    {"do": "run", "steps": n}                  what `Peer.run` returns
    {"do": "ceilings", "device", "dtype"}      what `ceilings` returns

or with {"error": what went wrong}. It ends where stdin does.

The peer is the reference's model in the fastest way that PyTorch's users know: autocast, fused AdamW, nothing that
waits for the device within a step, tokens that are on the device already, compiled or not; and nanoGPT's vocabulary of
50304, of which 47 rows stand for no token, because PyTorch's matmuls with 50257 columns are slow.

With "ranks": true in what is to be built, it is trained with those of other such processes, by
`DistributedDataParallel`, which averages the gradients while the backward pass still computes. Their environments say
which rank each is, and where they meet: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, of which the last must be free on
rank 0's host; each process uses the first GPU that it sees. All of them have to be asked the same at the same time,
each with tokens of its own. Each replies with its own seconds and memory, and with the loss of its own tokens.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import weights_in
from data.requests import answer
from torch_ref.model import GPT2

VOCAB_MULTIPLE = 128
CALLS = 10  # between two looks at the clock, where ceilings are measured
LR, BETAS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0  # tinygrad_impl/bench.py's too


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def loss_of(model: GPT2, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = model(x, y)[1]  # without the logits: compiled, they need not be kept
    assert loss is not None
    return loss


class Loss(torch.nn.Module):
    """`loss_of` as a module, which DistributedDataParallel asks for."""

    def __init__(self, model: GPT2):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_of(self.model, x, y)


class Peer:
    """GPT-2 of the sizes `config` and the weights in the file `weights`, and its AdamW. `tokens` is a .npy of integers
    (batches, B, T + 1), which the steps take in turn. `dtype` is that of matmuls. With `ranks`, torch.distributed's
    process group trains it together.
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: str,
        tokens: str,
        dtype: str,
        device: str,
        compile: bool,
        ranks: bool = False,
    ):
        self.device, self.autocast = device, dtype == "bfloat16"
        if self.autocast:
            torch.set_float32_matmul_precision("high")  # with float32 it would be TensorFloat32 that is compared
        sizes = GPT2Config(**config)
        arrays = weights_in(weights, sizes)
        padding = -sizes.vocab_size % VOCAB_MULTIPLE
        arrays["wte.weight"] = np.pad(arrays["wte.weight"], ((0, padding), (0, 0)))
        self.model = GPT2(replace(sizes, vocab_size=sizes.vocab_size + padding), arrays).to(device)
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = self.loss_of
        if ranks:  # before it is compiled, as PyTorch has it: its graphs are then cut where gradients are sent
            # that the graph never changes is of use where it is not compiled, and not allowed where it is
            loss = DistributedDataParallel(Loss(self.model), gradient_as_bucket_view=True, static_graph=not compile)
        self.loss = torch.compile(loss) if compile else loss
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim == 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
        batches = torch.tensor(np.load(tokens), device=device).long()
        self.batches = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in batches]
        self.steps, self.first_loss = 0, 0.0

    def loss_of(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_of(self.model, x, y)

    def step(self) -> float:
        """One update of the weights. Returns the seconds that it took."""
        synchronize(self.device)
        started = time.perf_counter()
        x, y = self.batches[self.steps % len(self.batches)]
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        seconds = time.perf_counter() - started
        if not self.steps:
            self.first_loss = loss.item()
        self.steps += 1
        return seconds

    def ready(self) -> dict[str, Any]:
        """A step that is not to count, which takes the memory that the next ones need."""
        self.step()
        return {}

    def run(self, steps: int) -> dict[str, Any]:
        """So many steps: the seconds of each and of all, and the most memory in bytes that they took."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        figures: dict[str, Any] = {"seconds": [self.step() for _ in range(steps)]}
        figures |= {"wall_seconds": time.perf_counter() - started, "first_loss": self.first_loss}
        if self.device == "cuda":
            figures["allocated_bytes"] = torch.cuda.max_memory_allocated()
            figures["held_bytes"] = torch.cuda.max_memory_reserved()
        else:
            figures["held_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return figures


def build(warm_up: int, **arguments: Any) -> tuple[Peer, dict[str, Any]]:
    """A peer and the figures of its first steps, the first with all that comes before it: `warm_up` of them."""
    started = time.perf_counter()
    if arguments.get("ranks"):
        on_gpu = arguments["device"] == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=torch.device("cuda", 0) if on_gpu else None)
    peer = Peer(**arguments)
    built = time.perf_counter() - started
    figures = peer.run(warm_up)
    figures["seconds"][0] += built
    figures["compiled"] = 0
    if arguments["compile"]:
        figures["compiled"] = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"]
    figures["versions"] = {"torch": torch.__version__}
    return peer, figures


def rate(function: Callable[[], object], device: str) -> float:
    """How often a second the device can do that, again and again."""
    seconds = []
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(CALLS):
            function()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return CALLS / median(seconds[1:])


def ceilings(device: str, dtype: str) -> dict[str, float]:
    """What the device reaches at most, a second: in a matmul of large square matrices, and in copying memory."""
    n, size = (8192, 1 << 30) if device == "cuda" else (768, 1 << 26)
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    result = torch.empty_like(a)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    flops = 2 * n**3 * rate(lambda: torch.mm(a, b, out=result), device)
    moved = 2 * size * rate(lambda: target.copy_(source), device)
    return {"n": n, "flops": flops, "bytes": moved}


def main() -> None:
    built: list[Peer] = []

    def do(what: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if what == "build":
                peer, figures = build(**request)
                built.append(peer)
                return figures
            if what == "ceilings":
                return ceilings(**request)
            return built[-1].ready() if what == "ready" else built[-1].run(**request)
        finally:
            if torch.cuda.is_initialized() and what != "ready":
                torch.cuda.empty_cache()  # for others, until the next request

    answer(do)


if __name__ == "__main__":
    main()
