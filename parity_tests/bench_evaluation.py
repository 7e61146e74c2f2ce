"""`python -m parity_tests.bench_evaluation`: how fast tinygrad evaluates, beside the harness's own `hf` model."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import load, resolve, save
from data.checkpoints.config import PRESETS
from data.checkpoints.initialize import initial_weights
from data.cli import ArgumentParser, integer, refuse_missing_folder, run
from data.evaluation.subject import Subject, batch_tokens
from data.evaluation.tasks import require_harness, specs_of
from data.files import atomic_write
from data.text.tokenizer import gpt2, of_folder
from tinygrad_impl.device import open_device
from tinygrad_impl.generate import Generator, backend_for, setup
from tinygrad_impl.losses import Evaluator
from tinygrad_impl.model import GPT2


def compared(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """Of the answers to the same questions, each a list of (log-probability, is greedy): how many of the questions have
    the same choice, the largest log-probability; how far apart two log-probabilities are at most, relatively; and where
    choices differ, how near the best two of them are to each other, in nats (a tie, if it is as little as rounding).
    """
    values = [[[response[0] for response in question] for question in side] for side in (ours, theirs)]
    differing = [(x, y) for x, y in zip(*values, strict=True) if np.argmax(x) != np.argmax(y)]
    gaps = [sorted(y)[-1] - sorted(y)[-2] for _, y in differing]
    pairs = [pair for x, y in zip(ours, theirs, strict=True) for pair in zip(x, y, strict=True)]
    apart = [abs(a[0] - b[0]) / max(abs(b[0]), 1e-9) for a, b in pairs]
    return {
        **{"questions": len(ours), "same_choices": len(ours) - len(differing), "answers": len(apart)},
        **{
            "same_greedy": sum(a[1] == b[1] for a, b in pairs),
            "furthest_apart": max(apart),
            "gaps_where_choices_differ": gaps,
        },
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def main() -> None:
    parser = ArgumentParser(
        prog="python -m parity_tests.bench_evaluation",
        description="Measure how fast tinygrad evaluates, beside the harness's own `hf` model on the same device, and "
        "compare the answers. The harness's whole work is timed: questions to tokens, scores, metrics.",
        epilog="example: python -m parity_tests.bench_evaluation --model gpt2 --tasks hellaswag --data-file val.jsonl",
    )
    parser.add_argument("--model", metavar="MODEL", help="a run, a folder or gpt2, instead of random weights")
    parser.add_argument("--preset", choices=PRESETS, default="gpt2", help="the size of random weights (%(default)s)")
    parser.add_argument("--tasks", default="stories", metavar="TASK", help="one, as evaluate's (%(default)s)")
    parser.add_argument("--data-file", type=Path, metavar="FILE", help="as evaluate's")
    parser.add_argument("--limit", type=integer(1), metavar="N", help="the first N questions (all)")
    parser.add_argument("--batch-size", type=integer(1), action="append", metavar="N", help="of hf; may be repeated")
    parser.add_argument("--turns", type=integer(1), default=2, metavar="N", help="of each; the first compiles")
    parser.add_argument("--device", help="CPU or CUDA; by default the best there is")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="as evaluate's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    require_harness()
    refuse_missing_folder(args.json)
    specs = specs_of(args.tasks, args.data_file)
    with ExitStack() as stack:
        if args.model:
            folder = resolve(args.model)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            save(folder, PRESETS[args.preset], initial_weights(PRESETS[args.preset], 0, 0.2), gpt2())
        found = measured(args, folder, specs)
    if args.json:
        with atomic_write(args.json, "w") as f:
            f.write(json.dumps(found, indent=1) + "\n")
    print("\n                 seconds  first turn  hf's seconds / these")
    for name, row in found["contenders"].items():
        print(f"{name:<15}{row['seconds']:9.1f}  {row['first']:10.1f}  {row['ratio']:20.2f}")
    for key, value in found["answers"].items():
        print(f"{key.replace('_', ' ')}: {value}")


def measured(args: Any, folder: Path, specs: Sequence[Any]) -> dict[str, Any]:
    """The seconds of each contender, which take turns, and what the answers have in common."""
    from data.evaluation.harness import Tasks, answers, harness_own  # here, because it takes long

    config, arrays = load(folder)
    device, tokenizer = open_device(args.device), of_folder(folder, config.vocab_size)
    backend = backend_for(args.dtype, config, device)
    model = GPT2(config, {name: a.astype(np.float32) for name, a in arrays.items()})
    generator = Generator(model, backend, tokenizer.vocab_size, tokenizer.eot)
    losses = Evaluator(model, backend).of_tokens
    subject = Subject(losses, generator, tokenizer, config.context, batch_tokens(device))
    said = setup(args.model or f"{args.preset}, random weights", config, device, backend)
    print(f"{said}; {args.tasks}", flush=True)
    tasks = Tasks(specs)
    contenders: dict[str, Callable[[], Any]] = {"tinygrad": lambda: tasks(subject, args.limit)}
    dtype = "bfloat16" if backend.dtype else "float32"
    settings = {"device": device.lower(), "dtype": dtype, "max_length": config.context}
    for size in args.batch_size or ([8] if device == "CPU" else [32, 128, 512]):
        own = harness_own(folder, batch_size=size, **settings)
        contenders[f"hf, batch {size}"] = lambda own=own: tasks.by(own, args.limit)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    said_by: dict[str, Any] = {}
    for _ in range(args.turns):
        for name, work in contenders.items():
            results, spent = timed(work)
            seconds[name].append(spent)
            [said_by[name]] = answers(results).values()
    median = {name: statistics.median(of_it[1:] or of_it) for name, of_it in seconds.items()}
    best = min((name for name in contenders if name != "tinygrad"), key=lambda name: median[name])
    rows = {
        name: {"seconds": median[name], "first": seconds[name][0], "ratio": median[best] / median[name]}
        for name in contenders
    }
    return {"what": said, "tasks": args.tasks, "limit": args.limit, "contenders": rows, "best_hf": best} | {
        "answers": compared(said_by["tinygrad"], said_by[best])
    }


if __name__ == "__main__":
    run(main)
