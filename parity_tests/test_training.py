"""Five optimiser steps of both trainers, the same after each: loss, gradient norm, parameters and AdamW's moments."""

from pathlib import Path

import numpy as np
import pytest
from tinygrad.helpers import Context

import tinygrad_impl.trainer
import torch_ref.trainer
from data.checkpoint import load
from data.config import GPT2Config
from parity_tests.support import BOUNDS, assert_close, random_batch
from tinygrad_impl.trainer import Trainer as TinygradTrainer
from torch_ref.trainer import Trainer as TorchTrainer

STEPS = 5  # TinyJit runs plainly, then captures, then replays: from the third call on
CLIP = 0.5
SCHEDULE = (STEPS, 1e-3, 1e-4, 2)


def load_as(folder: Path, dtype: str) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    config, arrays = load(folder)
    return config, {name: array.astype(dtype) for name, array in arrays.items()}


def state(trainer: TorchTrainer | TinygradTrainer, result: tuple[float, float]) -> dict[str, np.ndarray]:
    """What a step gave and left behind, by name."""
    if isinstance(trainer, TinygradTrainer):
        moments = trainer.moments()
    else:
        moments = {
            f"{moment}.{name}": trainer.optimizer.state[p][moment].numpy().copy()
            for name, p in trainer.parameters.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
    loss, norm = map(np.array, result)
    return {"loss": loss, "norm": norm} | trainer.model.arrays() | moments


def without_key_bias(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes the key third out of the parameters attn.c_attn.bias, and leaves their moments whole.

    Its gradient is zero but for rounding. In float32 that noise is not far enough below AdamW's eps: divided by its own
    size it becomes a step, whose direction means nothing, and no two programs need agree on it. In float64 it is.
    """
    return {
        name: np.delete(tensor, slice(len(tensor) // 3, 2 * len(tensor) // 3))
        if name.startswith("h.") and name.endswith("attn.c_attn.bias")
        else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("jit", [0, 1], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_five_steps(small: Path, dtype: str, jit: int) -> None:
    """Two micro-batches a step and other ones at each, so that a replay of the first would show."""
    config, arrays = load_as(small, dtype)
    reference, port = TorchTrainer(config, arrays, clip=CLIP), TinygradTrainer(config, arrays, clip=CLIP)
    for step in range(STEPS):
        batches = [random_batch(2, 16, seed=2 * step + i) for i in range(2)]
        result = reference.step(batches, torch_ref.trainer.learning_rate(step, *SCHEDULE))
        assert result[1] > CLIP  # or clipping would go untested
        theirs = state(reference, result)
        with Context(JIT=jit):
            result = port.step(batches, tinygrad_impl.trainer.learning_rate(step, *SCHEDULE))
        ours = state(port, result)
        if dtype == "float32":
            ours, theirs = without_key_bias(ours), without_key_bias(theirs)
        assert_close(ours, theirs, BOUNDS[dtype], f"step {step}")
    captured = [graph.captured is not None for graph in (port._add_gradients, port._adamw)]
    assert captured == [bool(jit)] * 2


def test_accumulation(small: Path) -> None:
    """A step on two micro-batches is the step on one batch of both."""
    config, arrays = load_as(small, "float64")
    halves = [random_batch(1, 16, seed=i) for i in range(2)]
    whole = [(np.concatenate([x for x, _ in halves]), np.concatenate([y for _, y in halves]))]
    accumulated, at_once = TinygradTrainer(config, arrays, clip=CLIP), TinygradTrainer(config, arrays, clip=CLIP)
    ours, theirs = state(accumulated, accumulated.step(halves, 1e-3)), state(at_once, at_once.step(whole, 1e-3))
    assert_close(ours, theirs, BOUNDS["float64"], "two micro-batches against one batch")


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
def test_learning_rate(warmup: int) -> None:
    rates = [
        [module.learning_rate(step, 40, 6e-4, 6e-5, warmup) for step in range(40)]
        for module in (torch_ref.trainer, tinygrad_impl.trainer)
    ]
    assert rates[0] == rates[1]
    assert max(rates[0]) == pytest.approx(6e-4)
