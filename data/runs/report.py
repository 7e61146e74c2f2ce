"""`python -m data.runs.report`: training runs as one HTML page, which loads nothing from anywhere."""

import math
import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from typing import Any

from data.cli import ArgumentParser, InputError, run
from data.evaluation.losses import perplexity
from data.files import atomic_write
from data.runs.card import computed_by, questions_of
from data.runs.report_charts import (
    BOTTOM,
    CHARTS,
    LEFT,
    NOISY,
    RIGHT,
    TOP,
    Point,
    chart,
    color,
    controls,
    look,
    number,
    points,
    spread,
)
from data.runs.report_comparison import comparison
from data.runs.report_html import breakable, command, escaped, machine, page, pairs, spoken, table
from data.runs.report_input import AXES, SERIES, Run, load_run

SAMPLES = 60  # shown of a run, at most


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
        "noisy": sorted(NOISY),
        "names": [run.name for run in runs],
        "styles": [{key: color(look(i, key, len(runs))) for key in SERIES} for i in range(len(runs))],
        "curves": [
            {key: [[*map(p.get, AXES), p["value"], *means(key, p)] for p in found] for key, found in of_run.items()}
            for of_run in curves
        ],
    }
    shown = [Run(**escaped(vars(run))) for run in runs]  # all of it, and here, so that nothing below can forget to
    title = shown[0].name if len(shown) == 1 else f"{len(shown)} runs"
    frameworks = sorted({"tinygrad" if "tinygrad" in run.facts["versions"] else "PyTorch" for run in runs})
    kicker = f'<p class="kicker">GPT-2 trained in {" and ".join(frameworks)}</p>'
    body = f"""<header>{kicker}<h1>{breakable(title)}</h1></header>
{pairs(figures(shown[0])) if len(shown) == 1 else summary(shown)}
<h2>Curves</h2>
{controls(shown) + f'<div class="charts">{charts}</div>' if charts else "<p>Nothing has been measured yet.</p>"}
{"".join(section(run, named=len(shown) > 1) for run in shown)}"""
    return page(title, body, data)


def means(key: str, point: Point) -> list[float]:
    """What is embedded of the running mean, in few digits."""
    return [float(f"{point['mean']:.5g}")] if key in NOISY else []


def figures(run: Run) -> dict[str, str]:
    """What is said of a run first."""
    config, options = run.facts["config"], run.facts["options"]
    columns = {key: [row[key] for row in run.metrics if key in row] for key in AXES + SERIES}
    step, tokens, seconds = (columns[axis][-1] if columns[axis] else 0 for axis in AXES)
    val, rates = columns["val_loss"], columns["tokens_per_second"]
    rate = statistics.median(rates) if rates else 0.0
    least = f" (least {min(val):.3f})" if val and min(val) < val[-1] else ""
    size = f"{config['n_layer']} layers, {config['n_head']} heads, {config['n_embd']} wide"
    return {
        "Validation loss": f"{val[0]:.3f} → {val[-1]:.3f}{least}" if val else "–",
        "Perplexity": f"{number(perplexity(val[0]))} → {number(perplexity(val[-1]))}" if val else "–",
        "Parity with PyTorch": run.parity["verdict"] if run.parity else "not checked",
        "Steps": f"{step:,.0f} of {options.get('steps', '?')}",
        "Tokens trained on": f"{tokens:,.0f}",
        "Training time": f"{seconds:,.0f} s",
        "Throughput (median)": f"{rate:,.0f} tokens/s{mfu(run, rate)}" if rates else "–",
        "Global batch": global_batch(run),
        "Model": f"{run.facts['parameters']:,} parameters: {size}",
        "Device": f"{machines(run.facts)}, {options.get('dtype', '?')}",
        "Resumed": resumed(run.facts["continued"]),
        "Data": breakable(str(options.get("data", run.facts["data"]["folder"]))),
    }


