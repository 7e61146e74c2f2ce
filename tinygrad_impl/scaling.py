"""What a training step costs on many GPUs, from what was measured on few: `python -m tinygrad_impl.scaling`.

Data parallel with ZeRO-1, as the trainer does it. While the last micro-batch's backward pass computes, the float32
gradients of its layers are reduce-scattered as soon as they are there, those of the embeddings at its end; then every
GPU updates its part of the weights, which are all-gathered as kernels read them. In seconds and bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any

from data.checkpoints.config import PRESETS, GPT2Config, flops_a_token, parameter_shapes
from data.cli import ArgumentParser, InputError, real, refuse_missing_folder, run
from data.files import atomic_write
from tinygrad_impl.flat import buckets

T = 1024  # tokens in a window
GLOBAL = 2**19  # tokens in an update where they are the same for any number of GPUs: 0.5M, as GPT-2 was trained
GPUS = tuple(2**i for i in range(10))
BACKWARD = 2 / 3  # of a micro-batch's time: it has twice the products of the forward pass


@dataclass(frozen=True)
class Network:
    """Between GPUs: bytes a second of a GPU; seconds of a `call` of a collective and of a ring's steps."""

    per_host: int = 8
    within: float = 320e9  # this and `call`: reduce-scatters of 28, 85 and 157 MB on four H200, within 1 %
    between: float = 50e9  # 400 Gb/s for each GPU: given, not measured
    call: float = 25e-6
    step_within: float = 3.4e-6  # this and the next: what NCCL itself reckons with (src/graph/tuning.cc: Ring, Simple)
    step_between: float = 14e-6
    contention: float = 0.7  # what computing loses of the time in which something is sent: four H200, 61.9 and 62.2 ms
    slowest: float = 0.04  # of computing: each step waits for the GPU that is slowest in it: fitted to four H200


@dataclass(frozen=True)
class Work:
    """What one GPU takes: `fixed` a micro-batch of up to `micro` windows, `token` for each token, `adamw` an update."""

    config: GPT2Config
    micro: int
    fixed: float
    token: float
    adamw: float


GPT2, XL = PRESETS["gpt2"], PRESETS["gpt2-xl"]
# fitted to one H200: 59.4 ms with 32 windows, 114.5 ms with 64, of which AdamW takes 1.2 to 1.7 ms
SMALL = Work(GPT2, micro=32, fixed=2.93e-3, token=1.68e-6, adamw=1.45e-3)
# one H200: 104.7 ms with 4 windows, of which AdamW is taken to be what its memory traffic takes; `fixed` is by layers
LARGE = Work(XL, micro=4, fixed=SMALL.fixed * XL.n_layer / GPT2.n_layer, token=1.952e-5, adamw=13e-3)
WORKS = {"gpt2": SMALL, "gpt2-xl": LARGE}


def collective(network: Network, gpus: int, size: float, hierarchical: bool = False) -> float:
    """A reduce-scatter or an all-gather of `size` bytes in all; an all-reduce is one and then the other.

    As a ring: gpus - 1 steps, in which each GPU sends (gpus - 1) / gpus of it (Patarasuk & Yuan 2009), at the rate of
    the slowest link; there are as many rings as GPUs on a host, so each has a network card. Or hierarchical: rings in
    the hosts, then rings of one GPU of each host, so in far fewer steps (Chan et al. 2007, on meshes).
    """
    if gpus == 1:
        return 0.0
    local = min(gpus, network.per_host)
    hosts = ceil(gpus / local)
    if hierarchical and hosts > 1:
        return collective(network, local, size) + collective(replace(network, per_host=1), hosts, size / local)
    rate = network.within if hosts == 1 else min(network.within, local * network.between)
    latency = (gpus - hosts) * network.step_within + (hosts - 1) * network.step_between  # as NCCL counts them
    return network.call + latency + (gpus - 1) / gpus * size / rate


