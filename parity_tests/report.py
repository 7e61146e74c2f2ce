"""A certificate of parity as one HTML page, which loads nothing from anywhere."""

import math
import re
import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

from data.runs.report import share
from data.runs.report_html import breakable, command, escaped, machine, page, pairs

Row = dict[str, Any]

CHECKS = {
    "forward": ("Forward", "Activations at each edge between sub-layers, from the input at the left to the loss."),
    "backward": ("Backward", "Gradients at the same edges. Read right to left: from the loss back to the input."),
    "gradient": ("Gradients", "The gradient of each parameter, in the order of the model."),
    "training": ("Training", "Parameters and AdamW's moments after the last step."),
    "generation": ("Generation", "Logits and probabilities of each step, with a cache, and the tokens drawn."),
}
WORST = 15  # rows shown before any table is opened
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 270, 50, 474, 12, 244  # a plot, and the frame in it


def html(certificate: dict[str, Any]) -> str:
    """The page that shows a certificate."""
    c = escaped(certificate)  # all of it, and here, so that nothing below can forget to
    checks: dict[str, list[Row]] = {}
    for row in c["rows"]:
        checks.setdefault(row["check"], []).append(row)
    body = f"""{verdict(c)}
{facts(c)}
{definitions(c)}
<h2>Error through the model</h2>
{legend(c)}
<div class="charts">{"".join(plot(check, checks) for check in checks)}</div>
<h2>The rows nearest to their bound, or past it</h2>
<p>The first {min(WORST, len(c["rows"]))} of {len(c["rows"]):,},
failures first, then by error ÷ allowed. All are in the tables below.</p>
{table(worst_first(c["rows"])[:WORST], c, named=True)}
<h2>All rows</h2>
{"".join(details(check, rows, c) for check, rows in checks.items())}
<h2>How to repeat this</h2>
{command(escape(shlex.join(certificate["command"])))}
{pairs({"Versions": ", ".join(f"{k} {v}" for k, v in c["versions"].items()), "Commit": commit(c["revision"])})}
<details><summary>SHA-256 of the weights, and of every source that computes</summary>
{pairs({"weights": c["model"]["sha256"], **{breakable(k): v for k, v in c["sources"].items()}}, "hashes")}</details>"""
    names = heads(c)[1:]
    labels = "".join(f'td:nth-child({i})::before {{ content: "{name}"; }}\n' for i, name in enumerate(names, 2))
    return page(f"GPT-2 in tinygrad and PyTorch: {c['verdict']}", body, style=STYLE + labels)


def verdict(c: dict[str, Any]) -> str:
    failed, total = sum(not row["passed"] for row in c["rows"]), len(c["rows"])
    count = f"All {total:,} comparisons are" if not failed else f"{total - failed:,} of {total:,} comparisons are"
    culprit = f'<p class="culprit"><strong>What is wrong:</strong> {c["culprit"]}</p>' if c["culprit"] else ""
    return f"""<header class="{c["verdict"]}">
<p class="kicker">GPT-2: tinygrad compared with PyTorch</p>
<h1>{c["verdict"].capitalize()}</h1>
<p>{count} within the allowed error{f"; <strong>{failed:,} failed</strong>" if failed else ""}.</p>{culprit}
</header>"""


def facts(c: dict[str, Any]) -> str:
    model, config = c["model"], c["model"]["config"]
    sizes = f"{config['n_layer']} layers, {config['n_head']} heads, {config['n_embd']} wide"
    return pairs({
        "Model": f"{breakable(model['source'])}: {model['parameters']:,} parameters, {sizes}",
        "Device": machine(c["device"], c["card"]),
        "Dtype": c["dtype"],
        "Batch": f"{c['batch_size']} × {c['seq_len']} tokens, seed {c['seed']}",
        "Training": f"{c['steps']} steps of AdamW",
        "Time": f"{c['seconds']:,.1f} s",
    })  # fmt: skip


def commit(revision: dict[str, Any]) -> str:
    if revision["commit"] is None:
        return "unknown"
    return f"{revision['commit']}, {'clean' if revision['clean'] else 'with changes that are not committed'}"


def definitions(c: dict[str, Any]) -> str:
    if c["multiple"] is None:
        allowed = "a fixed bound, as only the order of summation differs"
    else:
        allowed = f"{c['multiple']:g} × own, unless the row gives another reason"
    own = "" if c["multiple"] is None else f"<b>own</b>: PyTorch's error in {c['dtype']} against the same reference; "
    return f"""<p><b>error</b>: ‖tinygrad − reference‖ ÷ ‖reference‖, where the reference is PyTorch in float64;
{own}<b>allowed</b>: {allowed}.</p>"""


