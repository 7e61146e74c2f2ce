"""The proof as a whole: its constants, when it compares again, and what it allows where a model is ill-conditioned."""

from typing import Any

import numpy as np
import pytest

from data.checkpoints.config import GPT2Config
from parity_tests import proof
from parity_tests.bounds import EXACT, FEW, KEYS, MULTIPLE, NEAR_MISS, ROUNDING, Row
from parity_tests.generation import SPREAD, TIES
from parity_tests.mutants import configuration
from parity_tests.proof import MORE, prove
from parity_tests.setting import NUDGES, Batch, Setting
from parity_tests.weights import random_weights


def test_bounds() -> None:
    """Those that parity_tests/README.md names."""
    assert MULTIPLE == {"float32": 2.0, "bfloat16": 1.5}
    same = dict.fromkeys(("forward", "backward", "gradient", "generation"), 1e-13)
    assert same | {"training": 1e-12} == EXACT
    assert np.finfo(np.float32).eps / 2 == ROUNDING
    assert (proof.BATCHES, proof.GRAPH_BATCHES, proof.MORE, NUDGES, NEAR_MISS, FEW) == (4, 8, 4, 8, 8.0, 128)
    assert (TIES, SPREAD) == (0.5, 5.0)


@pytest.mark.parametrize(("check", "first", "second", "asked", "equal"), [
    ("gradient", (0.9,), (), [1], True),
    ("gradient", (0.9, 1.1), (0.9, 0.9), [1, MORE], True),  # it was chance
    ("gradient", (0.9, 1.1), (0.9, 1.1), [1, MORE], False),
    ("gradient", (1.1, 10.0), (), [1], False),  # chance does not go as far
    ("gradient", (0.9, np.nan), (), [1], False),
    ("training", (0.9, 1.1), (), [1], False),  # nor to steps of AdamW
])  # fmt: skip
def test_what_fails_by_little_is_compared_again(
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    first: tuple[float, ...],
    second: tuple[float, ...],
    asked: list[int],
    equal: bool,
) -> None:
    calls = []

    def evidence(setting: Setting, batches: list[Batch], times: int, seed: int, steps: int, *_: Any) -> list[Row]:
        assert (seed, steps) == (3, 7)
        assert len(batches) == times * proof.GRAPH_BATCHES
        calls.append(times)
        return [Row(check, "wte.weight", by, by, 1.0, 1.0, 1.0) for by in (first, second)[len(calls) - 1]]

    monkeypatch.setattr(proof, "evidence", evidence)
    monkeypatch.setattr(proof, "find_culprit", lambda setting, failed, batches, steps: "someone")
    config = GPT2Config(vocab_size=128, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    rows, culprit = prove(Setting(config, random_weights(config, 0, 0.2), "float32", "CPU"), 2, 8, 3, 7, quiet=True)
    assert calls == asked
    assert culprit == (None if equal else "someone")
    assert [row.error for row in rows] == pytest.approx((first, second)[len(asked) - 1], nan_ok=True)


@pytest.mark.slow
def test_ill_conditioned_training_is_bounded_by_its_condition() -> None:
    """Saturated softmaxes, whose gradients are next to nothing, and which Adam divides by themselves: a change of the
    last place grows to more than the bound, in torch as here.
    """
    setting, rows, length, _ = configuration(18, 0)
    judged, culprit = prove(setting, rows, length, seed=3, steps=4, generated=0, quiet=True)
    assert culprit is None
    (row,) = (row for row in judged if row.check == "training" and row.name == "h.2.attn.c_attn.weight")
    assert EXACT["training"] < row.error <= row.allowed < 1e-11
    assert "last place" in row.reason
    well = [row for row in judged if row.check == "training" and not row.name.endswith(KEYS) and not row.reason]
    assert len(well) > 100
    assert {row.allowed for row in well} == {EXACT["training"]}
