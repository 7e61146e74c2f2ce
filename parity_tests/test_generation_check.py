"""The check of generation: which tokens could be drawn, what is a tie, and what is named where generation is wrong."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

import tinygrad_impl.cached_model
import tinygrad_impl.cpu_decode
import tinygrad_impl.model
import torch_ref.model
from parity_tests import generation
from parity_tests.blame import find_culprit
from parity_tests.bounds import AS_FLOAT32, ROUNDING, near_miss
from parity_tests.generation import (
    SAMPLING,
    Continuations,
    Draw,
    could_draw,
    draws,
    generation_rows,
    logits_of_torch,
    prompts_for,
    tokens_row,
    uniform_numbers,
)
from parity_tests.mutants import CONFIG
from parity_tests.setting import Setting
from parity_tests.weights import random_weights
from tinygrad_impl.backend import Plain

LOGITS = np.log(np.array([0.1, 0.4, 0.3, 0.15, 0.05]))  # drawn in the order 1, 2, 3, 0, 4


PLAIN: dict[str, Any] = {"temperature": 1.0}


@pytest.mark.parametrize(
    ("settings", "token", "number", "expected"),
    [
        ({"temperature": 0.0}, 1, 0.9, True),
        ({"temperature": 0.0}, 2, 0.0, False),
        (PLAIN, 1, 0.39, True),
        (PLAIN, 1, 0.41, False),
        (PLAIN, 2, 0.41, True),
        (PLAIN, 2, 0.39, False),
        (PLAIN, 2, 0.71, False),
        (PLAIN, 4, 0.96, True),
        (PLAIN, 4, 0.94, False),
        ({"temperature": 1.0, "top_k": 2}, 2, 0.58, True),  # 4/7
        ({"temperature": 1.0, "top_k": 2}, 2, 0.56, False),
        ({"temperature": 1.0, "top_k": 2}, 3, 0.99, False),
        ({"temperature": 1.0, "top_p": 0.6}, 2, 0.58, True),
        ({"temperature": 1.0, "top_p": 0.6}, 1, 0.58, False),
        ({"temperature": 1.0, "top_p": 0.6}, 3, 0.9999, False),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.9}, 3, 0.83, True),  # 0.7 / 0.85 = 0.8235
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.9}, 3, 0.82, False),
        ({"temperature": 0.5}, 1, 0.55, True),  # 0.16 / 0.285
        ({"temperature": 0.5}, 2, 0.55, False),
    ],
)
def test_what_could_be_drawn(settings: dict[str, Any], token: int, number: float, expected: bool) -> None:
    """Where nothing is off it is what the sampler draws; near a border it is both."""
    assert could_draw(LOGITS, token, number, settings, 0.0) == expected
    assert could_draw(LOGITS, token, number, settings, 1e-6) == expected
    if settings["temperature"] == 0:
        assert could_draw(LOGITS, token, number, settings, 0.5 * np.log(4 / 3) - 1e-6) == expected
        assert could_draw(LOGITS, 2, number, settings, 0.5 * np.log(4 / 3) + 1e-6)
    else:
        assert could_draw(LOGITS, token, number, settings, 0.2) or token in (3, 4) or not expected


def test_ties_are_of_the_size_of_the_error() -> None:
    """A border at 0.4: errors of the logits move it by at most 2 * 0.4 * 0.6 of theirs, and by no more is allowed."""
    for off in (1e-3, 1e-2):
        near, far = 0.3 * off, 2 * off
        for token, side in ((1, 1), (2, -1)):
            assert could_draw(LOGITS, token, 0.4 + side * near, PLAIN, off)
            assert not could_draw(LOGITS, token, 0.4 + side * far, PLAIN, off)


def test_what_the_sampler_draws_could_be_drawn() -> None:
    random = np.random.default_rng(0)
    for settings in (*SAMPLING.values(), PLAIN, {"temperature": 2.0, "top_p": 0.5}):
        logits = [random.standard_normal((3, 50)) for _ in range(20)]
        drawn, uniform = draws(logits, settings, 5), uniform_numbers(5, 20, 3)
        assert drawn.shape == uniform.shape == (20, 3)
        for s in range(20):
            for i in range(3):
                assert could_draw(logits[s][i], drawn[s, i], uniform[s, i], settings, 0.0)
                others = [could_draw(logits[s][i], t, uniform[s, i], settings, 1e-9) for t in range(50)]
                assert sum(others) == 1


def test_prompts_reach_all_of_the_context() -> None:
    lengths = [len(prompt) for prompt in prompts_for(CONFIG, 0)]
    assert lengths == [1, 8, 14, 19]
    assert generation.GENERATED > 2 * 16  # the shortest goes beyond the context too, and the kernels draw 32 at once
    assert [len(prompt) for prompt in prompts_for(replace(CONFIG, n_positions=1), 0)] == [1, 1, 1, 4]
    assert prompts_for(CONFIG, 0) != prompts_for(CONFIG, 1)
    assert max(map(max, prompts_for(CONFIG, 0))) < CONFIG.vocab_size


def draw(as_reference: bool, as_port: bool, number: float = 0.9) -> Draw:
    return Draw("sampled.inside", "row 1, token 2", 2, as_reference, as_port, LOGITS, number)


@pytest.mark.parametrize(
    ("dtype", "others", "error", "passed", "words"),
    [
        ("float32", [], 0.0, True, "all 4 the same"),
        ("float32", [draw(False, True, 0.4 - 1e-6)], 0.0, True, "1 of 5 draws are ties"),
        (
            "float64",
            [draw(False, True, 0.4 - 1e-6)],
            0.2,
            False,
            "1 of 5 are not what the sampler draws from the float64 reference's",
        ),
        ("float32", [draw(False, True, 0.3)], 0.2, False, "from the float64 reference's logits; first row 1, token 2"),
        ("float32", [draw(True, False)], 0.2, False, "from its own logits"),
        ("float32", [draw(False, False, 0.4 - 1e-6)], 0.2, False, "from its own logits"),
        ("float32", [draw(False, True, 0.4 - 1e-6)] * 4, 0.0, True, "4 of 8 draws are ties"),
        ("float32", [draw(False, True, 0.4 - 1e-6)] * 5, 5 / 9, False, "too many to prove anything"),
    ],
)
def test_the_tokens_drawn(dtype: str, others: list[Draw], error: float, passed: bool, words: str) -> None:
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), dtype, "CPU")
    drawn = [draw(True, True)] * 4 + others
    row = tokens_row(setting, "sampled", PLAIN, drawn, {"sampled.inside": 1e-5})
    assert (row.check, row.name, row.error, row.passed) == ("generation", "sampled.tokens", error, passed)
    assert words in row.reason


@pytest.mark.parametrize(
    ("dtype", "least", "most", "reason"),
    [
        ("float64", 0.0, ROUNDING, AS_FLOAT32),
        ("float32", ROUNDING, 1e-6, ""),
        ("bfloat16", 1e-3, 1e-1, ""),
    ],
)
def test_pytorch_s_own_error(
    dtype: str, least: float, most: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 that of rounding the logits to float32, as samplers get them; otherwise that of computing them. The
    port is left out: it gives the logits that the float64 reference has.
    """
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), dtype, "CPU")
    reference = torch_ref.model.GPT2(CONFIG, setting.exact)

    def continuations(generator: Any, prompts: list[list[int]], steps: int, sampler: Any) -> Continuations:
        shape = steps, len(prompts)
        lengths = np.arange(steps)[:, None] + [len(prompt) for prompt in prompts]
        return Continuations(np.ones(shape, int), np.full(shape, 0.5), np.ones(shape, bool), lengths)

    def logits(generator: Any, prompts: list[list[int]], tokens: np.ndarray) -> list[np.ndarray]:
        return logits_of_torch(reference, None, prompts, tokens, CONFIG.vocab_size)

    monkeypatch.setattr(generation, "SAMPLING", {"greedy": SAMPLING["greedy"]})
    monkeypatch.setattr(generation, "Generator", lambda *_: None)
    monkeypatch.setattr(generation, "continuations_of_port", continuations)
    monkeypatch.setattr(generation, "logits_of_port", logits)
    (rows,) = generation_rows(setting, [0], 3)
    inside, beyond, *_ = rows
    assert (inside.name, beyond.name) == ("greedy.inside", "greedy.beyond")
    for row in (inside, beyond):
        assert row.error == 0
        assert row.own is not None
        assert least < row.own < most
        assert row.reason == reason


