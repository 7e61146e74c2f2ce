"""Chooses places, in memory that is there already, for what a captured graph needs only while it runs."""

from bisect import insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tinygrad.helpers import round_up

BLOCK = 256  # bytes that each place begins at a multiple of, as tinygrad's do
END = 1 << 62  # later than every kernel


@dataclass(frozen=True)
class Life:
    """What a buffer of a captured graph needs: bytes, from the graph's first kernel that names it to the last."""

    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Span:
    """Bytes of memory, from `start` to `stop`, which are free until the graph's kernel number `until`."""

    start: int
    stop: int
    until: int


def places(lives: Sequence[Life], spans: Sequence[Span]) -> dict[int, int]:
    """Which of the buffers lie in the spans, by their numbers, and at which byte each begins. Spans come in order.

    Repeatedly: find the kernel at which buffers without a place take most bytes, and place those alive then, each at
    the lowest byte where there is room, the soonest to end first; until none fits.
    """
    if not spans:
        return {}
    end = spans[-1].stop
    busy = [(span.start, span.stop, span.until, END) for span in spans]  # bytes, and from which kernel to which
    busy += [(a.stop, b.start, 0, END) for a, b in pairwise(spans) if a.stop < b.start] + [(end, end, 0, END)]
    busy.sort()

    def room(life: Life) -> int | None:
        begin = round_up(spans[0].start, BLOCK)
        for start, stop, first, last in busy:
            if first <= life.last and life.first <= last:
                if begin + life.size <= start:
                    return begin
                begin = max(begin, round_up(stop, BLOCK))
        return None

    found: dict[int, int] = {}
    untried, outside = set(range(len(lives))), set(range(len(lives)))
    while True:
        change = defaultdict[int, int](int)
        for i in outside:
            change[lives[i].first] += lives[i].size
            change[lives[i].last + 1] -= lives[i].size
        calls = sorted(change)
        alive = accumulate(change[call] for call in calls)
        _, peak = max(zip(alive, calls, strict=True), default=(0, 0))
        at_peak = [i for i in untried if lives[i].first <= peak <= lives[i].last]
        before = len(found)
        for i in sorted(at_peak, key=lambda i: (lives[i].last, i)):
            if (start := room(lives[i])) is not None:
                found[i] = start
                insort(busy, (start, start + lives[i].size, lives[i].first, lives[i].last))
        if len(found) == before:
            return found
        untried.difference_update(at_peak)
        outside.difference_update(found)
