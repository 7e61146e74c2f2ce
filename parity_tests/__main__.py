"""`python -m parity_tests`: do tinygrad and PyTorch compute the same, on this model, device and dtype?"""

import sys
import time
from pathlib import Path

from data.checkpoints.checkpoint import load
from data.checkpoints.config import PRESETS, parameter_count
from data.cli import ArgumentParser, InputError, integer, refuse_missing_folder, run
from data.files import atomic_write
from parity_tests.bounds import Row, excess
from parity_tests.certificate import as_json, certificate
from parity_tests.proof import prove
from parity_tests.report import html
from parity_tests.setting import Setting
from parity_tests.weights import hard_weights, random_weights
from tinygrad_impl.backend import CHOICES, choose
from tinygrad_impl.device import device_name, open_device

SHOWN = 15
CHECKS = {
    "forward": "activations at every edge between sub-layers, and the loss",
    "backward": "gradients at those edges",
    "gradient": "gradient of every parameter, out of the graph that trains",
    "training": "AdamW: parameters, both moments, the gradient's norm; nothing where that or the loss is not finite",
    "generation": "logits of every step, with a cache, in the context and beyond it; the tokens drawn",
}


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m parity_tests",
        description="Prove that tinygrad computes what PyTorch does, or name the first sub-layer that does not. "
        "Exit code 0 if they are equal, 1 if not.",
        epilog="example: python -m parity_tests --model runs/mine --dtype float32 --html parity.html",
    )
    parser.add_argument(
        "--model", default="tiny", help=f"a folder, gpt2, or random weights of a size: {', '.join(PRESETS)}"
    )
    parser.add_argument("--hard", action="store_true", help="random weights with the outliers that trained ones have")
    parser.add_argument("--device", help="CPU, CUDA, METAL, ...; by default the best there is")
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16"), default="float32", help="of tinygrad")
    parser.add_argument(
        "--kernels", choices=CHOICES, default="auto", help="of tinygrad: its own (plain), or ours (fused)"
    )
    parser.add_argument("--arch", metavar="ARCH", help="compile and choose the fused kernels as for such a GPU: sm_80")
    parser.add_argument("--seq-len", type=integer(1), default=32, metavar="N", help="tokens in a row")
    parser.add_argument("--batch-size", type=integer(1), default=2, metavar="N", help="rows in a batch")
    parser.add_argument("--steps", type=integer(1), metavar="N", help="AdamW steps; 10, or 3 where not in float64")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of the tokens and random weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the certificate there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots there")
    return parser


def table(rows: list[Row]) -> str:
    """The rows nearest to their bounds, or furthest over them."""
    lines = [f"{'check':10} {'tensor':34} {'error':>8} {'torch own':>9} {'allowed':>8} {'of it':>6}"]
    for row in sorted(rows, key=excess, reverse=True)[:SHOWN]:
        own = "" if row.own is None else f"{row.own:.1e}"
        mark = "" if row.passed else "  FAILS"
        share = f"{excess(row):6.0%}" if excess(row) < 100 else f"{excess(row):6.0e}"
        lines.append(f"{row.check:10} {row.name:34} {row.error:8.1e} {own:>9} {row.allowed:8.1e} {share}{mark}")
    return "\n".join(lines)


def main() -> None:
    args = parser().parse_args()
    if args.model in PRESETS and not (args.model == "gpt2" and not args.hard) and not Path(args.model).exists():
        config = PRESETS[args.model]
        weights = (hard_weights if args.hard else random_weights)(config, args.seed)
    elif args.hard:
        raise InputError(f"--hard makes random weights, and {args.model} has its own; leave out one of them")
    else:
        config, weights = load(args.model)
    if args.seq_len > config.n_positions:
        raise InputError(f"--seq-len {args.seq_len} is over the context of {config.n_positions} tokens; give fewer")
    refuse_missing_folder(args.json, args.html)
    device = open_device(args.device)
    steps = args.steps or (10 if args.dtype == "float64" else 3)
    what = f"{args.model}, {parameter_count(config) / 1e6:.1f}M parameters, {device_name(device)}, {args.dtype}"
    print(f"{what}, {args.batch_size} x {args.seq_len} tokens; reference: PyTorch in float64")
    started = time.perf_counter()
    backend = choose(args.kernels, config, device, args.dtype == "bfloat16", args.arch)
    setting = Setting(config, weights, args.dtype, device, backend)
    rows, culprit = prove(setting, args.batch_size, args.seq_len, args.seed, steps)
    seconds = time.perf_counter() - started

    print(f"\n{table(rows)}\n")
    for check, meaning in CHECKS.items():
        ours = [row for row in rows if row.check == check]
        print(f"{check:10} {len(ours):4} compared, {sum(not row.passed for row in ours):4} failed: {meaning}")
    more = {"device": device, "card": device_name(device), "batch_size": args.batch_size, "seq_len": args.seq_len}
    more |= {"arch": args.arch} if args.arch else {}
    more |= {"seed": args.seed, "steps": steps, "seconds": round(seconds, 1)}
    proof = certificate(setting, rows, culprit, **more, command=["python", "-m", "parity_tests", *sys.argv[1:]])
    proof["model"] = {"source": args.model} | proof["model"]
    if args.json:
        with atomic_write(args.json, "w") as f:
            f.write(as_json(proof))
    if args.html:
        with atomic_write(args.html, "w") as f:
            f.write(html(proof))
    print(f"\n{'EQUAL' if culprit is None else f'DIFFERENT: {culprit}'} ({seconds:.0f} s)")
    sys.stdout.flush()
    if culprit is not None:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
