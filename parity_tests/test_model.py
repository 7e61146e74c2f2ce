"""The proof, on models of all shapes and on weights as awkward as the published ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygrad_impl.trainer
import torch_ref.trainer
from data.checkpoints.checkpoint import load
from data.checkpoints.config import PRESETS, GPT2Config
from data.text.loader import IGNORED
from parity_tests import checks, proof
from parity_tests.assertions import assert_passed, assert_passes_equal, assert_reference_is_hugging_face
from parity_tests.bounds import judge, summation_excuses
from parity_tests.mutants import CONFIG, LENGTH, ROWS
from parity_tests.proof import prove
from parity_tests.setting import Setting, random_batches
from parity_tests.weights import hard_weights, random_weights

slow = pytest.mark.slow


def sized(n_embd: int, n_head: int, n_layer: int = 1) -> GPT2Config:
    return GPT2Config(vocab_size=199, n_positions=16, n_embd=n_embd, n_layer=n_layer, n_head=n_head)


def test_batches_have_what_matters() -> None:
    config = sized(8, 2)
    for x, y in random_batches(config, 3, 7, seed=0, count=3):
        assert x.shape == y.shape == (3, 7)
        assert x.dtype == y.dtype == np.int32
        assert len(np.unique(x)) < x.size // 2 + 2  # tokens repeat, so that their gradients add up
        assert config.vocab_size - 1 in x[0, 1:-1]  # end-of-text with tokens on both sides of it
        assert 0 < (y == IGNORED).sum() < y.size
        scored = y[:, :-1] != IGNORED
        np.testing.assert_array_equal(y[:, :-1][scored], x[:, 1:][scored])  # targets are the next tokens
    a, b = (random_batches(config, 3, 7, seed, count=1)[0][0] for seed in (0, 1))
    assert not np.array_equal(a, b)


# bfloat16 is what GPUs train in, where kernels/tests/test_fused.py has the same of it
@pytest.mark.tuned
@pytest.mark.parametrize("dtype", ["float64", "float32", pytest.param("bfloat16", marks=slow)])
def test_prove(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it; steps and generation too; on a context that is not full, with an epsilon that is not the usual one."""
    monkeypatch.setattr(proof, "BATCHES", 1)  # which take the most time by far
    monkeypatch.setattr(checks, "NUDGES", 2)
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), dtype, "CPU")
    rows, culprit = prove(setting, ROWS, LENGTH, steps=3, quiet=True)
    assert_passed(rows, culprit)
    assert {row.check for row in rows} == {"forward", "backward", "gradient", "training", "generation"}
    reasons = {row.name: row.reason for row in rows if row.check == "generation" and row.name.endswith(".tokens")}
    assert reasons.keys() == {"greedy.tokens", "sampled.tokens"}
    if dtype != "bfloat16":
        assert set(reasons.values()) == {"all 160 the same"}


@slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_published_shape_of_vocabulary(small: Path, dtype: str) -> None:
    """The vocabulary of 50257, in weights that Hugging Face wrote. In `make test` test_training.py trains on it."""
    setting = Setting(*load(small), dtype, "CPU")
    assert_passes_equal(setting, random_batches(setting.config, 3, 7, seed=0, count=3))


# With one position attention gives its value whatever query and key are: their gradients are exactly 0, and steps
# divide what rounding leaves of that by itself. So passes alone are compared here; test_training.py has steps.
@pytest.mark.parametrize(
    ("dtype", "B", "T", "n_head", "flows"),
    [
        ("float32", 1, 1, 4, False),
        ("float32", 1, 16, 24, False),  # the full context, and heads of one number
        *(
            pytest.param(dtype, *shape, True, marks=slow)
            for dtype in ("float64", "float32")
            for shape in ((1, 1, 4), (1, 9, 1), (3, 7, 3), (1, 16, 24))
        ),
    ],
)
def test_shapes(dtype: str, B: int, T: int, n_head: int, flows: bool) -> None:
    config = sized(24, n_head)
    setting = Setting(config, random_weights(config, 1, 0.2), dtype, "CPU")
    assert_passes_equal(setting, random_batches(config, B, T, seed=T, count=3), flows)


@pytest.mark.parametrize("dtype", [pytest.param("float64", marks=slow), "float32"])
def test_hard_weights(dtype: str) -> None:
    arrays = hard_weights(CONFIG, 0)
    largest = np.abs(arrays["wpe.weight"]).max(1)
    assert largest[0] > 10 * largest[1:].max()
    assert_passes_equal(Setting(CONFIG, arrays, dtype, "CPU"), random_batches(CONFIG, ROWS, LENGTH, seed=3, count=2))


@slow
@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("gpt2")])
def test_widths_of_gpt2(preset: str) -> None:
    """One layer as wide as the published model's, with as many heads."""
    config = sized(PRESETS[preset].n_embd, PRESETS[preset].n_head)
    setting = Setting(config, random_weights(config, 2), "float32", "CPU")
    assert_passes_equal(setting, random_batches(config, 1, 8, seed=4, count=2))


@slow
def test_many_rows() -> None:
    """The full context of 1024 in a batch: gradients of parameters are sums over thousands of rows, not of a few."""
    config = GPT2Config(vocab_size=199, n_positions=1024, n_embd=16, n_layer=1, n_head=2)
    setting = Setting(config, random_weights(config, 5), "float32", "CPU")
    assert_passes_equal(setting, random_batches(config, 5, 1023, seed=5, count=2), flows=False)


def test_reference_is_hugging_face(small: Path) -> None:
    """A third implementation, from which neither of the two was written, agrees with the proof's float64 reference."""
    config, _ = load(small)
    for B, T in ((1, 1), (3, 7), (2, 32)):
        assert_reference_is_hugging_face(small, random_batches(config, B, T, seed=T, count=2))


@slow
def test_full(full: Path, tmp_path: Path) -> None:
    """124 million parameters: gradients out of the graph that trains. One trainer at a time, and gradients on disk, for
    memory: 6 GB.
    """
    config, arrays = load(full)
    batch = random_batches(config, 1, 16, seed=16, count=1)[0]

    def by_torch(dtype: str) -> None:
        trainer = torch_ref.trainer.Trainer(config, {name: array.astype(dtype) for name, array in arrays.items()})
        trainer.accumulate([batch])
        gradients: dict[str, Any] = {name: g.numpy() for name, g in trainer.mean_gradients()[1].items()}
        np.savez(tmp_path / f"{dtype}.npz", **gradients)

    by_torch("float64")
    by_torch("float32")
    port = tinygrad_impl.trainer.Trainer(config, arrays)
    port.accumulate([batch])
    _, ours = port.mean_gradients()
    del port
    reference, own = (np.load(tmp_path / f"{dtype}.npz") for dtype in ("float64", "float32"))  # read one by one
    assert_passed(judge("gradient", "float32", [(reference, ours, own)], summation_excuses(config, 16)))
