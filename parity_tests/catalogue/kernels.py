"""Bugs in the Triton kernels, and in what launches them."""

from parity_tests.catalogue import Row

KERNELS = "tinygrad_impl/kernels"
TESTS = f"{KERNELS}/tests"

DECODE, DECODED = f"{KERNELS}/decode.py", f"{TESTS}/test_decode.py"
LOGITS, TEXTS = f"{DECODED}::test_logits", f"{DECODED}::test_texts_are_those_of_the_reference"
DRAWN = f"{DECODED}::test_tokens_are_those_of_the_sampler"
ONE, DEEP, SEVERAL = (
    f"{LOGITS}[1-1-64-4-131-70-127-4-1e-05]",
    f"{LOGITS}[2-12-64-1-3-3-2-1-1e-05]",
    f"{LOGITS}[3-1-64-4-131-66-128-3-0.001]",
)
WIDE, MANY = f"{LOGITS}[5-1-192-3-4-2-3-1-0.1]", f"{LOGITS}[65-1-64-2-4-3-1-1-0.001]"
FEW = f"{LOGITS}[17-1-64-2-4-3-1-1-1e-05]"
MATMUL, MATMULS = f"{KERNELS}/matmul.py", f"{TESTS}/test_matmul.py"
NORM, NORMS = f"{KERNELS}/layer_norm.py", f"{TESTS}/test_layer_norm.py::test_forward_and_backward"
ATTENTION, ATTENTIONS = f"{KERNELS}/attention.py", f"{TESTS}/test_attention.py::test_error"
LOSS, LOSSES = f"{KERNELS}/cross_entropy.py", f"{TESTS}/test_cross_entropy.py"
EMBEDDING, EMBEDDINGS = f"{KERNELS}/embedding.py", f"{TESTS}/test_embedding.py"
ADAMW, ADAMWS = f"{KERNELS}/adamw.py", f"{TESTS}/test_adamw.py"
FUSED, GRAPHS = f"{KERNELS}/fused.py", f"{TESTS}/test_fused.py"
CHOICE, CHOICES = f"{KERNELS}/__init__.py", f"{TESTS}/test_choice.py"
LAUNCH, LAUNCHES = f"{KERNELS}/launch.py", f"{TESTS}/test_launch.py"
GRAPH = f"{KERNELS}/graph.py"

