"""Bugs in what is counted of texts, and in the comparison of models by it."""

from parity_tests.catalogue import Row

COUNTS, COPIED, COMPARISON = "data/text/counts.py", "data/text/copied.py", "data/runs/comparison.py"
IN_COUNTS = "data/text/tests/test_counts.py::test_"
IN_COMPARE = "tinygrad_impl/tests/test_compare.py::test_"
IN_REPORT = "data/runs/tests/test_report.py::test_"

PLANTED: list[Row] = [
    (
        "counts: 4-grams are counted across samples",
        COMPARISON,
        '| counts("".join(texts), probabilities, ended)',
        '| counts("".join(texts) * 2, probabilities, ended)',
        IN_COMPARE + "many_samples_of_three_models",
    ),
    (
        "counts: distinct 4-grams in place of repeated ones",
        COUNTS,
        "1 - len(set(grams)) / len(grams)",
        "len(set(grams)) / len(grams)",
        IN_COUNTS + "of_one_text",
    ),
    (
        "counts: one 4-gram too few",
        COUNTS,
        "range(len(found) - n + 1)",
        "range(len(found) - n)",
        IN_COUNTS + "of_one_text",
    ),
    (
        "counts: capitals make other words",
        COUNTS,
        'text.encode(errors="replace").lower()',
        'text.encode(errors="replace")',
        IN_COUNTS + "words",
    ),
    (
        "counts: bits a character",
        COUNTS,
        'size = len(text.encode(errors="replace"))',
        "size = len(text)",
        IN_COUNTS + "of_one_text",
    ),
    (
        "counts: nats a byte",
        COUNTS,
        "map(math.log2, probabilities)",
        "map(math.log, probabilities)",
        IN_COUNTS + "of_one_text",
    ),
    (
        "counts: the spread of a population",
        COUNTS,
        "statistics.stdev(values)",
        "statistics.pstdev(values)",
        IN_COUNTS + "mean_and_spread",
    ),
    (
        "counts: a text without 4-grams counts as one that repeats nothing",
        COUNTS,
        "float(text[name]) for text in texts if text.get(name) is not None",
        "float(text.get(name) or 0) for text in texts",
        IN_COUNTS + "mean_and_spread",
    ),
    (
        "compare: the spread is that of prompts, not of texts",
        COMPARISON,
        'measured([one for text in c["texts"] for one in text["models"][i]["samples"]])',
        'measured([text["models"][i]["samples"][0] for text in c["texts"]])',
        IN_COMPARE + "many_samples_of_three_models",
    ),
    (
        "compare: each prompt gets what was measured of the last",
        COMPARISON,
        'measured(text["models"][i]["samples"])',
        'measured(c["texts"][-1]["models"][i]["samples"])',
        IN_COMPARE + "many_samples_of_three_models",
    ),
    (
        "compare: samples are dealt out to the wrong prompts",
        "tinygrad_impl/compare.py",
        "for prompt in prompts for _ in range(args.num_samples)]",
        "for _ in range(args.num_samples) for prompt in prompts]",
        IN_COMPARE + "samples_follow_their_prompts",
    ),
    (
        "compare: a text that was cut off counts as ended",
        "tinygrad_impl/compare.py",
        "len(new) < new_tokens))",
        "len(new) <= new_tokens))",
        IN_COMPARE + "many_samples_of_three_models",
    ),
    (
        "compare: copies are looked for in the validation text",
        COPIED,
        'open_split(folder, "train")',
        'open_split(folder, "valid")',
        IN_COMPARE + "many_samples_of_three_models",
    ),
    (
        "copied: runs go on over the end of a document",
        COPIED,
        "[(True, END, 1), (True, np.uint64(0), 0)] if unit == end else",
        "[(True, np.uint64(0), 0)] if unit == end else",
        IN_COUNTS + "what_was_copied",
    ),
    (
        "copied: a word that two blocks share is two words",
        COPIED,
        "cut = numbers.last_word(row)",
        "cut = len(row)",
        IN_COUNTS + "what_was_copied",
    ),
    (
        "copied: a run that two blocks share is cut",
        COPIED,
        "held = row[-overlap:]",
        "held = row[:0]",
        IN_COUNTS + "what_was_copied",
    ),
    (
        "copied: runs that do not follow each other are one",
        COPIED,
        "np.flatnonzero(np.diff(at) > 1) + 1",
        "np.flatnonzero(np.diff(at) > 99) + 1",
        IN_COUNTS + "the_order_of_words_counts",
    ),
    (
        "copied: a run is as long as its 8-grams are many",
        COPIED,
        "length + N - 1",
        "length",
        IN_COUNTS + "what_was_copied",
    ),
    (
        "copied: the order of words does not count",
        COPIED,
        "found = found * np.uint64(Q) + numbers[i : i + count]",
        "found = found + numbers[i : i + count]",
        IN_COUNTS + "the_order_of_words_counts",
    ),
    (
        "copied: the order of letters does not count",
        COPIED,
        "return np.cumprod(np.array([1, *[P] * (count - 1)], np.uint64), dtype=np.uint64)",
        "return np.ones(count, np.uint64)",
        IN_COUNTS + "the_order_of_words_counts",
    ),
    (
        "report: models beside each other in the wrong order",
        "data/runs/report_comparison.py",
        'zip(c["models"], text["models"], strict=True)',
        'zip(c["models"], text["models"][::-1], strict=True)',
        IN_REPORT + "pairs_stay_together",
    ),
    (
        "report: older comparisons are shown the other way round",
        COMPARISON,
        'sides = ("pretrained", "finetuned")',
        'sides = ("finetuned", "pretrained")',
        IN_REPORT + "what_was_counted_of_the_texts",
    ),
]
