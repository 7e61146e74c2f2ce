"""The proof's judgement: what has to fail does, by name, and what is noise does not."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor

import tinygrad_impl.generate
import tinygrad_impl.model
import tinygrad_impl.trainer
import torch_ref.trainer
from data.checkpoints.config import GPT2Config, parameter_shapes
from parity_tests import generation, proof
from parity_tests.generation import SAMPLING, could_draw, draws, numbers, prompts_for
from parity_tests.mutants import CONFIG, LENGTH, ROWS, configuration
from parity_tests.proof import (
    EXACT,
    FEW,
    KEYS,
    MORE,
    MULTIPLE,
    ROUNDING,
    Row,
    Setting,
    judge,
    prove,
    random_batches,
    summed,
)
from parity_tests.weights import random_weights

BIAS = "h.0.attn.c_attn.bias"

Arrays = dict[str, np.ndarray]


def tensors(seed: int) -> Arrays:
    """A truth: a matrix, a vector, and a bias of which the key third is 0."""
    random = np.random.default_rng(seed)
    bias = random.standard_normal(12)
    bias[4:8] = 0
    return {"wte.weight": random.standard_normal((40, 50)), "ln_f.bias": random.standard_normal(FEW), BIAS: bias}


def off(truth: Arrays, by: float, seed: int = 9) -> Arrays:
    """The truth with random errors of about `by` of its tensors' RMS."""
    random = np.random.default_rng(seed)
    return {n: t + by * np.sqrt(np.mean(t**2)) * random.standard_normal(t.shape) for n, t in truth.items()}


def failed(ours: Arrays, dtype: str = "float64", own: Arrays | None = None) -> list[Row]:
    truth = tensors(0)
    rows = judge("gradient", dtype, [(truth, ours, truth if own is None else own)])
    return [row for row in rows if not row.passed]


def test_bounds() -> None:
    """Those that README.md names."""
    assert MULTIPLE == {"float32": 2.0, "bfloat16": 1.5}
    same = dict.fromkeys(("forward", "backward", "gradient", "generation"), 1e-13)
    assert same | {"training": 1e-12} == EXACT
    assert np.finfo(np.float32).eps / 2 == ROUNDING
    assert (proof.BATCHES, proof.GRAPH_BATCHES, proof.MORE, proof.NUDGES, proof.BY_LUCK, FEW) == (4, 8, 4, 8, 8.0, 128)
    assert (proof.TIES, generation.CHANCE) == (0.5, 5.0)


def test_rounding_passes() -> None:
    truth = tensors(0)
    assert not failed(off(truth, 1e-15))
    rows = judge("gradient", "float64", [(truth, off(truth, 1e-15), truth)])
    assert [row.name for row in rows] == ["wte.weight", "ln_f.bias", BIAS, BIAS + KEYS]
    assert all(row.error > 0 for row in rows)  # that they pass is not because nothing was measured


def test_missing_tensor() -> None:
    truth = tensors(0)
    (row,) = failed({name: t for name, t in truth.items() if name != "ln_f.bias"})
    assert row.name == "ln_f.bias"
    (row,) = failed(truth | {"lm_head.weight": truth["wte.weight"]})
    assert row.name == "lm_head.weight"


def test_wrong_shape() -> None:
    """Transposed or with one more dimension: that broadcasting could compare them is no excuse."""
    truth = tensors(0)
    for wrong in (truth["wte.weight"].T, truth["wte.weight"][None], truth["wte.weight"][:1]):
        (row,) = failed(truth | {"wte.weight": wrong})
        assert row.name == "wte.weight"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["ln_f.bias", BIAS])
def test_not_a_number(dtype: str, value: float, name: str) -> None:
    truth = tensors(0)
    wrong = truth[name].copy()
    wrong[0] = value
    assert [row.name for row in failed(truth | {name: wrong}, dtype, off(truth, 1e-3))] == [name]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_flipped_sign(dtype: str) -> None:
    truth = tensors(0)
    (row,) = failed(truth | {"wte.weight": -truth["wte.weight"]}, dtype, off(truth, 1e-3))
    assert (row.name, row.error, row.cosine) == ("wte.weight", pytest.approx(2), pytest.approx(-1))


