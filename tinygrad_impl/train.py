"""`python -m tinygrad_impl.train`: trains GPT-2, from random weights or from given ones, on any text."""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import dtypes

from data.checkpoint import load, read_json, resolve
from data.cli import ArgumentParser, InputError, Progress, real, run, whole
from data.config import PRESETS, GPT2Config, parameter_count, to_hf
from data.files import atomic_write
from data.initialize import initial_weights
from data.loader import Loader, windows
from data.prepare import prepared
from data.run_folder import RunFolder, load_checkpoint, refuse_occupied
from data.sampling import Sampler
from data.shards import read_meta, verify_folder
from tinygrad_impl.device import card_name, open_device, peak_flops
from tinygrad_impl.evaluate import Evaluator
from tinygrad_impl.generate import Generator, write
from tinygrad_impl.trainer import Trainer, learning_rate

PROMPT = "Once upon a time"
SAMPLE_TOKENS = 160


@dataclass(frozen=True)
class Recipe:
    """How a preset trains unless told otherwise. `lr` is for random weights; given weights take `finetune_lr`."""

    batch_size: int
    seq_len: int
    steps: int
    lr: float
    finetune_lr: float
    warmup: int
    eval_tokens: int  # 0: the whole validation split
    betas: tuple[float, float] = (0.9, 0.95)
    initializer_range: float = 0.02


