"""GEMMs of pingpong.py on Hopper, beside float64. Gluon has no interpreter: they need the GPU."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tinygrad_impl.kernels import GPU, matmul
from tinygrad_impl.kernels.launch import Launch
from tinygrad_impl.kernels.tests.support import THIS_GPU, check_rounding, relative_error, run_launch
from tinygrad_impl.kernels.tests.test_matmul import new, random

on_hopper = pytest.mark.skipif(not THIS_GPU.pairs_warpgroups, reason="needs a GPU of Hopper (H100, H200)")
# Rows, columns, terms of a sum: one tile; last tiles not full, rings that are filled several times, groups of rows of
# tiles of which the last is not full; the layers of GPT-2's sizes
SIZES = [(128, 64, 64), (1000, 448, 320), (2100, 192, 704), (1024, 3072, 768), (520, 4096, 1024), (260, 6400, 1600)]


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_who_has_them(capability: int) -> None:
    gpu = GPU(capability, 132)
    launches = [
        matmul.forward(gpu, 1000, 64, 256, gelu=True),
        matmul.input_gradient(gpu, 1000, 256, 64, gelu=True),
    ]
    assert {launch.name.startswith("pingpong") for launch in launches} == {capability == 90}


def test_who_keeps_gelu() -> None:
    """Hopper, of 124M and smaller models: the gradient's kernel then has one output less."""
    for gpu, width, kept in ((GPU(90, 132), 768, 1), (GPU(90, 132), 1024, 0), (GPU(100, 132), 768, 0)):
        assert matmul.input_gradient(gpu, 8192, 4 * width, width, gelu=True).groups == (3 - kept, 3), (gpu, width)


@pytest.mark.parametrize(
    ("R", "K", "N", "paired"),
    [
        (8192, 5120, 1280, True),  # 640 tiles take 5 rounds; 320 of twice their width take 3, as long as 6
        (16384, 1024, 3072, True),  # 24 rounds, and 12 of tiles twice as wide: the sums are short
        (16384, 4096, 1024, False),  # 8 and 4: the sums are long
        (33 * 128, 4096, 1024, False),  # 2 and 1: all multiprocessors have work all the time
        (34 * 128, 4096, 1024, True),  # 3 and 2
    ],
)
def test_without_gelu_where_it_is_faster(R: int, K: int, N: int, paired: bool) -> None:
    for gpu in (GPU(90, 132), GPU(100, 132), GPU(80, 132)):
        launches = [matmul.forward(gpu, R, K, N), matmul.input_gradient(gpu, R, N, K)]
        expected = paired and gpu.pairs_warpgroups
        assert [launch.name.startswith("pingpong") for launch in launches] == [expected, expected]


def few(launch: Launch, programs: int) -> Launch:
    """By so many programs at most."""
    programs = min(programs, launch.grid[0])
    return replace(launch, grid=(programs,), constants=launch.constants | {"PROGRAMS": programs})


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("R", "N", "K"), SIZES)
@pytest.mark.parametrize("programs", [1, 3, 132])
def test_without_gelu(R: int, N: int, K: int, programs: int) -> None:
    x, weight, bias = random(R, K), random(K, N, scale=K**-0.5), random(N).float()
    truth = x.double() @ weight.double()
    run_launch(few(matmul.paired(THIS_GPU, R, N, K, False, "bias"), programs), [y := new(R, N)], x, weight, bias)
    check_rounding(y, truth + bias.double())
    launch = few(matmul.paired(THIS_GPU, R, N, K, True, "none"), programs)
    run_launch(launch, [y := new(R, N)], x, weight.T.contiguous())
    check_rounding(y, truth)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("R", "N", "K"), SIZES)
@pytest.mark.parametrize("programs", [1, 3, 132])
def test_gelu(R: int, N: int, K: int, programs: int) -> None:
    x, weight, bias = random(R, K), random(K, N, scale=K**-0.5), random(N).float()
    outs = [new(R, N), new(R, N)]
    run_launch(few(matmul.forward(THIS_GPU, R, K, N, gelu=True), programs), outs, x, weight, bias)
    check_rounding(outs[0], x.double() @ weight.double() + bias.double())
    check_rounding(outs[1], F.gelu(outs[0].double(), approximate="tanh"))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("R", "N", "K"), SIZES)
@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize("again", [True, False], ids=["GELU again", "GELU kept"])
def test_gelu_gradient(R: int, N: int, K: int, programs: int, again: bool) -> None:
    dy, weight, hidden = random(R, K), random(N, K, scale=K**-0.5), random(R, N, scale=2.0, seed=1)
    launch = few(matmul.paired(THIS_GPU, R, N, K, True, "gelu gradient", again), programs)
    BM = launch.constants["BM"]
    outs = [new(R, N), *again * [new(R, N)], new(-(-R // BM), N, dtype=torch.float32)]
    run_launch(launch, outs, dy, weight, hidden)
    x = hidden.double().requires_grad_()
    g = F.gelu(x, approximate="tanh")
    [truth] = torch.autograd.grad(g, x, dy.double() @ weight.double().T)
    check_rounding(outs[0], truth)
    if again:
        check_rounding(outs[1], g.detach())
    for part, rows in zip(outs[-1], truth.split(BM), strict=True):
        assert relative_error(part, rows.sum(0)) < 1e-5

    others = [torch.empty_like(out) for out in outs]
    run_launch(launch, others, dy, weight, hidden)
    assert all(torch.equal(out, other) for out, other in zip(outs, others, strict=True))
