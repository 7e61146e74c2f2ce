"""The attention kernels against float64, within 1.5 times the error of PyTorch's own bfloat16 attention."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tinygrad_impl.kernels import GPU, attention
from tinygrad_impl.kernels.tests.support import (
    DEVICE,
    GPUS,
    THIS_GPU,
    check,
    relative_error,
    run_launch,
    slow_without_gpu,
)

# B, T, H, D, TILE: one tile; some, and so loops that run not at all, once, and more often; others where the last tile
# is not full, of which the last has the size that training takes
SHAPES = [(2, 16, 2, 16, 16), (1, 96, 2, 64, 16), (2, 70, 3, 32, 16), (2, 5, 2, 32, 64), (1, 40, 1, 16, 32)]
SHAPES += [(1, 200, 1, 64, attention.TILE)]
if DEVICE == "cuda":
    SHAPES += [(2, T, H, D, attention.TILE) for T, H, D in [(1024, 12, 64), (1000, 25, 64), (384, 4, 16), (65, 2, 32)]]


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, torch.bfloat16)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def by_torch(qkv: torch.Tensor, dy: torch.Tensor, H: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, T, C) and dqkv (B, T, 3C), in qkv's dtype."""
    B, T, C = dy.shape
    qkv = qkv.detach().requires_grad_()
    q, k, v = (t.reshape(B, T, H, C // H).transpose(1, 2) for t in qkv.split(C, dim=2))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
    return y.detach(), torch.autograd.grad(y, qkv, dy.to(qkv.dtype))[0]


def by_kernels(gpu: GPU, qkv: torch.Tensor, dy: torch.Tensor, H: int, group: int) -> tuple[torch.Tensor, ...]:
    """y, lse, dqkv and its sums over rows; computed in groups of as many heads."""
    B, T, C = dy.shape
    kernels = attention.attention_forward, attention.attention_query_gradient, attention.attention_key_gradient
    launches = [attention.launch_of(gpu, kernel, B, T, H, C // H) for kernel in kernels]
    launches = [replace(one, constants={**one.constants, "GROUP": group}) for one in launches]
    y, (lse, delta) = empty(B, T, C), (empty(B, H, T, dtype=torch.float32) for _ in range(2))
    dqkv, dq_only = empty(B, T, 3 * C), empty(B, T, 3 * C)
    parts = launches[1].constants["QUERIES"]
    assert parts == launches[2].constants["KEYS"]
    sums, q_sums = (empty(B * -(-T // parts), 3 * C, dtype=torch.float32) for _ in range(2))
    run_launch(launches[0], [y, lse], qkv)
    run_launch(launches[1], [dq_only, q_sums, delta], dy, qkv, y, lse)
    run_launch(launches[2], [dqkv, sums], dy, qkv, lse, delta)
    assert dqkv[..., :C].isnan().all(), "key_gradient must leave q's columns alone"
    assert dq_only[..., C:].isnan().all(), "query_gradient must leave the columns of k and v alone"
    dqkv[..., :C], sums[:, :C] = dq_only[..., :C], q_sums[:, :C]
    return y, lse, dqkv, sums.sum(0)


def for_gpus() -> Iterator[Any]:
    """All shapes, and in the interpreter those of several tiles, whole and not, with the tiles of older GPUs too."""
    for gpu, shapes in zip(GPUS, (SHAPES, SHAPES[1:3]), strict=False):
        yield from (pytest.param(gpu, *shape, id="-".join(map(str, (*shape, gpu.arch)))) for shape in shapes)


@pytest.mark.parametrize(("gpu", "B", "T", "H", "D", "tile"), for_gpus())
def test_error(gpu: GPU, B: int, T: int, H: int, D: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE", tile)
    C = H * D
    qkv, dy = random(B, T, 3 * C), random(B, T, C)
    true_y, true_dqkv = by_torch(qkv.double(), dy, H)
    torch_y, torch_dqkv = by_torch(qkv, dy, H)
    y, lse, dqkv, sums = by_kernels(gpu, qkv, dy, H, group=4)
    torch.testing.assert_close(sums.double(), dqkv.double().sum((0, 1)), rtol=0, atol=B * T * 2**-8)
    check(y, true_y, torch_y, least=2**-9)
    # The last key has one query, itself, and the first query one key, of which dq and dk are 0 but for rounding
    for got, torchs, truth in zip(*(t.split(C, dim=2) for t in (dqkv, torch_dqkv, true_dqkv)), strict=True):
        check(got, truth, torchs, least=2**-9)

    q, k = (t.double().reshape(B, T, H, D).transpose(1, 2) for t in qkv.split(C, dim=2)[:2])
    scores = (q @ k.mT / D**0.5).masked_fill(~torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril(), -torch.inf)
    torch.testing.assert_close(
        lse.double(), scores.logsumexp(-1) / torch.log(torch.tensor(2.0)).item(), rtol=0, atol=1e-5
    )


def test_single_position() -> None:
    """Of one position the softmax is 1, so that y is v, dv is dy, and q and k get nothing but rounding errors."""
    qkv, dy = random(3, 1, 3 * 32), random(3, 1, 32)
    y, _, dqkv, _ = by_kernels(THIS_GPU, qkv, dy, 2, group=96)
    dq, dk, dv = dqkv.split(32, dim=2)
    assert (y == qkv[..., 64:]).all()
    assert (dv == dy).all()
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@slow_without_gpu  # the interpreter has one order
def test_same_in_every_run() -> None:
    qkv, dy = random(2, 200, 3 * 64), random(2, 200, 64)
    first, second = (by_kernels(THIS_GPU, qkv, dy, 1, group=96) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_scores() -> None:
    """Scores in the thousands: exponentials must not overflow."""
    qkv, dy = random(1, 32, 3 * 16) * 100, random(1, 32, 16)
    true_y, _ = by_torch(qkv.double(), dy, 1)
    torch_y, _ = by_torch(qkv, dy, 1)
    y, _, dqkv, _ = by_kernels(THIS_GPU, qkv, dy, 1, group=96)
    # half an ulp beside it, for PyTorch's may be exact: a softmax of such scores chooses one v
    assert relative_error(y, true_y) <= 1.5 * relative_error(torch_y, true_y) + 2**-9
    assert dqkv.isfinite().all()
