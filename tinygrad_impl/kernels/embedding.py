"""The gradient of an embedding: rows summed by token, in the order of the rows, so that it is the same in every run."""

import triton
import triton.language as tl

from tinygrad_impl.kernels.launch import Launch


@triton.jit
def token_order(order, tokens, R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A stable sort: a row's place is the number of rows that come before it, found by comparing all with all."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.load(tokens + r, mask=r < R, other=0)
    place = tl.zeros((ROWS,), tl.int32)
    for start in range(0, R, BLOCK):
        other = start + tl.arange(0, BLOCK)
        compared = tl.load(tokens + other, mask=other < R, other=0x7FFFFFFF)[None, :]  # past all others
        # of equal tokens the one in the earlier row comes first
        before = tl.where(other[None, :] < r[:, None], compared <= token[:, None], compared < token[:, None])
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(order + place, r, mask=r < R)


@triton.jit
def embedding_gradient(
    total, order, tokens, rows, R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Each program whose place in the order is the first of a token writes that token's sum."""
    place = tl.program_id(0)
    token = tl.load(tokens + tl.load(order + place))
    before = tl.load(tokens + tl.load(order + tl.maximum(place - 1, 0)))
    if (place == 0) | (before != token):
        c = tl.arange(0, BLOCK)
        summed = tl.zeros((BLOCK,), tl.float32)
        more = True
        while more:
            places = place + tl.arange(0, ROWS)
            row = tl.load(order + places, mask=places < R, other=0)
            same = (places < R) & (tl.load(tokens + row) == token)
            place_of = row[:, None].to(tl.int64) * C + c[None, :]
            summed += tl.sum(tl.load(rows + place_of, mask=same[:, None] & (c[None, :] < C), other=0.0), 0)
            place += ROWS
            more = tl.sum(same.to(tl.int32), 0) == ROWS
        tl.store(total + token.to(tl.int64) * C + c, summed, mask=c < C)


def order(R: int) -> Launch:
    """order int32 (R,) <- tokens int32 (R,): the rows, sorted by token."""
    return Launch(token_order, (triton.cdiv(R, 32),), {"R": R, "ROWS": 32, "BLOCK": 256}, bytes=8 * R)


def gradient(R: int, C: int) -> Launch:
    """total float32 (V, C), of which only rows of tokens that occur are written <- order, tokens, rows float32 (R, C)."""
    constants = {"R": R, "C": C, "ROWS": 8, "BLOCK": triton.next_power_of_2(C)}
    return Launch(embedding_gradient, (R,), constants, bytes=4 * R * C)
