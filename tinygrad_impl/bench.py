"""How fast the port trains beside PyTorch: `python -m tinygrad_impl.bench`.

The same work by turns, on one device in one run: whole steps of the same model from the same random weights, on the
same random tokens, with forward, backward, clipping and AdamW. tinygrad computes them as `tinygrad_impl.train` does,
with all that it does on the host; PyTorch as torch_ref/bench_worker.py says, in a process of its own.

Under torchrun rank 0 first measures its one GPU, by this program without the others, which wait and compute nothing;
when that process is gone, with all of its memory, all ranks measure what they reach together. Each rank has a process
of PyTorch's, and these train together as well. A step takes as long as on the rank on which it takes longest.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Device
from tinygrad.helpers import DEV

from data.checkpoints.config import PRESETS, GPT2Config, flops_a_token, parameter_count
from data.checkpoints.initialize import initial_weights
from data.cli import ArgumentParser, InputError, Progress, integer, refuse_missing_folder, run
from data.files import atomic_write
from data.launch import OPTION, count, launch, with_option
from data.ranks import ALONE, Ranks, joined, place, rank_device
from data.runs.options import RECIPES
from data.runs.revision import revision
from tinygrad_impl import bench_tables as tables
from tinygrad_impl.backend import CHOICES, Backend, choose
from tinygrad_impl.bench_peers import Worker, meeting, peers, worker
from tinygrad_impl.bench_ranks import MEMORY, of_all, of_one, one_gpu, summed, told_of_its_end
from tinygrad_impl.device import device_name, open_device
from tinygrad_impl.internals import HighWater, compiled_kernels, free_memory, one_by_one
from tinygrad_impl.trainer import Trainer

TORCH_DEVICES = {"CPU": "cpu", "CUDA": "cuda"}  # PyTorch's names of tinygrad's devices
SEED, LR, BATCHES = 1337, 1e-4, 4  # of weights and tokens; of AdamW; how many the steps take in turn
WARM_UP = 3  # steps: compilers, captures and caches are through with their work then
ROUNDS = 5  # turns of each
PROFILED = 5  # steps
ENDING = 30.0  # seconds that ranks have to end
TIMEOUT = 3600.0  # seconds that a rank waits for another, which may be measuring its one GPU, or compiling


class Port:
    """tinygrad's side: a trainer as `tinygrad_impl.train` has it. `tokens` are integers (batches, B, T + 1)."""

    def __init__(self, config: GPT2Config, tokens: np.ndarray, device: str, backend: Backend, ranks: Ranks = ALONE):
        self.device, self.first_loss = device, math.nan
        self.memory = HighWater()
        self.free = free_memory(device)
        self.batches = [(batch[:, :-1].copy(), batch[:, 1:].copy()) for batch in tokens]
        cached, started = compiled(), time.perf_counter()
        self.trainer = Trainer(config, initial_weights(config, SEED), backend=backend, ranks=ranks)
        built = time.perf_counter() - started
        self.figures = self.run(WARM_UP)
        self.figures["seconds"][0] += built
        self.figures["compiled"] = compiled() - cached

    def run(self, steps: int) -> dict[str, Any]:
        """As torch_ref.bench_worker's `Peer.run`."""
        figures = {"seconds": [self.step() for _ in range(steps)], "first_loss": self.first_loss}
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
        loss, norm = self.trainer.step([self.batches[self.trainer.steps % BATCHES]], LR)
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


