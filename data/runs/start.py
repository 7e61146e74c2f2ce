"""What a training run begins with or goes on from: its complete options, its weights and its data."""

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import (
    latest_checkpoint,
    load,
    named_checkpoint,
    names_checkpoint,
    refuse_damaged,
    resolve,
)
from data.checkpoints.config import PRESETS, GPT2Config, parameter_count, to_hf
from data.checkpoints.initialize import initial_weights
from data.checkpoints.sums import checkpoints
from data.cli import InputError, counted
from data.evaluation.tasks import Spec, require_harness, specs_of
from data.ranks import ALONE, Ranks
from data.runs.claim import claimed, claimed_new
from data.runs.global_batch import accumulated, micro_batch, share_of_a_rank
from data.runs.options import (
    FREE,
    NO_TASKS,
    RECIPES,
    SIZES,
    Given,
    Options,
    is_checkpoint,
    leave_out,
    listed,
    options_of_run,
    refuse_all,
)
from data.runs.run_folder import load_checkpoint, read_sealed
from data.runs.sameness import refuse_other_programs, refuse_other_starts
from data.runs.schedule import refuse_disorder, trained_longer
from data.runs.stopping import BeforeTraining
from data.runs.together import SharedVerification, by_rank_0, in_turns
from data.text import token_files
from data.text.formats import Reading
from data.text.loader import Loader
from data.text.prepare import prepared
from data.text.shards import made_with, read_meta, tokenizer_of
from data.text.sources import HUB_FILES, HUB_REPO, is_dataset
from data.text.tokenizer import VOCAB_SIZE, Tokenizer, gpt2, of_folder


@dataclass(frozen=True)
class Start:
    """Where training begins: the weights, and of a run that goes on its moments and trainer.json."""

    options: Options
    config: GPT2Config
    arrays: dict[str, np.ndarray]
    moments: dict[str, np.ndarray] | None  # None: before the first step
    state: dict[str, Any]
    folder: Path  # of prepared data
    loader: Loader
    verification: SharedVerification
    tokenizer: Tokenizer
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # options of a run that goes on: before and now
    ranks: Ranks = ALONE
    tasks: Any = None  # those of --eval-tasks: `data.evaluation.harness.Tasks`, which not everybody can import
    machines: dict[str, Any] = field(default_factory=dict)  # what run.json says of several ranks
    before: BeforeTraining = field(default_factory=BeforeTraining)

    @property
    def micro_batches(self) -> int:
        """How many this rank takes in an update: its part of the global batch, in parts of at most --batch-size."""
        return self.loader.batch_size // micro_batch(self.loader.batch_size, self.options.batch_size)

    def described(self) -> dict[str, Any]:
        """What run.json says of what is trained."""
        return {
            "options": self.options.recorded(),
            "seed": self.options.seed,
            "config": to_hf(self.config),
            "parameters": parameter_count(self.config),
            "weights": checksum(self.arrays),
            "tokenizer": {"name": self.tokenizer.name, "sha256": self.tokenizer.sha256},
            "data": {"folder": str(self.folder), "checksum": read_meta(self.folder)["checksum"]},
            "hub": hub_names(self.options),
        }


@dataclass(frozen=True)
class Model:
    """What is trained, as it is to begin with; moments and `state`, trainer.json, are those of a run that goes on."""

    config: GPT2Config
    arrays: dict[str, np.ndarray]
    moments: dict[str, np.ndarray] | None = None
    state: dict[str, Any] = field(default_factory=lambda: {"step": 0, "tokens": 0, "seconds": 0.0})


@dataclass(frozen=True)
class Plan:
    """What rank 0 decides for all ranks."""

    options: Options  # every one of them
    checkpoint: Path | None  # to go on from
    changed: dict[str, tuple[Any, Any]]
    finished: bool


@contextmanager
def begin(given: Given, device: str, ranks: Ranks = ALONE) -> Iterator[Start]:
    """Completes the options, and gets the weights, the data, and the run's folder, for this process alone; or for its
    ranks together, of which rank 0 decides and claims the folder, and each reads weights and data itself.

    Raises `InputError` for whatever is wrong with them, on all ranks, be it on one alone.
    """
    before = BeforeTraining()
    with before.stops(ranks), ExitStack() as held:
        yield replace(_begin(given, device, ranks, held), before=before)


