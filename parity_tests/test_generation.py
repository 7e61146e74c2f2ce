"""torch_ref and tinygrad continue the same prompts with the same tokens, and greedily with those of HF's `generate`."""

from pathlib import Path

import pytest
import torch

import tinygrad_impl.model
import torch_ref.model
from data.checkpoint import load
from data.sampling import Sampler
from data.tokenizer import EOT
from parity_tests.support import Scripted, greedy_by_hugging_face, hugging_face
from tinygrad_impl.generate import Generator
from torch_ref.generate import generate

PROMPTS = [[464, 3290, 318, 257, 922, 3290, 13], [EOT, 7454]]  # of different lengths, so that one of them is padded
BEYOND = 40  # new tokens; the small model has 32 positions

Pair = tuple[torch_ref.model.GPT2, Generator]


def load_pair(folder: Path, dtype: str) -> Pair:
    config, loaded = load(folder)
    arrays = {name: array.astype(dtype) for name, array in loaded.items()}
    return torch_ref.model.GPT2(config, arrays), Generator(tinygrad_impl.model.GPT2(config, arrays))


@pytest.fixture(scope="module")
def float32(small: Path) -> Pair:
    return load_pair(small, "float32")


@pytest.fixture(scope="module")
def float64(small: Path) -> Pair:
    return load_pair(small, "float64")


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
def test_same_tokens(float64: Pair, settings: dict) -> None:
    """In float64: many of 50257 tokens are so nearly as likely that float32's rounding now and then swaps two."""
    reference, generator = float64
    theirs = generate(reference, PROMPTS, BEYOND, Sampler(**settings))
    assert [len(row) for row in theirs] == [BEYOND, BEYOND]
    assert all(len(set(row)) > 10 for row in theirs)  # a model that repeats itself would prove little
    assert generator(PROMPTS, BEYOND, Sampler(**settings)) == theirs


def test_greedy_is_that_of_hugging_face(float32: Pair, small: Path) -> None:
    reference, generator = float32
    model = hugging_face(small, torch.float32)
    expected = [greedy_by_hugging_face(model, prompt, 25) for prompt in PROMPTS]
    assert [len(row) for row in expected] == [25, 25]
    assert generate(reference, PROMPTS, 25, Sampler(0)) == expected
    assert generator(PROMPTS, 25, Sampler(0)) == expected


def test_ends_before_end_of_text(float32: Pair) -> None:
    reference, generator = float32
    script = [[5, 6], [EOT, 7], [8, 9], [10, EOT]]  # and no fifth: both rows have ended
    assert generate(reference, PROMPTS, BEYOND, Scripted(script)) == [[5], [6, 7, 9]]
    assert generator(PROMPTS, BEYOND, Scripted(script)) == [[5], [6, 7, 9]]
