"""What can be counted of a text that a model wrote, and the mean and spread of that over many texts.

A word is a run of ASCII letters, digits, and bytes of UTF-8 beyond ASCII; capitals are the same as small letters, and
what stands between words does not count.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BETWEEN = re.compile(rb"[^a-z0-9\x80-\xff]+")  # words, in lower case
REPEATED = 4  # words in a row

MEASURES = {  # of a text, by its key in JSON: what it is called
    "words": "words",
    "distinct_words": "distinct words",
    "repeated_4grams": "repeated 4-grams",
    "ended": "reached end of text",
    "bits_per_byte": "bits per byte of its own text",
    "longest_copied": "longest copied run",
    "copied_8grams": "copied 8-grams",
}
SHARES = ("distinct_words", "repeated_4grams", "ended", "copied_8grams")  # from 0 to 1


def words(text: str) -> list[bytes]:
    """The words of a text, in lower case."""
    return [word for word in BETWEEN.split(text.encode(errors="replace").lower()) if word]


def repeated(found: Sequence[bytes], n: int = REPEATED) -> float | None:
    """The share of a text's n-grams of words that stood in it before: 1 - distinct n-grams / n-grams (seq-rep-n of
    Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training"). None where it has none.
    """
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def bits_per_byte(text: str, probabilities: Sequence[float]) -> float | None:
    """What a text cost the model that wrote it: -log2 of the probabilities of its tokens, by its bytes in UTF-8. None
    for an empty text, and where a probability is 0.
    """
    size = len(text.encode(errors="replace"))
    return -sum(map(math.log2, probabilities)) / size if size and all(p > 0 for p in probabilities) else None


def counts(text: str, probabilities: Sequence[float], ended: bool) -> dict[str, Any]:
    """What of `MEASURES` a text says by itself. `probabilities`: of its tokens, to the model that wrote it."""
    found = words(text)
    return {
        "words": len(found),
        "distinct_words": len(set(found)) / len(found) if found else None,
        "repeated_4grams": repeated(found),
        "ended": ended,
        "bits_per_byte": bits_per_byte(text, probabilities),
    }


def measured(texts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean over texts of each of `MEASURES` that any of them has; and its spread, the standard deviation of a
    sample (divided by n - 1), None for a single text. `texts` tells of how many.
    """
    rows = []
    for name in MEASURES:
        if values := [float(text[name]) for text in texts if text.get(name) is not None]:
            spread = statistics.stdev(values) if len(values) > 1 else None
            rows.append({"name": name, "mean": statistics.fmean(values), "spread": spread, "texts": len(values)})
    return rows


def spoken(row: Mapping[str, Any]) -> str:
    """The mean of a measure and its spread, in words; of `ended`, which is yes or no, the share alone."""
    name, mean, spread = row["name"], row["mean"], row["spread"]
    factor, digits = (100, 1) if name in SHARES else (1, 3 if name == "bits_per_byte" else 1)
    around = f" ± {factor * spread:.{digits}f}" if spread is not None and name != "ended" else ""
    return f"{factor * mean:.{digits}f}{around}{' %' * (name in SHARES)}"
