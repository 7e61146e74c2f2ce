"""The rows that a run keeps of the harness's results."""

import os
from pathlib import Path
from typing import Any

import pytest

from data.evaluation import scores
from data.evaluation.scores import chances, keep, score_rows
from data.runs.run_folder import read_sealed

RESULTS: dict[str, Any] = {
    "results": {
        "choose": {
            "alias": "choose",
            "acc,none": 0.5,
            "acc_stderr,none": 0.25,
            "f1,none": 0.75,
            "f1_stderr,none": "N/A",
        },
        "say": {"perplexity,none": 9.0, "perplexity_stderr,none": float("nan")},
    },
    "n-samples": {"choose": {"original": 9, "effective": 2}, "say": {"original": 4, "effective": 4}},
    **{"versions": {"choose": 2.0}, "n-shot": {"choose": 5, "say": 0}},
    **{"choices": {"choose": [2, 4], "say": None}, "files": {"say": {"file": "own.jsonl", "file_sha256": "ab"}}},
}


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores.importlib.metadata, "version", lambda _: "1.2")


def test_rows_say_what_they_are_of() -> None:
    choose = {"task": "choose", "questions": 2, "of": 9, "version": 2.0, "shots": 5, "file": None, "file_sha256": None}
    say = {
        "task": "say",
        "questions": 4,
        "of": 4,
        "version": None,
        "shots": 0,
        "file": "own.jsonl",
        "file_sha256": "ab",
    }
    assert score_rows(RESULTS) == [
        choose | {"metric": "acc", "value": 0.5, "stderr": 0.25, "chance": 0.375},
        choose | {"metric": "f1", "value": 0.75, "stderr": None, "chance": None},
        say | {"metric": "perplexity", "value": 9.0, "stderr": None, "chance": None},
    ]
    assert chances(RESULTS) == ["choose: 2 questions of 2 to 4 choices; chance is 0.375"]
    assert chances({"choices": {"a": [4] * 200}}) == ["a: 200 questions of 4 choices; chance is 0.25"]


@pytest.mark.parametrize("key", ["by", "limit", "shots", "version", "file_sha256", "dtype", "kernels", "step", "task"])
def test_a_row_takes_the_place_of_one_of_the_same(key: str, tmp_path: Path) -> None:
    first = {"step": 1, "by": "it", "dtype": "float32", "device": "CPU"}
    rows = [{"task": "t", "metric": "acc", "value": 0.5}]
    keep(tmp_path, rows, first)
    keep(tmp_path, rows, first | {"weights": "others", "device": "GPU"})
    file = keep(tmp_path, [rows[0] | {key: "other"}], first | ({} if key == "task" else {key: "other"}))
    found = read_sealed(file)["rows"]
    assert [row.get("device") for row in found] == ["GPU", "CPU"]
    assert found[0]["harness"] == "1.2"


def test_two_evaluations_at_once(tmp_path: Path) -> None:
    """Neither loses a row of the other, nor ends with an error."""
    children = []
    for who in ("a", "b"):
        if not (child := os.fork()):
            try:
                for step in range(15):
                    keep(tmp_path, [{"task": "t", "metric": "acc", "value": 0.5}], {"step": step, "by": who})
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(read_sealed(tmp_path / "evaluation.json")["rows"]) == 30
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
