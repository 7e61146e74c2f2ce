"""The learning rate of each step of a run, and what becomes of it when the run is trained longer."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from data.cli import InputError
from data.runs.options import Given, Options

Rate = Callable[[int, int, float, float, int], float]  # of step, steps, the highest, the lowest, warm-up


def rate(options: Options, step: int, learning_rate: Rate, spans: Sequence[str] | None = None) -> float:
    """The learning rate of step 0, 1, ...: that of an implementation's `learning_rate` over each span of the schedule,
    and the lowest rate after a span's end. A later span rises from what the rate had fallen to (warm restarts,
    Loshchilov & Hutter 2017), over the warm-up or a fifth of the span, whichever is less.
    """
    spans = spans or schedule(options)
    index = max(i for i, span in enumerate(spans) if bounds(span)[0] <= step)
    begin, end = bounds(spans[index])
    if step >= end:
        return options.min_lr
    if index == 0:
        return learning_rate(step, end, options.lr, options.min_lr, options.warmup)
    warmup = min(options.warmup, (end - begin) // 5)
    if step - begin < warmup:
        fallen = rate(options, begin, learning_rate, spans[:index])
        return fallen + (options.lr - fallen) * (step - begin + 1) / warmup
    return learning_rate(step - begin, end - begin, options.lr, options.min_lr, warmup)


def schedule(options: Options) -> Sequence[str]:
    """The spans of steps over which the rate rises and falls; one over all steps unless given."""
    return options.schedule or (f"0-{options.steps}",)


def bounds(span: str) -> tuple[int, int]:
    """Where a span begins, and where it ends."""
    begin, end = map(int, span.split("-"))
    return begin, end


def refuse_disorder(spans: Sequence[str]) -> None:
    """Raises `InputError` unless the first span begins at 0 and each other one after the one before it."""
    begins = [bounds(span)[0] for span in spans]
    if begins[0] != 0 or begins != sorted(set(begins)):
        raise InputError(
            f"--schedule {' '.join(spans)}: the first span has to begin at 0, and each other after the one before it"
        )


def trained_longer(options: Options, before: Given, step: int) -> Options:
    """The options of a run that goes on after `step` with other --steps or --rewarm. `before` are those it had.

    The spans of its schedule stay, so that each step that is done would have the same rate again. To re-warm is a new
    span from `step` on; where the command is given a second time, because the run was stopped, that is there already.
    """
    spans = list(before["schedule"] or [f"0-{before['steps']}"])
    if options.rewarm and (len(spans) == 1 or bounds(spans[-1])[1] != options.steps or bounds(spans[-1])[0] > step):
        spans = [span for span in spans if bounds(span)[0] < step] + [f"{step}-{options.steps}"]
    elif options.steps == before["steps"]:
        return options
    return replace(options, schedule=tuple(spans))
