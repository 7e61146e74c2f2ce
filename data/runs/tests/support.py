"""A training program that computes nothing: a test says what its losses, norms and seconds are, and it keeps a record.

What the loop, its files and its lines have to be follows from these, so that it can be worked out in the test.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import enumerate as enumerate_threads
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import data.runs.recorder
from data.checkpoints.checkpoint import save
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.ranks import ALONE, Ranks
from data.runs.find_lr import find_learning_rate
from data.runs.implementation import Batch, Implementation
from data.runs.loop import train
from data.runs.options import OF_TRAINING, parse, parser
from data.runs.run_folder import load_checkpoint, read_metrics
from data.runs.start import begin
from data.testing import Result, call, write_tokens
from data.text.sampling import Sampler

TINY = GPT2Config(vocab_size=61, n_positions=32, n_embd=8, n_layer=1, n_head=2)
B, T, ACCUM, STEPS, SEED = 3, 8, 2, 13, 11
A_STEP = ACCUM * B * T  # tokens
TRAIN, VALID = np.arange(1000, 1500), np.arange(7000, 7131)  # each token tells where it stands
CARD = "abacus of 9 beads"
SOURCE = {"commit": "c0ffee" * 6 + "0000", "clean": False}
SAVEFIG = Figure.savefig
VALIDATE_SECONDS, SAMPLE_SECONDS = 100.0, 50.0

Folders = tuple[Path, Path, Result]  # where commands run, a finished run in it, and what it printed


class Stub:
    """The program. The functions of a step's number are for tests to change; the lists tell what it was asked."""

    def __init__(self) -> None:
        self.package = "torch_ref"
        self.ranks: Ranks = ALONE
        self.peak_flops: float | None = None
        self.kernels: str | None = None
        self.subject: Any = None
        self.files: Mapping[str, Any] = {}
        self.loss: Callable[[int], float] = lambda step: 4.0 - step / 8
        self.norm: Callable[[int], float] = lambda step: 1.0 + step / 4
        self.seconds: Callable[[int], float] = lambda step: 0.25 * step  # that the step takes
        self.validation: Callable[[int], float] = lambda step: 5.0 - step / 16
        self.during: Callable[[int], None] = lambda step: None  # what else happens in this step
        self.device, self.now = "CPU", 1000.0
        self.stepped: list[tuple[list[Batch], float]] = []
        self.validated: list[tuple[int, list[Batch]]] = []
        self.sampled: list[tuple[int, str, int, Sampler]] = []
        self.asked: list[tuple[int, int, float, float, int]] = []

    def main(self) -> None:
        given = parse(parser(f"python -m {self.package}.train", "numbers"), sys.argv[1:])
        with begin(given, self.device, self.ranks) as self.start:
            self.train()

    def train(self) -> None:
        trainer = self.trainer(self.start.arrays)
        if self.start.moments:
            trainer.restore(self.start.arrays, self.start.moments, self.start.state["step"])
        by = Implementation(
            self.package,
            trainer,
            lambda keep: trainer.copies(trainer.parameters) if keep else {},
            lambda keep: trainer.copies(trainer.state) if keep else {},
            self.learning_rate,
            lambda batches: self.evaluate(trainer.steps, batches),
            lambda prompt, tokens, sampler, tick: self.write(trainer.steps, prompt, tokens, sampler, tick),
            self.device,
            CARD,
            self.peak_flops,
            self.kernels,
            subject=self.subject,
        )
        if self.start.options.find_lr:
            find_learning_rate(self.start, by)
        else:
            train(self.start, by, self.files)

    def trainer(self, arrays: Mapping[str, np.ndarray]) -> "StubTrainer":
        return StubTrainer(self, arrays)

    def learning_rate(self, step: int, steps: int, peak: float, minimum: float, warmup: int) -> float:
        self.asked.append((step, steps, peak, minimum, warmup))
        return peak / (1 + step)

    def evaluate(self, step: int, batches: Iterable[Batch]) -> tuple[float, int]:
        self.validated.append((step, list(batches)))
        self.now += VALIDATE_SECONDS
        return self.validation(step), 1

    def write(self, step: int, prompt: str, tokens: int, sampler: Sampler, tick: Callable[[], object]) -> str:
        self.sampled.append((step, prompt, tokens, sampler))
        self.now += SAMPLE_SECONDS
        for _ in range(3):
            tick()
        return f"{prompt} it was {step}."


class StubTrainer:
    """Weights that remember every step, so that one left out, repeated or begun from another state is seen in them."""

    def __init__(self, stub: Stub, arrays: Mapping[str, np.ndarray]):
        self.stub, self.steps, self.model = stub, 0, self
        self.parameters = {name: array.copy() for name, array in arrays.items()}
        self.state = {f"{m}.{name}": 0 * array for m in ("exp_avg", "exp_avg_sq") for name, array in arrays.items()}

    @staticmethod
    def copies(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in arrays.items()}

    def restore(self, arrays: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray], steps: int) -> None:
        self.parameters, self.state, self.steps = dict(arrays), dict(moments), steps

    def finite(self, batches: Sequence[Batch]) -> bool:
        raise AssertionError("one process has nobody to ask")

    def step(self, batches: Sequence[Batch], lr: float) -> tuple[float, float]:
        stub, number = self.stub, self.steps + 1
        stub.stepped.append((list(batches), lr))
        assert len(stub.stepped) < 200, "it goes on regardless"
        stub.during(number)
        stub.now += stub.seconds(number)
        loss, norm = stub.loss(number), stub.norm(number)
        if np.isfinite(loss) and np.isfinite(norm):
            self.steps = number
            for name, p in self.parameters.items():
                self.state[f"exp_avg.{name}"] = 0.5 * self.state[f"exp_avg.{name}"] + np.float32(batches[0][0].mean())
                self.state[f"exp_avg_sq.{name}"] = self.state[f"exp_avg_sq.{name}"] + np.float32(norm)
                self.parameters[name] = 0.5 * p + np.float32(lr) * self.state[f"exp_avg.{name}"]
        return loss, norm


