"""AdamW (Loshchilov & Hutter 2019) and the gradient's norm, of many parameters, which lie in one range of memory; and
the sums of gradients over micro-batches.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from tinygrad_impl.kernels.launch import Launch

BLOCK = 2048  # elements of a program


@triton.jit
def adamw_kernel(
    ps, ms, vs, copies, gradients, scalars,
    SIZES: tl.constexpr, STARTS: tl.constexpr, DECAYS: tl.constexpr, COPIES: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale, rest, lr = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    correction1, correction2 = tl.load(scalars + 3), tl.load(scalars + 4)
    block = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):  # a program's blocks are those of one parameter
        if (block >= 0) & (block < tl.cdiv(SIZES[i], BLOCK)):
            element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            place, inside = STARTS[i] + element, element < SIZES[i]
            g = tl.load(gradients + place, mask=inside)
            p = tl.load(ps + place, mask=inside)
            g = g * scale + g * rest
            m = BETA1 * tl.load(ms + place, mask=inside) + (1 - BETA1) * g
            v = BETA2 * tl.load(vs + place, mask=inside) + (1 - BETA2) * g * g
            step = tl.div_rn(lr, correction1) * tl.div_rn(m, tl.sqrt_rn(tl.div_rn(v, correction2)) + EPS)
            p = p * (1 - lr * DECAYS[i]) - step
            tl.store(ps + place, p, mask=inside)
            if COPIES[i] is not None:
                tl.store(copies + COPIES[i] + element, p.to(tl.bfloat16), mask=inside)
            tl.store(ms + place, m, mask=inside)
            tl.store(vs + place, v, mask=inside)
        block -= tl.cdiv(SIZES[i], BLOCK)


@triton.jit
def squares_kernel(sums, gradients, SIZE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        element = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(gradients + element, mask=element < SIZE, other=0.0)
        total += g * g
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def rounding_kernel(copies, ps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(ps + element, mask=element < SIZE)
    tl.store(copies + element, p.to(tl.bfloat16), mask=element < SIZE)


@triton.jit
def adding_kernel(totals, values, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):
        if (block >= 0) & (block < tl.cdiv(SIZES[i], BLOCK)):
            element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = element < SIZES[i]
            total = tl.load(totals[i] + element, mask=inside) + tl.load(values[i] + element, mask=inside)
            tl.store(totals[i] + element, total, mask=inside)
        block -= tl.cdiv(SIZES[i], BLOCK)


def step(
    sizes: Sequence[int],
    starts: Sequence[int],
    decays: Sequence[float],
    copies: Sequence[int | None],
    beta1: float,
    beta2: float,
    eps: float,
) -> Launch:
    """p, m, v, bfloat16 copies of p <- the first three, gradients, scalars; all others float32. Each is one range, in
    which parameters of these sizes begin at `starts`; their copies begin at `copies`, which is None for those without.

    scalars are the factor of the gradients and the rest of it, the learning rate, 1 - beta1^t and 1 - beta2^t.
    """
    constants = {
        "SIZES": tuple(sizes),
        "STARTS": tuple(starts),
        "DECAYS": tuple(decays),
        "COPIES": tuple(copies),
        "BETA1": beta1,
        "BETA2": beta2,
        "EPS": eps,
    }
    grid = (sum(triton.cdiv(size, BLOCK) for size in sizes),)
    return Launch(adamw_kernel, grid, constants | {"BLOCK": BLOCK}, 8, bytes=30 * sum(sizes))


def rounding(size: int) -> Launch:
    """The first elements of copies bfloat16 <- p float32 (size,), rounded."""
    return Launch(rounding_kernel, (triton.cdiv(size, BLOCK),), {"SIZE": size, "BLOCK": BLOCK}, 8, bytes=6 * size)


def adding(sizes: Sequence[int]) -> Launch:
    """Totals float32 <- themselves, values float32: each total and its value have one of these sizes."""
    grid = (sum(triton.cdiv(size, BLOCK) for size in sizes),)
    constants = {"SIZES": tuple(sizes), "BLOCK": BLOCK}
    return Launch(adding_kernel, grid, constants, 8, bytes=12 * sum(sizes), groups=(len(sizes), len(sizes)))


def squares(size: int, most: int = 512) -> Launch:
    """sums float32 (programs,) <- gradients float32 (size,): their squares, added up in at most `most` pieces."""
    steps = max(1, triton.cdiv(size, BLOCK * most))
    grid = (triton.cdiv(size, BLOCK * steps),)
    return Launch(squares_kernel, grid, {"SIZE": size, "BLOCK": BLOCK, "STEPS": steps}, 8, bytes=4 * size)