def sent(config: GPT2Config) -> list[tuple[int, float, int]]:
    """The trainer's buckets as they are sent: their elements, the share of the backward pass after which the gradients
    are there, and the bytes of an element as kernels read it.
    """
    *layers, rest = buckets(parameter_shapes(config))
    head = 6 * config.vocab_size * config.n_embd / flops_a_token(config, T)  # which comes before all layers
    begins = [int(bucket.name.removeprefix("h.")) / config.n_layer for bucket in layers]  # with the layer of its name
    found = [(bucket.size, 1 - (1 - head) * begin, 2) for bucket, begin in zip(layers, begins, strict=True)]
    return [*found, (rest.size, 1.0, 4)]


def in_turn(ready: Sequence[float], costs: Sequence[float]) -> float:
    """When all is sent, of which each is ready at some time and none is sent before the one before it is."""
    end = 0.0
    for time, cost in zip(ready, costs, strict=True):
        end = max(end, time) + cost
    return end


def step(work: Work, network: Network, gpus: int, tokens: int, hierarchical: bool = False) -> tuple[float, float]:
    """An update of so many tokens on each GPU, and how long nothing computes in it because something is sent."""
    computing = ceil(tokens / (work.micro * T)) * work.fixed + tokens * work.token
    computing *= 1 + network.slowest * (gpus > 1)
    backward = BACKWARD * (work.fixed + min(tokens, work.micro * T) * work.token)  # of the last micro-batch
    cost = partial(collective, network, gpus, hierarchical=hierarchical)
    sizes, there, read = zip(*sent(work.config), strict=True)
    costs = [cost(4 * size) for size in sizes]
    late = in_turn([share * backward for share in there], costs) - backward
    updating = work.adamw / gpus  # the embeddings first; what is updated is gathered while the rest is
    updated = [updating * done / sum(sizes) for done in accumulate(reversed(sizes))]
    back = [cost(size * width) for size, width in zip(reversed(sizes), reversed(read), strict=True)]
    gathering = in_turn(updated, back) - updating
    exposed = late + cost(0) + gathering  # the norm's few sums cost no more than any call
    return computing + network.contention * (sum(costs) - late) + updating + exposed, exposed


