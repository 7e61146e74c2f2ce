"""How fast the port trains beside PyTorch: `python -m tinygrad_impl.bench`.

The same work by turns, on one device in one run: whole steps of the same model from the same random weights, on the
same random tokens, with forward, backward, clipping and AdamW. tinygrad computes them as `tinygrad_impl.train` does,
with all that it does on the host; PyTorch as torch_ref/bench_worker.py says, in a process of its own.

Under torchrun rank 0 first measures one GPU by itself, while the others compute nothing. Then each rank trains by
itself, all at once, which tells what is lost because all are busy; and then they train together, tinygrad's ranks and
PyTorch's. A rate is the tokens of all ranks in a turn by the seconds until the last of them is through. What has been
measured is in --json after every turn, and is shown when this is cut off.
"""

import argparse
import importlib.metadata
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad.helpers import DEV

from data.checkpoints.config import PRESETS, GPT2Config, flops_a_token, parameter_count
from data.checkpoints.initialize import shared_weights
from data.cli import ArgumentParser, InputError, Progress, integer, refuse_missing_folder, run
from data.launch import OPTION, count, launch, with_option
from data.ranks import ALONE, Place, Ranks, joined, place, rank_device
from data.runs.options import RECIPES
from data.runs.revision import revision
from tinygrad_impl import bench_tables as tables
from tinygrad_impl.backend import CHOICES, Backend, choose
from tinygrad_impl.bench_peers import Worker, meeting, peers, worker
from tinygrad_impl.bench_port import WARM_UP, Port, product_ceiling
from tinygrad_impl.bench_ranks import MEMORY, Kept, of_all, of_this_host, summed, told_of_its_end, turn
from tinygrad_impl.device import device_name, open_device
from tinygrad_impl.internals import one_by_one

TORCH_DEVICES = {"CPU": "cpu", "CUDA": "cuda"}  # PyTorch's names of tinygrad's devices
SEED, BATCHES = 1337, 4  # of weights and tokens; how many the steps take in turn
ROUNDS = 5  # turns of each
AT_ONCE = 2  # of them, where each rank trains by itself at the same time
PROFILED = 5  # steps
ENDING = 30.0  # seconds that ranks have to end
TIMEOUT = 3600.0  # seconds that a rank waits for another, which may be measuring its one GPU, or compiling


