"""The page shows all of a certificate, whatever is in it, and loads nothing."""

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from parity_tests.report import html

PARTS = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
EDGES = [
    *(
        f"h.{i}.{edge}"
        for i in range(12)
        for edge in ["input", *(part + end for part in PARTS for end in (".input", ""))]
    ),
    *("ln_f.input", "ln_f", "lm_head", "loss"),
]
PARAMETERS = [
    *("wte.weight", "wpe.weight"),
    *(f"h.{i}.{part}.{kind}" for i in range(12) for part in PARTS for kind in ("weight", "bias")),
    *("ln_f.weight", "ln_f.bias"),
]
TRAINED = [*PARAMETERS, *(f"{m}.{name}" for m in ("exp_avg", "exp_avg_sq") for name in PARAMETERS), "loss", "norm"]
GENERATED = [f"{how}.{of}" for how in ("greedy", "sampled") for of in ("inside", "beyond", "probabilities", "tokens")]
NAMES = {"forward": EDGES, "backward": EDGES, "gradient": PARAMETERS, "training": TRAINED, "generation": GENERATED}


def certificate(dtype: str = "float32", broken: bool = False) -> dict[str, Any]:
    """A certificate made up. `broken`: with every figure that has no logarithm, and some failures."""
    rows = []
    for check, names in NAMES.items():
        for i, name in enumerate(names):
            own = 1e-7 * (1 + i / len(names)) * (1 + 0.3 * math.sin(7 * i)) if dtype == "float32" else None
            error = own * (1.1 + 0.3 * math.sin(3 * i)) if own else 1e-15 * (1.5 + math.sin(3 * i))
            row = {"check": check, "name": name, "error": error, "worst": 3 * error, "cosine": 1 - error**2, "own": own}
            row |= {"allowed": 2 * own if own else 1e-10, "ratio": error / own if own else None}
            rows.append(row | {"passed": True, "reason": ""})
    if broken:
        found = {(row["check"], row["name"]): row for row in rows}
        for edge in EDGES[EDGES.index("h.3.attn.c_attn") :]:
            found["forward", edge] |= {"error": 3.1e-2, "ratio": 3e5, "passed": False}
        found["backward", "h.5.ln_2"] |= {"error": math.nan, "cosine": math.nan, "worst": math.nan, "passed": False}
        found["backward", "h.6.ln_2"] |= {"error": math.inf, "worst": math.inf, "passed": False}
        found["gradient", "wte.weight"] |= {"error": 0.0, "own": 0.0, "allowed": 0.0, "ratio": math.nan}
        found["gradient", "wpe.weight"] |= {"own": None, "ratio": None, "reason": "Its bound is the largest of all."}
        found["training", "norm"] |= {"own": 0.0, "allowed": 0.0, "ratio": math.inf, "passed": False}
        found["training", "loss"] |= {"own": math.nan, "allowed": math.nan, "ratio": math.nan, "passed": False}
    sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    config = {**sizes, "layer_norm_epsilon": 1e-5}
    return {
        "verdict": "different" if broken else "equal",
        "culprit": "h.3.attn.c_attn forward: error 3.1e-2, allowed 4.0e-7" if broken else None,
        "model": {"source": "gpt2", "config": config, "parameters": 124439808, "sha256": "ab" * 32},
        "sources": {"torch_ref/model.py": "cd" * 32, "tinygrad_impl/model.py": "ef" * 32},
        "revision": {"commit": "12" * 20, "clean": not broken},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "tinygrad": "0.14.0", "numpy": "2.4.0"},
        **{"device": "CPU", "card": "CPU with 2 cores", "dtype": dtype},
        **{"batch_size": 2, "seq_len": 32, "seed": 0, "steps": 10, "seconds": 12.3},
        "multiple": 2.0 if dtype == "float32" else None,
        "command": ["python", "-m", "parity_tests", "--model", "a model's name"],
        "rows": rows,
    }


