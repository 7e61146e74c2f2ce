"""Batches from a prepared folder: shuffled, endless and resumable for training, in order and complete for evaluation.

The shards of a split are one long row of tokens, mapped into memory. With a sequence length of T, window i covers the
tokens i*T to i*T + T inclusive: T inputs, and T targets that are the inputs shifted by one. The last token of a window
is the first of the next, so every token but the very first is a target once; training leaves out what is left at the
end of the row when it is too short for a window, evaluation pads it.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import InputError
from data.text.shards import check_vocabulary, open_split, read_meta, vocabulary_size

IGNORED = -100  # the target of a padded position; Hugging Face and PyTorch leave it out of the loss, as we do


class _Tokens:
    """The shards of a split as one row of tokens."""

    def __init__(self, folder: Path, split: str):
        self._shards = open_split(folder, split)
        self._vocabulary = vocabulary_size(read_meta(folder))
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, int32 of shape (stop - start,). `InputError` for one beyond the vocabulary."""
        row = np.empty(stop - start, np.int32)
        done = 0
        i = int(np.searchsorted(self._ends, start, side="right"))  # the shard that holds `start`
        while done < len(row):
            shard, first = self._shards[i], start + done - (int(self._ends[i]) - len(self._shards[i]))
            part = shard[first : first + len(row) - done]
            check_vocabulary(part, Path(str(shard.filename)), self._vocabulary)
            row[done : done + len(part)] = part
            done += len(part)
            i += 1
        return row


class Loader:
    """Endless shuffled batches of a split, the same for the same arguments, shared out among `world_size` ranks.

    Every epoch goes through all windows once, in an order that `seed` and the epoch decide. Each step consumes
    world_size * batch_size windows, of which this rank gets its own batch_size; a batch may run over the end of an
    epoch into the next, so nothing is dropped. `position`, the number of windows that all ranks have consumed, is the
    whole state. `tokens` is the number of tokens in the split, `windows` that of its windows.

    Raises `InputError` for a folder that is not prepared or damaged, and for a split of too few windows. Headers and
    sizes are checked, not checksums (`data.text.shards.verify_folder` does that).
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        batch_size: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self._data = _Tokens(Path(folder), split)
        self._checksum = read_meta(Path(folder))["checksum"]
        self.split, self.batch_size, self.seq_len, self.seed = split, batch_size, seq_len, seed
        self.rank, self.world_size = rank, world_size
        self.tokens = len(self._data)
        self.windows = (self.tokens - 1) // seq_len
        self.position = 0
        if self.windows < world_size * batch_size:
            raise InputError(
                f"the {split} split of {folder} has {self.windows} windows of {seq_len} tokens, fewer than the "
                f"{world_size * batch_size} of a batch; give more text, or a smaller --seq-len, --batch-size or "
                "--grad-accum"
            )

    @property
    def epoch(self) -> int:
        """The number of times that all windows have been consumed."""
        return self.position // self.windows

    def own(self) -> range:
        """Which windows this rank gets next: their places in the order of the epochs."""
        first = self.position + self.rank * self.batch_size
        return range(first, first + self.batch_size)

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """This rank's next inputs and targets: two int32 C-contiguous arrays of shape (batch_size, seq_len)."""
        rows = np.stack([self._window(p) for p in self.own()])  # (B, T+1)
        self.position += self.world_size * self.batch_size
        return rows[:, :-1].copy(), rows[:, 1:].copy()  # copies: whatever the batch size, neither is a view of `rows`

    def next_micro_batches(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The next batch in so many equal parts, in order."""
        x, y = self.next_batch()
        return list(zip(np.split(x, count), np.split(y, count), strict=True))

    def _window(self, position: int) -> np.ndarray:
        epoch, i = divmod(position, self.windows)
        start = int(_order(self.seed, epoch, self.windows)[i]) * self.seq_len
        return self._data.read(start, start + self.seq_len + 1)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on after this batch, fit for JSON. The same on every rank."""
        return {
            "position": self.position,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "split": self.split,
            "data": self._checksum,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state()` was taken, exactly; batch size and number of ranks may differ from then.

        Raises `InputError` where `state` is of other data, another split, sequence length or seed.
        """
        for name, ours in self.state().items():
            theirs = state.get(name)
            if name == "position" and not (isinstance(theirs, int) and theirs >= 0):
                raise InputError(f"the saved data position {theirs!r} is no count of windows; start a new run")
            if name != "position" and theirs != ours:
                what = {"data": "checksum of the data", "seq_len": "sequence length"}.get(name, name)
                raise InputError(
                    f"cannot resume: the {what} was {theirs!r} in the saved run and is {ours!r} now; "
                    "give the same data and options, or start a new run"
                )
        self.position = state["position"]


@lru_cache(maxsize=2)  # this epoch, and the next for a batch that runs over the end
def _order(seed: int, epoch: int, windows: int) -> np.ndarray:
    """The order of the windows in one epoch, of shape (windows,): the only memory that grows with the data."""
    return np.random.default_rng((seed, epoch)).permutation(np.arange(windows, dtype=np.min_scalar_type(windows)))


def windows(
    folder: str | Path,
    split: str,
    batch_size: int,
    seq_len: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The windows of a split in order, for evaluation: inputs and targets, int32 of shape (batch_size, seq_len).

    Every token but the first is a target exactly once, or the first `max_tokens` of them. What is left over in the last
    batch is padding: input 0, target `IGNORED`. Of `world_size` ranks, each gets every world_size-th batch, from the
    rank-th on: none, where there are fewer. Raises `InputError` like `Loader`.
    """
    data = _Tokens(Path(folder), split)
    targets = len(data) - 1 if max_tokens is None else min(len(data) - 1, max_tokens)
    yield from _in_order(data.read, targets, batch_size, seq_len, rank, world_size)


def first_tokens(folder: str | Path, split: str, count: int) -> np.ndarray:
    """The first tokens of a split, int32 of shape (count,). Raises `InputError` like `Loader`."""
    return _Tokens(Path(folder), split).read(0, count)


def windows_of(row: np.ndarray, batch_size: int, seq_len: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `windows`, of a row of tokens in memory."""
    return _in_order(lambda start, stop: row[start:stop], len(row) - 1, batch_size, seq_len)


def _in_order(
    read: Callable[[int, int], np.ndarray],
    targets: int,
    batch_size: int,
    seq_len: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The windows of the row that `read` gives the tokens start to stop - 1 of."""
    step = batch_size * seq_len
    for start in range(rank * step, targets, world_size * step):
        row = read(start, min(start + step, targets) + 1)
        x = np.zeros(step, np.int32)
        y = np.full(step, IGNORED, np.int32)
        x[: len(row) - 1] = row[:-1]
        y[: len(row) - 1] = row[1:]
        yield x.reshape(batch_size, seq_len), y.reshape(batch_size, seq_len)
