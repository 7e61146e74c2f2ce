"""What a training run begins with or goes on from: its complete options, its weights and its data."""

import hashlib
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import checkpoints, latest_checkpoint, load, resolve
from data.checkpoints.config import PRESETS, GPT2Config, parameter_count, to_hf
from data.checkpoints.initialize import initial_weights
from data.cli import InputError
from data.runs.options import FREE, RECIPES, Given, Options, is_checkpoint
from data.runs.run_folder import load_checkpoint, read_sealed, refuse_occupied
from data.text.loader import Loader
from data.text.prepare import prepared
from data.text.shards import Verification, made_with, read_meta, tokenizer_of
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
    verification: Verification
    tokenizer: Tokenizer

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
        }


def begin(given: Given, device: str) -> Start:
    """Completes the options, and gets the weights and the data. Raises `InputError` for whatever is wrong with them."""
    checkpoint = checkpoint_to_resume(given["resume"]) if "resume" in given else None
    moments: dict[str, np.ndarray] | None = None
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
    if checkpoint:
        config, arrays, moments, state = load_checkpoint(checkpoint)
        refuse_other_options(given["out"] / "run.json", checkpoint, state["options"])
        options = Options(**given)
        if state["step"] >= options.steps:
            raise InputError(f"{options.out} is finished, with all its {options.steps} steps; start a new run")
    else:
        if "out" in given and not given.keys() & {"resume", "find_lr"}:
            refuse_occupied(given["out"])  # before anything that takes long
        options, config, arrays = complete(given, device)
    tokenizer = tokenizer_to_train_with(checkpoint, options)
    folder = prepared(options.data, tokenizer)
    refuse_other_tokenizer(folder, tokenizer, "gpt2" if options.init == "random" else options.init)
    verification = Verification(folder)  # of every token: a damaged one would be trained on in silence
    verification.check(timeout=0.5)  # enough for most data; the rest is verified while it trains
    loader = Loader(folder, "train", options.batch_size * options.grad_accum, options.seq_len, options.seed)
    if checkpoint:
        loader.restore(state["loader"])
    if options.config:
        refuse_other_inputs(options, read_sealed(options.config), folder, arrays)
    return Start(options, config, arrays, moments, state, folder, loader, verification, tokenizer)


def checkpoint_to_resume(path: Path) -> Path | None:
    """The checkpoint that --resume means, itself or its run's latest; None where the run has none yet."""
    if is_checkpoint(path):
        return path
    if checkpoints(path / "checkpoints") or (path / "checkpoints" / "latest").exists():
        return latest_checkpoint(path)
    return None


def refuse_other_options(run_json: Path, checkpoint: Path, of_checkpoint: Mapping[str, Any]) -> None:
    """Raises `InputError` where run.json is not the one that the checkpoint was trained with."""
    of_run, of_checkpoint = (
        {name: value for name, value in options.items() if name not in FREE}
        for options in (read_sealed(run_json)["options"], of_checkpoint)
    )
    if of_run != of_checkpoint:
        raise InputError(f"{run_json} is not the one that {checkpoint} was trained with; put it back")


def refuse_other_inputs(options: Options, said: dict[str, Any], folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises `InputError` where options of the run that `said` is of name other data or weights now than they did."""
    before = said["options"]
    if options.data == before["data"] and read_meta(folder)["checksum"] != said["data"]["checksum"]:
        raise InputError(
            f"{options.data} is not the text that {options.config} was run on; put that back, or give another --data"
        )
    named = all(getattr(options, name) == before[name] for name in ("init", "preset", "seed"))
    if named and checksum(arrays) != said["weights"]:
        raise InputError(
            f"{options.init} is not the weights that {options.config} began with; "
            "put those back, or give another --init"
        )


def tokenizer_to_train_with(checkpoint: Path | None, options: Options) -> Tokenizer:
    """That of the checkpoint to go on from, or of the weights to begin with; random ones have their data's."""
    if checkpoint or options.init != "random":
        return of_folder(checkpoint or resolve(options.init))
    return tokenizer_of_text(options.data)


def tokenizer_of_text(data: str) -> Tokenizer:
    """That of prepared data; text is prepared with GPT-2's."""
    return tokenizer_of(Path(data)) if os.path.isfile(Path(data, "meta.json")) else gpt2()


def refuse_other_tokenizer(folder: Path, tokenizer: Tokenizer, model: str) -> None:
    """Raises `InputError` where the data in `folder` was prepared with another tokenizer than that of `model`."""
    meta = read_meta(folder)
    if not made_with(meta, tokenizer):
        theirs, source = meta.get("vocabulary", {"name": "gpt2"})["name"], meta["splits"]["train"]["source"]
        raise InputError(
            f"{folder} was prepared with the tokenizer of {theirs}, which is not that of {model}; prepare the text "
            f"again with `python -m data.text.prepare {shlex.quote(source)} --out DIR --tokenizer {shlex.quote(model)}`"
        )


def complete(given: Given, device: str) -> tuple[Options, GPT2Config, dict[str, np.ndarray]]:
    """Fills in the options that were left out, checks those that depend on others, and gets the model to begin with."""
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
        config, size = PRESETS[preset], tokenizer_of_text(given.get("data", "")).vocab_size
        if size != VOCAB_SIZE:
            config = replace(config, vocab_size=size)
    else:
        config, arrays = load(init)
        if preset and config != PRESETS[preset]:
            raise InputError(f"the weights of {init} are of another size than preset {preset}; leave out one of them")
    sizes = {name: replace(size, vocab_size=config.vocab_size) for name, size in PRESETS.items()}
    recipe = RECIPES[preset or next((name for name, size in sizes.items() if size == config), "gpt2")]

    steps, lr = given.get("steps", recipe.steps), given.get("lr", recipe.finetune_lr if arrays else recipe.lr)
    defaults: Given = {
        "data": "stories",
        "batch_size": recipe.batch_size,
        "seq_len": min(recipe.seq_len, config.n_positions),
        "min_lr": lr / 10,
        "warmup": min(recipe.warmup, steps // 5),
        "betas": recipe.betas,
        "dtype": "bfloat16" if device == "CUDA" else "float32",
        "eval_every": max(1, steps // 10),
        "eval_tokens": recipe.eval_tokens,
        "sample_every": max(1, steps // 4),
        "save_every": max(1, steps // 4),
    }
    options = Options(**(defaults | given | {"preset": preset, "init": init, "steps": steps, "lr": lr}))

    if options.min_lr > options.lr:
        raise InputError(f"--min-lr {options.min_lr} is above --lr {options.lr}; give a smaller one")
    if options.seq_len > config.n_positions:
        raise InputError(
            f"--seq-len {options.seq_len} is over the model's context of {config.n_positions} tokens; give fewer"
        )
    arrays = arrays or initial_weights(config, options.seed, recipe.initializer_range)
    return options, config, {name: array.astype(np.float32) for name, array in arrays.items()}


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of named arrays."""
    sha256 = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sha256.update(name.encode() + array.tobytes())
    return sha256.hexdigest()
