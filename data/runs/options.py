"""The options of a training run: which there are, which are given, and the complete set that a run is made of.

`parse` tells which options were given on the command line or by an earlier run; `data.runs.start` fills in the others,
some of which depend on the device and on the weights to begin with. The result is an `Options`, which never changes.
"""

import argparse
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from data.checkpoints.config import PRESETS, parameter_count
from data.checkpoints.tensors import read_json
from data.cli import ArgumentParser, InputError, integer, real
from data.launch import command_as_started, count
from data.ranks import place
from data.runs.run_folder import read_sealed
from data.text.formats import AS_GIVEN, ERRORS

PORTS = {"parity", "kernels"}  # options of the port alone
EVALUATION = ("eval_tasks", "eval_data_file", "eval_limit", "eval_tasks_every")  # recorded where there are tasks
NO_TASKS = "none"  # for --eval-tasks
# may change from one part of a run to the next
FREE = (*PORTS, "device", "gpus", "timeout", "zero", "keep", "quiet", "tensorboard", *EVALUATION)
UNRECORDED = (  # belong to one call, not to the run
    *("out", "resume", "resume_if_any", "config", "recipe", "find_lr", "rewarm", "global_batch_tokens"),
    *("quiet", "gpus", "timeout"),
)
SEVERAL = ("zero", "reduce_dtype")  # recorded where there were several ranks, or where they were given
SIZES = ("n_layer", "n_head", "n_embd", "n_positions")  # that may differ from the preset's
GO_WITH = {  # are of that option, for --config
    "data": ("valid", "field", "errors"),
    "init": ("preset", *SIZES),
    "global_batch_tokens": ("grad_accum",),
    "eval_tasks": ("eval_data_file",),
}
OF_TRAINING = (  # of which --find-lr, which does not train, has no use
    *("steps", "lr", "min_lr", "warmup", "schedule", "parity", "eval_every", "eval_tokens", *EVALUATION),
    *("sample_every", "save_every", "keep", "tensorboard"),
)
LONGER = ("steps", "rewarm", "eval_every", "sample_every", "save_every")  # go with --resume and --steps

Given = dict[str, Any]  # the options that were given, by name: one that was left out is not in it

MODEL, HOW, KEEP = "what to train", "how to train it", "what to measure, keep and show"  # groups in --help
NUMBER: dict[str, Any] = {"type": integer(1), "metavar": "N"}
FLAG: dict[str, Any] = {"default": False, "action": "store_true"}
DTYPES = ("float32", "bfloat16")

# What --recipe stands for. Of llm.c's scripts/run_gpt2_124M.sh, but for the windows of a micro-batch, which fit a GPU
# with 24 GB as well, and for the validation, which is on 10M tokens as there with 8 GPUs.
REPRODUCTIONS: dict[str, Given] = {
    "gpt2-124m-10b": {
        "preset": "gpt2",
        "init": "random",
        "data": "fineweb10B",
        "seq_len": 1024,
        "batch_size": 32,
        "global_batch_tokens": 2**19,
        "steps": 18_865,
        "lr": 6e-4,
        "min_lr": 0.0,
        "warmup": 700,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "clip": 1.0,
        "eval_every": 250,
        "eval_tokens": 10 * 2**20,
        "eval_tasks": "hellaswag",
        "eval_limit": 0,
        "eval_tasks_every": 0,
        "sample_every": 5000,
        "save_every": 5000,
    }
}


def option(group: str, help: str, default: Any = MISSING, **settings: Any) -> Any:
    """A field of `Options` that is an option on the command line, with argparse's settings for it.

    Without a default here, `data.runs.start.complete` has one: it depends on the preset, the weights or the device.
    An option that is new needs one here, which is what runs did before there was such an option (`options_of_run`).
    """
    return field(default=default, metadata={"group": group, "help": help, **settings})