def clocked(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A stub whose clock is the program's, and whose pictures are not painted, which would take most of the time."""
    stub = Stub()
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b"a picture"))
    monkeypatch.setattr(time, "perf_counter", lambda: stub.now)
    monkeypatch.setattr(data.runs.recorder, "revision", lambda: SOURCE)
    return stub


def noisy(stub: Stub) -> Stub:
    """Losses, validation losses and seconds of which no two are alike; the best is step 8."""
    stub.loss = lambda step: 4 - step / 8 + 0.25 * (step % 3)
    stub.validation = lambda step: 2 + abs(step - 8.0) / 10
    stub.seconds = lambda step: 0.5 + 0.0104 * step
    return stub


def place_in(folder: Path) -> Path:
    """A folder with weights `init` and tokens `data`, for commands to run in."""
    folder.mkdir(exist_ok=True)
    save(folder / "init", TINY, initial_weights(TINY, 1))
    write_tokens(folder / "data", TRAIN, VALID)
    return folder


def options(**changed: object) -> list[object]:
    """Those of the run that most tests are of. A change to None leaves an option out; True gives it without a value.
    With --find-lr they are those that are not of training.
    """
    values: dict[str, object] = {"init": "init", "data": "data", "steps": STEPS, "batch_size": B, "seq_len": T}
    values |= {"grad_accum": ACCUM, "lr": 0.02, "min_lr": 0.003, "warmup": 2, "seed": SEED, "eval_tokens": 40}
    values |= {"eval_every": 4, "sample_every": 5, "save_every": 3}
    if changed.get("find_lr"):
        values = {name: value for name, value in values.items() if name not in OF_TRAINING}
    values |= changed
    words: list[object] = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return words


def training(stub: Stub, folder: Path, out: Path | str | None, **changed: object) -> Result:
    return call(stub.main, *options(out=out, **changed), cwd=folder)


def trained(stub: Stub, folder: Path, out: Path | str | None, **changed: object) -> Result:
    """`training` that ends well."""
    result = training(stub, folder, out, **changed)
    assert result.code == 0, result
    return result


def resume(stub: Stub, folder: Path, run: Path | str, *more: object) -> Result:
    return call(stub.main, "--resume", run, *more, cwd=folder)


def metrics(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run)


def window(i: int, tokens: np.ndarray = TRAIN) -> Batch:
    """Inputs and targets of window i."""
    return tokens[i * T : i * T + T], tokens[i * T + 1 : i * T + T + 1]


def assert_same_end(run: Path, expected: Path) -> None:
    """The same metrics, samples, weights, moments and position."""
    assert metrics(run) == metrics(expected)
    assert (run / "samples.md").read_bytes() == (expected / "samples.md").read_bytes()
    ours, theirs = (load_checkpoint(r / "checkpoints" / f"step-{STEPS}") for r in (run, expected))
    for found, wanted in zip(ours[1:3], theirs[1:3], strict=True):
        assert found.keys() == wanted.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, wanted[name])
    assert ours[3]["loader"] == theirs[3]["loader"]
    assert ours[3]["tokens"] == theirs[3]["tokens"] == 48 * STEPS
    assert ours[3]["seconds"] == pytest.approx(theirs[3]["seconds"], abs=1e-9)
    for role in ("latest", "best"):
        assert (run / "checkpoints" / role).read_text() == (expected / "checkpoints" / role).read_text()


def wait_for_saving() -> None:
    """Until the checkpoint is there that a thread of this process writes, if one does."""
    for thread in enumerate_threads():
        if thread.name == "saving":
            thread.join()


@dataclass
class Drawing:
    """What a figure showed when it was written to a file."""

    lines: dict[str, tuple[list[float], list[float]]]  # by their labels, x and y
    legend: list[str]
    title: str
    xlabel: str
    ylabel: str
    xscale: str


def drawings(monkeypatch: pytest.MonkeyPatch) -> list[Drawing]:
    """Gets filled with what is drawn, which is painted too."""
    drawn: list[Drawing] = []

    def record(figure: Figure, *args: Any, **kwargs: Any) -> None:
        (axes,) = figure.axes
        lines = {str(line.get_label()): line.get_data() for line in axes.get_lines()}
        legend = axes.get_legend()
        assert legend
        drawn.append(
            Drawing(
                {label: (np.asarray(x).tolist(), np.asarray(y).tolist()) for label, (x, y) in lines.items()},
                [text.get_text() for text in legend.get_texts()],
                axes.get_title(),
                axes.get_xlabel(),
                axes.get_ylabel(),
                axes.get_xscale(),
            )
        )
        SAVEFIG(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return drawn


def windows_of_step(step: int) -> list[int]:
    """Which windows of the training data step 1, 2, ... sees, in the documented order."""
    count = (len(TRAIN) - 1) // T
    order = [i for epoch in range(9) for i in np.random.default_rng((SEED, epoch)).permutation(count)]
    return order[(step - 1) * ACCUM * B : step * ACCUM * B]
