"""Bugs in the CPU's kernels of training: GEMMs, attention, AdamW, sums."""

from parity_tests.catalogue import Row

HERE = "tinygrad_impl"
CPU, PRODUCT, SUMS = f"{HERE}/cpu.py", f"{HERE}/gemm.c", f"{HERE}/sums.c"
ATTENTION, IN_C, FUNCTIONAL = f"{HERE}/cpu_attention.py", f"{HERE}/attention.c", f"{HERE}/functional.py"
ADAMW, OF_ADAMW = f"{HERE}/adamw.c", f"{HERE}/cpu_adamw.py"
IN_CPU, IN_ATTENTION = f"{HERE}/tests/test_cpu.py::test_", f"{HERE}/tests/test_cpu_attention.py::test_"
IN_ADAMW, IN_PLACE = f"{HERE}/tests/test_cpu_adamw.py::test_", f"{HERE}/tests/test_in_place.py::test_"
GRADIENTS, SAME = IN_ATTENTION + "attention_and_its_gradients", "parts_are_the_whole_bit_for_bit"

PLANTED: list[Row] = [
    (
        "cpu: parts end within a tile",
        CPU,
        "6 if M > N else 64",
        "4 if M > N else 64",
        IN_CPU + "sizes_parts_and_estimates",
    ),
    (
        "cpu: a part has as many operations as all of it",
        CPU,
        "operations // OPERATIONS))\n    part = round_up(ceildiv(longer",
        "OPERATIONS))\n    part = round_up(ceildiv(longer",
        IN_CPU + "sizes_parts_and_estimates",
    ),
    (
        "cpu: the gradient of a transposed matmul is not transposed",
        CPU,
        '_product(dc, a, "TN", *b.shape)',
        '_product(a, dc, "TN", *b.shape)',
        IN_CPU + "gradients_of_a_gemm",
    ),
    (
        "cpu: gradients of the head's padding are read",
        CPU,
        "(1, a.shape[1])",
        "(1, M)",
        IN_CPU + "head_and_its_gradients",
    ),
    (
        "gemm.c: only the last block of the matmul is stored",
        PRODUCT,
        "first ? sums[i][j] : *place + ",
        "",
        IN_CPU + "gemm",
    ),
    (
        "gemm.c: only the last block of the matmul is stored at the edges",
        PRODUCT,
        "first ? all[i][j] : c[i * CM + j] + all[i][j]",
        "all[i][j]",
        IN_CPU + "gemm",
    ),
    ("gemm.c: every tile has the rows of the first", PRODUCT, "part + t * TILE,", "part,", IN_CPU + "gemm"),
    (
        "gemm.c: the last rows are those of the first tile",
        PRODUCT,
        "whole * HIGH + least(i,",
        "least(i,",
        IN_CPU + "gemm",
    ),
    ("gemm.c: a square that is not transposed", PRODUCT, "step *= 2", "step *= 4", IN_CPU + "gemm"),
    ("gemm.c: what is past a panel is not 0", PRODUCT, "long whole = 0;", "long whole = depth & 1;", IN_CPU + "gemm"),
    ("gemm.c: no padding", PRODUCT, "= -__builtin_inf();", "= 0;", IN_CPU + "head_and_its_gradients"),
    (
        "gemm.c: padding only by a part of columns",
        PRODUCT,
        "right == N && m < bottom",
        "right == N && left && m < bottom",
        IN_CPU + "head_and_its_gradients",
    ),
    ("sums.c: the last block alone", SUMS, "total[j] += sum[j]", "total[j] = sum[j]", IN_CPU + "sums_of_columns"),
    ("sums.c: one running sum", SUMS, "ROWS = 64", "ROWS = 1 << 20", IN_CPU + "sums_of_columns_stay_exact"),
    ("attention.c: scores are not scaled", IN_C, " * (1 / __builtin_sqrt(D))", "", GRADIENTS),
    (
        "attention.c: a token does not see itself",
        IN_C,
        "s = first + i + 1; s < seen; s++) row[s] = 0",
        "s = first + i; s < seen; s++) row[s] = 0",
        GRADIENTS,
    ),
    (
        "attention.c: the largest score of the first vector",
        IN_C,
        "largest > scores ? largest : scores",
        "largest",
        IN_ATTENTION + "scores_that_overflow_exp",
    ),
    (
        "attention.c: what is not seen counts as the largest",
        IN_C,
        "row[s] = -__builtin_inf()",
        "(void)row",
        IN_ATTENTION + "scores_that_overflow_exp",
    ),
    ("attention.c: the gradient of scores is not centred", IN_C, "(of_s[s] - total)", "of_s[s]", GRADIENTS),
    ("attention.c: the gradient of scores is not scaled", IN_C, " * (T)(1 / __builtin_sqrt(D))", "", GRADIENTS),
    ("attention.c: only the last queries have gradients of keys", IN_C, "add = s < block;", "add = 0;", GRADIENTS),
    (
        "attention.c: a key's gradient is of later queries",
        IN_C,
        "s > block ? s - block : 0",
        "s > block ? s - block + HIGH : 0",
        GRADIENTS,
    ),
    ("attention.c: only the last sum of a long one", IN_C, "b += DEEP * bk, add = 1)", "b += DEEP * bk)", GRADIENTS),
    (
        "attention.c: parts have each other's heads",
        IN_C,
        "unit < UNITS; unit += PARTS)\n    forward",
        "unit < UNITS; unit += PARTS + (PARTS > 2))\n    forward",
        IN_ATTENTION + "heads_have_the_same_bits_on_any_number_of_threads",
    ),
    ("attention: gradients of k and v exchanged", ATTENTION, "found[:3]", "(found[0], found[2], found[1])", GRADIENTS),
    (
        "attention: float32 where bfloat16 is asked for",
        "tinygrad_impl/formulas.py",
        "q.dtype in cpu.TYPES:",
        "True:",
        IN_ATTENTION + "what_is_in_c",
    ),
    ("adamw.c: no rest of the factor", ADAMW, " + gradients[i] * rest", "", IN_ADAMW + "a_step_of_adamw"),
    (
        "adamw.c: eps inside the root",
        ADAMW,
        "__builtin_sqrt(v / correction2) + eps",
        "__builtin_sqrt(v / correction2 + eps)",
        IN_ADAMW + "a_step_of_adamw",
    ),
    (
        "adamw.c: the gap between parameters is changed",
        ADAMW,
        "first > segments[n].start ? first : segments[n].start",
        "n ? segments[n - 1].end : first",
        IN_ADAMW + "a_step_of_adamw",
    ),
    ("adamw.c: a part goes on to the end", ADAMW, "least(last, segments[n].end)", "segments[n].end", IN_ADAMW + SAME),
    (
        "adamw.c: one running sum of squares in float32",
        ADAMW,
        "double lanes[2 * LANES]",
        "T lanes[2 * LANES]",
        IN_ADAMW + "squares_stay_exact",
    ),
    (
        "adamw: decay of what follows what decays",
        OF_ADAMW,
        "{decay!r}",
        "{segments[0][2]!r}",
        IN_ADAMW + "a_step_of_adamw",
    ),
    (
        "adamw: parts end within a sum of squares",
        OF_ADAMW,
        "_parts(size, PIECE)",
        "_parts(size, ALIGNED)",
        IN_ADAMW + SAME,
    ),
    (
        "gradients are copied to where they stay",
        FUNCTIONAL,
        "is None or memory in places",
        "or True",
        IN_PLACE + "a_kernel_writes_to_the_total",
    ),
    (
        "a kernel's result for two totals is in one",
        FUNCTIONAL,
        " or memory in places",
        "",
        IN_PLACE + "one_kernel_for_two_totals",
    ),
    (
        "the embedding's gradient is a table of its own",
        FUNCTIONAL,
        "!= formulas.ADD_ROWS",
        "!= formulas.ADD_ROWS + ' '",
        IN_PLACE + "rows_of_the_embedding_are_added_to_the_heads_gradient",
    ),
]
