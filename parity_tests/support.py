"""What the tests share: models to test on, batches, Hugging Face as the third witness, and how errors are judged.

There is no tinygrad here, so that torch_ref's own tests can use it without.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers

from data.config import GPT2Config, parameter_shapes
from data.loader import IGNORED
from data.sampling import Sampler
from data.tokenizer import EOT
from torch_ref.model import GPT2

# The largest relative error of a tensor. In float64 only the order of summation differs; a wrong formula is far above.
BOUNDS = {"float64": 1e-10, "float32": 1e-4}


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


def random_batch(B: int, T: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (B, T), int32: few different tokens, so that they repeat; `EOT` inside; some targets ignored.

    As many targets are ignored in every batch of a shape, so that the mean of two batches' losses is that of both.
    """
    random = np.random.default_rng(seed)
    rows = random.choice([0, EOT, *random.integers(0, EOT, 10)], (B, T + 1)).astype(np.int32)
    rows[0, T // 2] = EOT
    x, y = rows[:, :-1].copy(), rows[:, 1:].copy()
    y.flat[3::5] = IGNORED
    return x, y


def gradients_by_name(names: Iterable[str], values: Iterable[np.ndarray], config: GPT2Config) -> dict[str, np.ndarray]:
    """Gradients for `relative_errors`. Every parameter has to be there, exactly once: none goes unchecked."""
    names = list(names)
    assert sorted(names) == sorted(parameter_shapes(config))
    return {f"gradient of {name}": value for name, value in zip(names, values, strict=True)}


def torch_results(
    config: GPT2Config, arrays: Mapping[str, np.ndarray], x: np.ndarray, y: np.ndarray
) -> dict[str, np.ndarray]:
    """Logits, loss and every gradient of the reference."""
    model = GPT2(config, arrays)
    logits, loss = model(torch.tensor(x), torch.tensor(y))
    loss.backward()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = gradients_by_name(names, [p.grad.numpy() for p in parameters], config)
    return {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()} | gradients


def hugging_face_results(
    config: GPT2Config, folder: Path, dtype: torch.dtype, x: np.ndarray, y: np.ndarray
) -> dict[str, np.ndarray]:
    """Logits, loss and every gradient of HF's model. The loss is written out: HF's own is float32 in any case."""
    model = hugging_face(folder, dtype)
    logits = model(torch.tensor(x, dtype=torch.long)).logits
    targets = torch.tensor(y, dtype=torch.long)
    scored = targets != IGNORED
    loss = -logits[scored].log_softmax(-1).gather(-1, targets[scored][:, None]).mean()
    loss.backward()
    names, parameters = zip(*model.named_parameters(), strict=True)  # the tied head is listed once, as wte
    bare = [name.removeprefix("transformer.") for name in names]
    gradients = gradients_by_name(bare, [p.grad.numpy() for p in parameters], config)
    return {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()} | gradients


def relative_errors(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """norm(ours - theirs) / norm(theirs) of each tensor, in float64. Names, shapes and dtypes have to be the same.

    Whole tensors are judged, for the sake of attn.c_attn.bias: a constant added to every key changes no softmax, so
    the gradient of its key third is exactly zero and what is computed there is rounding noise. It has to be small on
    the scale of the other thirds; on its own scale it is never right.
    """
    assert ours.keys() == theirs.keys()
    errors = {}
    for name, b in theirs.items():
        a = ours[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        a, b = a.astype(np.float64), b.astype(np.float64)
        errors[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return errors


def assert_close(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], bound: float, what: str) -> None:
    """Fails, naming the tensors, unless every relative error is at most `bound`; prints the worst (pytest -rP)."""
    errors = relative_errors(ours, theirs)
    worst = max(errors, key=errors.__getitem__)
    print(f"{what}: worst relative error {errors[worst]:.1e} of {bound:.0e}, {worst}")
    assert not {name: error for name, error in errors.items() if not error <= bound}, what  # `not <=`: NaN fails too
