"""The GPT-2s that people have besides OpenAI's: n_inner, other activations, epsilons, and heads of their own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tinygrad import Tensor, nn

import tinygrad_impl.model
import torch_ref.model
from data.checkpoints.checkpoint import load
from data.text.sampling import Sampler
from data.text.tokenizer import VOCAB_SIZE
from parity_tests.assertions import assert_passed, assert_passes_equal, assert_reference_is_hugging_face
from parity_tests.mutants import CONFIG, LENGTH, ROWS
from parity_tests.proof import prove
from parity_tests.setting import Setting, random_batches
from parity_tests.weights import random_weights
from tinygrad_impl.backend import Plain
from tinygrad_impl.generate import Generator
from torch_ref.testing import greedy_by_hugging_face, hugging_face, save_random_gpt2

slow = pytest.mark.slow

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 61}
FAMILIES: dict[str, dict[str, Any]] = {
    "distilgpt2": {"activation_function": "gelu_new", "n_inner": None},
    "DialoGPT": {"activation_function": "gelu_new"},
    "cerebras-GPT": {"activation_function": "gelu", "n_inner": 32, "layer_norm_epsilon": 1e-5},
    "a narrow MLP": {"n_inner": 16},
    "a wide one": {"n_inner": 40, "activation_function": "gelu_pytorch_tanh"},
    "ReLU": {"activation_function": "relu"},
    "an untied head": {"tie_word_embeddings": False},
    "another epsilon": {"layer_norm_epsilon": 1e-6},
    "all of it": {
        "n_inner": 24,
        "activation_function": "gelu",
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 0.1,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_hugging_face(family: str, tmp_path: Path) -> None:
    """Logits, loss and gradients."""
    save_random_gpt2(tmp_path, **SIZES, **FAMILIES[family], initializer_range=0.5)
    config, _ = load(tmp_path)
    assert_reference_is_hugging_face(tmp_path, random_batches(config, 2, 16, seed=1, count=1))


GRADIENTS = ("wte.weight", "lm_head.weight", "h.0.mlp.c_fc.bias")
VARIANTS: list[dict[str, Any]] = [
    {"activation_function": "gelu", "n_inner": 24, "tie_word_embeddings": False},
    {"activation_function": "relu"},
]


@slow
def test_passes() -> None:
    config = replace(CONFIG, n_layer=1, **VARIANTS[0])
    setting = Setting(config, random_weights(config, 0, 0.2), "float64", "CPU")
    assert_passes_equal(setting, random_batches(config, ROWS, LENGTH, seed=0, count=1), flows=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant: dict[str, Any]) -> None:
    config = replace(CONFIG, n_layer=1, **variant)
    arrays = {name: array.astype(np.float64) for name, array in random_weights(config, 0, 0.2).items()}
    x, y = random_batches(config, ROWS, LENGTH, seed=0, count=1)[0]
    model, reference = tinygrad_impl.model.GPT2(config, arrays), torch_ref.model.GPT2(config, arrays)
    ours = model(Tensor(x), Tensor(y))
    theirs = reference(torch.tensor(x), torch.tensor(y))
    assert ours[1] is not None
    assert theirs[1] is not None
    logits, loss = Plain().lower(ours[0], ours[1])
    theirs[1].backward()
    parameters = {name: p for name, p in nn.state.get_state_dict(model).items() if name in GRADIENTS}
    gradients = Plain().gradient(loss, list(parameters.values()))
    Tensor.realize(logits, *gradients)
    np.testing.assert_allclose(logits.numpy(), theirs[0].detach().numpy(), rtol=0, atol=1e-12)
    expected = {name: p.grad.numpy() for name, p in reference.named_parameters() if p.grad is not None}
    for name, gradient in zip(parameters, gradients, strict=True):
        np.testing.assert_allclose(gradient.numpy(), expected[name], rtol=0, atol=1e-12, err_msg=name)


@slow
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prove(variant: dict[str, Any], dtype: str) -> None:
    config = replace(CONFIG, **variant)
    setting = Setting(config, random_weights(config, 0, 0.2), dtype, "CPU")
    assert_passed(*prove(setting, ROWS, LENGTH, steps=3, quiet=True))


@slow
def test_generation_of_an_untied_head(tmp_path: Path) -> None:
    """The tokens that transformers' own `generate` gives."""
    save_random_gpt2(tmp_path, **SIZES | {"vocab_size": VOCAB_SIZE}, **FAMILIES["all of it"], initializer_range=0.5)
    expected = greedy_by_hugging_face(hugging_face(tmp_path, torch.float32), [7, 400], 8)
    config, arrays = load(tmp_path)
    model = tinygrad_impl.model.GPT2(config, {name: a.astype(np.float32) for name, a in arrays.items()})
    assert Generator(model)([[7, 400]], 8, Sampler(0)) == [expected]
