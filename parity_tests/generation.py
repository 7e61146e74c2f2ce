"""The same prompts continued by the port, by the truth and by torch: what each computes on the way, and what is drawn.

The port writes first, as its users see it. Then all are told to draw these tokens, so that their logits can be compared
step by step, and the host's sampler draws from them with the same random numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import torch_ref.model
from data.checkpoints.config import GPT2Config
from data.text.sampling import Sampler, probability
from data.text.tokenizer import EOT
from tinygrad_impl.generate import Generator
from torch_ref.generate import generate

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_k": 40, "top_p": 0.95},
}
GENERATED = 40  # tokens of each row: more than the kernels draw before the host looks at them
CHANCE = 5.0  # a single logit may be as many times as far off as all are on average

Rows = list[list[int]]


def prompts_for(config: GPT2Config, seed: int) -> Rows:
    """Rows of different lengths: one token, half a context, up to the context's last position, and beyond it."""
    random, P = np.random.default_rng(seed), config.n_positions
    lengths = 1, max(1, P // 2), max(1, P - 2), P + 3
    return [random.integers(0, config.vocab_size, length).tolist() for length in lengths]


class Told(Sampler):
    """Draws the tokens (steps, N) that it is told to, and keeps the logits (N, V) that it is given for each step."""

    def __init__(self, tokens: np.ndarray):
        self.tokens, self.logits = tokens, list[np.ndarray]()

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        self.logits.append(logits.astype(np.float64))
        return self.tokens[len(self.logits) - 1]


@dataclass
class Written:
    """What the port wrote. A row that ends before its last step has drawn `EOT` there."""

    tokens: np.ndarray  # (steps, N), drawn; EOT from where a row has ended
    probabilities: np.ndarray  # (steps, N), as the port tells them; NaN where it tells none
    counted: np.ndarray  # bool (steps, N): the draws, up to and with the first EOT
    lengths: np.ndarray  # (steps, N): tokens of the row before the draw


def written(generator: Generator, prompts: Rows, steps: int, sampler: Sampler) -> Written:
    """By the port, with the host's own sampler, so that whatever draws for its users draws here."""
    taken = list(generator.stream(prompts, steps, sampler))
    tokens, probabilities = np.full((steps, len(prompts)), EOT), np.full((steps, len(prompts)), math.nan)
    for s, step in enumerate(taken):
        for i, drawn in enumerate(step):
            if drawn:
                tokens[s, i], probabilities[s, i] = drawn
    before = np.cumsum(~np.isnan(probabilities), axis=0) - ~np.isnan(probabilities)  # tokens drawn before each step
    counted = before == np.arange(steps)[:, None]
    return Written(tokens, probabilities, counted, before + [len(prompt) for prompt in prompts])


def logits_of_port(generator: Generator, prompts: Rows, tokens: np.ndarray) -> list[np.ndarray]:
    """(N, V) of each step, with these tokens drawn."""
    told = Told(tokens)
    generator(prompts, len(tokens), told)
    return told.logits


def logits_of_torch(
    model: torch_ref.model.GPT2, autocast: torch.dtype | None, prompts: Rows, tokens: np.ndarray, V: int
) -> list[np.ndarray]:
    """The same of the reference, in float64 as the head gives them: rounded to nothing less."""
    head, logits = model.head, list[np.ndarray]()

    def kept(x: torch.Tensor) -> torch.Tensor:
        given = head(x)
        logits.append(given[:, :V].double().cpu().numpy())
        return given

    model.head = kept  # type: ignore[method-assign]
    try:
        with torch.autocast(model.wte.weight.device.type, autocast, enabled=autocast is not None):
            generate(model, prompts, len(tokens), Told(np.clip(tokens, 0, V - 1)), cached=True)
    finally:
        model.head = head  # type: ignore[method-assign]
    return logits


def draws(logits: Sequence[np.ndarray], settings: Mapping[str, Any], seed: int) -> np.ndarray:
    """What the host's sampler draws from the logits, step by step: (steps, N)."""
    sampler = Sampler(**settings, seed=seed)
    return np.array([sampler(given) for given in logits])


def numbers(seed: int, steps: int, N: int) -> np.ndarray:
    """The random numbers that it draws them with: (steps, N)."""
    return np.random.Generator(np.random.PCG64(seed)).random((steps, N))


def probabilities(logits: Sequence[np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Of the tokens drawn: (steps, N)."""
    pairs = zip(logits, tokens, strict=True)
    return np.array([[probability(*row) for row in zip(given, drawn, strict=True)] for given, drawn in pairs])


def could_draw(logits: np.ndarray, token: int, number: float, settings: Mapping[str, Any], off: float) -> bool:
    """Whether the sampler could draw the token with this random number from logits (V,) of which none is further than
    `off` from these: whether its draw from these is as near to a border.
    """
    temperature, top_k, top_p = settings["temperature"], settings.get("top_k"), settings.get("top_p")
    if temperature == 0:
        return bool(logits[token] + off >= logits.max() - off)
    before, up_to = logits > logits[token] + 2 * off, logits >= logits[token] - 2 * off  # surely; perhaps
    if top_k is not None and before.sum() >= top_k:
        return False
    spread = math.exp(min(2 * off / temperature, 100.0))  # as many times less or more may a share of probability be

    def least(share: Any) -> Any:
        return np.maximum(share / spread, 1 - (1 - share) * spread)

    def most(share: Any) -> Any:
        return np.minimum(share * spread, 1 - (1 - share) / spread)

    odds = np.exp((logits - logits.max()) / temperature)
    kept = np.sort(odds)[::-1][:top_k]
    shares = np.cumsum(kept / kept.sum())
    first, last = least(odds[before].sum() / kept.sum()), most(min(1.0, odds[up_to].sum() / kept.sum()))
    lowest = highest = 1.0  # the share that is drawn from
    if top_p is not None:
        if first >= top_p:
            return False
        lowest = next((least(share) for share in shares if most(share) >= top_p), 1.0)
        highest = next((most(share) for share in shares if least(share) >= top_p), 1.0)
    return bool(number * highest >= first and number * lowest <= last)