def test_one_wrong_element() -> None:
    truth = tensors(0)
    wrong = truth["wte.weight"].copy()
    wrong[17, 3] *= 1 + 1e-10
    (row,) = failed(truth | {"wte.weight": wrong})
    assert row.name == "wte.weight"
    assert row.worst > 10 * row.error


def test_bound_is_a_multiple_of_torch_s_own_error() -> None:
    truth, own = tensors(0), off(tensors(0), 1e-4)
    for dtype, multiple in MULTIPLE.items():
        for name in ("wte.weight", "ln_f.bias"):
            for share, count in ((0.99, 0), (1.01, 1)):
                ours = truth | {name: truth[name] + share * multiple * (own[name] - truth[name])}
                assert len(failed(ours, dtype, own)) == count


def test_few_numbers_may_be_small_by_luck() -> None:
    """Five times the spread of the logarithm of two such errors' ratio, where twice torch's own error does not do."""
    truth = {"few": np.random.default_rng(0).standard_normal(25)}
    own = off(truth, 1e-4)
    for times, excused in ((1.9, False), (3.0, True)):
        ours = {"few": truth["few"] + times * (own["few"] - truth["few"])}
        (row,) = judge("gradient", "float32", [(truth, ours, own)])
        assert row.own is not None
        assert row.passed
        assert row.allowed == pytest.approx(2 * row.own * (np.exp(5 / 25**0.5) if excused else 1))
        assert ("25 numbers" in row.reason) == excused
    (row,) = judge("gradient", "float32", [(truth, ours, own)] * 6)
    assert row.own is not None
    assert row.allowed == 2 * row.own
    assert not row.passed


def test_biases_gradients_may_be_summed_in_another_order() -> None:
    """By what adding as many float32 numbers one after the other costs, and no more; matrices' may not."""
    config = GPT2Config(vocab_size=128, n_positions=8, n_embd=256, n_layer=1, n_head=2)
    n = 4096
    excuses = summed(config, n)
    assert excuses.keys() == {name for name, shape in parameter_shapes(config).items() if len(shape) == 1}
    numbers = np.random.default_rng(0).standard_normal((n, 2, 256)).astype(np.float32)
    truth = dict(zip(("ln_f.bias", "wte.weight"), numbers.astype(np.float64).sum(0), strict=True))
    own = dict(zip(truth, numbers.sum(0, dtype=np.float64).astype(np.float32), strict=True))  # as near as can be
    ours = dict(zip(truth, np.add.accumulate(numbers, dtype=np.float32)[-1], strict=True))
    bias, matrix = judge("gradient", "float32", [(truth, ours, own)], excuses)
    assert bias.passed
    assert f"{n} rows" in bias.reason
    assert bias.allowed < 5 * bias.error
    assert not matrix.passed


