"""Texts to score, packed into batches of few shapes, and the log-probabilities of continuations."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from data.cli import InputError
from data.evaluation.losses import TokenLosses
from data.ranks import ALONE, Ranks

Request = tuple[Sequence[int], Sequence[int]]  # the tokens before, of which there is one at least, and the scored ones
Window = tuple[int, list[int], list[int]]  # of which request; inputs and targets (T,), of which -100 are not scored

IGNORED = -100
SHORTEST = 32  # tokens in a window of a batch, at least


def windows_of(
    before: Sequence[int], continuation: Sequence[int], context: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and targets that score each token of the continuation once, each after as many tokens as fit.

    There is one window, unless the continuation has more tokens than the context. What is too long loses its beginning.
    """
    for start in range(0, len(continuation), context):
        scored = list(continuation[start : start + context])
        tokens = [*before, *continuation[:start], *scored][-(context + 1) :]
        inputs, targets = tokens[:-1], tokens[1:]
        yield inputs, [IGNORED] * (len(targets) - len(scored)) + scored


def windows_as_drawn(row: Sequence[int], new: Sequence[int], context: int) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and targets that score each of the `new` tokens once, each after those that a generator drew it after: the
    whole text, or where that has outgrown the context, what is left of it (see `torch_ref.generate.generate`).
    """
    tokens, start, scored = [*row, *new], 0, len(row)
    while scored < len(tokens):
        if scored - start > context:
            start = scored - max(1, context // 2)
        end = min(start + context + 1, len(tokens))
        yield tokens[start : end - 1], [IGNORED] * (scored - start - 1) + tokens[scored:end]
        scored = end


def lengths(sizes: Sequence[int], context: int, tokens: int) -> list[int]:
    """The lengths of windows, ascending, to pad windows of these sizes to: 32, 48, 64, 96, 128, ... and the context.

    Each shape of a batch takes a graph that has to be compiled. So a length whose windows would not fill one batch of
    so many tokens is left out, and they go to the next.
    """
    steps, length = [], SHORTEST
    while length < context:
        steps += [length, length * 3 // 2]
        length *= 2
    steps = [length for length in steps if length < context] + [context]
    counts = Counter(next(length for length in steps if size <= length) for size in sizes)
    kept, waiting = list[int](), 0
    for length in sorted(counts):
        waiting += counts[length]
        if waiting >= rows_of(length, tokens) or length == max(counts):
            kept, waiting = [*kept, length], 0
    return kept


def rows_of(length: int, tokens: int) -> int:
    """Of a batch of about so many tokens."""
    return max(1, tokens // length)


def packed(windows: Sequence[Window], context: int, tokens: int) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batches: which requests the rows are of, inputs and targets int32 (B, T). The longest come first, so that memory
    runs out at once or never. What is right of a window's tokens, and below the last, is padding.
    """
    ordered = sorted(windows, key=lambda window: -len(window[1]))
    found = []
    steps = lengths([len(inputs) for _, inputs, _ in ordered], context, tokens)
    while ordered:
        length = next(step for step in steps if len(ordered[0][1]) <= step)
        shorter = max((step for step in steps if step < length), default=0)
        rows = [window for window in ordered[: rows_of(length, tokens)] if len(window[1]) > shorter]
        x = np.zeros((rows_of(length, tokens), length), np.int32)
        y = np.full_like(x, IGNORED)
        for i, (_, inputs, targets) in enumerate(rows):
            x[i, : len(inputs)], y[i, : len(targets)] = inputs, targets
        found.append(([request for request, _, _ in rows], x, y))
        ordered = ordered[len(rows) :]
    return found


def score(
    losses: TokenLosses,
    requests: Sequence[Request],
    context: int,
    tokens: int,
    ranks: Ranks = ALONE,
    shown: Callable[[list[int]], object] = len,
) -> list[tuple[float, bool]]:
    """Of each continuation log p in nats, given what is before it, and whether greedy decoding would give it.

    `tokens` are those of a batch. Several ranks share the batches out, and have all results. `shown` is called with the
    requests of each batch that this rank has done. Raises `InputError` for a log p that is no number.
    """
    windows = [(i, *window) for i, request in enumerate(requests) for window in windows_of(*request, context)]
    own: list[tuple[int, float, bool]] = []
    for places, x, y in packed(windows, context, tokens)[ranks.rank :: ranks.size]:
        found, likeliest = losses(x, y)
        sums, greedy = found.sum(1, dtype=np.float64), (likeliest | (y == IGNORED)).all(1)
        own += [(place, -float(sums[i]), bool(greedy[i])) for i, place in enumerate(places)]
        shown(places)
    total, all_greedy = [0.0] * len(requests), [True] * len(requests)
    for place, value, is_greedy in sorted(row for rows in ranks.gather(own) for row in rows):
        total[place] += value
        all_greedy[place] = all_greedy[place] and is_greedy
    if broken := sum(not math.isfinite(value) for value in total):
        raise InputError(
            f"NaN or infinity: {broken} of {len(total)} log-probabilities, so there is no score; the weights are "
            "damaged, or too large for bfloat16: give others, or --dtype float32"
        )
    return list(zip(total, all_greedy, strict=True))


def losses_as_drawn(
    losses: TokenLosses,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    context: int,
    tokens: int,
    shown: Callable[[int], object] = bool,
) -> list[np.ndarray]:
    """Of each text, a row of tokens and the new ones that a model drew after it, the losses of the new ones in nats,
    float32, to the model whose `losses` these are. `tokens` are those of a batch; `shown` is called with the number of
    the new ones in each batch that is done.
    """
    each = [list(windows_as_drawn(*text, context)) for text in texts]
    windows = [(i, *window) for i, window in enumerate(window for own in each for window in own)]
    parts = [np.empty(0, np.float32)] * len(windows)
    for places, x, y in packed(windows, context, tokens):
        found, _ = losses(x, y)
        for i, place in enumerate(places):
            parts[place] = found[i][y[i] != IGNORED]
        shown(int((y != IGNORED).sum()))
    in_order = iter(parts)
    return [np.concatenate([np.empty(0, np.float32), *islice(in_order, len(own))]) for own in each]