def span(text: str) -> str:
    """An argparse type: the first of some steps, and the one after the last of them."""
    found = re.fullmatch(r"([0-9]{1,18})-([0-9]{1,18})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text} is no span of steps such as 0-450")
    return f"{int(found[1])}-{int(found[2])}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every option of a run, in the order in which run.json and --help list them."""

    # without one, the size is that of the weights in `init`
    preset: str | None = option(MODEL, f"one of {', '.join(PRESETS)}", None, choices=PRESETS, metavar="SIZE")
    n_layer: int | None = option(MODEL, "layers, instead of the preset's; for random weights", None, **NUMBER)
    n_head: int | None = option(MODEL, "heads, likewise", None, **NUMBER)
    n_embd: int | None = option(MODEL, "width, likewise; a multiple of --n-head", None, **NUMBER)
    n_positions: int | None = option(MODEL, "context in tokens, likewise; --seq-len follows it", None, **NUMBER)
    init: str = option(MODEL, "random, gpt2 (or another on the hub), or a folder", metavar="WEIGHTS")
    data: str = option(
        MODEL, "stories (embedded), files, a folder, OWNER/NAME on the hub, or prepared", nargs="+", metavar="TEXT"
    )
    valid: str | None = option(MODEL, "validation text, or the fraction to hold out", None, metavar="TEXT|FRACTION")
    field: str = option(MODEL, "of records, that holds their text (text)", AS_GIVEN.field, metavar="NAME")
    errors: str = option(MODEL, "for bytes that are no UTF-8 (strict)", AS_GIVEN.errors, choices=ERRORS)
    out: Path | None = option(MODEL, "the run's folder; by default a new one in runs/", None, type=Path, metavar="RUN")
    resume: Path | None = option(MODEL, "go on with a run, or from a checkpoint of it", None, type=Path, metavar="RUN")
    resume_if_any: bool = option(MODEL, "with --out RUN: go on with it if it has begun, as after a restart", **FLAG)
    config: Path | None = option(MODEL, "the options of a run; others change them", None, type=Path, metavar="RUN.JSON")
    recipe: str | None = option(
        MODEL,
        "gpt2-124m-10b: GPT-2 on 10B tokens of FineWeb, as llm.c trains it; other options change it",
        None,
        choices=REPRODUCTIONS,
        metavar="NAME",
    )
    steps: int = option(HOW, "updates of the weights; with --resume also more (at --min-lr) or fewer", **NUMBER)
    batch_size: int = option(HOW, "windows of text in a (micro-)batch of one process", **NUMBER)
    seq_len: int = option(HOW, "tokens in a window", **NUMBER)
    grad_accum: int = option(HOW, "micro-batches an update, over all ranks together (one for each)", 1, **NUMBER)
    global_batch_tokens: int | None = option(
        HOW, "tokens an update, over all ranks together; instead of --grad-accum", None, **NUMBER
    )
    lr: float = option(HOW, "the highest learning rate", type=real(0, closed=False), metavar="X")
    find_lr: bool = option(HOW, "try learning rates and propose one", **FLAG)
    min_lr: float = option(HOW, "the rate the cosine ends in (lr / 10)", type=real(0), metavar="X")
    warmup: int = option(HOW, "updates over which the learning rate rises", type=integer(0), metavar="N")
    schedule: tuple[str, ...] | None = option(
        HOW,
        "steps of a warm-up and its cosine (0-STEPS); then the rate is --min-lr, or another such span begins",
        None,
        type=span,
        nargs="+",
        metavar="BEGIN-END",
    )
    rewarm: bool = option(HOW, "with --resume and --steps: another warm-up and cosine from there on instead", **FLAG)
    weight_decay: float = option(HOW, "of matrices; vectors never decay (0.1)", 0.1, type=real(0), metavar="X")
    betas: tuple[float, float] = option(HOW, "AdamW's", type=real(0, 1), nargs=2, metavar=("BETA1", "BETA2"))
    clip: float = option(HOW, "the gradients' largest norm (1)", 1.0, type=real(0, closed=False), metavar="X")
    dtype: str = option(HOW, "of matmuls; weights stay float32", choices=DTYPES)
    reduce_dtype: str | None = option(HOW, "of gradients on the way between ranks (float32)", None, choices=DTYPES)
    zero: int | None = option(
        HOW,
        "1: the optimizer's state is divided among ranks (ZeRO-1); 0: each has all of it (1)",
        None,
        type=int,
        choices=(0, 1),
    )
    seed: int = option(HOW, "of weights, order of data, and samples (1337)", 1337, type=integer(0), metavar="N")
    device: str | None = option(HOW, "CPU, CUDA, METAL, ...; by default the best there is", None, metavar="NAME")
    gpus: str | None = option(
        HOW,
        "GPUs of this host to train on, or all; of --device CPU: processes",
        None,
        type=count,
        metavar="N|all",
    )
    timeout: int = option(
        HOW,
        "seconds after which a rank that is waited for counts as lost (600)",
        600,
        type=integer(1),
        metavar="SECONDS",
    )
    eval_every: int = option(KEEP, "steps between validation losses", **NUMBER)
    eval_tokens: int = option(KEEP, "validate on the first N; 0: the whole split", type=integer(0), metavar="N")
    eval_tasks: str | None = option(
        KEEP, "score these tasks with each validation loss, as `evaluate` does (none)", None, metavar="TASK,..."
    )
    eval_data_file: str | None = option(
        KEEP, ".jsonl(.gz): the questions of the one task of --eval-tasks, instead of the hub's", None, metavar="FILE"
    )
    eval_limit: int = option(
        KEEP, "only the first N questions of each task (100); 0: all", 100, type=integer(0), metavar="N"
    )
    eval_tasks_every: int | None = option(
        KEEP,
        "steps between scores (those of --eval-every); 0: only before and after training",
        None,
        type=integer(0),
        metavar="N",
    )
    sample_every: int = option(KEEP, "steps between samples", **NUMBER)
    save_every: int = option(KEEP, "steps between checkpoints, besides the last", **NUMBER)
    keep: int | None = option(KEEP, "only the N newest of these, the first and the best", None, **NUMBER)
    tensorboard: bool = option(KEEP, "write TensorBoard's event files too", **FLAG)
    quiet: bool = option(KEEP, "show only how new text is prepared, warnings and errors", **FLAG)
    parity: str | None = None  # the port's parser adds these two, and its program always sets `kernels`
    kernels: str | None = None

    def recorded(self) -> dict[str, Any]:
        """The options that make a run what it is, for run.json and the checkpoints."""
        left_out = {*UNRECORDED, *(PORTS if self.kernels is None else ())}
        left_out |= {name for name in SEVERAL if getattr(self, name) is None}
        left_out |= {*EVALUATION} if self.eval_tasks is None else set()
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
    """The options of both implementations, without defaults, so that `parse` can tell which were given."""
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--preset SIZE] [--init WEIGHTS] [--data TEXT] [--out RUN] [options]",
        description=f"Train GPT-2 in {framework}. Without options: the best preset for this machine.",
        epilog=f"{presets()}\n\nexample: {prog} --preset tinystories --data stories.txt --out runs/mine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = {title: parser.add_argument_group(title) for title in (MODEL, HOW, KEEP)}
    for found in fields(Options):
        settings = dict(found.metadata)
        if settings:
            groups[settings.pop("group")].add_argument(flag(found.name), default=None, **settings)
    return parser


