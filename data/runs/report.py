"""`python -m data.runs.report`: training runs as one HTML page, which loads nothing from anywhere."""

import base64
import hashlib
import json
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from data.cli import ArgumentParser, InputError, run
from data.files import atomic_write
from data.runs.run_folder import read_metrics, read_samples, read_sealed

# what the files of a run have to hold for this page, at least; see `fits`
NUMBER = int | float | None
RUN: dict[str, Any] = {
    **{"command": [str], "options": dict, "parameters": int, "device": str, "card": str, "versions": dict},
    **{"config": {"n_layer": int, "n_head": int, "n_embd": int}, "data": {"folder": str, "checksum": str}},
}
ROW = {"check": str, "name": str, "error": NUMBER, "own": NUMBER, "allowed": NUMBER, "passed": bool}
CONTINUED = [{"step": int, "command": [str]}]
SOURCE = {"commit": str | None, "clean": bool | None}  # as `data.runs.revision.revision` says; older runs have none
PARITY: dict[str, Any] = {
    **{"verdict": str, "culprit": str | None, "summary": str, "dtype": str, "device": str, "versions": dict},
    **{"model": {"sha256": str}, "sources": dict, "rows": [ROW]},
}
SIDE = {"name": str, "loss": NUMBER, "perplexity": NUMBER}
TOKENS = {"pieces": [str], "probabilities": [NUMBER]}
COMPARISON: dict[str, Any] = {
    **{"pretrained": SIDE, "finetuned": SIDE, "data": str, "tokens": int, "seq_len": int, "sampling": dict},
    **{"texts": [{"prompt": str, "pretrained": TOKENS, "finetuned": TOKENS}]},
}

AXES = ["step", "tokens", "seconds"]
CHARTS = {  # title: the unit, and columns of metrics.jsonl with their names
    "Loss": ("nats a token", {"loss": "training", "val_loss": "validation"}),
    "Learning rate": ("", {"lr": "learning rate"}),
    "Gradient norm": ("before clipping", {"grad_norm": "gradient norm"}),
    "Throughput": ("tokens a second", {"tokens_per_second": "tokens a second"}),
}
SERIES = [key for _, series in CHARTS.values() for key in series]
NOISY = {"loss", "grad_norm", "tokens_per_second"}  # drawn thin, with a running mean over it
STRETCHES = 480  # of a long run, each drawn by its extremes
SAMPLES = 60  # shown of a run, at most
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 270, 56, 462, 12, 244  # a chart, and the frame in it
COLORS, DASHES = 6, 5  # as many as STYLE has; together they repeat after 30 runs
MARKS = [  # of the validation loss: circle, square, triangle, diamond
    *("m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "m-2.7-2.7h5.4v5.4h-5.4z"),
    *("m0-3.6l3.3 6h-6.6z", "m0-3.8l3.8 3.8l-3.8 3.8l-3.8-3.8z"),
]

Point = dict[str, float]  # "value", its running "mean", and where on AXES it is


@dataclass(frozen=True)
class Run:
    """A run's folder as it was read: what is missing there is empty or None here."""

    name: str
    command: str
    facts: dict[str, Any]  # run.json
    metrics: list[dict[str, float]]  # AXES and SERIES, as far as a row has them
    left_out: int  # values of metrics.jsonl that are no finite numbers
    samples: list[tuple[int, str]]  # (step, text)
    parity: dict[str, Any] | None
    comparison: dict[str, Any] | None


def fits(value: Any, shape: Any) -> bool:
    """Whether a value out of JSON is of a type, or an object with such keys at least, or a list of such elements.

    A whole number has to be one that counts something, as those of any length could not be shown.
    """
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], s) for key, s in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(element, shape[0]) for element in value)
    return isinstance(value, shape) and not (isinstance(value, int) and abs(value) > 2**64)


