"""Which part of a text is held out for validation.

Documents are chosen by a hash of their text (of the first piece of a long one), so that copies of a document never lie
on both sides. Where that would leave a side without a document, as with a book or a handful of texts, the text is cut
at one place instead: what lies behind it is held out.
"""

import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from data.cli import InputError
from data.text.formats import MANY_RECORDS, Piece, Place, Reading, refuse_textless
from data.text.shards import SPLITS
from data.text.sources import Stream

FRACTION = 0.01  # of the documents, unless another is asked for
# Of a text that is cut, unless another fraction is asked for: a hundredth of a small one would measure little.
CUT_FRACTION, ENOUGH = 0.1, 1_000_000  # the first up to `ENOUGH` characters (270,000 tokens), then these, then FRACTION
LONG = 256 << 20  # bytes, which take seconds to read
WORD = 100  # characters; so far off a word is worth not being cut


class Job(NamedTuple):
    """A stream to read, and what of it goes to validation: all (1), nothing (0), a fraction, or the default (None)."""

    text: Stream
    fraction: float | None

    @property
    def divided(self) -> bool:
        return self.fraction not in (0, 1)


class Mark(NamedTuple):
    """Where reading has got to: behind it, everything follows as if there had been no stop."""

    job: int = 0
    place: Place = Place()
    within: str | None = None  # as `Division` has them
    characters: int = 0


class Cut(NamedTuple):
    """A text is cut near character `near` of `characters`, those of all its documents."""

    near: int
    characters: int
    documents: int


def plan(text: Stream, fraction: float | None, how: Reading) -> Cut | None:
    """Where to cut `text`; None where a hash chooses documents. Reads until both sides have a document.

    Raises `InputError` for a text that is too short to be cut, and where most of many records have no text.
    """
    sides = set()
    counts = Counter[str]()
    documents = characters = 0
    ended = True
    told = False
    for pieces, place, read in text.chunks():
        if not told and place.done > LONG:
            print(f"{text.name} has few documents: reading it to its end, to see where to divide it", file=sys.stderr)
            told = True
        for piece in pieces:
            if ended:
                documents += 1
                sides.add(side(piece.text, FRACTION if fraction is None else fraction))
            ended = piece.ends
            characters += len(piece.text)
        if len(sides) == len(SPLITS):
            return None
        counts.update(read)
        refuse_textless(text.name, counts, how, least=MANY_RECORDS)
    if characters < 2:
        raise InputError(
            f"{text.name} holds a single character, which cannot be both training and validation text; "
            "give --valid a text of its own"
        )
    if fraction is None:
        held_out = max(FRACTION * characters, min(CUT_FRACTION * characters, ENOUGH))
    else:
        held_out = fraction * characters
    return Cut(min(max(1, round(characters - held_out)), characters - 1), characters, documents)


def side(document: str, fraction: float) -> str:
    """The split of a document."""
    return "valid" if fraction == 1 or (fraction and _hash(document) < fraction) else "train"


def _hash(document: str) -> float:
    """A number in [0, 1) that only the text decides."""
    return zlib.crc32(document.encode()) / 2**32


class Division:
    """Shares out the pieces of a text in order, in one way whatever chunks they come in.

    cut: where the text is cut; None: a hash of each document decides, with `fraction` of them for "valid".
    within: the split of the document that the first piece goes on; None where it begins one.
    characters: of the pieces before the first.
    """

    def __init__(self, fraction: float, cut: Cut | None, within: str | None, characters: int):
        self._fraction, self._cut = fraction, cut
        self.within, self.characters = within, characters

    def share(self, piece: Piece) -> list[tuple[str, Piece]]:
        """The split of the next piece; where the text is cut within a document, each side has an end of it."""
        if self._cut is None or not piece.text:
            split = self.within or side(piece.text, self._fraction)
            self.within = None if piece.ends else split
            return [(split, piece)]
        at = self._cut.near - self.characters
        if 0 < at < len(piece.text):
            at = self._place(piece, at, self._cut)
        self.characters += len(piece.text)
        before, behind = piece.text[: max(0, at)], piece.text[max(0, at) :]
        shares = []
        if before:
            self.within = None if piece.ends and not behind else "train"
            shares.append(("train", Piece(before, self.within is None)))
        if behind and self.within == "train":
            shares.append(("train", Piece("", ends=True)))
            self.within, behind = None, behind.lstrip()
        if behind:
            self.within = None if piece.ends else "valid"
            shares.append(("valid", Piece(behind, piece.ends)))
        return shares

    def _place(self, piece: Piece, near: int, cut: Cut) -> int:
        """Where to cut a piece: between documents, paragraphs, lines or words, whichever there is near enough first."""
        text, begin = piece.text, self.characters
        limit = (cut.characters - cut.near) / 2  # what is held out is half of what was asked for, or half as much again
        between = [0] if self.within is None and begin else []
        between += [len(text)] if piece.ends and begin + len(text) < cut.characters else []
        for separator in ("", "\n\n", "\n", " "):
            if separator:
                found = {text.rfind(separator, 1, near + len(separator)), text.find(separator, near, len(text) - 1)}
                between = [len(text[:place].rstrip()) for place in found if place > 0]
            best = min(between, key=lambda place: abs(place - near), default=None)
            if best is not None and abs(best - near) <= (max(limit, WORD) if separator == " " else limit):
                return best
        return near


class Batch(NamedTuple):
    """What a worker tokenises in one go: pieces for each split; where reading goes on after it, and what it counted."""

    parts: dict[str, list[Piece]]
    mark: Mark
    counts: Counter[str]


def batches(jobs: list[Job], start: Mark, cut: Cut | None, least: int) -> Iterator[Batch]:
    """All that follows `start`, in parts of at least so many characters, or of many records; the last of a job, maybe
    empty, ends it.
    """
    for job in range(start.job, len(jobs)):
        mark = start if job == start.job else Mark(job)
        text, fraction = jobs[job]
        division = Division(FRACTION if fraction is None else fraction, cut, mark.within, mark.characters)
        batch, size = Batch({}, mark, Counter()), 0
        for pieces, place, counts in text.chunks(mark.place):
            for piece in pieces:
                for split, share in division.share(piece):
                    batch.parts.setdefault(split, []).append(share)
                size += len(piece.text)
            batch.counts.update(counts)
            batch = batch._replace(mark=Mark(job, place, division.within, division.characters))
            if size >= least or batch.counts["record"] >= MANY_RECORDS:
                yield batch
                batch, size = Batch({}, batch.mark, Counter()), 0
        yield batch