def presets() -> str:
    """What each preset is, as a table for --help."""
    lines = ["presets       layers  heads  width  context  parameters  batch x window  steps"]
    for name, config in PRESETS.items():
        recipe, size = RECIPES[name], f"{parameter_count(config) / 1e6:,.1f}M"
        window = f"{recipe.batch_size} x {recipe.seq_len}"
        lines.append(
            f"  {name:<12}{config.n_layer:>6}{config.n_head:>7}{config.n_embd:>7}{config.n_positions:>9}"
            f"{size:>12}{window:>16}{recipe.steps:>7}"
        )
    return "\n".join(lines)


def flag(name: str) -> str:
    """How an option is spelled on the command line."""
    return f"--{name.replace('_', '-')}"


def listed(names: Sequence[str]) -> str:
    """Options in a sentence: --lr, --steps and --keep."""
    return in_a_row([flag(name) for name in names])


def in_a_row(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def refuse_conflicts(given: Given) -> None:
    """Raises `InputError` where options on the command line exclude each other, with all that do."""
    conflicts = []
    if len(whole := [name for name in ("recipe", "resume", "config") if name in given]) > 1:
        others = "one of them" if len(whole) == 2 else "two of them"
        conflicts.append(f"{listed(whole)} exclude each other; leave {others} out")
    if "rewarm" in given and not {"resume", "steps"} <= given.keys():
        conflicts.append("--rewarm goes with --resume RUN --steps N; give both, or leave it out")
    if {"global_batch_tokens", "grad_accum"} <= given.keys():
        conflicts.append("--global-batch-tokens works out --grad-accum, so it goes without it; leave one of them out")
    if "resume_if_any" in given and ("out" not in given or given.keys() & {"resume", "find_lr"}):
        conflicts.append("--resume-if-any goes with --out RUN, and without --resume and --find-lr; give it so")
    # what a flag turns off is off anyway where nothing is trained
    idle = [name for name in given if name in OF_TRAINING and given[name] not in ("off", NO_TASKS)]
    if "find_lr" in given and idle:
        conflicts.append(f"--find-lr does not train, so it goes without {listed(idle)}; {leave_out(idle)}")
    kept = (*FREE, *(LONGER if "steps" in given else ()), *whole, "rewarm", "resume_if_any")
    if "resume" in given and (fixed := [name for name in given if name not in kept]):
        this = "this" if len(fixed) == 1 else "these"
        conflicts.append(f"--resume takes {this} from the run, so it goes without {listed(fixed)}; {leave_out(fixed)}")
    alone = [name for name in EVALUATION if name in given]
    if alone and not given.keys() & {"eval_tasks", "find_lr", "resume_if_any", *whole}:  # these may have tasks
        conflicts.append(without_tasks(alone))
    refuse_all(conflicts)


def refuse_all(faults: Sequence[str]) -> None:
    """Raises `InputError` with all faults, if there are any: who mends one is not told of another only then."""
    if faults:
        raise InputError(". Also, ".join(faults))


def leave_out(names: Sequence[str]) -> str:
    return f"leave {'that' if len(names) == 1 else 'them'} out"


def without_tasks(alone: Sequence[str]) -> str:
    """What is wrong with options of tasks without any."""
    if len(alone) == 1:
        return f"{flag(alone[0])} goes with --eval-tasks TASK,...; give both, or leave it out"
    return f"{listed(alone)} go with --eval-tasks TASK,...; give it too, or leave them out"


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Given:
    """The options given; with --config or --resume those of the run too, checked as if they had been given."""
    args = vars(parser.parse_args(argv))
    given = without_none(args)
    refuse_conflicts(given)
    if "recipe" in given:
        recipe = REPRODUCTIONS[given.pop("recipe")]
        worked_out = {"global_batch_tokens"} if "grad_accum" in given else set()
        given = {name: value for name, value in recipe.items() if name not in worked_out} | given
    complete = _completed(parser, args, given)
    if "eval_tasks" not in complete and (alone := [name for name in EVALUATION if name in given]):
        raise InputError(without_tasks(alone))
    left_out = EVALUATION if complete.get("eval_tasks") == NO_TASKS else ()
    return {name: value for name, value in complete.items() if name not in left_out}


def _completed(parser: ArgumentParser, args: Mapping[str, Any], given: Given) -> Given:
    """The options given, with those of the run that --config or --resume name."""
    if "resume_if_any" in given and (given["out"] / "run.json").is_file():
        given = going_on(given, parser.prog.split()[-1])
    if "resume" in given:
        resume = given["resume"]
        given["out"] = resume.parent.parent if is_checkpoint(resume) else resume
        file = given["out"] / "run.json"
        if not file.is_file():
            if (found := place()) and found.rank:
                raise InputError(
                    f"rank {found.rank} on {socket.gethostname()} finds no run in {resume} ({file} is missing); all "
                    "hosts have to read its folder: put it on a disk that they share, or copy it to each of them"
                )
            raise InputError(f"{resume} holds no run ({file} is missing); pass the folder of one")
    elif "config" in given:
        file = given["config"] = of_config(given["config"])
    else:
        return given
    options = options_beside(given, file)
    words = []
    for name, value in (options | given).items():
        if name in args and value is not None and value is not False:
            values = value if isinstance(value, list | tuple) else [value]
            words += [flag(name), *([] if value is True else map(str, values))]
    return without_none(vars(parser.parse_args(words)))


def of_config(path: Path) -> Path:
    """The file that --config means. Raises `InputError` where there is none, or it is no run's."""
    file = path / "run.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no file {file}; pass --config runs/NAME/run.json")
    if file.name != "run.json":  # then it is a copy of one, or something else
        with suppress(InputError):
            if "options" in read_json(file):
                return file
        raise InputError(f"{file} is not a run's run.json; pass --config runs/NAME/run.json")
    return file


