"""Which part is to blame: the first sub-layer that is wrong by itself, and no error that is chance."""

import numpy as np
import pytest
from tinygrad import Tensor

import tinygrad_impl.model
from parity_tests import proof
from parity_tests.blame import first_clear_failure
from parity_tests.bounds import Row
from parity_tests.mutants import CONFIG, LENGTH, ROWS
from parity_tests.proof import prove
from parity_tests.setting import Setting
from parity_tests.weights import random_weights


def rows_of(**errors: float) -> list[Row]:
    return [Row("gradient", name, error, error, 1.0, 1.0, 2.0) for name, error in errors.items()]


def test_culprit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other GELU, in the second layer alone: what comes after it is wrong too, and is not to blame."""
    monkeypatch.setattr(proof, "BATCHES", 1)
    forward, calls = tinygrad_impl.model.MLP.__call__, []

    def wrong(self: tinygrad_impl.model.MLP, x: Tensor) -> Tensor:
        calls.append(self)
        if len(calls) % 2:
            return forward(self, x)
        x = self.c_fc(x)
        return self.c_proj(0.5 * x * (1 + (x / 2**0.5).erf()))

    monkeypatch.setattr(tinygrad_impl.model.MLP, "__call__", wrong)
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), "float32", "CPU")
    rows, culprit = prove(setting, ROWS, LENGTH, steps=2, generated=0, quiet=True)
    bad = {f"{row.check} {row.name}" for row in rows if not row.passed}
    assert culprit is not None
    assert culprit.startswith("h.1.mlp.gelu forward")
    assert {"forward loss", "forward h.1.mlp.c_proj.input", "gradient wte.weight"} <= bad
    assert not any(name.startswith("forward h.0.") for name in bad)


def test_first_clear_failure() -> None:
    """It is not one that is just over its bound, next to a large one."""
    assert first_clear_failure(rows_of(a=1.0, b=2.0)) is None  # as large as allowed is allowed
    for errors, name in (
        ({"a": 2.2, "b": 3.0}, "b"),  # 1.1 is below sqrt(1.5)
        ({"a": 2.6, "b": 3.0}, "a"),
        ({"a": 2.2, "b": 200.0, "c": 100.0}, "b"),  # next to 100 times the bound, 1.1 times it is chance
        ({"a": 2 * 101, "b": 2e9}, "a"),  # but 101 times never is
        ({"a": np.nan}, "a"),
    ):
        first = first_clear_failure(rows_of(**errors))
        assert first is not None
        assert first.name == name
