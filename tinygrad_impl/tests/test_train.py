"""The port's training command: what it trains with, and a small real run.

The loop is tested in data/runs/tests without an implementation; that both implementations train the same, and resume
what either began, is for parity_tests.
"""

import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, dtypes
from tinygrad.engine import worker

import data.runs.recorder
import tinygrad_impl
from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.cli import InputError
from data.runs.implementation import Implementation
from data.runs.options import EVALUATION, OF_TRAINING, PORTS, SEVERAL, UNRECORDED, parser
from data.runs.run_folder import read_metrics
from data.runs.start import Start
from data.testing import SMALL, Result, call, refused, save_model, write_tokens
from data.text.sampling import SAMPLING, Sampler
from data.text.tokenizer import tokenizer
from tinygrad_impl import device, train
from tinygrad_impl.backend import Plain
from tinygrad_impl.generate import Generator
from tinygrad_impl.model import GPT2

STEPS, NEW = 6, 6
B, T, ACCUM = 2, 16, 3  # as in parity_tests/test_interchange.py, so that what one compiles serves the other
ROOT = str(Path(tinygrad_impl.__file__).parents[1])


def options(**changed: object) -> list[object]:
    """Those of the small run, whose learning rate stays what it is, however long the run. None leaves an option out."""
    values: dict[str, object] = {"init": "init", "data": "data", "steps": STEPS, "batch_size": B, "seq_len": T}
    values |= {"grad_accum": ACCUM, "lr": 0.02, "min_lr": 0.02, "warmup": 0, "eval_every": 2, "eval_tokens": 64}
    values |= {
        "betas": (0.7, 0.9),
        "weight_decay": 0.25,
        "sample_every": 10**6,
        "save_every": 3,
        "device": "CPU",
        "parity": "off",
    } | changed
    words: list[object] = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else (value,))]
    return words


def training(folder: Path, out: Path | str, **changed: object) -> Result:
    return call(train.main, *options(out=out, **changed), cwd=folder)


def course(run: Path) -> list[dict[str, Any]]:
    """The metrics but for the times, which no two runs share."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in read_metrics(run)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run."""
    folder = tmp_path_factory.mktemp("train")
    save_model(folder / "init")
    tokens = np.random.default_rng(0).integers(1000, 1040, 2000)  # few of the vocabulary, which is soon learnt
    write_tokens(folder / "data", tokens[:1800], tokens[1800:])
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> Result:
    """What a run printed that left the folder `run`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.runs.recorder, "SAMPLING", SAMPLING | {"max_new_tokens": 2 * NEW})
        result = training(folder, "run")
    assert result.code == 0, result
    return result


def prepared_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **changed: object
) -> tuple[Start, Implementation, dict[str, Any]]:
    """What the loop would be given; there is no arithmetic, which takes long to compile."""
    caught: list[Any] = []
    monkeypatch.setattr(train, "train", lambda start, by, files: caught.append((start, by, files)))
    result = call(train.main, *options(out="nowhere", **changed), cwd=folder)
    assert result.code == 0, result
    return caught[0]


def test_the_options_arrive_in_what_trains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: dict[str, object] = {"weight_decay": 0.3, "clip": 0.7, "dtype": "bfloat16", "kernels": "plain"}
    start, by, files = prepared_training(folder, monkeypatch, **changed, betas=(0.6, 0.7))
    trainer: Any = by.trainer
    assert (trainer.betas, trainer.weight_decay, trainer.clip, trainer.eps) == ((0.6, 0.7), 0.3, 0.7, 1e-8)
    evaluate: Any = by.evaluate.__self__  # type: ignore[attr-defined]
    assert (trainer.backend.name, trainer.backend.dtype) == ("plain", dtypes.bfloat16)
    assert evaluate.backend is trainer.backend
    assert evaluate.model is trainer.model  # and no copy of it, which would not learn
    assert evaluate.arena is trainer.arena
    assert (by.package, by.device, by.kernels, files) == ("tinygrad_impl", "CPU", "plain", {})
    assert start.options.kernels == "plain"
    assert trainer.steps == 0
    for name, array in load(folder / "init")[1].items():
        np.testing.assert_array_equal(trainer.model.arrays()[name], array)


def test_what_is_not_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, by, _ = prepared_training(folder, monkeypatch, betas=None, weight_decay=None)
    trainer: Any = by.trainer
    evaluate: Any = by.evaluate.__self__  # type: ignore[attr-defined]
    assert (trainer.betas, trainer.weight_decay, trainer.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert (trainer.backend.dtype, evaluate.backend.dtype) == (None, None)
    assert start.options.kernels == "auto"


@pytest.mark.parametrize(("given", "wanted"), [(None, "auto"), ("plain", "plain")])
@pytest.mark.parametrize(("dtype", "bfloat16"), [("bfloat16", True), ("float32", False)])
def test_the_kernels_are_chosen_by_what_was_asked_for(
    given: str | None, wanted: str, dtype: str, bfloat16: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def choose(*given: Any, **more: Any) -> Plain:
        asked.append((*given, more))
        return Plain()

    monkeypatch.setattr(train, "choose", choose)
    prepared_training(folder, monkeypatch, kernels=given, dtype=dtype)
    assert asked == [(wanted, SMALL, "CPU", {"bfloat16": bfloat16})]


def test_no_compiler_starts_while_pytorch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """tinygrad takes away what the import asks for meanwhile."""
    free = []
    monkeypatch.setattr(train.importlib, "import_module", lambda name: free.append(worker._spawn_lock.acquire(False)))
    train.import_gate()
    assert free == [False]


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_wrong_with_pytorch_is_told(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the first import: another import of what is half there has another error, which misleads."""
    imported: Future[Any] = Future()
    monkeypatch.setattr(imported, "done", lambda: at_once)
    imported.set_exception(ImportError("libcudart is missing"))
    start: Any = SimpleNamespace(options=SimpleNamespace(quiet=True), ranks=SimpleNamespace(size=2))
    with pytest.raises(InputError, match=r"libcudart.*--parity off"), ThreadPoolExecutor(1) as thread:
        train.gate(start, SimpleNamespace(backend=None), "CPU", thread, imported)  # type: ignore[arg-type]


