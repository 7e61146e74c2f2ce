"""The training command: a small real run, the same stopped and resumed, and what it refuses."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from threading import Event
from threading import enumerate as enumerate_threads
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from tinygrad import Tensor

import data.training
import tinygrad_impl
from data import shards
from data.checkpoint import SUMS, load, save, write_sums
from data.cli import InputError
from data.config import PRESETS, GPT2Config, parameter_shapes
from data.initialize import initial_weights
from data.run_folder import RunFolder, read_metrics, read_sealed, write_sealed
from data.shards import read_meta
from data.testing import SMALL, Result, call, refused, save_model, write_stories, write_tokens
from data.training import RECIPES, UNRECORDED, Smoothed, complete, parse
from tinygrad_impl import train
from tinygrad_impl.model import GPT2
from tinygrad_impl.trainer import learning_rate

STEPS = 6
B, T, ACCUM = 2, 16, 2
STEP_KEYS = {"step", "loss", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second"}
CHECKPOINT = [SUMS, "config.json", "merges.txt", "model.safetensors", "optimizer.safetensors", "tokenizer.json"]
CHECKPOINT += ["tokenizer_config.json", "trainer.json", "vocab.json"]
DAMAGED = b"{"

Folders = tuple[Path, Path]  # where commands run, and a finished run in it


def options(**changed: object) -> list[object]:
    """Those of the small run, which goes ungated. A change to None leaves an option out."""
    values: dict[str, object] = {"init": "init", "data": "stories.txt", "steps": STEPS, "batch_size": B, "seq_len": T}
    values |= {"grad_accum": ACCUM, "lr": 0.02, "warmup": 1, "eval_every": 2, "eval_tokens": 64, "sample_every": 3}
    values |= {"save_every": 3, "device": "CPU", "parity": "off"} | changed
    given = {f"--{name.replace('_', '-')}": value for name, value in values.items() if value is not None}
    return [word for pair in given.items() for word in pair]


def training(folder: Path, out: str, **changed: object) -> Result:
    return call(train.main, *options(out=out, **changed), cwd=folder)


def resume(run: Path | str, folder: Path, *more: object) -> Result:
    return call(train.main, "--resume", run, *more, cwd=folder)


def metrics(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run)


def course(run: Path) -> list[dict[str, Any]]:
    """The metrics but for the times, which no two runs share."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in metrics(run)]


