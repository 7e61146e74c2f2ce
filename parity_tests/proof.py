"""The proof that two implementations of GPT-2 compute the same thing, and the name of the sub-layer that does not.

    setting.py      what is compared: weights, dtype, devices, batches
    checks.py       what is measured, and generation.py for generation
    bounds.py       how far off a result may be
    blame.py        which part is wrong where one is further off
    certificate.py  what all that is written down as

Errors are taken over several batches, because one could be small by chance. What fails by little is measured again over
more of them, and with weights that are nudged, before it is called different.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from data.cli import Progress
from parity_tests.blame import find_culprit
from parity_tests.bounds import Row, near_miss
from parity_tests.checks import (
    clip_between,
    flow_rows,
    free_running_rows,
    gradient_rows,
    micro_batches,
    not_finite_rows,
    step_rows,
    training_steps,
)
from parity_tests.generation import GENERATED, SAMPLING, generation_rows
from parity_tests.setting import NUDGES, Batch, Setting, random_batches

BATCHES = 4  # whose activations are compared
GRAPH_BATCHES = 8  # whose gradients are, out of the graph that trains, which is quick once it is captured
MORE = 4  # times as many batches, if what failed did so by little


def prove(
    setting: Setting,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    steps: int = 10,
    generated: int = GENERATED,
    quiet: bool = False,
) -> tuple[list[Row], str | None]:
    """Every row of the proof, and the culprit if one of them fails. `generated`: tokens of each row, 0 for none."""
    for times in (1, MORE):
        batches = random_batches(setting.config, batch_size, seq_len, seed, times * GRAPH_BATCHES)
        rows = evidence(setting, batches, times, seed, steps, generated, quiet)
        failed = [row for row in rows if not row.passed]
        if not (failed and near_miss(failed, setting.dtype)):
            break
    return rows, find_culprit(setting, failed, batches[: times * BATCHES], steps) if failed else None


def evidence(
    setting: Setting, batches: Sequence[Batch], times: int, seed: int, steps: int, generated: int, quiet: bool
) -> list[Row]:
    """Every row of the proof. `times`: as many batches are compared as on a first try, 1, or more on a second."""
    nudges = NUDGES if times > 1 else 0
    few, groups = batches[: times * BATCHES], micro_batches(batches)
    schedule = training_steps(batches, steps)
    options = {"clip": clip_between(setting, schedule)}
    total = len(few) + len(groups) + len(schedule) + (len(SAMPLING) if generated else 0)
    what = "parity" if times == 1 else "again, with more"
    with Progress(total=total, desc=what, unit="pass", disable=quiet) as progress:

        def counted(items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                yield item
                progress.update()

        references, port = setting.references(**options), setting.trainer(**options)
        rows = flow_rows(setting, references, counted(few), nudges)
        if setting.dtype == "float64":
            training = free_running_rows(setting, port, references, counted(schedule), again=times > 1)
        else:
            training = step_rows(setting, port, references, counted(schedule))
        # the gradients after the steps: the graphs have to see the weights that these left
        rows += gradient_rows(setting, port, references, counted(groups), nudges) + training + not_finite_rows(port)
        if generated:
            for some in counted(generation_rows(setting, range(seed, seed + times), generated, nudges)):
                rows += some
        return rows
