import math

import numpy as np
import pytest

from data.cli import InputError
from data.text.sampling import Sampler, probability

LOGITS = np.log(np.array([[0.05, 0.5, 0.15, 0.3]], np.float32))
N = 4000


def draw(sampler: Sampler, logits: np.ndarray = LOGITS) -> np.ndarray:
    """N draws from the same row, in one call."""
    return sampler(np.repeat(logits, N, axis=0))


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic; with 3 degrees of freedom it is above 16.3 once in a thousand times."""
    seen = np.bincount(tokens, minlength=len(probabilities))
    return float((np.square(seen - N * probabilities) / (N * probabilities)).sum())


def test_greedy_takes_the_likeliest() -> None:
    logits = np.array([[0, 3, 1], [5, -1, 4], [-3, -2, -1]], np.float32)
    np.testing.assert_array_equal(Sampler(temperature=0, seed=3)(logits), [1, 0, 2])
    np.testing.assert_array_equal(Sampler(top_k=1)(logits), [1, 0, 2])


def test_frequencies_are_those_of_the_softmax() -> None:
    probabilities = np.exp(LOGITS[0].astype(np.float64))
    assert chi_square(draw(Sampler()), probabilities) < 16.3


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature: float) -> None:
    weights = np.exp(LOGITS[0].astype(np.float64) / temperature)
    tokens = draw(Sampler(temperature))
    assert chi_square(tokens, weights / weights.sum()) < 16.3
    assert chi_square(tokens, np.exp(LOGITS[0].astype(np.float64))) > 100


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (9, {0, 1, 2, 3}), (None, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_likeliest(top_k: int | None, kept: set[int]) -> None:
    assert set(draw(Sampler(top_k=top_k))) == kept


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {1}), (0.49, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.81, {1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert set(draw(Sampler(top_p=top_p))) == kept


def test_the_kept_tokens_keep_their_proportions() -> None:
    for sampler in (Sampler(top_k=2), Sampler(top_p=0.6)):
        share = (draw(sampler) == 1).mean()
        assert share == pytest.approx(0.5 / 0.8, abs=0.03)


def test_top_p_is_of_what_top_k_left() -> None:
    # of the two kept, the first has 0.625 of the probability, so that alone reaches 0.6; of all it has 0.5 only
    assert set(draw(Sampler(top_k=2, top_p=0.6))) == {1}


def test_a_row_does_not_depend_on_the_others() -> None:
    random = np.random.default_rng(0)
    logits = random.standard_normal((50, 30)).astype(np.float32)
    others = random.standard_normal((50, 30)).astype(np.float32)
    others[::2] = logits[::2]
    for options in ({}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 3.0}):
        first, second = (Sampler(seed=1, **options)(rows) for rows in (logits, others))
        np.testing.assert_array_equal(first[::2], second[::2])
        assert not np.array_equal(first[1::2], second[1::2])


def test_a_greedy_call_uses_up_as_many_numbers() -> None:
    """So that the draws after it are the same, whatever was drawn before."""
    greedy, random = Sampler(temperature=0, seed=5), Sampler(seed=5)
    greedy(LOGITS)
    random(LOGITS)
    assert greedy.random.random() == random.random.random()


def test_the_seed_decides() -> None:
    first, again, other = (draw(Sampler(seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    sampler = Sampler(seed=1)
    assert not np.array_equal(draw(sampler), draw(sampler))  # the stream goes on from call to call


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.array([[-np.inf, 0, -np.inf, 0]], np.float32)
    for sampler in (Sampler(), Sampler(top_k=3), Sampler(top_p=1.0), Sampler(temperature=0)):
        assert set(draw(sampler, logits)) <= {1, 3}


def test_huge_logits_and_tiny_temperatures_do_not_overflow() -> None:
    with np.errstate(over="raise", invalid="raise"):
        assert set(draw(Sampler(temperature=1e-6), LOGITS * 1e4)) == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 9e-10}, "temperature is 9e-10"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top-k is 0"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.01}, "top-p is 1.01"),
        ({"top_p": float("nan")}, "top-p is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_refusals(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampler(**options)  # type: ignore[arg-type]


class Draws:
    """Random numbers that a test chose, in the place of a sampler's own."""

    def __init__(self, *numbers: float):
        self.numbers = list(numbers)

    def random(self, count: int) -> np.ndarray:
        taken, self.numbers = self.numbers[:count], self.numbers[count:]
        assert len(taken) == count
        return np.array(taken)


def with_draws(sampler: Sampler, *numbers: float) -> Sampler:
    sampler.random = Draws(*numbers)  # type: ignore[assignment]
    return sampler


def by_definition(row: np.ndarray, draw: float, temperature: float, top_k: int | None, top_p: float | None) -> int:
    """The token that a number in [0, 1) stands for, one step after the other."""
    ranked = sorted(range(len(row)), key=lambda token: (-float(row[token]), token))  # of equals, the lowest id first
    if top_k is not None:
        ranked = ranked[:top_k]
    weights = [math.exp((float(row[token]) - float(row[ranked[0]])) / temperature) for token in ranked]
    if top_p is not None:
        total, kept = math.fsum(weights), 1
        while kept < len(weights) and math.fsum(weights[:kept]) / total < top_p:
            kept += 1
        ranked, weights = ranked[:kept], weights[:kept]
    total, reached = math.fsum(weights), 0.0
    for token, weight in zip(ranked, weights, strict=True):
        reached += weight / total
        if draw < reached:
            return token
    return ranked[-1]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 5, 40, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.9, 1.0])
