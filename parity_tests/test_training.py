"""AdamW steps of both trainers: trajectories in float64, single steps in float32, and a whole run of the command."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad.helpers import Context

import tinygrad_impl.trainer
import torch_ref.trainer
from data.checkpoints.checkpoint import load
from data.checkpoints.config import parameter_shapes
from data.runs.run_folder import read_metrics
from data.testing import call, save_model, write_tokens
from parity_tests.assertions import assert_passed
from parity_tests.bounds import judge
from parity_tests.checks import clip_between, free_running_rows, state, step_rows, training_steps
from parity_tests.mutants import CONFIG, LENGTH, ROWS
from parity_tests.setting import Setting, random_batches
from parity_tests.weights import random_weights
from tinygrad_impl import train
from torch_ref.trainer import Trainer

STEPS = 10
slow = pytest.mark.slow


def setting_in(dtype: str) -> Setting:
    return Setting(CONFIG, random_weights(CONFIG, 0, initializer_range=0.2), dtype, "CPU")


@pytest.mark.parametrize(
    ("dtype", "jit"),
    [
        pytest.param("float64", 0, marks=slow),  # as the proof's activations and gradients at edges are computed
        pytest.param("float64", 1, marks=slow),  # test_prove has three of them, in both dtypes
        pytest.param("float32", 1, marks=slow),
    ],
)
def test_ten_steps(dtype: str, jit: int) -> None:
    """Clipped by a bound that some gradients are under, on a schedule, on two, one and five micro-batches in turn.

    Freely in float64: what differs adds up over the steps. In float32 step by step from the reference's state, because
    Adam's step is the sign of a gradient that is next to nothing, and roundings need not agree on that.
    """
    setting = setting_in(dtype)
    steps = training_steps(random_batches(CONFIG, ROWS, LENGTH, seed=1, count=4), STEPS)
    options = {"clip": clip_between(setting, steps)}
    port, references = setting.trainer(**options), setting.references(**options)
    with Context(JIT=jit):
        if dtype == "float32":  # step_rows feeds these in, so that the graph would go unused
            port.accumulate(steps[0][0])
        rows = (free_running_rows if dtype == "float64" else step_rows)(setting, port, references, steps)
    names = {row.name for row in rows}
    for name in parameter_shapes(CONFIG):
        assert {name, f"exp_avg.{name}", f"exp_avg_sq.{name}"} <= names
    assert_passed(rows)
    if dtype == "float64":
        graphs = (port._first, port._squares, port._adamw)
        assert [graph.captured is not None for graph in graphs] == [bool(jit)] * 3


@slow  # the proof compares five micro-batches with the reference
def test_accumulation() -> None:
    """A step on five micro-batches is the step on one batch of all of them, clipped or not."""
    setting = setting_in("float64")
    parts = random_batches(CONFIG, ROWS, LENGTH, seed=2, count=5)  # each ignores as many targets, so the means agree
    xs, ys = zip(*parts, strict=True)
    whole = [(np.concatenate(xs), np.concatenate(ys))]
    states = []
    for batches in (whole, parts):
        trainer = setting.trainer(clip=0.5)
        loss, norm = trainer.step(batches, 1e-3)
        assert norm > 0.5
        states.append({"loss": np.array(loss), "norm": np.array(norm)} | trainer.model.arrays() | trainer.moments())
    at_once, accumulated = states
    assert_passed(judge("training", "float64", [(at_once, accumulated, at_once)], None, setting.exact))


@pytest.mark.parametrize("of", ["torch_ref", "tinygrad_impl"])
def test_loaded_gradients_are_those_that_were_accumulated(of: str) -> None:
    """Read from one trainer and loaded into another, they lead to the same step, bit for bit. Of two micro-batches,
    because to multiply and divide by two rounds nothing.
    """
    setting = setting_in("float32")
    trainers: list[Any] = [setting.trainer() if of == "tinygrad_impl" else setting.references()[1] for _ in range(2)]
    trained, loaded = trainers
    trained.accumulate(random_batches(CONFIG, ROWS, LENGTH, seed=0, count=2))
    loss, gradients = trained.mean_gradients()
    assert {name: tuple(g.shape) for name, g in gradients.items()} == parameter_shapes(CONFIG)
    if of == "tinygrad_impl":
        loaded.load_gradients(2 * loss, {name: 2 * g for name, g in gradients.items()}, count=2)
    else:
        loaded.load_gradients(loss, gradients)
    again, gradients_again = loaded.mean_gradients()
    assert again == loss
    assert all(np.array_equal(gradients[name], gradients_again[name]) for name in gradients)
    assert trained.update(1e-2) == loaded.update(1e-2)
    states = [state(trainer) for trainer in trainers]
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("of", "dtype"),
    [
        *(("torch_ref", dtype) for dtype in ("float64", "float32", "bfloat16")),
        ("tinygrad_impl", "float32"),
        *(pytest.param("tinygrad_impl", dtype, marks=slow) for dtype in ("float64", "bfloat16")),  # test_prove has them
    ],
)
def test_what_is_not_finite_updates_nothing(of: str, dtype: str) -> None:
    """The loss and the norm, each by itself, of both implementations; they return what they found. Then they go on."""
    setting = setting_in(dtype)
    trainer: Any = setting.trainer() if of == "tinygrad_impl" else setting.references()[1]
    batch = random_batches(CONFIG, ROWS, LENGTH, seed=0, count=1)[0]
    finite = trainer.step([batch], 1e-2)
    before = {name: np.asarray(array).copy() for name, array in state(trainer).items()}
    for spoilt, value in (("loss", math.inf), ("norm", math.inf), ("loss", math.nan), ("norm", math.nan)):
        trainer.accumulate([batch])
        loss, gradients = trainer.mean_gradients()
        if spoilt == "norm":
            gradients["ln_f.bias"][-1] = value
        trainer.load_gradients(value if spoilt == "loss" else loss, gradients)
        found = trainer.update(1e-2)
        loss, norm = found if of == "tinygrad_impl" else (trainer.loss, found)
        assert [math.isfinite(loss), math.isfinite(norm)] == [spoilt != "loss", spoilt != "norm"]
        assert str(loss if spoilt == "loss" else norm) == str(value)
        assert trainer.steps == 1
        after = state(trainer)
        assert all(np.array_equal(before[name], after[name]) for name in before)
    again = trainer.step([batch], 1e-2)
    assert trainer.steps == 2
    assert again[0] < finite[0]
    assert not np.array_equal(before["wte.weight"], state(trainer)["wte.weight"])


@slow  # test_gate.py has all that the command has options for
def test_options_take_effect() -> None:
    """None of them the default, in both trainers: three steps, one of them clipped."""
    setting = setting_in("float64")
    steps = training_steps(random_batches(CONFIG, ROWS, LENGTH, seed=0, count=3), 3, (1,))
    options: dict[str, Any] = {
        "betas": (0.7, 0.9),
        "eps": 1e-3,
        "weight_decay": 0.4,
        "clip": clip_between(setting, steps),
    }
    assert_passed(step_rows(setting, setting.trainer(**options), setting.references(**options), steps))


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
def test_learning_rate(warmup: int) -> None:
    rates = [
        [module.learning_rate(step, 40, 6e-4, 6e-5, warmup) for step in range(40)]
        for module in (torch_ref.trainer, tinygrad_impl.trainer)
    ]
    assert rates[0] == rates[1]
    assert max(rates[0]) == pytest.approx(6e-4)


@slow  # test_interchange.py has every option of the command, on both implementations
def test_the_command_trains_on_the_right_data_in_the_right_order(tmp_path: Path) -> None:
    """A run of the command, and PyTorch's trainer on the windows that the loader's documentation promises."""
    B, T, accumulated, steps, seed = 2, 16, 2, 4, 7
    tokens = np.random.default_rng(0).integers(0, 50257, 11 * T - 5)  # 10 windows of the 16: into a second epoch
    write_tokens(tmp_path / "data", tokens, tokens[:40])
    save_model(tmp_path / "init")
    options = {"init": "init", "data": "data", "out": "run", "steps": steps, "batch-size": B, "seq-len": T}
    options |= {"grad-accum": accumulated, "lr": 0.01, "min-lr": 0.001, "warmup": 1, "clip": 0.5, "seed": seed}
    options |= {"dtype": "float32", "device": "CPU", "eval-tokens": 16, "sample-every": 99, "parity": "off"}
    argv = [word for name, value in options.items() for word in (f"--{name}", value)]
    result = call(train.main, *argv, cwd=tmp_path)
    assert result.code == 0, result
    rows = read_metrics(tmp_path / "run")[1:]  # the first is from before training

    config, began = load(tmp_path / "run" / "checkpoints" / "step-0")
    count = (len(tokens) - 1) // T
    order = [i for epoch in range(2) for i in np.random.default_rng((seed, epoch)).permutation(count)]
    shown = np.stack([tokens[i * T : i * T + T + 1] for i in order]).astype(np.int32)
    # in float64: torch's float32 norm of as many numbers as the vocabulary's gradients is 1e-4 off
    reference = Trainer(config, {name: array.astype(np.float64) for name, array in began.items()}, clip=0.5)
    for step, row in enumerate(rows):
        first = [(step * accumulated + j) * B for j in range(accumulated)]
        batches = [(shown[i : i + B, :-1].copy(), shown[i : i + B, 1:].copy()) for i in first]
        rate = torch_ref.trainer.learning_rate(step, steps, 0.01, 0.001, 1)
        loss, norm = reference.step(batches, rate)
        assert row["lr"] == rate
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert len(rows) == steps
    assert steps * accumulated * B > count

    _, ended = load(tmp_path / "run")
    theirs = reference.model.arrays()
    difference, movement = (
        np.sqrt(sum(float(np.square(a[name] - b[name], dtype=np.float64).sum()) for name in began))
        for a, b in ((ended, theirs), (theirs, began))
    )
    print(f"difference over movement: {difference / movement:.1e}")
    assert difference / movement < 1e-3