@pytest.mark.parametrize(("check", "first", "second", "asked", "equal"), [
    ("gradient", (0.9,), (), [1], True),
    ("gradient", (0.9, 1.1), (0.9, 0.9), [1, MORE], True),  # it was luck
    ("gradient", (0.9, 1.1), (0.9, 1.1), [1, MORE], False),
    ("gradient", (1.1, 10.0), (), [1], False),  # luck does not go as far
    ("gradient", (0.9, np.nan), (), [1], False),
    ("training", (0.9, 1.1), (), [1], False),  # nor to steps of AdamW
])  # fmt: skip
def test_what_fails_by_little_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    first: tuple[float, ...],
    second: tuple[float, ...],
    asked: list[int],
    equal: bool,
) -> None:
    calls = []

    def evidence(setting: Setting, batches: list[proof.Batch], times: int, seed: int, steps: int, *_: Any) -> list[Row]:
        assert (seed, steps) == (3, 7)
        assert len(batches) == times * proof.GRAPH_BATCHES
        calls.append(times)
        return [Row(check, "wte.weight", by, by, 1.0, 1.0, 1.0) for by in (first, second)[len(calls) - 1]]

    monkeypatch.setattr(proof, "evidence", evidence)
    monkeypatch.setattr(proof, "named", lambda setting, failed, batches, steps: "someone")
    config = GPT2Config(vocab_size=128, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    rows, culprit = prove(Setting(config, random_weights(config, 0, 0.2), "float32", "CPU"), 2, 8, 3, 7, quiet=True)
    assert calls == asked
    assert culprit == (None if equal else "someone")
    assert [row.error for row in rows] == pytest.approx((first, second)[len(asked) - 1], nan_ok=True)


def test_exact_torch_leaves_the_rounding_of_float32() -> None:
    truth = tensors(0)
    assert not failed(off(truth, ROUNDING), "float32")
    assert failed(off(truth, 5 * ROUNDING), "float32")


def test_errors_are_taken_over_all_batches() -> None:
    """torch's luck in one batch is no bound, and an error in one batch is not lost among the others."""
    truths = [tensors(seed) for seed in range(4)]
    own = [truths[0], *(off(truth, 1e-5, seed=i) for i, truth in enumerate(truths[1:]))]
    ours = [off(truth, 1e-5, seed=20 + i) for i, truth in enumerate(truths)]
    assert all(row.passed for row in judge("gradient", "float32", zip(truths, ours, own, strict=True)))
    ours[2] = off(truths[2], 1e-3)
    assert not any(row.passed for row in judge("gradient", "float32", zip(truths, ours, own, strict=True)))


def test_key_third_is_judged_on_the_scale_of_the_others() -> None:
    truth = tensors(0)
    keys = truth[BIAS].copy()
    keys[4:8] = 1e-15  # infinitely far from 0 on its own scale
    assert not failed(truth | {BIAS: keys})
    keys[4:8] = 1e-3
    assert [row.name for row in failed(truth | {BIAS: keys})] == [BIAS + KEYS]
    values = truth[BIAS].copy()
    values[8:] *= 1 + 1e-9
    assert [row.name for row in failed(truth | {BIAS: values})] == [BIAS]


def test_trained_key_third_has_to_stay_where_it_began() -> None:
    start = tensors(0) | {BIAS: np.ones(12)}
    truth = tensors(0)
    truth[BIAS][4:8] = 1
    moved = truth[BIAS].copy()
    moved[4:8] += 1e-3
    rows = judge("training", "float64", [(truth, truth | {BIAS: moved}, truth)], None, start)
    assert [row.name for row in rows if not row.passed] == [BIAS + KEYS]
    assert all(row.passed for row in judge("training", "float64", [(truth, truth, truth)], None, start))


def test_culprit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other GELU, in the second layer alone: what comes after it is wrong too, and is not to blame."""
    monkeypatch.setattr(proof, "BATCHES", 2)
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


@pytest.mark.slow
def test_ill_conditioned_training_is_bounded_by_its_condition() -> None:
    """Saturated softmaxes, whose gradients are next to nothing, and which Adam divides by themselves: a change of the
    last place grows to more than the bound, in torch as here.
    """
    setting, rows, length, _ = configuration(18, 0)
    judged, culprit = prove(setting, rows, length, seed=18, steps=4, generated=0, quiet=True)
    assert culprit is None
    (row,) = (row for row in judged if row.check == "training" and row.name == "h.2.attn.c_attn.weight")
    assert EXACT["training"] < row.error <= row.allowed < 1e-11
    assert "last place" in row.reason
    well = [row for row in judged if row.check == "training" and not row.name.endswith(KEYS) and not row.reason]
    assert len(well) > 100
    assert {row.allowed for row in well} == {EXACT["training"]}


def test_truth_row_by_row_is_the_truth() -> None:
    """As a GPU computes it to save memory; but not where rows score different numbers of targets."""
    config = GPT2Config(vocab_size=128, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    setting = Setting(config, random_weights(config, 0, 0.2), "float32", "CPU")
    uneven = random_batches(config, 3, 7, seed=0, count=2)
    assert setting.for_truth(uneven) is uneven
    setting.torch_device = "cuda"
    assert setting.for_truth(uneven) is uneven
    batches = [(x, np.roll(x, -1)) for x, _ in uneven]
    rows = setting.for_truth(batches)
    assert [len(x) for x, _ in rows] == [1] * 6
    results = []
    for some in (batches, rows):
        trainer = torch_ref.trainer.Trainer(config, setting.exact)
        loss = np.array(trainer.accumulate(some))
        results.append({n: p.grad for n, p in trainer.parameters.items()} | {"loss": loss})
    at_once, singly = results
    assert all(row.passed for row in judge("gradient", "float64", [(at_once, singly, at_once)]))


def test_the_figures_of_a_row() -> None:
    """Worked out by hand, over two batches in which the mistakes that one could make differ."""
    truths = [np.array([3.0, 4.0]), np.array([0.0, 12.0])]  # norms 5 and 12, together 13
    ours = [np.array([3.0, 4.3]), np.array([0.4, 12.0])]  # errors 0.3 and 0.4, together 0.5
    own = [np.array([3.1, 4.0]), np.array([0.0, 12.0])]
    batches = [({"a": t}, {"a": a}, {"a": o}) for t, a, o in zip(truths, ours, own, strict=True)]
    (row,) = judge("gradient", "bfloat16", batches)
    assert row.error == pytest.approx(0.5 / 13)
    assert row.own == pytest.approx(0.1 / 13)
    assert row.ratio == pytest.approx(5)
    assert row.worst == pytest.approx(0.3 / np.sqrt(25 / 2))  # of an element, over the RMS of its batch
    dot, norms = 9 + 17.2 + 144, 13 * np.sqrt(9 + 4.3**2 + 0.4**2 + 144)
    assert row.cosine == pytest.approx(dot / norms)
    assert row.allowed == pytest.approx(1.5 * np.exp(5 / 2) * 0.1 / 13)  # of 4 numbers
    drawn = [
        {"a": own[0]},
        {"a": np.array([3.0, 4.7])},
    ]  # torch's own from two sets of weights: the mean of the squares
    comparison = proof.Comparison("gradient", "float32", moved=True)
    comparison.add({"a": truths[0]}, {"a": ours[0]}, *drawn)
    (row,) = comparison.rows()
    assert row.own == pytest.approx(np.sqrt((0.1**2 + 0.7**2) / 2) / 5)
    assert row.reason == proof.MOVED


def rows_of(**errors: float) -> list[Row]:
    return [Row("gradient", name, error, error, 1.0, 1.0, 2.0) for name, error in errors.items()]


def test_worst_and_first_over() -> None:
    assert proof.worst(rows_of(a=1.0, b=3.0, c=2.5)).name == "b"
    assert [proof.excess(row) for row in rows_of(a=0.0, b=3.0, c=np.nan)] == [0.0, 1.5, math.inf]
    assert proof.first_over(rows_of(a=1.0, b=2.0)) is None  # as large as allowed is allowed
    for errors, name in (
        ({"a": 2.2, "b": 3.0}, "b"),  # 1.1 is below sqrt(1.5)
        ({"a": 2.6, "b": 3.0}, "a"),
        ({"a": 2.2, "b": 200.0, "c": 100.0}, "b"),  # next to 100 times the bound, 1.1 times it is chance
        ({"a": 2 * 101, "b": 2e9}, "a"),  # but 101 times never is
        ({"a": np.nan}, "a"),
    ):
        first = proof.first_over(rows_of(**errors))
        assert first is not None
        assert first.name == name
    limit = proof.BY_LUCK
    assert proof.by_luck(rows_of(a=2 * limit, b=3.0), "float32")
    assert not proof.by_luck(rows_of(a=2 * limit + 0.1, b=3.0), "float32")
    training = [Row("training", "a", 3.0, 3.0, 1.0, 1.0, 2.0)]
    assert proof.by_luck(training, "float64")
    assert not proof.by_luck([*rows_of(a=3.0), *training], "float32")


def test_groups_of_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One, two and five that are accumulated, in gradients and in steps; and every batch is in one of them."""
    batches: list[Any] = [(np.array(i), np.array(i)) for i in range(8)]

    def which(groups: Any) -> list[list[int]]:
        return [[int(x) for x, _ in group] for group in groups]

    assert which(proof.micro_batches(batches)) == [[0], [1, 2], [3, 4, 5, 6, 7], [3], [4], [5], [6], [7]]
    steps = proof.training_steps(batches, 4)
    assert which(batches for batches, *_ in steps) == [[0, 1], [2], [3, 4, 5, 6, 7], [0, 1]]
    rates = [torch_ref.trainer.learning_rate(i, 4, 1e-3, 1e-4, 2) for i in range(4)]
    assert [(lr, port) for _, lr, port in steps] == [(rate, rate) for rate in rates]
    with monkeypatch.context() as patch:
        patch.setattr(tinygrad_impl.trainer, "learning_rate", lambda *given: given[0] + 0.5)
        assert [(lr, port) for _, lr, port in proof.training_steps(batches, 2)] == [
            (torch_ref.trainer.learning_rate(i, 2, 1e-3, 1e-4, 2), i + 0.5) for i in range(2)
        ]
    assert which(b for b, *_ in proof.training_steps(batches, 3, (1,))) == [[0], [1], [2]]


def test_nudged_weights_are_the_nearest_neighbours() -> None:
    arrays = {"a": np.linspace(-1, 1, 1000, dtype=np.float32)}
    changed = proof.nudged(arrays, 0)["a"]
    ups, downs = (np.nextafter(arrays["a"], np.float32(end)) for end in (np.inf, -np.inf))
    up = changed == ups
    assert 400 < up.sum() < 600
    np.testing.assert_array_equal(changed[~up], downs[~up])
    assert not np.array_equal(changed, proof.nudged(arrays, 1)["a"])


def test_both_sides_of_clipping() -> None:
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), "float32", "CPU")
    steps = proof.training_steps(random_batches(CONFIG, ROWS, LENGTH, seed=0, count=5), 5, (1,))
    norms = []
    for batches, *_ in steps:
        trainer, _ = setting.references()
        trainer.accumulate(batches)
        gradients = [p.grad.numpy() for p in trainer.parameters.values() if p.grad is not None]
        norms.append(np.linalg.norm(np.concatenate([gradient.ravel() for gradient in gradients])))
    assert proof.clip_between(setting, steps) == pytest.approx(0.99 * np.sort(norms)[2])