def _begin(given: Given, device: str, ranks: Ranks, held: ExitStack) -> Start:
    refuse_other_programs(ranks, given)
    specs = specs_to_score(given)
    read: list[Model] = []  # by rank 0, in order to decide

    def decide() -> Plan:
        plan, model = _planned(given, device, ranks.size, held)
        read.append(model)
        return plan

    plan = by_rank_0(ranks, decide)
    options = replace(plan.options, quiet=plan.options.quiet or ranks.rank > 0)
    if plan.finished:
        if not options.quiet:
            print(f"{options.out} is finished, with all its {counted(options.steps, 'step')}")
        sys.exit(0)
    model = in_turns(ranks, lambda: read[0] if read else _model(plan, device, ranks.size))
    config, arrays, state = model.config, model.arrays, model.state
    refuse_damaged(plan.checkpoint or options.init, arrays)
    if specs and not options.quiet:
        print(f"loading the tasks {options.eval_tasks}", flush=True)
    # before all that takes longer
    tasks = in_turns(ranks, lambda: tasks_to_score(specs, config.context)) if specs else None

    def prepare() -> tuple[Tokenizer, Path]:
        tokenizer = tokenizer_to_train_with(plan.checkpoint, options, config)
        folder = prepared(options.data, options.valid, Reading(options.field, options.errors), tokenizer)
        refuse_other_tokenizer(folder, tokenizer, "gpt2" if options.init == "random" else options.init)
        return tokenizer, folder

    def load() -> Loader:
        if read_meta(folder)["splits"]["valid"]["tokens"] < 2:
            raise InputError(
                f"the validation text of {folder} is a single token, which predicts nothing; give more text"
            )
        share = share_of_a_rank(options, ranks.size)
        loader = Loader(folder, "train", share, options.seq_len, options.seed, ranks.rank, ranks.size)
        if plan.checkpoint:
            loader.restore(state["loader"])
        if options.config:
            refuse_other_inputs(options, read_sealed(options.config), folder, config, arrays)
        return loader

    tokenizer, folder = in_turns(ranks, prepare)
    verification = SharedVerification(ranks, folder)  # a damaged token would be trained on in silence
    verification.check_all(timeout=0.5)  # enough for most data; the rest is verified while it trains
    loader = in_turns(ranks, load)
    start = Start(
        options,
        config,
        arrays,
        model.moments,
        state,
        folder,
        loader,
        verification,
        tokenizer,
        plan.changed,
        ranks,
        tasks,
    )
    if ranks.size > 1:
        sums = {"their weights": checksum(arrays), "their optimizer state": checksum(model.moments or {})}
        sums |= {"their data": read_meta(folder)["checksum"], "their place in the data": str(loader.state())}
        refuse_other_starts(ranks, options, sums)
    return start


def _planned(given: Given, device: str, size: int, held: ExitStack) -> tuple[Plan, Model]:
    """What to train on `size` ranks. Claims the run's folder, and gives new runs one."""
    if "out" in given:  # before anything that takes long
        held.enter_context(claimed(given["out"], empty="resume" not in given, find_lr="find_lr" in given))
    checkpoint = checkpoint_to_resume(given["resume"]) if "resume" in given else None
    if checkpoint:
        model = Model(*load_checkpoint(checkpoint))
        refuse_other_options(given["out"] / "run.json", checkpoint, model.state["options"])
        options = Options(**given)
    else:
        options, config, arrays = complete(given, device, size)
        model = Model(config, arrays)
    share_of_a_rank(options, size)
    if size > 1 and options.zero is None:
        options = replace(options, zero=1)
    changed: dict[str, tuple[Any, Any]] = {}
    if options.resume:
        assert options.out
        before = options_of_run(read_sealed(options.out / "run.json")["options"], options.out / "run.json")
        if options.resume_if_any and model.state["step"] >= options.steps:
            return Plan(options, checkpoint, changed, finished=True), model
        refuse_no_steps(options, before["steps"], model.state["step"])
        options = trained_longer(options, before, model.state["step"])
        now = before | json.loads(json.dumps(options.recorded()))
        changed = {name: (before[name], now[name]) for name in before if name not in FREE and before[name] != now[name]}
    if not options.out:
        name = f"{'find-lr-' * options.find_lr}{options.preset or 'finetune'}-%Y%m%d-%H%M%S"
        options = replace(options, out=held.enter_context(claimed_new(Path("runs", time.strftime(name)))))
    return Plan(options, checkpoint, changed, finished=False), model


def _model(plan: Plan, device: str, size: int) -> Model:
    """What the plan's weights are, read again by another rank than the one that made it."""
    if plan.checkpoint:
        return Model(*load_checkpoint(plan.checkpoint))
    said = {name: value for name, value in vars(plan.options).items() if value is not None}
    _, config, arrays = complete(said, device, size)
    return Model(config, arrays)


def specs_to_score(given: Given) -> list[Spec]:
    """The tasks of --eval-tasks, if there are any."""
    if "eval_tasks" not in given or "find_lr" in given:
        return []
    file = given.get("eval_data_file")
    with tasks_may_be_left_out():
        require_harness()
        return specs_of(given["eval_tasks"], Path(file) if file else None, prefix="--eval-")