RECIPES = {
    # Four minutes on two CPU cores, mostly in the product with the vocabulary. So few tokens teach most in many short
    # windows, and a narrow model wants larger weights to begin with than GPT-2's 0.02, chosen for 768 wide.
    "tiny": Recipe(8, 32, 450, 7e-3, 7e-4, warmup=90, eval_tokens=2048, betas=(0.8, 0.99), initializer_range=0.06),
    "tinystories": Recipe(64, 256, 4000, 1e-3, finetune_lr=1e-4, warmup=100, eval_tokens=0),
    "gpt2": Recipe(8, 1024, 4000, 6e-4, finetune_lr=6e-5, warmup=100, eval_tokens=262_144),
    "gpt2-medium": Recipe(4, 1024, 4000, 3e-4, finetune_lr=3e-5, warmup=100, eval_tokens=262_144),
    "gpt2-large": Recipe(2, 1024, 4000, 2.5e-4, finetune_lr=2.5e-5, warmup=100, eval_tokens=262_144),
    "gpt2-xl": Recipe(1, 1024, 4000, 2e-4, finetune_lr=2e-5, warmup=100, eval_tokens=262_144),
}


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m tinygrad_impl.train",
        description="Train GPT-2 in tinygrad. Without options: the best preset for this machine.",
        epilog="example: python -m tinygrad_impl.train --preset tinystories --data stories.txt --out runs/mine",
    )
    model = parser.add_argument_group("what to train")
    model.add_argument("--preset", choices=PRESETS, help="the model's size")
    model.add_argument("--init", help="the weights to begin with: random, gpt2 (or another on the hub), or a folder")
    model.add_argument("--data", help="stories (embedded), tinystories (hub), a .txt or .jsonl, or a prepared folder")
    model.add_argument("--out", type=Path, metavar="RUN", help="the run's folder; by default a new one in runs/")
    model.add_argument("--resume", type=Path, metavar="RUN", help="continue a stopped run; takes no other options")
    how = parser.add_argument_group("how to train it")
    how.add_argument("--steps", type=whole(1), metavar="N", help="updates of the weights")
    how.add_argument("--batch-size", type=whole(1), metavar="N", help="windows of text in a (micro-)batch")
    how.add_argument("--seq-len", type=whole(1), metavar="N", help="tokens in a window")
    how.add_argument("--grad-accum", type=whole(1), default=1, metavar="N", help="micro-batches an update")
    how.add_argument("--lr", type=real(0, closed=False), metavar="X", help="the highest learning rate")
    how.add_argument("--min-lr", type=real(0), metavar="X", help="the rate the cosine ends in; by default lr / 10")
    how.add_argument("--warmup", type=whole(0), metavar="N", help="updates over which the learning rate rises")
    how.add_argument("--weight-decay", type=real(0), default=0.1, metavar="X", help="of matrices; vectors never decay")
    how.add_argument("--betas", type=real(0, 1), nargs=2, metavar=("BETA1", "BETA2"), help="AdamW's")
    how.add_argument("--clip", type=real(0, closed=False), default=1.0, metavar="X", help="the gradients' largest norm")
    how.add_argument("--dtype", choices=("float32", "bfloat16"), help="of products; weights stay float32")
    how.add_argument("--seed", type=whole(0), default=1337, metavar="N", help="of weights, order of data, and samples")
    how.add_argument("--device", help="CPU, CUDA, METAL, ...; by default the best there is")
    how.add_argument("--parity", choices=("on", "off"), default="on", help="compare with PyTorch before training")
    keep = parser.add_argument_group("what to measure and keep")
    keep.add_argument("--eval-every", type=whole(1), metavar="N", help="steps between validation losses")
    keep.add_argument("--eval-tokens", type=whole(0), metavar="N", help="validate on the first N; 0: the whole split")
    keep.add_argument("--sample-every", type=whole(1), metavar="N", help="steps between samples")
    keep.add_argument("--save-every", type=whole(1), metavar="N", help="steps between checkpoints, besides the last")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options given, or with --resume those of the run, checked as if they had been given."""
    args = parser().parse_args(argv)
    if not args.resume:
        return args
    if given := [option for option in argv if option.startswith("--") and not option.startswith("--resume")]:
        raise InputError(f"--resume takes all options from the run, so it goes without {given[0]}; leave that out")
    if not (args.resume / "run.json").is_file():
        raise InputError(f"{args.resume} holds no run (it has no run.json); pass the folder of one")
    options = read_json(args.resume / "run.json").get("options")
    if not isinstance(options, dict) or options.keys() != vars(args).keys() - {"out", "resume"}:
        raise InputError(f"{args.resume / 'run.json'} is damaged or of another version; start a new run")
    argv = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    resumed = parser().parse_args(argv)
    resumed.out = resumed.resume = args.resume
    return resumed


def complete(args: argparse.Namespace, device: str) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """Fills in the options that were left out, checks those that depend on others, and gets the model to begin with."""
    arrays: dict[str, np.ndarray] | None = None
    if device != "CPU" and args.preset is None and args.init is None:
        try:
            resolve("gpt2")  # downloads it
            args.preset, args.init, args.data = "gpt2", "gpt2", args.data or "tinystories"
        except InputError as e:
            print(f"Without the pretrained gpt2 ({e}): preset tinystories, from random weights.")
            args.preset = "tinystories"
    if args.init in (None, "random"):
        args.init, args.preset = "random", args.preset or "tiny"
        config = PRESETS[args.preset]
    else:
        config, arrays = load(args.init)
        if args.preset and config != PRESETS[args.preset]:
            raise InputError(
                f"the weights of {args.init} are of another size than preset {args.preset}; leave out one of them"
            )
    recipe = RECIPES[args.preset or next((n for n, c in PRESETS.items() if c == config), "gpt2")]

    defaults = {
        "data": "stories",
        "dtype": "bfloat16" if device == "CUDA" else "float32",
        "lr": recipe.lr if arrays is None else recipe.finetune_lr,
        "seq_len": min(recipe.seq_len, config.n_positions),
        "betas": list(recipe.betas),
    } | {name: getattr(recipe, name) for name in ("steps", "batch_size", "eval_tokens")}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.warmup = min(recipe.warmup, args.steps // 5) if args.warmup is None else args.warmup
    args.min_lr = args.lr / 10 if args.min_lr is None else args.min_lr
    for name, share in (("eval_every", 10), ("sample_every", 4), ("save_every", 4)):
        if getattr(args, name) is None:
            setattr(args, name, max(1, args.steps // share))

    if args.min_lr > args.lr:
        raise InputError(f"--min-lr {args.min_lr} is above --lr {args.lr}; give a smaller one")
    if args.seq_len > config.n_positions:
        raise InputError(
            f"--seq-len {args.seq_len} is over the model's context of {config.n_positions} tokens; give fewer"
        )
    arrays = arrays or initial_weights(config, args.seed, recipe.initializer_range)
    return config, {name: array.astype(np.float32) for name, array in arrays.items()}


def describe(args: argparse.Namespace, config: GPT2Config, device: str, card: str, folder: Path) -> dict[str, Any]:
    """What run.json says."""
    packages = ("tinygrad", "numpy", "tiktoken", "safetensors")
    return {
        "command": ["python", "-m", "tinygrad_impl.train", *sys.argv[1:]],
        "options": {name: value for name, value in vars(args).items() if name not in ("out", "resume")},
        "seed": args.seed,
        "config": to_hf(config),
        "parameters": parameter_count(config),
        "data": {"folder": str(folder), "checksum": read_meta(folder)["checksum"]},
        "device": device,
        "card": card,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
    }


def gate(
    args: argparse.Namespace, trainer: Trainer, config: GPT2Config, loader: Loader, device: str
) -> dict[str, Any] | None:
    """Proves the trainer's graphs on the batches that it is about to see, and returns the certificate."""
    if args.parity == "off":
        print("PARITY NOT CHECKED (--parity off): nothing is proven about what this device computes")
        return None
    if importlib.util.find_spec("torch") is None:
        raise InputError("the parity check before training needs PyTorch; `pip install torch`, or pass --parity off")
    from tinygrad_impl.gate import prove_graphs  # here, because it imports PyTorch

    def next_batch() -> tuple[np.ndarray, np.ndarray]:
        x, y = loader.next_batch()
        return x[: args.batch_size], y[: args.batch_size]

    position = loader.state()
    certificate = prove_graphs(trainer, config, next_batch, args.lr, args.dtype, device)
    loader.restore(position)
    print(certificate["summary"])
    return certificate


