"""Continuations packed into batches and scored, by a model that tells what it was given. Nothing here needs lm_eval."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from data.cli import InputError
from data.evaluation.packing import IGNORED, lengths, losses_as_drawn, packed, score, windows_of
from data.ranks import Ranks

CONTEXT = 100


def log_p(before: Sequence[int], token: int) -> float:
    """A made-up model's, which depends on every token before and on their order."""
    seen = sum((i + 1) * t for i, t in enumerate(reversed(before)))
    return -((7 * seen + token) % 13 + 1) / 8


def is_greedy(token: int) -> bool:
    return token % 5 != 0


def losses(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `TokenLosses`, of that model. Where there is no target it says what nobody may read."""
    found = np.zeros(x.shape, np.float32)
    likeliest = np.zeros(x.shape, bool)
    for row, t in np.argwhere(y != IGNORED):
        found[row, t] = -log_p(x[row, : t + 1].tolist(), int(y[row, t]))
        likeliest[row, t] = is_greedy(int(y[row, t]))
    return found, likeliest


def requests_of(count: int, longest: int = 150) -> list[tuple[list[int], list[int]]]:
    """Of all lengths; some before have more tokens than the context, and none has the tokens of another."""
    random = np.random.default_rng(count)
    sizes = [(int(random.integers(1, longest)), int(random.integers(1, 12))) for _ in range(count)]
    tokens = iter(range(1, 10**6))
    return [([next(tokens) for _ in range(a)], [next(tokens) for _ in range(b)]) for a, b in sizes]


def expected(before: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Each token of the continuation after the newest tokens that fit with all of it."""
    tokens = [*before, *continuation][-(CONTEXT + 1) :]
    first = len(tokens) - len(continuation)
    value = sum(log_p(tokens[:i], tokens[i]) for i in range(first, len(tokens)))
    return value, all(map(is_greedy, continuation))


def test_windows() -> None:
    assert list(windows_of([1, 2, 3], [4, 5], 8)) == [([1, 2, 3, 4], [-100, -100, 4, 5])]
    assert list(windows_of([1, 2, 3], [4, 5], 3)) == [([2, 3, 4], [-100, 4, 5])]  # the beginning is left out
    assert list(windows_of([1, 2, 3], [4, 5], 2)) == [([3, 4], [4, 5])]
    long = list(windows_of([0], [1, 2, 3, 4, 5], 2))  # each token once, the last as those before fit
    assert long == [([0, 1], [1, 2]), ([2, 3], [3, 4]), ([3, 4], [-100, 5])]
    assert list(windows_of([1], [], 8)) == []


@pytest.mark.parametrize("count", [1, 60])
def test_scores(count: int) -> None:
    """Whatever the batches: in the order of the requests, of the continuations alone."""
    requests = requests_of(count)
    done: list[int] = []
    found = score(losses, requests, CONTEXT, 256, shown=done.extend)
    assert sorted(done) == list(range(count))
    for (value, greedy), request in zip(found, requests, strict=True):
        assert value == pytest.approx(expected(*request)[0], rel=1e-6)
        assert greedy == expected(*request)[1]
    assert {greedy for _, greedy in found} == {True, False} or count == 1


@pytest.mark.parametrize("context", [1, 32, CONTEXT])
def test_losses_of_what_was_drawn(context: int) -> None:
    """Each token after those that a generator saw: where a text outgrows the context, it goes on from the last half."""
    texts = requests_of(12, 240)
    texts[3:5] = [([5], [*range(300)]), ([5] * 40, [])]
    done: list[int] = []
    found = losses_as_drawn(losses, texts, context, 256, done.append)
    assert sum(done) == sum(len(new) for _, new in texts)
    for (row, new), of_text in zip(texts, found, strict=True):
        text, start, expected = [*row], 0, list[float]()
        for token in new:
            if len(text) - start > context:
                start = len(text) - max(1, context // 2)
            expected.append(-log_p(text[start:], token))
            text.append(token)
        assert of_text.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_no_score(value: float) -> None:
    def broken(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(y == 4, np.float32(value), 0), y > 0

    with pytest.raises(InputError, match="NaN or infinity: 1 of 2 log-probabilities"):
        score(broken, [([9], [1, 2]), ([9], [3, 4])], CONTEXT, 256)


def test_sums_are_not_rounded_to_float32() -> None:
    def tiny(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(y == IGNORED, 0, np.where(y == 1, 2.0**24, 1.0)).astype(np.float32), y > 0

    [(value, greedy)] = score(tiny, [([9], [1, 2, 3, 4])], CONTEXT, 256)
    assert (value, greedy) == (-(2.0**24) - 3, True)


def test_shapes_are_few_and_rows_padded() -> None:
    requests = requests_of(400, longest=90)
    windows = [(i, *window) for i, request in enumerate(requests) for window in windows_of(*request, CONTEXT)]
    batches = packed(windows, CONTEXT, 512)
    assert [x.shape for _, x, _ in batches] == sorted([x.shape for _, x, _ in batches], key=lambda shape: -shape[1])
    assert {x.shape for _, x, _ in batches} <= {(5, 100), (5, 96), (8, 64), (10, 48), (16, 32)}
    places = [place for places, _, _ in batches for place in places]
    assert sorted(places) == list(range(400))
    for own, x, y in batches:
        assert x.shape == y.shape
        assert (y[len(own) :] == IGNORED).all()
        for row, place in enumerate(own):
            before, continuation = requests[place]
            tokens = [*before, *continuation][-(CONTEXT + 1) :]
            assert x[row].tolist() == tokens[:-1] + [0] * (x.shape[1] - len(tokens) + 1)
            assert y[row][y[row] != IGNORED].tolist() == continuation
    padded = sum(x.size for _, x, _ in batches)
    assert padded < 1.5 * sum(len(inputs) for _, inputs, _ in windows)


@pytest.mark.parametrize(
    ("sizes", "tokens", "kept"),
    [
        ([5], 256, [32]),
        ([33], 256, [48]),
        ([99], 256, [100]),
        ([100] + [20] * 7, 256, [100]),  # seven would not fill a batch of 8
        ([100] + [20] * 8, 256, [32, 100]),
        ([20] * 3 + [40] * 3, 256, [48]),
        ([20] * 6 + [40] * 3 + [64] * 9, 256, [48, 64]),
    ],
)
def test_which_lengths(sizes: list[int], tokens: int, kept: list[int]) -> None:
    assert lengths(sizes, CONTEXT, tokens) == kept


def test_ranks_share_the_batches_out() -> None:
    """Each computes its own, and has all results."""
    requests, own = requests_of(40), list[list[Any]]()

    class Of(Ranks):
        def __init__(self, rank: int, gathered: list[Any] | None = None):
            self.rank, self.size, self.gathered = rank, 2, gathered

        def gather(self, value: Any) -> list[Any]:
            own.append(value)
            return self.gathered or [value, []]

    calls = list[int]()

    def counted(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        calls.append(len(x))
        return losses(x, y)

    for rank in (0, 1):
        score(counted, requests, CONTEXT, 256, Of(rank))
    whole = score(losses, requests, CONTEXT, 256)
    assert len(calls) == len(
        packed([(i, *w) for i, r in enumerate(requests) for w in windows_of(*r, CONTEXT)], CONTEXT, 256)
    )
    assert score(losses, requests, CONTEXT, 256, Of(0, own[:2])) == whole
    assert all(math.isfinite(value) for value, _ in whole)