def machines(part: dict[str, Any]) -> str:
    """What computes, or computed from where the run went on: a device, or those of all ranks."""
    if "ranks" not in part:
        return machine(part["device"], part["card"])
    ranks = part["ranks"]
    cards = ", ".join(f"{count} × {name}" for name, count in ranks["cards"].items())
    hosts = f"{len(ranks['hosts'])} host{'s' * (len(ranks['hosts']) != 1)}"
    return f"{ranks['world_size']:,} ranks on {hosts}: {cards}"


def parts(run: Run) -> list[dict[str, Any]]:
    """The run's beginning, and what is said of each time it went on."""
    return [run.facts, *run.facts["continued"]]


def mfu(run: Run, rate: float) -> str:
    """What so many tokens a second are of the peak rate of all GPUs; nothing where these are not known, or were not the
    same throughout.
    """
    peaks = {part.get("peak_flops", 0) * part.get("ranks", {}).get("world_size", 1) for part in parts(run)}
    flops = run.facts.get("flops_a_token")
    if len(peaks) > 1 or not flops or not (peak := peaks.pop()):
        return ""
    return f", MFU {flops * rate / peak:.1%}"


def global_batch(run: Run) -> str:
    """What an update is of, on all ranks."""
    sizes = [run.facts["options"].get(name) for name in ("grad_accum", "batch_size", "seq_len")]
    if "ranks" in run.facts:
        windows, tokens = run.facts["ranks"]["global_batch"], run.facts["ranks"]["global_batch_tokens"]
    elif all(type(size) is int and 0 < size < 2**32 for size in sizes):
        windows, tokens = sizes[0] * sizes[1], math.prod(sizes)
    else:
        return "–"
    return f"{tokens:,} tokens in {windows:,} windows"


def resumed(continued: Sequence[dict[str, Any]]) -> str:
    """How often a run was gone on with, after a stop or by a restart."""
    if not continued:
        return "never"
    times = "once" if len(continued) == 1 else f"{len(continued)} times"
    steps = ", ".join(f"{part['step']:,}" for part in continued)
    return f"{times}, from step {steps}"


def summary(runs: Sequence[Run]) -> str:
    """Several runs: a table of what differs among them, and what is the same in all."""
    said = [figures(run) for run in runs]
    same = {name: value for name, value in said[0].items() if all(facts[name] == value for facts in said)}
    differing = [name for name in said[0] if name not in same]
    rows = [[breakable(run.name), *(facts[name] for name in differing)] for run, facts in zip(runs, said, strict=True)]
    return f"""{table(["run", *differing], rows, "what differs among the runs")}
{f"<p>The same in all {len(runs)}:</p>{pairs(same)}" if same else ""}"""


def section(run: Run, named: bool) -> str:
    """What the curves do not show of a run; `named` says of which one."""
    options = {name.replace("_", "-"): breakable(spoken(value)) for name, value in run.facts["options"].items()}
    left_out = f"<p>Not drawn: {run.left_out:,} values of metrics.jsonl that are no finite numbers.</p>"
    return f"""<section>{f"<h2>{breakable(run.name)}</h2>" if named else ""}{left_out if run.left_out else ""}
{samples(run.samples)}
{tasks(run)}
{comparison(run.comparison) if run.comparison else ""}
{parity(run.parity)}
<h3>How to repeat this</h3>
{command(run.command)}
<p>With {versions(run.facts)}{source(run.facts)}.{continued(run.facts)}</p>
<details><summary>All options, and the data's checksum</summary>{pairs(options)}
{pairs({f"SHA-256 of {breakable(run.facts['data']['folder'])}": run.facts["data"]["checksum"]}, "hashes")}</details>
</section>
"""