def rewind(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as if it had been killed after `step` was saved and some more steps were done."""
    shutil.copytree(run, to)
    (to / "checkpoints" / "latest").write_text(f"step-{step}\n")
    for later in (to / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    return to


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """The folder that training ran in, the run, and what was printed."""
    folder = tmp_path_factory.mktemp("train")
    save_model(folder / "init")
    write_stories(folder / "stories.txt")
    result = training(folder, "run", parity="on")
    assert result.code == 0, result
    return folder, folder / "run", result


@pytest.fixture(scope="module")
def resumed(finished: tuple[Path, Path, Result]) -> tuple[Path, Result]:
    folder, run, _ = finished
    stopped = rewind(run, folder / "stopped", 3)
    assert len(metrics(stopped)) == STEPS + 1  # with the lines after its checkpoint
    with open(stopped / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 7, "lo')
    return stopped, resume("stopped", folder)


@pytest.fixture
def place(finished: tuple[Path, Path, Result]) -> Folders:
    return finished[0], finished[1]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No arithmetic, which takes long to compile: what is tested is around it."""

    def step(self: train.Trainer, batches: Sequence[tuple[np.ndarray, np.ndarray]], lr: float) -> tuple[float, float]:
        self.steps += 1
        return 2.0, 1.0

    monkeypatch.setattr(train.Trainer, "step", step)
    monkeypatch.setattr(train.Evaluator, "__call__", lambda self, batches: float(len(list(batches))))
    monkeypatch.setattr(train, "write", lambda generator, prompts, *_: [f"{prompts[0]} it was."])


def test_run_json(finished: tuple[Path, Path, Result]) -> None:
    folder, run, _ = finished
    said = json.loads((run / "run.json").read_text(encoding="utf-8"))
    known = set(vars(train.parser().parse_args([]))) - {*UNRECORDED}
    assert said["options"].keys() == known
    unset = {name for name, value in said["options"].items() if value is None}
    assert unset == {"preset", "keep"}  # all others were filled in
    assert (said["options"]["grad_accum"], said["options"]["min_lr"]) == (ACCUM, 0.002)
    assert said["seed"] == said["options"]["seed"] == 1337
    assert said["data"]["checksum"] == read_meta(folder / said["data"]["folder"])["checksum"]
    assert said["versions"]["tinygrad"] == version("tinygrad")
    assert said["versions"].keys() == {"python", "tinygrad", "numpy", "tiktoken", "safetensors"}
    assert (said["device"], said["kernels"], said["config"]["n_layer"]) == ("CPU", "plain", 1)
    assert said["parameters"] == sum(a.size for a in initial_weights(SMALL, 0).values())
    assert "--grad-accum" in said["command"]


def test_metrics(finished: tuple[Path, Path, Result]) -> None:
    rows = metrics(finished[1])
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert rows[0].keys() == {"step", "tokens", "seconds", "val_loss"}
    for row in rows[1:]:
        assert row.keys() - {"val_loss"} == STEP_KEYS
        assert ("val_loss" in row) == (row["step"] % 2 == 0)
        assert row["tokens"] == row["step"] * B * T * ACCUM
        assert row["lr"] == learning_rate(row["step"] - 1, STEPS, 0.02, 0.002, 1)
        assert row["tokens_per_second"] > 0
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_the_loss_goes_down(finished: tuple[Path, Path, Result]) -> None:
    rows = metrics(finished[1])
    assert rows[0]["val_loss"] == pytest.approx(math.log(50257), abs=0.1)  # of a model that knows nothing
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3
    assert rows[-1]["loss"] < rows[1]["loss"] - 0.3


def test_what_it_leaves_and_prints(finished: tuple[Path, Path, Result]) -> None:
    _, run, result = finished
    samples = (run / "samples.md").read_text(encoding="utf-8")
    assert [line for line in samples.splitlines() if line.startswith("## ")] == ["## Step 0", "## Step 3", "## Step 6"]
    stories = [part.split("\n\n", 1)[1] for part in samples.removesuffix("\n\n---\n\n").split("\n\n---\n\n")]
    assert all(story.startswith("Once upon a time") for story in stories)
    assert f"--- before training (step 0) ---\n{stories[0]}\n" in result.out
    assert f"--- after {STEPS} steps (step {STEPS}) ---\n{stories[-1]}\n" in result.out
    assert stories[0] != stories[-1]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(os.listdir(run / "checkpoints")) == ["best", "latest", "step-0", "step-3", "step-6"]
    assert (run / "checkpoints" / "latest").read_text() == "step-6\n"
    assert (run / "checkpoints" / "best").read_text() == "step-6\n"
    for step in (0, 3, 6):
        assert sorted(os.listdir(run / "checkpoints" / f"step-{step}")) == CHECKPOINT
    assert "\r" not in result.err
    assert not result.errors


def test_step_0_is_what_training_began_with(finished: tuple[Path, Path, Result]) -> None:
    folder, run, _ = finished
    given, began, ended = (load(path)[1] for path in (folder / "init", run / "checkpoints" / "step-0", run))
    for name, array in given.items():
        np.testing.assert_array_equal(began[name], array)
        assert not np.array_equal(ended[name], array)


def test_hugging_face_loads_the_checkpoint(finished: tuple[Path, Path, Result]) -> None:
    run = finished[1]
    tokens = np.random.default_rng(0).integers(0, 50257, (2, T)).astype(np.int32)
    model = transformers.GPT2LMHeadModel.from_pretrained(run / "checkpoints" / "step-6").eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long()).logits.numpy()
    ours = GPT2(*load(run))(Tensor(tokens))[0].numpy()
    assert ours.dtype == theirs.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_a_resumed_run_is_the_run_that_went_through(
    finished: tuple[Path, Path, Result], resumed: tuple[Path, Result]
) -> None:
    run, (stopped, result) = finished[1], resumed
    assert result.code == 0, result
    assert "continuing after step 3" in result.out
    assert course(stopped) == course(run)
    seconds = [row["seconds"] for row in metrics(stopped)]
    assert seconds == sorted(seconds)
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = ((r / "checkpoints" / "step-6" / file).read_bytes() for r in (stopped, run))
        assert ours == theirs
    states = [json.loads((r / "checkpoints" / "step-6" / "trainer.json").read_text()) for r in (stopped, run)]
    assert states[0]["loader"] == states[1]["loader"]
    assert states[0]["tokens"] == states[1]["tokens"]
    assert (stopped / "samples.md").read_bytes() == (run / "samples.md").read_bytes()


