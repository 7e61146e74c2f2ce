"""The page shows what a run's files say, whoever wrote them, and loads nothing."""

import copy
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data.cli import InputError
from data.runs.comparison import modern
from data.runs.report import main, report_page
from data.runs.report_charts import label, log_ticks, points, ticks
from data.runs.report_comparison import comparison_page
from data.runs.report_html import STYLE, machine
from data.runs.report_input import SERIES, load_run
from data.runs.run_folder import checked_line, section, write_sealed
from data.testing import call, refused

HOSTILE = "\"><script>alert(1)</script></script><img src=x onerror=alert(2)>'&amp;"
FACTS: dict[str, Any] = {
    "command": ["python", "-m", "tinygrad_impl.train", "--out", "a run's folder"],
    "options": {"steps": 60, "dtype": "float32", "data": "stories", "betas": [0.8, 0.99], "preset": None},
    "config": {"n_layer": 2, "n_head": 4, "n_embd": 64},
    "parameters": 3318592,
    "data": {"folder": "runs/data/stories", "checksum": "ab" * 32},
    "device": "CPU",
    "card": "CPU with 2 cores",
    "versions": {"python": "3.11.2", "tinygrad": "0.14.0"},
}
PARITY: dict[str, Any] = {
    "verdict": "equal",
    "culprit": None,
    "summary": "parity: 28 gradients within 1.5x of torch's own float32 error (49 s)",
    "dtype": "float32",
    "device": "CPU",
    "versions": {"torch": "2.13.0"},
    "model": {"sha256": "cd" * 32},
    "sources": {"torch_ref/model.py": "ef" * 32},
    "rows": [
        {"check": "gradient", "name": name, "error": error, "own": 1e-7, "allowed": 2e-7, "passed": True}
        for name, error in (("wte.weight", 1.1e-7), ("ln_f.bias", 1.9e-7), ("wpe.weight", 0.0))
    ],
}
OLDER_COMPARISON: dict[str, Any] = {  # from when there were two models, and nothing was counted
    "pretrained": {"name": "step-0", "loss": 10.9078, "perplexity": 54599.0},
    "finetuned": {"name": "runs/mine", "loss": 2.3831, "perplexity": 10.838},
    **{"data": "runs/data/stories", "tokens": 16384, "seq_len": 32},
    "sampling": {"temperature": 0.6, "top_k": 40, "top_p": None, "seed": 1337, "max_new_tokens": 160},
    "texts": [
        {
            "prompt": "The dog",
            "pretrained": {"pieces": [" exempt", "ed"], "probabilities": [0.001, 1.0]},
            "finetuned": {"pieces": [" sat", ".", "\n"], "probabilities": [0.1, None, 0.0]},
        }
    ],
}
COMPARISON: dict[str, Any] = modern(OLDER_COMPARISON) | {"training_text": "runs/data/stories"}
for _model, _mean in zip(COMPARISON["models"], (0.125, 0.5), strict=True):
    _model["measures"] = [
        {"name": "words", "mean": 2, "spread": None, "texts": 1},
        {"name": "copied_8grams", "mean": _mean, "spread": 0.25, "texts": 2},
    ]


RANKS = {"world_size": 4, "hosts": {"a": 2, "b": 2}, "cards": {"NVIDIA H200": 4}}
RANKS |= {"global_batch": 128, "global_batch_tokens": 131072}
RATES = {"peak_flops": 989e12, "flops_a_token": 860_000_000}


def metrics(steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "seconds": 0.0, "val_loss": 10.5}]
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 10 - math.log(step) + 0.1 * math.sin(step), "lr": 1e-3 / step, "grad_norm": 1.25}
        row |= {"tokens": 256 * step, "seconds": step / 3, "tokens_per_second": 700.0 + step}
        rows.append(row | ({"val_loss": 10 - 0.01 * step} if step % 10 == 0 else {}))
    return rows


def write_run(folder: Path, rows: list[dict[str, Any]], everything: bool = True) -> Path:
    folder.mkdir()
    write_sealed(folder / "run.json", FACTS)
    (folder / "metrics.jsonl").write_text("".join(map(checked_line, rows)))
    if everything:
        (folder / "samples.md").write_text(section(0, "exempted clauses") + section(60, "Once upon a time"))
        write_sealed(folder / "parity.json", PARITY)
        write_sealed(folder / "compare.json", COMPARISON)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "mine", metrics(60))


