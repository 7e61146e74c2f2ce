"""Bugs in evaluation: losses of tokens, continuations packed and scored, and where scores are kept."""

from parity_tests.catalogue import Row

PACKING = "data/evaluation/packing.py"
KERNEL, JOINS = "tinygrad_impl/kernels/cross_entropy.py", "tinygrad_impl/kernels/joins.py"
FORMULAS = "tinygrad_impl/formulas.py"
PACKED = "data/evaluation/tests/test_packing.py::test_"
SCORES = PACKED + "scores"
IN_KERNEL = "tinygrad_impl/kernels/tests/test_cross_entropy.py::test_loss_alone_and_argmax"

PLANTED: list[Row] = [
    (
        "evaluation: the continuation is off by one",
        PACKING,
        "inputs, targets = tokens[:-1], tokens[1:]",
        "inputs, targets = tokens[1:], tokens[1:]",
        SCORES,
    ),
    (
        "evaluation: the last token of what is before is counted",
        PACKING,
        "[IGNORED] * (len(targets) - len(scored)) + scored",
        "([IGNORED] * (len(targets) - len(scored)) + scored)[1:] + scored[-1:]",
        SCORES,
    ),
    (
        "evaluation: the prefix is counted",
        PACKING,
        "yield inputs, [IGNORED] * (len(targets) - len(scored)) + scored",
        "yield inputs, targets",
        SCORES,
    ),
    (
        "evaluation: a mean over tokens, which the harness then normalises by bytes",
        PACKING,
        "found.sum(1, dtype=np.float64),",
        "found.sum(1, dtype=np.float64) / np.maximum((y != IGNORED).sum(1), 1),",
        SCORES,
    ),
    (
        "evaluation: what is too long loses its end",
        PACKING,
        "[-(context + 1) :]",
        "[: context + 1]",
        PACKED + "windows",
    ),
    (
        "evaluation: what is too long loses a token too many",
        PACKING,
        "[-(context + 1) :]",
        "[-context:]",
        PACKED + "windows",
    ),
    (
        "evaluation: padding is scored",
        PACKING,
        "y = np.full_like(x, IGNORED)",
        "y = np.zeros_like(x)",
        SCORES,
    ),
    (
        "evaluation: padding has to be greedy too",
        PACKING,
        "(likeliest | (y == IGNORED)).all(1)",
        "likeliest.all(1)",
        SCORES,
    ),
    (
        "evaluation: a row has the answer of another",
        PACKING,
        "total[place] += value",
        "total[len(requests) - 1 - place] += value",
        SCORES,
    ),
    (
        "evaluation: answers are in the order of the batches",
        PACKING,
        "found.append(([request for request, _, _ in rows], x, y))",
        "found.append(([sum(len(p) for p, _, _ in found) + i for i in range(len(rows))], x, y))",
        SCORES,
    ),
    (
        "evaluation: of a long continuation only the last window counts",
        PACKING,
        "range(0, len(continuation), context)",
        "range(0, len(continuation), context + 1)",
        PACKED + "windows",
    ),
    (
        "evaluation: a rank has its own answers only",
        PACKING,
        "for rows in ranks.gather(own) for row in rows",
        "for row in own",
        PACKED + "ranks_share_the_batches_out",
    ),
    (
        "evaluation: every rank computes all batches",
        PACKING,
        "[ranks.rank :: ranks.size]",
        "[:]",
        PACKED + "ranks_share_the_batches_out",
    ),
    (
        "evaluation: lengths that fill no batch are kept",
        PACKING,
        "if waiting >= rows_of(length, tokens) or",
        "if waiting or",
        PACKED + "which_lengths",
    ),
    (
        "losses of tokens are summed in float32",
        PACKING,
        "found.sum(1, dtype=np.float64),",
        "found.sum(1),",
        PACKED + "sums_are_not_rounded_to_float32",
    ),
    (
        "the kernel's argmax is the last of equal logits",
        KERNEL,
        "(start + columns < token)",
        "(start + columns > token)",
        IN_KERNEL,
    ),
    (
        "the kernel takes an ignored target for the likeliest",
        KERNEL,
        "tl.where(scored & (tl.max(ahead, 0) == 0), 1, 0)",
        "tl.where(tl.max(ahead, 0) == 0, 1, 0)",
        IN_KERNEL,
    ),
    (
        "the kernel has the loss of an ignored target",
        KERNEL,
        "tl.where(scored, (lse - chosen * LOG2E) * LN2, 0.0)",
        "(lse - chosen * LOG2E) * LN2",
        IN_KERNEL,
    ),
    (
        "the formula's argmax is the last of equal logits",
        FORMULAS,
        "(logits == chosen) & (index < target)",
        "(logits == chosen) & (index > target)",
        "tinygrad_impl/tests/test_formulas.py::test_losses_of_tokens_and_argmax",
    ),
    (
        "the argmax has logits of its own",
        JOINS,
        ", (ARGMAX, head_argmax)]",
        "]",
        "tinygrad_impl/kernels/tests/test_joins.py::test_losses_and_argmax_come_of_one_node",
    ),
    (
        "tasks are scored before training only",
        "data/runs/loop.py",
        "                row |= task_scores()\n                lowest",
        "                lowest",
        "data/runs/tests/test_loop.py::test_tasks_are_scored_with_each_validation",
    ),
    (
        "report: a standard error that is not known is 0",
        "data/runs/report.py",
        '*(number(row["stderr"]),',
        '*(number(row["stderr"] or 0),',
        "data/runs/tests/test_report.py::test_scores_on_tasks",
    ),
]
