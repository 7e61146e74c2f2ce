"""Bugs in the pages: of runs, of comparisons, and of a certificate of parity."""

from parity_tests.catalogue import Row

REPORT, REPORT_INPUT, CHARTS = "data/runs/report.py", "data/runs/report_input.py", "data/runs/report_charts.py"
HTML, COMPARISON = "data/runs/report_html.py", "data/runs/report_comparison.py"
CERTIFICATE = "parity_tests/report.py"
IN_REPORT = "data/runs/tests/test_report.py::test_"

PLANTED: list[Row] = [
    (
        "report: the least loss instead of the last",
        REPORT,
        'f"{val[0]:.3f} → {val[-1]:.3f}{least}"',
        'f"{val[0]:.3f} → {min(val):.3f}{least}"',
        IN_REPORT + "figures_of_a_run",
    ),
    (
        "report: the mean throughput is called median",
        REPORT,
        "statistics.median(rates)",
        "statistics.mean(rates)",
        IN_REPORT + "figures_of_a_run",
    ),
    (
        "report: of a check the row with the greatest error",
        REPORT,
        "worst = max(rows, key=share)",
        'worst = max(rows, key=lambda row: row["error"])',
        IN_REPORT + "checks_of_parity",
    ),
    (
        "report: the label of the x axis is at the wrong place",
        CHARTS,
        "return LEFT + (x - width[0]) / (width[1] - width[0]) * (RIGHT - LEFT)",
        "return LEFT + x / width[1] * (RIGHT - LEFT)",
        IN_REPORT + "curves_against_each_axis",
    ),
    (
        "report: a clean tree is called changed",
        REPORT,
        "{'' if known['clean'] else ' with changes'}",
        "{' with changes' if known['clean'] else ''}",
        IN_REPORT + "the_commit_of_each_part_of_a_run",
    ),
    (
        "report: the last sample is not shown",
        REPORT,
        "(len(written) - 1) // max(count - 1, 1)",
        "(len(written) - 1) // max(count, 1)",
        IN_REPORT + "of_two_and_sixty_one_samples",
    ),
    (
        "report: shades end at a hundredth",
        COMPARISON,
        "-math.log(p) / math.log(vocabulary)",
        "-math.log(p) / math.log(100)",
        IN_REPORT + "tokens_are_shaded_by_their_probability",
    ),
    (
        "report: a file of another form is taken",
        REPORT_INPUT,
        "        if not fits(value, shape):",
        "        if not isinstance(value, dict):",
        IN_REPORT + "whole_files_of_another_form_are_refused",
    ),
    (
        "report: numbers of any length",
        REPORT_INPUT,
        "abs(value) > 2**64",
        "abs(value) > 2**9999",
        IN_REPORT + "whole_files_of_another_form_are_refused",
    ),
    (
        "report: what a run was continued with may have any form",
        REPORT_INPUT,
        "if not whole or not all(",
        "if not all(",
        IN_REPORT + "whole_files_of_another_form_are_refused",
    ),
    (
        "report: the commit may have any form",
        REPORT_INPUT,
        'for part in [facts, *facts["continued"]] if',
        'for part in facts["continued"] if',
        IN_REPORT + "whole_files_of_another_form_are_refused",
    ),
    (
        "report: pieces without probabilities",
        REPORT_INPUT,
        'if any(len(one["pieces"]) != len(one["probabilities"])',
        'if any(len(one["pieces"]) > 10**9 + len(one["probabilities"])',
        IN_REPORT + "pieces_without_probabilities_are_refused",
    ),
    (
        "report: hiding the loss of the batches hides their mean",
        CHARTS,
        '"mean": "bold mean"}',
        '"mean": "bold mean batch"}',
        IN_REPORT + "each_switch_hides_its_own_curves",
    ),
    (
        "report: a spike flattens the curve",
        CHARTS,
        "if y <= SPIKE * steady)",
        "if y <= math.inf)",
        IN_REPORT + "a_spike_flattens_nothing",
    ),
    (
        "report: the beginning of training is off the scale",
        CHARTS,
        "steady = max(steady, *(",
        "steady = min(steady or math.inf, *(",
        IN_REPORT + "what_is_a_spike",
    ),
    (
        "report: None is shown",
        HTML,
        'return "not given"',
        'return "None"',
        IN_REPORT + "nothing_of_python_is_shown",
    ),
    (
        "report: what differs is called the same in all",
        REPORT,
        "if all(facts[name] == value for",
        "if any(facts[name] == value for",
        IN_REPORT + "figures_of_a_run",
    ),
    (
        "report: chance is GPT-2's whatever the vocabulary",
        COMPARISON,
        'model.get("vocab_size", GPT2_VOCABULARY)',
        "GPT2_VOCABULARY",
        IN_REPORT + "tokens_are_shaded_by_their_probability",
    ),
    (
        "report: all empty lines of a text are gone",
        COMPARISON,
        'if piece == "\\n" and pieces[i + 1 : i + 2] == ["\\n"]:',
        'if piece == "\\n":',
        IN_REPORT + "of_empty_lines_the_last_one_breaks",
    ),
    (
        "report: a comparison of another form",
        REPORT_INPUT,
        "not all(fits(size, int) and size > 1 for size in sizes):",
        "not all(fits(size, int) for size in sizes):",
        IN_REPORT + "whole_files_of_another_form_are_refused",
    ),
    (
        "the lowest bound stretches the scale",
        CERTIFICATE,
        "bounds[len(bounds) // 8]",
        "bounds[0]",
        "parity_tests/test_report.py::test_bounds_of_nothing_but_rounding_do_not_stretch_the_scale",
    ),
    (
        "the heads of a phone's blocks are one column off",
        CERTIFICATE,
        "enumerate(names, 2)",
        "enumerate(names, 1)",
        "parity_tests/test_report.py::test_on_a_phone_every_value_has_its_head",
    ),
]