class Page(HTMLParser):
    """What is in a page: its tags with their attributes, its text, and what is between the tags of its scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, "left open"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.text += "" if tag in ("span", "b", "wbr") else " "
        if tag not in ("meta", "input", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data


def embedded(page: str) -> dict[str, Any]:
    return json.loads(Page(page).scripts[0])


def curves(page: str, kind: str) -> list[str]:
    """The paths that have these classes, against the step."""
    drawings = re.findall(r'(?s)<svg class="step linear".*?</svg>', page)
    return [d for drawing in drawings for d in re.findall(rf'<path class="{kind}" d="([^"]*)"', drawing)]


def test_several_ranks(folder: Path) -> None:
    """How many, on what, what they do in an update, all their speed, and each time that they were started again."""

    def told(**more: Any) -> str:
        write_sealed(folder / "run.json", FACTS | more)
        return " ".join(Page(report_page([load_run(folder)])).text.split())

    again = {"step": 1900, "command": ["train", "--resume"], "device": "CUDA", "card": "NVIDIA H200"}
    page = told(device="CUDA", ranks=RANKS, **RATES)
    assert "Device 4 ranks on 2 hosts: 4 × NVIDIA H200, float32" in page
    assert "Global batch 131,072 tokens in 128 windows" in page
    mfu = 860e6 * 730 / (4 * 989e12)  # of the median rate, which is that of all of them
    assert f"730 tokens/s, MFU {mfu:.1%} Global" in page
    assert "Resumed never" in page
    page = told(ranks=RANKS, **RATES, continued=[again | RATES | {"ranks": RANKS}, again | RATES])
    assert "Resumed 2 times, from step 1,900, 1,900" in page
    assert "MFU" not in page  # of four ranks, and then of one
    assert "Continued from step 1,900, on 4 ranks on 2 hosts: 4 × NVIDIA H200: train" in page
    assert "Continued from step 1,900, on CUDA (NVIDIA H200): train" in page
    page = told(options=FACTS["options"] | {"grad_accum": 2, "batch_size": 8, "seq_len": 32})
    assert "Global batch 512 tokens in 16 windows" in page
    with_hostile = RANKS | {"cards": {HOSTILE: 4}, "hosts": {HOSTILE: 4}}
    assert 'on 1 host: 4 × "><script>' in told(ranks=with_hostile)
    wrong: list[dict[str, Any]] = [{"ranks": []}, {"ranks": RANKS | {"world_size": 0}}, {"peak_flops": "1"}]
    wrong += [{"ranks": RANKS | {"cards": {"a": "b"}}}, {"continued": [again | {"card": 1}]}, {"flops_a_token": 0}]
    for more in wrong:
        with pytest.raises(InputError, match=r"run.json is damaged or of another version"):
            told(**more)


def test_the_page_says_what_the_files_do(folder: Path) -> None:
    text = " ".join(Page(report_page([load_run(folder)])).text.split())
    for expected in (
        "mine Validation loss 10.500 → 9.400",
        *("Perplexity 36,316 → 12,088", "60 of 60", "15,360", "20 s", "730 tokens/s", "equal", "3,318,592 parameters"),
        *("Device CPU with 2 cores, float32", "Step 0 exempted clauses", "Step 60 Once upon a time"),
        *("step-0 10.91 54,599", "runs/mine 2.383 10.84", "16,384 validation tokens"),
        *(
            "The dog exempted",
            "temperature 0.6, top k 40, seed 1337, max",
            PARITY["summary"],
            "gradient 3 0 ln_f.bias 1.9e-7 1.0e-7",
        ),
        *(
            "python -m tinygrad_impl.train --out 'a run'\"'\"'s folder'",
            "python 3.11.2, tinygrad 0.14.0",
            "betas 0.8, 0.99",
        ),
        *("ab" * 32, "cd" * 32, "ef" * 32),
    ):
        assert expected in text


def test_embedded_values_are_those_of_the_file(folder: Path) -> None:
    data = embedded(report_page([load_run(folder)]))
    rows = metrics(60)
    assert data["names"] == ["mine"]
    for key in SERIES:
        expected = [[row["step"], row["tokens"], row["seconds"], row[key]] for row in rows if key in row]
        assert [point[:4] for point in data["curves"][0][key]] == expected
        assert len(expected) >= 7
        means = [point["mean"] for point in points(rows, key)]
        assert {len(point) for point in data["curves"][0][key]} == {5 if key in data["noisy"] else 4}
        assert key not in data["noisy"] or [p[4] for p in data["curves"][0][key]] == pytest.approx(means, rel=1e-4)
    assert data["noisy"] == ["grad_norm", "loss", "tokens_per_second"]


def test_curves_are_where_their_values_are(folder: Path) -> None:
    page = report_page([load_run(folder)])
    (validation,) = curves(page, "bold c1 d1 run0 val_loss")
    places = [[float(n) for n in place.split()] for place in validation[1:].split("L")]
    assert places[0] == [56, 12]  # step 0 with 10.5, the greatest: the frame's left upper corner
    assert [x for x, _ in places] == pytest.approx([56 + 406 * step / 60 for step in range(0, 61, 10)], abs=0.06)
    loss = [row["loss"] for row in metrics(60)[1:]]
    low, high = min(loss), 10.5
    (training,) = curves(page, "thin batch c0 d0 run0 loss")
    heights = [float(place.split()[1]) for place in training[1:].split("L")]
    assert heights == pytest.approx([244 - 232 * (y - low) / (high - low) for y in loss], abs=0.06)
    assert page.count("<svg class=") == 4 * 3 * 2  # charts, axes, scales


def test_several_runs_share_the_charts(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, metrics(n), everything=n == 60) for name, n in (("long", 60), ("short", 8))]
    page = report_page([load_run(folder) for folder in folders])
    assert embedded(page)["names"] == ["long", "short"]
    assert [len(run["loss"]) for run in embedded(page)["curves"]] == [60, 8]
    lengths = [len(curves(page, f"thin batch c{i} d{i} run{i} loss")[0].split("L")) for i in (0, 1)]
    assert lengths == [60, 8]
    text = " ".join(Page(page).text.split())
    assert "2 runs" in text
    assert "not checked" in text
    assert {"run0", "run1"} <= {attributes.get("id") for tag, attributes in Page(page).tags if tag == "input"}


@pytest.mark.parametrize("rows", [[], metrics(0), metrics(1)])
def test_a_run_that_has_just_begun(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    page = report_page([load_run(write_run(tmp_path / "new", rows, everything=False))])
    text = Page(page).text
    assert ("Nothing has been measured yet" in text) == (not rows)
    assert "No sample has been written yet" in text
    assert "Not checked" in text
    assert page.count("<figure") == {0: 0, 1: 1, 2: 4}[len(rows)]


def test_a_run_that_is_being_written(folder: Path) -> None:
    """Half a row counts for nothing, and half a letter of a sample for one that is unknown."""
    before = load_run(folder)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 61, "lo')
    with open(folder / "samples.md", "ab") as f:
        f.write("## Step 61\n\né".encode()[:-1])
    now = load_run(folder)
    assert now.metrics == before.metrics
    assert now.samples == [*before.samples, (61, "�")]
    (folder / "metrics.jsonl").unlink()
    assert load_run(folder).metrics == []


def test_each_switch_hides_its_own_curves(tmp_path: Path) -> None:
    """The running mean stays when the noise of the batches is hidden."""
    page = report_page([load_run(write_run(tmp_path / name, metrics(20))) for name in ("one", "two")])
    hidden = dict(re.findall(r"body:has\(#(\w+):not\(:checked\)\) figure \.(\w+)", page))
    switches = {a["id"] for tag, a in Page(page).tags if tag == "input" and "id" in a} - {"log"}
    assert hidden == {name: name for name in switches}
    assert switches == {"step", "tokens", "seconds", "batch", "mean", "val_loss", "run0", "run1"}
    figures = "".join(re.findall(r"(?s)<figure.*?</figure>", page))
    kinds = [set(kind.split()) for kind in re.findall(r'<path class="([^"]*run0[^"]*)"', figures)]
    drawn = {name: {frozenset(kind & hidden.keys()) for kind in kinds if name in kind} for name in ("loss", "val_loss")}
    assert drawn["loss"] == {frozenset({"run0", "batch"}), frozenset({"run0", "mean"})}
    assert drawn["val_loss"] == {frozenset({"run0", "val_loss"})}


def test_a_spike_flattens_nothing(tmp_path: Path) -> None:
    """It is marked at the top, and its size is said; on the logarithmic scale it has room."""
    norms = [2.0 - 0.01 * step for step in range(100)]
    norms[40] = 300.0
    rows = [{"step": step, "grad_norm": norm, "loss": 9.0} for step, norm in enumerate(norms)]
    page = report_page([load_run(write_run(tmp_path / "run", rows))])
    (figure,) = re.findall(r'(?s)<figure data-chart="Gradient norm">.*?</figure>', page)
    assert '<span class="linear">▲ off the scale: up to 300 at step 40</span></figcaption>' in figure
    linear, log = re.findall(r'(?s)<svg class="step (?:linear|log)".*?</svg>', figure)
    (curve,) = re.findall(r'<path class="thin batch [^"]*" d="M([^"]*)"', linear)
    heights = [float(place.split()[1]) for place in curve.split("L")]
    expected = [12.0 if i == 40 else 244 - 232 * (norm - 1.01) / 0.99 for i, norm in enumerate(norms)]
    assert heights == pytest.approx(expected, abs=0.06)
    marks = re.findall(r'<path class="mark thin batch [^"]*" d="M([\d.]+) 12m[^"]*"', linear)
    assert [float(x) for x in marks] == [pytest.approx(56 + 406 * 40 / 99, abs=0.06)]
    (mean,) = re.findall(r'<path class="bold mean [^"]*" d="M([^"]*)"', linear)
    assert [len(part.split("L")) for part in mean.split("M")] == [38, 57]  # without the five that the spike is in
    assert "mark" not in log
    assert "off the scale" not in page.replace(figure, "")


@pytest.mark.parametrize(
    ("values", "marked"),
    [
        ([300.0, *[1.0] * 50], True),  # the first step of all
        ([*[300.0] * 8, *[1.0] * 50], False),  # where training begins: no single step
        ([1.0, 300.0], False),
        ([1.0, 1.0, 300.0], True),
        ([*[1.0] * 9, 2.9], False),
        ([*[1.0] * 9, 3.1], True),
        ([-5.0, -3.0, -1.0], False),
    ],
)
def test_what_is_a_spike(values: list[float], marked: bool, tmp_path: Path) -> None:
    rows = [{"step": step, "grad_norm": value} for step, value in enumerate(values)]
    page = report_page([load_run(write_run(tmp_path / "run", rows))])
    assert ("off the scale" in page) == marked


def test_nothing_of_python_is_shown(folder: Path) -> None:
    """What was not given is said so, and of the sampling left out."""
    write_sealed(folder / "run.json", FACTS | {"options": FACTS["options"] | {"tensorboard": False, "full": True}})
    page = report_page([load_run(folder)])
    text = Page(page).text
    assert not re.search(r"None|True|False|\[|nan\b", text)
    for name, value in (("preset", "not given"), ("tensorboard", "no"), ("full", "yes"), ("betas", "0.8, 0.99")):
        assert f"<dt>{name}</dt><dd>{value.replace('.', '.<wbr>')}</dd>" in page


@pytest.mark.parametrize(
    ("device", "card", "expected"),
    [
        ("CPU", "CPU with 2 cores", "CPU with 2 cores"),
        *(("METAL", "METAL", "METAL"), ("CUDA", "NVIDIA H100", "CUDA (NVIDIA H100)"), ("CPU", "", "CPU ()")),
    ],
)
def test_a_device_is_said_once(device: str, card: str, expected: str) -> None:
    assert machine(device, card) == expected


def test_names_break_between_their_parts(folder: Path) -> None:
    """Paths and commands on a narrow screen; when copied they are whole."""
    content = FACTS | {"data": {"folder": "a_folder/of.mine", "checksum": "ab"}, "options": {}}
    write_sealed(folder / "run.json", content | {"command": ["python", "a_path/of.mine", "--out", "a b"]})
    page = report_page([load_run(folder)])
    assert facts_of(page)["Data"] == "a_<wbr>folder/<wbr>of.<wbr>mine"
    (line,) = re.findall(r"<pre>(.*?)</pre>", page)
    assert Page(line).text.strip() == "python a_path/of.mine --out 'a b'"
    words = re.findall(r"<span>(.*?)</span>", line)
    assert words == ["python", "a_<wbr>path/<wbr>of.<wbr>mine", "--out", "&#x27;a", "b&#x27;"]
    assert "overflow-wrap: anywhere" not in re.findall(r"main \{[^}]*\}", page)[0]


def test_on_a_phone_every_value_has_its_head(folder: Path, tmp_path: Path) -> None:
    """Tables become blocks, in which the heads are repeated; nothing is cut off to be scrolled."""
    page = report_page([load_run(folder), load_run(write_run(tmp_path / "other", metrics(3)))])
    tables = re.findall(r"(?s)<table>(.*?)</table>", page)
    assert len(tables) == 7  # the summary, and of each run its comparison and its parity
    for one in tables:
        heads = re.findall(r'<th scope="col">(.*?)</th>', one)
        for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", one):
            assert re.findall(r'<td data-head="(.*?)"', row) == heads[1:]
    narrow = STYLE.partition("@media (max-width: 760px)")[2]
    assert "td::before { content: attr(data-head);" in narrow
    assert "thead { display: none; }" in narrow
    assert "max-height" not in STYLE
    assert all(a["aria-label"] for tag, a in Page(page).tags if a.get("tabindex") == "0" or tag == "form")


@pytest.mark.parametrize("scheme", [0, 1])
def test_every_colour_of_text_can_be_read(scheme: int) -> None:
    """WCAG's contrast of at least 4.5 to 1, in light and in dark; also on the strongest shade of a token."""
    named = [dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in STYLE.split("@media")[:2]][scheme]
    share = int(re.findall(r"var\(--s\) \* (\d+)%", STYLE)[0]) / 100

    def rgb(name: str) -> list[float]:
        return [int(named[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]

    def luminance(color: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: list[float], other: list[float]) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    assert contrast([0, 0, 0], [1, 1, 1]) == pytest.approx(21)
    names = ["ink", "soft", "good", "bad", *(f"c{i}" for i in range(6))]
    assert {name: contrast(rgb(name), rgb("paper")) for name in names if contrast(rgb(name), rgb("paper")) < 4.5} == {}
    shaded = [share * a + (1 - share) * b for a, b in zip(rgb("shade"), rgb("paper"), strict=True)]
    assert contrast(rgb("ink"), shaded) >= 4.5


def test_what_is_no_number_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = metrics(5)
    rows[2]["loss"], rows[3]["loss"], rows[4]["grad_norm"], rows[4]["loss"] = math.nan, None, math.inf, 1e308
    page = report_page([load_run(write_run(tmp_path / "diverged", rows))])
    assert [point[0] for point in embedded(page)["curves"][0]["loss"]] == [1, 5]
    assert "Not drawn: 4 values" in Page(page).text
    assert "nan" not in "".join(curves(page, '[^"]*'))


def test_of_a_long_run_the_extremes_are_kept() -> None:
    rows: list[dict[str, float]] = [{"step": i, "loss": 5 + math.sin(i)} for i in range(50_000)]
    rows[31_234]["loss"], rows[31_235]["loss"] = 99.0, -99.0
    found = points(rows, "loss")
    assert len(found) <= 2 * 480 + 2
    assert {99.0, -99.0} <= {point["value"] for point in found}
    assert (found[0]["step"], found[-1]["step"]) == (0, 49_999)
    steps = [point["step"] for point in found]
    assert steps == sorted(steps)
    middle = [point["mean"] for point in found if 5_000 < point["step"] < 20_000]
    assert middle == pytest.approx([5] * len(middle), abs=0.01)  # over all rows, not only those drawn


def test_the_running_mean() -> None:
    """Over 2 % of the rows before and as many after, as far as there are; at first as many before as after."""
    rows: list[dict[str, float]] = [{"step": i, "loss": float(i**2)} for i in range(100)]
    means = [point["mean"] for point in points(rows, "loss")]
    assert means[0] == 0
    assert means[1] == pytest.approx((0 + 1 + 4) / 3)
    assert means[50] == pytest.approx(sum(i**2 for i in range(48, 53)) / 5)
    assert means[99] == pytest.approx((97**2 + 98**2 + 99**2) / 3)


def test_extreme_values_stay_in_the_frame(tmp_path: Path) -> None:
    rows = metrics(20)
    for i, value in enumerate([1e299, -1e299, 0, 5e-324, 1e-200]):
        rows[i + 3] |= {"loss": value, "grad_norm": 1e-320 * i, "lr": 0, "tokens_per_second": -1, "val_loss": 1e299}
    page = report_page([load_run(write_run(tmp_path / "odd", rows))])
    drawn = re.findall(r'<path class="(?:thin|bold)[^"]* run0 [^"]*" d="([^"]*)"', page)
    numbers = [float(n) for d in drawn for n in re.findall(r"[\d.e+-]+|nan|inf", d)]
    assert len(drawn) > 20
    assert all(12 <= n <= 472 for n in numbers)


@pytest.mark.parametrize(("low", "high"), [(0, 60), (2.1, 2.13), (-1e-9, 1e-9), (1e299, 9e299), (0, 123_456_789)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-12 * abs(low) <= tick <= high * (1 + 1e-12) for tick in found)


def test_tokens_are_shaded_by_their_probability() -> None:
    """By its logarithm, from certain down to chance; the legend has the same scale."""
    sized = [model | {"vocab_size": size} for model, size in zip(COMPARISON["models"], (1000, 900), strict=True)]
    page = comparison_page(COMPARISON | {"models": sized})
    assert len(Page(page).scripts) == 0
    tokens = [a for tag, a in Page(page).tags if tag == "span" and (a["class"] or "").startswith("token")]
    strengths = [float(re.sub("--s:", "", a["style"] or "")) for a in tokens]
    assert strengths[-5:] == pytest.approx([1, 0, 0.33, 1, 1])
    assert [a["title"] for a in tokens[-5:]] == [
        *("“ exempt” 0.1 %", "“ed” 100 %"),
        *("“ sat” 10 %", "“.” no probability", "“↵” 0 %"),
    ]
    assert [a["class"] for a in tokens[-2:]] == ["token", "token newline"]
    assert strengths[:-5] == pytest.approx([0, 0.33, 0.67, 1, 1, 1])
    text = " ".join(Page(page).text.split())
    assert "chance, which is 1 in 1,000 tokens: 100 % 10 % 1 % 0.1 % 0.01 % 1/1,000 . Over each" in text
    assert "The dog exempted" in text
    old = comparison_page(COMPARISON)  # of a GPT-2: there was no other vocabulary
    assert "1/50,257" in old
    assert "--s:0.64" in old  # 1/1000


def test_what_a_text_was_worth_to_its_model() -> None:
    """The perplexity of a text, above it; of one token that cannot be, infinite."""
    page = comparison_page(COMPARISON)
    found = re.findall(r'<h5>(.*?)</h5>\n<p class="note">perplexity of the text (.*?)</p>', page)
    assert found == [("step-0", "31.62"), ("runs/<wbr>mine", "∞")]
    first = ("texts", 0, "models", 0, "samples", 0)
    unknown = change(COMPARISON, *first, to={"pieces": ["a"], "probabilities": [None]})
    assert "perplexity of the text –" in comparison_page(json.loads(unknown))
    least = change(COMPARISON, *first, to={"pieces": ["a"], "probabilities": [5e-324]})
    assert comparison_page(json.loads(least)).count("perplexity of the text ∞") == 2


def written(prompt: str, pieces: list[list[str]]) -> dict[str, Any]:
    """A text of each model."""
    samples = [{"pieces": of_model, "probabilities": [0.5] * len(of_model)} for of_model in pieces]
    return {"prompt": prompt, "models": [{"samples": [one], "measures": []} for one in samples]}


def test_what_was_counted_of_the_texts() -> None:
    """In a table; nothing of an older comparison, which is shown all the same."""
    text = " ".join(Page(comparison_page(COMPARISON)).text.split())
    assert "Of 1 text of each model, mean ± standard deviation. Words are compared" in text
    assert "Copied: verbatim overlap with the training text of runs/data/stories: the longest run" in text
    assert "model words copied 8-grams step-0 2.0 12.5 ± 25.0 % runs/mine 2.0 50.0 ± 25.0 %" in text
    older = " ".join(Page(comparison_page(modern(OLDER_COMPARISON))).text.split())
    assert "mean ±" not in older
    for page in (text, older):
        assert "Two models" in page
        assert "The dog exempted" in page
        assert "step-0 10.91" in page


def test_three_models() -> None:
    """Beside each other, with as many columns; of many samples, the first three."""
    three = COMPARISON | {"models": [*COMPARISON["models"], COMPARISON["models"][0] | {"name": "third"}]}
    text = written("Once", [["a"], ["b"], ["c"]])
    for i, model in enumerate(text["models"]):
        model["samples"] = model["samples"] * 5
        model["measures"] = [{"name": "words", "mean": 7 + i, "spread": 1.0, "texts": 5}]
    page = comparison_page(three | {"texts": [text]})
    assert page.count('<div class="sides" style="--n:3">') == 3
    assert re.findall(r"<h5>(.*?)</h5>", page) == ["step-0", "runs/<wbr>mine", "third"] * 3
    shown = " ".join(Page(page).text.split())
    assert "Three models" in shown
    assert "step-0 7.0 ± 1.0 runs/mine 8.0 ± 1.0 third 9.0 ± 1.0" in shown


def test_pairs_stay_together() -> None:
    """Each prompt once, and under it what the models made of it; beside each other on a phone too."""
    other = written("A <cat>", [["pretrained"], ["finetuned"]])
    page = comparison_page(COMPARISON | {"texts": [*COMPARISON["texts"], other]})
    assert re.findall(r"<h4>(.*?)</h4>", page) == ["“The dog”", "“A &lt;cat&gt;”"]
    for section_of, words in zip(page.split("<h4>")[1:], (" exempt.* sat", "pretrained.*finetuned"), strict=True):
        assert section_of.count("<h5>") == 2
        assert re.search(f"(?s){words}", section_of.partition("</section>")[0])
    columns = re.findall(r"\.sides \{[^}]*grid-template-columns: ([^;}]*)", page)
    assert columns == ["repeat(auto-fit, minmax(max(min(8.5rem, 45%), 100% / var(--n, 2) - 2rem), 1fr))"]


def test_empty_lines_of_a_sample_leave_no_hole(folder: Path) -> None:
    (folder / "samples.md").write_text(section(0, "one\n\ntwo\n\n\n\nthree"))
    page = report_page([load_run(folder)])
    assert '<p class="text">one\n\ntwo<span class="note">↵↵↵↵</span>\nthree</p>' in page


def test_of_empty_lines_the_last_one_breaks() -> None:
    """A model that writes nothing but line ends would be a page long."""
    pieces = [" a", "\n", "\n", "\n", " b", "\n"]
    page = comparison_page(COMPARISON | {"texts": [written("", [pieces, pieces])]})
    found = re.findall(r'<span class="(token[^"]*)"[^>]*>([^<]*)</span>', page.partition('class="sides"')[2])
    line = "token newline"
    expected = [("token", " a"), (line, ""), (line, ""), (line, "\n"), ("token", " b"), (line, "\n")]
    assert found == expected * 2


def test_what_failed_in_parity_is_said(folder: Path) -> None:
    """A NaN is nearer its bound than any number."""
    rows = [*PARITY["rows"], PARITY["rows"][1] | {"name": "lost", "error": math.nan, "passed": False}]
    certificate = PARITY | {"verdict": "different", "culprit": "h.0.ln_1 forward", "rows": rows}
    write_sealed(folder / "parity.json", certificate)
    text = " ".join(Page(report_page([load_run(folder)])).text.split())
    assert "Different. parity:" in text
    assert "What is wrong: h.0.ln_1 forward" in text
    assert "gradient 4 1 lost NaN" in text


def test_of_many_samples_some_are_shown(folder: Path) -> None:
    (folder / "samples.md").write_text("".join(section(step, f"text {step}.") for step in range(0, 2000, 10)))
    page = report_page([load_run(folder)])
    assert "Samples through time (60 of 200)" in page
    steps = [int(step.replace(",", "")) for step in re.findall(r"<h4>Step ([\d,]+)</h4>", page)]
    assert (len(steps), steps[0], steps[-1]) == (60, 0, 1990)
    assert steps == sorted(set(steps))


def spoiled(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: spoiled(v) for k, v in value.items()}
    if isinstance(value, list):
        return [spoiled(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_hostile_text_is_inert(folder: Path, tmp_path: Path) -> None:
    tags = {tag for tag, _ in Page(report_page([load_run(folder)])).tags}
    hostile = write_run(tmp_path / f"a{HOSTILE}".replace("/", "∕"), metrics(60))
    for name, content in (("run", FACTS), ("parity", PARITY), ("compare", COMPARISON)):
        keyed = spoiled(content)
        for key in ("options", "versions", "sources", "sampling"):
            if key in keyed:
                keyed[key][HOSTILE] = HOSTILE + "\ud800"
        write_sealed(hostile / f"{name}.json", keyed)
    (hostile / "samples.md").write_text(section(0, HOSTILE))
    for runs in ([load_run(hostile)], [load_run(hostile), load_run(folder)]):
        page = report_page(runs)
        assert {tag for tag, _ in Page(page).tags} == tags
        assert page.count("<script") == 2
        assert not [name for _, attributes in Page(page).tags for name in attributes if name.startswith("on")]
        assert f"Step 0 {HOSTILE}" in Page(page).text  # and is still shown as it is
        assert embedded(page)["names"][0] == hostile.name
        page.encode()
    alone = comparison_page(json.loads((hostile / "compare.json").read_text()))
    assert "<script" not in alone
    assert {tag for tag, _ in Page(alone).tags} <= tags


def test_nothing_is_loaded(folder: Path) -> None:
    page = report_page([load_run(folder)])
    assert not re.search(r"https?:|src=|href=|@import|url\(|fetch\(|import\(", page)
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in Page(page).tags}
    policy = next(a["content"] for _, a in Page(page).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert policy.startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[\w+/]{43}=';", policy)


def change(content: dict[str, Any], *path: Any, to: Any) -> str:
    changed = inner = copy.deepcopy(content)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return json.dumps(changed)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *((name, text) for name in ("run.json", "parity.json", "compare.json") for text in ("{", "[]", "{}", "\xff")),
        ("run.json", change(FACTS, "command", to="train")),
        ("run.json", change(FACTS, "config", "n_layer", to="2")),
        ("run.json", change(FACTS, "parameters", to=10**400)),
        ("parity.json", change(PARITY, "rows", 1, "error", to="small")),
        ("compare.json", change(OLDER_COMPARISON, "texts", 0, "finetuned", "pieces", to=["one"])),
        ("compare.json", change(OLDER_COMPARISON, "pretrained", "loss", to=[10])),
        ("compare.json", change(COMPARISON, "models", 0, "loss", to=[10])),
        *(("metrics.jsonl", line + "\n") for line in ("{", "[]", "3", '{"loss": 1}', '{"step": 1, "loss": "low"}')),
        ("metrics.jsonl", '{"step": 5}\n{"step": 5}\n'),
        ("metrics.jsonl", '{"step": null}\n'),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
        ("metrics.jsonl", "\xff\n"),
    ],
)
def test_damaged_files_are_refused_by_name(file: str, text: str, folder: Path) -> None:
    (folder / file).write_text(text, encoding="latin-1")
    refused(call(main, folder, cwd=folder.parent), f"{folder / file} is damaged")
    assert not (folder / "report.html").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    refused(call(main, tmp_path, cwd=tmp_path), "holds no run")
    with pytest.raises(InputError, match=r"nowhere holds no run \(it has no run\.json\); pass the folder of one"):
        load_run(tmp_path / "nowhere")


def test_where_the_page_is_written(folder: Path, tmp_path: Path) -> None:
    assert call(main, folder, cwd=tmp_path).out == f"Written to {folder / 'report.html'}\n"
    assert (folder / "report.html").read_text(encoding="utf-8") == report_page([load_run(folder)])
    other = write_run(tmp_path / "other", metrics(3))
    assert call(main, folder, other, cwd=tmp_path).out == "Written to report.html\n"
    assert "2 runs" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert call(main, folder, "--out", "page.html", cwd=tmp_path).code == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report_page([load_run(folder)])
    for out in ("nowhere/page.html", "other"):
        refused(call(main, folder, "--out", out, cwd=tmp_path), f"{out} is not a file in a folder that is there")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "run", metrics(3))
    assert call(main, "a/run", "b/run", cwd=tmp_path).code == 0
    assert embedded((tmp_path / "report.html").read_text(encoding="utf-8"))["names"] == ["a/run", "b/run"]


def facts_of(page: str) -> dict[str, str]:
    """What a page of one run says first: labels and values, in order."""
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.partition("<h2>Curves")[0]))