def load_run(folder: Path) -> Run:
    """Reads a run's folder, also while it is being written. Raises `InputError`, naming the file that is damaged."""
    if not (folder / "run.json").is_file():
        raise InputError(f"{folder} holds no run (it has no run.json); pass the folder of one")

    def read(name: str, shape: dict[str, Any]) -> dict[str, Any] | None:
        if not (folder / name).is_file():
            return None
        value = read_sealed(folder / name)
        if not fits(value, shape):
            raise InputError(f"{folder / name} is damaged or of another version; copy it again or remove it")
        return value

    facts, parity, comparison = read("run.json", RUN), read("parity.json", PARITY), read("compare.json", COMPARISON)
    assert facts
    whole = fits(facts.setdefault("continued", []), CONTINUED)
    if not whole or not all(fits(part["source"], SOURCE) for part in [facts, *facts["continued"]] if "source" in part):
        raise InputError(f"{folder / 'run.json'} is damaged or of another version; copy it again or remove it")
    sides = [text[side] for text in (comparison or {"texts": []})["texts"] for side in ("pretrained", "finetuned")]
    if any(len(side["pieces"]) != len(side["probabilities"]) for side in sides):
        raise InputError(f"{folder / 'compare.json'} is damaged (pieces without probabilities); make it again")
    path = folder / "metrics.jsonl"
    try:
        rows = read_metrics(folder) if path.exists() else []
        for i, row in enumerate(rows):
            numbers = {key: NUMBER for key in AXES + SERIES if fits(row, dict) and key in row}
            if not fits(row, numbers | {"step": int}):
                raise ValueError(f"line {i + 1} is no object with a step and other numbers")
            if i and row["step"] <= rows[i - 1]["step"]:
                raise ValueError(f"line {i + 1} is no later step than the line before")
    except (ValueError, RecursionError, KeyError, TypeError) as e:
        raise InputError(f"{path} is damaged ({e}); copy it again") from None
    samples = folder / "samples.md"
    return Run(
        name=folder.resolve().name,
        command=shlex.join(facts["command"]),
        facts=facts,
        metrics=[{key: row[key] for key in AXES + SERIES if key in row and drawable(row[key])} for row in rows],
        left_out=sum(not drawable(row[key]) for row in rows for key in AXES + SERIES if key in row),
        samples=read_samples(samples) if samples.exists() else [],
        parity=parity,
        comparison=comparison,
    )


def drawable(value: float | None) -> bool:
    """Whether it is a finite number, and far enough below float64's largest that differences cannot overflow."""
    return value is not None and abs(value) < 1e300


def report_page(runs: Sequence[Run]) -> str:
    """The page that shows one run, or several with their curves in the same charts."""
    curves = [{key: points(run.metrics, key) for key in SERIES} for run in runs]
    values = {axis: [row[axis] for run in runs for row in run.metrics if axis in row] for axis in AXES}
    ranges = {axis: spread(found or [0.0]) for axis, found in values.items()}
    charts = "".join(chart(title, curves, ranges) for title in CHARTS)
    data = {
        "frame": [LEFT, RIGHT, TOP, BOTTOM],
        "ranges": ranges,
        "charts": {title: series for title, (_, series) in CHARTS.items()},
        "names": [run.name for run in runs],
        "styles": [{key: color(look(i, key, len(runs))) for key in SERIES} for i in range(len(runs))],
        "curves": [
            {key: [[*map(p.get, AXES), p["value"]] for p in found] for key, found in of_run.items()}
            for of_run in curves
        ],
    }
    shown = [Run(**escaped(vars(run))) for run in runs]  # all of it, and here, so that nothing below can forget to
    title = shown[0].name if len(shown) == 1 else f"{len(shown)} runs"
    heads = [figures(run) for run in shown]
    rows = [[run.name, *head.values()] for run, head in zip(shown, heads, strict=True)]
    body = f"""<header><p class="kicker">GPT-2 trained in tinygrad</p><h1>{title}</h1></header>
{pairs(heads[0]) if len(shown) == 1 else table(["run", *heads[0]], rows)}
<h2>Curves</h2>
{controls(shown) + f'<div class="charts">{charts}</div>' if charts else "<p>Nothing has been measured yet.</p>"}
{"".join(section(run, named=len(shown) > 1) for run in shown)}"""
    return page(title, body, data)


