"""The products of matrices, beside float64 and beside torch's own in bfloat16."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tinygrad_impl import bench_port
from tinygrad_impl.kernels import GPU, matmul
from tinygrad_impl.kernels.launch import Launch
from tinygrad_impl.kernels.tests.support import (
    DEVICE,
    GPUS,
    THIS_GPU,
    call,
    check,
    check_rounding,
    relative_error,
    run_launch,
)

on_each_gpu = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
SIZES = [(200, 64, 192), (128, 384, 64), (72, 128, 320)]  # R, K, N: rows, columns and sums that fill tiles, or do not


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """In bfloat16, normally distributed."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return (torch.randn(shape, generator=generator) * scale).bfloat16().to(DEVICE)


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def by_few(launch: Launch) -> Launch:
    """By so few programs that they take a second turn, where there are tiles for it, and the last of them a third."""
    if "PROGRAMS" not in launch.constants:  # a program computes one tile
        return launch
    programs = max(1, min(2, launch.grid[0] - 1))
    return replace(launch, grid=(programs,), constants=launch.constants | {"PROGRAMS": programs})


@on_each_gpu
@pytest.mark.parametrize(("R", "K", "N"), SIZES)
def test_forward(gpu: GPU, R: int, K: int, N: int) -> None:
    x, weight, bias = random(R, K), random(K, N, scale=K**-0.5), random(N).float()
    truth = x.double() @ weight.double() + bias.double()
    torchs = torch.addmm(bias.bfloat16(), x, weight)
    run_launch(by_few(matmul.forward(gpu, R, K, N)), [y := new(R, N)], x, weight, bias)
    check(y, truth, torchs)
    check_rounding(y, truth)

    run_launch(by_few(matmul.forward(gpu, R, K, N, gelu=True)), [y := new(R, N), g := new(R, N)], x, weight, bias)
    check_rounding(y, truth)
    check_rounding(g, F.gelu(y.double(), approximate="tanh"))  # of what is stored


