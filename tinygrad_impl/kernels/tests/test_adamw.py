"""AdamW and the norm's sums, of parameters of all sizes in one range of memory, against float64."""

import torch

from tinygrad_impl.kernels import adamw
from tinygrad_impl.kernels.launch import Launch
from tinygrad_impl.kernels.tests.support import DEVICE, relative_error, run_launch

SIZES = [adamw.BLOCK, 1, 3 * adamw.BLOCK + 5, 64, 2 * adamw.BLOCK]
STARTS = [0, adamw.BLOCK, adamw.BLOCK + 64, 4 * adamw.BLOCK + 128, 4 * adamw.BLOCK + 192]  # with gaps in between
END = STARTS[-1] + SIZES[-1]
COPIES = [0, None, adamw.BLOCK, 4 * adamw.BLOCK + 64, None]
DECAYS = [0.1, 0.0, 0.0, 3.0, 0.02]
BETAS, EPS = (0.8, 0.95), 1e-3


def random(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def in_one_range(tensors: list[torch.Tensor]) -> torch.Tensor:
    """What is between them is NaN, which nobody may read."""
    memory = torch.full((END,), float("nan"), device=DEVICE)
    for start, tensor in zip(STARTS, tensors, strict=True):
        memory[start : start + len(tensor)] = tensor
    return memory


def parts(memory: torch.Tensor) -> list[torch.Tensor]:
    return [memory[start : start + size] for start, size in zip(STARTS, SIZES, strict=True)]


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
    scalars = torch.tensor([0.7, 1e-3, 0.03, 1 - BETAS[0] ** 3, 1 - BETAS[1] ** 3], device=DEVICE)
    states = list(zip(ps, ms, vs, gradients, strict=True))
    truth = [step(tuple(t.double() for t in state), scalars, d) for state, d in zip(states, DECAYS, strict=True)]
    by_torch = [step(state, scalars, d) for state, d in zip(states, DECAYS, strict=True)]

    memory = [in_one_range(tensors) for tensors in (ps, ms, vs, gradients)]
    copies = torch.full((COPIES[3] + SIZES[3] + 64,), -7.0, dtype=torch.bfloat16, device=DEVICE)  # type: ignore[operator]
    *changed, gradient = memory
    call(adamw.step(SIZES, STARTS, DECAYS, COPIES, *BETAS, EPS), *changed, copies, gradient, scalars)
    untouched = torch.ones(len(copies), dtype=torch.bool)
    for i, got in enumerate(zip(*map(parts, changed), strict=True)):
        for value, reference, true in zip(got, by_torch[i], truth[i], strict=True):
            # 2^-24 is what rounding to float32 alone may cost
            assert relative_error(value, true) <= 1.5 * relative_error(reference, true) + 2**-24
        if (start := COPIES[i]) is not None:
            assert torch.equal(copies[start : start + SIZES[i]], got[0].bfloat16())
            untouched[start : start + SIZES[i]] = False
    assert (copies[untouched] == -7).all()
    for all_of_it in memory:
        assert int(all_of_it.isnan().sum()) == END - sum(SIZES)


def test_adding() -> None:
    """To each total its own value, and nothing past the end of either."""
    totals, values = ([random(size + 1, 10 * kind + i) for i, size in enumerate(SIZES)] for kind in range(2))
    before = [total.clone() for total in totals]
    call(adamw.adding(SIZES), *totals, *values)
    for total, value, old, size in zip(totals, values, before, SIZES, strict=True):
        assert torch.equal(total[:size], (old + value)[:size])
        assert total[size] == old[size]


def test_squares() -> None:
    gradient = random(3 * adamw.BLOCK + 5, 0)
    for most, count in ((512, 4), (4, 4), (3, 2), (1, 1)):
        kernel = adamw.squares(len(gradient), most)
        sums = torch.full(kernel.grid, torch.nan, device=DEVICE)
        run_launch(kernel, [sums], gradient)
        assert len(sums) == count
        assert relative_error(sums.double().sum(), gradient.double().square().sum()) < 1e-6
