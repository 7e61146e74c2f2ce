"""`python -m data.runs.report`: training runs as one HTML page, which loads nothing from anywhere."""

import base64
import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from data.cli import ArgumentParser, InputError, run
from data.files import atomic_write
from data.runs.report_charts import (
    BOTTOM,
    CHARTS,
    LEFT,
    RIGHT,
    TOP,
    chart,
    color,
    controls,
    look,
    number,
    points,
    spread,
)
from data.runs.report_input import AXES, SERIES, Run, load_run

STYLE, SCRIPT = (Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
SAMPLES = 60  # shown of a run, at most
TOKENIZERS_DIFFER = (
    "The two models have different tokenizers, so that a token is not the same amount of text to both: only their bits "
    "per byte can be compared, which are of the same text."
)


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


def other_tokenizers(c: dict[str, Any]) -> bool:
    """Whether the models of a comparison have different tokenizers."""
    return c["pretrained"].get("tokenizer") != c["finetuned"].get("tokenizer")


def comparison(c: dict[str, Any]) -> str:
    """Two models side by side. Its strings are escaped already."""
    sides = ("pretrained", "finetuned")
    heads, keys = (
        ["model", "loss (nats a token)", "perplexity", "bits per byte"],
        ["loss", "perplexity", "bits_per_byte"],
    )
    # older comparisons have no bits per byte
    rows = [[f"{side}: {c[side]['name']}", *(number(c[side].get(key)) for key in keys)] for side in sides]
    differ = f"<p>{TOKENIZERS_DIFFER}</p>" if other_tokenizers(c) else ""
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
{table(heads, rows)}{differ}
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
<p>error: ‖tinygrad − reference‖ ÷ ‖reference‖, where the reference is PyTorch in float64.</p>
<details><summary>SHA-256 of the weights and sources compared</summary>{hashes}</details>"""


def share(row: dict[str, Any]) -> float:
    """How much of what is allowed the error takes up. What can't be told counts as too much."""
    if row["error"] == 0:
        return 0.0
    ratio = row["error"] / row["allowed"] if row["error"] and row["allowed"] else math.inf
    return math.inf if math.isnan(ratio) else ratio


def pairs(items: dict[str, str], kind: str = "facts") -> str:
    return f'<dl class="{kind}">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in items.items())}</dl>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f"""<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>
<tbody>{lines}</tbody></table></div>"""


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
