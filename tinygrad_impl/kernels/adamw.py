"""AdamW (Loshchilov & Hutter 2019) and the gradient's norm, of many parameters in one launch."""

from collections.abc import Sequence

import triton
import triton.language as tl

from tinygrad_impl.kernels.launch import Launch

BLOCK = 2048  # elements of a program


@triton.jit
def adamw_kernel(ps, ms, vs, gradients, scalars, SIZES: tl.constexpr, DECAYS: tl.constexpr, BETA1: tl.constexpr,
                 BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
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
            tl.store(ps[i] + place, p * (1 - lr * DECAYS[i]) - step, mask=inside)
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


def step(sizes: Sequence[int], decays: Sequence[float], beta1: float, beta2: float, eps: float) -> Launch:
    """p, m, v <- themselves, gradients, scalars, all float32: of each of the first four as many as there are sizes.

    scalars are the factor of the gradients and the rest of it, the learning rate, 1 - beta1^t and 1 - beta2^t.
    """
    constants = {"SIZES": tuple(sizes), "DECAYS": tuple(decays), "BETA1": beta1, "BETA2": beta2, "EPS": eps}
    grid = (sum(triton.cdiv(size, BLOCK) for size in sizes),)
    n = len(sizes)
    return Launch(adamw_kernel, grid, constants | {"BLOCK": BLOCK}, 8, bytes=28 * sum(sizes), groups=(n, n, n, n, 0))


def squares(sizes: Sequence[int], most: int = 512) -> Launch:
    """sums float32 (programs,) <- gradients float32 of these sizes: their squares, added up in about `most` parts."""
    steps = max(1, triton.cdiv(sum(sizes), BLOCK * most))
    grid = (sum(triton.cdiv(size, BLOCK * steps) for size in sizes),)
    constants = {"SIZES": tuple(sizes), "BLOCK": BLOCK, "STEPS": steps}
    return Launch(squares_kernel, grid, constants, 8, bytes=4 * sum(sizes), groups=(0, len(sizes)))
