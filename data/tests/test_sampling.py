import numpy as np
import pytest

from data.cli import InputError
from data.sampling import Sampler

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
