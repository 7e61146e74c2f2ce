"""What is counted of texts, by hand; and what was copied, by a plain search."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.cli import InputError
from data.testing import own_tokenizer, write_files, write_tokens
from data.text import copied as copied_module
from data.text.copied import Copied, copied, training_words
from data.text.counts import counts, measured, repeated, spoken, words
from data.text.shards import ShardWriter, write_meta
from data.text.tokenizer import Tokenizer, gpt2, of_folder

ABC = "a b c d e f g h i j k l m n o p q r s t u v w x y z"


def test_words() -> None:
    assert words("Don't STOP: naïve-ly, 3.5 “so”!") == [
        *(b"don", b"t", b"stop", "naïve".encode(), b"ly", b"3", b"5", "“so”".encode())
    ]
    assert words(" .,! ") == []


def test_of_one_text() -> None:
    found = counts("The dog ran. The dog ran. The dog sat", [0.5, 0.25, 1.0], True)
    assert found == {
        "words": 9,
        "distinct_words": 4 / 9,
        "repeated_4grams": pytest.approx(1 / 3),  # of six, "the dog ran the" and "dog ran the dog" come again
        "ended": True,
        "bits_per_byte": 3 / 37,
    }
    nothing = {"words": 0, "distinct_words": None, "repeated_4grams": None, "ended": False, "bits_per_byte": None}
    assert counts("", [], False) == nothing
    assert counts("é", [0.5], False)["bits_per_byte"] == 0.5  # two bytes
    assert counts("a", [0.0], False)["bits_per_byte"] is None
    assert repeated([b"a"] * 4) == 0
    assert repeated([b"a"] * 3) is None


def test_mean_and_spread() -> None:
    texts: list[dict[str, Any]] = [
        {"words": 1, "repeated_4grams": None, "ended": True},
        {"words": 4, "repeated_4grams": 0.5, "ended": False},
    ]
    assert measured(texts) == [
        {"name": "words", "mean": 2.5, "spread": pytest.approx(1.5 * math.sqrt(2)), "texts": 2},
        {"name": "repeated_4grams", "mean": 0.5, "spread": None, "texts": 1},
        {"name": "ended", "mean": 0.5, "spread": pytest.approx(0.5 * math.sqrt(2)), "texts": 2},
    ]
    assert [spoken(row) for row in measured(texts)] == ["2.5 ± 2.1", "50.0 %", "50.0 %"]
    assert spoken({"name": "bits_per_byte", "mean": 1.23456, "spread": 0.25}) == "1.235 ± 0.250"


def prepared(folder: Path, documents: list[str], tokenizer: Tokenizer) -> Path:
    """Them as a folder of prepared data, in shards of a few tokens."""
    folder.mkdir()
    tokens, splits = tokenizer.encode_documents(documents), {}
    for split in ("train", "valid"):
        with ShardWriter(folder, split, 50, vocabulary=tokenizer.vocab_size) as writer:
            writer.write(tokens)
        splits[split] = {"source": "", "documents": len(documents), "tokens": len(tokens), "shards": writer.shards}
    write_meta(folder, splits, tokenizer)
    return folder


def by_search(text: str, documents: list[str]) -> Copied:
    """The definition, word for word."""
    found = words(text)

    def there(n: int) -> list[bool]:
        rows = [[b"", *words(document), b""] for document in documents]
        padded = [b" ".join(row) for row in rows]
        return [
            any(b" ".join([b"", *found[i : i + n], b""]) in row for row in padded) for i in range(len(found) - n + 1)
        ]

    eight = there(8)
    longest = max((n for n in range(8, len(found) + 1) if any(there(n))), default=0)
    return Copied(longest, sum(eight) / len(eight) if eight else None)


DOCUMENTS = [
    "Once upon a time there was a small dog. It RAN to the river, and it fell in! Nobody heard it.",
    ABC,
    "unbelievable 🐻 naïve words: supercalifragilistic, don't you think so too, my dear little friend of mine?",
    "one two three four",
    "five six seven eight nine ten",
]
TEXTS = [
    "it ran, to the river and it FELL - in nobody heard it",
    "and so it ran to the river and it fell in the end, where upon a time there was a small dog lived",
    "k l m n o p q r s t u v w x y z",
    "one two three four five six seven eight nine ten",  # over the end of a document
    "nbelievable naïve words supercalifragilistic don t you think",  # not whole words, and a word left out
    "🐻 naïve words supercalifragilistic don t you think so",
    "a b c d e f g",  # too short
    "it ran to the river and it fell out; a b c d e f g h i",
    "",
]


@pytest.mark.parametrize(
    ("kind", "block"), [("gpt2", 16), *((kind, n) for kind in ("own", "whole words") for n in (3, 16, 1 << 16))]
)
def test_what_was_copied(kind: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tokenizer, and wherever a block ends."""
    monkeypatch.setattr(copied_module, "BLOCK", block)
    tokenizer = gpt2() if kind == "gpt2" else of_folder(write_files(tmp_path / "own", own_tokenizer()), 300)
    if kind == "whole words":  # of a tokenizer whose tokens have no bytes of their own
        monkeypatch.setattr(type(tokenizer), "bytewise", False)
    folder = prepared(tmp_path / "data", DOCUMENTS, tokenizer)
    ticks = list[int]()
    found = copied(TEXTS, training_words(folder, ticks.append))
    assert found == [by_search(text, DOCUMENTS) for text in TEXTS]
    assert [one.longest for one in found] == [12, 9, 16, 0, 0, 9, 0, 9, 0]
    assert found[6].found is found[8].found is None
    assert sum(ticks) == len(tokenizer.encode_documents(DOCUMENTS))


def test_the_order_of_words_counts(tmp_path: Path) -> None:
    tokenizer = of_folder(write_files(tmp_path / "own", own_tokenizer()), 300)
    folder = prepared(
        tmp_path / "data",
        ["p q r s t u v w x q r s t u v w y", "a b c d e f g h", "on as is at to be or so"],
        tokenizer,
    )
    texts = ["b a c d e f g h", "no sa si ta ot eb ro os", "on as is at to be or so", "p q r s t u v w y"]
    assert [one.longest for one in copied(texts, training_words(folder))] == [0, 0, 8, 8]


def test_runs_are_forgotten_and_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copied_module, "KEPT_RUNS", 1)
    tokenizer = of_folder(write_files(tmp_path / "own", own_tokenizer()), 300)
    folder = prepared(tmp_path / "data", DOCUMENTS * 2, tokenizer)
    assert copied(TEXTS, training_words(folder)) == [by_search(text, DOCUMENTS) for text in TEXTS]


def test_tokens_that_are_none(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "data", np.array([1, 50257]), np.arange(9))
    with pytest.raises(InputError, match="token 50257, beyond the vocabulary"):
        copied(TEXTS, training_words(folder))
