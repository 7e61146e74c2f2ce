"""Which questions there are, and files of questions that cannot be read."""

import gzip
import hashlib
import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.cli import InputError
from data.evaluation.tasks import QUESTIONS, Spec, load_task, read_documents, specs_of, story_questions
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
    assert [question["ctx"] for question in read_documents(file)] == ["one", "two"]
    [spec] = specs_of("hellaswag", file)
    assert spec.own_file() == {"file": "mine.jsonl", "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert specs_of("hellaswag")[0].own_file() == {"file": None, "file_sha256": None}


def test_a_name_that_is_nearly_one() -> None:
    harness = SimpleNamespace(all_tasks=["history", "hellaswag"], all_groups=["mmlu"], all_tags=[])
    for name, meant in (("storys", "stories, history"), ("helaswag", "hellaswag"), ("mmlus", "mmlu")):
        with pytest.raises(InputError, match=f"there is no task '{name}'; did you mean {meant}[?] Give stories, the"):
            load_task(harness, Spec(name))
    with pytest.raises(InputError, match="there is no task 'x'; give stories, the path"):
        load_task(harness, Spec("x"))


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