def test_figures_of_a_run(tmp_path: Path) -> None:
    """Where first, last, least and greatest, mean and median, the last step and the last that has a value differ."""
    rows: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "seconds": 0.0, "val_loss": 4.0}]
    rates, losses = [10.0, 2000.0, 1000.0, 3000.0, 500.0], {1: 1.5, 2: 5.5, 4: 2.5}
    for step, rate in enumerate(rates, 1):
        row = {"step": step, "tokens": 1000 * step, "seconds": 61.0 * step, "tokens_per_second": rate, "loss": 7.0}
        rows.append(row | ({"val_loss": losses[step]} if step in losses else {}))
    folder = write_run(tmp_path / "mine", rows)
    assert facts_of(report_page([load_run(folder)])) == {
        "Validation loss": "4.000 → 2.500 (least 1.500)",
        "Perplexity": "54.6 → 12.18",
        "Parity with PyTorch": "equal",
        "Steps": "5 of 60",
        "Tokens trained on": "5,000",
        "Training time": "305 s",
        "Throughput (median)": "1,000 tokens/s",
        "Global batch": "–",
        "Model": "3,318,592 parameters: 2 layers, 4 heads, 64 wide",
        "Device": "CPU with 2 cores, float32",
        "Resumed": "never",
        "Data": "stories",
    }
    other = write_run(tmp_path / "other", rows[:2], everything=False)
    page = report_page([load_run(folder), load_run(other)])
    heads, first, second = re.findall(r"(?s)<tr>(.*?)</tr>", page)[:3]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in (heads, first, second)]
    same = ("Global batch", "Model", "Device", "Resumed", "Data")  # is said once
    one = facts_of(report_page([load_run(folder)]))
    assert cells[0] == ["run", *(name for name in one if name not in same)]
    assert cells[1][:3] == ["mine", "4.000 → 2.500 (least 1.500)", "54.6 → 12.18"]
    assert cells[2][:7] == ["other", "4.000 → 1.500", "54.6 → 4.482", "not checked", "1 of 60", "1,000", "61 s"]
    assert "<p>The same in all 2:</p>" in page
    assert facts_of(page) == {name: one[name] for name in same}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((0, "0"), (0.001, "0.001"), (0.000999, "1.0e-3"), (1.23456e-7, "1.2e-7"), (12.3456, "12.35"), (-2.5, "-2.5")),
        *((999.96, "1,000"), (1000.6, "1,001"), (123456.7, "123,457"), (9e14, "900,000,000,000,000"), (1e15, "1.0e15")),
        *((None, "–"), (math.nan, "NaN"), (math.inf, "∞"), (-math.inf, "−∞"), (2.5e-12, "2.5e-12")),
    ],
)
def test_numbers_in_few_letters(value: float | None, expected: str) -> None:
    mine: dict[str, Any] = {"name": "mine", "loss": value, "perplexity": 7, "measures": []}
    comparison = COMPARISON | {"models": [COMPARISON["models"][0], mine]}
    text = " ".join(Page(comparison_page(comparison)).text.split())
    assert f"mine {expected} 7 " in text


