"""Bugs in the attention kernels for Hopper in Gluon, which has no interpreter: `python -m parity_tests.planted_on_gpu`.

None of them may leave a barrier that nobody passes, or a place outside of a tensor.
"""

from parity_tests.catalogue import Row

FORWARD = "tinygrad_impl/kernels/hopper_attention.py"
GRADIENT = "tinygrad_impl/kernels/hopper_attention_gradient.py"
TESTS = "tinygrad_impl/kernels/tests/test_hopper_attention.py"
ERROR = f"{TESTS}::test_error[5-3-384-5]"

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
        "Hopper attention: programs begin a block later than the ones before them end",
        FORWARD,
        "return heads * blocks + gl.minimum(",
        "return gl.minimum(program, 1) + heads * blocks + gl.minimum(0, 0) * gl.minimum(",
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
        "Hopper attention's gradient: dq of a block's second tile begins with another head's",
        GRADIENT,
        ">= (block + 1) * BLOCK, other=0.0)",
        ">= block * BLOCK, other=0.0)",
        ERROR,
    ),
    (
        "Hopper attention's gradient: the sum of dq is kept in one place for all programs",
        GRADIENT,
        "kept += gl.program_id(0) * (T * D)",
        "kept += gl.program_id(0) * 0",
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
        "Hopper attention's gradient: dq gets the first half of the keys twice",
        GRADIENT,
        "k = k_ring.index(kv * 2 + 1)",
        "k = k_ring.index(kv * 2)",
        ERROR,
    ),
]
