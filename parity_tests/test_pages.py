"""The pages in a browser: nothing is cut off on a desktop or a phone, and each switch hides its own curves."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data.runs.report import report_page
from data.runs.report_comparison import comparison_page
from data.runs.report_input import load_run
from data.runs.tests.test_report import COMPARISON, metrics, write_run
from parity_tests.report import html as certificate_page
from parity_tests.test_report import certificate

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
LONG = "a-run_with.a-name-that-is-longer-than-the-names-of-other-runs"

# Loads the page in frames of two widths, and writes down what is found there.
MEASURE = """<!doctype html><body><script>
const found = {}, widths = [1280, 390];
const open = (width) => new Promise((done) => {
  const frame = document.createElement("iframe");
  Object.assign(frame, { src: "PAGE", width, height: 900, onload: () => done(frame.contentDocument) });
  document.body.append(frame);
});
const seen = (elements) => [...elements].filter((e) => e.getClientRects().length).length;
Promise.all(widths.map(open)).then((pages) => {
  pages.forEach((page, i) => {
    for (const more of page.querySelectorAll("details")) more.open = true;
    const over = (e) => e.scrollWidth - e.clientWidth;
    const cut = [...page.querySelectorAll("main :not(svg, svg *)")].filter((e) => e.clientWidth && over(e) > 1);
    found[widths[i]] = [over(page.documentElement), ...cut.map((e) => e.outerHTML.slice(0, 80))];
  });
  const [page] = pages;
  const counts = () => [".batch", ".mean", ".val_loss"].map((kind) => seen(page.querySelectorAll("figure " + kind)));
  if (page.getElementById("batch")) found.switched = ["batch", "mean", "val_loss"].map((id) => {
    page.getElementById(id).click();
    const left = counts();
    page.getElementById(id).click();
    return left;
  }).concat([counts()]);
  document.body.textContent = JSON.stringify(found);
});
</script></body>"""


def measured(page: str, folder: Path) -> dict[str, Any]:
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "measure.html").write_text(MEASURE.replace("PAGE", "page.html"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}"]
    command = [BROWSER, *options, "--virtual-time-budget=10000", "--dump-dom", f"file://{folder / 'measure.html'}"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.findall(r"(?s)<body>(.*?)</body>", printed)[0]))


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="there is no chromium")
@pytest.mark.parametrize("which", ["one run", "three runs", "comparison", "certificate"])
def test_nothing_is_cut_off(which: str, tmp_path: Path) -> None:
    if which == "comparison":
        names = {side: COMPARISON[side] | {"name": f"runs/{LONG}"} for side in ("pretrained", "finetuned")}
        page = comparison_page(COMPARISON | names)
    elif which == "certificate":
        page = certificate_page(certificate(broken=True))
    else:
        names_of = [LONG, "b", "c"][: 1 if which == "one run" else 3]
        page = report_page([load_run(write_run(tmp_path / name, metrics(n + 30))) for n, name in enumerate(names_of)])
    found = measured(page, tmp_path)
    assert (found["1280"], found["390"]) == ([0], [0])  # pixels to scroll to, and then elements with some
    if "run" in which:
        runs = 1 if which == "one run" else 3
        without = {"batch": [0, 3, 2], "mean": [3, 0, 2], "val_loss": [3, 3, 0], "none": [3, 3, 2]}
        assert found["switched"] == [[count * runs for count in counts] for counts in without.values()]
