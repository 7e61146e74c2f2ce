"""The model card that each checkpoint of a run has."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import data.runs.recorder
from data.checkpoints.checkpoint import load
from data.checkpoints.sums import damage, read_sums, weights_sha256
from data.runs.card import card, card_of, evaluated, scores_of
from data.runs.options import Options
from data.runs.run_folder import load_checkpoint, read_metrics, read_samples, read_sealed, write_sealed
from data.runs.start import hub_names
from data.runs.tests.support import STEPS, Folders, Stub, noisy, resume, trained


@pytest.fixture
def run(finished: Folders, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[1], tmp_path / "run"))


def cards(run: Path) -> dict[int, str]:
    return {
        int(path.parent.name.removeprefix("step-")): path.read_text(encoding="utf-8")
        for path in (run / "checkpoints").glob("step-*/README.md")
    }


def test_every_checkpoint_has_one_of_its_step(run: Path) -> None:
    found = cards(run)
    assert found.keys() == {0, 3, 6, 8, 9, 12, STEPS} & {*found}
    assert {0, STEPS} < {*found}
    metrics = {row["step"]: row for row in read_metrics(run)}
    samples = dict(read_samples(run / "samples.md"))
    for step, text in found.items():
        checkpoint = run / "checkpoints" / f"step-{step}"
        assert f", after {step:,} steps\n" in text
        assert f"trained for {step} of {STEPS} steps, on {48 * step:,} tokens of `data`." in text
        measured = max(at for at, row in metrics.items() if at <= step and "val_loss" in row)
        best = min((row["val_loss"], at) for at, row in metrics.items() if at <= step and "val_loss" in row)
        assert f"\nLoss {metrics[measured]['val_loss']:.4f} nats a token" in text
        assert (f"the best was {best[0]:.4f}, after {best[1]} steps." in text) == (best[1] != measured)
        assert f"| {measured} | " in text
        sampled = step in samples  # what other weights wrote is no sample of these
        assert (f"## Sample\n\nAfter {step} steps, drawn with temperature 0.6" in text) == sampled
        assert {at for at, sample in samples.items() if sample in text} == {step} & {*samples}
        pictures = ("![Training and validation loss](loss.png)" in text, (checkpoint / "loss.png").is_file())
        assert pictures == (step > 0, step > 0)
        assert "Not checked in this run." in text
        assert "c0ffee" in text
        assert text == card_of(checkpoint)
        assert not damage(checkpoint)
        assert not {"README.md", "loss.png"} & {*(read_sums(checkpoint) or {})}


def test_the_front_matter_says_nothing_false(run: Path) -> None:
    data = ModelCard((run / "checkpoints" / f"step-{STEPS}" / "README.md").read_text()).data.to_dict()
    assert data == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2", "pytorch"]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"init": "random", "data": "tinystories"}, {"language": "en", "datasets": ["roneneldan/TinyStories"]}),
        ({"init": "gpt2", "data": "some/set:en"}, {"base_model": "gpt2", "datasets": ["some/set"]}),
        ({"init": "me/mine", "data": "stories"}, {"base_model": "me/mine", "language": "en"}),
        ({"init": "init", "data": "/a/b/texts.txt,c.jsonl"}, {}),  # which lies here
    ],
)
def test_names_of_the_hub(
    options: dict[str, Any], expected: dict[str, Any], run: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they were when the run began: what lay beside it may be gone since."""
    monkeypatch.chdir(place)
    begun = Options(**read_sealed(run / "run.json")["options"] | options)
    write_sealed(run / "run.json", read_sealed(run / "run.json") | {"hub": hub_names(begun)})
    monkeypatch.chdir(run)
    state = json.loads((run / "checkpoints" / "step-3" / "trainer.json").read_text())
    text = card(run, state | {"options": state["options"] | options}, [], [])
    always = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2", "pytorch"]}
    assert ModelCard(text).data.to_dict() == always | expected
    assert "/a/b" not in text  # where things lie here
    assert ("texts.txt,c.jsonl" in text) == ("/a" in options["data"])


