"""`python -m parity_tests.bench_evaluation`: how fast tinygrad evaluates, beside the harness's own `hf` model."""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.checkpoints.checkpoint import load, resolve, save
from data.checkpoints.config import PRESETS
from data.checkpoints.initialize import initial_weights
from data.cli import ArgumentParser, InputError, integer, refuse_missing_folder, run
from data.evaluation.scores import score_rows
from data.evaluation.subject import Subject, batch_tokens
from data.evaluation.tasks import require_harness, specs_of
from data.files import atomic_write
from data.text.tokenizer import gpt2, of_folder
from tinygrad_impl.device import open_device
from tinygrad_impl.generate import Generator, backend_for, setup
from tinygrad_impl.losses import Evaluator
from tinygrad_impl.model import GPT2

WARM_UP = 16  # questions

Answers = list[list[float]]  # of each question the log-probability of each choice, in nats


def compared(ours: Answers, theirs: Answers, sizes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Of the answers to the same questions: how far apart two log-probabilities are, in nats, the median and at most;
    how many questions have the same choice, by log-probability and by that divided by `sizes`, the characters of
    each choice; and where the choice differs, by how much their likeliest choice leads the next, in nats or in nats a
    character: a tie, if that is no more than log-probabilities are apart.
    """
    apart = [abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    found: dict[str, Any] = {"questions": len(ours), "apart_median": statistics.median(apart), "apart_most": max(apart)}
    for name, divided in (("acc", False), ("acc_norm", True)):
        leads = []
        for x, y, size in zip(ours, theirs, sizes, strict=True):
            by = np.array(size if divided else [1] * len(x))
            if np.argmax(x / by) != np.argmax(y / by):
                second, first = np.sort(y / by)[-2:]
                leads.append(float(first - second))
        found |= {f"same_{name}": len(ours) - len(leads), f"leads_{name}": sorted(leads)}
    return found


def main() -> None:
    parser = ArgumentParser(
        prog="python -m parity_tests.bench_evaluation",
        description="Measure how fast tinygrad evaluates, beside the harness's own `hf` model on the same device, and "
        "compare the answers. The harness's whole work is timed: questions to tokens, scores, metrics. hf answers all "
        "questions at the batch size that was fastest on --part of them.",
        epilog="example: python -m parity_tests.bench_evaluation --model gpt2 --tasks hellaswag --data-file val.jsonl",
    )
    parser.add_argument("--model", metavar="MODEL", help="a run, a folder or gpt2, instead of random weights")
    parser.add_argument("--preset", choices=PRESETS, default="gpt2", help="the size of random weights (%(default)s)")
    parser.add_argument("--tasks", default="stories", metavar="TASK", help="one, as evaluate's (%(default)s)")
    parser.add_argument("--data-file", type=Path, metavar="FILE", help="as evaluate's")
    parser.add_argument("--limit", type=integer(1), metavar="N", help="the first N questions (all)")
    parser.add_argument("--batch-size", type=integer(1), action="append", metavar="N", help="of hf; may be repeated")
    parser.add_argument(
        "--part", type=integer(1), default=1000, metavar="N", help="questions to try hf's batch sizes on (%(default)s)"
    )
    parser.add_argument(
        "--float32",
        type=integer(1),
        metavar="N",
        help="questions that hf answers in float32 too, if --dtype is not (all)",
    )
    parser.add_argument("--turns", type=integer(1), default=2, metavar="N", help="of tinygrad; the first compiles")
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
            save(folder, PRESETS[args.preset], initial_weights(PRESETS[args.preset], 0, 0.05), gpt2())
        found = measured(args, folder, specs)
    if args.json:
        with atomic_write(args.json, "w") as f:
            f.write(json.dumps(found, indent=1) + "\n")


def measured(args: Any, folder: Path, specs: Sequence[Any]) -> dict[str, Any]:
    """The seconds of each contender, one after another, and what the answers have in common."""
    from data.evaluation.harness import Tasks, harness_own  # here, because it takes long

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
    dtype = "bfloat16" if backend.dtype else "float32"
    rows: list[dict[str, Any]] = []

    def timed(name: str, model: Any, limit: int | None, turns: int = 1) -> tuple[float, dict[str, Any]]:
        seconds = []
        for _ in range(turns):
            started = time.perf_counter()
            results = tasks(model, limit) if model is subject else tasks.by(model, limit)
            seconds.append(time.perf_counter() - started)
        warm = statistics.median(seconds[1:] or seconds)
        rows.append({"name": name, "questions": len(answered(results)), "seconds": warm, "first": seconds[0]})
        first = f" ({seconds[0]:.1f} the first time)" if turns > 1 else ""
        print(f"{name}: {rows[-1]['questions']} questions in {warm:.1f} s{first}; {scores_of(results)}", flush=True)
        return warm, results

    def hf(size: int, dtype: str) -> Any:
        return harness_own(folder, batch_size=size, device=device.lower(), max_length=config.context, dtype=dtype)

    ours_warm, ours = timed(f"tinygrad, {dtype}", subject, args.limit, args.turns)
    part = min(args.part, args.limit or args.part)
    tried = {}
    for size in args.batch_size or ([8] if device == "CPU" else [32, 128, 512]):
        with suppress(torch.OutOfMemoryError):
            own = hf(size, dtype)
            tasks.by(own, min(part, WARM_UP))
            tried[size], _ = timed(f"hf, {dtype}, batch {size}", own, part)
    if not tried:
        raise InputError("hf has no memory for any of these batch sizes; give a smaller --batch-size")
    best = min(tried, key=lambda size: tried[size])
    theirs_warm, theirs = timed(f"hf, {dtype}, batch {best}", hf(best, dtype), args.limit)
    print(f"hf takes {theirs_warm / ours_warm:.2f} x tinygrad's time", flush=True)
    sizes = choice_sizes(tasks, theirs)
    pairs = {f"tinygrad beside hf, {dtype}": compared(answered(ours), answered(theirs), sizes)}
    tell(pairs)
    if dtype != "float32":
        most = args.float32 or args.limit
        judge = answered(timed(f"hf, float32, batch {best}", hf(best, "float32"), most)[1])
        count = len(judge)
        against = {
            f"{name}, {dtype}, beside hf, float32": compared(answered(found)[:count], judge, sizes[:count])
            for name, found in (("tinygrad", ours), ("hf", theirs))
        }
        tell(against)
        pairs |= against
    scores = {name: scores_of(found) for name, found in (("tinygrad", ours), ("hf", theirs))}
    return {
        **{"what": said, "tasks": args.tasks, "limit": args.limit, "contenders": rows},
        **{"best_batch": best, "ratio": theirs_warm / ours_warm, "answers": pairs, "scores": scores},
    }


def tell(pairs: dict[str, Any]) -> None:
    for pair, values in pairs.items():
        print(pair, *(f"  {key.replace('_', ' ')}: {value}" for key, value in values.items()), sep="\n", flush=True)


def answered(results: dict[str, Any]) -> Answers:
    """The log-probabilities of one task's choices."""
    from data.evaluation.harness import answers

    [of_task] = answers(results).values()
    return [[response[0] for response in question] for question in of_task]


def scores_of(results: dict[str, Any]) -> dict[str, float]:
    return {row["metric"]: round(row["value"], 4) for row in score_rows(results)}


def choice_sizes(tasks: Any, results: dict[str, Any]) -> list[list[int]]:
    """How many characters each choice of each question has: acc_norm divides by them."""
    [(name, samples)] = results["samples"].items()
    choices = tasks.loaded["tasks"][name].doc_to_choice
    return [[len(choice) for choice in choices(sample["doc"])] for sample in samples]


if __name__ == "__main__":
    run(main)