@pytest.mark.usefixtures("stubbed")
def test_resuming_where_no_validation_comes_next(place: Folders, tmp_path: Path) -> None:
    rewind(place[1], tmp_path / "stopped", 0)  # step 1 is not measured
    assert resume(tmp_path / "stopped", place[0]).code == 0


def test_a_finished_run_is_not_resumed(place: Folders) -> None:
    refused(resume("run", place[0]), "is finished, with all its 6 steps")


def test_the_seed_decides(place: Folders) -> None:
    folder, run = place
    result = training(folder, "other", steps=1, seed=2)
    assert result.code == 0, result
    assert metrics(folder / "other")[0]["val_loss"] == metrics(run)[0]["val_loss"]  # of given weights, on the same text
    assert metrics(folder / "other")[1]["loss"] != metrics(run)[1]["loss"]


def test_another_process_trains_the_same(place: Folders) -> None:
    """As a program of its own, with nothing left in memory: the same seed gives the same losses, bit for bit.

    Without the gate, too, so it leaves no trace in what is trained.
    """
    folder, run = place
    root = str(Path(tinygrad_impl.__file__).parents[1])
    command = [sys.executable, "-m", "tinygrad_impl.train", *map(str, options(out="again"))]
    result = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert course(folder / "again") == course(run)


@pytest.mark.usefixtures("stubbed")
@pytest.mark.parametrize("values", [(math.nan, 1.0), (2.0, math.inf)])
def test_a_loss_that_is_no_number_ends_training(
    values: tuple[float, float], place: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(self: Any, batches: object, lr: float) -> tuple[float, float]:
        if len(self.__dict__.setdefault("tried", [])) > 9:
            raise AssertionError("it goes on regardless")
        self.tried.append(lr)
        return values

    monkeypatch.setattr(train.Trainer, "step", diverging)
    result = training(place[0], str(tmp_path / "run"))
    assert result.code == 2
    assert len(result.errors) == 1
    assert result.err.endswith(result.errors[0] + "\n")
    assert (
        f"the loss is {values[0]} and the gradient's norm {values[1]} at step 1, on windows 0 to 3" in result.errors[0]
    )
    assert "checkpoints/step-0 is good" in result.errors[0]
    assert "--lr below 0.02" in result.errors[0]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0]


@pytest.mark.usefixtures("stubbed")
def test_an_interrupted_run_can_be_resumed(place: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = train.Trainer.step

    def interrupted(self: train.Trainer, batches: Any, lr: float) -> tuple[float, float]:
        if self.steps == 5:
            raise KeyboardInterrupt
        return step(self, batches, lr)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", interrupted)
        assert training(place[0], str(tmp_path / "run")).code == 130
    assert resume(tmp_path / "run", place[0]).code == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(STEPS + 1))


@pytest.mark.usefixtures("stubbed")
@pytest.mark.parametrize("where", ["a checkpoint", "metrics"])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    place: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    replace, add, checkpoints = os.replace, RunFolder.add_metrics, tmp_path / "run" / "checkpoints"

    def full(source: Path, target: Path) -> None:
        if Path(target) == checkpoints / "step-3.partial" / "optimizer.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    def cut(self: RunFolder, row: dict[str, Any]) -> None:
        if row["step"] == 3:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write('{"step": 3, "lo')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, row)

    with monkeypatch.context() as patch:
        if where == "metrics":
            patch.setattr(RunFolder, "add_metrics", cut)
        else:
            patch.setattr(os, "replace", full)
        result = training(place[0], str(tmp_path / "run"), eval_every=1)
    assert result.code == 2
    assert len(result.errors) == 1
    assert f"No space left on device: step 3 could not be saved in {tmp_path / 'run'}" in result.errors[0]
    assert f"--resume {tmp_path / 'run'}" in result.errors[0]
    assert sorted(os.listdir(checkpoints)) == ["best", "latest", "step-0"]
    assert (checkpoints / "latest").read_text() == "step-0\n"
    load(tmp_path / "run")
    assert resume(tmp_path / "run", place[0]).code == 0  # once there is space again
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(STEPS + 1))


