"""The gradient of the token embedding: rows summed by token, the same in every run.

Rows are sorted by token, so that a token's rows are a run. Programs sum equally many rows each,
because some tokens have most of the rows; what they have of runs that reach into others' rows is added up afterwards.
"""

import triton
import triton.language as tl

from tinygrad_impl.kernels.launch import Launch

SORTED = 1024  # rows of a block that is sorted by itself
SUMMED = 32  # rows that a program sums


@triton.jit
def sort_blocks(keys, tokens, R: tl.constexpr, BLOCK: tl.constexpr):
    """Sorts a block of rows by token. Keys are token * BLOCK + the row's place in its block: no two are equal.
    Places past the last row are sorted to the end.
    """
    i = tl.arange(0, BLOCK)
    r = tl.program_id(0) * BLOCK + i
    key = tl.load(tokens + r, mask=r < R, other=0) * BLOCK + i
    tl.store(keys + r, tl.sort(tl.where(r < R, key, 0x7FFFFFFF)))


@triton.jit
def merge_blocks(order, keys, R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    """A row's place is the number of rows before it, which a binary search finds in each of the BLOCKS; WIDTH is that
    rounded up to a power of 2.
    """
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) * ROWS // BLOCK
    key = tl.load(keys + place)
    token = key // BLOCK
    other = tl.arange(0, WIDTH)[None, :]
    bound = (token[:, None] + (other < block).to(tl.int32)) * BLOCK  # of equal tokens those of earlier blocks are first
    bound = tl.where(other == block, key[:, None], bound)  # (ROWS, WIDTH)
    below = tl.zeros((ROWS, WIDTH), tl.int32)  # how many keys are less, as far as known
    size = BLOCK
    while size > 0:
        half = tl.maximum(size // 2, 1)
        probe = tl.load(keys + other * BLOCK + below + half - 1, mask=other < BLOCKS, other=0x7FFFFFFF)
        below += tl.where(probe < bound, half, 0)
        size = size // 2
    tl.store(order + tl.sum(below, 1), block * BLOCK + key % BLOCK, mask=place < R)


@triton.jit
def token_at(place, order, tokens, R: tl.constexpr):
    """The token of the row at this place of the sorted order; -1 before the first and after the last."""
    inside = (place >= 0) & (place < R)
    row = tl.load(order + place, mask=inside, other=0)
    return tl.load(tokens + row, mask=inside, other=-1)


@triton.jit
def sum_runs(total, parts, order, tokens, rows, R: tl.constexpr, C: tl.constexpr, SUMMED: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """Adds the runs that begin and end here to total. parts (programs, 2, C): [0] is what is here of a run that began
    earlier, [1] of one that begins here and ends later.
    """
    first = tl.program_id(0) * SUMMED
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = parts + tl.program_id(0).to(tl.int64) * 2 * C + c
    token = token_at(first, order, tokens, R)
    begun = token_at(first - 1, order, tokens, R) == token  # the run began earlier
    summed = tl.zeros((BLOCK,), tl.float32)
    for place in range(first, tl.minimum(first + SUMMED, R)):
        row = tl.load(order + place).to(tl.int64)
        summed += tl.load(rows + row * C + c, mask=c < C)
        following = token_at(place + 1, order, tokens, R)
        ends = following != token
        if ends:
            if begun:
                tl.store(part, summed, mask=c < C)
            else:
                cell = total + token.to(tl.int64) * C + c
                tl.store(cell, tl.load(cell, mask=c < C) + summed, mask=c < C)
        summed = tl.where(ends, 0.0, summed)
        begun = begun & (following == token)
        token = following
    if token_at(first + SUMMED - 1, order, tokens, R) == token:  # the last run goes on
        tl.store(part + tl.where(begun, 0, C), summed, mask=c < C)


@triton.jit
def add_parts(total, parts, order, tokens, R: tl.constexpr, C: tl.constexpr, SUMMED: tl.constexpr, ROWS: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Adds runs that end elsewhere than they begin to total: a program's run is the last that begins in its rows."""
    first = tl.program_id(0) * SUMMED
    after = first + SUMMED
    token = token_at(after, order, tokens, R)
    goes_on = (token >= 0) & (token_at(after - 1, order, tokens, R) == token)
    if goes_on & (token_at(first - 1, order, tokens, R) != token):
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        summed = tl.load(parts + (tl.program_id(0).to(tl.int64) * 2 + 1) * C + c, mask=c < C)
        program = tl.program_id(0) + 1
        more = True
        while more:
            programs = program + tl.arange(0, ROWS)
            same = token_at(programs * SUMMED, order, tokens, R) == token
            inside = same[:, None] & (c[None, :] < C)
            part = tl.load(parts + programs[:, None].to(tl.int64) * 2 * C + c[None, :], mask=inside, other=0.0)
            summed += tl.sum(part, 0)
            program += ROWS
            more = tl.sum(same.to(tl.int32), 0) == ROWS
        cell = total + token.to(tl.int64) * C + c
        tl.store(cell, tl.load(cell, mask=c < C) + summed, mask=c < C)


def sort(R: int) -> tuple[Launch, Launch]:
    """keys int32 (R rounded up to SORTED,) <- tokens int32 (R,); then order int32 (R,) <- keys: the rows sorted by
    token, of equal tokens the earlier row first.
    """
    blocks, rows = triton.cdiv(R, SORTED), 64
    keys = Launch(sort_blocks, (blocks,), {"R": R, "BLOCK": SORTED}, 4, bytes=8 * R)
    constants = {"R": R, "ROWS": rows, "BLOCK": SORTED, "BLOCKS": blocks, "WIDTH": triton.next_power_of_2(blocks)}
    return keys, Launch(merge_blocks, (triton.cdiv(R, rows),), constants, 4, bytes=8 * R)


def sums(R: int, C: int) -> tuple[Launch, Launch]:
    """total float32 (V, C), parts float32 (programs, 2, C) <- total, order, tokens int32 (R,), rows float32 (R, C);
    then total <- total, parts, order, tokens. The rows are added to what is in total.
    """
    block = min(256, triton.next_power_of_2(C))
    grid = (triton.cdiv(R, SUMMED), triton.cdiv(C, block))
    constants = {"R": R, "C": C, "SUMMED": SUMMED, "BLOCK": block}
    runs = Launch(sum_runs, grid, constants, 2, bytes=4 * R * C)
    return runs, Launch(add_parts, grid, constants | {"ROWS": 16}, 2)
