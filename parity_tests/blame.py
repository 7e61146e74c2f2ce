"""Which part of the port is to blame for rows of a proof that failed: a sub-layer, or a part of the training step."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from parity_tests.bounds import KEYS, ONE_NUMBER, Row, excess, judge, summation_excuses, worst
from parity_tests.checks import (
    ACCUMULATED,
    NOT_FINITE,
    clip_between,
    gradient_rows,
    loss_error,
    step_rows,
    training_steps,
)
from parity_tests.edges import edges
from parity_tests.setting import Batch, Setting


def find_culprit(setting: Setting, failed: Sequence[Row], batches: Sequence[Batch], steps: int, **options: Any) -> str:
    """The part of the port that is to blame for the rows that failed, with an error of it and what was allowed.

    `options` of the trainers, where they are not the trainers' defaults.
    """
    if all(row.check == "generation" for row in failed):
        return f"generation: {described(worst(failed))}"
    failed = [row for row in failed if row.check != "generation"]  # which uses the sub-layers that the others find
    if all(row.check == "training" for row in failed):
        return training_culprit(setting, batches, steps, failed, **options)
    return sublayer_culprit(setting, batches) or graph_culprit(setting, batches, failed)


def described(row: Row) -> str:
    return f"{row.name}: error {row.error:.1e}, allowed {row.allowed:.1e}"


def sublayer_culprit(setting: Setting, batches: Sequence[Batch]) -> str | None:
    """The first sub-layer that is wrong by itself: with the float64 reference's activations as its inputs and,
    backward, the reference's gradients at its outputs. None if each is right by itself.
    """
    fed = [setting.flows(batch, setting.reference_flow(batch)) for batch in batches]
    table = edges(setting.config)
    expected_order, order_found = ([*flow.values] for flow in fed[0][:2])
    if skipped := next((name for name in expected_order if name not in order_found), None):
        return f"{skipped.removesuffix('.input')}: the port never comes to it"
    for expected, found in zip(expected_order, order_found, strict=True):
        if expected != found:
            within = expected.removesuffix(".input").rpartition(".")[0] or "the model"
            return f"{within} (its wiring): the port comes to {found} where the reference comes to {expected}"
    excuses = {"loss": (loss_error(setting.references(), batches[0]), ONE_NUMBER)}
    rows = judge("forward", setting.dtype, [(r.values, p.values, o.values) for r, p, [o] in fed], excuses)
    if first := first_clear_failure(rows):
        return f"{table[first.name][0]} forward: error {first.error:.1e}, allowed {first.allowed:.1e}"
    gradients = [(r.gradients, p.gradients, o.gradients) for r, p, [o] in fed]
    rows = judge("backward", setting.dtype, gradients, summation_excuses(setting.config, batches[0][0].size))
    # backward, a sub-layer gives the gradients of its inputs and of its parameters
    order = list(dict.fromkeys([*(table[name][1] for name in reversed(table)), "wte", "wpe"]))

    def owner(row: Row) -> str:
        name = row.name.removesuffix(KEYS)
        return table[name][1] if name in table else name.rpartition(".")[0]

    if first := first_clear_failure(sorted(rows, key=lambda row: order.index(owner(row)))):
        return f"{owner(first)} backward ({first.name}): error {first.error:.1e}, allowed {first.allowed:.1e}"
    return None


def first_clear_failure(rows: Sequence[Row]) -> Row | None:
    """The first row that fails, but next to one with a large error not one that is just over its bound: that is chance.

    What is over sqrt(largest error / allowed), or over 100 times its bound, always counts.
    """
    largest = max(map(excess, rows))
    return next((row for row in rows if excess(row) > max(1.0, min(math.sqrt(largest), 100.0))), None)


def graph_culprit(setting: Setting, batches: Sequence[Batch], failed: Sequence[Row]) -> str:
    """What is wrong with the graph that trains if every sub-layer is right by itself."""

    def right(groups: Iterable[Sequence[Batch]]) -> bool:
        return all(row.passed for row in gradient_rows(setting, setting.trainer(), setting.references(), groups))

    accumulates = right([[batch] for batch in batches]) and not right([batches])
    wrong = worst([row for row in failed if row.check != "training"])
    return f"{'accumulate' if accumulates else 'only the graph that trains'}: {described(wrong)}"


def training_culprit(
    setting: Setting, batches: Sequence[Batch], count: int, before: Sequence[Row], **given: Any
) -> str:
    """The part of the training step that is wrong: the one without which the step is right."""

    def rows(accumulated: Sequence[int] = ACCUMULATED, **options: Any) -> list[Row]:
        steps = training_steps(batches, min(count, 4), accumulated)
        options = {"clip": clip_between(setting, steps)} | given | options
        return step_rows(setting, setting.trainer(**options), setting.references(**options), steps)

    for i, (_, lr, port_lr) in enumerate(training_steps(batches, count)):
        if lr != port_lr:
            return f"learning_rate: {port_lr:.3e} at step {i}, not {lr:.3e}"
    if all(row.reason == NOT_FINITE for row in before):
        return f"update of what is not finite: {described(before[0])}"
    failed = [row for row in rows() if not row.passed]
    if not failed:
        if setting.dtype == "float64":  # where `before` is of steps that each trainer took by itself
            return "accumulate: from the float64 reference's gradients AdamW's steps are right"
        return f"AdamW in some steps: {described(worst(before))}"
    for name, neutral in (
        ("accumulate", {"accumulated": (1,)}),
        ("clipping", {"clip": 1e9}),  # never
        ("clipping", {"clip": 1e-3}),  # always
        ("weight decay", {"weight_decay": 0.0}),
    ):
        if all(row.passed for row in rows(**neutral)):
            return f"{name}: {described(worst(failed))}"
    for name in ("loss", "norm", "exp_avg.", "exp_avg_sq."):
        if wrong := [row for row in failed if row.name.startswith(name)]:
            return f"AdamW's {name.rstrip('.')}: {described(worst(wrong))}"
    return f"AdamW's update: {described(worst(failed))}"
