"""AdamW and the norm's sums, of parameters of all sizes in one launch, against float64."""

import torch

from tinygrad_impl.kernels import adamw
from tinygrad_impl.kernels.launch import Launch
from tinygrad_impl.kernels.tests.support import DEVICE, relative_error, run_launch

SIZES = [adamw.BLOCK, 1, 3 * adamw.BLOCK + 5, 64, 2 * adamw.BLOCK]
HALVES = [2, None, 0, 1, None]
DECAYS = [0.1, 0.0, 0.0, 3.0, 0.02]
BETAS, EPS = (0.8, 0.95), 1e-3


def random(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def call(launch: Launch, *tensors: torch.Tensor) -> None:
    constants = launch.constants | {"num_warps": launch.warps, "num_stages": launch.stages}
    launch.kernel[launch.grid](*launch.arguments(tensors), **constants)


def step(state: tuple[torch.Tensor, ...], scalars: torch.Tensor, decay: float) -> tuple[torch.Tensor, ...]:
    """Algorithm 2 of Loshchilov & Hutter 2019, of p, m, v and g in their dtype, the gradient being g (scale + rest)."""
    p, m, v, g = state
    scale, rest, lr, correction1, correction2 = scalars.to(p.dtype)
    g = g * scale + g * rest
    m = BETAS[0] * m + (1 - BETAS[0]) * g
    v = BETAS[1] * v + (1 - BETAS[1]) * g * g
    p = p * (1 - lr * decay) - (lr / correction1) * m / ((v / correction2).sqrt() + EPS)
    return p, m, v


def test_step() -> None:
    ps, ms, gradients = (
        [random(size, 10 * kind + i) for i, size in enumerate(SIZES)] for kind in range(3)
    )  # each of its own
    vs = [random(size, 30 + i).square() for i, size in enumerate(SIZES)]
    sizes = [SIZES[HALVES.index(i)] for i in range(3)]
    halves = [torch.full((size,), float("nan"), dtype=torch.bfloat16, device=DEVICE) for size in sizes]
    scalars = torch.tensor([0.7, 1e-3, 0.03, 1 - BETAS[0] ** 3, 1 - BETAS[1] ** 3], device=DEVICE)
    states = list(zip(ps, ms, vs, gradients, strict=True))
    truth = [step(tuple(t.double() for t in state), scalars, d) for state, d in zip(states, DECAYS, strict=True)]
    by_torch = [step(state, scalars, d) for state, d in zip(states, DECAYS, strict=True)]

    call(adamw.step(SIZES, DECAYS, HALVES, *BETAS, EPS), *ps, *ms, *vs, *halves, *gradients, scalars)
    for i, half in enumerate(HALVES):
        for got, reference, true in zip((ps[i], ms[i], vs[i]), by_torch[i], truth[i], strict=True):
            # 2^-24 is what rounding to float32 alone may cost
            assert relative_error(got, true) <= 1.5 * relative_error(reference, true) + 2**-24
        if half is not None:
            assert torch.equal(halves[half], ps[i].bfloat16())


def test_squares() -> None:
    gradients = [random(size, i) for i, size in enumerate(SIZES)]
    for most, parts in ((512, [1, 1, 4, 1, 2]), (2, [1, 1, 1, 1, 1]), (4, [1, 1, 2, 1, 1])):
        kernel = adamw.squares(SIZES, most)
        sums = torch.empty(*kernel.grid, device=DEVICE)
        run_launch(kernel, [sums], *gradients)
        for got, gradient in zip(sums.split(parts), gradients, strict=True):
            assert relative_error(got.double().sum(), gradient.double().square().sum()) < 1e-6
