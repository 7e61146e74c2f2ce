"""What is allowed: what has to fail does, by name, and what is noise does not."""

import math

import numpy as np
import pytest

from data.checkpoints.config import GPT2Config, parameter_shapes
from parity_tests.bounds import (
    FEW,
    KEYS,
    MULTIPLE,
    NEAR_MISS,
    NUDGED,
    ROUNDING,
    Comparison,
    Row,
    excess,
    judge,
    near_miss,
    summation_excuses,
    worst,
)

BIAS = "h.0.attn.c_attn.bias"

Arrays = dict[str, np.ndarray]


def tensors(seed: int) -> Arrays:
    """A reference: a matrix, a vector, and a bias of which the key third is 0."""
    random = np.random.default_rng(seed)
    bias = random.standard_normal(12)
    bias[4:8] = 0
    return {"wte.weight": random.standard_normal((40, 50)), "ln_f.bias": random.standard_normal(FEW), BIAS: bias}


def off(reference: Arrays, by: float, seed: int = 9) -> Arrays:
    """The reference with random errors of about `by` of its tensors' RMS."""
    random = np.random.default_rng(seed)
    return {n: t + by * np.sqrt(np.mean(t**2)) * random.standard_normal(t.shape) for n, t in reference.items()}


def failed(ours: Arrays, dtype: str = "float64", own: Arrays | None = None) -> list[Row]:
    reference = tensors(0)
    rows = judge("gradient", dtype, [(reference, ours, reference if own is None else own)])
    return [row for row in rows if not row.passed]


def rows_of(**errors: float) -> list[Row]:
    return [Row("gradient", name, error, error, 1.0, 1.0, 2.0) for name, error in errors.items()]


def test_rounding_passes() -> None:
    reference = tensors(0)
    assert not failed(off(reference, 1e-15))
    rows = judge("gradient", "float64", [(reference, off(reference, 1e-15), reference)])
    assert [row.name for row in rows] == ["wte.weight", "ln_f.bias", BIAS, BIAS + KEYS]
    assert all(row.error > 0 for row in rows)  # that they pass is not because nothing was measured


def test_missing_tensor() -> None:
    reference = tensors(0)
    (row,) = failed({name: t for name, t in reference.items() if name != "ln_f.bias"})
    assert row.name == "ln_f.bias"
    (row,) = failed(reference | {"lm_head.weight": reference["wte.weight"]})
    assert row.name == "lm_head.weight"


def test_wrong_shape() -> None:
    """Transposed or with one more dimension: that broadcasting could compare them is no excuse."""
    reference = tensors(0)
    for wrong in (reference["wte.weight"].T, reference["wte.weight"][None], reference["wte.weight"][:1]):
        (row,) = failed(reference | {"wte.weight": wrong})
        assert row.name == "wte.weight"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["ln_f.bias", BIAS])
def test_not_a_number(dtype: str, value: float, name: str) -> None:
    reference = tensors(0)
    wrong = reference[name].copy()
    wrong[0] = value
    assert [row.name for row in failed(reference | {name: wrong}, dtype, off(reference, 1e-3))] == [name]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_flipped_sign(dtype: str) -> None:
    reference = tensors(0)
    (row,) = failed(reference | {"wte.weight": -reference["wte.weight"]}, dtype, off(reference, 1e-3))
    assert (row.name, row.error, row.cosine) == ("wte.weight", pytest.approx(2), pytest.approx(-1))


def test_one_wrong_element() -> None:
    reference = tensors(0)
    wrong = reference["wte.weight"].copy()
    wrong[17, 3] *= 1 + 1e-10
    (row,) = failed(reference | {"wte.weight": wrong})
    assert row.name == "wte.weight"
    assert row.worst > 10 * row.error