@pytest.mark.usefixtures("stubbed")
def test_a_disk_that_is_full_at_once(place: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    refused(
        training(place[0], str(tmp_path / "run")),
        "step 0 could not be saved",
        "make room and begin again, in another --out",
    )


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"init": None, "preset": "huge"}, "argument --preset: invalid choice: 'huge'"),
        ({"steps": 0}, "--steps"),
        ({"batch_size": "2.5"}, "--batch-size"),
        ({"grad_accum": 0}, "--grad-accum"),
        ({"lr": 0}, "--lr"),
        ({"lr": "nan"}, "--lr"),
        ({"min_lr": 1}, "--min-lr 1.0 is above --lr 0.02"),
        ({"warmup": -1}, "--warmup"),
        ({"weight_decay": "inf"}, "--weight-decay"),
        ({"betas": 0.9}, "--betas: expected 2 arguments"),
        ({"clip": 0}, "--clip"),
        ({"dtype": "float16"}, "--dtype"),
        ({"seed": -1}, "--seed"),
        ({"parity": "maybe"}, "--parity"),
        ({"eval_every": 0}, "--eval-every"),
        ({"learning": 1}, "--learning"),
        ({"device": "abacus"}, "there is no device ABACUS"),
        ({"seq_len": 33}, "--seq-len 33 is over the model's context of 32 tokens"),
        ({"batch_size": 5000}, "windows of 16 tokens, fewer than the 10000 of a batch"),
        ({"data": "nowhere.txt"}, "there is no file nowhere.txt"),
        ({"data": "nowhere"}, "'nowhere' is not a source of text"),
        ({"data": "init"}, "init is no folder of prepared data (it has no meta.json)"),
        ({"init": "./nowhere"}, "there is no folder ./nowhere"),
        ({"preset": "tiny"}, "of another size than preset tiny"),
        ({"out": "run"}, "holds a run; pass `--resume run`"),
        ({"out": "init"}, "init is there and is not empty"),
        ({"out": "stories.txt"}, "stories.txt is there and is not empty"),
    ],
)
def test_bad_options(changed: dict[str, object], word: str, place: Folders) -> None:
    folder, run = place
    before = (run / "run.json").read_bytes(), sorted(os.listdir(folder))
    refused(training(folder, **{"out": "refused"} | changed), word)  # type: ignore[arg-type]
    assert ((run / "run.json").read_bytes(), sorted(os.listdir(folder))) == before  # no folder was left


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncated(folder: Path) -> None:
    os.truncate(folder / "train-00000.bin", 100)


def corrupted(folder: Path) -> None:
    data = bytearray((folder / "train-00000.bin").read_bytes())
    data[30] ^= 1  # of the checksum in its header
    (folder / "train-00000.bin").write_bytes(data)


def one_bit(folder: Path) -> None:
    data = bytearray((folder / "train-00000.bin").read_bytes())
    data[100] ^= 1  # of a token: still in the vocabulary, but another one
    (folder / "train-00000.bin").write_bytes(data)


def foreign(folder: Path) -> None:
    (folder / "train-00000.bin").write_bytes(b"x" * 864)


def of_another_folder(folder: Path) -> None:
    shutil.copy(folder / "train-00000.bin", folder / "valid-00000.bin")


def damaged_meta(folder: Path) -> None:
    (folder / "meta.json").write_bytes(DAMAGED)


@pytest.mark.usefixtures("stubbed")
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (without("meta.json"), "it has no meta.json"),
        (without("train-00000.bin"), "train-00000.bin is missing"),
        (without("valid-00000.bin"), "valid-00000.bin is missing"),
        (truncated, "train-00000.bin is truncated"),
        (corrupted, "train-00000.bin is not the one that its folder lists"),
        (one_bit, "train-00000.bin is corrupted"),
        (foreign, "train-00000.bin is no shard of tokens"),
        (of_another_folder, "valid-00000.bin is not the one that its folder lists"),
        (damaged_meta, "meta.json is damaged"),
    ],
)
def test_damaged_data(
    damage: Callable[[Path], None], word: str, place: Folders, prepared_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared_folder, tmp_path / "data")
    damage(tmp_path / "data")
    refused(training(place[0], str(tmp_path / "run"), data=tmp_path / "data"), word)


