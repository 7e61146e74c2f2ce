"""The check of generation: the logits of every step, the probabilities of the tokens, and the tokens that are drawn.

The port continues the prompts first, as for its users. Then the port, the float64 reference and PyTorch in the port's
dtype are all made to draw these tokens, so that their logits can be compared step by step. From these logits the
sampler on the host draws, with the random numbers that the port drew with.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import torch_ref.model
from data.checkpoints.config import GPT2Config
from data.text.sampling import Sampler, probability
from data.text.tokenizer import EOT, VOCAB_SIZE
from parity_tests.bounds import Comparison, Row
from parity_tests.setting import Setting, nudged
from tinygrad_impl.generate import Generator
from torch_ref.generate import generate

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_k": 40, "top_p": 0.95},
}
GENERATED = 40  # tokens of each row: more than the kernels draw before the host looks at them
SPREAD = 5.0  # a single logit may be this many times as far off as the RMS over all of them
TIES = 0.5  # at most this share of the draws may be ties: more would prove nothing

Rows = list[list[int]]


def prompts_for(config: GPT2Config, seed: int) -> Rows:
    """Rows of different lengths: one token, half a context, up to the context's last position, and beyond it."""
    random, P = np.random.default_rng(seed), config.context
    lengths = 1, max(1, P // 2), max(1, P - 2), P + 3
    return [random.integers(0, config.vocab_size, length).tolist() for length in lengths]


class Forced(Sampler):
    """Draws given tokens (steps, N) whatever the logits are, and keeps the logits (N, V) of each step, in float64."""

    def __init__(self, tokens: np.ndarray):
        self.tokens, self.logits = tokens, list[np.ndarray]()

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        self.logits.append(logits.astype(np.float64))
        return self.tokens[len(self.logits) - 1]


@dataclass
class Continuations:
    """What the port wrote. A row that ends before its last step has drawn `EOT` there."""

    tokens: np.ndarray  # int (steps, N), drawn; EOT from where a row has ended
    probabilities: np.ndarray  # float (steps, N), as the port reports them; NaN where it reports none
    counted: np.ndarray  # bool (steps, N): the draws, up to and with the first EOT
    lengths: np.ndarray  # int (steps, N): tokens of the row before the draw


def continuations_of_port(generator: Generator, prompts: Rows, steps: int, sampler: Sampler) -> Continuations:
    """The port's, with the sampler that its users have: where a device draws for them, it draws here."""
    taken = list(generator.stream(prompts, steps, sampler))
    tokens, probabilities = np.full((steps, len(prompts)), EOT), np.full((steps, len(prompts)), math.nan)
    for s, step in enumerate(taken):
        for i, drawn in enumerate(step):
            if drawn:
                tokens[s, i], probabilities[s, i] = drawn
    before = np.cumsum(~np.isnan(probabilities), axis=0) - ~np.isnan(probabilities)  # tokens drawn before each step
    counted = before == np.arange(steps)[:, None]
    return Continuations(tokens, probabilities, counted, before + [len(prompt) for prompt in prompts])


def logits_of_port(generator: Generator, prompts: Rows, tokens: np.ndarray) -> list[np.ndarray]:
    """The port's logits (N, V) of each step, in float64, where these tokens (steps, N) are drawn."""
    forced = Forced(tokens)
    generator(prompts, len(tokens), forced)
    return forced.logits


def logits_of_torch(
    model: torch_ref.model.GPT2, autocast: torch.dtype | None, prompts: Rows, tokens: np.ndarray, V: int
) -> list[np.ndarray]:
    """The same of torch_ref's model, as its head gives them: `generate` would round them to float32."""
    head, logits = model.head, list[np.ndarray]()

    def kept(x: torch.Tensor) -> torch.Tensor:
        given = head(x)
        logits.append(given[:, :V].double().cpu().numpy())
        return given

    model.head = kept  # type: ignore[method-assign]
    try:
        with torch.autocast(model.wte.weight.device.type, autocast, enabled=autocast is not None):
            generate(model, prompts, len(tokens), Forced(np.clip(tokens, 0, V - 1)), cached=True)
    finally:
        model.head = head  # type: ignore[method-assign]
    return logits


def draws(logits: Sequence[np.ndarray], settings: Mapping[str, Any], seed: int) -> np.ndarray:
    """What the host's sampler draws from the logits, step by step: (steps, N)."""
    sampler = Sampler(**settings, seed=seed)
    return np.array([sampler(given) for given in logits])


def uniform_numbers(seed: int, steps: int, N: int) -> np.ndarray:
    """The random numbers that the sampler of this seed draws with: (steps, N)."""
    return np.random.Generator(np.random.PCG64(seed)).random((steps, N))


def probabilities(logits: Sequence[np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Of the tokens drawn: (steps, N)."""
    pairs = zip(logits, tokens, strict=True)
    return np.array([[probability(*row) for row in zip(given, drawn, strict=True)] for given, drawn in pairs])


def could_draw(logits: np.ndarray, token: int, number: float, settings: Mapping[str, Any], off: float) -> bool:
    """Whether there are logits, none further than `off` from these (V,), from which the sampler draws the token with
    this random number.
    """
    temperature, top_k, top_p = settings["temperature"], settings.get("top_k"), settings.get("top_p")
    if temperature == 0:
        return bool(logits[token] + off >= logits.max() - off)
    # the tokens that are surely more probable than this one, and those that may be, with this one
    before, up_to = logits > logits[token] + 2 * off, logits >= logits[token] - 2 * off
    if top_k is not None and before.sum() >= top_k:
        return False
    spread = math.exp(min(2 * off / temperature, 100.0))  # the factor by which odds may be less or more

    def least(share: Any) -> Any:
        return np.maximum(share / spread, 1 - (1 - share) * spread)

    def most(share: Any) -> Any:
        return np.minimum(share * spread, 1 - (1 - share) / spread)

    odds = np.exp((logits - logits.max()) / temperature)
    kept = np.sort(odds)[::-1][:top_k]
    shares = np.cumsum(kept / kept.sum())
    first, last = least(odds[before].sum() / kept.sum()), most(min(1.0, odds[up_to].sum() / kept.sum()))
    lowest = highest = 1.0  # bounds of the share of probability that top_p leaves
    if top_p is not None:
        if first >= top_p:
            return False
        lowest = next((least(share) for share in shares if most(share) >= top_p), 1.0)
        highest = next((most(share) for share in shares if least(share) >= top_p), 1.0)
    return bool(number * highest >= first and number * lowest <= last)


@dataclass
class Draw:
    """A token that the port drew."""

    part: str  # the name of the row that has its logits
    where: str  # for people
    token: int
    as_reference: bool  # is it the one that the host's sampler draws from the float64 reference's logits?
    as_port: bool  # and from the port's?
    logits: np.ndarray  # the reference's, (V,)
    number: float  # the random number that it is drawn with


def generation_rows(setting: Setting, seeds: Sequence[int], steps: int, nudges: int = 0) -> Iterator[list[Row]]:
    """For each way of `SAMPLING`, over `steps` tokens after each seed's prompts: the logits of every step, inside and
    beyond the context, and the probabilities of the tokens, all with the port's tokens drawn; and these tokens.
    """
    config, V = setting.config, min(VOCAB_SIZE, setting.config.vocab_size)
    generator = Generator(setting.model(), setting.backend, V, EOT)
    weights = [nudged(setting.arrays, seed) for seed in range(nudges)] or [setting.arrays]
    for how, settings in SAMPLING.items():
        comparison, drawn = Comparison("generation", setting.dtype, nudged=nudges > 0), list[Draw]()
        for seed in seeds:
            prompts = prompts_for(config, seed)
            text = continuations_of_port(generator, prompts, steps, Sampler(**settings, seed=seed))
            forced = np.clip(text.tokens, 0, V - 1)

            def by_torch(arrays: Mapping[str, np.ndarray], autocast: torch.dtype | None) -> list[np.ndarray]:
                model = torch_ref.model.GPT2(config, arrays).to(setting.torch_device)
                return logits_of_torch(model, autocast, prompts, forced, V)  # noqa: B023

            reference, port = by_torch(setting.exact, None), logits_of_port(generator, prompts, forced)
            if setting.dtype == "float64":  # samplers get float32: PyTorch's own error is that rounding
                own = [[logits.astype(np.float32).astype(np.float64) for logits in reference]]
            else:
                own = [by_torch(arrays, setting.torch_autocast) for arrays in weights]
            parts = {
                f"{how}.inside": text.counted & (text.lengths <= config.context),
                f"{how}.beyond": text.counted & (text.lengths > config.context),
            }
            reported = ~np.isnan(text.probabilities)
            tensors = [
                {name: np.stack(logits)[at[: len(logits)]] for name, at in parts.items() if at.any()}
                for logits in (reference, port, *own)
            ]
            for of_it, logits in zip(tensors, (reference, port, *own), strict=True):
                of_it[f"{how}.probabilities"] = probabilities(logits, forced[: len(logits)])[reported[: len(logits)]]
            # of the port not those worked out here, but those that its users see
            tensors[1][f"{how}.probabilities"] = text.probabilities[reported]
            comparison.add(*tensors)
            numbers = uniform_numbers(seed, steps, len(prompts))
            by_reference, by_port = (draws(logits, settings, seed) for logits in (reference, port))
            for part, at in parts.items():
                for s, i in np.argwhere(at[: min(len(reference), len(port))]).tolist():
                    token, where = int(text.tokens[s, i]), f"row {i}, token {s}"
                    same = token == by_reference[s, i], token == by_port[s, i]
                    drawn.append(Draw(part, where, token, *same, reference[s][i], numbers[s, i]))
        rows = comparison.rows()
        yield [*rows, tokens_row(setting, how, settings, drawn, {row.name: row.allowed for row in rows})]


def tokens_row(
    setting: Setting, how: str, settings: Mapping[str, Any], drawn: Sequence[Draw], allowed: Mapping[str, float]
) -> Row:
    """The verdict on the tokens: each has to be the one that the host's sampler draws from the port's logits, and from
    the float64 reference's too, unless that is a tie: a draw that errors of the allowed size can decide either way. In
    float64 there are no ties. Too many of them fail.
    """
    ties, wrong = 0, list[Draw]()
    for draw in drawn:
        off = 0.0
        if setting.dtype != "float64":
            off = SPREAD * allowed.get(draw.part, 0.0) * math.sqrt(np.square(draw.logits).mean())
        if draw.as_reference and draw.as_port:
            continue
        if draw.as_port and could_draw(draw.logits, draw.token, draw.number, settings, off):
            ties += 1
        else:
            wrong.append(draw)

    def row(error: float, bound: float, reason: str) -> Row:
        return Row("generation", f"{how}.tokens", error, error, 1.0, None, bound, reason)

    if wrong:
        first = wrong[0]
        whose = "the float64 reference's logits" if first.as_port else "its own logits"
        reason = f"{len(wrong)} of {len(drawn)} are not what the sampler draws from {whose}; first {first.where}"
        return row(len(wrong) / len(drawn), 0.0, reason)
    if ties > TIES * len(drawn):
        return row(ties / len(drawn), TIES, f"{ties} of {len(drawn)} draws are ties: too many to prove anything")
    return row(0.0, 0.0, f"all {len(drawn)} the same" if not ties else f"{ties} of {len(drawn)} draws are ties")
