"""The weights that OpenAI published: all three models agree on them too."""

from pathlib import Path

import pytest
import torch

from data.checkpoint import load, resolve
from data.cli import InputError
from data.sampling import Sampler
from data.tokenizer import tokenizer
from parity_tests.support import greedy_by_hugging_face, hugging_face, random_batch
from parity_tests.three import check_all_three
from torch_ref.generate import generate
from torch_ref.model import GPT2

pytestmark = pytest.mark.hub


@pytest.fixture(scope="module")
def gpt2() -> Path:
    """The folder of the hub's gpt2. Only that it is out of reach skips a test; whatever else is wrong fails it."""
    try:
        return resolve("gpt2")
    except InputError as e:
        if "cannot be reached" not in str(e):
            raise
        pytest.skip(str(e))


@pytest.mark.slow
def test_published_weights(gpt2: Path) -> None:
    check_all_three(gpt2, "float32", *random_batch(1, 16, seed=16))


def test_greedy_is_that_of_hugging_face(gpt2: Path) -> None:
    prompt = tokenizer().encode_ordinary("The dog")
    expected = greedy_by_hugging_face(hugging_face(gpt2, torch.float32), prompt, 20)
    assert len(expected) == 20
    assert generate(GPT2(*load(gpt2)), [prompt], 20, Sampler(0)) == [expected]