@pytest.mark.usefixtures("stubbed")
@pytest.mark.parametrize("when", ["in the first step", "while the checkpoint waits"])
def test_damage_found_late(when: str, place: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In so much data that training began before all of it was read: no trained weights are kept."""
    trained = Event()
    step = train.Trainer.step

    def verify(folder: Path) -> None:
        trained.wait()
        sleep(0.1)
        raise InputError(f"shard {folder} is corrupted")

    def stepping(*args: Any) -> tuple[float, float]:
        trained.set()
        if when == "in the first step":
            for thread in enumerate_threads():
                if isinstance(thread, shards.Verification):
                    thread.join()
        return step(*args)

    monkeypatch.setattr(shards, "verify_folder", verify)
    monkeypatch.setattr(train.Trainer, "step", stepping)
    result = training(place[0], str(tmp_path / "run"), save_every=1)
    assert (result.code, len(result.errors)) == (2, 1)
    assert "is corrupted" in result.errors[0]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["best", "latest", "step-0"]
    assert len(metrics(tmp_path / "run")) == (1 if when == "in the first step" else 2)


@pytest.mark.usefixtures("stubbed")
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_token_beyond_the_vocabulary(split: str, place: Folders, tmp_path: Path) -> None:
    tokens = {"train": np.arange(400), "valid": np.arange(400)}
    tokens[split] = tokens[split] + 50257
    write_tokens(tmp_path / "data", **tokens)
    result = training(place[0], str(tmp_path / "run"), data=tmp_path / "data")
    assert result.code == 2
    assert len(result.errors) == 1
    assert "beyond the vocabulary of 50257" in result.errors[0]


def test_text_that_is_no_utf8(place: Folders, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("Olá. ".encode("latin-1") * 100)
    result = training(place[0], str(tmp_path / "run"), data=tmp_path / "text.txt")
    assert result.code == 2
    assert len(result.errors) == 1
    assert "UTF-8" in result.errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_model(missing: str, place: Folders, tmp_path: Path) -> None:
    shutil.copytree(place[0] / "init", tmp_path / "init")
    (tmp_path / "init" / missing).unlink()
    refused(training(place[0], str(tmp_path / "run"), init=tmp_path / "init"), missing)


def test_a_model_of_a_smaller_vocabulary(place: Folders, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=300, n_layer=1, n_head=1, n_embd=4, n_positions=32)
    save(tmp_path / "init", config, initial_weights(config, 0))
    refused(training(place[0], str(tmp_path / "run"), init=tmp_path / "init"), "300 tokens, the tokenizer 50257")


@pytest.mark.parametrize("changed", [{"init": "gpt2"}, {"data": "tinystories"}])
def test_the_hub_out_of_reach(
    changed: dict[str, str], place: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    result = training(place[0], str(tmp_path / "run"), **changed)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert "hub cannot be reached" in result.err


def test_without_a_compiler(place: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "CC", "")
    refused(training(place[0], "refused"), "`pip install ziglang`")


def test_resume_takes_no_other_options(place: Folders) -> None:
    refused(resume("run", place[0], "--steps", 9), "goes without --steps")


def test_resuming_what_is_no_run(place: Folders) -> None:
    for name in ("init", "nowhere"):
        refused(resume(name, place[0]), f"{name} holds no run")


def with_options(**changed: object) -> Callable[[Path], None]:
    """A run.json with other options, written as if by the program; a change to None takes one out."""

    def change(run: Path) -> None:
        said = read_sealed(run / "run.json")
        said["options"] = {k: v for k, v in (said["options"] | changed).items() if changed.get(k, 0) is not None}
        write_sealed(run / "run.json", said)

    return change


def with_state(**changed: object) -> Callable[[Path], None]:
    """A trainer.json with other values, written as if by the program; a change to None takes one out."""

    def change(run: Path) -> None:
        folder = run / "checkpoints" / "step-3"
        state = json.loads((folder / "trainer.json").read_bytes()) | changed
        state = {name: value for name, value in state.items() if value is not None}
        (folder / "trainer.json").write_text(json.dumps(state))
        (folder / SUMS).unlink()
        write_sums(folder)

    return change


def with_file(name: str, change: Callable[[bytes], bytes] | None) -> Callable[[Path], None]:
    """A file with other content, or without it."""

    def damage(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).unlink()
        if change:
            (run / name).write_bytes(change(content))

    return damage


STEP_3 = "checkpoints/step-3"
OTHER = "the newest good checkpoint of the run is"


@pytest.mark.usefixtures("stubbed")
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (with_file("run.json", lambda _: DAMAGED), "run.json is damaged"),
        (with_file("run.json", lambda _: b"{}"), "run.json is damaged"),
        (with_file("run.json", lambda content: content.replace(b"0.02", b"0.03")), "run.json is damaged"),
        (with_file("run.json", None), "holds no run"),
        (with_options(steps=None), "another version"),
        (with_options(spells=3), "another version"),
        (with_options(steps="many"), "--steps"),
        (with_options(lr={}), "--lr"),
        (with_options(lr=0.03), "run.json is not the one that"),
        (with_options(data="nowhere.txt"), "run.json is not the one that"),
        (with_state(step="3"), "trainer.json is damaged"),
        (with_state(seconds=None), "trainer.json is damaged"),
        (with_state(options=None), "trainer.json is damaged"),
        (with_state(loader={}), "the saved data position None"),
        (with_file(f"{STEP_3}/trainer.json", lambda _: b"{}"), "trainer.json is damaged"),
        (with_file(f"{STEP_3}/optimizer.safetensors", lambda content: content[:-100]), OTHER),
        (with_file(f"{STEP_3}/optimizer.safetensors", None), "optimizer.safetensors is missing"),
        (with_file(f"{STEP_3}/model.safetensors", lambda content: content[:50]), OTHER),
        (with_file(f"{STEP_3}/{SUMS}", None), OTHER),
        (with_file("checkpoints/latest", None), OTHER),
        (with_file("checkpoints/latest", lambda _: b"step-9\n"), "does not name a checkpoint"),
        (with_file("metrics.jsonl", lambda _: b"x\n"), "metrics.jsonl"),
        (with_file("metrics.jsonl", lambda _: b""), "metrics.jsonl"),
        (with_file("metrics.jsonl", None), "metrics.jsonl"),
    ],
)
def test_resuming_a_damaged_run(damage: Callable[[Path], None], word: str, place: Folders, tmp_path: Path) -> None:
    run = rewind(place[1], tmp_path / "stopped", 3)
    damage(run)
    refused(resume(run, place[0]), word)


@pytest.mark.usefixtures("stubbed")
def test_a_refused_resume_changes_nothing(place: Folders, tmp_path: Path) -> None:
    """Data that has changed since, say: what was measured after the checkpoint must still be there."""
    run = rewind(place[1], tmp_path / "stopped", 3)
    with_state(loader={})(run)
    before = [(run / name).read_bytes() for name in ("metrics.jsonl", "samples.md", "run.json", "checkpoints/latest")]
    refused(resume(run, place[0]), "the saved data position None")
    assert before == [
        (run / name).read_bytes() for name in ("metrics.jsonl", "samples.md", "run.json", "checkpoints/latest")
    ]


def test_without_options_a_gpu_fine_tunes_gpt2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the command decides on such a machine; the card itself is not needed for that."""
    save_model(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)  # where the name gpt2 finds a folder, it is not asked of the hub
    monkeypatch.setitem(PRESETS, "gpt2", SMALL)
    args = parse(train.parser(), [])
    _, arrays = complete(args, "CUDA")
    assert (args.preset, args.init, args.data, args.dtype) == ("gpt2", "gpt2", "tinystories", "bfloat16")
    assert args.lr == RECIPES["gpt2"].finetune_lr
    np.testing.assert_array_equal(arrays["wte.weight"], load(tmp_path / "gpt2")[1]["wte.weight"])


def test_without_options_and_hub_a_gpu_trains_from_random(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(name: str) -> Path:
        raise InputError("the hub cannot be reached")

    monkeypatch.setattr(data.training, "resolve", unreachable)
    monkeypatch.setitem(PRESETS, "tinystories", SMALL)
    args = parse(train.parser(), [])
    complete(args, "CUDA")
    assert (args.preset, args.init, args.data) == ("tinystories", "random", "stories")
    assert args.lr == RECIPES["tinystories"].lr
    assert "Without the pretrained gpt2 (the hub cannot be reached)" in capsys.readouterr().out


def test_without_options_a_cpu_trains_tiny() -> None:
    args = parse(train.parser(), [])
    config, arrays = complete(args, "CPU")
    assert (args.preset, args.init, args.data, args.dtype) == ("tiny", "random", "stories", "float32")
    assert config == PRESETS["tiny"]
    assert {name: array.shape for name, array in arrays.items()} == parameter_shapes(config)


@pytest.mark.usefixtures("stubbed")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_request_to_stop_saves_first(
    number: signal.Signals, code: int, place: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, before = train.Trainer.step, signal.getsignal(number)

    def asked(self: train.Trainer, batches: Any, lr: float) -> tuple[float, float]:
        if self.steps == 3:
            os.kill(os.getpid(), number)
        return step(self, batches, lr)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", asked)
        result = training(place[0], str(tmp_path / "run"))
    assert result.code == code
    assert (
        f"stopped after step 4, which is saved; go on with\n  python -m tinygrad_impl.train --resume {tmp_path}"
        in result.err
    )
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-4\n"
    assert signal.getsignal(number) == before
    assert resume(tmp_path / "run", place[0]).code == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(STEPS + 1))
    assert not (tmp_path / "run" / "checkpoints" / "step-4").exists()  # neither on schedule nor the best
    assert [part["step"] for part in read_sealed(tmp_path / "run" / "run.json")["continued"]] == [4]


def test_a_request_to_all_of_its_processes(place: Folders, tmp_path: Path) -> None:
    """The processes that compile get a signal to the group too, and must not keep the program from ending."""
    run, never = tmp_path / "run", 10**6
    words = options(steps=never, eval_every=never, save_every=never, sample_every=never, out=run)
    root = str(Path(tinygrad_impl.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "tinygrad_impl.train", *map(str, words)],
        cwd=place[0],
        env=os.environ | {"PYTHONPATH": root},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and (not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 3):
            sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "which is saved; go on with" in err


@pytest.mark.usefixtures("stubbed")
def test_the_newest_and_the_best_checkpoints_are_kept(
    place: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([9.0, 5.0, 3.0, 4.0, 3.5])
    monkeypatch.setattr(train.Evaluator, "__call__", lambda self, batches: next(losses))
    changed = {"steps": 8, "eval_every": 2, "save_every": 2, "keep": 1}
    assert training(place[0], str(tmp_path / "run"), **changed).code == 0
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["best", "latest", "step-0", "step-4", "step-8"]
    assert (tmp_path / "run" / "checkpoints" / "best").read_text() == "step-4\n"


@pytest.mark.usefixtures("stubbed")
def test_the_best_is_kept_off_schedule_too(place: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([9.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(train.Evaluator, "__call__", lambda self, batches: next(losses))
    assert training(place[0], str(tmp_path / "run"), eval_every=2, save_every=99).code == 0
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["best", "latest", "step-0", "step-2", "step-6"]


def test_going_on_from_an_earlier_checkpoint(place: Folders, tmp_path: Path) -> None:
    """With the newest one damaged, say."""
    run = tmp_path / "run"
    shutil.copytree(place[1], run)
    os.truncate(run / "checkpoints" / "step-6" / "model.safetensors", 1000)
    (run / "run.json").write_bytes((run / "run.json").read_bytes())
    refused(
        call(train.main, "--init", run, "--out", tmp_path / "x", cwd=place[0]), f"is {run}/checkpoints/step-3, pass"
    )
    result = resume(run / "checkpoints" / "step-3", place[0])
    assert result.code == 0, result
    assert course(run) == course(place[1])
    assert read_weights(run) == read_weights(place[1])


def read_weights(run: Path) -> bytes:
    return (run / "checkpoints" / f"step-{STEPS}" / "model.safetensors").read_bytes()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(place: Folders, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place[1], run)
    shutil.rmtree(run / "checkpoints")
    assert resume(run, place[0]).code == 0
    assert course(run) == course(place[1])
    assert read_weights(run) == read_weights(place[1])


def test_a_configuration_repeats_a_run(place: Folders) -> None:
    folder, run = place
    result = call(train.main, "--config", run / "run.json", "--out", "repeated", "--parity", "off", cwd=folder)
    assert result.code == 0, result
    assert course(folder / "repeated") == course(run)
    assert read_weights(folder / "repeated") == read_weights(run)
    options = [read_sealed(r / "run.json")["options"] | {"parity": ""} for r in (run, folder / "repeated")]
    assert options[0] == options[1]


@pytest.mark.usefixtures("stubbed")
def test_a_configuration_with_other_options(place: Folders, tmp_path: Path) -> None:
    result = call(train.main, "--config", place[1] / "run.json", "--out", tmp_path / "run", "--steps", 2, cwd=place[0])
    assert result.code == 0, result
    assert len(metrics(tmp_path / "run")) == 3
    assert read_sealed(tmp_path / "run" / "run.json")["options"]["lr"] == 0.02


def test_a_configuration_with_another_seed(tmp_path: Path, stubbed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is other random weights than those that run.json has the checksum of."""
    monkeypatch.setitem(PRESETS, "tiny", SMALL)
    write_stories(tmp_path / "stories.txt")
    of_run = options(init="random", preset="tiny", out="run", steps=2)
    assert call(train.main, *of_run, cwd=tmp_path).code == 0
    again = ("--config", "run/run.json", "--out", "other", "--seed", 5)
    assert call(train.main, *again, cwd=tmp_path).code == 0
    assert read_sealed(tmp_path / "other" / "run.json")["seed"] == 5


@pytest.mark.usefixtures("stubbed")
def test_a_configuration_of_other_data_or_weights(place: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    save_model(folder / "init")
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(f"Story {i}." * 9 for i in range(300)))
    shutil.copy(place[1] / "run.json", folder)
    argv = ("--config", "run.json", "--parity", "off", "--out", "run")
    result = call(train.main, *argv, cwd=folder)
    error = "error: stories.txt is not the text that run.json was run on; put that back, or give another --data"
    assert (result.code, result.errors) == (2, [error])
    shutil.copy(folder / "stories.txt", folder / "others.txt")
    assert call(train.main, *argv, "--data", "others.txt", cwd=folder).code == 0
    shutil.copy(place[0] / "stories.txt", folder / "stories.txt")
    shutil.rmtree(folder / "init")
    save_model(folder / "init", seed=2)
    shutil.rmtree(folder / "run")
    result = call(train.main, *argv, cwd=folder)
    error = "error: init is not the weights that run.json began with; put those back, or give another --init"
    assert (result.code, result.errors) == (2, [error])


def test_quiet(place: Folders, tmp_path: Path, stubbed: None) -> None:
    result = training(place[0], str(tmp_path / "run"), steps=2)
    silent = call(train.main, *options(out=tmp_path / "silent", steps=2), "--quiet", cwd=place[0])
    assert result.out.count("\n") > 5
    assert (silent.code, silent.err) == (0, "")
    assert silent.out == "PARITY NOT CHECKED (--parity off): nothing is proven about what this device computes\n"


def test_a_spike_is_told(place: Folders, tmp_path: Path, stubbed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step = train.Trainer.step

    def jumping(self: train.Trainer, batches: Any, lr: float) -> tuple[float, float]:
        loss, norm = step(self, batches, lr)
        return loss + 0.1 * (self.steps % 2) + 5 * (self.steps == 40), norm

    monkeypatch.setattr(train.Trainer, "step", jumping)
    result = training(place[0], str(tmp_path / "run"), steps=50, sample_every=99, save_every=30, eval_every=99)
    assert result.code == 0, result
    assert [line for line in result.out.splitlines() if "jumped" in line] == [
        "step 40: the loss jumped from about 2.051 to 7.000, on windows 156 to 159 of the data"
    ]
    through = course(tmp_path / "run")
    assert [row["step"] for row in through if "spike" in row] == [40]
    assert resume(tmp_path / "run" / "checkpoints" / "step-30", place[0]).code == 0
    assert course(tmp_path / "run") == through  # what is usual was not forgotten


def test_the_smoothed_loss() -> None:
    smoothed = Smoothed()
    assert math.isnan(smoothed.value)
    assert not any(smoothed.add(3.0) for _ in range(100))
    assert smoothed.value == pytest.approx(3.0)
    assert smoothed.add(3.1)  # next to no noise at all
    assert not smoothed.add(2.0)


def test_tensorboard(place: Folders, tmp_path: Path, stubbed: None) -> None:
    assert call(train.main, *options(out=tmp_path / "run"), "--tensorboard", cwd=place[0]).code == 0
    events = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").iterdir())
    for tag in (b"loss", b"val_loss", b"lr", b"grad_norm", b"tokens_per_second", b"sample"):
        assert tag in events


def test_finding_a_learning_rate(place: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss that falls fastest about 1e-3 and grows from 1e-2 on."""

    def step(self: train.Trainer, batches: Any, lr: float) -> tuple[float, float]:
        self.steps += 1
        return 6 - 2 * math.tanh(math.log10(lr / 1e-3)) + 20 * max(0.0, lr - 1e-2), 1.0

    monkeypatch.setattr(train.Trainer, "step", step)
    result = call(train.main, *options(out=tmp_path / "found"), "--find-lr", cwd=place[0])
    assert result.code == 0, result
    found = json.loads((tmp_path / "found" / "find-lr.json").read_text())
    assert 5e-4 < found["proposed"] < 5e-3  # a smoothed loss lags behind
    assert f"--lr {found['proposed']:.1e}" in result.out
    assert len(found["loss"]) < 100  # it stops where the loss grows
    assert (tmp_path / "found" / "find-lr.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "found" / "run.json").exists()


@pytest.mark.parametrize("argv", [("--resume", "run", "--config", "run/run.json"), ("--config", "nowhere.json")])
def test_bad_configurations(argv: tuple[str, ...], place: Folders) -> None:
    refused(call(train.main, *argv, cwd=place[0]), "--config" if "--resume" in argv else "nowhere.json")
