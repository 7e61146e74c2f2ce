"""torch_ref and tinygrad continue the same prompts with the same tokens, and greedily with those of HF's `generate`.

torch_ref computes whole rows anew at every step, or with a cache; tinygrad always has one.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tinygrad import Tensor, dtypes

import tinygrad_impl.generate
import tinygrad_impl.model
import torch_ref.model
from data.checkpoints.checkpoint import load
from data.checkpoints.config import GPT2Config
from data.text.sampling import Sampler
from data.text.tokenizer import EOT, VOCAB_SIZE
from parity_tests.mutants import CONFIG
from parity_tests.weights import random_weights
from tinygrad_impl.backend import Plain
from tinygrad_impl.generate import Generator
from torch_ref.generate import generate
from torch_ref.testing import Scripted, greedy_by_hugging_face, hugging_face, save_random_gpt2

PROMPTS = [[46, 329, 318, 257, 92, 329, 13], [378, 74]]  # of different lengths, so that one of them is padded
BEYOND = 24  # new tokens; the model has 16 positions

Pair = tuple[torch_ref.model.GPT2, Generator]


def pair(config: GPT2Config, loaded: dict[str, np.ndarray], dtype: str) -> Pair:
    arrays = {name: array.astype(dtype) for name, array in loaded.items()}
    return torch_ref.model.GPT2(config, arrays), Generator(
        tinygrad_impl.model.GPT2(config, arrays), V=config.vocab_size, eot=EOT
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the proof's sizes, written by Hugging Face's own code."""
    folder = tmp_path_factory.mktemp("generation")
    save_random_gpt2(folder, **vars(CONFIG), initializer_range=0.6)
    return folder


@pytest.fixture(scope="module")
def float32(folder: Path) -> Pair:
    return pair(*load(folder), "float32")


@pytest.fixture(scope="module")
def float64(folder: Path) -> Pair:
    return pair(*load(folder), "float64")


@pytest.fixture(scope="module")
def of_any_device(float64: Pair) -> Generator:
    """By graphs, as on devices without a decoder of their own."""
    return Generator(float64[1].model, Plain(dtypes.float64), V=float64[1].V, eot=EOT)


class Recording(Sampler):
    """Keeps the logits that it is given: (N, V) of each step."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self.logits: list[np.ndarray] = []

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        self.logits.append(logits.copy())
        return self.sampler(logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "top_k": 40, "seed": 2},
        {"temperature": 1.2, "top_p": 0.9, "seed": 3},
    ],
    ids=["greedy", "sampled", "top-k", "top-p"],
)
def test_same_tokens(float64: Pair, of_any_device: Generator, settings: dict[str, Any]) -> None:
    """In float64: some tokens are so nearly as likely that float32's rounding now and then swaps two."""
    reference, generator = float64
    theirs = generate(reference, PROMPTS, BEYOND, Sampler(**settings))
    assert [len(row) for row in theirs] == [BEYOND, BEYOND]
    assert all(len(set(row)) > 10 for row in theirs)  # a model that repeats itself would prove little
    assert generate(reference, PROMPTS, BEYOND, Sampler(**settings), cached=True) == theirs
    assert generator(PROMPTS, BEYOND, Sampler(**settings)) == theirs
    assert of_any_device(PROMPTS, BEYOND, Sampler(**settings)) == theirs