class Page(HTMLParser):
    """What is in a page: its tags with their attributes, its text, and the rows of the tables in `details`."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: dict[str, list[tuple[str | None, list[str]]]] = {}  # by the summary, a row's class and its cells
        self.feed(page)
        self.close()
        assert not self.open, "left open"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        if tag == "summary":
            self.summary = ""
        if "details" in self.open and "tbody" in self.open:
            if tag == "tr":
                self.rows.setdefault(self.summary, []).append((dict(attributes)["class"], []))
            if tag in ("th", "td"):
                self.rows[self.summary][-1][1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] == ["summary"]:
            self.summary += data
        if "details" in self.open and "tbody" in self.open:
            self.rows[self.summary][-1][1][-1] += data


CERTIFICATES = [certificate(), certificate(broken=True), certificate("float64"), certificate("float64", broken=True)]


@pytest.mark.parametrize("c", CERTIFICATES)
def test_every_row_is_there_once_and_failures_are_marked(c: dict[str, Any]) -> None:
    tables = Page(html(c)).rows
    assert [summary.split(":")[0] for summary in tables] == [
        "Forward",
        "Backward",
        "Gradients",
        "Training",
        "Generation",
    ]
    for (summary, found), check in zip(tables.items(), NAMES, strict=True):
        rows = [row for row in c["rows"] if row["check"] == check]
        failed = sum(not row["passed"] for row in rows)
        assert (f"{failed} failed" if failed else "all passed") in summary
        expected = sorted(row["name"] if row["passed"] else f"✗ failed {row['name']}" for row in rows)
        assert sorted(cells[0] for _, cells in found) == expected
        assert [kind for kind, _ in found] == ["failed"] * failed + ["passed"] * (len(rows) - failed)


@pytest.mark.parametrize("c", CERTIFICATES)
def test_every_row_is_in_a_plot_and_inside_its_frame(c: dict[str, Any]) -> None:
    page = html(c)
    for row in c["rows"]:
        assert page.count(f"<title>{row['name']}: error ") == sum(r["name"] == row["name"] for r in c["rows"])
    drawn = [tag for tag in Page(page).tags if tag[0] in ("circle", "path", "rect", "text")]
    numbers = re.findall(r"[\d.e+-]+|nan|inf", " ".join(a["d"] or "" for tag, a in drawn if tag == "path"))
    numbers += [a[key] or "" for _, a in drawn for key in ("cx", "cy", "x", "y") if key in a]
    assert all(-8 <= float(n) <= 480 for n in numbers)
    assert page.count('<path class="failed"') == 1 + sum(not row["passed"] for row in c["rows"])  # 1 in the legend


def test_figures_that_are_none() -> None:
    tables = Page(html(certificate(broken=True))).rows.values()
    cells = {(i, row[0].removeprefix("✗ failed ")): row[1:] for i, rows in enumerate(tables) for _, row in rows}
    assert cells[1, "h.5.ln_2"][0] == "NaN"
    assert cells[1, "h.6.ln_2"][0] == "∞"
    assert cells[2, "wte.weight"][:5] == ["0", "0", "0", "NaN", "0"]
    assert cells[2, "wpe.weight"][1] == "–"
    assert cells[2, "wpe.weight"][-1] == "Its bound is the largest of all."


def small_certificate() -> dict[str, Any]:
    """Four rows with round figures, in no order."""
    found = [
        ("forward", "wte", 1e-6, 2e-6, 0.75, 5e-7, 1e-6, True, "a reason"),
        ("forward", "ln_f", 1e-4, 3e-4, 0.5, 1e-3, 2e-3, True, ""),
        ("forward", "lm_head", 1e-2, 4e-2, 0.25, 1e-3, 2e-3, False, ""),
        ("gradient", "wpe.weight", 0.0, 0.0, 1.0, 1e-3, 2e-3, True, ""),
    ]
    keys = ("check", "name", "error", "worst", "cosine", "own", "allowed", "passed", "reason")
    rows: list[dict[str, Any]] = [dict(zip(keys, row, strict=True)) for row in found]
    return certificate() | {"rows": [row | {"ratio": row["error"] / row["own"]} for row in rows]}


def test_figures_of_the_tables() -> None:
    """Failures first, then by error over allowed; each figure under its head."""
    tables = Page(html(small_certificate())).rows
    assert tables == {
        "Forward: 3 rows, 1 failed": [
            ("failed", ["✗ failed lm_head", "0.01", "0.001", "0.002", "10", "5", "0.04", "0.75", ""]),
            ("passed", ["wte", "1.0e-6", "5.0e-7", "1.0e-6", "2", "1", "2.0e-6", "0.25", "a reason"]),
            ("passed", ["ln_f", "1.0e-4", "0.001", "0.002", "0.1", "0.05", "3.0e-4", "0.5", ""]),
        ],
        "Gradients: 1 rows, all passed": [
            ("passed", ["wpe.weight", "0", "0.001", "0.002", "0", "0", "0", "0", ""]),
        ],
    }
    page = html(small_certificate())
    heads = [
        "name",
        "error",
        "own",
        "allowed",
        "error ÷ own",
        "error ÷ allowed",
        "worst element",
        "1 − cosine",
        "reason",
    ]
    assert re.findall(r'<th scope="col">([^<]*)</th>', page)[:9] == heads
    text = Page(page).text
    assert "3 of 4 comparisons are within the allowed error; 1 failed." in text
    assert "The first 4 of 4,\nfailures first" in text
    assert (
        "All 4 comparisons are" in Page(html(small_certificate() | {"rows": small_certificate()["rows"][3:] * 4})).text
    )


def test_places_in_a_plot() -> None:
    """In the order of the rows, in columns of one width, and as high as the logarithms: 1e-8 at the foot to 1e-2."""
    page = html(small_certificate())
    figure = page.split("<figure>")[1]
    width, height = (474 - 50) / 3, 244 - 12
    dots = re.findall(r'<circle class="error" cx="([\d.]+)" cy="([\d.]+)"', figure)
    expected = [(50 + width / 2, 244 - height * 2 / 6), (50 + 1.5 * width, 244 - height * 4 / 6)]
    assert [float(n) for dot in dots for n in dot] == pytest.approx([n for dot in expected for n in dot], abs=0.06)
    (cross,) = re.findall(r'<path class="failed" d="M([\d.]+) ([\d.]+)l6', figure)
    assert [float(n) + 3 for n in cross] == pytest.approx([50 + 2.5 * width, 12], abs=0.06)
    (allowed,) = re.findall(r'<path class="allowed" d="([^"]*)"', figure)
    heights = [244 - height * (math.log10(value) + 8) / 6 for value in (1e-6, 2e-3, 2e-3)]
    drawn = [float(y) for y in re.findall(r"[ V]([\d.]+)H", allowed)]
    assert drawn == pytest.approx(heights, abs=0.06)
    labels = re.findall(r'<text x="44" y="([\d.]+)" text-anchor="end">1e(-?\d+)</text>', figure)
    assert [int(exponent) for _, exponent in labels] == [-8, -7, -6, -5, -4, -3, -2]
    assert [float(y) for y, _ in labels] == pytest.approx([244 + 4 - height * i / 6 for i in range(7)], abs=0.06)
    assert "<title>lm_head: error 0.01, own 0.001, allowed 0.002 (failed)</title>" in figure


def test_bounds_of_nothing_but_rounding_do_not_stretch_the_scale() -> None:
    """A bound of 1e-33, such as the keys' biases have, would flatten all that is at 1e-7; its row is named instead."""
    c = certificate()
    keys = [row for row in c["rows"] if row["name"].endswith("attn.c_attn.bias") and row["check"] == "training"]
    for row in keys:
        row |= {"error": 3e-34, "own": 3e-34, "allowed": 6e-34}
    figures = {re.findall("<b>(.*?)</b>", f)[0]: f for f in html(c).split("<figure>")[1:]}
    for check, figure in figures.items():
        labels = [int(e) for e in re.findall(r'text-anchor="end">1e(-?\d+)</text>', figure)]
        assert labels == [-9, -8, -7, -6], check
        assert ("At the foot" in figure) == (check == "Training")
    words = re.sub("<.*?>", "", figures["Training"].partition("</figcaption>")[0])
    assert f"even their bound is below 1e-9: {keys[0]['name']} and {len(keys) - 1} more." in words