@on_each_gpu
@pytest.mark.parametrize(("R", "K", "N"), SIZES)
def test_input_gradient(gpu: GPU, R: int, K: int, N: int) -> None:
    dy, weight, hidden = random(R, N), random(K, N, scale=N**-0.5), random(R, K, scale=2.0, seed=1)
    truth, torchs = dy.double() @ weight.double().T, dy @ weight.T
    run_launch(by_few(matmul.input_gradient(gpu, R, K, N)), [dx := new(R, K)], dy, weight)
    check(dx, truth, torchs)
    check_rounding(dx, truth)

    def through_gelu(gradient: torch.Tensor) -> torch.Tensor:
        x = hidden.to(gradient.dtype).requires_grad_()
        return torch.autograd.grad(F.gelu(x, approximate="tanh"), x, gradient)[0]

    launch = by_few(matmul.input_gradient(gpu, R, K, N, gelu=True))
    parts = new(-(-R // launch.constants["BM"]), K, dtype=torch.float32)
    again = [] if matmul.keeps_gelu(gpu, K) else [new(R, K)]
    run_launch(launch, [dhidden := new(R, K), *again, parts], dy, weight, hidden)
    check(dhidden, through_gelu(truth), through_gelu(torchs))
    for g in again:
        check_rounding(g, F.gelu(hidden.double(), approximate="tanh"))
    for part, rows in zip(parts, through_gelu(truth).split(launch.constants["BM"]), strict=True):
        assert relative_error(part, rows.sum(0)) < 1e-5


@on_each_gpu
@pytest.mark.parametrize(("R", "K", "N"), SIZES)
@pytest.mark.parametrize("splits", [1, 3])
def test_weight_gradient(gpu: GPU, R: int, K: int, N: int, splits: int) -> None:
    """Of two layers; on GPUs with a copy engine in one launch."""
    sizes = [(K, N), (N, K)]
    ins = [(random(R, K), random(R, N, seed=1)), (random(R, N, seed=2), random(R, K, seed=3))]
    outs = [new(splits, *size, dtype=torch.float32) for size in sizes]
    if gpu.has_copy_engine:
        run_launch(by_few(matmul.weight_gradients(gpu, R, sizes, SPLITS=splits)), outs, *ins[0], *ins[1])
    else:
        for size, out, tensors in zip(sizes, outs, ins, strict=True):
            run_launch(matmul.weight_gradient(gpu, R, *size, SPLITS=splits), [out], *tensors)
    for parts, (x, dy) in zip(outs, ins, strict=True):
        truth = x.double().T @ dy.double()
        check(parts.double().sum(0), truth, (x.float().T @ dy.float()), least=1e-6)


@on_each_gpu
@pytest.mark.parametrize("first", [0, 8])  # of the rows
def test_head(gpu: GPU, first: int) -> None:
    R, C, V, padded = 136, 64, 300, 384
    rows, table, dlogits = random(R + first, C), random(padded, C, scale=0.1), random(R, padded, scale=0.1)
    x = rows[first:]
    run_launch(by_few(matmul.head(gpu, R, C, padded, first)), [logits := new(R, padded)], rows, table)
    check_rounding(logits, x.double() @ table.double().T)
    launch = by_few(matmul.head_input_gradient(gpu, R, C, padded, first, BM=64))
    run_launch(launch, [dx := new(R + first, C)], dlogits, table)
    check_rounding(dx[first:], dlogits.double() @ table.double())
    assert dx[:first].isnan().all()

    launch = by_few(matmul.head_weight_gradient(gpu, R, C, padded, V, first))
    run_launch(launch, [dtable := new(V, C, dtype=torch.float32)], dlogits, rows)
    truth = (dlogits.double().T @ x.double())[:V]
    check(dtable, truth, (dlogits.float().T @ x.float())[:V], least=1e-6)


@on_each_gpu
def test_head_adds_to_the_weight_gradient(gpu: GPU) -> None:
    R, C, V, padded = 72, 64, 300, 384
    x, dlogits, before = random(R, C), random(R, padded, scale=0.1), random(V, C).float()
    launch, dtable = by_few(matmul.head_weight_gradient(gpu, R, C, padded, V, add=True)), before.clone()
    call(launch, [dtable, dlogits, x])
    truth = before.double() + (dlogits.double().T @ x.double())[:V]
    check(dtable, truth, before + (dlogits.float().T @ x.float())[:V], least=1e-6)


@on_each_gpu
def test_tiles_in_many_groups_and_rounds(gpu: GPU) -> None:
    """More tiles than programs, and a last group of rows of tiles that is not full."""
    R, K, N = 300, 64, 448
    x, weight, bias = random(R, K), random(K, N, scale=0.1), random(N).float()
    launch = matmul.tiled(gpu, "forward", R, N, K, epilogue="bias", BM=64, BN=64, GROUP=2, SLICES=2)
    if "PROGRAMS" in launch.constants:
        launch = replace(launch, grid=(4,), constants=launch.constants | {"PROGRAMS": 4})
    run_launch(launch, [y := new(R, N)], x, weight, bias)
    check_rounding(y, x.double() @ weight.double() + bias.double())


@pytest.mark.parametrize(
    ("R", "C", "layers", "BM", "splits", "programs"),
    [
        (32768, 768, 1, 128, 3, 132),  # 648 tiles, in 5 rounds of 132
        (32768, 768, 3, 128, 1, 132),  # as many
        (16384, 1024, 3, 128, 1, 132),  # 1,152, in 9
        (8192, 1280, 3, 128, 1, 132),  # 1,800, in 14
        (8192, 1600, 3, 128, 1, 132),
        (8192, 192, 1, 64, 5, 132),  # parts of 128 rows would have 64 of the next part
        (1024, 64, 1, 64, 2, 18),
    ],
)
def test_tiles_of_weight_gradients(R: int, C: int, layers: int, BM: int, splits: int, programs: int) -> None:
    """Those that were the fastest on an H200, and of smaller models."""
    launch = matmul.weight_gradients(GPU(90, 132), R, layers * [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)])
    assert (launch.constants["BM"], launch.constants["SPLITS"], launch.grid) == (BM, splits, (programs,))


@pytest.mark.parametrize(
    ("R", "C", "BN"), [(16384, 768, 256), (16384, 1024, 256), (8192, 1280, 128), (8192, 1600, 128)]
)
def test_tiles_of_the_heads_gradient(R: int, C: int, BN: int) -> None:
    assert matmul.head_input_gradient(GPU(90, 132), R, C, 50304).constants["BN"] == BN


@pytest.mark.usefixtures("device")
def test_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The FLOPs of as many GEMMs as are computed between two looks at the clock."""
    monkeypatch.setattr(bench_port, "TURNS", 2)
    monkeypatch.setattr(bench_port, "CALLS", 3)
    monkeypatch.setattr(bench_port, "time", SimpleNamespace(perf_counter=count(0, 2).__next__))
    assert bench_port.product_ceiling(THIS_GPU, DEVICE.upper(), 128) == {"n": 128, "flops": 3 * 2 * 128**3 / 2}


@pytest.mark.parametrize(
    ("R", "N", "parts"),  # a part has several blocks of rows, at most one, or none; few rows of many columns
    [(72, 192, 3), (200, 160, 3), (40, 96, 64), (5, 640, 1), (1, 32, 1)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_of_column_sums(R: int, N: int, parts: int, dtype: torch.dtype) -> None:
    x = random(R, N).to(dtype)
    run_launch(matmul.parts_of_column_sums(R, N, parts), [sums := new(parts, N, dtype=torch.float32)], x)
    torch.testing.assert_close(sums.double().sum(0), x.double().sum(0), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_column_sums(dtype: torch.dtype) -> None:
    """Of several matrices in one launch: of a single row, of a few, of more than are added up at a time."""
    shapes = [(200, 64, 3), (1, 32, 1), (16, 96, 2), (1000, 32, 1)]
    xs = [random(R, N * outs, seed=R).to(dtype) for R, N, outs in shapes]
    sums = [new(N, dtype=torch.float32) for _, N, outs in shapes for _ in range(outs)]
    run_launch(matmul.column_sums(shapes), sums, *xs)
    truth = [part for x, (_, N, _) in zip(xs, shapes, strict=True) for part in x.double().sum(0).split(N)]
    for got, true in zip(sums, truth, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("capability", "most"), [(80, 163), (89, 99), (90, 227), (100, 227), (119, 227), (120, 99)])
def test_tiles_fit_the_gpu(capability: int, most: int) -> None:
    """KB of shared memory that tiles of a and b, in all their stages (of which `matmul_pointers_kernel` has one less),
    may take of what a program can have; and it is made use of.
    """
    gpu = GPU(capability, 132)
    R, C, V = 4096, 768, 50304
    launches = [
        matmul.forward(gpu, R, C, 3 * C),
        matmul.forward(gpu, R, C, 4 * C, gelu=True),
        matmul.input_gradient(gpu, R, C, C),
    ]
    launches += [matmul.input_gradient(gpu, R, 4 * C, C, gelu=True), matmul.weight_gradient(gpu, R, C, C)]
    launches += [
        matmul.head(gpu, R, C, V),
        matmul.head_input_gradient(gpu, R, C, V),
        matmul.head_weight_gradient(gpu, R, C, V, V),
    ]
    stages = [launch.stages - (launch.kernel is matmul.matmul_pointers_kernel) for launch in launches]
    sizes = [
        n * 2 * (c["BM"] + c["BN"]) * c["BK"] for n, c in zip(stages, (k.constants for k in launches), strict=True)
    ]
    assert most << 8 < max(sizes) <= most << 10
