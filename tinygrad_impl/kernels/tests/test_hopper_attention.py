"""The attention kernels for Hopper, beside float64. Gluon has no interpreter: they need the GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tinygrad import Tensor, dtypes

from tinygrad_impl.kernels import GPU, attention, operations
from tinygrad_impl.kernels.launch import Launch
from tinygrad_impl.kernels.tests.support import THIS_GPU, call, check, run_launch
from tinygrad_impl.kernels.tests.test_attention import by_torch, empty, random

on_hopper = pytest.mark.skipif(not THIS_GPU.pairs_warpgroups, reason="needs a GPU of Hopper (H100, H200)")
# B, T, H: one block of keys; several, an odd number of them; the lengths that training takes
SHAPES = [(2, 128, 1), (3, 384, 5), (2, 256, 12), (1, 640, 3), (2, 1024, 25), (12, 1024, 12), (8, 1024, 20)]


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_who_has_them(capability: int) -> None:
    gpu = GPU(capability, 132)
    assert attention.forward(gpu, 2, 128, 1, 64).name.startswith("hopper") == (capability == 90)


@pytest.mark.parametrize(("T", "D"), [(200, 64), (64, 64), (256, 32)])
def test_what_they_do_not_take(T: int, D: int) -> None:
    gpu = GPU(90, 132)
    assert not attention.forward(gpu, 2, T, 1, D).name.startswith("hopper")


@pytest.mark.parametrize(("capability", "T", "kernels"), [(90, 384, 1), (90, 320, 2), (80, 384, 2)])
def test_who_takes_the_gradient(capability: int, T: int, kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, y, dy = (Tensor.empty(2, T, C, dtype=dtypes.bfloat16) for C in (3 * 128, 128, 128))
    lse, passed, launches = Tensor.empty(2, 2, T), Tensor.empty(3, dtype=dtypes.int32), []

    def launch(gpu: GPU, kernel: Launch, outs: list[Tensor], *ins: Tensor) -> list[Tensor]:
        launches.append((kernel.name, [t.shape for t in (*outs, *ins)]))
        return list(outs)

    monkeypatch.setattr(operations, "launch", launch)
    kept = [lse.uop, passed.uop] if kernels == 1 else [lse.uop]
    call = SimpleNamespace(src=(None, qkv.uop, *kept, y.uop))
    operations._attention_gradient(GPU(capability, 3), 2, dy.uop, call)
    assert len(launches) == kernels
    if kernels == 1:
        [(name, shapes)] = launches
        assert name.startswith("hopper_attention_gradient")
        own = [(2, T, 384), (12, 384), (2, 2, T), (3, 2, T, 64), (3,)]  # dqkv, sums, delta, where dq grows, passed
        assert shapes == [*own, dy.shape, qkv.shape, y.shape, lse.shape]


def test_programs() -> None:
    """As many as multiprocessors, as long as there is something to do for each."""
    for B, T, H, forward, gradient in ((4, 1024, 25, 132, 100), (1, 384, 2, 6, 2), (32, 1024, 12, 132, 132)):
        assert attention.hopper_forward(GPU(90, 132), B, T, H).grid == (forward,)
        assert attention.hopper_gradient(GPU(90, 132), B, T, H).grid == (gradient,)


def by_kernels(qkv: torch.Tensor, dy: torch.Tensor, H: int, programs: int) -> tuple[torch.Tensor, ...]:
    """y, lse, dqkv and its sums over rows; computed by so many programs at most."""
    B, T, C = dy.shape

    def few(launch: Launch) -> Launch:
        count = min(programs, *launch.grid)
        return replace(launch, grid=(count,), constants=launch.constants | {"PROGRAMS": count})

    y, (lse, delta) = empty(B, T, C), (empty(B, H, T, dtype=torch.float32) for _ in range(2))
    forward = few(attention.hopper_forward(THIS_GPU, B, T, H))
    passed = empty(*forward.grid, dtype=torch.int32)
    run_launch(forward, [y, lse, passed], qkv)
    gradient = few(attention.hopper_gradient(THIS_GPU, B, T, H))
    dqkv, sums = empty(B, T, 3 * C), empty(B * T // 64, 3 * C, dtype=torch.float32)
    kept = empty(*gradient.grid, 2, T, 64, dtype=torch.float32)
    for out in (dqkv, sums, delta, kept):
        out.fill_(float("nan"))
    call(gradient, [dqkv, sums, delta, kept, passed, dy, qkv, y, lse])
    assert not passed.any()
    return y, lse, dqkv, sums.sum(0)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("B", "T", "H"), SHAPES)
@pytest.mark.parametrize("programs", [1, 5, 132])
def test_error(B: int, T: int, H: int, programs: int) -> None:
    C = H * 64
    qkv, dy = random(B, T, 3 * C), random(B, T, C)
    true_y, true_dqkv = by_torch(qkv.double(), dy, H)
    torch_y, torch_dqkv = by_torch(qkv, dy, H)
    y, lse, dqkv, sums = by_kernels(qkv, dy, H, programs)
    check(y, true_y, torch_y, least=2**-9)
    for got, torchs, truth in zip(*(t.split(C, dim=2) for t in (dqkv, torch_dqkv, true_dqkv)), strict=True):
        check(got, truth, torchs, least=2**-9)
    torch.testing.assert_close(sums.double(), dqkv.double().sum((0, 1)), rtol=0, atol=B * T * 2**-8)
    other_y, other_lse = empty(B, T, C), empty(B, H, T, dtype=torch.float32)
    run_launch(attention.launch_of(THIS_GPU, attention.attention_forward, B, T, H, 64), [other_y, other_lse], qkv)
    torch.testing.assert_close(lse, other_lse, rtol=0, atol=1e-5)


@pytest.mark.gpu
@on_hopper
def test_same_bits() -> None:
    """In every run, and by however many programs."""
    qkv, dy = random(3, 384, 3 * 320), random(3, 384, 320)
    first, *others = (by_kernels(qkv, dy, 5, programs) for programs in (132, 132, 132, 4, 1))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