def options_beside(given: Given, file: Path) -> Given:
    """All options of the run that `file` is of, of which those given will change some. Where another text or model is
    given, what was said of the run's own does not go with it, and is None.
    """
    options = options_of_run(read_sealed(file).get("options"), file)
    for name, others in GO_WITH.items():
        if name in given:
            options |= dict.fromkeys(others)
    return options


def going_on(given: Given, module: str) -> Given:
    """What is meant by the options of a command with --resume-if-any whose run has begun: --resume. Raises `InputError`
    where the run has others than these, with a command of `module` where one would give the run these.
    """
    run = given["out"]
    had = options_of_run(read_sealed(run / "run.json").get("options"), run / "run.json")
    asked = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    if "global_batch_tokens" in asked:  # of which these two follow
        asked.pop("batch_size", None)
        had["global_batch_tokens"] = had["grad_accum"] * had["batch_size"] * had["seq_len"]
    other = {name: value for name, value in asked.items() if name in had and name not in FREE and value != had[name]}
    if other:
        same = []
        if other.keys() != {"steps"} or other["steps"] < had["steps"]:
            same = ["give what it has"]
        if other.get("steps", 0) > had["steps"]:
            gpus = ["--gpus", given["gpus"]] if "gpus" in given else []
            longer = command_as_started(module, "--resume", run, "--steps", other["steps"], *gpus)
            same.append(f"train it longer with `{longer}`, and give --steps {other['steps']} from then on")
        raise InputError(
            f"{run} has {unlike(had, other)}, and --resume-if-any goes on with it as it is; {', '.join(same)}, or give "
            "another --out"
        )
    if "config" in given:
        refuse_other_config(given, had)
    return {name: value for name, value in given.items() if name in (*FREE, "resume_if_any")} | {"resume": run}