# --- generation --------------------------------------------------------------------------------------------------

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
        drawn, uniform = draws(logits, settings, 5), numbers(5, 20, 3)
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


def draw(as_truth: bool, as_told: bool, number: float = 0.9) -> proof.Draw:
    return proof.Draw("sampled.inside", "row 1, token 2", 2, as_truth, as_told, LOGITS, number)


@pytest.mark.parametrize(
    ("dtype", "others", "error", "passed", "said"),
    [
        ("float32", [], 0.0, True, "all 4 the same"),
        ("float32", [draw(False, True, 0.4 - 1e-6)], 0.0, True, "1 of 5 draws are ties"),
        (
            "float64",
            [draw(False, True, 0.4 - 1e-6)],
            0.2,
            False,
            "1 of 5 are not what the sampler draws from the truth's",
        ),
        ("float32", [draw(False, True, 0.3)], 0.2, False, "from the truth's logits; first row 1, token 2"),
        ("float32", [draw(True, False)], 0.2, False, "from its own logits"),
        ("float32", [draw(False, False, 0.4 - 1e-6)], 0.2, False, "from its own logits"),
        ("float32", [draw(False, True, 0.4 - 1e-6)] * 4, 0.0, True, "4 of 8 draws are ties"),
        ("float32", [draw(False, True, 0.4 - 1e-6)] * 5, 5 / 9, False, "too many to prove anything"),
    ],
)
def test_the_tokens_drawn(dtype: str, others: list[proof.Draw], error: float, passed: bool, said: str) -> None:
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), dtype, "CPU")
    drawn = [draw(True, True)] * 4 + others
    row = proof.tokens_row(setting, "sampled", PLAIN, drawn, {"sampled.inside": 1e-5})
    assert (row.check, row.name, row.error, row.passed) == ("generation", "sampled.tokens", error, passed)
    assert said in row.reason