def compare(
    args: argparse.Namespace, config: GPT2Config, device: str, backend: Backend, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """All figures. The contenders take turns, in one order and then in the other, because clocks drift with heat."""
    B, T = args.batch_size, args.seq_len
    tokens = np.random.default_rng(SEED + ranks.rank).integers(0, config.vocab_size, (BATCHES, B, T + 1), np.int32)
    rounds = [len(part) for part in np.array_split(range(args.steps), min(ROUNDS, args.steps))]
    names = ["tinygrad", *args.against]
    step = ranks.size * B * T  # tokens
    flops = flops_a_token(config, T) * step
    meetings = [meeting(ranks) for _ in args.against]
    with ExitStack() as stack:
        shown: dict[str, Any] = {"desc": "measuring", "unit": "turn", "disable": ranks.rank > 0}
        progress = stack.enter_context(Progress(total=len(names) * (1 + len(rounds)), **shown))
        file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "tokens.npy")
        np.save(file, tokens)
        workers = {n: stack.enter_context(worker(n, where)) for n, where in zip(args.against, meetings, strict=True)}
        begun, contenders = {}, dict[str, Port | Worker]()
        for name, peer in workers.items():  # before tinygrad, which gives none of its memory back
            progress.set_postfix_str(f"{name} begins")
            arguments = {"config": asdict(config), "seed": SEED, "tokens": str(file), "dtype": args.dtype}
            arguments |= {"device": TORCH_DEVICES[device], "compile": name == "torch-compile"}
            arguments |= {"ranks": True} if ranks.size > 1 else {}
            begun[name] = of_all(peer.ask("build", warm_up=WARM_UP, **arguments), ranks)
            progress.update()
        progress.set_postfix_str("tinygrad begins")
        contenders["tinygrad"] = port = Port(config, tokens, device, backend, ranks)
        begun["tinygrad"] = of_all(port.figures, ranks)
        contenders |= workers
        progress.update()
        referee = next(iter(workers.values()), None)
        if referee is None and device in TORCH_DEVICES and importlib.util.find_spec("torch"):
            referee = stack.enter_context(worker("torch"))
        units = {"device": TORCH_DEVICES.get(device), "dtype": args.dtype if device == "CUDA" else "float32"}

        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        ceilings = []
        for i, steps in enumerate(rounds):
            for name in reversed(names) if i % 2 else names:
                progress.set_postfix_str(name, refresh=False)
                figures = contenders[name].run(1 + steps)  # the first, after another's turn, is not counted
                turns[name].append(of_all(figures, ranks))
                progress.update()
            if referee:
                ceilings.append(summed(referee.ask("ceilings", **units), ranks))
        ceiling = {key: statistics.median(c[key] for c in ceilings) for key in ceilings[0]} if ceilings else None
        kernel_rows = profile(port, ceiling) if args.profile else None

    rows = {name: summary(begun[name], turns[name], step, flops, ceiling) for name in names}
    versions = {"tinygrad": importlib.metadata.version("tinygrad")}
    for name in args.against:
        versions |= begun[name]["versions"]
    return {
        "versions": versions,
        "flops_a_step": flops,
        "ceiling": ceiling and ceiling | {"dtype": units["dtype"]},
        "contenders": rows,
        "ratios": {n: rows["tinygrad"]["tokens_per_second"] / rows[n]["tokens_per_second"] for n in args.against},
        "profile": kernel_rows,
    }


def summary(
    begun: dict[str, Any], turns: list[dict[str, Any]], tokens: int, flops: int, ceiling: dict[str, float] | None
) -> dict[str, Any]:
    """The figures of a contender, from its first steps and its turns, of which each has one step too many."""
    seconds = [s for turn in turns for s in turn["seconds"][1:]]
    step = statistics.median(seconds)
    row = {
        "tokens_per_second": tokens / step,
        "step_seconds": step,
        "step_seconds_10th": float(np.percentile(seconds, 10)),
        "step_seconds_90th": float(np.percentile(seconds, 90)),
        "steps": len(seconds),
        "flops": flops / step,
        "share_of_ceiling": flops / step / ceiling["flops"] if ceiling else None,
        "first_step_seconds": begun["seconds"][0],
        "first_steps_seconds": sum(begun["seconds"]),
        "compiled": begun["compiled"],
        "first_loss": begun["first_loss"],
    }
    for kind in (*MEMORY, *(f"{kind}_largest" for kind in MEMORY)):
        if kind in begun:
            row[kind] = max(figures[kind] for figures in [begun, *turns])
    return row