def efficiency(work: Work, network: Network, gpus: int, strong: bool, hierarchical: bool = False) -> float:
    """How much of `gpus` times one GPU's rate they reach: with `GLOBAL` tokens an update for all of them (strong
    scaling), or a micro-batch each (weak scaling).
    """
    tokens = GLOBAL if strong else work.micro * T
    alone, _ = step(work, network, 1, tokens)
    together, _ = step(work, network, gpus, tokens // gpus if strong else tokens, hierarchical)
    return alone / together / (gpus if strong else 1)


@dataclass(frozen=True)
class Measured:
    """A step as it was measured, in one micro-batch; `windows` are those of each GPU."""

    preset: str
    gpus: int
    hosts: int
    windows: int
    seconds: float


def check(measured: Sequence[Measured], network: Network | None = None) -> list[float]:
    """The seconds that the model has for each row. `network` has to have the bandwidth between the hosts that were
    measured, which may be imitated on one machine.
    """
    found = []
    for row in measured:
        here = replace(network or Network(), per_host=row.gpus // row.hosts)
        work = replace(WORKS[row.preset], micro=row.windows)
        found.append(step(work, here, row.gpus, row.windows * T)[0])
    return found


def measured_in(file: Path) -> list[Measured]:
    """What a file of `tinygrad_impl.bench --json` says of tinygrad: on one GPU, and on all where there were several.
    A bench that was cut off has the turns that it came to; what it did not come to is left out.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        preset, windows, length, device = (found[key] for key in ("preset", "batch_size", "seq_len", "device"))
        several = "ranks" in found
        said = [(1, 1, found.get("one", {}) if several else found)]
        said += [(found["ranks"], found.get("hosts", 1), found)] if several else []
        took = [(gpus, hosts, s.get("contenders", {}).get("tinygrad")) for gpus, hosts, s in said]
        rows = [Measured(preset, gpus, hosts, windows, row["step_seconds"]) for gpus, hosts, row in took if row]
        odd = not all(row.hosts and row.gpus % row.hosts == 0 and row.seconds > 0 for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{file} is no file of tinygrad_impl.bench --json ({e!r}); name one that is") from None
    if preset not in WORKS or length != T or device != "CUDA":
        raise InputError(
            f"{file} is of {preset} with windows of {length} on {device}; name one of {' or '.join(WORKS)}, of {T}, "
            "on GPUs (CUDA)"
        )
    if odd:
        raise InputError(
            f"{file} is of hosts with different numbers of GPUs, which the model does not have; leave it out"
        )
    if not rows:
        raise InputError(f"{file} is of a bench that was cut off before it had measured tinygrad; measure it again")
    return rows


def compared(measured: Sequence[Measured], modelled: Sequence[float]) -> str:
    """What was measured beside what the model has, a row each, and how far off it is at most."""
    lines = [f"{'':9}{'GPUs':>6}  {'windows a GPU':>13}  {'measured, ms':>12}  {'model, ms':>9}  {'error':>6}"]
    errors = [seconds / row.seconds - 1 for row, seconds in zip(measured, modelled, strict=True)]
    for row, seconds, error in zip(measured, modelled, errors, strict=True):
        gpus = f"{row.hosts} x {row.gpus // row.hosts}" if row.hosts > 1 else f"{row.gpus}"
        lines.append(f"{row.preset:9}{gpus:>6}  {row.windows:13}  {row.seconds * 1e3:12.2f}  {seconds * 1e3:9.2f}")
        lines[-1] += f"  {error:+6.1%}"
    lines.append(f"largest error: {max(errors, key=abs):+.1%}")
    return "\n".join(lines)


def table(work: Work, network: Network, strong: bool) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for gpus in GPUS:
        seconds, exposed = step(work, network, gpus, GLOBAL // gpus if strong else work.micro * T)
        rings, hierarchical = (efficiency(work, network, gpus, strong, way) for way in (False, True))
        rows.append(
            {"gpus": gpus, "seconds": seconds, "exposed": exposed, "rings": rings, "hierarchical": hierarchical}
        )
    return rows


def shown(rows: list[dict[str, float]]) -> str:
    lines = ["  GPUs  ms a step  nothing computes  of N x one: rings  hierarchical"]
    for r in rows:
        lines.append(f"{r['gpus']:6}{r['seconds'] * 1e3:11.2f}{r['exposed'] * 1e3:18.2f}")
        lines[-1] += f"{r['rings']:19.3f}{r['hierarchical']:14.3f}"
    for way in ("rings", "hierarchical"):
        ends = [next((f"from {r['gpus']} on" for r in rows if r[way] < share), "nowhere") for share in (0.9, 0.5)]
        lines.append(f"  {way}: under 0.9 {ends[0]}, under 0.5 {ends[1]}")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser(
        prog="python -m tinygrad_impl.scaling",
        description="What a training step of 124M and of gpt2-xl costs on 1 to 512 GPUs.",
        epilog="example: python -m tinygrad_impl.scaling --check bench.json",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--check",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="compare with what tinygrad_impl.bench --json has written, instead",
    )
    parser.add_argument(
        "--between",
        type=real(0, closed=False),
        metavar="GBIT",
        help="of the network between hosts, for each GPU, Gb/s (default: 400)",
    )
    args = parser.parse_args()
    refuse_missing_folder(args.json)
    network = Network() if args.between is None else replace(Network(), between=args.between / 8 * 1e9)
    if args.check:
        measured = [row for file in args.check for row in measured_in(file)]
        modelled = check(measured, network)
        print(compared(measured, modelled))
        rows = [asdict(row) | {"model": seconds} for row, seconds in zip(measured, modelled, strict=True)]
        content: dict[str, Any] = {"checked": rows}
    else:
        content = {"tables": tables(network)}
    if args.json:
        with atomic_write(args.json, "w") as f:
            f.write(json.dumps({"network": asdict(network), **content}, indent=1) + "\n")


def tables(network: Network) -> dict[str, list[dict[str, float]]]:
    """Of both models, weak and strong; printed too."""
    found = {}
    for preset, work in WORKS.items():
        for strong in (False, True):
            rows = found[f"{preset}, {'strong' if strong else 'weak'}"] = table(work, network, strong)
            size = f"{GLOBAL:,} tokens an update" if strong else f"{work.micro} x {T} tokens a GPU"
            print(f"{preset}, {size}\n{shown(rows)}")
    return found


if __name__ == "__main__":
    run(main)