def test_the_certificate_and_scores(run: Path) -> None:
    parity = {"verdict": "equal", "dtype": "float32", "device": "CPU", "summary": "194 of 194 tensors."}
    write_sealed(run / "parity.json", parity)
    last = run / "checkpoints" / f"step-{STEPS}"
    now = weights_sha256(last)
    row: dict[str, Any] = {
        "step": STEPS,
        "weights": now,
        "task": "t",
        "metric": "acc",
        "value": 0.5,
        "stderr": 0.125,
        "version": 2.0,
    }
    row |= {"questions": 6, "of": 200, "shots": 5, "chance": 0.25, "by": "tinygrad_impl", "dtype": "bfloat16"}
    row |= {"kernels": "fused", "file": None, "file_sha256": None, "harness": "0.4.13"}
    own: dict[str, Any] = {
        "by": "torch_ref",
        "dtype": "float32",
        "kernels": None,
        "questions": 1,
        "of": 1,
        "value": 1 / 3,
    }
    own |= {"file": "mine.jsonl", "file_sha256": "abc", "stderr": None, "chance": None}
    others: list[dict[str, Any]] = [{"step": 3}, {"weights": "others"}, {"weights": None}]
    write_sealed(run / "evaluation.json", {"rows": [row, *(row | other for other in others), row | own]})
    text = card_of(last)
    assert "**EQUAL**: before training" in text
    assert "in float32 on CPU. 194 of 194 tensors." in text
    section = text.partition("\n## Evaluation\n\n")[2].partition("\n\n## ")[0].splitlines()
    assert section == [
        "| task | metric | value | standard error | chance | questions | examples | computed by |",
        "|---|---|---|---|---|---|---|---|",
        "| t (version 2.0) | acc | 0.5000 | 0.1250 | 0.25 | the first 6 of 200 | 5 | "
        "tinygrad, bfloat16, fused kernels |",
        "| t (version 2.0) | acc | 0.3333 | - | - | 1, from mine.jsonl, a local file | 5 | PyTorch, float32 |",
        *("", "By lm-evaluation-harness 0.4.13; examples are those before a question."),
        "`mine.jsonl` has the SHA-256 `abc`.",
    ]
    assert evaluated(text, scores_of(last)) == text
    assert evaluated(text, []) == card(
        run, json.loads((last / "trainer.json").read_text()), read_metrics(run), read_samples(run / "samples.md")
    )


def test_scores_take_the_place_of_older_ones() -> None:
    """What somebody else wrote stays; a sample that looks like a heading is none."""
    page = "# A\n\n## Evaluation\n\nMy words.\n\n## Sample\n\n```text\n## Evaluation\n```\n\n## End\n"
    score = {"task": "t", "metric": "acc", "value": 0.5}
    first = evaluated(page, [score])
    second = evaluated(first, [score | {"value": 0.75}])
    assert "\n## Evaluation\n\nMy words.\n\n| task |" in second
    assert ("| 0.5000 |" in first, "| 0.5000 |" in second, "| 0.7500 |" in second) == (True, False, True)
    assert second.index("| 0.7500 |") < second.index("## Sample")
    assert evaluated(second, []) == page
    assert second.endswith("\n\n## Sample\n\n```text\n## Evaluation\n```\n\n## End\n")
    assert evaluated("# A\n", [score]).startswith("# A\n\n## Evaluation\n\n| task |")


def test_what_comes_later_is_of_later_checkpoints(stub: Stub, run: Path, place: Path) -> None:
    before = cards(run)[0]
    assert resume(noisy(stub), place, run, "--steps", STEPS + 2).code == 0
    assert cards(run)[0] == before
    last = cards(run)[STEPS + 2]
    assert last.count("python -m torch_ref.train ") == 2
    assert card_of(run / "checkpoints" / f"step-{STEPS + 2}") == last
    assert card_of(run / "checkpoints" / "step-0") == before


def test_a_card_may_be_edited_or_missing(stub: Stub, run: Path, place: Path) -> None:
    last = run / "checkpoints" / f"step-{STEPS}"
    for change in (lambda: (last / "README.md").write_text("mine"), (last / "README.md").unlink):
        change()
        load(last)
        load_checkpoint(last)
    (last / "loss.png").unlink()
    assert resume(noisy(stub), place, run, "--steps", STEPS + 1).code == 0


def test_no_card_costs_no_checkpoint(stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.runs.recorder, "card", lambda *_: 1 / 0)
    result = trained(noisy(stub), place, tmp_path / "run")
    assert f"note: step {STEPS} is saved without a model card (division by zero)" in result.err
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{STEPS}")[3]["step"] == STEPS
    assert not cards(tmp_path / "run")
