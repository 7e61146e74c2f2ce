"""What the tests share: models to test on, scripted sampling, and Hugging Face as the third witness.

There is no tinygrad here, so that torch_ref's own tests can use it without.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers

from data.checkpoints.checkpoint import load
from data.checkpoints.config import GPT2Config, parameter_shapes
from data.text.loader import IGNORED
from data.text.sampling import Sampler
from data.text.tokenizer import EOT
from torch_ref.model import GPT2


def save_random_gpt2(folder: Path, **sizes: float) -> None:
    """Writes a random GPT-2 as Hugging Face does. No bias is 0 and no gain 1: those would hide that one is left out."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)


def save_small_gpt2(folder: Path) -> None:
    """A model of 3 million parameters; the range makes its attention pick and choose, where 0.02 leaves it uniform."""
    save_random_gpt2(folder, n_layer=2, n_head=4, n_embd=64, n_positions=32, initializer_range=0.2)


def hugging_face(folder: Path, dtype: torch.dtype) -> transformers.GPT2LMHeadModel:
    """HF's GPT-2 without dropout and with its attention written out, not the fused one that torch_ref calls."""
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def greedy_by_hugging_face(model: transformers.GPT2LMHeadModel, prompt: list[int], new: int) -> list[int]:
    """The `new` tokens that HF's own `generate` gives after the prompt."""
    tokens = torch.tensor([prompt])
    mask = torch.ones_like(tokens)
    ids = model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=EOT)
    return ids[0, len(prompt) :].tolist()


class Scripted(Sampler):
    """Draws what it was told to, whatever the logits."""

    def __init__(self, script: list[list[int]]):
        self.script = iter(script)

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        return np.array(next(self.script))


def torch_results(
    config: GPT2Config, arrays: Mapping[str, np.ndarray], x: np.ndarray, y: np.ndarray
) -> dict[str, np.ndarray]:
    """Logits, loss and, by the parameter's name, every gradient of the reference."""
    model = GPT2(config, arrays)
    logits, loss = model(torch.tensor(x), torch.tensor(y))
    loss.backward()
    return {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()} | gradients(model, config)


def hugging_face_results(folder: Path, dtype: torch.dtype, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, loss and every gradient of HF's model. The loss is written out: HF's own is float32 in any case."""
    model = hugging_face(folder, dtype)
    logits = model(torch.tensor(x, dtype=torch.long)).logits
    targets = torch.tensor(y, dtype=torch.long)
    scored = targets != IGNORED
    loss = -logits[scored].log_softmax(-1).gather(-1, targets[scored][:, None]).mean()
    loss.backward()
    return {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()} | gradients(model, load(folder)[0])


def gradients(model: torch.nn.Module, config: GPT2Config) -> dict[str, np.ndarray]:
    """By name. Every parameter has to be there, exactly once (a tied head is listed as wte): none goes unchecked."""
    grads = {name.removeprefix("transformer."): p.grad for name, p in model.named_parameters()}
    found = {name: grad.numpy() for name, grad in grads.items() if grad is not None}
    assert found.keys() == parameter_shapes(config).keys()
    return found
