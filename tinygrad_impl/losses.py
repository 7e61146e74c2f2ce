"""The loss of each token of a text: validation, perplexity and evaluation are made of it."""

from collections.abc import Iterable

import numpy as np
from tinygrad import Tensor, TinyJit

from data.evaluation.losses import Batch, loss_sums
from tinygrad_impl.backend import Backend, Plain
from tinygrad_impl.model import GPT2


class Evaluator:
    """Measures a model's losses on a backend, with a compiled graph for each shape of a batch."""

    def __init__(self, model: GPT2, backend: Backend | None = None):
        self.model, self.backend = model, backend or Plain()
        self.graphs: dict[tuple[int, ...], TinyJit] = {}  # by shape

    def __call__(self, batches: Iterable[Batch]) -> float:
        """The mean loss a token in nats, over batches (x, y) of `loader.windows`; its exp is the perplexity."""
        total, tokens = self.sums(batches)
        return total / tokens

    def sums(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """The sum of the losses, in nats, and of how many tokens it is."""
        return loss_sums(self.of_tokens, batches)

    def of_tokens(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `data.evaluation.losses.TokenLosses`: the loss of each target, and whether it is the likeliest token."""
        graph = self.graphs.setdefault(x.shape, TinyJit(self._graph))
        losses, likeliest = graph(Tensor(x).realize(), Tensor(y).realize())
        return losses.numpy().copy(), likeliest.numpy().copy()  # the next call writes to their memory

    def _graph(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        losses, likeliest = self.backend.lower(*self.model.losses(x, y), loss_of=self.model.config)
        Tensor.realize(losses, likeliest)
        return losses, likeliest
