"""A training run, whichever implementation computes it: its options, what it begins or goes on from, and its loop."""

import argparse
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import matplotlib.pyplot as plt
import numpy as np

from data.checkpoints.checkpoint import checkpoints, latest_checkpoint, load, resolve
from data.checkpoints.config import PRESETS, GPT2Config, flops_a_token, parameter_count, to_hf
from data.checkpoints.initialize import initial_weights
from data.cli import ArgumentParser, InputError, Progress, real, whole
from data.files import atomic_write
from data.runs.revision import revision
from data.runs.run_folder import RunFolder, load_checkpoint, read_sealed, refuse_occupied, write_sealed
from data.text.loader import Loader, windows
from data.text.prepare import prepared
from data.text.sampling import Sampler
from data.text.shards import Verification, read_meta

PROMPT = "Once upon a time"
SAMPLE_TOKENS = 160
RANGE_STEPS = 100  # of --find-lr

Batch = tuple[np.ndarray, np.ndarray]


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

PORTS = {"parity", "kernels"}  # options of the port alone
FREE = (*PORTS, "device", "keep", "quiet", "tensorboard")  # may change from one part of a run to the next
UNRECORDED = ("out", "resume", "config", "find_lr", "quiet")  # are not of the run, but of this call


def parser(prog: str, framework: str) -> ArgumentParser:
    """The options of both implementations. None of them has a default here, so that what was given can be told."""
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--preset SIZE] [--init WEIGHTS] [--data TEXT] [--out RUN] [options]",
        description=f"Train GPT-2 in {framework}. Without options: the best preset for this machine.",
        epilog=f"example: {prog} --preset tinystories --data stories.txt --out runs/mine",
    )
    model = parser.add_argument_group("what to train")
    model.add_argument("--preset", choices=PRESETS, metavar="SIZE", help=f"one of {', '.join(PRESETS)}")
    model.add_argument("--init", metavar="WEIGHTS", help="random, gpt2 (or another on the hub), or a folder")
    model.add_argument(
        "--data", metavar="TEXT", help="stories (embedded), tinystories (hub), a .txt, a .jsonl, or prepared"
    )
    model.add_argument("--out", type=Path, metavar="RUN", help="the run's folder; by default a new one in runs/")
    model.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run, or from a checkpoint of it")
    model.add_argument("--config", type=Path, metavar="RUN.JSON", help="the options of a run; others change them")
    how = parser.add_argument_group("how to train it")
    how.add_argument("--steps", type=whole(1), metavar="N", help="updates of the weights")
    how.add_argument("--batch-size", type=whole(1), metavar="N", help="windows of text in a (micro-)batch")
    how.add_argument("--seq-len", type=whole(1), metavar="N", help="tokens in a window")
    how.add_argument("--grad-accum", type=whole(1), metavar="N", help="micro-batches an update (1)")
    how.add_argument("--lr", type=real(0, closed=False), metavar="X", help="the highest learning rate")
    how.add_argument("--find-lr", action="store_true", default=None, help="try learning rates and propose one")
    how.add_argument("--min-lr", type=real(0), metavar="X", help="the rate the cosine ends in (lr / 10)")
    how.add_argument("--warmup", type=whole(0), metavar="N", help="updates over which the learning rate rises")
    how.add_argument("--weight-decay", type=real(0), metavar="X", help="of matrices; vectors never decay (0.1)")
    how.add_argument("--betas", type=real(0, 1), nargs=2, metavar=("BETA1", "BETA2"), help="AdamW's")
    how.add_argument("--clip", type=real(0, closed=False), metavar="X", help="the gradients' largest norm (1)")
    how.add_argument("--dtype", choices=("float32", "bfloat16"), help="of products; weights stay float32")
    how.add_argument("--seed", type=whole(0), metavar="N", help="of weights, order of data, and samples (1337)")
    how.add_argument("--device", metavar="NAME", help="CPU, CUDA, METAL, ...; by default the best there is")
    keep = parser.add_argument_group("what to measure, keep and show")
    keep.add_argument("--eval-every", type=whole(1), metavar="N", help="steps between validation losses")
    keep.add_argument("--eval-tokens", type=whole(0), metavar="N", help="validate on the first N; 0: the whole split")
    keep.add_argument("--sample-every", type=whole(1), metavar="N", help="steps between samples")
    keep.add_argument("--save-every", type=whole(1), metavar="N", help="steps between checkpoints, besides the last")
    keep.add_argument("--keep", type=whole(1), metavar="N", help="only the N newest of these, the first and the best")
    keep.add_argument("--tensorboard", action="store_true", default=None, help="write TensorBoard's event files too")
    keep.add_argument("--quiet", action="store_true", default=None, help="show warnings and errors only")
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The options given; with --config or --resume those of the run too, checked as if they had been given."""
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    if args.resume and args.config:
        raise InputError("--resume and --config exclude each other; leave one of them out")
    if not args.resume and not args.config:
        return args
    if args.resume:
        if fixed := [name for name in given if name not in (*FREE, "resume")]:
            option = f"--{fixed[0].replace('_', '-')}"
            raise InputError(f"--resume takes this from the run, so it goes without {option}; leave that out")
        of_checkpoint = args.resume.parent.name == "checkpoints"
        given["out"] = args.resume.parent.parent if of_checkpoint else args.resume
        file = given["out"] / "run.json"
        if not file.is_file():
            raise InputError(f"{args.resume} holds no run ({file} is missing); pass the folder of one")
    else:
        file = args.config
    options = read_sealed(file).get("options")
    known = vars(args).keys() - {*UNRECORDED}
    if not isinstance(options, dict) or options.keys() - PORTS != known - PORTS:
        raise InputError(f"{file} is of another version of this program; give the options themselves")
    words = []
    for name, value in (options | given).items():
        if name in vars(args) and value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, values))]
    return parser.parse_args(words)


@dataclass
class Start:
    """Where training begins: the weights, and of a run that goes on its moments and trainer.json."""

    args: argparse.Namespace
    config: GPT2Config
    arrays: dict[str, np.ndarray]
    moments: dict[str, np.ndarray] | None
    state: dict[str, Any]
    folder: Path  # of prepared data
    loader: Loader
    verification: Verification


def begin(args: argparse.Namespace, device: str) -> Start:
    """Completes the options, and gets the weights and the data. Raises `InputError` for whatever is wrong with them."""
    checkpoint = moments = None
    if args.resume and args.resume.parent.name == "checkpoints":
        checkpoint = args.resume
    elif args.resume and (
        checkpoints(args.resume / "checkpoints") or (args.resume / "checkpoints" / "latest").exists()
    ):
        checkpoint = latest_checkpoint(args.resume)
    if checkpoint:
        config, arrays, moments, state = load_checkpoint(checkpoint)
        of_run, of_checkpoint = (
            {name: value for name, value in options.items() if name not in FREE}
            for options in (read_sealed(args.out / "run.json")["options"], state["options"])
        )
        if of_run != of_checkpoint:
            raise InputError(f"{args.out / 'run.json'} is not the one that {checkpoint} was trained with; put it back")
        if state["step"] >= args.steps:
            raise InputError(f"{args.out} is finished, with all its {args.steps} steps; start a new run")
    else:
        if args.out and not args.resume and not args.find_lr:
            refuse_occupied(args.out)  # before anything that takes long
        config, arrays = complete(args, device)
        state = {"step": 0, "tokens": 0, "seconds": 0.0}
    folder = prepared(args.data)
    verification = Verification(folder)  # of every token: a damaged one would be trained on in silence
    verification.check(timeout=0.5)  # enough for most data; the rest is verified while it trains
    loader = Loader(folder, "train", args.batch_size * args.grad_accum, args.seq_len, args.seed)
    if checkpoint:
        loader.restore(state["loader"])
    if args.config:
        refuse_other_inputs(args, read_sealed(args.config), folder, arrays)
    return Start(args, config, arrays, moments, state, folder, loader, verification)


def refuse_other_inputs(
    args: argparse.Namespace, said: dict[str, Any], folder: Path, arrays: Mapping[str, np.ndarray]
) -> None:
    """Raises `InputError` where options of the run that `said` is of name other data or weights now than they did."""
    before = said["options"]
    if args.data == before["data"] and read_meta(folder)["checksum"] != said["data"]["checksum"]:
        raise InputError(
            f"{args.data} is not the text that {args.config} was run on; put that back, or give another --data"
        )
    named = all(getattr(args, name) == before[name] for name in ("init", "preset", "seed"))
    if named and checksum(arrays) != said["weights"]:
        raise InputError(
            f"{args.init} is not the weights that {args.config} began with; put those back, or give another --init"
        )


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
    defaults |= {"grad_accum": 1, "weight_decay": 0.1, "clip": 1.0, "seed": 1337, "tensorboard": False}
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


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of named arrays."""
    sha256 = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sha256.update(name.encode() + array.tobytes())
    return sha256.hexdigest()