def test_perplexities_too_large_for_a_number(tmp_path: Path) -> None:
    rows = [{"step": 0, "val_loss": 701.0}, {"step": 1, "val_loss": 699.0}]
    page = report_page([load_run(write_run(tmp_path / "run", rows))])
    assert facts_of(page)["Perplexity"] == f"∞ → {math.exp(699):.1e}".replace("e+", "e")


def test_checks_of_parity(folder: Path) -> None:
    """Of each check how many, how many failed, and the one nearest its bound, which has not the greatest error."""

    def row(check: str, name: str, error: float | None, allowed: float | None, passed: bool = True) -> dict[str, Any]:
        return {"check": check, "name": name, "error": error, "own": 3e-8, "allowed": allowed, "passed": passed}

    rows = [
        row("gradient", "large", 6e-7, 9e-6),
        row("gradient", "near", 2e-7, 2.5e-7),
        row("step", "over", 3, 2, False),
    ]
    rows += [row("gradient", "far", 1e-9, 1e-7), row("step", "none", 0.0, 0.0), row("step", "within", 1, 2)]
    rows += [row("logits", "nought", 0.0, None), row("logits", "bounded", 1e-8, 1e-7), row("loss", "free", 1e-8, None)]
    rows += [row("loss", "tight", 1e-3, 1e-3)]
    write_sealed(folder / "parity.json", PARITY | {"rows": rows})
    page = report_page([load_run(folder)])
    (table,) = re.findall(r"(?s)<table>((?:(?!</table>).)*nearest its bound.*?)</table>", page)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"(?s)<tr>(.*?)</tr>", table)]
    assert cells == [
        ["check", "tensors", "failed", "nearest its bound", "error", "PyTorch's own", "allowed"],
        ["gradient", "3", "0", "near", "2.0e-7", "3.0e-8", "2.5e-7"],
        ["step", "3", "1", "over", "3", "3.0e-8", "2"],
        ["logits", "2", "0", "bounded", "1.0e-8", "3.0e-8", "1.0e-7"],
        ["loss", "2", "0", "free", "1.0e-8", "3.0e-8", "–"],
    ]
    assert '<strong class="good">Equal.</strong>' in page
    assert "What is wrong" not in page
    assert "on CPU in float32, with torch 2.13.0" in page
    write_sealed(folder / "parity.json", PARITY | {"verdict": "different"})
    assert '<strong class="bad">Different.</strong>' in report_page([load_run(folder)])


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_commit_of_each_part_of_a_run(folder: Path) -> None:
    """With changes or without; and nothing is said of a run that does not know it, or is older than that."""
    versions = "python 3.11.2, tinygrad 0.14.0"

    def says(part: dict[str, Any]) -> str:
        write_sealed(folder / "run.json", FACTS | part)
        return " ".join(Page(report_page([load_run(folder)])).text.split())

    assert f"With {versions}. " in says({})
    assert f"With {versions}. " in says({"source": {"commit": None, "clean": None}})
    assert f"With {versions}, commit {COMMIT}. " in says({"source": {"commit": COMMIT, "clean": True}})
    assert f"With {versions}, commit {COMMIT} with changes. " in says({"source": {"commit": COMMIT, "clean": False}})
    later = [{"step": 1000, "command": ["python", "x"]}, {"step": 2000, "command": ["y"]}]
    later[0] |= {"source": {"commit": COMMIT[::-1], "clean": False}}
    text = says({"source": {"commit": COMMIT, "clean": True}, "continued": later})
    assert f"commit {COMMIT}. Continued from step 1,000: python x, commit {COMMIT[::-1]} with changes." in text
    assert "with changes. Continued from step 2,000: y. " in text