def main() -> None:
    args = parse(sys.argv[1:])
    device = open_device(args.device)
    card = card_name(device)
    if args.resume:
        config, arrays, moments, state = load_checkpoint(args.resume)
        if state["step"] >= args.steps:
            raise InputError(f"{args.resume} is finished, with all its {args.steps} steps; start a new run")
    else:
        if args.out:
            refuse_occupied(args.out)  # before anything that takes long
        config, arrays = complete(args, device)
        state = {"step": 0, "tokens": 0, "seconds": 0.0}

    folder = prepared(args.data)
    verify_folder(folder)  # every token: a damaged one would be trained on in silence
    loader = Loader(folder, "train", args.batch_size * args.grad_accum, args.seq_len, args.seed)
    autocast = dtypes.bfloat16 if args.dtype == "bfloat16" else None
    trainer = Trainer(
        config, arrays, betas=tuple(args.betas), weight_decay=args.weight_decay, clip=args.clip, autocast=autocast
    )
    evaluator, generator = Evaluator(trainer.model, autocast), Generator(trainer.model)
    if args.resume:
        loader.restore(state["loader"])
        trainer.restore(arrays, moments, state["step"])
    parity = gate(args, trainer, config, loader, device)
    if args.resume:
        out = RunFolder.resume(args.out, state["step"])  # last, because it cuts off what came after the checkpoint
    else:
        args.out = args.out or Path("runs", time.strftime(f"{args.preset or 'finetune'}-%Y%m%d-%H%M%S"))
        out = RunFolder.create(args.out, describe(args, config, device, card, folder))
    if parity:
        with atomic_write(out.path / "parity.json", "w") as f:
            f.write(json.dumps(parity, indent=1) + "\n")

    tokens_a_step = args.batch_size * args.grad_accum * args.seq_len
    # a product of an (in, out) matrix is 2 in*out operations a token forward and twice that backward; attention adds
    # 2 products of T x C a layer (PaLM, Chowdhery et al. 2022, appendix B). The position table is looked up only.
    multiplied = parameter_count(config) - config.n_positions * config.n_embd
    flops_a_token = 6 * multiplied + 12 * config.n_layer * config.n_embd * args.seq_len
    peak = peak_flops(card, args.dtype == "bfloat16")

    def validate() -> float:
        return evaluator(windows(folder, "valid", args.batch_size, args.seq_len, args.eval_tokens or None))

    def sample() -> None:
        sampler = Sampler(temperature=0.6, top_k=40, seed=args.seed)
        out.add_sample(trainer.steps, write(generator, [PROMPT], SAMPLE_TOKENS, sampler)[0])

    def save() -> None:
        state = {"step": trainer.steps, "tokens": tokens, "seconds": seconds, "loader": loader.state()}
        out.save_checkpoint(config, trainer.model.arrays(), trainer.moments(), state)

    origin = f"continuing after step {trainer.steps}" if args.resume else f"from {args.init}"
    print(f"{args.preset or 'GPT-2'}, {parameter_count(config) / 1e6:.1f}M parameters, {origin}; {card}, {args.dtype}")
    print(f"data: {folder}, {loader.tokens:,} tokens; {args.steps} steps of {tokens_a_step:,} tokens; run: {args.out}")
    if args.init == "random" and args.seq_len < config.n_positions:
        print(f"note: positions from {args.seq_len} on stay untrained, as --seq-len is below {config.n_positions}")
    tokens, seconds = state["tokens"], state["seconds"]
    if args.resume:
        val_loss = next((row["val_loss"] for row in reversed(out.metrics) if "val_loss" in row), math.nan)
    else:
        started = time.perf_counter()
        val_loss = validate()
        out.add_metrics({"step": 0, "tokens": 0, "seconds": 0.0, "val_loss": val_loss})
        sample()
        save()
        taken = time.perf_counter() - started
        print(
            f"before training: validation loss {val_loss:.3f} ({taken:.0f} s with compiling, a sample and a checkpoint)"
        )

    with Progress(total=args.steps, initial=trainer.steps, desc="training", unit="step") as progress:
        while trainer.steps < args.steps:
            started = time.perf_counter()
            lr = learning_rate(trainer.steps, args.steps, args.lr, args.min_lr, args.warmup)
            x, y = loader.next_batch()  # (grad_accum * B, T), in as many micro-batches
            batches = list(zip(np.split(x, args.grad_accum), np.split(y, args.grad_accum), strict=True))
            loss, grad_norm = trainer.step(batches, lr)
            if not math.isfinite(loss + grad_norm):
                raise InputError(
                    f"the loss is {loss} and the gradient's norm {grad_norm} at step {trainer.steps}; "
                    f"start again with an --lr below {args.lr}, or from the checkpoints in {args.out}"
                )
            elapsed = time.perf_counter() - started
            tokens, seconds = tokens + tokens_a_step, seconds + elapsed
            rate = tokens_a_step / elapsed
            row = {"step": trainer.steps, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": tokens}
            row |= {"seconds": round(seconds, 3), "tokens_per_second": round(rate, 1)}
            if trainer.steps % args.eval_every == 0 or trainer.steps == args.steps:
                row["val_loss"] = val_loss = validate()
            out.add_metrics(row)
            mfu = f", MFU {flops_a_token * rate / peak:.1%}" if peak else ""
            progress.set_postfix_str(f"loss {loss:.3f}, val {val_loss:.3f}, {rate:,.0f} tok/s{mfu}", refresh=False)
            progress.update()
            ends = trainer.steps == args.steps
            if ends or trainer.steps % args.sample_every == 0:
                sample()
            if ends or trainer.steps % args.save_every == 0:
                save()
                out.draw()
    for when, (step, text) in (("before training", out.samples[0]), (f"after {trainer.steps} steps", out.samples[-1])):
        print(f"\n--- {when} (step {step}) ---\n{text}")
    first, last = (f"{row['val_loss']:.3f}" for row in (out.metrics[0], out.metrics[-1]))
    print(f"\nValidation loss {first} -> {last}, {seconds:.0f} s of training. All of it is in {args.out}; try:")
    print(f'  python -m tinygrad_impl.generate --model {args.out} --prompt "{PROMPT}"')


if __name__ == "__main__":
    run(main)
