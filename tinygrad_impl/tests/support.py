"""What the tests of generate and compare share: a model to write with, and what the reference writes with it."""

from pathlib import Path

import numpy as np
import torch

import torch_ref.model
from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import GPT2Config
from data.testing import save_model
from data.text.sampling import Sampler
from data.text.tokenizer import EOT, VOCAB_SIZE, gpt2, tokenizer

# more tokens than the tokenizer has, and an epsilon of its own
SURE = GPT2Config(vocab_size=VOCAB_SIZE + 47, n_layer=1, n_head=2, n_embd=16, n_positions=32, layer_norm_epsilon=1e-2)


def save_sure_model(folder: Path, seed: int = 1) -> Path:
    """A model that is sure of itself, as trained ones are: of the tokens few are likely, and rounding swaps none. Its
    very likeliest is one that the tokenizer does not have; the end of text is likely too.
    """
    config, arrays = load(save_model(folder / "random", SURE, seed))
    wte, gain, bias = arrays["wte.weight"].copy(), 50 * arrays["ln_f.weight"], arrays["ln_f.bias"].copy()
    gain[0], bias[0], wte[:, 0], wte[[EOT, -1]] = 0, 10, 0, 0
    wte[EOT, 0], wte[-1, 0] = 1.1, 5  # by ten: their logits
    save(folder, config, arrays | {"wte.weight": wte, "ln_f.weight": gain, "ln_f.bias": bias}, gpt2())
    return folder


def seen(n_positions: int, given: int, L: int) -> int:
    """How many of its L tokens a row sees, which began with the given: all, or, beyond n positions, n // 2, which grow
    to n, again and again.
    """
    half = max(1, n_positions // 2)
    return L if n_positions >= L else half + (L - max(given, n_positions + 1)) % (n_positions - half + 1)


@torch.no_grad()
def by_torch(folder: Path, prompts: list[str], new: int, sampler: Sampler) -> list[str]:
    """The texts, by a plain loop over the reference's logits of what each row sees."""
    config, arrays = load(folder)
    model = torch_ref.model.GPT2(config, arrays)
    rows = [tokenizer().encode_ordinary(prompt) for prompt in prompts]
    given, ended = [len(row) for row in rows], [False] * len(rows)
    for _ in range(new):
        windows = [row[-seen(config.context, n, len(row)) :] for n, row in zip(given, rows, strict=True)]
        streams = [model.hidden(torch.tensor([window]))[:, -1:] for window in windows]
        logits = [model.head(x)[0, 0, :VOCAB_SIZE].numpy() for x in streams]
        for i, token in enumerate(sampler(np.stack(logits)).tolist()):
            ended[i] |= token == EOT
            rows[i] += [] if ended[i] else [token]
    return [tokenizer().decode(row) for row in rows]
