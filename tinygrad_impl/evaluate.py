"""The loss of a model over a stretch of text."""

from collections.abc import Iterable

import numpy as np
from tinygrad import Tensor, TinyJit

from tinygrad_impl.backend import Backend, Plain
from tinygrad_impl.model import GPT2


class Evaluator:
    """Measures a model's loss on a backend, with one compiled graph for all batches of one shape."""

    def __init__(self, model: GPT2, backend: Backend | None = None):
        self.model, self.backend = model, backend or Plain()
        self._loss = TinyJit(self.loss)

    def __call__(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
        """The mean loss a token in nats, over batches (x, y) of `loader.windows`; its exp is the perplexity."""
        total, tokens = self.sums(batches)
        return total / tokens

    def sums(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, int]:
        """The sum of the losses, in nats, and of how many tokens it is."""
        total, tokens = 0.0, 0
        for x, y in batches:
            count = int((y >= 0).sum())
            total += self._loss(Tensor(x).realize(), Tensor(y).realize()).item() * count
            tokens += count
        return total, tokens

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        _, loss = self.model(x, y)
        assert loss is not None
        [loss] = self.backend.lower(loss, loss_of=self.model.config)
        return loss.realize()
