"""`python -m tinygrad_impl.evaluate` and `python -m torch_ref.evaluate`: what both of them do."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import load, refuse_damaged, resolve
from data.checkpoints.config import GPT2Config
from data.checkpoints.sums import weights_sha256
from data.checkpoints.tensors import read_json
from data.cli import ArgumentParser, command, integer, refuse_missing_folder
from data.evaluation.scores import chances, keep, score_rows
from data.evaluation.subject import Subject
from data.evaluation.tasks import require_harness, specs_of
from data.files import atomic_write
from data.ranks import refuse_ranks
from data.runs.run_folder import run_of
from data.text.tokenizer import Tokenizer, of_folder

# the options, the model and its tokenizer -> what computes it, facts for the run, and a line that says what it is
Opened = tuple[Subject, Mapping[str, Any], str]
Open = Callable[[Namespace, GPT2Config, dict[str, np.ndarray], Tokenizer], Opened]


def parser(prog: str, framework: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s --model MODEL --tasks TASK,... [options]",
        description=f"Score a model, computed by {framework}, on tasks of lm-evaluation-harness.",
        epilog=f"example: {prog} --model runs/mine --tasks stories --limit 50",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a run, a folder of Hugging Face's form, or gpt2",
    )
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="TASK,...",
        help="names that the harness knows (with data of the hub), .yaml files, or stories, which needs no network",
    )
    parser.add_argument("--limit", type=integer(1), metavar="N", help="only the first N questions of each task (all)")
    parser.add_argument(
        "--data-file",
        type=Path,
        metavar="FILE",
        help=".jsonl(.gz): the questions of the one task of --tasks, instead of the hub's",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write scores, and each answer, there too")
    parser.add_argument("--device", help="by default the best there is")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of matmuls (bfloat16 on an NVIDIA GPU, else float32)"
    )
    return parser


def evaluate(args: Namespace, package: str, open: Open) -> None:
    """Runs the tasks, prints the scores, and keeps them in the run, where the model is one of a run."""
    refuse_ranks("evaluation")
    require_harness()
    specs = specs_of(args.tasks, args.data_file)
    refuse_missing_folder(args.json)
    folder = resolve(args.model)
    weights = weights_sha256(folder)  # first: training may change what is in a run's folder meanwhile
    config, arrays = load(folder if run_of(args.model) else args.model)
    refuse_damaged(args.model, arrays)
    tokenizer = of_folder(folder, config.vocab_size)
    subject, facts, said = open(args, config, {n: a.astype(np.float32) for n, a in arrays.items()}, tokenizer)
    print(f"{args.model}, {said}; loading {args.tasks}", file=sys.stderr, flush=True)
    from data.evaluation.harness import Tasks, answers, table  # here, because it takes long

    results = Tasks(specs, subject.context)(subject, args.limit)
    rows = score_rows(results)
    print(table(results), *chances(results), sep="\n")
    if args.json:
        with atomic_write(args.json, "w") as f:
            f.write(json.dumps({"model": args.model, "scores": rows, "answers": answers(results)}, indent=1) + "\n")
        print(f"Written to {args.json}")
    if run := run_of(args.model):
        trainer = folder / "trainer.json"
        step = read_json(trainer).get("step") if trainer.is_file() else None
        file = keep(run, rows, {"step": step, "weights": weights, "by": package, "limit": args.limit, **facts})
        print(f"Kept in {file}; `{command('data.runs.report', run)}` shows it")
