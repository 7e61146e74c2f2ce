"""How much of some texts stands word for word in a training text of any size: memorised, or made up?

Words are those of data/text/counts.py. It is the few texts that are indexed, not the training text: that is read once,
in blocks, so that memory does not grow with it. Its words become numbers of 64 bits straight from its tokens, without
being spelled out: a word's number is the sum of R[byte] * P^position over its bytes, modulo 2^64, so that it can be put
together from its tokens'. Different words have the same number about once in 2^64 pairs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.text.counts import BETWEEN
from data.text.shards import check_vocabulary, open_split, tokenizer_of
from data.text.tokenizer import Tokenizer

N = 8  # words in a row that count as copied
BLOCK = 1 << 16  # tokens of the training text at a time
LONGEST = 1 << 22  # tokens of a document that are spelled out together

_random = np.random.default_rng(8)
R = _random.integers(2**64, size=256, dtype=np.uint64)
P, Q, MIX = (int(n) | 1 for n in _random.integers(2**64, size=3, dtype=np.uint64))
END = np.uint64(_random.integers(2**64, dtype=np.uint64))  # in place of a word, where a document ends
FILTER_BITS = 20
KEPT_RUNS = 100_000  # that are remembered, so as not to look at them again


@dataclass(frozen=True)
class Copied:
    """Of a text: the words of its longest run that stands in the training text, 0 where that is shorter than N; and
    the share of its N-grams of words found there, None where it has none.
    """

    longest: int
    found: float | None


class Numbers:
    """Turns rows of units, which are tokens or bytes, into the numbers of their words.

    spelled: the bytes of each unit; end: the unit that ends a document, where the number is `END`.
    """

    def __init__(self, spelled: Sequence[bytes], end: int | None = None):
        self._powers = _powers(64)
        begins, numbers, lengths, counts = list[bool](), list[np.uint64](), list[int](), list[int]()
        for unit, text in enumerate(spelled):
            # the first part goes on with the word before, every other begins one
            first, *others = BETWEEN.split(text.lower())
            parts = [(True, END, 1), (True, np.uint64(0), 0)] if unit == end else self._parts(first, others)
            counts.append(len(parts))
            for begin, number, length in parts:
                begins.append(begin)
                numbers.append(number)
                lengths.append(length)
        self._begins, self._lengths = np.array(begins), np.array(lengths)
        self._numbers, self._counts = np.array(numbers, np.uint64), np.array(counts)
        self._first = np.cumsum(self._counts) - self._counts  # of each unit's parts

    def _parts(self, first: bytes, others: list[bytes]) -> list[tuple[bool, np.uint64, int]]:
        parts = [(True, self._number(part), len(part)) for part in others]
        return [(False, self._number(first), len(first)), *parts] if first or not others else parts

    def _number(self, part: bytes) -> np.uint64:
        if len(part) > len(self._powers):
            self._powers = _powers(2 * len(part))
        return (R[np.frombuffer(part, np.uint8)] * self._powers[: len(part)]).sum(dtype=np.uint64)

    def __call__(self, row: np.ndarray) -> np.ndarray:
        """The numbers of the words of a row of units, uint64 of shape (words,)."""
        if not len(row):
            return np.empty(0, np.uint64)
        counts = self._counts[row]
        ends = np.cumsum(counts)
        parts = np.repeat(self._first[row] - (ends - counts), counts) + np.arange(ends[-1])
        lengths, begins = self._lengths[parts], self._begins[parts]
        begins[0] = True
        first = np.flatnonzero(begins)
        before = np.cumsum(lengths) - lengths
        position = before - np.repeat(before[first], np.diff(first, append=len(parts)))  # in its word, in bytes
        if (most := int(position.max())) >= len(self._powers):
            self._powers = _powers(2 * most)
        found = np.add.reduceat(self._numbers[parts] * self._powers[position], first)
        found = found[np.add.reduceat(lengths, first) > 0]
        return (found ^ (found >> np.uint64(29))) * np.uint64(MIX)  # so that sums of them tell their order

    def last_word(self, row: np.ndarray) -> int:
        """Where the last word of a row begins that begins with a unit; its end where none does."""
        begins = np.flatnonzero(self._begins[self._first[row]])
        return int(begins[-1]) if len(begins) else len(row)


def _powers(count: int) -> np.ndarray:
    """P^0, P^1, ..., modulo 2^64."""
    return np.cumprod(np.array([1, *[P] * (count - 1)], np.uint64), dtype=np.uint64)


BYTES = Numbers([*(bytes([i]) for i in range(256)), b""], end=256)


def grams(numbers: np.ndarray) -> np.ndarray:
    """The number of every N words in a row, uint64 of shape (max(0, words - N + 1),)."""
    count = max(0, len(numbers) - N + 1)
    found = np.zeros(count, np.uint64)
    for i in range(N):
        found = found * np.uint64(Q) + numbers[i : i + count]
    return found


def training_words(folder: Path, tick: Callable[[int], object] = int) -> Iterator[np.ndarray]:
    """The numbers of the words of a prepared folder's training text, uint64, block by block. `tick` is told how many
    tokens each block has. Raises `InputError` like `open_split`, and for a token beyond the vocabulary.
    """
    tokenizer = tokenizer_of(folder)
    numbers = BYTES
    if tokenizer.bytewise:
        numbers = Numbers([tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)], tokenizer.eot)
    held = np.empty(0, np.uint16)
    for shard in open_split(folder, "train"):
        for start in range(0, len(shard), BLOCK):
            block = shard[start : start + BLOCK]
            check_vocabulary(block, Path(str(shard.filename)), tokenizer.vocab_size)
            row = np.concatenate([held, block])
            if tokenizer.bytewise:
                cut = numbers.last_word(row)
                yield numbers(row[:cut])
            else:
                ends = np.flatnonzero(row == tokenizer.eot)
                cut = int(ends[-1]) + 1 if len(ends) else len(row) * (len(row) >= LONGEST)
                yield numbers(_spelled(row[:cut], tokenizer))
            held = row[cut:]
            tick(len(block))
    yield numbers(held if tokenizer.bytewise else _spelled(held, tokenizer))


def _spelled(row: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The bytes of the text of tokens, with 256 where a document ends."""
    units = list[int]()
    for part in np.split(row, np.flatnonzero(row == tokenizer.eot) + 1):
        ended = bool(len(part) and part[-1] == tokenizer.eot)
        units += [*tokenizer.decode(part[: len(part) - ended].tolist()).encode(errors="replace"), *[256] * ended]
    return np.array(units, np.uint16)