def compare(
    args: argparse.Namespace,
    config: GPT2Config,
    device: str,
    backend: Backend,
    weights: str,
    ranks: Ranks = ALONE,
    apart: bool = False,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """All figures. The contenders take turns, in one order and then in the other, because clocks drift with heat. After
    each turn `keep` is given what is known by then.

    apart: each rank trains by itself, at the same time as the others, and tinygrad in a process that ends with this.
    """
    B, T = args.batch_size, args.seq_len
    tokens = np.random.default_rng(SEED + ranks.rank).integers(0, config.vocab_size, (BATCHES, B, T + 1), np.int32)
    rounds = [len(part) for part in np.array_split(range(args.steps), min(ROUNDS, args.steps))]
    at_once = apart and ranks.size > 1
    rounds = rounds[:AT_ONCE] if at_once else rounds
    warm_up = 1 if at_once else WARM_UP  # what it compiles was compiled before
    names = ["tinygrad", *args.against]
    step = ranks.size * B * T  # tokens
    flops = flops_a_token(config, T) * step
    together = ALONE if apart else ranks
    meetings = [meeting(together) for _ in args.against]
    with ExitStack() as stack:
        shown: dict[str, Any] = {"unit": "turn", "disable": ranks.rank > 0}
        shown["desc"] = tables.how_many(device, ranks.size, apart)
        progress = stack.enter_context(Progress(total=len(names) * (1 + len(rounds)), **shown))
        file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "tokens.npy")
        np.save(file, tokens)
        workers = {n: stack.enter_context(worker(n, where)) for n, where in zip(args.against, meetings, strict=True)}
        given = {"config": asdict(config), "weights": weights, "tokens": str(file), "dtype": args.dtype}
        begun, contenders = {}, dict[str, Port | Worker]()
        for name, peer in workers.items():  # before tinygrad, which gives none of its memory back
            progress.set_postfix_str(f"{name} begins")
            arguments = given | {"device": TORCH_DEVICES[device], "compile": name == "torch-compile"}
            arguments |= {"ranks": True} if together.size > 1 else {}
            begun[name] = of_all(peer.ask("build", warm_up=warm_up, **arguments), ranks)
            progress.update()
        progress.set_postfix_str("tinygrad begins")
        if apart:
            port = stack.enter_context(worker("tinygrad"))
            ours = {"device": device, "kernels": backend.name, "arch": args.arch}
            figures = port.ask("build", warm_up=warm_up, **given, **ours)
            contenders["tinygrad"] = port
        else:
            contenders["tinygrad"] = own = Port(config, weights, tokens, device, backend, ranks)
            figures = own.figures
        begun["tinygrad"] = of_all(figures, ranks)
        contenders |= workers
        progress.update()
        referee = next(iter(workers.values()), None)
        if referee is None and device in TORCH_DEVICES and importlib.util.find_spec("torch"):
            referee = stack.enter_context(worker("torch"))
        # PyTorch's products are of the instructions that the GPU at hand has
        other = {"arch": backend.gpu.arch} if args.arch and backend.gpu else {}
        units = {"device": TORCH_DEVICES.get(device), "dtype": args.dtype if device == "CUDA" else "float32"}

        versions = {"tinygrad": importlib.metadata.version("tinygrad")}
        for name in args.against:
            versions |= begun[name]["versions"]
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        ceilings = list[dict[str, float]]()

        def found() -> dict[str, Any]:
            ceiling = {key: statistics.median(c[key] for c in ceilings) for key in ceilings[0]} if ceilings else None
            rows = {n: summary(begun[n], turns[n], step, flops, ceiling) for n in names if turns[n]}
            ours = rows.get("tinygrad", {}).get("tokens_per_second")
            return {
                "versions": versions,
                "flops_a_step": flops,
                "ceiling": ceiling and ceiling | {"dtype": units["dtype"]} | other,
                "turns": len(rounds),
                "contenders": rows,
                "ratios": {n: ours / rows[n]["tokens_per_second"] for n in args.against if ours and n in rows},
                "profile": None,
            }

        for i, steps in enumerate(rounds):
            for name in reversed(names) if i % 2 else names:
                progress.set_postfix_str(name, refresh=False)
                turns[name].append(turn(contenders[name], steps, ranks))
                progress.update()
                keep(found())
            if referee and not at_once:
                ceiling = referee.ask("ceilings", **units)
                if args.arch and backend.gpu:
                    ceiling |= product_ceiling(backend.gpu, device)
                ceilings.append(summed(ceiling, ranks))
        result = found()
        if args.profile:
            result["profile"] = profile(own, result["ceiling"])
    keep(result)
    return result


