"""Generation token by token: what a generator needs of a model, and the decoder that any backend can give."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
from tinygrad import Tensor, TinyJit

from data.text.sampling import Sampler, probability
from tinygrad_impl.model import GPT2, KVCache

if TYPE_CHECKING:
    from tinygrad_impl.backend import Backend


class Decoder(Protocol):
    """A model with the keys and values of N rows of tokens."""

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Adds tokens (N, T), at most a chunk, to the cache, after the `lengths` (N,) that each row has there."""

    def draw(
        self, tokens: np.ndarray, lengths: np.ndarray, most: int, sampler: Sampler
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What comes after tokens (N,), the next of each row after the `lengths` in the cache: the tokens drawn, and
        their probabilities, (N,) each, for one step or more, at most so many.
        """
        ...


def padded(tokens: np.ndarray, chunk: int) -> np.ndarray:
    """Tokens (N, T) -> (N, chunk), for graphs of one shape: what is right of a position does not reach it."""
    return np.pad(tokens, ((0, 0), (0, chunk - tokens.shape[1])))


class CachedModel:
    """The decoder that computes with the model itself: its KV cache of N rows, and two compiled graphs that work on it,
    for texts of any length.
    """

    def __init__(self, model: GPT2, backend: "Backend", N: int, chunk: int, V: int):
        self.model, self.backend, self.cache, self.chunk, self.V = model, backend, KVCache(model, N), chunk, V
        self.prefill, self.decode = TinyJit(self._prefill), TinyJit(self._decode)

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self.prefill(Tensor(padded(tokens, self.chunk)).realize(), Tensor(lengths).realize())

    def draw(
        self, tokens: np.ndarray, lengths: np.ndarray, most: int, sampler: Sampler
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        logits = self.decode(Tensor(tokens[:, None]).realize(), Tensor(lengths).realize()).numpy()
        drawn = sampler(logits)
        yield drawn, np.array([probability(*row) for row in zip(logits, drawn, strict=True)])

    def _prefill(self, tokens: Tensor, lengths: Tensor) -> None:
        self.cache.lengths = lengths
        self.model.hidden(tokens, self.cache)
        self._realize()

    def _decode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (N, 1) -> logits (N, V)."""
        self.cache.lengths = lengths
        [logits] = self._realize(self.model.head(self.model.hidden(tokens, self.cache))[:, 0, : self.V].float())
        return logits

    def _realize(self, *outs: Tensor) -> list[Tensor]:
        """Computes the outs, and what the graphs up to them write to the cache."""
        written = [*self.cache.keys, *self.cache.values]
        lowered = self.backend.lower(*outs, *written)
        for kept, new in zip(written, lowered[len(outs) :], strict=True):
            kept.replace(new)
        Tensor.realize(*lowered[: len(outs)], *written)
        return lowered[: len(outs)]