def copied(texts: Sequence[str], training: Iterable[np.ndarray]) -> list[Copied]:
    """What of each text stands in the training text, whose words come as `training_words` gives them."""
    numbers = [BYTES(np.frombuffer(text.encode(errors="replace"), np.uint8)) for text in texts]
    grams_of = [grams(row) for row in numbers]
    known, places = np.unique(np.concatenate([np.empty(0, np.uint64), *grams_of])), defaultdict[int, list[Place]](list)
    for i, row in enumerate(grams_of):
        for position, gram in enumerate(np.searchsorted(known, row).tolist()):
            places[gram].append((i, position))
    found, longest = np.zeros(len(known), bool), [0] * len(texts)
    runs = set[bytes]()
    for run in _runs(known, training, overlap=max([0, *map(len, numbers)])):
        if (key := run.tobytes()) in runs:
            continue
        if len(runs) == KEPT_RUNS:
            runs.clear()
        runs.add(key)
        found[run] = True
        before: dict[Place, int] = {}
        for gram in run.tolist():
            before = {(i, at): before.get((i, at - 1), 0) + 1 for i, at in places[gram]}
            for (i, _), length in before.items():
                longest[i] = max(longest[i], length + N - 1)
    shares = [float(found[np.searchsorted(known, row)].mean()) if len(row) else None for row in grams_of]
    return [Copied(length, share) for length, share in zip(longest, shares, strict=True)]


Place = tuple[int, int]  # of an N-gram: its text, and its position there


def _runs(known: np.ndarray, training: Iterable[np.ndarray], overlap: int) -> Iterator[np.ndarray]:
    """Where N-grams of the training text that follow each other are all `known`: which they are. One of up to `overlap`
    words is never cut by the end of a block.
    """
    if not len(known):
        return
    shift = np.uint64(64 - FILTER_BITS)
    maybe = np.zeros(1 << FILTER_BITS, bool)  # most are ruled out by their first bits
    maybe[known >> shift] = True
    held = np.empty(0, np.uint64)
    for block in training:
        row = np.concatenate([held, block])
        held = row[-overlap:]
        here = grams(row)
        at = np.flatnonzero(maybe[here >> shift])
        which = np.minimum(np.searchsorted(known, here[at]), len(known) - 1)
        right = known[which] == here[at]
        at, which = at[right], which[right]
        yield from (run for run in np.split(which, np.flatnonzero(np.diff(at) > 1) + 1) if len(run))