def comparison_page(c: dict[str, Any]) -> str:
    """The page that shows a comparison alone. `c` is what compare.json holds, with the keys of `COMPARISON`."""
    header = '<header><p class="kicker">GPT-2 in tinygrad</p><h1>Before and after</h1></header>'
    return page("Before and after", header + comparison(escaped(c)))


def escaped(value: Any) -> Any:
    """The same with every string in it made safe to stand in HTML."""
    if isinstance(value, dict):
        return {escape(str(k)): escaped(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(v) for v in value]
    return escape(value) if isinstance(value, str) else value


def page(title: str, body: str, data: dict[str, Any] | None = None) -> str:
    """The whole page. Only our own script may run, whatever the files of a stranger's run have brought in."""
    script, policy = "", "'none'"
    if data:
        embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # no </script>
        script = f'<script type="application/json" id="data">{embedded}</script>\n<script>{SCRIPT}</script>'
        policy = f"'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src {policy};
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
{script}
</body>
</html>
"""
    return text.encode(errors="replace").decode()  # JSON can hold half a character, which no file could


def figures(run: Run) -> dict[str, str]:
    """What is said of a run first."""
    config, options = run.facts["config"], run.facts["options"]
    columns = {key: [row[key] for row in run.metrics if key in row] for key in AXES + SERIES}
    step, tokens, seconds = (columns[axis][-1] if columns[axis] else 0 for axis in AXES)
    val, rates = columns["val_loss"], columns["tokens_per_second"]
    least = f" (least {min(val):.3f})" if val and min(val) < val[-1] else ""
    size = f"{config['n_layer']} layers, {config['n_head']} heads, {config['n_embd']} wide"
    return {
        "Validation loss": f"{val[0]:.3f} → {val[-1]:.3f}{least}" if val else "–",
        "Perplexity": f"{number(perplexity(val[0]))} → {number(perplexity(val[-1]))}" if val else "–",
        "Parity with PyTorch": run.parity["verdict"] if run.parity else "not checked",
        "Steps": f"{step:,.0f} of {options.get('steps', '?')}",
        "Tokens trained on": f"{tokens:,.0f}",
        "Training time": f"{seconds:,.0f} s",
        "Throughput (median)": f"{statistics.median(rates):,.0f} tokens/s" if rates else "–",
        "Model": f"{run.facts['parameters']:,} parameters: {size}",
        "Device": f"{run.facts['device']} ({run.facts['card']}), {options.get('dtype', '?')}",
        "Data": str(options.get("data", run.facts["data"]["folder"])),
    }


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def section(run: Run, named: bool) -> str:
    """What the curves do not show of a run; `named` says of which one."""
    options = {name.replace("_", "-"): str(value) for name, value in run.facts["options"].items()}
    left_out = f"<p>Not drawn: {run.left_out:,} values of metrics.jsonl that are no finite numbers.</p>"
    return f"""<section>{f"<h2>{run.name}</h2>" if named else ""}{left_out if run.left_out else ""}
{samples(run.samples)}
{comparison(run.comparison) if run.comparison else ""}
{parity(run.parity)}
<h3>How to repeat this</h3>
<div class="scroll" tabindex="0"><pre>{run.command}</pre></div>
<p>With {versions(run.facts)}{source(run.facts)}.{continued(run.facts)}</p>
<details><summary>All options, and the data's checksum</summary>{pairs(options)}
{pairs({f"SHA-256 of {run.facts['data']['folder']}": run.facts["data"]["checksum"]}, "hashes")}</details>
</section>
"""


def continued(facts: dict[str, Any]) -> str:
    """Where a run was stopped and gone on with, perhaps on another device or by the other implementation."""
    parts = [f" Continued from step {p['step']:,}: {' '.join(p['command'])}{source(p)}." for p in facts["continued"]]
    return "".join(parts)


def source(facts: dict[str, Any]) -> str:
    """The commit that computed a run, or went on with it, where that is known."""
    known = facts.get("source", {})
    if not known.get("commit"):
        return ""
    return f", commit {known['commit']}{'' if known['clean'] else ' with changes'}"


def versions(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in facts["versions"].items())


def samples(written: list[tuple[int, str]]) -> str:
    """Samples through time, one under the other; where scripts run, with a slider that shows one."""
    if not written:
        return "<h3>Samples</h3>\n<p>None has been written yet.</p>"
    count = min(len(written), SAMPLES)
    # evenly, from the first to the last
    chosen = [written[i * (len(written) - 1) // max(count - 1, 1)] for i in range(count)]
    few = f" ({count} of {len(written):,})" if count < len(written) else ""
    articles = "".join(f'<article><h4>Step {step:,}</h4><p class="text">{text}</p></article>' for step, text in chosen)
    return f"""<h3>Samples through time{few}</h3>
<div class="samples"><label class="live">earlier <input type="range" max="{count - 1}" value="{count - 1}"
autocomplete="off" aria-label="which sample"> later</label>{articles}</div>"""


def comparison(c: dict[str, Any]) -> str:
    """Two models side by side. Its strings are escaped already."""
    sides = ("pretrained", "finetuned")
    rows = [[f"{side}: {c[side]['name']}", number(c[side]["loss"]), number(c[side]["perplexity"])] for side in sides]
    texts = ""
    for text in c["texts"]:
        columns = "".join(
            f'<div><h4>{side}</h4><p class="text"><b>{text["prompt"]}</b>{shaded(**text[side])}</p></div>'
            for side in sides
        )
        texts += f'<div class="sides">{columns}</div>'
    sampling = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in c["sampling"].items())
    legend = "".join(shaded([f" {p:.1%} "], [p]).replace(".0%", "%") for p in (1, 0.1, 0.01, 0.001))
    return f"""<h3>Pretrained and fine-tuned</h3>
<p>On {c["tokens"]:,} validation tokens of {c["data"]}, {c["seq_len"]} at a time.</p>
{table(["model", "loss (nats a token)", "perplexity"], rows)}
<p>Both continue the same prompts with the same random numbers: {sampling}. The stronger a token's shade, the less
likely it was to the model that wrote it: <span class="text">{legend}</span></p>
{texts}"""


def shaded(pieces: list[str], probabilities: list[float | None]) -> str:
    """Tokens on a ground whose strength is the logarithm of their probability, from 1 down to 1/1000."""
    spans = []
    for piece, p in zip(pieces, probabilities, strict=True):
        strength = min(max(-math.log10(p) / 3, 0), 1) if p and 0 < p < math.inf else 1
        visible = piece.replace("\n", "↵").replace("\t", "⇥")  # in the tooltip
        kind = "token newline" if "\n" in piece else "token"
        percent = "no probability" if p is None else f"{number(100 * p)} %"
        spans.append(f'<span class="{kind}" style="--s:{strength:.2f}" title="“{visible}” {percent}">{piece}</span>')
    return "".join(spans)


def parity(c: dict[str, Any] | None) -> str:
    """The verdict of the comparison with PyTorch before the first step, and of each check the row nearest its bound."""
    if c is None:
        return "<h3>Parity with PyTorch</h3>\n<p>Not checked: the run has no parity.json.</p>"
    checks: dict[str, list[dict[str, Any]]] = {}
    for row in c["rows"]:
        checks.setdefault(row["check"], []).append(row)
    lines = []
    for check, rows in checks.items():
        worst = max(rows, key=share)
        failed = sum(not row["passed"] for row in rows)
        figures = [number(worst[key]) for key in ("error", "own", "allowed")]
        lines.append([check, f"{len(rows):,}", f"{failed:,}", worst["name"], *figures])
    heads = ["check", "tensors", "failed", "nearest its bound", "error", "PyTorch's own", "allowed"]
    culprit = f"<p>What is wrong: {c['culprit']}</p>" if c["culprit"] else ""
    hashes = pairs({"weights": c["model"]["sha256"], **c["sources"]}, "hashes")
    return f"""<h3>Parity with PyTorch</h3>
<p><strong class="{"good" if c["verdict"] == "equal" else "bad"}">{c["verdict"].capitalize()}.</strong>
{c["summary"]}; on {c["device"]} in {c["dtype"]}, with {versions(c)}.</p>{culprit}
{table(heads, lines)}
<p>error: ‖tinygrad − truth‖ ÷ ‖truth‖, where truth is PyTorch in float64.</p>
<details><summary>SHA-256 of the weights and sources compared</summary>{hashes}</details>"""


def share(row: dict[str, Any]) -> float:
    """How much of what is allowed the error takes up. What can't be told counts as too much."""
    if row["error"] == 0:
        return 0.0
    ratio = row["error"] / row["allowed"] if row["error"] and row["allowed"] else math.inf
    return math.inf if math.isnan(ratio) else ratio


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–" if value is None else "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0 or 1e-3 <= abs(value) < 1e15:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def pairs(items: dict[str, str], kind: str = "facts") -> str:
    return f'<dl class="{kind}">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in items.items())}</dl>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f"""<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>
<tbody>{lines}</tbody></table></div>"""


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
    shown = {"loss": f"{sign('thin', 0)} training (a batch)", "mean": f"{sign('bold', 0)} running mean"}
    shown["val_loss"] = f"{sign('bold', validation, True)} validation"
    named = {f"run{i}": f"{sign('bold', i, True)} {run.name}" for i, run in enumerate(runs)} if len(runs) > 1 else {}

    def boxes(switches: dict[str, str]) -> str:
        return "".join(f'<label><input type="checkbox" id="{k}" checked> {v}</label>' for k, v in switches.items())

    rules = "".join(f"body:has(#{name}:not(:checked)) .{name}, " for name in [*AXES, *shown, *named])
    rules += "body:has(#log:checked) .linear, body:not(:has(#log:checked)) .log { display: none; }"
    return f"""<style>{rules}</style>
<form autocomplete="off"><span>against</span>{axes}<label><input type="checkbox" id="log"> log scale</label></form>
<form autocomplete="off"{' class="several"' if named else ""}>{boxes(shown)}</form>
<form autocomplete="off">{boxes(named)}</form>"""


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
    drawings = "".join(drawing(drawn, axis, ranges[axis], log) for axis in AXES for log in (False, True))
    return f"""<figure data-chart="{title}"><figcaption><b>{title}</b> {unit}</figcaption>
{drawings}<output></output></figure>
"""


def drawing(drawn: list[tuple[int, str, int, list[Point]]], axis: str, width: tuple[float, float], log: bool) -> str:
    """Curves (run, column, style, points) in one frame; on a logarithmic scale without what is not above 0."""
    heights = [y for *_, found in drawn for p in found for y in (p["value"], p["mean"]) if y > 0 or not log]
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
        for column, weight in {"value": "thin", "mean": "bold mean"}.items() if key in NOISY else [("value", "bold")]:
            inside = [p for p in found if axis in p and (p[column] > 0 or not log)]
            places = [f"{at_x(p[axis]):.1f} {at_y(p[column]):.1f}" for p in inside]
            if places:
                parts.append(f'<path class="{weight} {kinds}" d="M{"L".join(places)}"/>')
            if places and key == "val_loss":
                some = places[:: math.ceil(len(places) / 25)]
                marks = "".join(f"M{place}{MARKS[style % len(MARKS)]}" for place in some)
                parts.append(f'<path class="mark {kinds}" d="{marks}"/>')
    scale = "log" if log else "linear"
    return f"""<svg class="{axis} {scale}" viewBox="0 0 {WIDTH} {HEIGHT}" tabindex="0" role="img"
aria-label="against {axis}, {scale} scale">{"".join(parts)}<path class="cursor"/></svg>
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


def main() -> None:
    parser = ArgumentParser(
        prog="python -m data.runs.report",
        description="Training runs as one HTML page that needs no network: curves, samples, comparison, parity.",
        epilog="example: python -m data.runs.report runs/mine runs/other --out both.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="by default report.html in the run; of several, here")
    args = parser.parse_args()
    runs = [load_run(folder) for folder in args.runs]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(folder)) for run, folder in zip(runs, args.runs, strict=True)]
    out = args.out or (args.runs[0] if len(runs) == 1 else Path()) / "report.html"
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"{out} is not a file in a folder that is there; name another --out")
    with atomic_write(out, "w") as f:
        f.write(report_page(runs))
    print(f"Written to {out}")


STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1c1d1f; --soft: #62656b; --line: #d5d8dc;
  --good: #00734f; --bad: #c2410c; --shade: #e8a200;
  --c0: #0072b2; --c1: #c2410c; --c2: #00845c; --c3: #a8508a; --c4: #a87400; --c5: #4a4d52; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e8e9eb; --soft: #a0a4ab; --line: #33373d;
  --good: #3fc497; --bad: #ff8a5c; --shade: #b87800;
  --c0: #56b4e9; --c1: #ff8a5c; --c2: #3fc497; --c3: #dd93c2; --c4: #e6b030; --c5: #c9ccd1; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: clamp(2rem, 7vw, 3.5rem); line-height: 1.1; letter-spacing: -0.03em; margin: 0 0 1rem; }
h2 { font-size: 1.4rem; margin: 2.5rem 0 0.5rem; } h3 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
h4 { font-size: 1rem; margin: 0.5rem 0 0.25rem; color: var(--soft); font-weight: 500; }
p { margin: 0.5rem 0; max-width: 75ch; } .text { white-space: pre-wrap; }
.kicker, dt, figcaption, summary { color: var(--soft); } figcaption b { color: var(--ink); }
.good { color: var(--good); } .bad { color: var(--bad); }
dl { margin: 0.75rem 0; } dt { font-size: 0.85rem; } dd { margin: 0; } summary { cursor: pointer; padding: 0.4rem 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(10rem, 40%), 1fr)); gap: 0.6rem 1.5rem; }
.hashes dd, pre { font: 0.8rem/1.5 ui-monospace, monospace; } pre { margin: 0.5rem 0; }
.charts, .sides { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem 2rem; }
.charts > p { grid-column: 1 / -1; margin: 0; color: var(--soft); }
figure { margin: 0; } figcaption, output, label { font-size: 0.9rem; } figure svg { display: block; width: 100%; }
svg text { font-size: 11px; fill: var(--soft); } svg path { fill: none; } .grid { stroke: var(--line); }
.grid, .cursor { stroke-width: 0.6; } .cursor { stroke: var(--ink); } figure svg { touch-action: pan-y; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.c5 { --c: var(--c5); } .d1 { stroke-dasharray: 7 3; } .d2 { stroke-dasharray: 2 2; } .d3 { stroke-dasharray: 9 3 2 3; }
.d4 { stroke-dasharray: 4 4; } .thin, .bold { stroke: var(--c); stroke-linejoin: round; }
.thin { stroke-width: 1; opacity: 0.6; } .bold { stroke-width: 1.7; } .faint { opacity: 0.25; }
svg .mark { fill: var(--c); } output { color: var(--c); font-variant-numeric: tabular-nums; }
output span { display: inline-block; margin-right: 1.2rem; color: var(--c, var(--soft)); }
form { display: flex; flex-wrap: wrap; align-items: center; gap: 0.4rem 1.4rem; margin: 0.6rem 0; }
.several path { --c: var(--soft); }
label { display: inline-flex; align-items: center; gap: 0.4rem; } label svg { flex: none; width: 30px; height: 10px; }
body:not(.scripted) .live { display: none; } input { accent-color: var(--c0); margin: 0; }
.scripted .samples { display: grid; } .scripted .samples article { grid-area: 2 / 1; min-width: 0; }
.past { visibility: hidden; } .samples .text { max-height: 20rem; overflow-y: auto; }
.samples input { width: min(24rem, 60vw); }
.token { background: color-mix(in srgb, var(--shade) calc(var(--s) * 75%), transparent); border-radius: 2px; }
.token:hover { outline: 1px solid var(--ink); } .newline::before { content: "↵"; color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; margin: 0.75rem 0; }
th, td { padding: 0.25rem 1.2rem 0.25rem 0; text-align: left; border-bottom: 1px solid var(--line); }
th, td { white-space: nowrap; font-weight: 400; } thead th { color: var(--soft); }
tbody th { font-weight: 600; white-space: normal; min-width: 7rem; }
td { font-variant-numeric: tabular-nums; }
@media (max-width: 760px) { .charts, .sides { grid-template-columns: minmax(0, 1fr); } svg text { font-size: 14px; } }
@media print { .live { display: none; } .past { visibility: visible; } .scripted .samples { display: block; }
  .token { print-color-adjust: exact; } .scroll { overflow: visible; } th, td, pre { white-space: pre-wrap; } }
"""

SCRIPT = """
"use strict";
{
const { frame: [LEFT, RIGHT, TOP, BOTTOM], ranges, charts, names, styles, curves } =
  JSON.parse(document.getElementById("data").textContent);
const figures = [...document.querySelectorAll("figure")], axes = Object.keys(ranges);
const on = (id) => document.getElementById(id)?.checked ?? true;
let cursor = 1;  // where the read-outs are, as a share of the x axis

function exact(value) {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e15)) return value.toExponential(2).replace("e+", "e");
  return value.toLocaleString("en", size < 1000 ? { maximumSignificantDigits: 5 } : { maximumFractionDigits: 0 });
}

