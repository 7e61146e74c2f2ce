"""Bugs in the attention kernels for Hopper in Gluon, which has no interpreter: `python -m parity_tests.planted_on_gpu`.

None of them may leave a barrier that nobody passes, or a place outside of a tensor.
"""

from parity_tests.catalogue import Row

FORWARD = "tinygrad_impl/kernels/hopper_attention.py"
GRADIENT = "tinygrad_impl/kernels/hopper_attention_gradient.py"
TESTS = "tinygrad_impl/kernels/tests/test_hopper_attention.py"
ERROR = f"{TESTS}::test_error[5-1-640-3]"  # where programs of the forward pass begin within a head,
SHARED = f"{TESTS}::test_error[5-2-256-12]"  # and where those of the gradient do

PLANTED: list[Row] = [
    (
        "Hopper attention: the second warpgroup's queries do not see their own keys",
        FORWARD,
        "(rows + WHO * TILE)[:, None]",
        "rows[:, None]",
        ERROR,
    ),
    (
        "Hopper attention: the sum of exponentials does not shrink with a higher score",
        FORWARD,
        "total = total * shrink + gl.sum(p, 1)",
        "total = total + gl.sum(p, 1)",
        ERROR,
    ),
    (
        "Hopper attention: programs begin a block after the end of the program before them",
        FORWARD,
        "return cut(gl.program_id(0), B, T, H, PROGRAMS),",
        "return cut(gl.program_id(0), B, T, H, PROGRAMS) + gl.minimum(gl.program_id(0), 1),",
        ERROR,
    ),
    (
        "Hopper attention's gradient: a key is seen by the query before it",
        GRADIENT,
        "columns[None, :] >= rows[:, None]",
        "columns[None, :] + 1 >= rows[:, None]",
        ERROR,
    ),
    (
        "Hopper attention's gradient: dq of a block's second tile begins with what was in memory",
        GRADIENT,
        "mask=query >= block * 2 + 2,",
        "mask=query >= block * 2 + 1,",
        ERROR,
    ),
    (
        "Hopper attention's gradient: two numbers of dq are kept in one place",
        GRADIENT,
        "+ rows % 8 * 8 +",
        "+ rows % 8 * 7 +",
        ERROR,
    ),
    (
        "Hopper attention's gradient: dq that is passed on is kept where that of the other heads is",
        GRADIENT,
        "gl.where(head == end // (T // BLOCK), T * D, 0)",
        "gl.where(head == end // (T // BLOCK), 0, 0)",
        SHARED,
    ),
    (
        "Hopper attention's gradient: dq that was passed on is not gone on with",
        GRADIENT,
        "if head * (T // BLOCK) < first:",
        "if head * (T // BLOCK) < 0:",
        SHARED,
    ),
    (
        "Hopper attention's gradient: a head that was passed on is passed on for ever",
        GRADIENT,
        "gl.store(passed + gl.program_id(0) - 1, 0)",
        "gl.store(passed + gl.program_id(0) - 1, 1)",
        SHARED,
    ),
    (
        "Hopper attention's forward pass leaves what was in memory for the gradient",
        FORWARD,
        "gl.store(passed + gl.program_id(0), 0)",
        "gl.store(passed + gl.program_id(0), 1)",
        SHARED,
    ),
    (
        "Hopper attention's gradient: dq gets the first half of the keys twice",
        GRADIENT,
        "k = k_ring.index(kv * 2 + 1)",
        "k = k_ring.index(kv * 2)",
        ERROR,
    ),
    (
        "Hopper attention's gradient: delta of the tile of queries before",
        GRADIENT,
        "delta + query, count, mine, k, v,",
        "delta + query - TILE, count, mine, k, v,",
        ERROR,
    ),
    (
        "Hopper attention's gradient: delta of a block's two tiles is exchanged",
        GRADIENT,
        "+ block * BLOCK + half * TILE + row + rows",
        "+ block * BLOCK + (1 - half) * TILE + row + rows",
        ERROR,
    ),
]