def tasks_to_score(specs: Sequence[Spec], context: int) -> Any:
    """`data.evaluation.harness.Tasks`, for a model of this context, in tokens."""
    from data.evaluation.harness import Tasks  # here, because it imports PyTorch, which takes long

    with tasks_may_be_left_out():
        return Tasks(specs, context)


@contextmanager
def tasks_may_be_left_out() -> Iterator[None]:
    """Adds the way out to an error about tasks, because a recipe has them though the user did not ask for any."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{e}; or train without scores on tasks: --eval-tasks {NO_TASKS}") from None


def checkpoint_to_resume(path: Path) -> Path | None:
    """The checkpoint that --resume means: itself, one that the run's file names, or the run's latest; None where the
    run has none yet.
    """
    if names_checkpoint(path):
        return named_checkpoint(path)
    if is_checkpoint(path):
        return path
    if checkpoints(path / "checkpoints") or (path / "checkpoints" / "latest").exists():
        return latest_checkpoint(path)
    return None


def refuse_no_steps(options: Options, steps: int, step: int) -> None:
    """Raises `InputError` where a run that is at `step`, and was to have `steps`, has none left to do."""
    if step < options.steps:
        return
    if options.steps != steps:
        raise InputError(f"{options.resume} has done {counted(step, 'step')} already; give --steps above that")
    raise InputError(
        f"{options.out} is finished, with all its {counted(steps, 'step')}; add --steps N to train it for N in all"
    )


def refuse_other_options(run_json: Path, checkpoint: Path, of_checkpoint: Mapping[str, Any]) -> None:
    """Raises `InputError` where run.json is not the one that the checkpoint was trained with, be it before the run was
    trained longer or since.
    """
    said = read_sealed(run_json)
    options = options_of_run(said["options"], run_json)
    ever = [options]
    for part in reversed(said.get("continued", [])):
        options = options | {name: before for name, (before, _) in part.get("changed", {}).items()}
        ever.append(options)
    trained = options_of_run(of_checkpoint, checkpoint)
    if not any(all(trained[name] == had[name] for name in had if name not in FREE) for had in ever):
        raise InputError(f"{run_json} is not the one that {checkpoint} was trained with; put it back")


def refuse_other_inputs(
    options: Options, said: dict[str, Any], folder: Path, config: GPT2Config, arrays: Mapping[str, np.ndarray]
) -> None:
    """Raises `InputError` where options of the run that `said` is of name other data or weights now than they did."""
    assert options.config
    before = options_of_run(said["options"], options.config)
    same = all(getattr(options, name) == before[name] for name in ("data", "valid", "field", "errors"))
    if same and read_meta(folder)["checksum"] != said["data"]["checksum"]:
        raise InputError(
            f"{options.data} is not the text that {options.config} was run on; put that back, or give another --data"
        )
    named = all(getattr(options, name) == before[name] for name in ("init", "preset", "seed", *SIZES))
    named = named and config.vocab_size == said["config"]["vocab_size"]  # which random weights have from their data
    if named and checksum(arrays) != said["weights"]:
        raise InputError(
            f"{options.init} is not the weights that {options.config} began with; "
            "put those back, or give another --init"
        )


def tokenizer_to_train_with(checkpoint: Path | None, options: Options, config: GPT2Config) -> Tokenizer:
    """That of the checkpoint to go on from, or of the weights to begin with; random ones have their data's."""
    if checkpoint or options.init != "random":
        return of_folder(checkpoint or resolve(options.init), config.vocab_size)
    return tokenizer_of_text(options.data)


def tokenizer_of_text(data: str) -> Tokenizer:
    """That of prepared data; text is prepared with GPT-2's."""
    return tokenizer_of(Path(data)) if os.path.isfile(Path(data, "meta.json")) else gpt2()


def refuse_other_tokenizer(folder: Path, tokenizer: Tokenizer, model: str) -> None:
    """Raises `InputError` where the data in `folder` was prepared with another tokenizer than that of `model`."""
    meta = read_meta(folder)
    if not made_with(meta, tokenizer) and token_files.holds(folder):
        raise InputError(f"{folder} holds GPT-2's tokens, and {model} has another tokenizer; pass a text as --data")
    if not made_with(meta, tokenizer):
        theirs, given = meta.get("vocabulary", {"name": "gpt2"})["name"], meta.get("given")
        split = meta["splits"]["train"]
        command = ["python", "-m", "data.text.prepare", given["source"] if given else "SOURCE", "--out", "DIR"]
        command += ["--valid", given["valid"]] if given and given["valid"] is not None else []
        for name, default in vars(Reading()).items():
            command += [f"--{name}", str(split[name])] if split.get(name, default) != default else []
        command += ["--special-tokens"] * meta.get("special_tokens", False) + ["--tokenizer", model]
        raise InputError(
            f"{folder} was prepared with the tokenizer of {theirs}, which is not that of {model}; "
            f"prepare {'the' if given else 'its'} text again with `{shlex.join(command)}`"
        )


