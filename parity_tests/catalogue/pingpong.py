"""Bugs in the kernels for Hopper in Gluon, which has no interpreter: `python -m parity_tests.planted_on_gpu`.

None of them may leave a barrier that nobody passes, or a place outside of a tensor.
"""

from parity_tests.catalogue import Row

PINGPONG, TESTS = "tinygrad_impl/kernels/pingpong.py", "tinygrad_impl/kernels/tests/test_pingpong.py"
FORWARD, GRADIENT = f"{TESTS}::test_gelu[3-1000-448-320]", f"{TESTS}::test_gelu_gradient[GELU again-3-1000-448-320]"

PLANTED: list[Row] = [
    (
        "Hopper: the last group of rows of tiles counts as full",
        PINGPONG,
        "rows = gl.minimum(tiles_m - group * GROUP, GROUP)",
        "rows = gl.minimum(tiles_m, GROUP)",
        f"{TESTS}::test_gelu[3-2100-192-704]",
    ),
    (
        "Hopper: all columns of a tile get the biases of the first",
        PINGPONG,
        "gl.load(vector + columns, mask=columns < N, other=0.0)[None, :]",
        "gl.load(vector + n + (columns - n) % 32, mask=columns < N, other=0.0)[None, :]",
        FORWARD,
    ),
    (
        "Hopper: a layer without GELU gets no bias",
        PINGPONG,
        'if EPILOGUE == "bias" or EPILOGUE == "gelu":\n        values',
        'if EPILOGUE == "gelu":\n        values',
        f"{TESTS}::test_without_gelu[3-1000-448-320]",
    ),
    (
        "Hopper: GELU of what is not rounded yet",
        PINGPONG,
        "values = scaled - (scaled - values)",
        "values = values",
        FORWARD,
    ),
    (
        "Hopper: GELU is stored in the place of what it was given",
        PINGPONG,
        "tma.async_copy_shared_to_global(y_map, [m, n], y_tile)",
        "tma.async_copy_shared_to_global(out_map, [m, n], y_tile)",
        FORWARD,
    ),
    (
        "Hopper: GELU's input is that of the tile's first columns",
        PINGPONG,
        "x_map, [m, n + i * WIDTH],",
        "x_map, [m, n],",
        f"{TESTS}::test_gelu_gradient[GELU again-3-1024-3072-768]",
    ),
    (
        "Hopper: a slope of GELU without the cube's three",
        PINGPONG,
        "0.2140644488 * square",
        "0.0713548163 * square",
        GRADIENT,
    ),
    (
        "Hopper: sums of what GELU's slope has not been multiplied with",
        PINGPONG,
        "gl.sum(values, 0), mask",
        "gl.sum(values / slope, 0), mask",
        GRADIENT,
    ),
    (
        "Hopper: GELU that is kept is taken for its input",
        "tinygrad_impl/kernels/operations.py",
        "[x] = again or [x]",
        "[x] = again or [hidden]",
        "tinygrad_impl/kernels/tests/test_fused.py::test_proof",
    ),
    (
        "Hopper: GELU that is computed again is taken for its input",
        "tinygrad_impl/kernels/operations.py",
        "[x] = again or [x]",
        "[x] = [hidden] if again else [x]",
        "tinygrad_impl/kernels/tests/test_fused.py::test_proof_where_gelu_is_computed_again",
    ),
    (
        "Hopper: all tiles take the first columns of the second operand",
        PINGPONG,
        "b_place = [n, k] if B_TRANSPOSED else [k, n]",
        "b_place = [n, k] if B_TRANSPOSED else [k, n % BN]",
        FORWARD,
    ),
]
