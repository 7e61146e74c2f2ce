"""The loss of bfloat16 logits, and their gradient in their place: float32 ones are never stored. Or the loss alone, and
whether the target is the likeliest token.

loss = logsumexp(row) - row[target], and its gradient softmax(row) - onehot(target), all in float32. Exponentials are to
base 2, of x log2(e), because that is what the hardware has.
"""

import math

import triton
import triton.language as tl

from tinygrad_impl.kernels.launch import Launch

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
WIDTH = tl.constexpr(8)  # neighbours that a thread loads at once: 16 bytes


@triton.jit
def load(row, v, V: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr):
    """Loads the logits of columns v (LANES, WIDTH), as float32. If MASKED, columns past the last are -inf."""
    if MASKED:  # whatever is stored there is read, so that threads still load WIDTH at once
        x = tl.where(v < V, tl.load(row + v, mask=v < STRIDE, other=0.0).to(tl.float32), float("-inf"))
    else:
        x = tl.load(row + v).to(tl.float32)
    return x


@triton.jit
def logsumexp(row, columns, V: tl.constexpr, STRIDE: tl.constexpr, LANES: tl.constexpr):
    """log2 of the sum of exp(x) over a row's V columns; `columns` (LANES, WIDTH) are the first of them."""
    BLOCK: tl.constexpr = LANES * WIDTH
    # A logsumexp for each lane, without a word between threads. Its largest so far is that of WIDTH columns or more, so
    # that few exponentials are spent on rescaling; it begins as a number, because -inf - -inf is none.
    top = tl.full((LANES,), -1e38, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in tl.static_range(0, V, BLOCK):  # unrolled, so that many loads are under way at once
        x = load(row, start + columns, V, STRIDE, start + BLOCK > V)
        higher = tl.maximum(top, tl.max(x, 1) * LOG2E)
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x * LOG2E - higher[:, None]), 1)
        top = higher
    highest = tl.max(top, 0)
    return highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))


@triton.jit
def cross_entropy_kernel(loss, logits, target, scale, FIRST: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr,
                         IGNORED: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """A program computes one row, which it reads twice, the second time from the cache."""
    BLOCK: tl.constexpr = LANES * WIDTH
    r = tl.program_id(0)
    row = logits + r.to(tl.int64) * STRIDE
    label = tl.load(target + FIRST + r)
    scored = label != IGNORED
    chosen = tl.load(row + tl.where(scored, label, 0)).to(tl.float32) * LOG2E
    columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]

    lse = logsumexp(row, columns, V, STRIDE, LANES)
    tl.store(loss + FIRST + r, tl.where(scored, (lse - chosen) * LN2, 0.0))

    factor = tl.where(scored, tl.load(scale), 0.0)
    tl.debug_barrier()  # every thread has read `chosen`
    for start in tl.static_range(0, STRIDE, BLOCK):
        v = start + columns
        x = load(row, v, V, STRIDE, start + BLOCK > V)
        gradient = (tl.exp2(x * LOG2E - lse) * factor).to(logits.dtype.element_ty)
        if start + BLOCK > STRIDE:
            tl.store(row + v, gradient, mask=v < STRIDE)
        else:
            tl.store(row + v, gradient)
    tl.debug_barrier()  # what was stored for the target is replaced
    at_target = (tl.exp2(chosen - lse) - 1) * factor
    tl.store(row + label, at_target.to(logits.dtype.element_ty), mask=scored)


@triton.jit
def token_loss_kernel(loss, likeliest, logits, target, FIRST: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr,
                      IGNORED: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """The loss alone of a row, and whether its target is the argmax: no logit is larger, none before it as large."""
    BLOCK: tl.constexpr = LANES * WIDTH
    r = tl.program_id(0)
    row = logits + r.to(tl.int64) * STRIDE
    token = tl.load(target + (FIRST + r))
    scored = token != IGNORED
    chosen = tl.load(row + tl.where(scored, token, 0)).to(tl.float32)
    columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    lse = logsumexp(row, columns, V, STRIDE, LANES)
    tl.store(loss + FIRST + r, tl.where(scored, (lse - chosen * LOG2E) * LN2, 0.0))

    ahead = tl.zeros((LANES,), tl.int32)
    for start in tl.static_range(0, V, BLOCK):
        x = load(row, start + columns, V, STRIDE, start + BLOCK > V)
        ahead = tl.maximum(ahead, tl.max(((x > chosen) | ((x == chosen) & (start + columns < token))).to(tl.int32), 1))
    tl.store(likeliest + FIRST + r, tl.where(scored & (tl.max(ahead, 0) == 0), 1, 0))


def forward(
    R: int,
    V: int,
    stride: int,
    ignored: int,
    first: int = 0,
    lanes: int = 512,
    warps: int = 16,
) -> Launch:
    """loss float32 (any,), in place of logits bfloat16 (R, stride) their gradient <- target int32 (any,), scale (1,).

    The logits are those of R rows from the `first`.
    V of a row's columns are logits; the others become 0. The loss and gradient of a target `ignored` are 0, the
    gradients of the others are multiplied by `scale`.
    """
    constants = {"FIRST": first, "V": V, "STRIDE": stride, "IGNORED": ignored, "LANES": lanes}
    return Launch(cross_entropy_kernel, (R,), constants, warps, bytes=4 * R * stride)


def of_tokens(R: int, V: int, stride: int, ignored: int, first: int = 0, lanes: int = 512, warps: int = 16) -> Launch:
    """loss float32 (any,), likeliest int32 (any,), logits bfloat16 (R, stride), as they were <- target int32 (any,).

    As `forward`, without the gradient; `likeliest` is 1 where the target is the argmax of its row (of equally large
    logits the first), else 0, as where it is `ignored`.
    """
    constants = {"FIRST": first, "V": V, "STRIDE": stride, "IGNORED": ignored, "LANES": lanes}
    return Launch(token_loss_kernel, (R,), constants, warps, bytes=2 * R * stride)