def test_bound_is_a_multiple_of_torch_s_own_error() -> None:
    reference, own = tensors(0), off(tensors(0), 1e-4)
    for dtype, multiple in MULTIPLE.items():
        for name in ("wte.weight", "ln_f.bias"):
            for share, count in ((0.99, 0), (1.01, 1)):
                ours = reference | {name: reference[name] + share * multiple * (own[name] - reference[name])}
                assert len(failed(ours, dtype, own)) == count


def test_few_numbers_may_be_small_by_chance() -> None:
    """Five times the spread of the logarithm of two such errors' ratio, where twice torch's own error does not do."""
    reference = {"few": np.random.default_rng(0).standard_normal(25)}
    own = off(reference, 1e-4)
    for times, excused in ((1.9, False), (3.0, True)):
        ours = {"few": reference["few"] + times * (own["few"] - reference["few"])}
        (row,) = judge("gradient", "float32", [(reference, ours, own)])
        assert row.own is not None
        assert row.passed
        assert row.allowed == pytest.approx(2 * row.own * (np.exp(5 / 25**0.5) if excused else 1))
        assert ("25 numbers" in row.reason) == excused
    (row,) = judge("gradient", "float32", [(reference, ours, own)] * 6)
    assert row.own is not None
    assert row.allowed == 2 * row.own
    assert not row.passed


def test_biases_gradients_may_be_summed_in_another_order() -> None:
    """By what adding as many float32 numbers one after the other costs, and no more; matrices' may not."""
    config = GPT2Config(vocab_size=128, n_positions=8, n_embd=256, n_layer=1, n_head=2)
    n = 4096
    excuses = summation_excuses(config, n)
    assert excuses.keys() == {name for name, shape in parameter_shapes(config).items() if len(shape) == 1}
    numbers = np.random.default_rng(0).standard_normal((n, 2, 256)).astype(np.float32)
    reference = dict(zip(("ln_f.bias", "wte.weight"), numbers.astype(np.float64).sum(0), strict=True))
    own = dict(zip(reference, numbers.sum(0, dtype=np.float64).astype(np.float32), strict=True))  # as near as can be
    ours = dict(zip(reference, np.add.accumulate(numbers, dtype=np.float32)[-1], strict=True))
    bias, matrix = judge("gradient", "float32", [(reference, ours, own)], excuses)
    assert bias.passed
    assert f"{n} rows" in bias.reason
    assert bias.allowed < 5 * bias.error
    assert not matrix.passed


def test_exact_torch_leaves_the_rounding_of_float32() -> None:
    reference = tensors(0)
    assert not failed(off(reference, ROUNDING), "float32")
    assert failed(off(reference, 5 * ROUNDING), "float32")


def test_errors_are_taken_over_all_batches() -> None:
    """An error of torch's that is small by chance in one batch is no bound, and one batch's error is not lost."""
    references = [tensors(seed) for seed in range(4)]
    own = [references[0], *(off(reference, 1e-5, seed=i) for i, reference in enumerate(references[1:]))]
    ours = [off(reference, 1e-5, seed=20 + i) for i, reference in enumerate(references)]
    assert all(row.passed for row in judge("gradient", "float32", zip(references, ours, own, strict=True)))
    ours[2] = off(references[2], 1e-3)
    assert not any(row.passed for row in judge("gradient", "float32", zip(references, ours, own, strict=True)))


def test_key_third_is_judged_on_the_scale_of_the_others() -> None:
    reference = tensors(0)
    keys = reference[BIAS].copy()
    keys[4:8] = 1e-15  # infinitely far from 0 on its own scale
    assert not failed(reference | {BIAS: keys})
    keys[4:8] = 1e-3
    assert [row.name for row in failed(reference | {BIAS: keys})] == [BIAS + KEYS]
    values = reference[BIAS].copy()
    values[8:] *= 1 + 1e-9
    assert [row.name for row in failed(reference | {BIAS: values})] == [BIAS]


