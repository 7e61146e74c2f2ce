"""The page: its form and what its script does with texts that are not to be trusted."""

import json
import re
import shutil
import subprocess
import tomllib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

import tinygrad_impl.live
from data.text.sampling import SAMPLING
from tinygrad_impl.live.settings import FIELDS
from tinygrad_impl.live.tests.support import form

HERE = Path(tinygrad_impl.live.__file__).parent
FILES = ("page.html", "page.css", "page.js")
GIVEN = form(prompt="<b>Once</b> & 🦙", seed="7", special_tokens="1", top_p="0.9")


class Parsed(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed((HERE / "page.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_the_form_has_every_setting_and_a_place_for_what_is_wrong_with_it() -> None:
    elements = Parsed().elements
    names = [given["name"] for tag, given in elements if tag in ("input", "textarea")]
    assert sorted(map(str, names)) == sorted(FIELDS) == sorted(["prompt", "special_tokens", *SAMPLING])
    ids = [given["id"] for _, given in elements if "id" in given]
    assert len(set(ids)) == len(ids)
    for tag, given in elements:
        if tag in ("input", "textarea"):
            assert given["id"] == given["name"]
            assert {*str(given["aria-describedby"]).split()} <= {*ids}
            assert f"{given['name']}-error" in str(given["aria-describedby"])
        if tag == "label" and "for" in given:
            assert given["for"] in ids


def test_the_page_is_made_of_our_files_alone() -> None:
    texts = {name: (HERE / name).read_text(encoding="utf-8") for name in FILES}
    for name, text in texts.items():
        assert not re.search(r"//\w|\burl\(|@import|\bimport\b", text), name
    assert not re.search(r"style=|\bon\w+=|<script>|<style", texts["page.html"])
    loaded = [given.get("src") or given.get("href") for tag, given in Parsed().elements if tag in ("script", "link")]
    assert sorted(map(str, loaded)) == ["data:,", "page.css", "page.js"]
    named = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert named["tool"]["setuptools"]["package-data"]["tinygrad_impl.live"] == list(FILES)


def test_text_never_becomes_html() -> None:
    script = (HERE / "page.js").read_text(encoding="utf-8")
    ways = r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|Fragment|srcdoc|eval\(|Function\("
    assert not re.search(ways, script)
    assert "textContent" in script


def word(text: str, p: float, *likeliest: tuple[str, float]) -> dict[str, Any]:
    others = [{"token": i, "text": other, "p": chance} for i, (other, chance) in enumerate(likeliest)]
    number = next((other["token"] for other in others if other["text"] == text), 99)
    return {"token": number, "text": text, "p": p, "likeliest": others}


@cache
def driven() -> dict[str, Any]:
    """What the page has after the scenes of page_harness.js."""
    node = shutil.which("node")
    if not node:
        pytest.skip("needs node, to run the page's script without a browser")
    facts = {"step": 1200, "parameters": 3_318_592, "context": 32, "vocabulary": 10_000, "computes": "CPU"}
    models = [facts | {"name": "<i>one</i>"}, facts | {"name": "two", "step": None}]
    half = [word("(bytes F0)", 0.1, ("a", 0.5)), word("(bytes 9F)", 0.2, ("(bytes 9F)", 0.2))]
    events = [
        {"event": "waiting", "before": 1},
        {"event": "start", "models": [{"tokens": 5, "note": ""}, {"tokens": 1, "note": "a text slides"}]},
        {
            "event": "piece",
            "model": 0,
            "text": "<b>x",
            "p": 0.5,
            "tokens": [word("<b>x", 0.5, ("<b>x", 0.5), ("🦙", 0.1))],
        },
        {"event": "piece", "model": 1, "text": "two", "p": 1e-8, "tokens": [word("two", 1e-8)]},
        {"event": "piece", "model": 0, "text": "日", "p": 0.01, "tokens": half},
        {"event": "end", "model": 0, "why": "end of text", "tokens": [word("(end of text)", 1e-4, ("so", 1e-3))]},
        {"event": "end", "model": 1, "why": "length", "tokens": []},
        {"event": "done"},
    ]
    scene = {
        "page": str(HERE / "page.js"),
        "fields": list(FIELDS),
        "facts": {"models": models, "form": form(top_k="9")},
        "search": f"?{urlencode(GIVEN | {'top_k': '40', 'unknown': 'x'})}",
        "events": events,
        "errors": {"seed": "<b>bad</b>", "top_p": "worse"},
    }
    told = json.dumps(scene).encode()
    command = [node, str(HERE / "tests" / "page_harness.js")]
    return dict(json.loads(subprocess.run(command, input=told, capture_output=True, check=True, timeout=60).stdout))


def test_a_link_has_all_settings() -> None:
    """And opening it fills the form, and writes nothing."""
    assert driven()["begun"] == 0
    for link, expected in (("copied", GIVEN), ("unticked", GIVEN | {"special_tokens": ""})):
        found = parse_qs(urlsplit(driven()[link]).query, True)
        assert found == {name: [value] for name, value in expected.items()}
    assert driven()["asked"] == GIVEN


def test_each_word_is_shaded_by_its_own_probability() -> None:
    one, two = driven()["models"]
    assert one["words"] == [
        ["<b>Once</b> & 🦙", None],
        ["<b>x", "0.075"],
        ["日", "0.500"],
        ["(end of text)", "1.000"],
    ]
    assert two["words"][1:] == [["two", "1.000"]]  # no stronger than chance is
    assert (one["name"], two["name"]) == ("<i>one</i>", "two")
    assert one["facts"] == "step 1,200; 3.3M parameters; context of 32 tokens; CPU"
    assert two["facts"] == "3.3M parameters; context of 32 tokens; CPU"
    assert one["note"] == "5 tokens in the prompt. 3 tokens written, then the end of the text; perplexity 4.64."
    assert two["note"] == "1 token in the prompt; a text slides. 1 token written; perplexity 100,000,000."
    assert driven()["status"] == "Done."


def test_what_else_was_likely() -> None:
    first, second, last = driven()["cards"]
    assert first == [[["drawn", "<b>x", "50 %"], ["", "🦙", "10 %"]]]
    drawn = [["", "a", "50 %"], ["drawn", "(bytes F0)", "10 %"]]  # which is not among the likeliest
    assert second == [[], drawn, [], [["drawn", "(bytes 9F)", "20 %"]]]
    assert last == [[["", "so", "0.1 %"], ["drawn", "(end of text)", "0.01 %"]]]


def test_what_is_wrong_is_said_beside_its_field() -> None:
    said = driven()["errors"]
    assert {name: text for name, text in said.items() if text} == {"seed": "<b>bad</b>", "top_p": "worse"}


def test_a_text_can_be_stopped() -> None:
    assert driven()["stopped"] == "Stopped."
