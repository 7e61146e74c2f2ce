"""Bugs in the CPU's decoder."""

from parity_tests.catalogue import Row

KERNEL, DECODER = "tinygrad_impl/decode.c", "tinygrad_impl/cpu_decode.py"
IN = "tinygrad_impl/tests/test_cpu_decode.py::test_"
LOGITS, BITS = IN + "logits", IN + "the_bits_are_the_same_for_any_threads_chunks_and_company"

PLANTED: list[Row] = [
    ("decode.c: layer norm without epsilon", KERNEL, "square / C + EPS", "square / C", LOGITS),
    ("decode.c: a token sees the next slot", KERNEL, "m->positions[r] + 1;", "least(P, m->positions[r] + 2);", LOGITS),
    (
        "decode.c: a token does not see itself",
        KERNEL,
        "m->positions[r] + 1;",
        "m->positions[r] + !m->positions[r];",
        LOGITS,
    ),
    ("decode.c: the last products are lost", KERNEL, "block < parts(K, DEEP)", "block < K / DEEP", LOGITS),
    ("decode.c: scores by the width of all heads", KERNEL, "__builtin_sqrt(D)", "__builtin_sqrt(C)", LOGITS),
    (
        "decode.c: keys of another text",
        KERNEL,
        "*keys = l->keys + (m->texts[g] * H",
        "*keys = l->keys + (g * H",
        LOGITS,
    ),
    ("decode.c: GELU of the other sign", KERNEL, "m->erfc(-0.7", "m->erfc(0.7", LOGITS),
    (
        "decode.c: the MLP without its bias",
        KERNEL,
        "out[i] += bias[n + i]",
        "out[i] += N == INNER ? 0 : bias[n + i]",
        LOGITS,
    ),
    ("vectors.h: exp with log(2) in one part", "tinygrad_impl/vectors.h", " - k * 0x1.cf79abc9e3b39p-40", "", LOGITS),
    ("decode.c: the last row of a tile is lost", KERNEL, "bottom - top, width, 5)", "bottom - top, width, 4)", BITS),
    (
        "decode.c: the last columns of a tile are lost",
        KERNEL,
        "least(TILE, right - n)",
        "least(TILE, right - n - 1)",
        BITS,
    ),
    (
        "decode.c: nobody waits for the others",
        KERNEL,
        "wait_for(p++, all, m->yield);",
        "p++;",
        IN + "a_phase_waits_for_what_others_have_begun",
    ),
    ("decode.c: ReLU of NaN is 0", KERNEL, "(x < 0 ? 0 : x)", "(x > 0 ? x : 0)", IN + "what_is_not_a_number_is_seen"),
    (
        "the CPU's decoder: an untied head is not seen",
        DECODER,
        'weights.get("lm_head.weight", weights["wte.weight"])',
        'weights["wte.weight"]',
        LOGITS,
    ),
    ("the CPU's decoder: no last position", DECODER, "positions < self.P", "positions < self.P - 1", LOGITS),
    ("the CPU's decoder: computes once", DECODER, 'self.memory["phases"][:] = 0', "pass", LOGITS),
    (
        "the CPU's decoder: the first rows have the last one's logits",
        DECODER,
        "logits[start:].ctypes",
        "logits.ctypes",
        IN + "more_rows_than_are_computed_at_once",
    ),
    (
        "the CPU's decoder: one thread",
        "tinygrad_impl/internals.py",
        "ctypes.c_uint64(address)) for _ in range(1, NUM_CPU_THREADS.value)",
        "ctypes.c_uint64(address)) for _ in range(1, 1)",
        IN + "every_thread_takes_part",
    ),
    (
        "the CPU's decoder: float32 where bfloat16 is asked for",
        "tinygrad_impl/backend.py",
        "formulas.is_cpu(weight) and self.dtype is None and",
        "formulas.is_cpu(weight) and",
        IN + "which_decoder",
    ),
    (
        "generate: a shorter chunk is a graph of its own",
        "tinygrad_impl/cached_model.py",
        "Tensor(padded(tokens, self.chunk))",
        "Tensor(tokens)",
        "tinygrad_impl/tests/test_generate.py::test_nothing_is_compiled_anew",
    ),
]
