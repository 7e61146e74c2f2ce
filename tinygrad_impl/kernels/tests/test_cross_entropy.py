"""The loss kernel against float64, within 1.5 times the error of PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from tinygrad_impl.kernels import cross_entropy
from tinygrad_impl.kernels.launch import Launch
from tinygrad_impl.kernels.tests.support import DEVICE, check_rounding, relative_error

IGNORED = -100
# rows, columns, columns with padding, lanes of a block: less than a block, whole blocks and a rest, also of padding,
# whole blocks only, one, and no padding
SHAPES = [
    (5, 5, 128, 32),
    (9, 500, 512, 16),
    (5, 512, 512, 32),
    (5, 256, 256, 32),
    (5, 257, 300, 32),
    (6, 384, 512, 16),
]
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
    target[3], target[4] = V - 1, 0
    target[5:-1:2] = IGNORED  # here and there
    scale = torch.tensor([0.3], device=DEVICE)
    true_loss, true_gradient = by_torch(logits[:, :V].double(), target, scale[0].double())
    _, torch_gradient = by_torch(logits[:, :V].float(), target, scale[0])

    loss = torch.full((R,), float("nan"), device=DEVICE)
    first, rest = (cross_entropy.forward(r, V, stride, IGNORED, at, lanes, warps=4) for r, at in ((2, 0), (R - 2, 2)))
    call(first, loss, logits, target, scale)
    assert loss[2:].isnan().all()
    call(rest, loss, logits[2:], target, scale)

    ignored = target == IGNORED
    assert torch.all(loss[ignored] == 0)
    torch.testing.assert_close(loss.double(), true_loss, rtol=2e-6, atol=1e-5)
    assert torch.all(logits[ignored] == 0)
    assert torch.all(logits[:, V:] == 0)
    check_rounding(logits[:, :V], true_gradient)
    bar = relative_error(torch_gradient.bfloat16(), true_gradient)
    assert relative_error(logits[:, :V], true_gradient) <= 1.5 * bar


@pytest.mark.parametrize("ignored", [-1, 3])
def test_which_target_is_ignored(ignored: int) -> None:
    """Any number; all rows but one have it, and -100 is no token then."""
    rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    target = torch.tensor([ignored, 2, ignored, ignored], dtype=torch.int32, device=DEVICE)
    truth = rows.double().softmax(1) - F.one_hot(target.long().clamp(0), 16)
    expected = F.cross_entropy(rows.double(), target.long(), ignore_index=ignored, reduction="none")
    loss = torch.empty(4, device=DEVICE)
    call(cross_entropy.forward(4, 16, 16, ignored, lanes=2, warps=1), loss, rows, target, torch.ones(1, device=DEVICE))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    check_rounding(rows, torch.where(target == ignored, 0, 1)[:, None] * truth)


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


@pytest.mark.parametrize(("R", "V", "stride", "lanes"), SHAPES[1:5])
def test_loss_alone_and_argmax(R: int, V: int, stride: int, lanes: int) -> None:
    """The logits stay as they are. Of equally large ones, which bfloat16 has many of, the first is the argmax."""
    logits = torch.randn(R, stride, generator=torch.Generator().manual_seed(V)).to(DEVICE, torch.bfloat16)
    logits[:, V:] = float("nan")
    logits[0, 7] = logits[0, V - 1] = logits[1, 7] = logits[1, V - 1] = logits[2, 0] = 9.0
    target = logits[:, :V].float().argmax(1).int()
    target[1], target[2], target[3] = V - 1, IGNORED, (target[3] + 1) % V
    loss, likeliest = torch.full((R,), float("nan"), device=DEVICE), torch.full((R,), -1, device=DEVICE).int()
    before = logits.clone()
    for r, at in ((2, 0), (R - 2, 2)):
        kernel = cross_entropy.of_tokens(r, V, stride, IGNORED, at, lanes, warps=4)
        call(kernel, loss, likeliest, logits[at:], target)
    expected = F.cross_entropy(logits[:, :V].double(), target.long(), ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-5)
    assert likeliest.tolist() == [1, 0, 0, 0, *[1] * (R - 4)]
    assert torch.equal(logits.view(torch.int16), before.view(torch.int16))