def refuse_other_config(given: Given, had: Given) -> None:
    """Raises `InputError` where the run that goes on, and `had` these options, was not begun with those of --config."""
    run, file = given["out"], of_config(given["config"])
    options = options_beside(given, file)
    changed = {name for option in given.keys() & GO_WITH.keys() for name in GO_WITH[option]}
    if "global_batch_tokens" in given:  # of which this follows too
        changed.add("batch_size")
    changed |= {name for name in (*SEVERAL, "schedule") if options[name] is None}  # which a run may get since
    left_out = {*FREE, *given, *changed}
    other = {name: value for name, value in options.items() if name not in left_out and value != had[name]}
    if other:
        raise InputError(
            f"{run} differs from --config {given['config']}: it has {unlike(had, other)}, and --resume-if-any goes on "
            "with it as it is; leave --config out, or give another --out"
        )


def unlike(had: Given, other: Given) -> str:
    """The options of a run that are unlike others: --lr 0.02 (not 0.03) and no --valid (not 0.2)."""
    said = []
    for name, value in other.items():
        has = f"no {flag(name)}" if had[name] is None else f"{flag(name)} {as_words(had[name])}"
        said.append(f"{has} (not {'none' if value is None else as_words(value)})")
    return in_a_row(said)


def as_words(value: Any) -> str:
    """An option's value as it is given on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def options_of_run(said: Any, file: Path) -> Given:
    """All options of a run, of which `file` of its folder says `said`. One that it lacks, because it was begun before
    there was such an option, has its default in `Options`. Raises `InputError` where one is unknown here, or lacks and
    has no default.
    """
    defaults = {found.name: found.default for found in fields(Options) if found.name not in UNRECORDED}
    complete = defaults | dict(said) if isinstance(said, Mapping) else {}
    if complete.keys() != defaults.keys() or MISSING in complete.values():
        raise InputError(f"{file} is of another version of this program; give the options themselves")
    return complete


def without_none(args: dict[str, Any]) -> Given:
    """What was given of the options that argparse found: it has None for the others."""
    given = {name: value for name, value in args.items() if value is not None}
    given |= {"data": ",".join(given["data"])} if "data" in given else {}  # one source, of several files
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def is_checkpoint(path: Path) -> bool:
    """Whether it is the place of a checkpoint in a run's folder, rather than that folder."""
    return path.parent.name == "checkpoints"
