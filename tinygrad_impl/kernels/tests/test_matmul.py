"""The products of matrices, beside float64 and beside torch's own in bfloat16."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tinygrad_impl.kernels import matmul
from tinygrad_impl.kernels.tests.support import DEVICE, relative_error, run_launch

SIZES = [(200, 64, 192), (128, 384, 64), (72, 128, 320)]  # R, K, N: rows, columns and sums that fill tiles, or do not


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """In bfloat16, normally distributed."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return (torch.randn(shape, generator=generator) * scale).bfloat16().to(DEVICE)


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def check(got: torch.Tensor, truth: torch.Tensor, torchs: torch.Tensor) -> None:
    assert got.isfinite().all()
    assert relative_error(got, truth) <= 1.5 * relative_error(torchs, truth)


@pytest.mark.parametrize(("R", "K", "N"), SIZES)
def test_forward(R: int, K: int, N: int) -> None:
    x, weight, bias = random(R, K), random(K, N, scale=K**-0.5), random(N).float()
    truth = x.double() @ weight.double() + bias.double()
    torchs = torch.addmm(bias.bfloat16(), x, weight)
    run_launch(matmul.forward(R, K, N), [y := new(R, N)], x, weight, bias)
    check(y, truth, torchs)

    run_launch(matmul.forward(R, K, N, gelu=True), [y := new(R, N), g := new(R, N)], x, weight, bias)
    check(y, truth, torchs)
    check(g, F.gelu(truth, approximate="tanh"), F.gelu(torchs, approximate="tanh"))


@pytest.mark.parametrize(("R", "K", "N"), SIZES)
def test_input_gradient(R: int, K: int, N: int) -> None:
    dy, weight, hidden = random(R, N), random(K, N, scale=N**-0.5), random(R, K, scale=2.0, seed=1)
    truth, torchs = dy.double() @ weight.double().T, dy @ weight.T
    run_launch(matmul.input_gradient(R, K, N), [dx := new(R, K)], dy, weight)
    check(dx, truth, torchs)

    def through_gelu(gradient: torch.Tensor) -> torch.Tensor:
        x = hidden.to(gradient.dtype).requires_grad_()
        return torch.autograd.grad(F.gelu(x, approximate="tanh"), x, gradient)[0]

    launch = matmul.input_gradient(R, K, N, gelu=True)
    parts = new(-(-R // launch.constants["BM"]), K, dtype=torch.float32)
    run_launch(launch, [dhidden := new(R, K), g := new(R, K), parts], dy, weight, hidden)
    check(dhidden, through_gelu(truth), through_gelu(torchs))
    check(g, F.gelu(hidden.double(), approximate="tanh"), F.gelu(hidden, approximate="tanh"))
    check(parts.sum(0), through_gelu(truth).sum(0), through_gelu(torchs).float().sum(0))


@pytest.mark.parametrize(("R", "K", "N"), SIZES)
@pytest.mark.parametrize("splits", [1, 3])
def test_weight_gradient(R: int, K: int, N: int, splits: int) -> None:
    x, dy = random(R, K), random(R, N, seed=1)
    launch = matmul.weight_gradient(R, K, N, SPLITS=splits)
    run_launch(launch, [parts := new(splits, K, N, dtype=torch.float32)], x, dy)
    check(parts.sum(0), x.double().T @ dy.double(), x.T @ dy)


@pytest.mark.parametrize("first", [0, 8])  # of the rows
def test_head(first: int) -> None:
    R, C, V, padded = 136, 64, 300, 384
    rows, table, dlogits = random(R + first, C), random(padded, C, scale=0.1), random(R, padded, scale=0.1)
    x = rows[first:]
    run_launch(matmul.head(R, C, padded, first), [logits := new(R, padded)], rows, table)
    check(logits, x.double() @ table.double().T, x @ table.T)
    run_launch(matmul.head_input_gradient(R, C, padded, first), [dx := new(R + first, C)], dlogits, table)
    check(dx[first:], dlogits.double() @ table.double(), dlogits @ table)
    assert dx[:first].isnan().all()

    launch = matmul.head_weight_gradient(R, C, padded, V, first)
    run_launch(launch, [dtable := new(V, C, dtype=torch.float32)], dlogits, rows)
    check(dtable, (dlogits.double().T @ x.double())[:V], (dlogits.T @ x)[:V])


def test_head_adds_to_the_weight_gradient() -> None:
    R, C, V, padded = 72, 64, 300, 384
    x, dlogits, before = random(R, C), random(R, padded, scale=0.1), random(V, C).float()
    launch, dtable = matmul.head_weight_gradient(R, C, padded, V, add=True), before.clone()
    launch.kernel[launch.grid]((dtable,), (dlogits, x), **launch.constants, num_warps=launch.warps)
    check(dtable, before + (dlogits.double().T @ x.double())[:V], before + (dlogits.T @ x)[:V].float())


def test_tiles_in_many_groups_and_rounds() -> None:
    """More tiles than programs, and a last group of rows of tiles that is not full."""
    R, K, N = 300, 64, 448
    x, weight, bias = random(R, K), random(K, N, scale=0.1), random(N).float()
    launch = matmul.forward(R, K, N, BM=64, BN=64, GROUP=2, SLICES=2)
    launch = replace(launch, grid=(4,), constants=launch.constants | {"PROGRAMS": 4})
    run_launch(launch, [y := new(R, N)], x, weight, bias)
    check(y, x.double() @ weight.double() + bias.double(), torch.addmm(bias.bfloat16(), x, weight))


def test_column_sums() -> None:
    R, N = 72, 192
    run_launch(matmul.column_sums(R, N, 3), [sums := new(3, N, dtype=torch.float32)], x := random(R, N))
    assert relative_error(sums.sum(0), x.double().sum(0)) < 1e-6