def first_rows_positions(self: Any, T: int) -> Tensor:
    return (self.lengths[:1, None] + Tensor.arange(T)).minimum(15).expand(self.lengths.shape[0], T)


@pytest.mark.parametrize(
    ("owner", "name", "planted", "failing"),
    [
        (tinygrad_impl.model.KVCache, "positions", first_rows_positions, {"greedy.inside", "greedy.probabilities"}),
        (tinygrad_impl.cached_model, "probability", lambda logits, token: 0.5, {"greedy.probabilities"}),
        (tinygrad_impl.cpu_decode, "probability", lambda logits, token: 0.5, {"greedy.probabilities"}),
    ],
    ids=["positions", "probabilities", "the CPU's probabilities"],
)
def test_generation_that_is_wrong_is_named(
    owner: Any, name: str, planted: Any, failing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nothing but generation sees."""
    monkeypatch.setattr(owner, name, planted)
    monkeypatch.setattr(generation, "SAMPLING", {"greedy": SAMPLING["greedy"]})
    backend = None if owner is tinygrad_impl.cpu_decode else Plain(dtypes.float32)  # whose decoder is any device's
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), "float32", "CPU", backend)
    (rows,) = generation_rows(setting, [0], 3)
    assert len(rows) == 4
    wrong = [row for row in rows if not row.passed]
    assert {row.name for row in wrong} >= failing
    assert not near_miss(wrong, "float32")
    assert find_culprit(setting, wrong, [], 3).startswith("generation: greedy.")