def legend(c: dict[str, Any]) -> str:
    """The series differ in kind as well (dots, a line, a dashed line, crosses): colour is never alone."""
    series = {"tinygrad's error": '<circle class="error" cx="12" cy="5" r="3"/>'}
    if c["multiple"] is not None:
        series["PyTorch's own"] = '<path class="own" d="M0 5H24"/>'
    series["allowed"] = '<path class="allowed" d="M0 5H24"/>'
    series["failed"] = '<path class="failed" d="M9 2l6 6m0 -6l-6 6"/>'
    spans = "".join(f'<span><svg viewBox="0 0 24 10">{mark}</svg>{name}</span>' for name, mark in series.items())
    off = "off the scale: at its foot, as 0, or top; figures are in the tables, and where you point"
    return f'<p class="legend">{spans}<span>{off}</span></p>'


def plot(check: str, checks: dict[str, list[Row]]) -> str:
    """The rows of a check from left to right, with the logarithms of their errors upward."""
    sections: dict[str, list[Row]] = {}
    for row in checks[check]:
        sections.setdefault(section(row), []).append(row)
    rows = [row for members in sections.values() for row in members]
    # those to be compared by eye get the same scale
    pair = ("forward", "backward") if check in ("forward", "backward") else (check,)
    low, high = decades([row for name in pair for row in checks.get(name, [])])
    step = (RIGHT - LEFT) / len(rows)

    def y(value: float) -> float:
        """What has no logarithm, or is off the scale, is put on the scale's nearer end."""
        exponent = math.log10(value) if 0 < value < math.inf else (low if value == 0 else high)
        return BOTTOM - (min(max(exponent, low), high) - low) / (high - low) * (BOTTOM - TOP)

    bounded = [row["name"] for row in rows if row["allowed"] is not None and 0 < row["allowed"] < 10.0**low]

    def stairs(key: str) -> str:
        path, pen_down = "", False
        for i, row in enumerate(rows):
            if row[key] is not None:
                path += f"V{y(row[key]):.1f}" if pen_down else f"M{LEFT + i * step:.1f} {y(row[key]):.1f}"
                path += f"H{LEFT + (i + 1) * step:.1f}"
            pen_down = row[key] is not None
        return f'<path class="{key}" d="{path}"/>'

    parts = []
    for exponent in range(low, high + 1, math.ceil((high - low) / 8)):
        at = y(10.0**exponent)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">1e{exponent}</text>')
    parts += [boundaries(sections, step), stairs("allowed"), stairs("own")]
    for i, row in enumerate(rows):
        x, at, r = LEFT + (i + 0.5) * step, y(row["error"]), min(max(0.6 * step, 1.1), 2.2)
        mark = f'<circle class="error" cx="{x:.1f}" cy="{at:.1f}" r="{r:.1f}"/>'
        if not row["passed"]:
            mark = f'<path class="failed" d="M{x - 3:.1f} {at - 3:.1f}l6 6m0 -6l-6 6"/>'
        # the whole column is the target: a dot alone is too small to hover over
        target = f'<rect x="{x - step / 2:.2f}" y="{TOP}" width="{step:.2f}" height="{BOTTOM - TOP}"/>'
        parts.append(f"<g><title>{tooltip(row)}</title>{target}{mark}</g>")
    title, caption = CHECKS.get(check, (check, ""))
    if bounded:
        some = f"{bounded[0]}{f' and {len(bounded) - 1} more' if len(bounded) > 1 else ''}"
        caption += f" At the foot, because even their bound is below 1e{low}: {breakable(some)}."
    return f"""<figure><figcaption><b>{title}</b> {caption}</figcaption>
<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}: relative error of each row">{"".join(parts)}</svg>
</figure>
"""


def section(row: Row) -> str:
    """What a row is drawn next to: the rest of its block, or in training the rest of its kind."""
    if row["check"] == "training" and "." in row["name"]:
        moment = re.match(r"exp_avg_sq|exp_avg", row["name"])
        return moment[0] if moment else "parameters"
    block = re.match(r"h\.\d+", row["name"])
    return block[0] if block else row["name"].split(".")[0]


