"""The proof's judgement: what has to fail does, by name, and what is noise does not."""

import numpy as np
import pytest
from tinygrad import Tensor

import tinygrad_impl.model
import torch_ref.trainer
from data.config import GPT2Config, parameter_shapes
from parity_tests import proof
from parity_tests.mutants import configuration
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

    def evidence(setting: Setting, batches: list[proof.Batch], times: int, steps: int, quiet: bool) -> list[Row]:
        assert len(batches) == times * proof.GRAPH_BATCHES
        calls.append(times)
        return [Row(check, "wte.weight", by, by, 1.0, 1.0, 1.0) for by in (first, second)[len(calls) - 1]]

    monkeypatch.setattr(proof, "evidence", evidence)
    monkeypatch.setattr(proof, "named", lambda setting, failed, batches, steps: "someone")
    config = GPT2Config(vocab_size=128, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    rows, culprit = prove(Setting(config, random_weights(config, 0, 0.2), "float32", "CPU"), 2, 8, quiet=True)
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
    config = GPT2Config(vocab_size=128, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    forward, calls = tinygrad_impl.model.MLP.__call__, []

    def wrong(self: tinygrad_impl.model.MLP, x: Tensor) -> Tensor:
        calls.append(self)
        if len(calls) % 2:
            return forward(self, x)
        x = self.c_fc(x)
        return self.c_proj(0.5 * x * (1 + (x / 2**0.5).erf()))

    monkeypatch.setattr(tinygrad_impl.model.MLP, "__call__", wrong)
    setting = Setting(config, random_weights(config, 0, 0.2), "float32", "CPU")
    rows, culprit = prove(setting, 2, 8, steps=2, quiet=True)
    bad = {f"{row.check} {row.name}" for row in rows if not row.passed}
    assert culprit is not None
    assert culprit.startswith("h.1.mlp.gelu forward")
    assert {"forward loss", "forward h.1.mlp.c_proj.input", "gradient wte.weight"} <= bad
    assert not any(name.startswith("forward h.0.") for name in bad)


def test_ill_conditioned_training_is_bounded_by_its_condition() -> None:
    """Saturated softmaxes, whose gradients are next to nothing, and which Adam divides by themselves: a change of the
    last place grows to more than the bound, in torch as here.
    """
    setting, rows, length, _ = configuration(18, 0)
    judged, culprit = prove(setting, rows, length, seed=18, steps=4, quiet=True)
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
