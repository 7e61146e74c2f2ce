"""The layer norm kernels against float64, within 1.5 times the error of PyTorch's under autocast to bfloat16."""

import pytest
import torch
import torch.nn.functional as F

from tinygrad_impl.kernels import layer_norm
from tinygrad_impl.kernels.tests.support import DEVICE, relative_error, run_launch

EPS = 1e-5
SHAPES = [(37, 64), (1, 384), (21, 768), (10, 1600)]
if DEVICE == "cuda":
    SHAPES += [(32768, 768), (5000, 1024), (5000, 1280), (5000, 1600)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def close(got: torch.Tensor, by_torch: torch.Tensor, truth: torch.Tensor) -> bool:
    """Within the bar; 2^-24 is what rounding to float32 alone may cost."""
    return relative_error(got, truth) <= 1.5 * relative_error(by_torch.to(got.dtype), truth) + 2**-24


def by_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor, past: torch.Tensor | None
) -> list[torch.Tensor]:
    """y and the gradients of x, weight and bias, in x's dtype. `past` is what reaches x by other ways."""
    x, weight, bias = (t.detach().to(x.dtype).requires_grad_() for t in (x, weight, bias))
    y = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    dx, dweight, dbias = torch.autograd.grad(y, [x, weight, bias], dy.to(x.dtype))
    return [y.detach(), dx if past is None else dx + past.to(x.dtype), dweight, dbias]


@pytest.mark.parametrize(("R", "C"), SHAPES)
@pytest.mark.parametrize("added", [True, False])
def test_forward_and_backward(R: int, C: int, added: bool) -> None:
    x, a = 3 * random(R, C) + 1, random(R, C, seed=1).bfloat16()
    weight, bias = 1 + random(C, seed=2) / 10, random(C, seed=3)
    dy, past = random(R, C, seed=4).bfloat16(), random(R, C, seed=5) if added else None
    s = x + a.float() if added else x
    truth = by_torch(s.double(), weight, bias, dy, past)
    reference = by_torch(s, weight, bias, dy, past)

    total, y = empty(R, C), empty(R, C, dtype=torch.bfloat16)
    mean, rstd = empty(R), empty(R)
    if added:
        run_launch(layer_norm.forward(R, C, EPS, True), [total, y, mean, rstd], x, a, weight, bias)
        assert torch.equal(total, s)
    else:
        run_launch(layer_norm.forward(R, C, EPS, False), [y, mean, rstd], x, weight, bias)
    assert close(y, reference[0], truth[0])
    assert relative_error(mean, s.double().mean(1)) < 1e-6
    assert relative_error(rstd, (s.double().var(1, correction=0) + EPS).rsqrt()) < 1e-6

    kernel = layer_norm.backward(R, C, past is not None)
    dx, dx16, sums = empty(R, C), empty(R, C, dtype=torch.bfloat16), empty(*kernel.grid, 3, C)
    run_launch(kernel, [dx, dx16, sums], dy, s if past is None else past, s, mean, rstd, weight)
    assert close(dx, reference[1], truth[1])
    assert torch.equal(dx16, dx.bfloat16())
    dweight, dbias, before = sums.double().sum(0)
    assert close(dweight.float(), reference[2], truth[2])
    assert close(dbias.float(), reference[3], truth[3])
    assert relative_error(before, dx16.double().sum(0)) < 1e-6


def test_mean_far_from_zero() -> None:
    """The variance is that of what is left when the mean is subtracted."""
    R, C = 4, 768
    x, weight, bias = 1000 + random(R, C), torch.ones(C, device=DEVICE), torch.zeros(C, device=DEVICE)
    y, mean, rstd = empty(R, C, dtype=torch.bfloat16), empty(R), empty(R)
    run_launch(layer_norm.forward(R, C, EPS, False), [y, mean, rstd], x, weight, bias)
    truth = F.layer_norm(x.double(), (C,), eps=EPS)
    assert close(y, F.layer_norm(x, (C,), eps=EPS), truth)
