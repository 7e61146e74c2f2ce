"""How fast the port generates beside `transformers`: `python -m parity_tests.bench_generation`.

All continue the same prompts of random tokens, greedily, by turns in one process; the first turn, which compiles, is
reported apart. Random weights are as fast as any others. In bfloat16 they round differently, and need not write the
same tokens. With `--compiled` there is also the fastest that users of `transformers` know: a static cache, with which
its model is compiled by `torch.compile`.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
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


def weights(config: GPT2Config) -> dict[str, np.ndarray]:
    """Random ones. All layers have the same, because to draw 1.5 billion numbers takes longer than everything else."""
    arrays = random_weights(replace(config, n_layer=1), 0, 0.2)
    layer = {name: arrays.pop(name) for name in list(arrays) if name.startswith("h.0.")}
    return arrays | {f"h.{i}.{name[4:]}": layer[name] for i in range(config.n_layer) for name in layer}


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
    compiled: bool,
) -> Iterator[dict[str, Any]]:
    """For each size of a batch, as soon as it is there, the rates in tokens a second and the seconds of the first
    turns, of `new` tokens in each row.
    """
    arrays = weights(config)
    their_dtype, torch_device = (
        torch.bfloat16 if backend.dtype else torch.float32,
        "cuda" if device == "CUDA" else "cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), config, arrays)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=their_dtype).to(torch_device).eval()
    generator = Generator(GPT2(config, arrays), backend, eot=EOT)
    compile_config = transformers.CompileConfig()  # mode "reduce-overhead", which takes CUDA graphs
    compile_config._compile_all_devices = True  # as it would by itself on a GPU
    with Progress(total=len(batch_sizes) * TURNS * (3 if compiled else 2), desc="generating", unit="turn") as progress:
        for rows in batch_sizes:
            prompts = np.random.default_rng(rows).integers(0, EOT, (rows, PROMPT)).tolist()

            def by_tinygrad(prompts: list[list[int]] = prompts) -> list[list[int]]:
                return generator(prompts, new, Sampler(0))

            def by_transformers(prompts: list[list[int]] = prompts, **settings: Any) -> list[list[int]]:
                ids = torch.tensor(prompts, device=torch_device)
                options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": EOT} | settings
                out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPT:].tolist()
                return [row[: row.index(EOT)] if EOT in row else row for row in out]

            ways = {"tinygrad": by_tinygrad, "transformers": by_transformers}
            if compiled:
                static = {"cache_implementation": "static", "compile_config": compile_config}
                ways["compiled_transformers"] = partial(by_transformers, **static)
            written: dict[str, list[list[int]]] = {}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(TURNS):
                for name, generate in ways.items():
                    written[name], spent = timed(generate)
                    seconds[name].append(spent)
                    progress.update()
            rate = {name: sum(map(len, written[name])) / statistics.median(seconds[name][1:]) for name in ways}
            yield (
                {"rows": rows, "new_tokens": new, "same_tokens": written["tinygrad"] == written["transformers"]}
                | {f"{name}_tokens_per_second": rate[name] for name in ways}
                | {"ratio": rate["tinygrad"] / rate["transformers"]}
                | ({"compiled_ratio": rate["tinygrad"] / rate["compiled_transformers"]} if compiled else {})
                | {f"{name}_first_seconds": seconds[name][0] for name in ways}
            )


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
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="also transformers with a static cache and torch.compile, which takes a minute or more to compile",
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
    names = ["tinygrad", "transformers"] + (["compiled_transformers"] if args.compiled else [])
    found = []
    for row in measure(config, device, backend, args.batch_size or [1], args.max_new_tokens, args.compiled):
        found.append(row)
        print(f"\n{row['rows']} {'rows' if row['rows'] > 1 else 'row'} of {row['new_tokens']} new tokens")
        print(f"{'':24}     tokens/s  tinygrad's is  first turn")
        for name in names:
            rate, first = row[f"{name}_tokens_per_second"], row[f"{name}_first_seconds"]
            ratio = "" if name == "tinygrad" else f"{row['tinygrad_tokens_per_second'] / rate:.2f} x"
            print(f"{name.replace('_', ' '):24} {rate:12,.1f}  {ratio:>13}  {first:8.1f} s")
        print(f"tinygrad and transformers wrote {'the same' if row['same_tokens'] else 'other'} tokens", flush=True)
        if args.json:
            with atomic_write(args.json, "w") as f:
                f.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