def profile(port: Port, ceiling: dict[str, float] | None) -> list[dict[str, Any]]:
    """The kernels of a step by name, those first that take longest together: medians over some steps."""
    steps = []
    for _ in range(PROFILED):
        with one_by_one(port.device) as kernels:
            port.step()
        steps.append(kernels)
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for same in zip(*steps, strict=True):  # one kernel in all steps
        name, flops, moved, _ = same[0]
        row = rows.setdefault((name, flops, moved), {"name": name, "count": 0, "seconds": 0.0, "flops": 0, "bytes": 0})
        row["count"] += 1
        row["seconds"] += statistics.median(seconds for *_, seconds in same)
        row["flops"] += flops
        row["bytes"] += moved
    total = sum(row["seconds"] for row in rows.values())
    for row in rows.values():
        row["share"] = row["seconds"] / total
        least = ceiling and max(row["flops"] / ceiling["flops"], row["bytes"] / ceiling["bytes"])
        row["share_of_roofline"] = None if least is None else least / row["seconds"]
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def command() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m tinygrad_impl.bench",
        description="Measure how fast tinygrad trains, beside PyTorch on the same device.",
        epilog="example: python -m tinygrad_impl.bench --batch-size 32 --against torch-eager,torch-compile; "
        "--batch-size is of each GPU",
    )
    parser.add_argument("--preset", choices=PRESETS, default="gpt2", help="the model's size (default: %(default)s)")
    parser.add_argument("--batch-size", type=integer(1), metavar="N", help="windows in a step (default: as train)")
    parser.add_argument("--seq-len", type=integer(1), metavar="N", help="tokens in a window (default: as train)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of products (default: as train)")
    parser.add_argument("--steps", type=integer(1), metavar="N", help="to measure of each (default: 100; on a CPU 10)")
    parser.add_argument("--kernels", choices=CHOICES, default="auto", help="as train's (default: %(default)s)")
    parser.add_argument(
        "--against",
        type=peers,
        metavar="PEERS",
        help="torch-eager, torch-compile, both with a comma, or none (default: torch-compile; on a CPU torch-eager)",
    )
    parser.add_argument("--device", metavar="NAME", help="CPU, CUDA, METAL, ...; by default the best there is")
    parser.add_argument(
        OPTION,
        type=count,
        metavar="N",
        help="measure so many GPUs of this host (all: all there are), and one beside them",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--profile", action="store_true", help="show the time of each of tinygrad's kernels too")
    return parser


def main() -> None:
    args = command().parse_args()
    config, recipe = PRESETS[args.preset], RECIPES[args.preset]
    refuse_missing_folder(args.json)
    args.seq_len = args.seq_len or min(recipe.seq_len, config.n_positions)
    if args.seq_len > config.n_positions:
        raise InputError(
            f"--seq-len {args.seq_len} is over the model's context of {config.n_positions} tokens; give fewer"
        )
    wanted = args.device or DEV.device or None
    if args.gpus:
        launch("tinygrad_impl.bench", sys.argv[1:], args.gpus, wanted, ENDING)
    here = place()
    if here and args.profile:
        raise InputError("--profile is of one GPU's kernels; leave it out, or start this on one")
    device = open_device(rank_device(wanted, here) if here else args.device)
    args.batch_size = args.batch_size or recipe.batch_size
    args.dtype = args.dtype or ("bfloat16" if device == "CUDA" else "float32")
    args.steps = args.steps or (10 if device == "CPU" else 100)
    if args.against is None:
        args.against = {"CUDA": ["torch-compile"], "CPU": ["torch-eager"]}.get(device, [])
    if args.against and device not in TORCH_DEVICES:
        raise InputError(f"PyTorch is measured on CPU and CUDA, not on {device}; pass --against none")
    if args.against and importlib.util.find_spec("torch") is None:
        raise InputError("PyTorch is not installed; `pip install torch`, or pass --against none")
    backend = choose(args.kernels, config, device, bfloat16=args.dtype == "bfloat16")
    said: dict[str, Any] = {
        "command": ["python", "-m", "tinygrad_impl.bench", *sys.argv[1:], *with_option()],
        "source": revision(),
        "preset": args.preset,
        "parameters": parameter_count(config),
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "dtype": args.dtype,
        "device": device,
        "card": device_name(device),
        "kernels": backend.name,
    }
    if here is None:
        print(heading(said), flush=True)
        report(args, said | compare(args, config, device, backend))
        return
    one = {}
    if here.rank == 0:
        print(f"{heading(said)}, each of {here.size} ranks", flush=True)
        one = one_gpu(args, device)
    with joined(device, TIMEOUT) as ranks, told_of_its_end():
        found = said | compare(args, config, device, backend, ranks)
        hosts = ranks.gather(ranks.local_rank).count(0)
    if here.rank == 0:
        found |= {"ranks": here.size, "hosts": hosts, "one": one, "scaling": of_one(found, one, here.size)}
        report(args, found)


def heading(said: dict[str, Any]) -> str:
    size = f"{said['parameters'] / 1e6:.1f}M parameters, steps of {said['batch_size']} x {said['seq_len']} tokens"
    return f"{said['preset']}, {size}, {said['dtype']}, {said['kernels']} kernels; {said['card']}"


def report(args: argparse.Namespace, found: dict[str, Any]) -> None:
    if args.json:
        with atomic_write(args.json, "w") as f:
            f.write(json.dumps(found, indent=1) + "\n")
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items()), end="")
    if ceiling := found["ceiling"]:
        product = f"{ceiling['n']:.0f}^3 {ceiling['dtype']} product {tables.tera(ceiling['flops'])} TFLOP/s"
        print(f"; ceilings: {product}, copy {tables.tera(ceiling['bytes'])} TB/s", end="")
    print(f"\n\n{tables.comparison(found, WARM_UP)}")
    if found["ratios"]:
        fastest = min(found["ratios"], key=lambda name: found["ratios"][name])
        print(f"\ntinygrad trains at {found['ratios'][fastest]:.3f} x the rate of {fastest}, the fastest peer")
    if "scaling" in found:
        print(f"\n{tables.scaling(found)}")
    if args.profile:
        print(f"\n{tables.profile(found)}")


if __name__ == "__main__":
    run(main)