def test_curves_against_each_axis(tmp_path: Path) -> None:
    """A point is where its own row is; rows that lack an axis are left out of that drawing alone."""
    rows = [{"step": s, "tokens": s * s, "seconds": 100.0 - s, "lr": 0.25 * s} for s in range(1, 5)]
    del rows[2]["tokens"]
    page = report_page([load_run(write_run(tmp_path / "run", rows))])
    places = {}
    for axis in ("step", "tokens", "seconds"):
        (drawing,) = re.findall(rf'(?s)<svg class="{axis} linear".*?</svg>', page)
        (path,) = re.findall(r'<path class="bold c0 d0 run0 lr" d="M([^"]*)"', drawing)
        places[axis] = [tuple(float(n) for n in place.split()) for place in path.split("L")]
    heights = [pytest.approx(244 - 232 * i / 3, abs=0.06) for i in range(4)]
    assert places["step"] == [(pytest.approx(56 + 406 * i / 3, abs=0.06), heights[i]) for i in range(4)]
    assert places["tokens"] == [
        (pytest.approx(56 + 406 * (s * s - 1) / 15, abs=0.06), heights[s - 1]) for s in (1, 2, 4)
    ]
    assert places["seconds"] == [(pytest.approx(462 - 406 * i / 3, abs=0.06), heights[i]) for i in range(4)]