def test_trained_key_third_has_to_stay_where_it_began() -> None:
    start = tensors(0) | {BIAS: np.ones(12)}
    reference = tensors(0)
    reference[BIAS][4:8] = 1
    moved = reference[BIAS].copy()
    moved[4:8] += 1e-3
    rows = judge("training", "float64", [(reference, reference | {BIAS: moved}, reference)], None, start)
    assert [row.name for row in rows if not row.passed] == [BIAS + KEYS]
    assert all(row.passed for row in judge("training", "float64", [(reference, reference, reference)], None, start))


def test_the_figures_of_a_row() -> None:
    """Worked out by hand, over two batches in which the mistakes that one could make differ."""
    references = [np.array([3.0, 4.0]), np.array([0.0, 12.0])]  # norms 5 and 12, together 13
    ours = [np.array([3.0, 4.3]), np.array([0.4, 12.0])]  # errors 0.3 and 0.4, together 0.5
    own = [np.array([3.1, 4.0]), np.array([0.0, 12.0])]
    batches = [({"a": t}, {"a": a}, {"a": o}) for t, a, o in zip(references, ours, own, strict=True)]
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
    comparison = Comparison("gradient", "float32", nudged=True)
    comparison.add({"a": references[0]}, {"a": ours[0]}, *drawn)
    (row,) = comparison.rows()
    assert row.own == pytest.approx(np.sqrt((0.1**2 + 0.7**2) / 2) / 5)
    assert row.reason == NUDGED


def test_worst_and_near_misses() -> None:
    assert worst(rows_of(a=1.0, b=3.0, c=2.5)).name == "b"
    assert [excess(row) for row in rows_of(a=0.0, b=3.0, c=np.nan)] == [0.0, 1.5, math.inf]
    limit = NEAR_MISS
    assert near_miss(rows_of(a=2 * limit, b=3.0), "float32")
    assert not near_miss(rows_of(a=2 * limit + 0.1, b=3.0), "float32")
    training = [Row("training", "a", 3.0, 3.0, 1.0, 1.0, 2.0)]
    assert near_miss(training, "float64")
    assert not near_miss([*rows_of(a=3.0), *training], "float32")


def test_one_rounding_is_allowed_and_for_what_is_squared_two() -> None:
    """Of tensors that torch computes exactly: 2 x 2^-24, half a unit in the last place being the least there is."""
    numbers = np.random.default_rng(0).standard_normal(200)
    for off, passed in ((1.9, {"exp_avg.x", "exp_avg_sq.x", "x"}), (3.0, {"exp_avg_sq.x"}), (4.1, set[str]())):
        reference = dict.fromkeys(("exp_avg.x", "exp_avg_sq.x", "x"), numbers)
        ours = {name: array * (1 + off * 2.0**-24) for name, array in reference.items()}
        rows = judge("training", "float32", [(reference, ours, reference)])
        assert {row.name for row in rows if row.passed} == passed


def test_nothing_to_compare_is_no_proof() -> None:
    nothing = {"x": np.zeros(0)}
    (row,) = judge("gradient", "float32", [(nothing, nothing, nothing)])
    assert not row.passed


def test_the_norm_is_not_excused_for_being_one_number() -> None:
    """Its excuse is that of the gradient's moments; exp(5) times PyTorch's own error is for tensors."""
    exact, ours, own = ({"norm": np.array(1 + off)} for off in (0.0, 1e-4, 1e-6))
    (row,) = judge("training", "float32", [(exact, ours, own)])
    assert not row.passed
    assert row.allowed == pytest.approx(2e-6, rel=1e-3)


def test_keys_are_judged_on_the_scale_of_the_others() -> None:
    """Of q and v, which are two thirds: their norm over sqrt(2)."""
    name = "h.0.attn.c_attn.bias"
    exact, ours, own = ({name: np.array([3.0, key, 4.0])} for key in (0.0, 0.5, 0.1))
    rows = {row.name: row for row in judge("gradient", "bfloat16", [(exact, ours, own)])}
    assert rows[f"{name} (keys)"].error == pytest.approx(0.5 / (5 / np.sqrt(2)))
    assert rows[name].error == 0