def complete(given: Given, device: str, world_size: int = 1) -> tuple[Options, GPT2Config, dict[str, np.ndarray]]:
    """Fills in the options that were left out, for `world_size` ranks, checks those that depend on others, and gets the
    model to begin with.
    """
    sizes = {name: given[name] for name in SIZES if name in given}
    if device != "CPU" and sizes and not given.keys() & {"preset", "init"}:
        given = given | {"preset": "tinystories"}
    if device != "CPU" and not given.keys() & {"preset", "init"}:
        try:
            resolve("gpt2")  # downloads it
            given = {"data": "tinystories"} | given | {"preset": "gpt2", "init": "gpt2"}
        except InputError as e:
            print(f"Without the pretrained gpt2 ({e}): preset tinystories, from random weights.")
            given = given | {"preset": "tinystories"}
    preset, init = given.get("preset"), given.get("init", "random")
    arrays: dict[str, np.ndarray] | None = None
    if init == "random":
        preset = preset or "tiny"
        config, size = replace(PRESETS[preset], **sizes), tokenizer_of_text(given.get("data", "")).vocab_size
        if size != VOCAB_SIZE:
            config = replace(config, vocab_size=size)
    else:
        if sizes:
            are = "is" if len(sizes) == 1 else "are"
            raise InputError(
                f"{listed([*sizes])} {are} for random weights, and {init} has its own; {leave_out([*sizes])}"
            )
        config, arrays = load(init)
        if preset and config != PRESETS[preset]:
            raise InputError(f"the weights of {init} are of another size than preset {preset}; leave out one of them")
    alike = (name for name, size in PRESETS.items() if replace(size, vocab_size=config.vocab_size) == config)
    recipe = RECIPES[preset or next(alike, "gpt2")]

    steps, lr = given.get("steps", recipe.steps), given.get("lr", recipe.finetune_lr if arrays else recipe.lr)
    defaults: Given = {
        "data": "stories",
        "batch_size": recipe.batch_size,
        "grad_accum": world_size,
        "seq_len": sizes.get("n_positions", min(recipe.seq_len, config.context)),
        "min_lr": lr / 10,
        "warmup": min(recipe.warmup, steps // 5),
        "betas": recipe.betas,
        "dtype": "bfloat16" if device == "CUDA" else "float32",
        "eval_every": max(1, steps // 10),
        "eval_tokens": recipe.eval_tokens,
        "sample_every": max(1, steps // 4),
        "save_every": max(1, steps // 4),
    }
    defaults |= {"reduce_dtype": "float32"} if world_size > 1 else {}
    options = Options(**(defaults | given | {"preset": preset, "init": init, "steps": steps, "lr": lr}))
    options = consistent(options, config, world_size)
    trained = max(options.seq_len, config.context if arrays else 0)
    config = replace(config, trained_positions=trained if trained < config.n_positions else None)
    arrays = arrays or initial_weights(config, options.seed, recipe.initializer_range)
    return options, config, {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}


def consistent(options: Options, config: GPT2Config, world_size: int) -> Options:
    """The options with what --global-batch-tokens works out. Raises `InputError` where some do not fit others or the
    model, with all that do not.
    """
    misfits = []
    if options.min_lr > options.lr:
        misfits.append(f"--min-lr {options.min_lr} is above --lr {options.lr}; give a smaller one")
    if options.seq_len > config.n_positions:
        misfits.append(
            f"--seq-len {options.seq_len} is over the model's context of {config.n_positions} tokens; give fewer"
        )
    try:
        if options.schedule:
            refuse_disorder(options.schedule)
    except InputError as e:
        misfits.append(str(e))
    try:
        if tokens := options.global_batch_tokens:
            grad_accum, batch_size = accumulated(tokens, options.seq_len, options.batch_size, world_size)
            options = replace(options, grad_accum=grad_accum, batch_size=batch_size)
    except InputError as e:
        misfits.append(str(e))
    refuse_all(misfits)
    return options


def hub_names(options: Options) -> dict[str, str | None]:
    """What the weights to begin with and the data are called on the hub, None where they are not from there. What is a
    file or folder now may be taken for a name of the hub later.
    """
    here = options.init == "random" or os.path.exists(options.init)
    dataset = HUB_REPO if options.data in HUB_FILES else None
    if is_dataset(options.data):
        dataset = options.data.partition(":")[0]
    return {"model": None if here else options.init, "dataset": dataset}


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of named arrays."""
    sha256 = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sha256.update(name.encode())
        sha256.update(np.ascontiguousarray(array).data)
    return sha256.hexdigest()