def labels(page: str, title: str, scale: str) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """What is written beside a chart's frame against the step, with where: the heights', and the widths'."""
    figure = re.findall(rf'(?s)<figure data-chart="{title}">.*?</figure>', page)[0]
    drawing = re.findall(rf'(?s)<svg class="step {scale}".*?</svg>', figure)[0]
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(end|middle)">(.*?)</text>', drawing)
    return (
        [(text, float(y) - 4) for _, y, anchor, text in found if anchor == "end"],
        [(text, float(x)) for x, _, anchor, text in found if anchor == "middle"],
    )


def test_labels_of_axes(tmp_path: Path) -> None:
    """Round numbers, each at its own height or width, on both scales."""
    rows = [{"step": s, "lr": lr, "grad_norm": 1.0} for s, lr in ((0, 0.001), (1500, 1.0), (3000, 2.0))]
    page = report_page([load_run(write_run(tmp_path / "run", rows))])
    heights, widths = labels(page, "Learning rate", "linear")
    assert widths == [
        (f"{s / 1000:g}k" if s >= 1000 else str(s), pytest.approx(56 + 406 * s / 3000, abs=0.06))
        for s in range(0, 3001, 500)
    ]
    ticks_there = [0.5, 1.0, 1.5, 2.0]
    assert heights == [(f"{y:g}", pytest.approx(244 - 232 * (y - 0.001) / 1.999, abs=0.06)) for y in ticks_there]
    heights, _ = labels(page, "Learning rate", "log")
    low, high = -3, math.log10(2)
    assert heights == [
        (f"{10.0**power:g}", pytest.approx(244 - 232 * (power - low) / (high - low), abs=0.06))
        for power in range(-3, 1)
    ]
    for title, unit in (("Loss", "nats a token"), ("Learning rate", ""), ("Gradient norm", "before clipping")):
        assert (f"<b>{title}</b> {unit}</figcaption>" in page) == (title != "Loss")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 60, [0, 10, 20, 30, 40, 50, 60]),
        (0.3, 0.9, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        (1, 13, [2, 4, 6, 8, 10, 12]),
        *((-20, 5, [-20, -15, -10, -5, 0, 5]), (3, 4.3, [3, 3.5, 4])),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0.6, [1, 1.5, 2, 2.5, 3, 3.5]),
        (0, 1, [1, 2, 5, 10]),
        (-0.1, 2.3, [1, 2, 5, 10, 20, 50, 100]),
        (-1, 2, [0.1, 1, 10, 100]),
        (-9, 3, [10.0**n for n in range(-9, 4, 2)]),
    ],
)
def test_ticks_of_a_logarithmic_scale(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (0.001, "0.001"),
        (0.0002, "2e-4"),
        (12, "12"),
        (999, "999"),
        (1500, "1.5k"),
        (2e6, "2M"),
        *((-3e9, "-3G"), (1e12, "1,000,000,000,000"), (1e20, "1e20"), (0.30000000000000004, "0.3")),
    ],
)
def test_labels_are_short(value: float, expected: str) -> None:
    assert label(value) == expected


