"""The embedding kernels: sorting and gathering exactly, sums against float64."""

import pytest
import torch

from tinygrad_impl.kernels import embedding
from tinygrad_impl.kernels.launch import Launch
from tinygrad_impl.kernels.tests.support import DEVICE, check, run_launch

# rows, vocabulary, width, rows that a program sums: a token in many programs' rows or all in one, in as many as are
# added up at once and in one more; next to none or most of the tokens unused; columns of a second program
SHAPES = [(1, 7, 64, 32), (200, 3, 64, 32), (30, 5, 24, 4), (68, 1, 24, 4), (72, 1, 24, 4), (132, 1, 24, 4)]
SHAPES += [(70, 2, 24, 4), (40, 200, 300, 32), (64, 4, 24, 16)]
if DEVICE == "cuda":
    SHAPES += [(32768, 50257, 768, 32), (65536, 2, 1600, 32), (99000, 50257, 64, 32)]


def random_tokens(R: int, V: int) -> torch.Tensor:
    return torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(R)).to(DEVICE, torch.int32)


def call(launch: Launch, *tensors: torch.Tensor) -> None:
    launch.kernel[launch.grid](*tensors, **launch.constants, num_warps=launch.warps, num_stages=launch.stages)


@pytest.mark.parametrize(
    ("R", "V", "block"), [(1, 5, 64), (128, 3, 64), (300, 50257, 64), (700, 1, 128), (1025, 9, 1024), (65, 2, 64)]
)
def test_sort_is_stable(R: int, V: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "SORTED", block)
    tokens = random_tokens(R, V)
    blocks, merge = embedding.sort(R)
    keys = torch.empty(block * blocks.grid[0], dtype=torch.int32, device=DEVICE)
    order = torch.empty(R, dtype=torch.int32, device=DEVICE)
    run_launch(blocks, [keys], tokens)
    run_launch(merge, [order], keys)
    assert torch.equal(order.long(), torch.argsort(tokens, stable=True))


@pytest.mark.parametrize(("R", "V", "C", "summed"), SHAPES)
def test_rows_are_added_by_token(R: int, V: int, C: int, summed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "SUMMED", summed)
    tokens, rows = random_tokens(R, V), torch.randn(R, C, device=DEVICE)
    order = torch.argsort(tokens, stable=True).int()
    total = torch.randn(V, C, device=DEVICE)
    truth = total.double().index_add(0, tokens.long(), rows.double())
    by_torch = total.index_add(0, tokens.long(), rows)
    runs, rest = embedding.sums(R, C)
    parts = torch.full((runs.grid[0], 2, C), float("nan"), device=DEVICE)
    call(runs, total, parts, order, tokens, rows)
    call(rest, total, parts, order, tokens)
    check(total, truth, by_torch, least=2e-7 * max(1, R / V) ** 0.5)
