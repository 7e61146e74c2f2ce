"""The losses of tokens, added up: validation and perplexity are made of them, whichever implementation computes."""

import math
from collections.abc import Callable, Iterable

import numpy as np

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, integers (B, T); a target of -100 is not scored
# of inputs and targets: the loss of each target in nats, float32 (B, T), 0 where it is -100; and whether it is the
# token that the model finds likeliest, bool (B, T)
TokenLosses = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinity where float64 has no such number, or only just."""
    return math.exp(loss) if loss < 700 else math.inf


def loss_sums(losses: TokenLosses, batches: Iterable[Batch]) -> tuple[float, int]:
    """The sum of the losses in nats of all targets in batches (x, y) of `loader.windows`, and how many there are. Their
    quotient is the mean loss a token; its exp is the perplexity.
    """
    total, tokens = 0.0, 0
    for x, y in batches:
        found, _ = losses(x, y)
        total += float(found.sum(dtype=np.float64))
        tokens += int((y >= 0).sum())
    return total, tokens