def summary(
    begun: dict[str, Any], turns: list[dict[str, Any]], tokens: int, flops: int, ceiling: dict[str, float] | None
) -> dict[str, Any]:
    """The figures of a contender, from its first steps and its turns. The rate is the tokens of all ranks in a turn by
    the seconds on the clock that it took, the median over turns; percentiles are of single steps, of all ranks.
    """
    ranks = len(turns[0]["seconds"]) // turns[0]["steps"]
    step = statistics.median(turn["wall_seconds"] / turn["steps"] for turn in turns)
    single = [second for turn in turns for second in turn["seconds"]]
    row = {
        "tokens_per_second": tokens / step,
        "step_seconds": step,
        **{f"step_seconds_{p}th": float(np.percentile(single, p)) for p in (10, 50, 90)},
        "steps": len(single) // ranks,
        "turns": len(turns),
        "flops": flops / step,
        "share_of_ceiling": flops / step / ceiling["flops"] if ceiling else None,
        "first_step_seconds": max(begun["seconds"][:ranks]),
        "first_steps_seconds": sum(begun["seconds"]) / ranks,
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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matmuls (default: as train)")
    parser.add_argument(
        "--steps", type=integer(1), metavar="N", help="steps to measure per contender (default: 100; on a CPU 10)"
    )
    parser.add_argument("--kernels", choices=CHOICES, default="auto", help="as train's (default: %(default)s)")
    parser.add_argument(
        "--arch",
        metavar="ARCH",
        help="sm_80, sm_86 or sm_89: compile and choose the fused kernels as for such a GPU, an older one than that at "
        "hand; with a number of multiprocessors if you like: sm_80:108",
    )
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
    backend = choose(args.kernels, config, device, bfloat16=args.dtype == "bfloat16", arch=args.arch)
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
    if args.arch and backend.gpu:
        said |= {"arch": backend.gpu.arch, "multiprocessors": backend.gpu.multiprocessors}
    kept = Kept(args, said)
    with ExitStack() as stack:
        if here is None or here.rank == 0:
            stack.enter_context(told_of_its_end())
        if here is None:
            print(heading(said), flush=True)
            stack.enter_context(shown_when_cut_off(kept, args))
            weights = stack.enter_context(shared_weights(config, SEED))
            compare(args, config, device, backend, weights, keep=lambda found: kept.add(**found))
        else:
            measure_ranks(args, config, device, backend, here, kept, stack)
    if here is None or here.rank == 0:
        kept.add(finished=True)
        report(args, kept.found)


def measure_ranks(
    args: argparse.Namespace,
    config: GPT2Config,
    device: str,
    backend: Backend,
    here: Place,
    kept: Kept,
    stack: ExitStack,
) -> None:
    """One GPU by itself, then all of them, each by itself at once, then all together; what is known goes to `kept`."""
    first, weights = here.rank == 0, None
    if first:
        print(f"{heading(kept.found)}, each of {here.size} ranks", flush=True)
        kept.add(ranks=here.size)
        print(f"making {kept.found['parameters']:,} random weights", flush=True)
    if here.local_rank == 0:
        weights = stack.enter_context(shared_weights(config, SEED))
    if first:
        assert weights
        with shown_when_cut_off(kept, args):
            keep = lambda found: kept.add(one=found)  # noqa: E731
            compare(args, config, device, backend, weights, apart=True, keep=keep)
        print(tables.rates(f"{tables.how_many(device, 1, True)}", kept.found["one"]), flush=True)
    with (
        joined(device, TIMEOUT) as ranks,
        told_of_its_end(here.rank),
        shown_when_cut_off(kept if first else None, args),
    ):
        hosts, own = ranks.gather(ranks.local_rank).count(0), of_this_host(weights, ranks)
        if first:
            kept.add(hosts=hosts)

        def of_rank_0(name: str = "") -> Callable[[dict[str, Any]], None]:
            return lambda found: kept.add(**({name: found} if name else found)) if first else None

        apart = compare(args, config, device, backend, own, ranks, apart=True, keep=of_rank_0("at_once"))
        if first:
            print(tables.rates(tables.how_many(device, ranks.size, True), apart), flush=True)
        compare(args, config, device, backend, own, ranks, keep=of_rank_0())


@contextmanager
def shown_when_cut_off(kept: Kept | None, args: argparse.Namespace) -> Iterator[None]:
    """Whatever ends this before it is through, what was measured by then is shown."""
    try:
        yield
    except BaseException:
        if kept:
            report(args, kept.found)
            sys.stdout.flush()
        raise


def heading(said: dict[str, Any]) -> str:
    size = f"{said['parameters'] / 1e6:.1f}M parameters, steps of {said['batch_size']} x {said['seq_len']} tokens"
    kernels = f"{said['kernels']} kernels"
    if "arch" in said:
        kernels += f" for {said['arch']} with {said['multiprocessors']} multiprocessors"
    return f"{said['preset']}, {size}, {said['dtype']}, {kernels}; {said['card']}"


def report(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Shows what there is of the figures."""
    newest = next((found[key] for key in ("at_once", "one") if key in found), {}) if "versions" not in found else found
    if not newest.get("contenders") and not found.get("one", {}).get("contenders"):
        return
    print(", ".join(f"{name} {version}" for name, version in newest["versions"].items()), end="")
    if ceiling := newest["ceiling"]:
        product = f"{ceiling['n']:.0f}^3 {ceiling['dtype']} product {tables.tera(ceiling['flops'])} TFLOP/s"
        product += f" (our GEMM for {ceiling['arch']})" if "arch" in ceiling else ""
        print(f"; ceilings: {product}, copy {tables.tera(ceiling['bytes'])} TB/s", end="")
    print()
    size = found.get("ranks", 1)
    for figures, gpus, apart in ((found.get("one", {}), 1, True), (found, size, False)):
        if figures.get("contenders"):
            unfinished = tables.unfinished(figures)
            print(f"\n{tables.how_many(found['device'], gpus, apart)}{unfinished}")
            print(tables.comparison(figures, WARM_UP))
    if found.get("ratios"):
        fastest = min(found["ratios"], key=lambda name: found["ratios"][name])
        print(f"\ntinygrad trains at {found['ratios'][fastest]:.3f} x the rate of {fastest}, the fastest peer")
    if "scaling" in found:
        print(f"\n{tables.scaling(found)}")
    if found.get("profile"):
        print(f"\n{tables.profile(found)}")


if __name__ == "__main__":
    run(main)