def continued(facts: dict[str, Any]) -> str:
    """Where a run was stopped and gone on with, perhaps on another device or by the other implementation."""
    said = ""
    for part in facts["continued"]:
        command = escape(shlex.join(map(unescape, part["command"])))
        on = f", on {machines(part)}" if "ranks" in part or {"device", "card"} <= part.keys() else ""
        said += f" Continued from step {part['step']:,}{on}: {command}{source(part)}."
    return said


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
        return "<h3>Samples</h3>\n<p>No sample has been written yet.</p>"
    count = min(len(written), SAMPLES)
    # evenly, from the first to the last
    chosen = [written[i * (len(written) - 1) // max(count - 1, 1)] for i in range(count)]
    few = f" ({count} of {len(written):,})" if count < len(written) else ""
    articles = "".join(
        f'<article><h4>Step {step:,}</h4><p class="text">{without_gaps(text)}</p></article>' for step, text in chosen
    )
    return f"""<h3>Samples through time{few}</h3>
<div class="samples"><label class="live">earlier <input type="range" max="{count - 1}" value="{count - 1}"
autocomplete="off" aria-label="which sample"> later</label>{articles}</div>"""


def tasks(run: Run) -> str:
    """Scores on tasks: those of `evaluate`, and those that were measured while it was trained."""
    said = ""
    if run.scores:
        heads = ["task", "metric", "score", "standard error", "chance", "questions", "examples", "after step", "by"]
        rows = [
            [
                *(breakable(row["task"]), row["metric"], decimals(row["value"])),
                *(decimals(row["stderr"]), number(row.get("chance")), breakable(questions_of(row))),
                "–" if row.get("shots") is None else f"{row['shots']}",
                *("–" if row["step"] is None else f"{row['step']:,}", computed_by(row)),
            ]
            for row in run.scores
        ]
        said += table(heads, rows, "scores on tasks")
    if run.scored:
        names = sorted({name for row in run.scored for name in row} - {"step"})
        rows = [[f"{row['step']:,.0f}", *(decimals(row.get(name)) for name in names)] for row in run.scored]
        limit = run.facts["options"].get("eval-limit", run.facts["options"].get("eval_limit", "?"))
        said += f"<p>While it was trained, on the first {limit} questions of each task:</p>"
        said += table(["step", *names], rows, "scores on tasks through time")
    return f"<h3>Evaluation</h3>\n{said}" if said else ""


def decimals(value: float | None) -> str:
    """A score with four decimals, as the harness prints it, so that a column's stand under one another."""
    return number(value) if value is None or not abs(value) < 1000 else f"{value:.4f}"


def without_gaps(text: str) -> str:
    """A text with its empty lines as signs, where they are many: young models write screens full of them."""
    return re.sub(r"\n{3,}", lambda ends: f'<span class="note">{"↵" * len(ends[0])}</span>\n', text)


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
        lines.append([check, f"{len(rows):,}", f"{failed:,}", breakable(worst["name"]), *figures])
    heads = ["check", "tensors", "failed", "nearest its bound", "error", "PyTorch's own", "allowed"]
    culprit = f"<p>What is wrong: {c['culprit']}</p>" if c["culprit"] else ""
    hashes = pairs({"weights": c["model"]["sha256"], **c["sources"]}, "hashes")
    return f"""<h3>Parity with PyTorch</h3>
<p><strong class="{"good" if c["verdict"] == "equal" else "bad"}">{c["verdict"].capitalize()}.</strong>
{c["summary"]}; on {c["device"]} in {c["dtype"]}, with {versions(c)}.</p>{culprit}
{table(heads, lines, "checks of parity")}
<p>error: ‖tinygrad − reference‖ ÷ ‖reference‖, where the reference is PyTorch in float64.</p>
<details><summary>SHA-256 of the weights and sources compared</summary>{hashes}</details>"""


def share(row: dict[str, Any]) -> float:
    """How much of what is allowed the error takes up. What can't be told counts as too much."""
    if row["error"] == 0:
        return 0.0
    ratio = row["error"] / row["allowed"] if row["error"] and row["allowed"] else math.inf
    return math.inf if math.isnan(ratio) else ratio


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


if __name__ == "__main__":
    run(main)
