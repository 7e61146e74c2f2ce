"""What an evaluation needs of the implementation that computes the model: PyTorch's, tinygrad's, or a test's."""

from collections.abc import Callable
from dataclasses import dataclass

from data.evaluation.losses import TokenLosses
from data.ranks import ALONE, Ranks
from data.text.sampling import Sampler
from data.text.tokenizer import Tokenizer

# prompts (one token at least), how many new tokens at most, sampler -> the new tokens of each, without the end of text
Generate = Callable[[list[list[int]], int, Sampler], list[list[int]]]


@dataclass(frozen=True)
class Subject:
    """The model, and what computes it."""

    losses: TokenLosses
    generate: Generate
    tokenizer: Tokenizer
    context: int  # in tokens
    batch_tokens: int  # tokens to score at once
    ranks: Ranks = ALONE


def batch_tokens(device: str) -> int:
    """Tokens to score at once: on a GPU as many as keep it busy, on a CPU as many as stay in little memory. They are a
    multiple of most lengths of windows, so that kernels which see only rows serve batches of all lengths.
    """
    return 1536 if device == "CPU" else 12_288
