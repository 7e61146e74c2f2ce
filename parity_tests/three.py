"""The three models on one batch: tinygrad_impl, torch_ref and Hugging Face's."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tinygrad import Tensor, nn

from data.checkpoint import load
from data.config import GPT2Config
from parity_tests.support import BOUNDS, assert_close, gradients_by_name, hugging_face_results, torch_results
from tinygrad_impl.model import GPT2


def tinygrad_results(
    config: GPT2Config, arrays: Mapping[str, np.ndarray], x: np.ndarray, y: np.ndarray
) -> dict[str, np.ndarray]:
    """Logits, loss and every gradient of the port."""
    model = GPT2(config, arrays)
    parameters = nn.state.get_state_dict(model)
    logits, loss = model(Tensor(x), Tensor(y))
    assert loss is not None
    gradients = loss.gradient(*parameters.values())
    Tensor.realize(logits, loss, *gradients)
    by_name = gradients_by_name(parameters, [g.numpy() for g in gradients], config)
    return {"logits": logits.numpy(), "loss": loss.numpy()} | by_name


def check_all_three(folder: Path, dtype: str, x: np.ndarray, y: np.ndarray) -> None:
    """Fails unless any two of them give the same logits, loss and gradients, within the dtype's bound."""
    config, loaded = load(folder)
    arrays = {name: array.astype(dtype) for name, array in loaded.items()}
    reference = torch_results(config, arrays, x, y)
    witness = hugging_face_results(config, folder, getattr(torch, dtype), x, y)
    assert_close(reference, witness, BOUNDS[dtype], "torch_ref against Hugging Face")
    port = tinygrad_results(config, arrays, x, y)
    assert_close(port, reference, BOUNDS[dtype], "tinygrad against torch_ref")
    assert_close(port, witness, BOUNDS[dtype], "tinygrad against Hugging Face")
