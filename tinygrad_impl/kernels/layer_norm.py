"""Layer norm (Ba et al. 2016) of the float32 residual stream, with the addition before it, forward and backward.

y = (s - mean) rstd weight + bias, with s = x + a where a layer's output a, in bfloat16, is added to the stream. Bound
by memory: each tensor is read or written once, a program having whole rows in its registers.
"""

import triton
import triton.language as tl

from tinygrad_impl.kernels import GPU
from tinygrad_impl.kernels.launch import Launch

REGISTERS = 1 << 16  # of a multiprocessor


@triton.jit
def norm_forward(s, y, mean, rstd, x, a, weight, bias, R: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    place, inside = r[:, None].to(tl.int64) * C + c[None, :], (r[:, None] < R) & (c[None, :] < C)
    total = tl.load(x + place, mask=inside, other=0.0)
    total += tl.load(a + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(s + place, total, mask=inside)
    normalise(y, mean, rstd, total, weight, bias, r, c, place, inside, R, C, EPS)


@triton.jit
def norm_forward_alone(y, mean, rstd, x, weight, bias, R: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
                       ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    place, inside = r[:, None].to(tl.int64) * C + c[None, :], (r[:, None] < R) & (c[None, :] < C)
    normalise(y, mean, rstd, tl.load(x + place, mask=inside, other=0.0), weight, bias, r, c, place, inside, R, C, EPS)


@triton.jit
def normalise(y, mean, rstd, x, weight, bias, r, c, place, inside, R: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr):
    average = tl.sum(x, 1) / C  # (ROWS,)
    centred = tl.where(inside, x - average[:, None], 0.0)
    inverse = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / C + EPS)
    w = tl.load(weight + c, mask=c < C, other=0.0)
    out = centred * inverse[:, None] * w[None, :] + tl.load(bias + c, mask=c < C, other=0.0)[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + r, average, mask=r < R)
    tl.store(rstd + r, inverse, mask=r < R)


@triton.jit
def norm_backward(dx, dx16, y, sums, dy, past, s, mean, rstd, weight, bias, R: tl.constexpr, C: tl.constexpr,
                  PAST: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dx = past + the derivative of the norm, past (R, C) being the gradient that reaches s by other ways (if PAST).

    y is the norm once more. sums (programs, 3C) are this program's parts of the gradients of weight and bias, and of
    dx16 summed over rows, which is the gradient of the bias of the layer before.
    """
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, mask=c < C, other=0.0)[None, :]
    weight_sum, bias_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    before_sum = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        r = (step * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        place, inside = r[:, None].to(tl.int64) * C + c[None, :], (r[:, None] < R) & (c[None, :] < C)
        gradient = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        average, inverse = tl.load(mean + r, mask=r < R, other=0.0), tl.load(rstd + r, mask=r < R, other=0.0)
        normal = tl.where(inside, tl.load(s + place, mask=inside, other=0.0) - average[:, None], 0.0) * inverse[:, None]
        b = tl.load(bias + c, mask=c < C, other=0.0)[None, :]  # each time, since registers are short
        tl.store(y + place, (normal * w + b).to(y.dtype.element_ty), mask=inside)
        weight_sum += tl.sum(gradient * normal, 0)
        bias_sum += tl.sum(gradient, 0)
        gradient *= w
        along = tl.sum(gradient * normal, 1) / C  # (ROWS,)
        total = (gradient - (tl.sum(gradient, 1) / C)[:, None] - normal * along[:, None]) * inverse[:, None]
        if PAST:
            total += tl.load(past + place, mask=inside, other=0.0)
        tl.store(dx + place, total, mask=inside)
        rounded = total.to(dx16.dtype.element_ty)
        tl.store(dx16 + place, rounded, mask=inside)
        before_sum += tl.sum(tl.where(inside, rounded.to(tl.float32), 0.0), 0)
    sums += tl.program_id(0) * 3 * C + c
    tl.store(sums, weight_sum, mask=c < C)
    tl.store(sums + C, bias_sum, mask=c < C)
    tl.store(sums + 2 * C, before_sum, mask=c < C)


def forward(R: int, C: int, eps: float, added: bool, rows: int = 4, warps: int = 4) -> Launch:
    """s float32, y bfloat16 (R, C), mean, rstd float32 (R,) <- x float32, a bfloat16 (R, C), weight, bias float32 (C,).

    Not `added`, there are no s and a.
    """
    constants = {"R": R, "C": C, "EPS": eps, "ROWS": rows, "BLOCK": triton.next_power_of_2(C)}
    kernel, moved = (norm_forward, 12 * R * C) if added else (norm_forward_alone, 6 * R * C)
    return Launch(kernel, (triton.cdiv(R, rows),), constants, warps, bytes=moved)


def backward(gpu: GPU, R: int, C: int, past: bool) -> Launch:
    """dx float32, dx and y bfloat16 (R, C), sums float32 (programs, 3C) <- dy bfloat16 (R, C), past float32 (R, C) (s
    again, if there is none), s, mean, rstd, weight, bias.
    """
    rows, warps, each = (4, 4, 3) if C <= 1024 else (1, 4, 4)  # rows at a time; programs of a multiprocessor
    programs = min(each * gpu.multiprocessors, triton.cdiv(R, rows))
    constants = {"R": R, "C": C, "PAST": past, "STEPS": triton.cdiv(R, programs * rows), "ROWS": rows}
    constants |= {"BLOCK": triton.next_power_of_2(C)}
    registers = min(255, REGISTERS // (each * warps * 32) // 8 * 8)
    return Launch(norm_backward, (programs,), constants, warps, bytes=(14 + 4 * past) * R * C, registers=registers)