PLANTED: list[Row] = [
    ("all rows draw by one number", DECODE, "tl.load(steps + row) * N + row) * kept", "tl.load(steps + row) * N) * kept", f"{TEXTS}[settings1]"),
    ("each step draws by the first numbers", DECODE, "tl.load(numbers + tl.load(steps + row) * N + row)", "tl.load(numbers + row)", f"{TEXTS}[settings2]"),
    ("the last slot of the cache is not written", DECODE, "(position < P)[:, None]", "(position < P - 1)[:, None]", FEW),
    ("padding is written past the cache", DECODE, "kept = inside & (position < P)[:, None]", "kept = inside", FEW),
    ("rows past the last whole tile are left out", DECODE, "grid = triton.cdiv(writes, columns), triton.cdiv(R, rows)", "grid = triton.cdiv(writes, columns), max(1, R // rows)", MANY),
    ("the stream is rounded to bfloat16", DECODE, "tl.store(out + place, total, mask=inside)", "tl.store(out + place, total.to(tl.bfloat16).to(tl.float32), mask=inside)", DEEP),
    ("a token does not see itself in the cache", DECODE, "s[None, :] <= (held + i)[:, None]", "s[None, :] < (held + i)[:, None]", FEW),
    ("the last slot of the cache is not read", DECODE, "tl.minimum(first + ROWS, T), P)", "tl.minimum(first + ROWS, T), P - 1)", FEW),
    ("sums of exponentials of other blocks keep their old maximum", DECODE, "total = total * kept + tl.sum(p, 1)", "total = total + tl.sum(p, 1)", SEVERAL),
    ("generation's layer norm has its own epsilon", DECODE, '"EPS": config.layer_norm_epsilon', '"EPS": 1e-5', WIDE),
    ("the variance between blocks counts each block once", DECODE, "square + C // blocks * centred * centred", "square + centred * centred", SEVERAL),
    ("only the first part of a sum over the width", DECODE, "for start in range(0, K, BK):", "for start in range(0, BK, BK):", WIDE),
    ("attention of generation does not wait for its queries", DECODE, "held = tl.load(lengths + n)\n    wait(EARLY)", "held = tl.load(lengths + n)", SEVERAL),
    ("the stream is read before all that writes it has ended", DECODE, "    wait(EARLY)\n    b += tl.load(x + place)", "    b += tl.load(x + place)\n    wait(EARLY)", SEVERAL),
    ("top-k keeps one token more", DECODE, "tl.minimum(top_k, V) - 1, True", "tl.minimum(top_k, V), True", f"{DRAWN}[settings1]"),
    ("-0 is less than 0", DECODE, "tl.where(logit == 0, 0.0, logit).to(", "logit.to(", f"{DRAWN}[settings0]"),
    ("a draw at a border between tokens counts as certain", DECODE, "certain = certain & (target - before > total * CLOSE) & (", "certain = certain & (", f"{DECODED}::test_it_says_where_rounding_decides"),
    ("a step uses up one number for all rows", DECODE, "sampler.random.random(self.N)  # now", "sampler.random.random(1)  # now", f"{TEXTS}[settings0]"),
    ("top-p is not passed to the kernels", DECODE, "sampler.top_k or 0, sampler.top_p or 1", "sampler.top_k or 0, 1", f"{TEXTS}[settings3]"),
    ("a layer's last matrix is not brought up to date", DECODE, "slice(first, first + layer if first else 1)", "slice(first, first + layer - 1 if first else 1)", f"{DECODED}::test_weights_that_have_changed"),
    ("the chance of a token is not divided by the sum", DECODE, "tl.exp(logit_of(key) - top) / total)", "tl.exp(logit_of(key) - top))", FEW),
    ("the host draws from logits of an earlier position", DECODE, "lengths + i, 1, sampler)", "lengths, 1, sampler)", f"{DECODED}::test_the_host_draws_what_is_uncertain"),
    ("padding of the vocabulary is in the sum of exponentials", DECODE, 'total = tl.where(n[None, :] < V, total, -float("inf"))', "total = total", FEW),
    ("positions are those of the first row", DECODE, "tl.load(lengths + row // T) + row % T, P - 1)", "tl.load(lengths) + row % T, P - 1)", f"{LOGITS}[33-1-64-2-4-3-1-1-1e-05]"),
    ("each split of a weight gradient sums the first rows", MATMUL, "k = (part * steps + step) * BK", "k = step * BK", f"{MATMULS}::test_weight_gradient[3-200-64-192]"),
    ("a program takes one tile only", MATMUL, "tl.program_id(0), tiles * SPLITS, PROGRAMS,", "tl.program_id(0), PROGRAMS, PROGRAMS,", f"{MATMULS}::test_forward[200-64-192]"),
    ("the last group of rows of tiles counts as full", MATMUL, "rows = min(tiles_m - group * GROUP, GROUP)", "rows = GROUP", f"{MATMULS}::test_tiles_in_many_groups_and_rounds"),
    ("GELU of what is not rounded yet", MATMUL, "values = rounded(values)", "values = values", f"{MATMULS}::test_forward[200-64-192]"),
    ("rounding keeps a bit too few", MATMUL, "tl.fma(x, 65536.0, x)", "tl.fma(x, 131072.0, x)", f"{MATMULS}::test_forward[200-64-192]"),
    ("a slope of GELU without the cube's three", MATMUL, "0.2140644488 * square", "0.0713548163 * square", f"{MATMULS}::test_input_gradient[72-128-320]"),
    ("a chunk's rows are skipped in the other factor", MATMUL, '("A_FIRST", "B_FIRST", "OUT_FIRST")', '("B_FIRST", "A_FIRST", "OUT_FIRST")', f"{MATMULS}::test_head[8]"),
    ("sums of columns take a block of rows for each part", MATMUL, "R, PARTS * ROWS):", "min(R, PARTS * ROWS), PARTS * ROWS):", f"{MATMULS}::test_column_sums[dtype0-200-160-3-1]"),
    ("tiles of an H100 on what came after it", MATMUL, "90 <= capability < 120", "90 <= capability", f"{MATMULS}::test_tiles_fit_the_gpu"),
    ("a second turn of layer norm's gradient is left out", NORM, "for step in range(STEPS):", "for step in range(1):", f"{NORMS}[True-31-192-0.001-2]"),
    ("turns of layer norm's gradient overlap", NORM, "(step * tl.num_programs(0) + tl.program_id(0))", "(step + tl.program_id(0))", f"{NORMS}[True-31-192-0.001-2]"),
    ("the variance is that of a sample", NORM, "tl.sum(centred * centred, 1) / C + EPS", "tl.sum(centred * centred, 1) / (C - 1) + EPS", f"{NORMS}[True-37-64-1e-05-528]"),
    ("what comes down the stream is left out", NORM, "total += tl.load(past + place, mask=inside, other=0.0)", "total += 0.0", f"{NORMS}[True-37-64-1e-05-528]"),
    ("a query does not give its own key a gradient", ATTENTION, "rows[None, :] >= key + tl.arange(0, KEYS)[:, None]", "rows[None, :] > key + tl.arange(0, KEYS)[:, None]", f"{ATTENTIONS}[1-96-2-64-16]"),
    ("tiles on the diagonal count as seen by all", ATTENTION, "(key + KEYS + QUERIES - 1) // QUERIES", "(key + QUERIES - 1) // QUERIES", f"{ATTENTIONS}[1-96-2-64-16]"),
    ("one gradient's scale", ATTENTION, "dk /= D**0.5", "dk /= D", f"{ATTENTIONS}[2-16-2-16-16]"),
    ("sums of exponentials keep their old maximum", ATTENTION, "total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)", f"{ATTENTIONS}[1-96-2-64-16]"),
    ("blocks of the last group of heads are those of a full one", ATTENTION, "index % heads, index // heads", "index % heads, index // GROUP", f"{ATTENTIONS}[2-70-3-32-16]"),
    ("a ragged last tile is not masked", ATTENTION, "BLOCKS: tl.constexpr = (T + KEYS - 1) // KEYS\n    RAGGED: tl.constexpr = T % QUERIES != 0 or T % KEYS != 0", "BLOCKS: tl.constexpr = (T + KEYS - 1) // KEYS\n    RAGGED: tl.constexpr = False", f"{ATTENTIONS}[2-70-3-32-16]"),
    ("a target that is ignored has a loss", LOSS, "tl.where(scored, (lse - chosen) * LN2, 0.0)", "(lse - chosen) * LN2", f"{LOSSES}::test_loss_and_gradient[9-500-512-16]"),
    ("the target's part of a gradient is not scaled", LOSS, "(tl.exp2(chosen - lse) - 1) * factor", "tl.exp2(chosen - lse) * factor - 1", f"{LOSSES}::test_loss_and_gradient[9-500-512-16]"),
    ("a chunk's targets are the first ones", LOSS, "tl.load(target + FIRST + r)", "tl.load(target + r)", f"{LOSSES}::test_loss_and_gradient[9-500-512-16]"),
    ("the number of what is ignored is always the same", LOSS, "label != IGNORED", "label != -100", f"{LOSSES}::test_which_target_is_ignored[3]"),
    ("a run through more programs than are added at once", EMBEDDING, "more = tl.sum(same.to(tl.int32), 0) == ROWS", "more = False", f"{EMBEDDINGS}::test_rows_are_added_by_token[132-1-24-4]"),
    ("of equal tokens those of later blocks come first", EMBEDDING, "(other < block)", "(other > block)", f"{EMBEDDINGS}::test_sort_is_stable[128-3-64]"),
    ("a run that goes on counts as one that begins", EMBEDDING, "part + tl.where(begun, 0, C)", "part + C", f"{EMBEDDINGS}::test_rows_are_added_by_token[132-1-24-4]"),
    ("all decay as the first does", ADAMW, "lr * DECAYS[i]", "lr * DECAYS[0]", f"{ADAMWS}::test_step"),
    ("the rest of the clipping scale is left out", ADAMW, "g = g * scale + g * rest", "g = g * scale", f"{ADAMWS}::test_step"),
    ("blocks of squares overlap", ADAMW, "(block.to(tl.int64) * STEPS + step) * BLOCK", "(block.to(tl.int64) + step) * BLOCK", f"{ADAMWS}::test_squares"),
    ("a factor of the loss does not reach the head's weight", FUSED, "dweight * Tensor(gradient)", "dweight", f"{GRAPHS}::test_gradients_of_other_losses"),
    ("restored weights leave the copies as they were", FUSED, "else kept.assign(new).realize()", "else kept", f"{GRAPHS}::test_copies_follow_the_weights"),
    ("ignored targets count in the mean", FUSED, "(target != ignore_index).sum()", "(target == target).sum()", f"{GRAPHS}::test_ignored_targets"),
    ("the first split alone is the weight's gradient", FUSED, "column_sums(dw.reshape(splits, K * N)) if splits > 1", "dw.reshape(splits, K * N)[0] if splits > 1", f"{GRAPHS}::test_proof_in_parts"),
    ("each part of the head's gradient replaces the one before", FUSED, "add=first > 0", "add=first < 0", f"{GRAPHS}::test_proof_in_parts"),
    ("q, k and v in another order", FUSED, "zip((q, k, v), split, strict=True)", "zip((q, q, v), (split[0], split[0], split[2]), strict=True)", f"{GRAPHS}::test_what_no_kernel_is_for"),
    ("a note where there is no GPU", CHOICE, 'if reason and device == "CUDA"', "if reason", f"{CHOICES}::test_obstacles"),
    ("the oldest GPU counts as too old", CHOICE, "capability(device) < OLDEST", "capability(device) <= OLDEST", f"{CHOICES}::test_they_are_used"),
    ("the tiles are an H100's on every GPU", CHOICE, "matmul.capability = capability(device)", "matmul.capability = 90", f"{CHOICES}::test_they_are_used"),
    ("the scratch memory that is written is the profiler's", LAUNCH, "len(args) - SCRATCH),", "len(args) - 1),", f"{LAUNCHES}::test_wrap"),
    ("shared memory is not asked for", LAUNCH, "loaded.smem = binary.metadata.shared", "loaded.smem = 0", f"{LAUNCHES}::test_it_is_loaded_once"),
    ("room for one program's tensor descriptors", LAUNCH, "DESCRIPTORS * math.prod(kernel.grid) if", "DESCRIPTORS * kernel.grid[0] if", f"{LAUNCHES}::test_scratch"),
    ("a kernel begins early after two others", GRAPH, "waits[i] and len(before) == 1", "waits[i] and before", f"{TESTS}/test_graph.py::test_edges"),
    ("the graph is launched with the edges as they were", GRAPH, "if early:  # it was", "if not early:  # it was", f"{TESTS}/test_graph.py::test_edges"),
    ("what ended before the one before is forgotten", GRAPH, "(1 << i for i in before), ended)", "(1 << i for i in before), 0)", f"{TESTS}/test_graph.py::test_edges"),
]  # fmt: skip