def test_every_curve_has_its_name_and_style(tmp_path: Path) -> None:
    """Of two runs: names and marks differ, and the values beneath are each run's own."""
    folders = []
    for i, name in enumerate(("one", "two")):
        rows = [row | {"lr": row["lr"] * (i + 1)} if "lr" in row else row for row in metrics(30)]
        folders.append(write_run(tmp_path / name, rows))
    page = report_page([load_run(folder) for folder in folders])
    data = embedded(page)
    assert data["frame"] == [56, 462, 12, 244]
    assert data["ranges"] == {"step": [0, 30], "tokens": [0, 7680], "seconds": [0, 10]}
    assert data["charts"]["Loss"] == {"loss": "training", "val_loss": "validation"}
    assert data["styles"] == [{key: f"c{i} d{i}" for key in SERIES} for i in (0, 1)]
    assert [points[0][3] for points in (run["lr"] for run in data["curves"])] == [1e-3, 2e-3]
    for i, mark in enumerate(("m-3 0a3 3 0 1 0 6 0a3", "m-2.7-2.7h5.4")):
        (marks,) = curves(page, f"mark c{i} d{i} run{i} val_loss")
        assert marks.count(mark) == 4  # steps 0, 10, 20 and 30
        assert f'<input type="checkbox" id="run{i}" checked>' in page
    words = re.findall(r'<label><input type="checkbox" id="(\w+)" checked>.*?</svg> ([^<]*)</label>', page)
    named = [("batch", "training (a batch)"), ("mean", "running mean"), ("val_loss", "validation")]
    assert words == [*named, ("run0", "one"), ("run1", "two")]
    assert re.findall(r'<input type="radio" name="axis" id="(\w+)"( checked)?> (\w+)<', page) == [
        *(("step", " checked", "step"), ("tokens", "", "tokens"), ("seconds", "", "seconds"))
    ]
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Curves", "one", "two"]


def test_points_of_a_middling_run_are_all_there() -> None:
    """Up to four times as many as there are stretches; of more, in each stretch the least and the greatest."""
    random = [math.sin(7 * i * i) for i in range(2400)]
    for count in (1920, 1921, 2400):
        rows: list[dict[str, float]] = [{"step": i, "loss": value} for i, value in enumerate(random[:count])]
        found = [int(point["step"]) for point in points(rows, "loss")]
        kept = {0, count - 1}
        for start in range(0, count, 5):
            stretch = random[start : min(start + 5, count)]
            kept |= {start + stretch.index(min(stretch)), start + stretch.index(max(stretch))}
        assert found == (list(range(count)) if count == 1920 else sorted(kept))