def test_errors_far_below_their_bounds_are_on_the_scale() -> None:
    """In float64 all of them are."""
    c = certificate("float64")
    for row in c["rows"]:
        row["error"] = 2e-16
    for figure in html(c).split("<figure>")[1:]:
        (height,) = {float(y) for y in re.findall(r'<circle class="error" cx="[\d.]+" cy="([\d.]+)"', figure)}
        assert height == pytest.approx(244 - 232 * (math.log10(2e-16) + 16) / 6, abs=0.06)


@pytest.mark.parametrize("c", [CERTIFICATES[0], CERTIFICATES[2]])
def test_on_a_phone_every_value_has_its_head(c: dict[str, Any]) -> None:
    """In the style, once for all tables: on narrow screens alone, where the row of heads is not shown."""
    page = html(c)
    heads = re.findall(r'<th scope="col">([^<]*)</th>', page.partition("</thead>")[0])
    said = re.findall(r'td:nth-child\((\d+)\)::before { content: "(.*?)"; }', page)
    assert said == [(str(i), head) for i, head in enumerate(heads[1:], 2)]
    assert "allowed" in heads
    assert re.search(r"@media \(min-width: 761px\) {[^@]*td::before { display: none; }", page)


def test_a_device_is_said_once() -> None:
    gpu = {"device": "CUDA", "card": "NVIDIA H100"}
    assert "DeviceCPU with 2 coresDtype" in Page(html(small_certificate())).text
    assert "DeviceCUDA (NVIDIA H100)Dtype" in Page(html(small_certificate() | gpu)).text


