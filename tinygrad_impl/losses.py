"""The loss of each token of a text: validation, perplexity, evaluation and the shades of words are made of it."""

from collections.abc import Iterable

import numpy as np
from tinygrad import Tensor, TinyJit
from tinygrad.device import Buffer

from data.evaluation.losses import Batch, loss_sums
from tinygrad_impl import functional as F
from tinygrad_impl.backend import Backend, Plain
from tinygrad_impl.internals import captured_at_once
from tinygrad_impl.model import GPT2


class Evaluator:
    """Measures a model's losses on a backend, with a compiled graph for each shape of a batch. They share an arena, or
    that of others which never run at the same time.
    """

    def __init__(self, model: GPT2, backend: Backend | None = None, arena: list[Buffer] | None = None):
        self.model, self.backend = model, backend or Plain()
        self.arena: list[Buffer] = [] if arena is None else arena
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
        graph = self.graphs.setdefault(x.shape, captured_at_once(self._graph, self.arena))
        losses, likeliest = graph(Tensor(x).realize(), Tensor(y).realize())
        return losses.numpy().copy(), likeliest.numpy().copy()  # the next call writes to their memory

    def _graph(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        losses, likeliest = self.backend.lower(*self.model.losses(x, y), loss_of=self.model.config)
        Tensor.realize(losses, likeliest)
        return losses, likeliest


class NextLosses:
    """The losses of tokens that may come next, where a step of generation has given logits."""

    def __init__(self) -> None:
        self.graphs: dict[tuple[int, int], TinyJit] = {}  # by how many tokens there are, and how many are asked for

    def __call__(self, logits: np.ndarray, tokens: list[int]) -> list[float]:
        """logits (V,), n tokens -> -log softmax(logits)[token] of each, in nats."""
        graph = self.graphs.setdefault((len(logits), len(tokens)), TinyJit(self._graph))
        given = Tensor(logits[None, None].astype(np.float32)), Tensor(np.array([tokens], np.int32))
        found: list[float] = graph(*(tensor.realize() for tensor in given)).numpy()[0].tolist()
        return found

    def _graph(self, logits: Tensor, tokens: Tensor) -> Tensor:
        each = logits.expand(1, tokens.shape[1], logits.shape[2])  # (1, n, V)
        [losses] = Plain().lower(F.cross_entropy(each, tokens, ignore_index=-100, reduction="none"))
        return losses.realize()