function read(figure) {
  const axis = axes.findIndex(on), [left, right] = ranges[axes[axis]], x = left + cursor * (right - left);
  const away = (point) => Math.abs(point[axis] - x);
  const closest = (points) => points.reduce((a, b) => away(b) < away(a) ? b : a, points[0]);
  const nearest = curves.flatMap((curve, run) => Object.entries(charts[figure.dataset.chart]).map(([key, name]) => {
    const points = on("run" + run) && on(key) ? curve[key].filter((point) => point[axis] !== null) : [];
    return { run, name, style: styles[run][key], point: closest(points) };
  })).filter(({ point }) => point);
  const point = closest(nearest.map(({ point }) => point));
  const at = point ? LEFT + (point[axis] - left) / (right - left) * (RIGHT - LEFT) : LEFT;
  for (const line of figure.querySelectorAll(".cursor")) line.setAttribute("d", `M${at} ${TOP}V${BOTTOM}`);
  const span = (text, kind) => Object.assign(document.createElement("span"), { textContent: text, className: kind });
  figure.querySelector("output").replaceChildren(
    span(point ? `${axes[axis]} ${exact(point[axis])}` : "nothing shown", ""),
    ...nearest.map(({ run, name, style, point: { [axis]: where, 3: value } }) => span(
      (names.length > 1 ? `${names[run]}, ` : "") + `${name} ${exact(value)}`
      + (where === point[axis] ? "" : ` (at ${exact(where)})`), style)));
}

function move(share) {
  cursor = Math.min(Math.max(share, 0), 1);
  figures.forEach(read);
}

for (const svg of document.querySelectorAll("figure svg")) {
  for (const event of ["pointermove", "pointerdown"]) svg.addEventListener(event, ({ clientX }) => {
    const { left, width } = svg.getBoundingClientRect();
    move(((clientX - left) / width * svg.viewBox.baseVal.width - LEFT) / (RIGHT - LEFT));
  });
  svg.addEventListener("keydown", ({ key }) => move(cursor + ({ ArrowLeft: -0.01, ArrowRight: 0.01 }[key] ?? 0)));
}
for (const form of document.querySelectorAll("form")) form.addEventListener("input", () => move(cursor));
move(cursor);

for (const list of document.querySelectorAll(".samples")) {
  const slider = list.querySelector("input"), articles = [...list.querySelectorAll("article")];
  const show = () => articles.forEach((article, i) => article.classList.toggle("past", i !== +slider.value));
  slider.addEventListener("input", show);
  show();
}
document.body.classList.add("scripted");
}
"""

if __name__ == "__main__":
    run(main)