def test_all_options_together(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Several rows, several calls, and logits of which a third are equal to others of their row."""
    random = np.random.default_rng(5)
    sampler = Sampler(temperature, top_k, top_p, seed=9)
    draws = np.random.Generator(np.random.PCG64(9))
    for rows in (3, 1, 7):
        logits = random.normal(0, 3, (rows, 60)).astype(np.float32)
        logits[:, ::3] = np.round(logits[:, ::3])
        expected = [
            by_definition(*row, temperature, top_k, top_p) for row in zip(logits, draws.random(rows), strict=True)
        ]
        np.testing.assert_array_equal(sampler(logits), expected)


def test_by_default_all_is_drawn_from_with_seed_0() -> None:
    logits = np.random.default_rng(1).normal(0, 2, (50, 30)).astype(np.float32)
    draws = np.random.Generator(np.random.PCG64(0)).random(50)
    expected = [by_definition(row, draw, 1.0, None, None) for row, draw in zip(logits, draws, strict=True)]
    np.testing.assert_array_equal(Sampler()(logits), expected)


def test_of_equal_logits_top_k_keeps_the_lowest_ids() -> None:
    logits = np.zeros((1, 300), np.float32)
    logits[0, 40::2] = 1  # 130 equals
    assert set(draw(Sampler(top_k=3), logits)) == {40, 42, 44}
    np.testing.assert_array_equal(Sampler(0)(logits), [40])


def test_top_p_that_is_reached_exactly_takes_no_more() -> None:
    assert set(draw(Sampler(top_p=0.5), np.zeros((1, 4), np.float32))) == {0, 1}


def test_what_a_number_on_the_edge_of_two_tokens_draws() -> None:
    """Token i has the numbers from its edge on; the last one those that rounding leaves over."""
    quarters, tenths = np.zeros((4, 4), np.float32), np.zeros((1, 10), np.float32)
    np.testing.assert_array_equal(with_draws(Sampler(), 0.0, 0.25, 0.5, 0.75)(quarters), [0, 1, 2, 3])
    last = 1 - 2**-53
    assert sum([0.1] * 10) == last
    for sampler in (Sampler(), Sampler(top_p=1.0), Sampler(top_k=99)):
        np.testing.assert_array_equal(with_draws(sampler, last)(tenths), [9])


def test_rows_of_other_magnitudes_beside_one_another() -> None:
    """None overflows, or vanishes, beside the others."""
    rows = np.array([[0, 1, 2], [3000, 3001, 3002], [-3000, -2999, -2998]], np.float32)
    for sampler in (Sampler(), Sampler(top_p=1.0)):  # of the likeliest: 0.665, 0.910, 1
        np.testing.assert_array_equal(with_draws(sampler, 0.66, 0.7, 0.92)(rows), [2, 1, 0])


def test_a_tiny_temperature_still_draws() -> None:
    logits = np.array([[0, 1e-9], [0, 1e-9]], np.float32)
    np.testing.assert_array_equal(with_draws(Sampler(1e-9), 0.7, 0.8)(logits), [1, 0])  # 0.731 and 0.269


@pytest.mark.parametrize("options", [{}, {"top_p": 1.0}, {"temperature": 2.0}])
def test_probabilities_are_computed_in_float64(options: dict[str, float]) -> None:
    """The second token has 1.5e-8 of the probability, which float32 cannot take from 1."""
    logits = np.array([[0, -18]], np.float32) * np.float32(options.get("temperature", 1))
    np.testing.assert_array_equal(with_draws(Sampler(**options), 1 - 1e-8)(logits), [1])  # type: ignore[arg-type]


def test_the_last_value_in_range_is_taken() -> None:
    """Of every option; what lies beyond it is refused below."""
    logits = np.array([[1, 2, 3]], np.float32)
    for sampler in (Sampler(0, 1, 1.0, 0), Sampler(1e-9, 1, 1.0, 0), Sampler(top_p=1e-300)):
        np.testing.assert_array_equal(sampler(logits), [2])
    assert Sampler(1e300, top_k=3)(logits)[0] in (0, 1, 2)


def test_probability_of_a_token() -> None:
    logits = np.array([2, -1, 0.5, 2], np.float32)
    total = 2 * math.exp(2) + math.exp(-1) + math.exp(0.5)
    for token, logit in enumerate(logits):
        assert probability(logits, token) == pytest.approx(math.exp(logit) / total, rel=1e-14)
    assert probability(np.array([9000, 8980], np.float32), 1) == pytest.approx(
        math.exp(-20) / (1 + math.exp(-20)), 1e-12
    )
    assert probability(np.array([0, -18], np.float32), 0) == pytest.approx(1 - 1.523e-8, abs=1e-11)  # not float32's 1
