"""The models write: a stream of events for each request.

    start   models: for each the tokens of the prompt, and a note where its text outgrows the context
    piece   of a model: text, its probability p, and its tokens, each with p and the likeliest in its place
    end     of a model: why ("end of text" or "length"), and the tokens that no piece has: the end of text, and bytes
            of a character that the text ends in the middle of
    done

A text is that of `generate` with the same settings: one row, and a sampler from the seed for each model. The sampler
looks at every step's logits, so that no decoder draws more than one token at a time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.text.sampling import Sampler
from data.text.tokenizer import Tokenizer
from tinygrad_impl.generate import Drawn, Generator, encode, outgrown, pieces
from tinygrad_impl.live.settings import Asked
from tinygrad_impl.live.turns import Event, Events
from tinygrad_impl.losses import NextLosses

LIKELIEST = 5  # tokens that are shown beside the one drawn


@dataclass(frozen=True)
class Model:
    """A model that writes. `facts` are what the page says of it."""

    tokenizer: Tokenizer
    generator: Generator
    facts: dict[str, Any]
    losses: NextLosses = field(default_factory=NextLosses)


@dataclass(frozen=True)
class Step:
    """A token that was drawn, and the likeliest ones in its place, each with the model's own probability, which is
    exp(-loss): without temperature, top-k and top-p.
    """

    drawn: Drawn
    likeliest: list[Drawn]


class Watching(Sampler):
    """Draws as `Sampler` does, for one row, and keeps every step until it is taken."""

    def __init__(self, losses: NextLosses, **settings: Any):
        super().__init__(**settings)
        self._losses = losses
        self._steps: list[Step] = []

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        drawn = super().__call__(logits)
        [row], [token] = logits, drawn.tolist()
        some = np.argpartition(-row, min(LIKELIEST, len(row)) - 1)[:LIKELIEST].tolist()
        some.sort(key=lambda other: (-row[other], other))
        tokens = [token, *some]
        first, *others = zip(tokens, np.exp(-np.array(self._losses(row, tokens))).tolist(), strict=True)
        self._steps.append(Step(first, others))
        return drawn

    @property
    def newest(self) -> Drawn:
        """The token drawn last."""
        return self._steps[-1].drawn

    def take(self) -> list[Step]:
        """The steps since the last call."""
        steps, self._steps = self._steps, []
        return steps


def write(models: Sequence[Model], asked: Asked) -> Events:
    """The events of a request. The models take turns, a piece each."""
    rows = [encode(model.tokenizer, asked.prompt, asked.special_tokens) for model in models]
    yield {"event": "start", "models": [beginning(*pair, asked) for pair in zip(models, rows, strict=True)]}
    texts = {i: continuation(model, row, asked) for i, (model, row) in enumerate(zip(models, rows, strict=True))}
    while texts:
        for i, text in list(texts.items()):
            if event := next(text, None):
                yield {"model": i} | event
            else:
                del texts[i]
    yield {"event": "done"}


def beginning(model: Model, row: list[int], asked: Asked) -> dict[str, Any]:
    return {"tokens": len(row), "note": outgrown(model.generator.model.config, len(row) + asked.max_new_tokens)}


def continuation(model: Model, row: list[int], asked: Asked) -> Iterator[Event]:
    """The pieces of what one model writes after the tokens `row`, and its end."""
    sampler, tokenizer = Watching(model.losses, **asked.sampling()), model.tokenizer
    count, over = 0, False

    def drawn() -> Iterator[Drawn]:
        nonlocal count, over
        for [token] in model.generator.stream([row], asked.max_new_tokens, sampler):
            if token:
                count += 1
                yield sampler.newest
        over = True

    for text, p in pieces(tokenizer, row, drawn()):
        if over:  # what is left are bytes that wait for the rest of their character
            text = text.rstrip("\ufffd")
        if text:
            yield {"event": "piece", "text": text, "p": finite(p), "tokens": shown(sampler.take(), tokenizer)}
    why = "length" if count == asked.max_new_tokens else "end of text"
    yield {"event": "end", "why": why, "tokens": shown(sampler.take(), tokenizer)}


def shown(steps: list[Step], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Steps as the page shows them."""

    def one(token: int, p: float) -> dict[str, Any]:
        return {"token": token, "text": spelled(token, tokenizer), "p": finite(p)}

    return [one(*step.drawn) | {"likeliest": [one(*drawn) for drawn in step.likeliest]} for step in steps]


def spelled(token: int, tokenizer: Tokenizer) -> str:
    """A token by itself: its text, or its bytes where they are a part of a character."""
    if token == tokenizer.eot:
        return "(end of text)"
    found = tokenizer.token_bytes(token)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return f"(bytes {found.hex(' ').upper()})"


def finite(p: float) -> float | None:
    """JSON has no number for what broken weights give."""
    return p if math.isfinite(p) else None