@pytest.mark.parametrize("n_positions", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 9])
def test_contexts_of_any_length(n_positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row slides three times or more, and not when the others do; every call finds the cache of the one before."""
    monkeypatch.setattr(tinygrad_impl.generate, "CHUNK", 3)
    config = replace(CONFIG, n_positions=n_positions)
    reference, generator = pair(config, random_weights(config, 0, 0.2), "float64")
    long = (
        np.random.default_rng(n_positions).integers(0, CONFIG.vocab_size, n_positions + 5).tolist()
    )  # beyond the context
    new = 3 * n_positions + 1
    cases: list[tuple[list[list[int]], dict[str, Any]]] = [
        ([PROMPTS[0], long, [74]], {"temperature": 1.0, "seed": 4}),
        ([PROMPTS[1], [329], long[:5]], {"temperature": 0.0}),
        ([long], {"temperature": 1.0, "top_k": 9, "seed": 5}),
        ([[46]], {"temperature": 1.0, "seed": 6}),
    ]
    for prompts, settings in cases:
        theirs = generate(reference, prompts, new, Sampler(**settings))
        assert [len(row) for row in theirs] == [new] * len(prompts)
        assert generate(reference, prompts, new, Sampler(**settings), cached=True) == theirs
        assert generator(prompts, new, Sampler(**settings)) == theirs


def test_logits_are_those_of_a_whole_window(float32: Pair) -> None:
    """In float32, in both frameworks: at every step, of a model without a cache that is given what the row sees.

    Of L tokens that is all, or, beyond a context of n, a last part that begins with n // 2 and grows to n, again and
    again.
    """
    reference, generator = float32
    n = reference.config.n_positions
    recording = Recording(Sampler(seed=7))
    rows = generator(PROMPTS, BEYOND, recording)
    for i, prompt in enumerate(PROMPTS):
        text = prompt + rows[i]
        ours = np.stack([logits[i] for logits in recording.logits])
        lengths = np.arange(len(prompt), len(text))
        seen = np.where(lengths > n, n // 2 + (lengths - n - 1) % (n - n // 2 + 1), lengths)
        windows = np.array([text[L - s : L] + [0] * (n - s) for L, s in zip(lengths, seen, strict=True)], np.int32)
        with torch.no_grad():
            x = reference.hidden(torch.tensor(windows))[torch.arange(BEYOND), torch.tensor(seen - 1)]
            theirs = reference.head(x).numpy()
        y = generator.model.hidden(Tensor(windows)).numpy()[np.arange(BEYOND), seen - 1]
        whole = generator.model.head(Tensor(y[:, None]))[:, 0, : CONFIG.vocab_size].numpy()
        for logits in (theirs, whole):
            np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_greedy_is_that_of_hugging_face(float32: Pair, folder: Path) -> None:
    reference, generator = float32
    model = hugging_face(folder, torch.float32)
    expected = [greedy_by_hugging_face(model, prompt, 9) for prompt in PROMPTS]
    assert [len(row) for row in expected] == [9, 9]
    assert generate(reference, PROMPTS, 9, Sampler(0)) == expected
    assert generate(reference, PROMPTS, 9, Sampler(0), cached=True) == expected
    assert generator(PROMPTS, 9, Sampler(0)) == expected


@pytest.fixture(scope="module")
def with_end_of_text() -> Pair:
    """Of a vocabulary that has that token."""
    config = replace(CONFIG, vocab_size=VOCAB_SIZE)
    return pair(config, random_weights(config, 0, 0.2), "float64")


def test_ends_before_end_of_text(with_end_of_text: Pair) -> None:
    reference, generator = with_end_of_text
    script = [[5, 6], [EOT, 7], [8, 9], [10, EOT]]  # and no fifth: both rows have ended
    assert generate(reference, PROMPTS, BEYOND, Scripted(script), eot=EOT) == [[5], [6, 7, 9]]
    assert generate(reference, PROMPTS, BEYOND, Scripted(script), eot=EOT, cached=True) == [[5], [6, 7, 9]]
    assert generator(PROMPTS, BEYOND, Scripted(script)) == [[5], [6, 7, 9]]


def test_a_row_that_has_ended_leaves_the_others_alone(with_end_of_text: Pair) -> None:
    """It ends in the middle; what the other rows then draw, beyond the context too, is what they draw without it."""
    reference, generator = with_end_of_text

    class Ending(Sampler):
        """Greedy, but the second row's fifth token is the end of text."""

        steps = 0

        def __call__(self, logits: np.ndarray) -> np.ndarray:
            drawn = super().__call__(logits)
            drawn[1] = EOT if self.steps == 4 else drawn[1]
            self.steps += 1
            return drawn

    prompts = [[257, 92] * 7, PROMPTS[1]]
    alone = [generate(reference, [prompt], 24, Sampler(0))[0] for prompt in prompts]
    expected = [alone[0], alone[1][:4]]
    assert generate(reference, prompts, 24, Ending(0), eot=EOT) == expected
    assert generate(reference, prompts, 24, Ending(0), eot=EOT, cached=True) == expected
    assert generator(prompts, 24, Ending(0)) == expected