class Trainer(Protocol):
    """What the loop needs of an implementation: torch_ref.trainer.Trainer, and tinygrad_impl.trainer.Trainer."""

    steps: int
    model: Any

    def step(self, batches: Sequence[Batch], lr: float) -> tuple[float, float]: ...


@dataclass(frozen=True)
class Implementation:
    """What computes a run, and with what."""

    package: str
    trainer: Trainer
    moments: Callable[[], dict[str, np.ndarray]]
    learning_rate: Callable[[int, int, float, float, int], float]
    evaluate: Callable[[Iterable[Batch]], float]  # the mean loss
    write: Callable[[str, int, Sampler], str]  # a prompt with its continuation
    device: str
    card: str
    peak_flops: float | None = None  # a second
    kernels: str | None = None  # whose, where there is a choice


class Smoothed:
    """The loss without its noise: an exponential mean of the last 50 or so. Tells what stands out of it."""

    def __init__(self) -> None:
        self.count, self._sum, self._deviation = 0, 0.0, 0.0

    @property
    def value(self) -> float:
        return self._sum / (1 - 0.98**self.count) if self.count else math.nan

    def add(self, loss: float) -> bool:
        """Whether this is a spike: as far above the mean as eight times the usual distance from it."""
        usual = self._deviation / (1 - 0.98**self.count) if self.count else math.inf
        spike = self.count >= 20 and loss - self.value > 8 * usual
        if self.count:
            self._deviation = 0.98 * self._deviation + 0.02 * abs(loss - self.value)
        self.count += 1
        self._sum = 0.98 * self._sum + 0.02 * loss
        return spike


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """SIGINT and SIGTERM, collected while this lasts instead of acted upon; but a second one acts."""
    caught: list[int] = []

    def request(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print is not for signal handlers
        for other, handler in previous.items():
            signal.signal(other, handler)

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(start: Start, by: Implementation, files: Mapping[str, Any]) -> None:
    """The rest of the run, up to its last step. `files` are JSON to keep in its folder, by name."""
    args, config, trainer, loader, state = start.args, start.config, by.trainer, start.loader, start.state
    say: Callable[[str], None] = (lambda text: None) if args.quiet else print
    packages = ("tinygrad" if by.package == "tinygrad_impl" else "torch", "numpy", "tiktoken", "safetensors")
    origin = {
        "command": ["python", "-m", f"{by.package}.train", *sys.argv[1:]],
        "device": by.device,
        "card": by.card,
        **({"kernels": by.kernels} if by.kernels else {}),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "source": revision(),
    }
    if args.resume:  # not before now, because it cuts off what came after the checkpoint
        out = RunFolder.resume(args.out, state if start.moments else None, {"step": state["step"], **origin})
    else:
        args.out = args.out or Path("runs", time.strftime(f"{args.preset or 'finetune'}-%Y%m%d-%H%M%S"))
        out = RunFolder.create(args.out, {**origin, **describe(start)})
    for name, content in files.items():
        write_sealed(out.path / name, content)
    options, resuming = recorded(args), f"python -m {by.package}.train --resume {out.path}"
    events = None
    if args.tensorboard:
        from tensorboardX import SummaryWriter  # here, because it takes long

        events = SummaryWriter(str(out.path / "tensorboard"), purge_step=state["step"] + 1)

    accumulated, B, T = args.grad_accum, args.batch_size, args.seq_len
    tokens_a_step = accumulated * B * T
    bar = {"desc": "training", "unit": "step", "disable": bool(args.quiet)}
    tokens, seconds, smoothed = state["tokens"], state["seconds"], Smoothed()
    for row in out.metrics[1:]:
        smoothed.add(row["loss"])

    def validate() -> float:
        return by.evaluate(windows(start.folder, "valid", B, T, args.eval_tokens or None))

    def sample() -> None:
        out.add_sample(trainer.steps, by.write(PROMPT, SAMPLE_TOKENS, Sampler(0.6, top_k=40, seed=args.seed)))
        if events:
            events.add_text("sample", out.samples[-1][1], trainer.steps)

    def record(row: dict[str, Any]) -> None:
        out.add_metrics(row)
        if events:
            for name in row.keys() - {"step", "tokens", "seconds"}:
                events.add_scalar(name, row[name], row["step"])

    saved = -1

    def save() -> None:
        """A checkpoint, after which only those are left that are to be kept."""
        nonlocal saved
        # nothing is kept that damaged tokens may have trained
        start.verification.check(timeout=None if trainer.steps else 0)
        step = trainer.steps
        state = {"step": step, "tokens": tokens, "seconds": seconds, "loader": loader.state(), "options": options}
        out.save_checkpoint(config, trainer.model.arrays(), by.moments(), state)
        saved = step
        best = min((row for row in out.metrics if "val_loss" in row), key=lambda row: row["val_loss"])["step"]
        there = [int(path.name.removeprefix("step-")) for path in checkpoints(out.path / "checkpoints")]
        scheduled = [n for n in there if n and (n % args.save_every == 0 or n == args.steps)]
        if best in there:
            out.name("best", f"step-{best}")
        out.prune({0, best, step, *scheduled[-(args.keep or len(there)) :]})
        if events:
            events.flush()

    @contextmanager
    def room_on_disk() -> Iterator[None]:
        """Says how to go on, should there be none."""
        try:
            yield
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            there = (out.path / "checkpoints" / "latest").exists()
            go_on = (
                f"go on from the newest checkpoint, which is whole, with `{resuming}`"
                if there
                else "begin again, in another --out"
            )
            raise InputError(
                f"{e.strerror}: step {trainer.steps} could not be saved in {out.path}; make room and {go_on}"
            ) from None

    source = f"continuing after step {trainer.steps}" if args.resume else f"from {args.init}"
    computed = f"{by.card}, {args.dtype}" + (f", {by.kernels} kernels" if by.kernels else "")
    say(f"{args.preset or 'GPT-2'}, {parameter_count(config) / 1e6:.1f}M parameters, {source}; {computed}")
    say(f"data: {start.folder}, {loader.tokens:,} tokens; {args.steps} steps of {tokens_a_step:,}; run: {out.path}")
    if args.init == "random" and config.n_positions > T:
        say(f"note: positions from {T} on stay untrained, as --seq-len is below {config.n_positions}")
    if start.moments is None:
        started = time.perf_counter()
        with room_on_disk():
            record({"step": 0, "tokens": 0, "seconds": 0.0, "val_loss": validate()})
            sample()
            save()
        taken = f"{time.perf_counter() - started:.0f} s with compiling, a sample and a checkpoint"
        say(f"before training: validation loss {out.metrics[0]['val_loss']:.3f} ({taken})")
    val_loss = next(row["val_loss"] for row in reversed(out.metrics) if "val_loss" in row)

    progress = Progress(total=args.steps, initial=trainer.steps, **bar)
    with stop_requests() as stops, progress, room_on_disk():
        while trainer.steps < args.steps and not stops:
            started = time.perf_counter()
            lr = by.learning_rate(trainer.steps, args.steps, args.lr, args.min_lr, args.warmup)
            place = f"windows {loader.position} to {loader.position + accumulated * B - 1} of the data"
            x, y = loader.next_batch()  # (grad_accum * B, T), in as many micro-batches
            batches = list(zip(np.split(x, accumulated), np.split(y, accumulated), strict=True))
            loss, grad_norm = trainer.step(batches, lr)
            start.verification.check()
            if not math.isfinite(loss + grad_norm):
                raise InputError(
                    f"the loss is {loss} and the gradient's norm {grad_norm} at step {trainer.steps + 1}, on {place}; "
                    f"the weights were left as they were, and {latest_checkpoint(out.path)} is good; look at the data "
                    f"there, or begin again with `--config {out.path / 'run.json'}` and an --lr below {args.lr}"
                )
            elapsed = time.perf_counter() - started
            tokens, seconds = tokens + tokens_a_step, seconds + elapsed
            rate = tokens_a_step / elapsed
            row = {"step": trainer.steps, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": tokens}
            row |= {"seconds": round(seconds, 3), "tokens_per_second": round(rate, 1)}
            usual = smoothed.value
            if smoothed.add(loss):
                row["spike"] = True
                progress.line(f"step {trainer.steps}: the loss jumped from about {usual:.3f} to {loss:.3f}, on {place}")
            ends, lowest = trainer.steps == args.steps, False
            if ends or trainer.steps % args.eval_every == 0:
                row["val_loss"] = val_loss = validate()
                lowest = val_loss < min(r["val_loss"] for r in out.metrics if "val_loss" in r)
            record(row)
            mfu = f", MFU {flops_a_token(config, T) * rate / by.peak_flops:.1%}" if by.peak_flops else ""
            figures = f"loss {loss:.3f} ({smoothed.value:.3f}), val {val_loss:.3f}, lr {lr:.1e}, {rate:,.0f} tok/s{mfu}"
            progress.set_postfix_str(figures, refresh=False)
            progress.update()
            if ends or trainer.steps % args.sample_every == 0:
                sample()
            if ends or lowest or trainer.steps % args.save_every == 0:
                save()
                out.draw()
        if trainer.steps > saved:  # a request to stop came
            save()
            out.draw()
    if events:
        events.close()
    if trainer.steps < args.steps:
        print(f"stopped after step {trainer.steps}, which is saved; go on with\n  {resuming}", file=sys.stderr)
        sys.exit(128 + stops[0])
    for when, (step, text) in (("before training", out.samples[0]), (f"after {trainer.steps} steps", out.samples[-1])):
        say(f"\n--- {when} (step {step}) ---\n{text}")
    first, last = (f"{row['val_loss']:.3f}" for row in (out.metrics[0], out.metrics[-1]))
    say(f"\nValidation loss {first} -> {last}, {seconds:.0f} s of training. All of it is in {out.path}; try:")
    say(f'  python -m tinygrad_impl.generate --model {out.path} --prompt "{PROMPT}"')


def describe(start: Start) -> dict[str, Any]:
    """What run.json says of what is trained."""
    return {
        "options": recorded(start.args),
        "seed": start.args.seed,
        "config": to_hf(start.config),
        "parameters": parameter_count(start.config),
        "weights": checksum(start.arrays),
        "data": {"folder": str(start.folder), "checksum": read_meta(start.folder)["checksum"]},
    }


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """The options that make a run what it is."""
    return {name: value for name, value in vars(args).items() if name not in UNRECORDED}


def find_learning_rate(start: Start, by: Implementation) -> None:
    """The range test of Smith 2015 (arXiv 1506.01186, section 3.3): the rate grows from step to step, until the loss
    does too. Proposed is the rate at which the smoothed loss falls fastest. Writes find-lr.png and find-lr.json.
    """
    args, loader, accumulated = start.args, start.loader, start.args.grad_accum
    out = args.out or Path("runs", time.strftime(f"find-lr-{args.preset or 'finetune'}-%Y%m%d-%H%M%S"))
    out.mkdir(parents=True, exist_ok=True)
    rates, losses, means = np.geomspace(1e-6, 1, RANGE_STEPS).tolist(), list[float](), list[float]()
    mean = 0.0
    with Progress(total=RANGE_STEPS, desc="find-lr", unit="step", disable=bool(args.quiet)) as progress:
        for i, lr in enumerate(rates, 1):
            x, y = loader.next_batch()
            loss, _ = by.trainer.step(list(zip(np.split(x, accumulated), np.split(y, accumulated), strict=True)), lr)
            if not math.isfinite(loss):
                break
            mean = 0.9 * mean + 0.1 * loss
            losses.append(loss)
            means.append(mean / (1 - 0.9**i))
            progress.set_postfix_str(f"lr {lr:.1e}, loss {loss:.3f}", refresh=False)
            progress.update()
            if means[-1] > 1.5 * min(means):
                break
    lowest = int(np.argmin(means))
    if lowest < 4:
        raise InputError("the loss does not fall at any learning rate tried; look at the data and the weights")
    slopes = np.gradient(np.array(means[: lowest + 1]))  # the rates are evenly spaced in their logarithm
    proposed = float(f"{rates[int(np.argmin(slopes))]:.1e}")
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.semilogx(rates[: len(losses)], losses, lw=1, alpha=0.5, label="loss (a batch)")
    axes.semilogx(rates[: len(means)], means, label="smoothed")
    axes.axvline(proposed, ls="--", color="black", lw=1, label=f"proposed: {proposed:.1e}")
    axes.set(xlabel="learning rate", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(out / "find-lr.png") as f:
        figure.savefig(f, format="png", dpi=120)
    plt.close(figure)
    found = {"proposed": proposed, "lr": rates[: len(losses)], "loss": losses, "smoothed": means}
    with atomic_write(out / "find-lr.json", "w") as f:
        f.write(json.dumps(found | {"options": recorded(args)}, indent=1) + "\n")
    print(f"the loss falls fastest at a learning rate of {proposed:.1e}, and is lowest at {rates[lowest]:.1e}: {out}")
    print(f"  python -m {by.package}.train --lr {proposed:.1e}, with the other options as they were")
