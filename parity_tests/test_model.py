"""The proof, on models of all shapes and on weights as awkward as the published ones."""

from pathlib import Path

import numpy as np
import pytest

from data.checkpoint import load
from data.config import PRESETS, GPT2Config
from data.loader import IGNORED
from parity_tests.assertions import assert_passed, assert_passes_equal, assert_reference_is_hugging_face
from parity_tests.proof import Setting, prove, random_batches
from parity_tests.weights import hard_weights, random_weights

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])


def sized(n_embd: int, n_head: int, n_layer: int = 1) -> GPT2Config:
    return GPT2Config(vocab_size=199, n_positions=16, n_embd=n_embd, n_layer=n_layer, n_head=n_head)


def test_batches_have_what_matters() -> None:
    config = sized(8, 2)
    for x, y in random_batches(config, 3, 7, seed=0, count=3):
        assert len(np.unique(x)) < x.size // 2 + 2  # tokens repeat, so that their gradients add up
        assert config.vocab_size - 1 in x[0, 1:-1]  # end-of-text with tokens on both sides of it
        assert 0 < (y == IGNORED).sum() < y.size


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_prove(dtype: str) -> None:
    """All of it, steps too, on the full context."""
    setting = Setting(sized(32, 4, n_layer=2), random_weights(sized(32, 4, n_layer=2), 0, 0.2), dtype, "CPU")
    assert_passed(*prove(setting, 2, 16, quiet=True))


@DTYPES
def test_published_shape_of_vocabulary(small: Path, dtype: str) -> None:
    """The vocabulary of 50257, in weights that Hugging Face wrote."""
    setting = Setting(*load(small), dtype, "CPU")
    assert_passes_equal(setting, random_batches(setting.config, 3, 7, seed=0, count=3))


# With one position attention gives its value whatever query and key are: their gradients are exactly 0, and steps
# divide what rounding leaves of that by itself. So passes alone are compared here; test_training.py has steps.
@DTYPES
@pytest.mark.parametrize(("B", "T", "n_head"), [(1, 1, 4), (1, 9, 1), (3, 7, 3), (1, 16, 24)])
def test_shapes(dtype: str, B: int, T: int, n_head: int) -> None:
    config = sized(24, n_head)
    setting = Setting(config, random_weights(config, 1, 0.2), dtype, "CPU")
    assert_passes_equal(setting, random_batches(config, B, T, seed=T, count=3))


@DTYPES
def test_hard_weights(dtype: str) -> None:
    config = sized(64, 4, n_layer=2)
    arrays = hard_weights(config, 0)
    largest = np.abs(arrays["wpe.weight"]).max(1)
    assert largest[0] > 10 * largest[1:].max()
    assert_passes_equal(Setting(config, arrays, dtype, "CPU"), random_batches(config, 2, 16, seed=3, count=4))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("gpt2")])
def test_widths_of_gpt2(preset: str) -> None:
    """One layer as wide as the published model's, with as many heads."""
    config = sized(PRESETS[preset].n_embd, PRESETS[preset].n_head)
    setting = Setting(config, random_weights(config, 2), "float32", "CPU")
    assert_passes_equal(setting, random_batches(config, 1, 8, seed=4, count=2))


def test_many_rows() -> None:
    """The full context of 1024 in a batch: gradients of parameters are sums over thousands of rows, not of a few."""
    config = GPT2Config(vocab_size=199, n_positions=1024, n_embd=16, n_layer=1, n_head=2)
    setting = Setting(config, random_weights(config, 5), "float32", "CPU")
    assert_passes_equal(setting, random_batches(config, 5, 1023, seed=5, count=2), flows=False)


def test_reference_is_hugging_face(small: Path) -> None:
    """A third implementation, which neither of the two was written from, agrees with what the proof takes for true."""
    config, _ = load(small)
    for B, T in ((1, 1), (3, 7), (2, 32)):
        assert_reference_is_hugging_face(small, random_batches(config, B, T, seed=T, count=2))


@pytest.mark.slow
def test_full(full: Path) -> None:
    setting = Setting(*load(full), "float32", "CPU")
    batches = random_batches(setting.config, 1, 16, seed=16, count=4)
    assert_reference_is_hugging_face(full, batches[:1])
    assert_passes_equal(setting, batches, flows=False)