def test_of_two_and_sixty_one_samples(folder: Path) -> None:
    for count, shown in ((1, 1), (2, 2), (60, 60), (61, 60)):
        (folder / "samples.md").write_text("".join(section(10 * i, f"text {i}.") for i in range(count)))
        page = report_page([load_run(folder)])
        pairs = re.findall(r'<h4>Step ([\d,]+)</h4><p class="text">text (\d+)\.', page)
        assert [step for step, _ in pairs] == [f"{10 * int(i)}" for _, i in pairs]
        chosen = [int(i) for _, i in pairs]
        assert (len(chosen), chosen[0], chosen[-1]) == (shown, 0, count - 1)
        assert chosen == sorted(set(chosen))
        assert ("Samples through time (60 of 61)" in page) == (count == 61)
        assert f'max="{shown - 1}" value="{shown - 1}"' in page


@pytest.mark.parametrize(
    ("file", "path", "to"),
    [
        *(
            ("run", path, to)
            for path, to in ((("command",), "train"), (("command",), [3]), (("config", "n_head"), "2"))
        ),
        *(
            ("run", (key,), to)
            for key, to in (("parameters", 10**400), ("parameters", 1.5), ("options", []), ("card", 1))
        ),
        *(("run", ("data", key), None) for key in ("folder", "checksum")),
        *(
            ("run", ("source",), to)
            for to in ({"commit": 3, "clean": True}, {"commit": "ab"}, {"clean": True}, "ab", None)
        ),
        ("run", ("continued",), [{"step": 3}]),
        ("run", ("continued",), [{"step": "3", "command": []}]),
        ("run", ("continued",), {}),
        ("run", ("continued",), [{"step": 3, "command": [], "source": {"commit": 1, "clean": None}}]),
        *(("parity", ("rows", 1, key), []) for key in ("check", "name", "error", "own", "allowed", "passed")),
        *(("parity", (key,), 3) for key in ("verdict", "culprit", "summary", "dtype", "versions", "model", "sources")),
        *(("compare", ("texts", 0, "models", 1, "samples", 0, key), [[]]) for key in ("pieces", "probabilities")),
        *(("compare", ("models", 0, key), [10]) for key in ("name", "loss", "perplexity", "vocab_size", "measures")),
        *(("compare", ("models", 0, "measures", 0, key), [10]) for key in ("name", "mean", "spread")),
        *(("compare", ("models", 1, "vocab_size"), size) for size in (1, 0, -3, 2.5, None, 10**400)),
        *(("compare", (key,), 0.5) for key in ("data", "tokens", "seq_len", "sampling", "texts", "training_text")),
        *(("compare", path, []) for path in (("models",), ("texts", 0, "models"))),
        ("compare", ("texts", 0, "models", 1, "samples"), []),
        *(("older", (key,), 0.5) for key in ("pretrained", "finetuned", "texts")),
    ],
)
def test_whole_files_of_another_form_are_refused(file: str, path: tuple[Any, ...], to: Any, folder: Path) -> None:
    content = {"run": FACTS, "parity": PARITY, "compare": COMPARISON, "older": OLDER_COMPARISON}[file]
    file = "compare" if file == "older" else file
    write_sealed(folder / f"{file}.json", json.loads(change(content, *path, to=to)))
    result = call(main, folder, cwd=folder.parent)
    refused(result, f"{folder / file}.json is damaged or of another version; copy it again")


def test_pieces_without_probabilities_are_refused(folder: Path) -> None:
    changed = change(COMPARISON, "texts", 0, "models", 0, "samples", 0, "pieces", to=["one"])
    write_sealed(folder / "compare.json", json.loads(changed))
    refused(call(main, folder, cwd=folder.parent), "compare.json is damaged (pieces without probabilities)")


def test_it_needs_neither_framework() -> None:
    """Nor what tinygrad needs: to look for a compiler takes a while."""
    code = "import sys, data.runs.report; sys.exit(bool({'torch', 'tinygrad', 'tinygrad_impl'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0


def test_scores_on_tasks(folder: Path) -> None:
    """Those of `evaluate`, and those of training, each in a table; where there are none, no word of it."""
    assert "Evaluation" not in report_page([load_run(folder)])
    row = {
        "task": "stories",
        "metric": "acc",
        "value": 0.25,
        "stderr": None,
        "questions": 1200,
        "step": 60,
        "by": "<b>",
    }
    since = {"of": 2400, "shots": 5, "chance": 0.125, "file": "a_b.jsonl", "dtype": "float32", "kernels": "fused"}
    write_sealed(
        folder / "evaluation.json",
        {"rows": [row, row | since | {"metric": "acc_norm", "value": 0.375, "stderr": 0.125}]},
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[0]["stories/acc"], lines[-1]["stories/acc"] = 0.125, 0.8125
    bare = [{key: value for key, value in line.items() if key != "crc32"} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(map(checked_line, bare)))
    page = report_page([load_run(folder)])
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", r) for r in re.findall(r"(?s)<tr>(.*?)</tr>", page)]
    assert ["stories", "acc", "0.2500", "–", "–", "1,200", "–", "60", "&lt;b&gt;"] in cells
    questions = "the first 1,200 of 2,400, from a_<wbr>b.<wbr>jsonl, a local file"
    own = ["stories", "acc_norm", "0.3750", "0.1250", "0.125", questions, "5", "60"]
    assert [*own, "&lt;b&gt;, float32, fused kernels"] in cells
    assert [[step, score] for step, score in (c for c in cells if len(c) == 2) if score in ("0.1250", "0.8125")] == [
        [f"{lines[0]['step']:,}", "0.1250"],
        [f"{lines[-1]['step']:,}", "0.8125"],
    ]
    for wrong in ({"value": "much"}, {"chance": "little"}, {"file": 1}):
        write_sealed(folder / "evaluation.json", {"rows": [row | wrong]})
        with pytest.raises(InputError, match=r"evaluation\.json is damaged"):
            load_run(folder)


def test_scores_of_other_weights_are_not_those_of_a_checkpoint(folder: Path) -> None:
    """Nor are they shown as such: training was resumed before it, and came to other weights."""
    row = {"task": "stories", "metric": "acc", "value": 0.25, "stderr": None, "questions": 9, "step": 60}
    rows = [row, row | {"weights": "those that were"}, row | {"step": 61, "weights": "of no checkpoint"}]
    write_sealed(folder / "evaluation.json", {"rows": rows})
    checkpoint = folder / "checkpoints" / "step-60"
    assert load_run(folder).scores == rows
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "SHA256SUMS").write_text(f"{'a' * 64}  model.safetensors\n")
    assert load_run(folder).scores == [rows[0], rows[2]]