def test_worst_come_first() -> None:
    c = certificate()
    ratios = [float(cells[5]) for _, cells in Page(html(c)).rows["Forward: 160 rows, all passed"]]
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) > 10


def test_verdict_and_culprit() -> None:
    assert "<h1>Equal</h1>" in html(certificate())
    assert "What is wrong" not in html(certificate())
    page = html(certificate(broken=True))
    assert "<h1>Different</h1>" in page
    assert "What is wrong: h.3.attn.c_attn forward: error 3.1e-2, allowed 4.0e-7" in Page(page).text


def test_all_that_identifies_the_run_is_there() -> None:
    c = certificate()
    text = Page(html(c)).text
    hashes = [c["model"]["sha256"], *c["sources"].values()]
    versions = [f"{name} {version}" for name, version in c["versions"].items()]
    command = "python -m parity_tests --model 'a model'\"'\"'s name'"
    assert f"Commit{'12' * 20}, clean" in text
    assert f"Commit{'12' * 20}, with changes that are not committed" in Page(html(certificate(broken=True))).text
    assert "Commitunknown" in Page(html(c | {"revision": {"commit": None, "clean": None}})).text
    for item in ("12 layers, 12 heads, 768 wide", "seed 0", "10 steps of AdamW", "12.3 s", "gpt2: 124,439,808"):
        assert item in text
    assert "2 × own, unless" in text
    assert "a fixed bound" in Page(html(certificate("float64"))).text
    for item in [*hashes, *c["sources"], *versions, command, "124,439,808", "CPU with 2 cores", "2 × 32", "float32"]:
        assert item in text


@pytest.mark.parametrize("c", CERTIFICATES)
def test_nothing_is_loaded(c: dict[str, Any]) -> None:
    page = html(c)
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in Page(page).tags}


def test_hostile_text_is_escaped() -> None:
    hostile = "\"><script>alert(1)</script>'&amp;"

    def spoiled(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v if k in ("verdict", "check") else spoiled(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoiled(v) for v in value]
        return value + hostile if isinstance(value, str) else value

    c = spoiled(certificate(broken=True))
    c["sources"][hostile] = c["versions"][hostile] = hostile
    page = html(c)
    assert "<script" not in page
    assert {tag for tag, _ in Page(page).tags} == {tag for tag, _ in Page(html(certificate(broken=True))).tags}
    assert f"gpt2{hostile}" in Page(page).text  # and is still shown as it is
