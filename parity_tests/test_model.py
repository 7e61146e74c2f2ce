"""The same weights and batch give the same logits, loss and gradients in tinygrad, in torch_ref and in HF's GPT-2."""

from pathlib import Path

import pytest

from parity_tests.support import random_batch
from parity_tests.three import check_all_three


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 7), (2, 32)])  # (2, 32) fills the context
def test_small(small: Path, dtype: str, B: int, T: int) -> None:
    check_all_three(small, dtype, *random_batch(B, T, seed=T))


@pytest.mark.slow
def test_full(full: Path) -> None:
    check_all_three(full, "float32", *random_batch(1, 16, seed=16))
