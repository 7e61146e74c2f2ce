"""How fast the port generates beside `transformers`: `python -m parity_tests.bench_generation`.

Both continue the same prompts of random tokens, greedily, by turns in one process; the first turn, which compiles, is
reported apart. Random weights are as fast as any others. In bfloat16 the two round differently, and need not write the
same tokens.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from data.checkpoints.checkpoint import save
from data.checkpoints.config import PRESETS, GPT2Config
from data.cli import ArgumentParser, InputError, Progress, integer, refuse_missing_folder, run
from data.files import atomic_write
from data.text.sampling import Sampler
from data.text.tokenizer import EOT
from parity_tests.weights import random_weights
from tinygrad_impl.backend import Backend
from tinygrad_impl.device import device_name, open_device
from tinygrad_impl.generate import Generator, backend_for
from tinygrad_impl.model import GPT2

PROMPT = 16  # tokens
TURNS = 4  # of each, the first of which only warms up


def timed(generate: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float]:
    """What it generates, and how long it took in seconds."""
    started = time.perf_counter()
    rows = generate()
    return rows, time.perf_counter() - started


def measure(
    config: GPT2Config,
    device: str,
    backend: Backend,
    batch_sizes: list[int],
    new: int,
) -> list[dict[str, Any]]:
    """Rates in tokens a second, and seconds of the first turns, of `new` tokens in each row of the batches."""
    arrays = random_weights(config, 0, 0.2)
    their_dtype, torch_device = (
        torch.bfloat16 if backend.dtype else torch.float32,
        "cuda" if device == "CUDA" else "cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), config, arrays)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=their_dtype).to(torch_device).eval()
    generator, found = Generator(GPT2(config, arrays), backend, eot=EOT), []
    with Progress(total=len(batch_sizes) * TURNS * 2, desc="generating", unit="turn") as progress:
        for rows in batch_sizes:
            prompts = np.random.default_rng(rows).integers(0, EOT, (rows, PROMPT)).tolist()

            def by_tinygrad(prompts: list[list[int]] = prompts) -> list[list[int]]:
                return generator(prompts, new, Sampler(0))

            def by_transformers(prompts: list[list[int]] = prompts) -> list[list[int]]:
                ids = torch.tensor(prompts, device=torch_device)
                options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": EOT}
                out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPT:].tolist()
                return [row[: row.index(EOT)] if EOT in row else row for row in out]

            seconds: dict[str, list[float]] = {"tinygrad": [], "transformers": []}
            for _ in range(TURNS):
                ours, spent = timed(by_tinygrad)
                seconds["tinygrad"].append(spent)
                progress.update()
                expected, spent = timed(by_transformers)
                seconds["transformers"].append(spent)
                progress.update()
            tokens = {"tinygrad": sum(map(len, ours)), "transformers": sum(map(len, expected))}
            rate = {name: tokens[name] / statistics.median(of_it[1:]) for name, of_it in seconds.items()}
            found.append(
                {"rows": rows, "new_tokens": new, "same_tokens": ours == expected}
                | {f"{name}_tokens_per_second": rate[name] for name in rate}
                | {"ratio": rate["tinygrad"] / rate["transformers"]}
                | {f"{name}_first_seconds": of_it[0] for name, of_it in seconds.items()}
            )
    return found


def main() -> None:
    parser = ArgumentParser(
        prog="python -m parity_tests.bench_generation",
        description="Measure how fast tinygrad generates, beside transformers on the same device.",
        epilog="example: python -m parity_tests.bench_generation --preset gpt2 --batch-size 64 --max-new-tokens 64",
    )
    parser.add_argument("--preset", choices=PRESETS, default="gpt2", help="the model's size (default: %(default)s)")
    parser.add_argument("--device", help="CPU, CUDA, METAL, ...; by default the best there is")
    parser.add_argument(
        "--batch-size", type=integer(1), action="append", metavar="N", help="rows; may be given many times (default: 1)"
    )
    parser.add_argument(
        "--max-new-tokens", type=integer(1), default=64, metavar="N", help="after 16 of a prompt (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="as generate's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    config = PRESETS[args.preset]
    if PROMPT + args.max_new_tokens > config.n_positions:
        most = config.n_positions - PROMPT
        raise InputError(f"after a prompt of {PROMPT}, {args.preset} has room for {most}; give fewer --max-new-tokens")
    refuse_missing_folder(args.json)
    device = open_device(args.device)
    transformers.utils.logging.disable_progress_bar()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    backend = backend_for(args.dtype, config, device)
    computed = f"{'bfloat16' if backend.dtype else 'float32'}, {backend.name} kernels"
    print(f"{args.preset} in {computed}, on {device_name(device)}, {versions}", flush=True)
    found = measure(config, device, backend, args.batch_size or [1], args.max_new_tokens)
    if args.json:
        with atomic_write(args.json, "w") as f:
            f.write(json.dumps(found, indent=1) + "\n")
    print("\nrows  tinygrad tok/s  transformers tok/s  ratio  first turn, seconds  same tokens")
    for row in found:
        first = f"{row['tinygrad_first_seconds']:.1f}, {row['transformers_first_seconds']:.1f}"
        rates = f"{row['tinygrad_tokens_per_second']:14,.1f}  {row['transformers_tokens_per_second']:18,.1f}"
        same = "yes" if row["same_tokens"] else "no"
        print(f"{row['rows']:4}  {rates}  {row['ratio']:5.2f}  {first:>19}  {same:>11}")


if __name__ == "__main__":
    run(main)
