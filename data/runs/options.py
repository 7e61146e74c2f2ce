"""The options of a training run: which there are, which are given, and the complete set that a run is made of.

`parse` tells which options were given on the command line or by an earlier run; `data.runs.start` fills in the others,
some of which depend on the device and on the weights to begin with. The result is an `Options`, which never changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.checkpoints.config import PRESETS
from data.cli import ArgumentParser, InputError, real, whole
from data.runs.run_folder import read_sealed

PORTS = {"parity", "kernels"}  # options of the port alone
FREE = (*PORTS, "device", "keep", "quiet", "tensorboard")  # may change from one part of a run to the next
UNRECORDED = ("out", "resume", "config", "find_lr", "quiet")  # belong to one call of the program, not to the run

Given = dict[str, Any]  # the options that were given, by name: one that was left out is not in it


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every option of a run, in the order in which run.json lists them."""

    preset: str | None = None  # None: of the size of the weights in `init`
    init: str
    data: str
    out: Path | None = None  # None: a new folder in runs/
    resume: Path | None = None
    config: Path | None = None
    steps: int
    batch_size: int
    seq_len: int
    grad_accum: int = 1
    lr: float
    find_lr: bool = False
    min_lr: float
    warmup: int
    weight_decay: float = 0.1
    betas: tuple[float, float]
    clip: float = 1.0
    dtype: str
    seed: int = 1337
    device: str | None = None  # None: the best there is
    eval_every: int
    eval_tokens: int  # 0: the whole validation split
    sample_every: int
    save_every: int
    keep: int | None = None  # None: all checkpoints
    tensorboard: bool = False
    quiet: bool = False
    parity: str | None = None
    kernels: str | None = None  # None in torch_ref, which has neither of the port's options

    def recorded(self) -> dict[str, Any]:
        """The options that make a run what it is, for run.json and the checkpoints."""
        left_out = {*UNRECORDED, *(PORTS if self.kernels is None else ())}
        return {name: value for name, value in vars(self).items() if name not in left_out}


@dataclass(frozen=True)
class Recipe:
    """How a preset trains unless told otherwise. `lr` is for random weights; given weights take `finetune_lr`."""

    batch_size: int
    seq_len: int
    steps: int
    lr: float
    finetune_lr: float
    warmup: int
    eval_tokens: int
    betas: tuple[float, float] = (0.9, 0.95)
    initializer_range: float = 0.02


RECIPES = {
    # Half a minute on two CPU cores, mostly in the matmul with the vocabulary. So few tokens teach most in many short
    # windows, and a narrow model wants larger weights to begin with than GPT-2's 0.02, which was chosen for a width of
    # 768.
    "tiny": Recipe(8, 32, 450, 7e-3, 7e-4, warmup=90, eval_tokens=2048, betas=(0.8, 0.99), initializer_range=0.06),
    "tinystories": Recipe(64, 256, 4000, 1e-3, finetune_lr=1e-4, warmup=100, eval_tokens=0),
    "gpt2": Recipe(8, 1024, 4000, 6e-4, finetune_lr=6e-5, warmup=100, eval_tokens=262_144),
    "gpt2-medium": Recipe(4, 1024, 4000, 3e-4, finetune_lr=3e-5, warmup=100, eval_tokens=262_144),
    "gpt2-large": Recipe(2, 1024, 4000, 2.5e-4, finetune_lr=2.5e-5, warmup=100, eval_tokens=262_144),
    "gpt2-xl": Recipe(1, 1024, 4000, 2e-4, finetune_lr=2e-5, warmup=100, eval_tokens=262_144),
}


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
    how.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matmuls; weights stay float32")
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


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Given:
    """The options given; with --config or --resume those of the run too, checked as if they had been given."""
    args = vars(parser.parse_args(argv))
    given = without_none(args)
    if "resume" in given and "config" in given:
        raise InputError("--resume and --config exclude each other; leave one of them out")
    if "resume" in given:
        if fixed := [name for name in given if name not in (*FREE, "resume")]:
            option = f"--{fixed[0].replace('_', '-')}"
            raise InputError(f"--resume takes this from the run, so it goes without {option}; leave that out")
        resume = given["resume"]
        given["out"] = resume.parent.parent if is_checkpoint(resume) else resume
        file = given["out"] / "run.json"
        if not file.is_file():
            raise InputError(f"{resume} holds no run ({file} is missing); pass the folder of one")
    elif "config" in given:
        file = given["config"]
    else:
        return given
    options = read_sealed(file).get("options")
    known = args.keys() - {*UNRECORDED}
    if not isinstance(options, dict) or options.keys() - PORTS != known - PORTS:
        raise InputError(f"{file} is of another version of this program; give the options themselves")
    words = []
    for name, value in (options | given).items():
        if name in args and value is not None and value is not False:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, values))]
    return without_none(vars(parser.parse_args(words)))


def without_none(args: dict[str, Any]) -> Given:
    """What was given of the options that argparse found: it has None for the others."""
    given = {name: value for name, value in args.items() if value is not None}
    return given | ({"betas": tuple(given["betas"])} if "betas" in given else {})


def is_checkpoint(path: Path) -> bool:
    """Whether it is the place of a checkpoint in a run's folder, rather than that folder."""
    return path.parent.name == "checkpoints"
