"""What the gate adds on several ranks: which rank's row counts, and what sending gradients as bfloat16 excuses."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from data.ranks import Ranks
from parity_tests.averaging import Sent, agreed
from parity_tests.bounds import Row


def row(name: str, error: float, allowed: float = 1.0) -> Row:
    return Row("gradient", name, error, error, 1.0, None, allowed)


def test_the_worst_rank_counts() -> None:
    class Two(Ranks):
        size = 2

        def gather(self, value: Any) -> list[Any]:
            return [value, [row("a", 3.0), row("b", 0.1), row("only here", math.nan)]]

    rows = agreed(Two(), [row("a", 0.2), row("b", 2.0)])
    assert [(r.name, r.error) for r in rows[:2]] == [("a", 3.0), ("b", 2.0)]
    assert not rows[2].passed


def test_what_roundings_of_what_is_sent_may_do() -> None:
    """Two ranks whose gradients nearly cancel: it is the size of what is sent that counts, not that of the mean."""
    sent = Sent(2)
    means = sent.mean({"w": torch.tensor([x, 0.0]), "loss": np.array(x)} for x in (5.0, -3.0))
    assert means["w"].tolist() == [1.0, 0.0]
    assert means["loss"] == 1.0
    bound = ((1 + 2**-8) ** 3 - 1) * 4  # the mean of 5 and 3, over 1
    small, large, right, loss, norm = sent.excused(
        [
            *(row("w", 1e-3 + 0.99 * bound, 1e-3), row("w", 2e-3 + bound, 1e-3), row("w", 1e-4, 1e-3)),
            *(row("loss", 2e-3, 1e-3), row("norm", 2e-3, 1e-3)),
        ]
    )
    assert small.passed
    assert small.allowed == pytest.approx(1e-3 + bound)
    assert "bfloat16" in small.reason
    assert not large.passed
    assert (right.allowed, right.reason) == (1e-3, "")
    assert not loss.passed
    assert norm.passed
