"""Sampling from the reference. tinygrad_impl/generate.py is its port."""

from collections.abc import Callable

import torch

from data.text.sampling import Sampler
from torch_ref.model import GPT2, KVCache


@torch.no_grad()
def generate(
    model: GPT2,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampler: Sampler,
    V: int | None = None,
    eot: int | None = None,
    cached: bool = False,
    tick: Callable[[], object] = int,
) -> list[list[int]]:
    """Continues each prompt (at least one token) by up to max_new_tokens; a row ends before the token `eot` (None:
    never). The first `V` of the model's tokens are drawn from, those of its tokenizer (None: all).

    Returns the new tokens of each row. A row of more tokens than the model's context, be it by its prompt, goes
    on from its last context // 2 (from its last one, if that is none), which then grow to a context again, and so on.
    `cached` computes each token once instead of the whole row at every step: for equal tokens, but for rounding.
    `tick` is called after each step.
    """
    rows = [list(prompt) for prompt in prompts]
    ended = [False] * len(rows)
    starts = [0] * len(rows)  # where in its row begins what the model sees
    held = [0] * len(rows)  # how many tokens from there on the cache has
    device, context = model.wte.weight.device, model.config.context
    cache = KVCache(model, len(rows)) if cached else None
    for _ in range(max_new_tokens):
        for i, row in enumerate(rows):
            if len(row) - starts[i] > context:
                # no key or value can stay: every token has another position now
                starts[i], held[i] = len(row) - max(1, context // 2), 0
        fed = [row[start + has :] for row, start, has in zip(rows, starts, held, strict=True)]
        # what is right of a position does not reach it, so shorter rows are padded there
        tokens = torch.tensor([row + [0] * (max(map(len, fed)) - len(row)) for row in fed], device=device)
        last = torch.tensor([len(row) - 1 for row in fed], device=device)
        if cache is not None:
            cache.lengths = torch.tensor(held, device=device)
            held = [has + len(row) for has, row in zip(held, fed, strict=True)]
        x = model.hidden(tokens, cache)[torch.arange(len(rows), device=device), last]  # (N, C)
        for i, token in enumerate(sampler(model.head(x)[:, :V].float().cpu().numpy())):
            ended[i] = ended[i] or token == eot
            if not ended[i]:
                rows[i].append(int(token))
        tick()
        if all(ended):
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
