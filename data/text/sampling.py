"""The one definition of how a next token is drawn: from equal logits both implementations draw equal tokens."""

from typing import Any

import numpy as np

from data.cli import InputError

# How texts are written unless told otherwise: the samples of training, by `generate` and by `compare`
SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_k": 40, "top_p": None, "seed": 1337, "max_new_tokens": 160}
COLDEST = 1e-9  # the lowest temperature above 0: far below it logits / temperature are too large for a float


class Sampler:
    """Draws tokens: greedily at temperature 0, otherwise from softmax(logits / temperature).

    `top_k` keeps the k likeliest tokens (Fan et al. 2018); `top_p` then the fewest that reach probability p (Holtzman
    et al. 2020). All is computed in float64 from one stream of random numbers, PCG64 from `seed`: one number a row a
    call, used or not, so that no row depends on what another draws. Raises `InputError` on a value out of range.
    """

    def __init__(self, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0):
        if temperature != 0 and not COLDEST <= temperature < float("inf"):
            raise InputError(f"temperature is {temperature}; give 0 (greedy), or a number of at least {COLDEST}")
        if top_k is not None and top_k < 1:
            raise InputError(f"top-k is {top_k}; give a whole number of at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise InputError(f"top-p is {top_p}; give a number above 0 and at most 1")
        if seed < 0:
            raise InputError(f"seed is {seed}; give a whole number of at least 0")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.random = np.random.Generator(np.random.PCG64(seed))

    @property
    def follows_settings(self) -> bool:
        """Whether its settings say all of how it draws, so that a GPU can do it too. A subclass may draw otherwise."""
        return type(self).__call__ is Sampler.__call__

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """logits (N, V) -> the tokens drawn, int64 (N,)."""
        draws = self.random.random(len(logits))
        if self.temperature == 0:
            return logits.argmax(-1)
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, axis=-1, kind="stable")[:, : self.top_k]  # (N, k), the likeliest first
        scaled = np.take_along_axis(scaled, order, -1)
        probabilities = np.exp(scaled - scaled[:, :1])
        cumulative = np.cumsum(probabilities / probabilities.sum(-1, keepdims=True), axis=-1)  # (N, k), ends in 1
        if self.top_p is not None:  # the last token kept is the one that reaches p
            kept = (cumulative < self.top_p).sum(-1, keepdims=True)
            reached = np.take_along_axis(cumulative, np.minimum(kept, cumulative.shape[-1] - 1), -1)
            draws = draws * reached[:, 0]
        chosen = np.minimum((cumulative <= draws[:, None]).sum(-1), cumulative.shape[-1] - 1)
        return np.take_along_axis(order, chosen[:, None], -1)[:, 0]


def probability(logits: np.ndarray, token: int) -> float:
    """softmax(logits)[token], computed in float64. Generators have it of each token that they draw: it is NaN where a
    model computes NaN, and the check of generation compares it. What users are shown (scores, perplexity, shading)
    comes from the model's per-token losses instead.
    """
    odds = np.exp(logits.astype(np.float64) - logits.max())
    return float(odds[token] / odds.sum())
