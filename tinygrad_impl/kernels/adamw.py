"""AdamW (Loshchilov & Hutter 2019) and the gradient's norm, of many parameters in one launch."""

from collections.abc import Sequence

import triton
import triton.language as tl

from tinygrad_impl.kernels.launch import Launch

BLOCK = 2048  # elements of a program


@triton.jit
def adamw_kernel(
    ps, ms, vs, halves, gradients, scalars,
    SIZES: tl.constexpr, DECAYS: tl.constexpr, HALVES: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale, rest, lr = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    correction1, correction2 = tl.load(scalars + 3), tl.load(scalars + 4)
    block = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):  # a program's blocks are those of one parameter
        if (block >= 0) & (block < tl.cdiv(SIZES[i], BLOCK)):
            place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = place < SIZES[i]
            g = tl.load(gradients[i] + place, mask=inside)
            p = tl.load(ps[i] + place, mask=inside)
            g = g * scale + g * rest
            m = BETA1 * tl.load(ms[i] + place, mask=inside) + (1 - BETA1) * g
            v = BETA2 * tl.load(vs[i] + place, mask=inside) + (1 - BETA2) * g * g
            step = tl.div_rn(lr, correction1) * tl.div_rn(m, tl.sqrt_rn(tl.div_rn(v, correction2)) + EPS)
            p = p * (1 - lr * DECAYS[i]) - step
            tl.store(ps[i] + place, p, mask=inside)
            if HALVES[i] is not None:
                tl.store(halves[HALVES[i]] + place, p.to(tl.bfloat16), mask=inside)
            tl.store(ms[i] + place, m, mask=inside)
            tl.store(vs[i] + place, v, mask=inside)
        block -= tl.cdiv(SIZES[i], BLOCK)


@triton.jit
def squares_kernel(sums, gradients, SIZES: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    block = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):
        if (block >= 0) & (block < tl.cdiv(SIZES[i], BLOCK * STEPS)):
            total = tl.zeros((BLOCK,), tl.float32)
            for step in range(STEPS):
                place = (block.to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
                g = tl.load(gradients[i] + place, mask=place < SIZES[i], other=0.0)
                total += g * g
            tl.store(sums + tl.program_id(0), tl.sum(total, 0))
        block -= tl.cdiv(SIZES[i], BLOCK * STEPS)


def step(
    sizes: Sequence[int], decays: Sequence[float], halves: Sequence[int | None], beta1: float, beta2: float, eps: float
) -> Launch:
    """p, m, v, bfloat16 copies of p <- the first three, gradients, scalars; all others float32. There are as many p, m,
    v and gradients as sizes; `halves` says which of the copies is a parameter's, None where it has none.

    scalars are the factor of the gradients and the rest of it, the learning rate, 1 - beta1^t and 1 - beta2^t.
    """
    constants = {
        "SIZES": tuple(sizes),
        "DECAYS": tuple(decays),
        "HALVES": tuple(halves),
        "BETA1": beta1,
        "BETA2": beta2,
        "EPS": eps,
    }
    grid = (sum(triton.cdiv(size, BLOCK) for size in sizes),)
    n, copies = len(sizes), len(halves) - halves.count(None)
    return Launch(
        adamw_kernel, grid, constants | {"BLOCK": BLOCK}, 8, bytes=30 * sum(sizes), groups=(n, n, n, copies, n, 0)
    )


def squares(sizes: Sequence[int], most: int = 512) -> Launch:
    """sums float32 (programs,) <- gradients float32 of these sizes: their squares, added up in about `most` parts."""
    steps = max(1, triton.cdiv(sum(sizes), BLOCK * most))
    grid = (sum(triton.cdiv(size, BLOCK * steps) for size in sizes),)
    constants = {"SIZES": tuple(sizes), "BLOCK": BLOCK, "STEPS": steps}
    return Launch(squares_kernel, grid, constants, 8, bytes=4 * sum(sizes), groups=(0, len(sizes)))