class Chosen(Plain):
    """A backend that has copies of what it is bound to."""

    def bind(self, parameters: Any, ranks: int | None = None) -> "Chosen":
        bound = Chosen(self.dtype, self.name)
        bound.parameters = parameters  # type: ignore[attr-defined]
        return bound

    def refresh(self, buckets: bool = True) -> None:
        Tensor.ones(1).contiguous().realize()  # a trainer captures this, which has to compute something


def test_the_chosen_backend_trains_validates_and_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound to what is trained, in the dtype that was asked for; tinygrad's own write in that of the weights."""
    generators = list[Any]()
    monkeypatch.setattr(train, "Generator", lambda *given: generators.append(given))
    for name in ("fused", "plain"):
        monkeypatch.setattr(train, "choose", lambda *_, name=name, **__: Chosen(dtypes.bfloat16, name))
        _, by, _ = prepared_training(folder, monkeypatch, dtype="bfloat16")
        trainer: Any = by.trainer
        evaluate: Any = by.evaluate.__self__  # type: ignore[attr-defined]
        assert trainer.backend.parameters is trainer.weights
        assert (evaluate.backend, by.kernels) == (trainer.backend, name)
        model, backend, *vocabulary = generators.pop()
        assert vocabulary == [50257, 50256]
        assert model is trainer.model
        assert backend is trainer.backend if name == "fused" else backend.dtype is None


@pytest.mark.parametrize(("dtype", "peak"), [("bfloat16", 989e12), ("float32", 67e12)])
def test_the_peak_is_that_of_the_dtype(dtype: str, peak: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "device_name", lambda device: f"NVIDIA H100 as {device}")
    _, by, _ = prepared_training(folder, monkeypatch, dtype=dtype)
    assert (by.device_name, by.peak_flops) == ("NVIDIA H100 as CPU", peak)


def test_find_lr_does_not_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(train, "find_learning_rate", lambda *given: found.append(given))
    result = call(train.main, *options(out="nowhere", **dict.fromkeys(OF_TRAINING)), "--find-lr", cwd=folder)
    assert result.code == 0, result
    assert [(start.options.find_lr, by.package) for start, by in found] == [(True, "tinygrad_impl")]


