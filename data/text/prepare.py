"""Tokenises a source of text into a folder of shards: `python -m data.text.prepare SOURCE --out DIR`.

The text streams through in constant memory, on all cores, and the folder is the same to the byte whatever their number.
It appears under its name only when it is whole: until then its parts lie in `DIR.partial`. A run that was stopped,
whether by Ctrl-C, a full disk or a power cut, goes on there after its last checkpoint when the same command is given
again, and the folder is the same to the byte as without the stop.
"""

import fcntl
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.checkpoints.checkpoint import resolve
from data.cli import ArgumentParser, InputError, Progress, run
from data.files import atomic_write, sync_folder
from data.text.shards import MAX_SHARD_TOKENS, SPLITS, VERSION, ShardWriter, write_meta
from data.text.sources import ACCEPTED, HUB_FILES, Documents, Stream, stream
from data.text.tokenizer import FILES, RANKS_SHA256, VOCAB_SIZE, Tokenizer, gpt2, of_folder

T = TypeVar("T")
R = TypeVar("R")

VALID_FRACTION = 0.01  # of the documents, for a source without validation text of its own
CHECKPOINT = "checkpoint.json"
WRITTEN = "|".join(map(re.escape, ("meta.json", CHECKPOINT, *FILES)))
PART = re.compile(rf"(train|valid)-\d+\.bin|({WRITTEN})(\.tmp)?")  # what is in DIR.partial
BATCH = 1 << 18  # characters of the documents that a worker tokenises in one go
CHECKPOINT_EVERY = 32 << 20  # bytes of text, which take seconds to tokenise


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens: by which tokenizer, and whether what spells a special token becomes that token."""

    tokenizer: Tokenizer
    special_tokens: bool

    @property
    def sha256(self) -> str:
        return self.tokenizer.special_sha256 if self.special_tokens else self.tokenizer.sha256


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
    tokenizer: Tokenizer | None = None,
    special_tokens: bool = False,
) -> dict[str, Any]:
    """Writes the prepared folder `out` (the format is that of `data.text.shards`) and returns what its meta.json says.

    valid: a source of validation text, or the fraction of the documents of `source` to hold out. A held-out document
      is chosen by a hash of its text, so that copies of it never lie on both sides. None: the validation text that
      comes with `source`, or `VALID_FRACTION` of a local file.
    workers: threads that tokenise; None: one a CPU core.
    shard_tokens: the most tokens in one shard.
    tokenizer: None: GPT-2's.
    special_tokens: whether what spells a special token in the text becomes that token.

    Raises `InputError` for bad arguments and sources (see `data.text.sources`), an `out` that holds something already,
    and where train or validation would come out without a document.
    """
    started = time.monotonic()
    out = Path(out).resolve()
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise InputError(f"a shard must hold 1 to {MAX_SHARD_TOKENS:,} tokens, not {shard_tokens:,}")
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers cannot tokenise; give 1 or more")
    if os.path.exists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise InputError(f"{out} is there already, and is never overwritten; name another folder or remove it first")

    jobs, encoding = _jobs(source, valid), Encoding(tokenizer or gpt2(), special_tokens)
    with _partial_folder(out) as folder:
        state = _last_state(folder, jobs, shard_tokens, encoding)
        before = _bytes_done(jobs, state)
        splits = _write_splits(folder, jobs, state, workers or os.cpu_count() or 1, shard_tokens, encoding)
        meta = write_meta(folder, splits, encoding.tokenizer, special_tokens)
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


def prepared(source: str, tokenizer: Tokenizer | None = None) -> Path:
    """The folder of prepared data for `source`: itself if it is one, else one in runs/data, made now or before with
    `tokenizer` (None: GPT-2's).
    """
    tokenizer = tokenizer or gpt2()
    if os.path.isdir(source):
        return Path(source)
    text = None if source in HUB_FILES else stream(source, "train")  # the hub is asked only where it is needed
    identity = text.identity if text else source
    if (tokenizer.sha256, tokenizer.vocab_size) != (RANKS_SHA256, VOCAB_SIZE):
        identity += f" {tokenizer.sha256} {tokenizer.vocab_size}"
    folder = Path("runs", "data", f"{Path(source).stem}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"preparing {source} in {folder}", flush=True)
        prepare(source, folder, tokenizer=tokenizer)
    return folder


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


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """`DIR.partial`, made or left by an earlier run, and ours alone. On an error it stays if one can go on from it."""
    folder = out.with_name(out.name + ".partial")
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{folder} is in the way; move it or name another folder") from None
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it even when we are killed
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
    except BlockingIOError:
        raise InputError(f"another run is preparing {out}; wait for it or name another folder") from None
    finally:
        os.close(fd)


def _last_state(
    folder: Path, jobs: list[tuple[Stream, float]], shard_tokens: int, encoding: Encoding
) -> PreparationState:
    """The one that an earlier run left in `folder`; of other inputs, or where there is none, `folder` is emptied."""
    texts = [[text.name, text.identity, fraction] for text, fraction in jobs]
    inputs = {"texts": texts, "shard_tokens": shard_tokens, "tokenizer": encoding.sha256, "version": VERSION}
    inputs |= {"vocabulary": encoding.tokenizer.vocab_size}
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
    folder: Path,
    jobs: list[tuple[Stream, float]],
    state: PreparationState,
    workers: int,
    shard_tokens: int,
    encoding: Encoding,
) -> dict[str, dict[str, Any]]:
    """Tokenises `jobs` from `state` on into shards in `folder`; returns the "splits" of its meta.json."""
    documents, vocabulary = state.documents, encoding.tokenizer.vocab_size
    size = sum(text.size for text, _ in jobs)
    with (
        ShardWriter(folder, "train", shard_tokens, state.shards["train"], vocabulary) as train,
        ShardWriter(folder, "valid", shard_tokens, state.shards["valid"], vocabulary) as valid,
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
            encode = partial(_encode_split, fraction=fraction, encoding=encoding)
            for (_, end), parts in _in_order(pool, encode, batches, 2 * workers):
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


def _encode_split(
    batch: tuple[list[str], int], fraction: float, encoding: Encoding
) -> dict[str, tuple[int, np.ndarray]]:
    """The documents of train and of valid in a batch, as their number and their tokens."""
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for document in batch[0]:
        parts["valid" if _hash(document) < fraction else "train"].append(document)
    encode = partial(encoding.tokenizer.encode_documents, special_tokens=encoding.special_tokens)
    return {split: (len(part), encode(part)) for split, part in parts.items() if part}


def _hash(document: str) -> float:
    """A number in [0, 1) that only the text decides."""
    return zlib.crc32(document.encode()) / 2**32


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
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="that of a model: a run, a folder, or a name on the hub (default: GPT-2's)",
    )
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="what spells a special token in the text, such as <|endoftext|>, becomes that token",
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
    tokenizer = of_folder(resolve(options.tokenizer)) if options.tokenizer else gpt2()
    prepare(
        options.source,
        options.out,
        options.valid,
        options.workers,
        options.shard_tokens,
        tokenizer,
        options.special_tokens,
    )


if __name__ == "__main__":
    run(main)
