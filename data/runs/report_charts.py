"""The report's curves as SVG, with all that can be switched in them, and numbers in few characters."""

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import median_high

from data.runs.report_input import AXES, Run

CHARTS = {  # title: the unit, and columns of metrics.jsonl with their names
    "Loss": ("nats a token", {"loss": "training", "val_loss": "validation"}),
    "Learning rate": ("", {"lr": "learning rate"}),
    "Gradient norm": ("before clipping", {"grad_norm": "gradient norm"}),
    "Throughput": ("tokens a second", {"tokens_per_second": "tokens a second"}),
}
NOISY = {"loss", "grad_norm", "tokens_per_second"}  # drawn thin, with a running mean over it
SPIKE = 3  # a value above so many times the greatest median of a stretch is off the linear scale
STRETCHES = 480  # of a long run, each drawn by its extremes
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 270, 56, 462, 12, 244  # a chart, and the frame in it
COLORS, DASHES = 6, 5  # as many as report.css has; together they repeat after 30 runs
MARKS = [  # of the validation loss: circle, square, triangle, diamond
    *("m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "m-2.7-2.7h5.4v5.4h-5.4z"),
    *("m0-3.6l3.3 6h-6.6z", "m0-3.8l3.8 3.8l-3.8 3.8l-3.8-3.8z"),
]

Point = dict[str, float]  # "value", its running "mean", and where on AXES it is
Curve = tuple[int, str, int, list[Point]]  # run, column, style, points


def points(metrics: list[dict[str, float]], key: str) -> list[Point]:
    """The points of a curve: all, or of many the least and the greatest value in each of `STRETCHES`."""
    rows = [row for row in metrics if key in row]
    sums = [0.0, *accumulate(row[key] for row in rows)]
    found: list[Point] = []
    for i, row in enumerate(rows):
        # the mean is over 2 % of the rows before and as many after; at first over fewer on both sides, as losses fall
        reach = min(math.ceil(len(rows) / 50), i)
        first, last = i - reach, min(i + reach + 1, len(rows))
        mean = (sums[last] - sums[first]) / (last - first)
        found.append({"value": row[key], "mean": mean} | {axis: row[axis] for axis in AXES if axis in row})
    length = math.ceil(len(rows) / STRETCHES)
    if length <= 4:
        return found
    kept = {0, len(rows) - 1}
    for start in range(0, len(rows), length):
        stretch = range(start, min(start + length, len(rows)))
        kept |= {min(stretch, key=lambda i: rows[i][key]), max(stretch, key=lambda i: rows[i][key])}
    return [found[i] for i in sorted(kept)]


def controls(runs: Sequence[Run]) -> str:
    """The legend and what can be switched. CSS alone does it: each chart is there for every axis and scale."""
    axes = "".join(
        f'<label><input type="radio" name="axis" id="{axis}"{" checked" * (axis == "step")}> {axis}</label>'
        for axis in AXES
    )
    validation = look(0, "val_loss", len(runs))
    shown = {"batch": f"{sign('thin', 0)} training (a batch)", "mean": f"{sign('bold', 0)} running mean"}
    shown["val_loss"] = f"{sign('bold', validation, True)} validation"
    named = {f"run{i}": f"{sign('bold', i, True)} {run.name}" for i, run in enumerate(runs)} if len(runs) > 1 else {}

    def boxes(switches: dict[str, str]) -> str:
        return "".join(f'<label><input type="checkbox" id="{k}" checked> {v}</label>' for k, v in switches.items())

    rules = "".join(f"body:has(#{name}:not(:checked)) figure .{name}, " for name in [*AXES, *shown, *named])
    rules += "body:has(#log:checked) .linear, body:not(:has(#log:checked)) .log { display: none; }"
    several = f'<form autocomplete="off" aria-label="runs shown">{boxes(named)}</form>' if named else ""
    return f"""<style>{rules}</style>
<form autocomplete="off" aria-label="axes"><span>against</span>{axes}
<label><input type="checkbox" id="log"> log scale</label></form>
<form autocomplete="off" aria-label="curves shown"{' class="several"' if named else ""}>{boxes(shown)}</form>
{several}"""


def sign(weight: str, style: int, marked: bool = False) -> str:
    """A piece of curve for the legend."""
    mark = f'<path class="mark {color(style)}" d="M15 5{MARKS[style % len(MARKS)]}"/>' if marked else ""
    return f'<svg viewBox="0 0 30 10"><path class="{weight} {color(style)}" d="M0 5H30"/>{mark}</svg>'


def look(run: int, key: str, runs: int) -> int:
    """The number of a curve's style: each run has its own, and of a single one the validation loss."""
    return run + (runs == 1 and key == "val_loss")


def color(style: int) -> str:
    """Styles differ in dashes and marks as well: colour is never alone."""
    return f"c{style % COLORS} d{style % DASHES}"


def chart(title: str, curves: list[dict[str, list[Point]]], ranges: dict[str, tuple[float, float]]) -> str:
    """A figure, with a drawing for every axis and scale."""
    unit, series = CHARTS[title]
    drawn = [
        (i, key, look(i, key, len(curves)), of_run[key])
        for i, of_run in enumerate(curves)
        for key in series
        if of_run[key]
    ]
    if not drawn:
        return ""
    top = ceiling(drawn)
    drawings = "".join(
        drawing(title, drawn, axis, ranges[axis], math.inf if log else top, log)
        for axis in AXES
        for log in (False, True)
    )
    greatest = max((p for *_, found in drawn for p in found), key=lambda p: p["value"])
    above = f"▲ off the scale: up to {number(greatest['value'])} at step {greatest['step']:,.0f}"
    note = f' <span class="linear">{above}</span>' if greatest["value"] > top else ""
    return f"""<figure data-chart="{title}"><figcaption><b>{title}</b> {unit}{note}</figcaption>
{drawings}<output></output></figure>
"""


def ceiling(drawn: list[Curve]) -> float:
    """The greatest value to draw on the linear scale, so that single ones far above all others flatten nothing."""
    steady = 0.0
    for _, key, _, found in drawn:
        length = max(5, math.ceil(len(found) / 50)) if key in NOISY else 1
        starts = range(0, max(len(found) - length + 1, 1), length)  # of whole stretches
        steady = max(steady, *(median_high(p["value"] for p in found[i : i + length]) for i in starts))
    values = [p["value"] for *_, found in drawn for p in found]
    return max((y for y in values if y <= SPIKE * steady), default=max(values))


def drawing(title: str, drawn: list[Curve], axis: str, width: tuple[float, float], top: float, log: bool) -> str:
    """Curves in one frame; on a logarithmic scale without what is not above 0. What is above `top` is marked there."""
    heights = [
        y for *_, found in drawn for p in found for y in (p["value"], p["mean"]) if y <= top and (y > 0 or not log)
    ]
    if log and not heights:
        return f'<p class="{axis} log">Nothing is above 0.</p>'
    low, high = spread([math.log10(y) for y in heights] if log else heights)

    def at_x(x: float) -> float:
        return LEFT + (x - width[0]) / (width[1] - width[0]) * (RIGHT - LEFT)

    def at_y(y: float) -> float:
        return BOTTOM - ((math.log10(y) if log else y) - low) / (high - low) * (BOTTOM - TOP)

    parts = []
    for y in log_ticks(low, high) if log else ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {at_y(y):.1f}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{label(y)}</text>')
    for x in ticks(*width):
        parts.append(f'<text x="{at_x(x):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{label(x)}</text>')
    for i, key, style, found in drawn:
        kinds = f"{color(style)} run{i} {key}"
        for column, weight in (
            {"value": "thin batch", "mean": "bold mean"}.items() if key in NOISY else [("value", "bold")]
        ):
            inside = [p for p in found if axis in p and (p[column] > 0 or not log)]
            places = [f"{at_x(p[axis]):.1f} {at_y(min(p[column], top)):.1f}" for p in inside]
            # the mean is drawn as far as it is on the scale
            gone = [column == "mean" and p[column] > top for p in inside]
            moves = ["M" if i == 0 or gone[i - 1] else "L" for i in range(len(inside))]
            line = "".join(move + place for move, place, off in zip(moves, places, gone, strict=True) if not off)
            if line:
                parts.append(f'<path class="{weight} {kinds}" d="{line}"/>')
            spikes = [f"M{at_x(p[axis]):.1f} {TOP}" for p in inside if column == "value" and p[column] > top]
            if spikes:
                parts.append(
                    f'<path class="mark {weight} {kinds}" d="{"".join(f"{m}m-4 8l4-8l4 8z" for m in spikes)}"/>'
                )
            if places and key == "val_loss":
                some = places[:: math.ceil(len(places) / 25)]
                marks = "".join(f"M{place}{MARKS[style % len(MARKS)]}" for place in some)
                parts.append(f'<path class="mark {kinds}" d="{marks}"/>')
    scale = "log" if log else "linear"
    return f"""<svg class="{axis} {scale}" viewBox="0 0 {WIDTH} {HEIGHT}" tabindex="0" role="img"
aria-label="{title} against {axis}, {scale} scale">{"".join(parts)}<path class="cursor"/></svg>
"""


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest, and where they are the same, room around it."""
    low, high = min(values), max(values)
    room = 0.1 * max(abs(low), abs(high), 1e-9)
    return (low, high) if high - low > 1e-6 * room else (low - room, high + room)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two: 1, 2 or 5 times a power of ten apart."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(factor * unit for factor in (1, 2, 5, 10) if 6 * factor * unit >= high - low)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The same for 10**low to 10**high: powers of ten, with 2 and 5 times them where there is room."""
    if high - low < 0.7:
        return ticks(10.0**low, 10.0**high)
    powers = range(math.floor(low), math.ceil(high) + 1, math.ceil((high - low) / 8))
    found = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if high - low < 2.5 else (1,))]
    return [value for value in found if 10.0**low <= value <= 10.0**high]


def label(value: float) -> str:
    """A round number in few letters."""
    for letter, unit in {"G": 1e9, "M": 1e6, "k": 1e3}.items():
        if unit <= abs(value) < 1e12:
            return f"{value / unit:g}{letter}"
    return f"{value:g}" if value == 0 or 1e-3 <= abs(value) < 1 else number(value).replace(".0e", "e")


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–" if value is None else "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0 or 1e-3 <= abs(value) < 1e15:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
