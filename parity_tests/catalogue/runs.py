"""Bugs in what a run refuses and says: its options, its end before the first step, its numbers that are none."""

from parity_tests.catalogue import Row

STOPPING, OPTIONS, FOLDER = "data/runs/stopping.py", "data/runs/options.py", "data/runs/run_folder.py"
COMPARE, GENERATE, SAMPLING = "tinygrad_impl/compare.py", "tinygrad_impl/generate.py", "data/text/sampling.py"
CLI, LOSSES, SETTING, WATCH = "data/cli.py", "data/evaluation/losses.py", "parity_tests/setting.py", "data/watch.py"
STOP = "data/runs/tests/test_stopping.py::test_a_stop_before_the_first_step"
CONFIG = "data/runs/tests/test_options.py::test_the_same_command_with_the_options_of_another_run"
LOST = "data/tests/test_distributed.py::test_who_ends_while_others_look_for_it_is_not_lost"
BEYOND = "tinygrad_impl/tests/test_compare.py::test_a_perplexity_beyond_float64"
NO_NUMBER = "tinygrad_impl/tests/test_compare.py::test_a_model_that_gives_no_number_is_named"
FIND_LR = "data/runs/tests/test_find_lr.py::test_"
IN_CLI = "data/tests/test_cli.py::test_"

PLANTED: list[Row] = [
    ("stop before training: not said at once", STOPPING, 'b"\\nstopping\\n"', 'b""', STOP),
    ("stop before training: another number", STOPPING, "raise Stopped(number)", "raise Stopped(15)", STOP),
    ("stop before training: said of training too", STOPPING, '        self.say("")\n', "", STOP),
    ("stop before training: it ends training too", STOPPING, "        self._held.close()\n", "", STOP),
    ("the exit code of a stop", CLI, "return 128 + e.number", "return 130", IN_CLI + "interrupted"),
    (
        "--config is ignored where a run goes on",
        OPTIONS,
        "        refuse_other_config(given, had)\n",
        "        pass\n",
        CONFIG,
    ),
    ("what is given beside --config does not count", OPTIONS, "{*FREE, *given, *changed}", "{*FREE, *changed}", CONFIG),
    (
        "later checkpoints are removed in silence",
        FOLDER,
        '            folder._say_what_is_removed(state["step"])\n',
        "",
        "data/runs/tests/test_resume.py::test_a_resumed_run_records_where_it_did_so",
    ),
    ("who has come meanwhile is lost", WATCH, "said and self.since() == since and", "said and", LOST),
    ("who has left meanwhile is lost", WATCH, "said == self.gone and", "not said and", LOST),
    (
        "the float64 reference computes all rows at once",
        SETTING,
        "n * T <= max(T, self.reference_tokens(T))",
        "n * T > 0",
        "parity_tests/test_checks.py::test_reference_of_few_rows_at_a_time_is_the_reference",
    ),
    (
        "find-lr: a first loss that is no number",
        "data/runs/find_lr.py",
        "if not losses:",
        "if losses:",
        FIND_LR + "a_first_loss_that_is_no_number",
    ),
    (
        "find-lr: what it found before is written over",
        "data/runs/start.py",
        'empty="resume" not in given',
        'empty=not given.keys() & {"resume", "find_lr"}',
        FIND_LR + "what_is_there_stays_as_it_is",
    ),
    (
        "find-lr: options that it ignores are not refused",
        OPTIONS,
        'if name in OF_TRAINING and given[name] not in ("off", NO_TASKS)]',
        'if name in OF_TRAINING and given[name] not in ("off", NO_TASKS)][:1]',
        FIND_LR + "options_that_it_would_ignore_are_refused",
    ),
    (
        "conflicts of options are told one by one",
        OPTIONS,
        '". Also, ".join(faults)',
        "faults[0]",
        "data/runs/tests/test_options.py::test_all_conflicts_are_told_at_once",
    ),
    ("perplexity beyond float64", LOSSES, "if loss < 700 else", "if loss < 1e9 else", BEYOND),
    ("compare: infinity in JSON", COMPARE, "confusion if confusion < math.inf else None", "confusion", BEYOND),
    ("compare: a loss of NaN is a result", COMPARE, "not math.isfinite(loss)", "loss == math.inf", NO_NUMBER),
    (
        "token 0 of NaN",
        GENERATE,
        "if self.name and np.isnan(probabilities).any():",
        "if False:",
        "tinygrad_impl/tests/test_generate.py::test_a_model_that_gives_no_number_is_named",
    ),
    (
        "the coldest temperature",
        SAMPLING,
        "not COLDEST <= temperature",
        "not 0 < temperature",
        "data/text/tests/test_sampling.py::test_refusals",
    ),
    (
        "numbers as Python writes them",
        CLI,
        "float(text) if plain else math.nan",
        'float(text or "nan") if text not in ("x", ".", "0e") else math.nan',
        IN_CLI + "what_is_no_number_from_zero_to_below_one",
    ),
    (
        "sources that are not committed",
        "data/runs/revision.py",
        'SOURCES = (".py", ".c", ".h")',
        'SOURCES = (".py",)',
        "data/runs/tests/test_revision.py::test_a_commit_and_what_was_changed_since",
    ),
    (
        "live: an origin that is no address",
        "tinygrad_impl/live/guard.py",
        "    except ValueError:\n",
        "    except KeyError:\n",
        "tinygrad_impl/live/tests/test_guard.py::test_other_pages_are_refused",
    ),
    (
        "live: who leaves in the middle of the body is an error",
        "tinygrad_impl/live/app.py",
        "except ClientDisconnect:",
        "except KeyError:",
        "tinygrad_impl/live/tests/test_app.py::test_whoever_leaves_in_the_middle_of_the_body_ends_nothing",
    ),
]