def first_rows_positions(self: Any, T: int) -> Tensor:
    return (self.lengths[:1, None] + Tensor.arange(T)).minimum(15).expand(self.lengths.shape[0], T)


@pytest.mark.parametrize(
    ("owner", "name", "planted", "failing"),
    [
        (tinygrad_impl.model.KVCache, "positions", first_rows_positions, {"greedy.inside", "greedy.probabilities"}),
        (tinygrad_impl.generate, "probability", lambda logits, token: 0.5, {"greedy.probabilities"}),
    ],
    ids=["positions", "probabilities"],
)
def test_generation_that_is_wrong_is_named(
    owner: Any, name: str, planted: Any, failing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nothing but generation sees."""
    monkeypatch.setattr(owner, name, planted)
    monkeypatch.setattr(proof, "SAMPLING", {"greedy": SAMPLING["greedy"]})
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), "float32", "CPU")
    (rows,) = proof.generation_rows(setting, [0], 3)
    assert len(rows) == 4
    wrong = [row for row in rows if not row.passed]
    assert {row.name for row in wrong} >= failing
    assert not proof.by_luck(wrong, "float32")
    assert proof.named(setting, wrong, [], 3).startswith("generation: greedy.")


# --- the certificate ---------------------------------------------------------------------------------------------


def test_a_changed_byte_of_any_source_changes_the_certificate(tmp_path: Path) -> None:
    for package in proof.PACKAGES:
        shutil.copytree(proof.ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = proof.sources(tmp_path)
    assert before == proof.sources()
    files = [p for p in tmp_path.rglob("*") if p.suffix in (".py", ".c") or p.name == "zig-clang"]
    tests = [p for p in files if "test" in p.name or {"tests", "catalogue"} & {*p.parts} or p.name == "conftest.py"]
    assert len(tests) > 40
    assert before.keys() == {p.relative_to(tmp_path).as_posix() for p in {*files} - {*tests}}
    needed = {"torch_ref/model.py", "tinygrad_impl/cpu.py", "tinygrad_impl/product.c", "tinygrad_impl/zig-clang"}
    needed |= {"tinygrad_impl/kernels/fused.py", "data/text/sampling.py", "parity_tests/proof.py"}
    assert needed <= before.keys()
    for name in before:
        content = bytearray((tmp_path / name).read_bytes() or b" ")
        content[-1] ^= 1
        (tmp_path / name).write_bytes(content)
    after = proof.sources(tmp_path)
    assert after.keys() == before.keys()
    assert not {*after.items()} & {*before.items()}


def test_what_a_certificate_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "revision", lambda: {"commit": "ab" * 20, "clean": False})
    weights = random_weights(CONFIG, 0, 0.2)

    def made(rows: list[Row], dtype: str = "float32", changed: Arrays | None = None) -> dict[str, Any]:
        setting = Setting(CONFIG, weights | (changed or {}), dtype, "CPU")
        return proof.certificate(setting, rows, "someone", seed=7)

    good = rows_of(a=1.0, b=2.0)
    c = made(good)
    assert (c["verdict"], c["culprit"], c["multiple"], c["seed"]) == ("equal", "someone", 2.0, 7)
    assert c["revision"] == {"commit": "ab" * 20, "clean": False}
    assert c["model"]["parameters"] == sum(array.size for array in weights.values())
    assert c["rows"][1] == vars(good[1]) | {"ratio": 2.0, "passed": True}
    assert made([*good, *rows_of(c=2.1)])["verdict"] == "different"
    assert made([])["verdict"] == "different"
    assert [made(good, dtype)["multiple"] for dtype in ("float64", "bfloat16")] == [None, 1.5]
    bias = weights["ln_f.bias"].copy()
    bias[3] = np.nextafter(bias[3], np.float32(1))
    assert made(good, changed={"ln_f.bias": bias})["model"]["sha256"] != c["model"]["sha256"]
    assert made(good)["model"]["sha256"] == c["model"]["sha256"]


def test_one_rounding_is_allowed_and_for_what_is_squared_two() -> None:
    """Of tensors that torch computes exactly: 2 x 2^-24, half a unit in the last place being the least there is."""
    numbers = np.random.default_rng(0).standard_normal(200)
    for off, passed in ((1.9, {"exp_avg.x", "exp_avg_sq.x", "x"}), (3.0, {"exp_avg_sq.x"}), (4.1, set[str]())):
        truth = dict.fromkeys(("exp_avg.x", "exp_avg_sq.x", "x"), numbers)
        ours = {name: array * (1 + off * 2.0**-24) for name, array in truth.items()}
        assert {row.name for row in judge("training", "float32", [(truth, ours, truth)]) if row.passed} == passed


def test_nothing_to_compare_is_no_proof() -> None:
    nothing = {"x": np.zeros(0)}
    (row,) = judge("gradient", "float32", [(nothing, nothing, nothing)])
    assert not row.passed
