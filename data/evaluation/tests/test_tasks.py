"""Which questions there are, and files of questions that cannot be read."""

import contextlib
import gzip
import hashlib
import json
import re
from collections import Counter
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest

import data.evaluation.tasks
from data.cli import InputError
from data.evaluation.tasks import (
    QUESTIONS,
    Spec,
    load_task,
    read_documents,
    refuse_incomplete,
    specs_of,
    story_questions,
)
from data.text.stories import stories
from data.text.tokenizer import gpt2

PACKED = gzip.compress(b"".join(b'{"a": "%d"}\n' % (n * n) for n in range(5000)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.jsonl", b"[" * 200_000),
        ("damaged.jsonl.gz", PACKED[:40] + bytes(60) + PACKED[100:]),
        ("short.jsonl.gz", PACKED[:-9]),
        ("no.jsonl.gz", b"{}"),
        ("latin.jsonl", b'{"a": "\xe9"}'),
        ("list.jsonl", b"[]"),
        ("empty.jsonl", b"\n\n"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{re.escape(name)} (cannot be read after |is no JSON object; |is empty; )"):
        read_documents(tmp_path / name)


def test_questions_of_the_user(tmp_path: Path) -> None:
    """Empty lines are none of them; the file is known by its content."""
    file = tmp_path / "mine.jsonl"
    file.write_text('{"ctx": "one"}\n\n{"ctx": "two"}\n\n')
    assert {line: question["ctx"] for line, question in read_documents(file).items()} == {1: "one", 3: "two"}
    [spec] = specs_of("hellaswag", file)
    assert (spec.documents, spec.lines) == ([*read_documents(file).values()], [1, 3])
    assert spec.own_file() == {"file": "mine.jsonl", "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert specs_of("hellaswag")[0].own_file() == {"file": None, "file_sha256": None}


def test_a_name_that_is_nearly_one() -> None:
    harness = SimpleNamespace(all_tasks=["history", "hellaswag"], all_groups=["mmlu"], all_tags=[])
    for name, meant in (("storys", "stories, history"), ("helaswag", "hellaswag"), ("mmlus", "mmlu")):
        with pytest.raises(InputError, match=f"there is no task '{name}'; did you mean {meant}[?] Give stories, the"):
            load_task(harness, Spec(name))
    with pytest.raises(InputError, match="there is no task 'x'; give stories, the path"):
        load_task(harness, Spec("x"))


def test_a_question_that_lacks_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads it: a function of the task (a), a template (b), or the harness by its configuration (c). What is
    wrong with a question otherwise is not said to be a key of it. Of equal keys one question is enough.
    """
    monkeypatch.setattr(data.evaluation.tasks, "undefined_is_refused", contextlib.nullcontext)
    asked: list[dict[str, Any]] = []

    def load(documents: Any) -> dict[str, Any]:
        [document] = documents
        asked.append(document)
        if {"x": 1, "y": 2, None: 3}[document["a"]] == 2:
            raise ValueError("none of those that are taken")
        if "b" not in document:
            raise jinja2.UndefinedError("'b' is undefined")
        parts = SimpleNamespace(doc_to_text="{{b}}", doc_to_choice=None, doc_to_target="c")
        return {"tasks": {"mine": SimpleNamespace(config=parts, features=list(document))}}

    whole = '{"a": "x", "b": 1, "c": 0}\n'
    file = tmp_path / "mine.jsonl"
    for line in ('{"a": "z", "b": 1, "c": 0, "other": 1}', '{"a": "y"}', whole, '{"c": 0, "b": 1, "a": "x"}'):
        file.write_text(f"{whole}{line}\n")
        refuse_incomplete(specs_of("mine", file)[0], load, "me/data")
    file.write_text(whole * 9)
    asked.clear()
    refuse_incomplete(specs_of("mine", file)[0], load, "me/data")
    assert len(asked) == 1
    for line, key in (('{"b": 1, "c": 0}', "a"), ('{"a": "x", "c": 0}', "b"), ('{"a": "x", "b": 1}', "c")):
        file.write_text(f"{whole}\n{whole}{line}\n")
        with pytest.raises(InputError) as raised:
            refuse_incomplete(specs_of("mine", file, "--eval-")[0], load, "me/data")
        assert str(raised.value) == (
            f"line 4 of {file} has no '{key}', and a question of mine needs each key that the task reads of those in "
            "me/data on the hub; correct that line, or give another file with --eval-data-file"
        )


@pytest.mark.slow  # the harness is imported
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: run `make extras`")
def test_what_a_question_needs(tmp_path: Path) -> None:
    """As the harness's own tasks have it: HellaSwag's by a function, PIQA's by templates."""
    from lm_eval.tasks import TaskManager

    manager, file = TaskManager(), tmp_path / "mine.jsonl"
    hellaswag: dict[str, Any] = {
        "activity_label": "Baking",
        "ctx": "A man",
        "endings": ["eats.", "runs."],
        "label": "0",
    }
    piqa: dict[str, Any] = {"goal": "Eat", "sol1": "a pie", "sol2": "a pan", "label": 0}
    for task, whole in {"hellaswag": hellaswag, "piqa": piqa}.items():
        lines = [whole | {"more": 1}, *({k: v for k, v in whole.items() if k != key} for key in whole)]
        for key, lacking in zip(whole, lines[1:], strict=True):
            file.write_text("\n".join(map(json.dumps, [lines[0], whole, lacking])))
            said = f"line 3 of {file} has no '{key.replace('ctx', 'ctx_a')}', and a question of {task} needs "
            with pytest.raises(InputError, match=f"^{re.escape(said)}.*; correct that line, or give another file"):
                load_task(manager, specs_of(task, file)[0])
            assert task != "hellaswag" or key in data.evaluation.tasks.NEEDED[task]
        file.write_text("\n".join(map(json.dumps, [whole, lines[0]])))
        assert load_task(manager, specs_of(task, file)[0])["tasks"].keys() == {task}


def test_questions_of_stories() -> None:
    """They fit into the smallest context; the right answer is the sentence of the story; the wrong ones are another
    story's, and its own with words in another order.
    """
    questions, told = story_questions(QUESTIONS), " ".join(islice(stories(2), 999))
    tokenizer = gpt2()
    assert len(questions) == QUESTIONS
    assert min(Counter(question["label"] for question in questions).values()) > QUESTIONS / 8
    for question in questions:
        choices = question["choices"]
        right = choices[question["label"]]
        assert all(len(tokenizer.encode(f"{question['query']} {choice}")) <= 32 for choice in choices)
        assert f"{question['query']} {right}" in told.replace("\n\n", " ")
        assert len({*choices}) == 4
        same_words = [choice for choice in choices if sorted(choice.split()) == sorted(right.split())]
        assert len(same_words) == 3
        assert all(
            sum(a != b for a, b in zip(c.split(), right.split(), strict=True)) == 2 for c in same_words if c != right
        )
    assert json.dumps(questions) == json.dumps(story_questions(QUESTIONS))
