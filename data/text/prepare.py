"""Tokenises a source of text into a folder of shards: `python -m data.text.prepare SOURCE --out DIR`.

The text streams through in constant memory, on all cores, and the folder is the same to the byte whatever their number.
It appears under its name only when it is whole: until then its parts lie in `DIR.partial`. A run that was stopped,
whether by Ctrl-C, a full disk or a power cut, goes on there after its last checkpoint when the same command is given
again, and the folder is the same to the byte as without the stop.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.cli import ArgumentParser, InputError, Progress, run
from data.files import Held, atomic_write, locked, sync_folder
from data.text.fineweb import fineweb, is_fineweb
from data.text.shards import MAX_SHARD_TOKENS, SPLITS, VERSION, ShardWriter, write_meta
from data.text.sources import ACCEPTED, HUB_FILES, Documents, Stream, stream
from data.text.tokenizer import EOT, EOT_TEXT, RANKS_SHA256, tokenizer

T = TypeVar("T")
R = TypeVar("R")

VALID_FRACTION = 0.01  # of the documents, for a source without validation text of its own
CHECKPOINT = "checkpoint.json"
PART = re.compile(rf"(train|valid)-\d+\.bin|(meta\.json|{re.escape(CHECKPOINT)})(\.tmp)?")  # what is in DIR.partial
BATCH = 1 << 18  # characters of the documents that a worker tokenises in one go
CHECKPOINT_EVERY = 32 << 20  # bytes of text, which take seconds to tokenise


class Taken(InputError):
    """The folder to prepare holds something, or another process is preparing it."""


@dataclass
class PreparationState:
    """Where a preparation has got to: what lies in its folder comes from all before `position` of stream `job`."""

    inputs: dict[str, Any]  # everything that decides what is written, except the code
    job: int
    position: int  # bytes
    documents: dict[str, int]
    shards: dict[str, list[dict[str, Any]]]  # as `ShardWriter.sync` has them


def prepare(
    source: str,
    out: str | Path,
    valid: str | float | None = None,
    workers: int | None = None,
    shard_tokens: int = MAX_SHARD_TOKENS,
) -> dict[str, Any]:
    """Writes the prepared folder `out` (the format is that of `data.text.shards`) and returns what its meta.json says.

    valid: a source of validation text, or the fraction of the documents of `source` to hold out. A held-out document
      is chosen by a hash of its text, so that copies of it never lie on both sides. None: the validation text that
      comes with `source`, or `VALID_FRACTION` of a local file.
    workers: threads that tokenise; None: one a CPU core.
    shard_tokens: the most tokens in one shard.

    Raises `InputError` for bad arguments and sources (see `data.text.sources`), an `out` that holds something already,
    and where train or validation would come out without a document.
    """
    started = time.monotonic()
    out = Path(out).resolve()
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise InputError(f"a shard must hold 1 to {MAX_SHARD_TOKENS:,} tokens, not {shard_tokens:,}")
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers cannot tokenise; give 1 or more")
    _refuse_taken(out)

    jobs = _jobs(source, valid)
    with _partial_folder(out) as folder:
        state = _last_state(folder, jobs, shard_tokens)
        before = _bytes_done(jobs, state)
        splits = _write_splits(folder, jobs, state, workers or os.cpu_count() or 1, shard_tokens)
        meta = write_meta(folder, splits)
        os.rename(folder, out)
        sync_folder(out.parent)
        (out / CHECKPOINT).unlink(missing_ok=True)  # only after the rename: until then a stopped run needs it

    seconds = time.monotonic() - started
    size = sum(text.size for text, _ in jobs) - before
    for name, split in splits.items():
        counts = f"{split['documents']:,} documents, {split['tokens']:,} tokens, {len(split['shards'])} shard(s)"
        print(f"{name}: {counts}, from {split['source']}")
    print(f"{size / 1e6:,.1f} MB in {seconds:.1f} s ({size / 1e6 / seconds:.1f} MB/s), prepared in {out}")
    return meta


def prepared(source: str) -> Path:
    """The folder of prepared data for `source`: itself if it is one, else one in runs/data, made now or before.

    Waits where another process is making it, and goes on with it where that one is stopped.
    """
    if os.path.isdir(source):
        return Path(source)
    if is_fineweb(source):
        return fineweb(source)
    if os.path.isfile(source) and source.endswith(".bin"):
        raise InputError(f"{source} is one file of tokens; give --data the folder with it and its validation tokens")
    text = None if source in HUB_FILES else stream(source, "train")  # the hub is asked only where it is needed
    identity = text.identity if text else source
    folder = Path("runs", "data", f"{Path(source).stem}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"preparing {source} in {folder}", flush=True)
    while not folder.exists():
        try:
            prepare(source, folder)
        except Taken:
            with locked(_lock(folder), _say_waiting):
                pass
    return folder


def _say_waiting(other: str) -> None:
    print(f"waiting for {other}, which is preparing it already", flush=True)


def _jobs(source: str, valid: str | float | None) -> list[tuple[Stream, float]]:
    """The streams to read, each with the fraction of its documents that goes to validation."""
    train = stream(source, "train")
    assert train
    if valid is None:
        own = stream(source, "valid")
        return [(train, 0.0), (own, 1.0)] if own else [(train, VALID_FRACTION)]
    try:
        fraction = float(valid)
    except ValueError:
        other = stream(str(valid), "valid") or stream(str(valid), "train")
        assert other
        if other.name == train.name:
            raise InputError(f"{valid} cannot be both training and validation text; give --valid a fraction") from None
        return [(train, 0.0), (other, 1.0)]
    if not 0 < fraction < 1:
        raise InputError(f"a validation fraction of {valid} is not between 0 and 1; a common one is {VALID_FRACTION}")
    return [(train, fraction)]


def _lock(out: Path) -> Path:
    """What a process that prepares `out` has locked."""
    return out.with_name(out.name + ".lock")


def _refuse_taken(out: Path) -> None:
    if os.path.exists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise Taken(f"{out} is there already, and is never overwritten; name another folder or remove it first")


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """`DIR.partial`, made or left by an earlier run, and ours alone. On an error it stays if one can go on from it."""
    folder = out.with_name(out.name + ".partial")
    with suppress(FileExistsError):
        os.makedirs(out.parent)
    with ExitStack() as held:
        try:
            held.enter_context(locked(_lock(out)))
        except Held as e:
            raise Taken(f"{e} is preparing {out}; wait for it or name another folder") from None
        _refuse_taken(out)  # again: until the lock was ours, another process could make it
        try:
            os.makedirs(folder, exist_ok=True)
        except FileExistsError:
            raise InputError(f"{folder} is in the way; move it or name another folder") from None
        if foreign := [name for name in os.listdir(folder) if not PART.fullmatch(name)]:
            raise InputError(f"{folder / foreign[0]} is in the way and not ours; move it or name another folder")
        try:
            yield folder
        except BaseException as e:
            if isinstance(e, InputError) or not (folder / CHECKPOINT).exists():  # bad input stays bad: no use to go on
                shutil.rmtree(folder, ignore_errors=True)
            else:
                print(f"the same command goes on from {folder}", file=sys.stderr)
            raise


def _last_state(folder: Path, jobs: list[tuple[Stream, float]], shard_tokens: int) -> PreparationState:
    """The one that an earlier run left in `folder`; of other inputs, or where there is none, `folder` is emptied."""
    texts = [[text.name, text.identity, fraction] for text, fraction in jobs]
    inputs = {"texts": texts, "shard_tokens": shard_tokens, "tokenizer": RANKS_SHA256, "version": VERSION}
    if (folder / CHECKPOINT).exists():
        state = PreparationState(**json.loads((folder / CHECKPOINT).read_bytes()))
        if state.inputs == inputs:
            done, size = _bytes_done(jobs, state), sum(text.size for text, _ in jobs)
            print(f"going on from {folder}, after {done / 1e6:,.1f} of {size / 1e6:,.1f} MB", file=sys.stderr)
            return state
        print(f"starting anew: {folder} was begun from another text or with other options", file=sys.stderr)
    for name in sorted(os.listdir(folder)):  # the checkpoint first, as it is worth nothing without the others
        os.remove(folder / name)
    return PreparationState(inputs, 0, 0, dict.fromkeys(SPLITS, 0), {split: [] for split in SPLITS})


def _bytes_done(jobs: list[tuple[Stream, float]], state: PreparationState) -> int:
    return sum(text.size for text, _ in jobs[: state.job]) + state.position


def _write_splits(
    folder: Path, jobs: list[tuple[Stream, float]], state: PreparationState, workers: int, shard_tokens: int
) -> dict[str, dict[str, Any]]:
    """Tokenises `jobs` from `state` on into shards in `folder`; returns the "splits" of its meta.json."""
    documents = state.documents
    size = sum(text.size for text, _ in jobs)
    with (
        ShardWriter(folder, "train", shard_tokens, state.shards["train"]) as train,
        ShardWriter(folder, "valid", shard_tokens, state.shards["valid"]) as valid,
        ThreadPoolExecutor(workers) as pool,
        Progress(
            total=size, initial=_bytes_done(jobs, state), unit="B", unit_scale=True, desc="tokenising"
        ) as progress,
    ):
        writers = {"train": train, "valid": valid}
        for job in range(state.job, len(jobs)):
            text, fraction = jobs[job]
            position = saved = state.position if job == state.job else 0
            batches = _batches(text, position)
            for (_, end), parts in _in_order(pool, partial(_encode_split, fraction=fraction), batches, 2 * workers):
                for split, (count, tokens) in parts.items():
                    writers[split].write(tokens)
                    documents[split] += count
                progress.update(end - position)
                position = end
                if position - saved >= CHECKPOINT_EVERY:
                    shards = {split: writer.sync() for split, writer in writers.items()}
                    with atomic_write(folder / CHECKPOINT, "w") as f:
                        json.dump(asdict(PreparationState(state.inputs, job, position, documents, shards)), f)
                    saved = position
    for split, count in documents.items():
        if not count:
            found = f"{sum(documents.values()):,} document(s) of {jobs[0][0].name}"
            raise InputError(
                f"none of the {found} fell to {split}; give --valid another fraction, or a source of validation text"
            )
    held_out, fraction = jobs[-1]
    sources = {"train": jobs[0][0].name, "valid": held_out.name if fraction == 1 else f"{fraction} of {held_out.name}"}
    return {
        split: {
            "source": sources[split],
            "documents": documents[split],
            "tokens": sum(shard["tokens"] for shard in writer.shards),
            "shards": writer.shards,
        }
        for split, writer in writers.items()
    }


def _batches(text: Stream, start: int) -> Documents:
    """`text.documents(start)` in groups that are worth a worker's while; the last, maybe empty, ends with the text."""
    batch: list[str] = []
    size, end = 0, start
    for group, end in text.documents(start):
        batch += group
        size += sum(map(len, group))
        if size >= BATCH:
            yield batch, end
            batch, size = [], 0
    yield batch, end


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[tuple[T, R]]:
    """The items, each with its `function(item)` from the pool; at most `ahead` wait for their turn, to bound memory."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        if len(waiting) == ahead:
            first, future = waiting.popleft()
            yield first, future.result()
        waiting.append((item, pool.submit(function, item)))
    for item, future in waiting:
        yield item, future.result()


def _encode_split(batch: tuple[list[str], int], fraction: float) -> dict[str, tuple[int, np.ndarray]]:
    """The documents of train and of valid in a batch, as their number and their tokens."""
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for document in batch[0]:
        parts["valid" if _hash(document) < fraction else "train"].append(document)
    return {split: (len(part), encode(part)) for split, part in parts.items() if part}


def _hash(document: str) -> float:
    """A number in [0, 1) that only the text decides."""
    return zlib.crc32(document.encode()) / 2**32


def encode(documents: list[str]) -> np.ndarray:
    """The tokens of the documents, uint16 of shape (tokens,), `EOT` after each of them and nowhere else."""
    encoding = tokenizer()
    # One long call runs without Python's global lock nearly all the time, one call a document only half of it.
    text = EOT_TEXT.join([*documents, ""])
    if text.count(EOT_TEXT) > len(documents):  # a document has the marker in its text, where it stays text
        parts = [np.append(encoding.encode_to_numpy(document, disallowed_special=()), EOT) for document in documents]
        return np.concatenate(parts).astype(np.uint16)
    return encoding.encode_to_numpy(text, allowed_special={EOT_TEXT}).astype(np.uint16)


def main() -> None:
    """Prepares a source of text for training."""
    parser = ArgumentParser(
        prog="python -m data.text.prepare",
        description="Tokenise text into a folder of shards. What was stopped goes on with the same command.",
        epilog="example: python -m data.text.prepare stories.jsonl --valid 0.01 --out prepared",
    )
    parser.add_argument("source", metavar="SOURCE", help=f"the text: {ACCEPTED}")
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="the folder to write; it must not exist, or be empty"
    )
    parser.add_argument(
        "--valid",
        metavar="SOURCE|FRACTION",
        help="validation text, or the fraction of the documents to hold out for it (default: what comes with SOURCE, "
        f"or {VALID_FRACTION} of a local file)",
    )
    parser.add_argument("--workers", metavar="N", type=int, help="threads that tokenise (default: one a CPU core)")
    parser.add_argument(
        "--shard-tokens",
        metavar="N",
        type=int,
        default=MAX_SHARD_TOKENS,
        help="the most tokens in one shard (default and maximum: %(default)s)",
    )
    options = parser.parse_args()
    prepare(options.source, options.out, options.valid, options.workers, options.shard_tokens)


if __name__ == "__main__":
    run(main)
