"""The layer norm kernels against float64, within 1.5 times the error of PyTorch's under autocast to bfloat16."""

import pytest
import torch
import torch.nn.functional as F

from tinygrad_impl.kernels import GPU, layer_norm
from tinygrad_impl.kernels.tests.support import DEVICE, THIS_GPU, check, check_rounding, run_launch

# rows, columns, epsilon, multiprocessors, each with 3 programs of the backward pass, or 4 if rows are wide: one turn,
# in which the last is not full; six, nine (in the last of which most have nothing), two
SHAPES = [(37, 64, 1e-5, 132), (1, 384, 0.5, 132), (63, 192, 1e-3, 1), (100, 64, 0.5, 1), (10, 1600, 1e-5, 2)]
if DEVICE == "cuda":
    SHAPES += [(32768, 768, 1e-5, 132), (5000, 1024, 1e-3, 132), (5000, 1280, 1e-5, 132), (5000, 1600, 1e-5, 132)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def by_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor, past: torch.Tensor | None, eps: float
) -> list[torch.Tensor]:
    """y and the gradients of x, weight and bias, in x's dtype. `past` is what reaches x by other ways."""
    x, weight, bias = (t.detach().to(x.dtype).requires_grad_() for t in (x, weight, bias))
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    dx, dweight, dbias = torch.autograd.grad(y, [x, weight, bias], dy.to(x.dtype))
    return [y.detach(), dx if past is None else dx + past.to(x.dtype), dweight, dbias]


@pytest.mark.parametrize(("R", "C", "eps", "multiprocessors"), SHAPES)
@pytest.mark.parametrize("added", [True, False])
def test_forward_and_backward(R: int, C: int, eps: float, multiprocessors: int, added: bool) -> None:
    gpu = GPU(THIS_GPU.capability, multiprocessors)
    x, a = random(R, C) + 1, random(R, C, seed=1).bfloat16()
    x, a = (t * torch.logspace(-1, 1, R, device=DEVICE)[:, None].to(t.dtype) for t in (x, a))  # some near epsilon
    weight, bias = 1 + random(C, seed=2) / 10, random(C, seed=3)
    dy, past = random(R, C, seed=4).bfloat16(), random(R, C, seed=5) if added else None
    s = x + a.float() if added else x
    truth = by_torch(s.double(), weight, bias, dy, past, eps)
    reference = by_torch(s, weight, bias, dy, past, eps)

    total, y = empty(R, C), empty(R, C, dtype=torch.bfloat16)
    mean, rstd = empty(R), empty(R)
    if added:
        run_launch(layer_norm.forward(R, C, eps, True), [total, y, mean, rstd], x, a, weight, bias)
        assert torch.equal(total, s)
    else:
        run_launch(layer_norm.forward(R, C, eps, False), [y, mean, rstd], x, weight, bias)
    check_rounding(y, truth[0])
    torch.testing.assert_close(mean.double(), s.double().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (s.double().var(1, correction=0) + eps).rsqrt(), rtol=1e-5, atol=0)

    kernel = layer_norm.backward(gpu, R, C, past is not None)
    assert kernel.grid[0] <= 4 * multiprocessors
    dx, sums, (dx16, again) = empty(R, C), empty(*kernel.grid, 3, C), empty(2, R, C, dtype=torch.bfloat16)
    run_launch(kernel, [dx, dx16, again, sums], dy, s if past is None else past, s, mean, rstd, weight, bias)
    assert torch.equal(again, y)
    check(dx, truth[1], reference[1], least=1e-6)
    assert torch.equal(dx16, dx.bfloat16())
    dweight, dbias, before = sums.double().sum(0)
    for got, true in ((dweight, truth[2]), (dbias, truth[3]), (before, dx16.double().sum(0))):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5 * R)


@pytest.mark.parametrize("C", [768, 1024, 1280, 1600])
def test_as_many_programs_as_registers_allow(C: int) -> None:
    kernel = layer_norm.backward(GPU(90, 132), 32768, C, past=True)
    each = kernel.grid[0] // 132  # programs of a multiprocessor, which has 65,536 registers
    assert kernel.registers is not None
    assert 0.95 * 65536 < kernel.registers * 32 * kernel.warps * each <= 65536


def test_mean_far_from_zero() -> None:
    """The variance is that of what is left when the mean is subtracted."""
    R, C, eps = 4, 768, 1e-5
    x, weight, bias = 1000 + random(R, C), torch.ones(C, device=DEVICE), torch.zeros(C, device=DEVICE)
    y, mean, rstd = empty(R, C, dtype=torch.bfloat16), empty(R), empty(R)
    run_launch(layer_norm.forward(R, C, eps, False), [y, mean, rstd], x, weight, bias)
    check(y, F.layer_norm(x.double(), (C,), eps=eps), F.layer_norm(x, (C,), eps=eps).bfloat16())
