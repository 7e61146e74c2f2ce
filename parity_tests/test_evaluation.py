"""The answers of tinygrad and torch_ref to tasks of lm-evaluation-harness are those of its own `hf` model."""

import importlib.util
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import GPT2Config
from data.evaluation.command import evaluate, parser
from data.evaluation.scores import score_rows
from data.evaluation.tasks import Spec, specs_of, story_questions
from data.text.stories import stories
from data.text.tokenizer import gpt2
from parity_tests.weights import random_weights
from tinygrad_impl.evaluate import opened as by_tinygrad
from torch_ref.evaluate import opened as by_torch

pytestmark = [
    pytest.mark.slow,  # data/evaluation/tests checks the packing, and test_losses of both sides, more quickly
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate")),
        reason="needs lm-eval[hf]: run `make extras`",
    ),
]

CONFIG = GPT2Config(vocab_size=50257, n_positions=64, n_embd=16, n_layer=2, n_head=2)
DATA = "dataset_path: json\ndataset_kwargs: {data_files: {validation: questions.jsonl}}\nvalidation_split: validation\n"
TASKS = {  # of every kind of request
    "choices": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\n'
    "doc_to_target: label\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "last_words": 'output_type: loglikelihood\ndoc_to_text: "{{question}}"\ndoc_to_target: " {{choices[0]}}"\n'
    "metric_list: [{metric: acc}]\n",
    "texts": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
    "written": 'output_type: generate_until\ndoc_to_text: "{{question}} once"\ndoc_to_target: "{{text}}"\n'
    "generation_kwargs: {until: ['e', 'ing'], max_gen_toks: 36, do_sample: false}\n"
    "metric_list: [{metric: exact_match}]\n",
}
NO_MODEL = ["--model", "", "--tasks", "", "--device", "CPU"]
ENDINGS = ["He went home and slept until the sun was up", "dog", "naïve — 猫<|endoftext|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model; its tasks with their questions beside them. One question is empty, one ends with a space, and some are
    longer than the context.
    """
    path = tmp_path_factory.mktemp("evaluation")
    weights = random_weights(CONFIG, 0, 0.2)
    save(path / "model", CONFIG, {name: array.astype(np.float32) for name, array in weights.items()}, gpt2())
    for name, text in TASKS.items():
        (path / f"{name}.yaml").write_text(f"task: {name}\n{DATA}{text}")
    with open(path / "questions.jsonl", "w") as f:
        for i, story in enumerate(islice(stories(9), 10)):
            sentences = story.split(". ")
            question = "" if i == 3 else ". ".join(sentences[: 1 + i]) + " " * (i % 2)
            choices = [sentences[-1][-90:].strip(), *ENDINGS]
            text = story * (1 + i % 2)
            f.write(json.dumps({"question": question, "choices": choices, "label": i % 4, "text": text}) + "\n")
    return path


def names(folder: Path) -> str:
    return ",".join(["stories", *(str(folder / f"{name}.yaml") for name in TASKS)])


@pytest.fixture(scope="module")
def answers_of_hf(folder: Path) -> dict[str, list[Any]]:
    from data.evaluation.harness import Tasks, answers, harness_own

    tasks = Tasks([*short_stories(), *specs_of(names(folder))[1:]])
    # alone, since with several rows to write at once `hf` rounds otherwise
    return answers(tasks.by(harness_own(folder / "model", device="cpu", batch_size=1), 10))


def short_stories() -> list[Spec]:
    """As few as are asked of the others."""
    return [Spec("stories", documents=story_questions(10))]


@pytest.mark.parametrize("open", [by_tinygrad, by_torch], ids=["tinygrad", "torch_ref"])
def test_answers(
    open: Callable[..., Any], folder: Path, answers_of_hf: dict[str, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command: log-probabilities to float32's rounding, the same choices, the same texts."""
    words = ["--model", folder / "model", "--tasks", names(folder), "--limit", 10, "--json", folder / "found.json"]
    evaluate(parser("evaluate", "it").parse_args([*map(str, words), "--device", "CPU"]), "it", open)
    assert "|stories" in capsys.readouterr().out
    said = json.loads((folder / "found.json").read_text())
    found = said["answers"]
    assert found.keys() == {"stories", *TASKS} == answers_of_hf.keys()
    assert found["written"] == answers_of_hf["written"]
    assert len(set(map(str, found["written"]))) > 4
    np.testing.assert_allclose(found["texts"], answers_of_hf["texts"], rtol=3e-6)
    for task in ("stories", "choices", "last_words"):
        assert [len(question) for question in found[task]] == [len(question) for question in answers_of_hf[task]]
        for ours, theirs in zip(found[task], answers_of_hf[task], strict=True):
            values, expected = ([value for value, _ in side] for side in (ours, theirs))
            np.testing.assert_allclose(values, expected, rtol=3e-6)
            best = sorted(expected)[-2:]
            if len(best) == 1 or best[1] - best[0] > 1e-5 * abs(best[1]):  # else a tie, within rounding
                assert np.argmax(values) == np.argmax(expected)
            assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    scores = {(row["task"], row["metric"]): row["value"] for row in said["scores"]}
    assert {("stories", "acc"), ("choices", "acc_norm"), ("texts", "bits_per_byte")} <= scores.keys()


def test_scores_that_are_resampled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No process is forked for their standard errors, and nothing is printed; while training they are left out."""
    from data.evaluation.harness import Tasks

    (folder / "perplexity.yaml").write_text(
        f'task: perplexity\n{DATA}output_type: loglikelihood\ndoc_to_text: "{{{{question}}}}"\n'
        'doc_to_target: " {{choices[0]}}"\nmetric_list: [{metric: perplexity}, {metric: acc}]\n'
    )
    config, arrays = load(folder / "model")
    subject = by_torch(parser("evaluate", "it").parse_args(NO_MODEL), config, arrays, gpt2())[0]
    monkeypatch.setattr("multiprocessing.Pool", lambda *_: pytest.fail("a process was forked"))
    tasks = Tasks(specs_of(f"stories,{folder / 'perplexity.yaml'}"))
    capfd.readouterr()
    rows = {(r["task"], r["metric"]): r for r in score_rows(tasks(subject, 10, disable=True))}
    without = score_rows(tasks(subject, 10, stderr=False, disable=True))
    assert "bootstrap" not in "".join(capfd.readouterr())
    assert all(row["stderr"] is None for row in without)
    assert [row["value"] for row in without] == [row["value"] for row in rows.values()]
    perplexity, acc = rows["perplexity", "perplexity"], rows["stories", "acc"]
    assert perplexity["stderr"] > 0
    assert acc["stderr"] is not None
    assert (acc["chance"], acc["questions"], acc["of"], acc["shots"], acc["file"]) == (0.25, 10, 200, 0, None)
    assert (perplexity["chance"], perplexity["file"]) == (None, "perplexity.yaml")


def test_templates_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And give each document's own words."""
    from data.evaluation.harness import lm_eval

    compiled = []

    def compile_source(source: str, compile_source: Any = lm_eval.utils.env.compile) -> Any:
        compiled.append(source)
        return compile_source(source)

    monkeypatch.setattr(lm_eval.utils.env, "compile", compile_source)
    found = [lm_eval.utils.apply_template("{{word}}, once", {"word": word}) for word in ("one", "two", "one")]
    assert (found, len(compiled)) == (["one, once", "two, once", "one, once"], 1)