def decades(rows: Sequence[Row]) -> tuple[int, int]:
    """The exponents that a plot goes from and to: up to the largest value, and down to well below bounds and errors.

    The lowest eighth of either counts for nothing: that of gradients which are zero but for rounding, such as the keys'
    biases, would make the scale twice as long, and all the others a line at its top.
    """

    def exponents(*keys: str) -> list[float]:
        values = [row[key] for row in rows for key in keys]
        return [math.log10(v) for v in values if v is not None and 0 < v < math.inf] or [0.0]

    high = math.ceil(max(exponents("error", "own", "allowed")))
    bounds, errors = sorted(exponents("allowed")), sorted(exponents("error"))
    low = min(math.floor(bounds[len(bounds) // 8]) - 2, math.floor(errors[len(errors) // 8]))
    return min(low, high - 1), high


def boundaries(sections: dict[str, list[Row]], step: float) -> str:
    starts, x = {}, float(LEFT)
    for name, rows in sections.items():
        starts[name] = x
        x += len(rows) * step
    wide = [name for name, rows in sections.items() if len(rows) > 2]  # others, such as ln_f, have no room for a label
    room = min((len(sections[name]) * step for name in wide), default=1.0)
    every = math.ceil(max((7 * len(name) + 4 for name in wide), default=1) / room)
    lines = "".join(f"M{start:.1f} {TOP}V{BOTTOM}" for start in [*starts.values(), RIGHT])
    middles = {name: starts[name] + len(sections[name]) * step / 2 for name in wide[::every]}
    labels = [f'<text x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{name}</text>' for name, x in middles.items()]
    return f'<path class="grid" d="{lines}"/>{"".join(labels)}'


def tooltip(row: Row) -> str:
    figures = ", ".join(f"{key} {number(row[key])}" for key in ("error", "own", "allowed") if row[key] is not None)
    return f"{row['name']}: {figures}{'' if row['passed'] else ' (failed)'}"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.1e}")


def worst_first(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["passed"], -share(row)))


def details(check: str, rows: list[Row], c: dict[str, Any]) -> str:
    failed = sum(not row["passed"] for row in rows)
    summary = (
        f"{CHECKS.get(check, (check,))[0]}: {len(rows):,} rows, {f'{failed:,} failed' if failed else 'all passed'}"
    )
    return f"<details><summary>{summary}</summary>{table(worst_first(rows), c)}</details>\n"


def heads(c: dict[str, Any]) -> list[str]:
    """Of the tables' columns."""
    own = ["own"] if c["multiple"] is not None else []
    ratios = [*(["error ÷ own"] if own else []), "error ÷ allowed"]
    return ["name", "error", *own, "allowed", *ratios, "worst element", "1 − cosine", "reason"]


def table(rows: list[Row], c: dict[str, Any], named: bool = False) -> str:
    """The rows as they come; `named` says of each which check it is of."""
    lines = []
    for row in rows:
        figures = {**row, "error ÷ own": row["ratio"], "error ÷ allowed": share(row)}
        figures |= {"worst element": row["worst"], "1 − cosine": 1 - row["cosine"]}
        cells = "".join(f"<td>{number(figures[head])}</td>" for head in heads(c)[1:-1])
        name = breakable(row["name"]) + (f" <small>{row['check']}</small>" if named else "")
        mark = "" if row["passed"] else '<strong class="mark">✗ failed</strong> '
        lines.append(
            f'<tr class="{"passed" if row["passed"] else "failed"}"><th scope="row">{mark}{name}</th>'
            f'{cells}<td class="reason">{row["reason"]}</td></tr>'
        )
    head = "".join(f'<th scope="col">{head}</th>' for head in heads(c))
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="errors"><table><thead><tr>{head}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></div>"""


STYLE = """
:root { --own: #b07200; } @media (prefers-color-scheme: dark) { :root { --own: #e69f00; } }
h1 { font-size: clamp(3rem, 9vw, 5rem); margin: 0; }
.equal h1 { color: var(--good); } .different h1, .mark { color: var(--bad); } small, .legend { color: var(--soft); }
.culprit { border-left: 4px solid var(--bad); padding-left: 0.75rem; font-size: 1.1rem; }
.facts { grid-template-columns: repeat(auto-fill, minmax(min(17rem, 45%), 1fr)); }
svg rect { fill: transparent; } svg g:hover rect { fill: var(--line); }
.error { fill: var(--c0); } .own { stroke: var(--own); stroke-width: 1.2; }
.allowed { stroke: var(--soft); stroke-dasharray: 3 2; } path.failed { stroke: var(--bad); stroke-width: 1.8; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; font-size: 0.9rem; max-width: none; }
.legend svg { width: 24px; height: 10px; margin-right: 0.4rem; }
table { font-size: 0.85rem; } tbody th { font: 0.8rem/1.5 ui-monospace, monospace; min-width: 9rem; }
tr.failed { background: color-mix(in srgb, var(--bad) 8%, transparent); }
@media (min-width: 761px) { td, th { text-align: right; padding: 0.25rem 0.6rem; } td::before { display: none; }
  th:first-child { text-align: left; padding-left: 0; }
  th:last-child, td.reason { text-align: left; width: 30%; white-space: normal; } }
@media (max-width: 760px) { td:empty { display: none; } .reason { grid-column: 1 / -1; } tbody th { min-width: 0; }
  tr { grid-template-columns: repeat(auto-fill, minmax(6.4rem, 1fr)); } }
"""
