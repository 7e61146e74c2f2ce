"""The loss kernel against float64, within 1.5 times the error of PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from tinygrad_impl.kernels import cross_entropy
from tinygrad_impl.kernels.launch import Launch
from tinygrad_impl.kernels.tests.support import DEVICE, relative_error

IGNORED = -100
# rows, columns, columns with padding, lanes of a block: less than a block, some blocks and a rest, whole blocks only
SHAPES = [(3, 5, 128, 32), (9, 500, 512, 16), (4, 512, 512, 32)]
if DEVICE == "cuda":
    SHAPES += [(300, 50257, 50304, 512)]


def call(launch: Launch, *tensors: torch.Tensor) -> None:
    launch.kernel[launch.grid](*tensors, **launch.constants, num_warps=launch.warps, num_stages=launch.stages)


def by_torch(logits: torch.Tensor, target: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and their scaled sum's gradient, in the dtype of the logits (R, V)."""
    x = logits.detach().requires_grad_()
    losses = F.cross_entropy(x, target.long(), ignore_index=IGNORED, reduction="none")
    (losses.sum() * scale).backward()
    assert x.grad is not None
    return losses.detach(), x.grad


@pytest.mark.parametrize(("R", "V", "stride", "lanes"), SHAPES)
def test_loss_and_gradient(R: int, V: int, stride: int, lanes: int) -> None:
    generator = torch.Generator().manual_seed(R)
    logits = (8 * torch.randn(R, stride, generator=generator)).to(DEVICE, torch.bfloat16)
    logits[:, V:] = float("nan")  # whatever is there
    target = torch.randint(0, V, (R,), generator=generator).to(DEVICE, torch.int32)
    target[1] = IGNORED
    target[2] = logits[2, :V].argmax()  # a gradient that cancels to little
    scale = torch.tensor([1 / (R - 1)], device=DEVICE)
    true_loss, true_gradient = by_torch(logits[:, :V].double(), target, scale[0].double())
    torch_loss, torch_gradient = by_torch(logits[:, :V].float(), target, scale[0])

    loss = torch.full((R,), float("nan"), device=DEVICE)
    first, rest = (cross_entropy.forward(r, V, stride, IGNORED, at, lanes, warps=4) for r, at in ((2, 0), (R - 2, 2)))
    call(first, loss, logits, target, scale)
    assert loss[2:].isnan().all()
    call(rest, loss, logits[2:], target, scale)

    assert loss[1] == 0
    # PyTorch's error may be 0 by luck: 2^-24 is what rounding to float32 alone may cost
    assert relative_error(loss, true_loss) <= 1.5 * relative_error(torch_loss, true_loss) + 2**-24
    assert torch.all(logits[1] == 0)
    assert torch.all(logits[:, V:] == 0)
    bar = relative_error(torch_gradient.bfloat16(), true_gradient)
    assert relative_error(logits[:, :V], true_gradient) <= 1.5 * bar


def test_large_logits() -> None:
    """Where exp(x) is no float32; and rows in which a lane, or all but one of them, sees nothing but -inf."""
    logits = torch.tensor([[3e4, 3e4, -3e4, 0.0] * 64, [-3e4] * 256, [float("-inf")] * 255 + [1.0]])
    rows = logits.to(DEVICE, torch.bfloat16)
    target = torch.tensor([1, 7, 255], dtype=torch.int32, device=DEVICE)
    loss, scale = torch.empty(3, device=DEVICE), torch.ones(1, device=DEVICE)
    true_loss, true_gradient = by_torch(rows.double(), target, scale[0].double())
    call(cross_entropy.forward(3, 256, 256, IGNORED, lanes=16, warps=1), loss, rows, target, scale)
    assert torch.allclose(loss.double(), true_loss, rtol=0, atol=2e-3)  # half an ulp of the products with log2(e)
    assert torch.allclose(rows.double(), true_gradient, rtol=2**-8, atol=2e-3)