def test_a_resumed_trainer_has_the_state_of_the_checkpoint(
    folder: Path, finished: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: list[Any] = []
    monkeypatch.setattr(train, "train", lambda start, by, files: caught.append((start, by)))
    said = json.loads((folder / "run" / "checkpoints" / "step-3" / "trainer.json").read_text())
    ported = ("--parity", "off", "--kernels", "plain")  # which a run may go on with
    result = call(train.main, "--resume", folder / "run" / "checkpoints" / "step-3", *ported, cwd=folder)
    assert result.code == 0, result
    ((start, by),) = caught
    assert by.trainer.steps == said["step"] == 3
    for ours, theirs in ((by.arrays(True), start.arrays), (by.moments(True), start.moments)):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])


def test_run_json(folder: Path, finished: Result) -> None:
    said = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    of_both = vars(parser("", "").parse_args([])).keys()
    assert said["options"].keys() - PORTS == of_both - {*UNRECORDED, *SEVERAL, *EVALUATION}
    assert (said["options"]["parity"], said["options"]["kernels"]) == ("off", "auto")
    assert said["versions"]["tinygrad"] == version("tinygrad")
    assert (said["device"], said["kernels"], said["config"]["n_layer"]) == ("CPU", "plain", 1)
    assert said["parameters"] == sum(a.size for a in initial_weights(SMALL, 0).values())
    assert said["source"].keys() == {"commit", "clean"}


def test_the_loss_goes_down(folder: Path, finished: Result) -> None:
    rows = read_metrics(folder / "run")
    assert rows[0]["val_loss"] == pytest.approx(math.log(50257), abs=0.1)  # of a model that knows nothing
    assert rows[-1]["loss"] < rows[1]["loss"] - 0.5
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.5


def test_what_it_writes(folder: Path, finished: Result) -> None:
    """The samples that its two models draw with the seed: as those of a generator of its own."""
    stories = [
        part.split("\n\n", 1)[1] for part in (folder / "run" / "samples.md").read_text().split("\n\n---\n\n")[:2]
    ]
    prompt = tokenizer().encode_ordinary("Once upon a time")
    for story, step in zip(stories, (0, STEPS), strict=True):
        generator = Generator(GPT2(*load(folder / "run" / "checkpoints" / f"step-{step}")))
        (drawn,) = generator([prompt], NEW, Sampler(0.6, top_k=40, seed=1337))
        begun = tokenizer().decode(drawn).rstrip("\ufffd")  # half a character, at the end
        assert story.startswith("Once upon a time" + begun)
        assert len(begun) > NEW
        assert f"(step {step}) ---\n{story}\n" in finished.out
    assert stories[0] != stories[1]


@pytest.mark.slow  # test_interchange.py has resumed runs bit for bit, data/runs/tests what a signal does to the loop
def test_another_process_trains_the_same_and_ends_when_its_group_is_asked_to(
    folder: Path, finished: Result, tmp_path: Path
) -> None:
    """As a program of its own, with nothing left in memory: the same seed gives the same losses, bit for bit.

    The processes that compile get a signal to the group too, and must not keep the program from ending.
    """
    run, never = tmp_path / "run", 10**6
    process = subprocess.Popen(
        [sys.executable, "-m", "tinygrad_impl.train", *map(str, options(steps=never, out=run))],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PARALLEL"} | {"PYTHONPATH": ROOT},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and (not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < STEPS):
            sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "which is saved; go on with" in err
    assert course(run)[:STEPS] == course(folder / "run")[:STEPS]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"parity": "maybe"}, "argument --parity: invalid choice: 'maybe'"),
        ({"kernels": "fast"}, "argument --kernels: invalid choice: 'fast'"),
        ({"kernels": "fused"}, "--kernels fused cannot be: they are for NVIDIA GPUs, and the device is CPU"),
        ({"device": "abacus"}, "there is no device 'abacus'"),
    ],
)
def test_bad_options(changed: dict[str, object], words: str, folder: Path) -> None:
    before = sorted(os.listdir(folder))
    refused(training(folder, "refused", **changed), words)
    assert sorted(os.listdir(folder)) == before  # no folder was left


def test_a_model_of_a_smaller_vocabulary(folder: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=300, n_layer=1, n_head=1, n_embd=4, n_positions=32)
    save(tmp_path / "init", config, initial_weights(config, 0))
    refused(
        training(folder, tmp_path / "run", init=tmp_path / "init"),
        "has no tokenizer",
        "and a vocabulary of 300, so it is not GPT-2's either; copy",
    )


def test_without_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "provide_clang", lambda: False)
    refused(training(folder, "refused"), "`pip install ziglang`")
