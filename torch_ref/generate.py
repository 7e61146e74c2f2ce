"""Sampling from the reference. tinygrad_impl/generate.py is its port."""

import torch

from data.sampling import Sampler
from data.tokenizer import EOT, VOCAB_SIZE
from torch_ref.model import GPT2


@torch.no_grad()
def generate(model: GPT2, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler) -> list[list[int]]:
    """Continues each prompt (at least one token) by up to max_new_tokens; a row ends before `EOT`.

    Returns the new tokens of each row. Beyond n_positions the model sees the last n_positions tokens.
    """
    rows = [list(prompt) for prompt in prompts]
    ended = [False] * len(rows)
    device = model.wte.weight.device
    for _ in range(max_new_tokens):
        seen = [row[-model.config.n_positions :] for row in rows]
        # what is right of a position does not reach it, so shorter rows are padded there
        tokens = torch.tensor([row + [EOT] * (max(map(len, seen)) - len(row)) for row in seen], device=device)
        last = torch.tensor([len(row) - 1 for row in seen], device=device)
        x = model.hidden(tokens)[torch.arange(len(rows), device=device), last]  # (N, C)
        for i, token in enumerate(sampler(model.head(x)[:, :VOCAB_SIZE].float().cpu().numpy())):
            ended[i] = ended[i] or token == EOT
            if not ended[i]:
                rows[i].append(int(token))
        if all(ended):
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
