"""How answers are compared."""

import pytest

from parity_tests.bench_evaluation import compared


def test_compared() -> None:
    """By log-probability, and by that divided by the characters of a choice; the lead is that of theirs."""
    ours, theirs = [[-1.0, -4.0], [-2.0, -2.5], [-3.0, -9.0]], [[-1.5, -2.5], [-2.25, -2.0], [-3.0, -9.0]]
    found = compared(ours, theirs, [[1, 5], [1, 4], [1, 1]])
    assert (found["questions"], found["apart_median"], found["apart_most"]) == (3, 0.375, 1.5)
    assert (found["same_acc"], found["leads_acc"]) == (2, [0.25])
    assert (found["same_acc_norm"], found["leads_acc_norm"]) == (3, [])
    normalised = compared([[-1.0, -6.0]], [[-1.5, -5.0]], [[1, 5]])
    assert (normalised["same_acc"], normalised["same_acc_norm"]) == (1, 0)
    assert normalised["leads_acc_norm"] == [pytest.approx(0.5)]
