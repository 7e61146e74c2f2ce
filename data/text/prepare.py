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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.checkpoints.checkpoint import resolve
from data.cli import ArgumentParser, InputError, Progress, run
from data.files import Held, atomic_write, locked, sync_folder
from data.text import token_files
from data.text.division import FRACTION, Batch, Cut, Job, Mark, batches, plan
from data.text.fineweb import fineweb, is_fineweb
from data.text.formats import AS_GIVEN, ERRORS, Piece, Place, Reading, refuse_textless, told
from data.text.hub import HubError
from data.text.shards import MAX_SHARD_TOKENS, SPLITS, VERSION, ShardWriter, made_with, write_meta
from data.text.sources import ACCEPTED, HUB_FILES, is_dataset, is_text_folder, parts, stream
from data.text.tokenizer import EOT_TEXT, FILES, RANKS_SHA256, VOCAB_SIZE, Tokenizer, gpt2, of_folder

T = TypeVar("T")
R = TypeVar("R")

CHECKPOINT = "checkpoint.json"
WRITTEN = "|".join(map(re.escape, ("meta.json", CHECKPOINT, *FILES)))
PART = re.compile(rf"(train|valid)-\d+\.bin|({WRITTEN})(\.tmp)?")  # what is in DIR.partial
BATCH = 1 << 18  # characters of the documents that a worker tokenises in one go
ENOUGH_RECORDS = 1000  # to tell that most have no text
CHECKPOINT_EVERY = 32 << 20  # bytes of text, which take seconds to tokenise


READING = 2  # counts up when the same file is read as other documents, so that what is prepared from it is made anew


class Taken(InputError):
    """The folder to prepare holds something, or another process is preparing it."""


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens: by which tokenizer, and whether what spells a special token becomes that token."""

    tokenizer: Tokenizer
    special_tokens: bool

    @property
    def sha256(self) -> str:
        return self.tokenizer.special_sha256 if self.special_tokens else self.tokenizer.sha256

    @property
    def ends_at_marker(self) -> bool:
        """Whether `EOT_TEXT` becomes the token that ends a document, wherever it stands."""
        return self.tokenizer.encode(EOT_TEXT, self.special_tokens) == [self.tokenizer.eot]

    def __call__(self, documents: list[str]) -> np.ndarray:
        """The tokens of documents, uint16 of shape (tokens,), each ended by the end-of-text token."""
        return self.tokenizer.encode_documents(documents, self.special_tokens)


@dataclass
class PreparationState:
    """Where a preparation has got to: what lies in its folder comes from all that is read before `mark`."""

    inputs: dict[str, Any]  # everything that decides what is written, except the code
    mark: Mark
    cut: Cut | None
    counts: list[Counter[str]]  # of each job
    documents: dict[str, int]
    shards: dict[str, list[dict[str, Any]]]  # as `ShardWriter.sync` has them


def prepare(
    source: str,
    out: str | Path,
    valid: str | float | None = None,
    workers: int | None = None,
    shard_tokens: int = MAX_SHARD_TOKENS,
    how: Reading = AS_GIVEN,
    tokenizer: Tokenizer | None = None,
    special_tokens: bool = False,
) -> dict[str, Any]:
    """Writes the prepared folder `out` (the format is that of `data.text.shards`) and returns what its meta.json says.

    valid: a source of validation text, or the fraction of `source` to hold out (see `data.text.division`). None: the
      validation text that comes with `source`, else `FRACTION` of its documents, or the end of a single one.
    workers: threads that tokenise; None: one a CPU core.
    shard_tokens: the most tokens in one shard.
    how: the field of records, and what is done about bytes that are no UTF-8.
    tokenizer: None: GPT-2's.
    special_tokens: whether what spells a special token in the text becomes that token.

    Raises `InputError` for bad arguments and sources (see `data.text.sources`), an `out` that holds something already,
    a source most of whose records have no text, and a text too short to be both training and validation text.
    """
    started = time.monotonic()
    out = Path(out).resolve()
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise InputError(f"a shard must hold 1 to {MAX_SHARD_TOKENS:,} tokens, not {shard_tokens:,}")
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers cannot tokenise; give 1 or more")
    _refuse_taken(out)

    jobs, encoding = _jobs(source, valid, how), Encoding(tokenizer or gpt2(), special_tokens)
    for note in dict.fromkeys(note for job in jobs for note in job.text.notes):
        print(note)
    with _partial_folder(out) as folder:
        state = _last_state(folder, jobs, shard_tokens, how, encoding)
        before = _bytes_done(jobs, state.mark)
        splits = _write_splits(folder, jobs, state, workers or os.cpu_count() or 1, shard_tokens, how, encoding)
        given = {"source": source, "valid": valid if valid is None else str(valid)}
        meta = write_meta(folder, splits, encoding.tokenizer, special_tokens, given)
        os.rename(folder, out)
        sync_folder(out.parent)
        (out / CHECKPOINT).unlink(missing_ok=True)  # only after the rename: until then a stopped run needs it

    seconds = time.monotonic() - started
    size = sum(job.text.size for job in jobs) - before
    for name, split in splits.items():
        counts = f"{split['documents']:,} documents, {split['tokens']:,} tokens, {len(split['shards'])} shard(s)"
        print(f"{name}: {counts}, from {split['source']}")
    for job, read in zip(jobs, state.counts, strict=True):
        for sentence in told(read, how, encoding.ends_at_marker):
            print(f"{job.text.name}: {sentence}")
    if state.cut:
        count = state.cut.documents
        few = f"{count:,} documents, too few to choose from" if count > 1 else "one document"
        print(f"{jobs[0].text.name}: {few}, so its end is the validation text; --valid takes another fraction or text")
    print(f"{size / 1e6:,.1f} MB in {seconds:.1f} s ({size / 1e6 / seconds:.1f} MB/s), prepared in {out}")
    return meta


def prepared(
    source: str, valid: str | None = None, how: Reading = AS_GIVEN, tokenizer: Tokenizer | None = None
) -> Path:
    """The folder of data for `source`: itself if it holds tokens, else one in runs/data, made now or before with
    `tokenizer` (None: GPT-2's).

    Waits where another process is making it, and goes on with it where that one is stopped. `valid` and `how` are as in
    `prepare`. Raises `InputError` as that does, and where they are given for tokens.
    """
    tokenizer = tokenizer or gpt2()
    tokens = os.path.isdir(source) and (token_files.holds(Path(source)) or not is_text_folder(source))
    if (tokens or is_fineweb(source)) and (valid is not None or how != AS_GIVEN):
        raise InputError(f"{source} is prepared already, so it goes without --valid, --field and --errors")
    if tokens:
        return Path(source)
    if is_fineweb(source) and not made_with({"tokenizer": RANKS_SHA256}, tokenizer):  # before it is downloaded
        raise InputError(
            f"{source} holds GPT-2's tokens, and {tokenizer.name} has another tokenizer; pass a text as --data"
        )
    if is_fineweb(source):
        return fineweb(source)
    if os.path.isfile(source) and source.endswith(".bin"):
        raise InputError(f"{source} is one file of tokens; give --data the folder with it and its validation tokens")
    identity = _identity(source, "train", how)
    if valid is None and not _is_named(source) and (own := stream(source, "valid", how)):
        identity += f"\n{own.identity}"
    if valid is not None or how != AS_GIVEN:
        held_out = valid if valid is None or _fraction(valid) is not None else _identity(valid, "valid", how)
        identity = json.dumps([identity, held_out, how.field, how.errors])
    if (tokenizer.sha256, tokenizer.vocab_size) != (RANKS_SHA256, VOCAB_SIZE):
        identity += f" {tokenizer.sha256} {tokenizer.vocab_size}"
    stem = re.sub(r"[^\w. -]+", "-", Path(source).stem).strip("-. ")[:60] or "text"
    folder = Path("runs", "data", f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"preparing {source} in {folder}", flush=True)
    while not folder.exists():
        try:
            prepare(source, folder, valid, how=how, tokenizer=tokenizer)
        except Taken:
            with locked(_lock(folder), partial(_say_waiting, folder)):
                pass
    return folder


def _say_waiting(folder: Path, other: str) -> None:
    if not folder.exists():  # else `other` waited as well, and has the lock for a moment
        print(f"waiting for {other}, which is preparing it already", flush=True)


def _identity(source: str, split: str, how: Reading) -> str:
    """What tells a source from others; of the hub's its name, so that the hub is asked only where it is needed."""
    if source in HUB_FILES or is_dataset(source):
        return source
    text = stream(source, split, how) or stream(source, "train", how)
    assert text
    return text.identity if source == "stories" else f"{text.identity} {READING}"


def _is_named(source: str) -> bool:
    """Whether the name of a source tells its validation text as well: it is made here, or the hub's."""
    return source == "stories" or source in HUB_FILES or is_dataset(source)


def _fraction(valid: str | float) -> float | None:
    try:
        return float(valid)
    except ValueError:
        return None


def _jobs(source: str, valid: str | float | None, how: Reading) -> list[Job]:
    """The streams to read."""
    train = stream(source, "train", how)
    assert train
    if valid is None:
        own = stream(source, "valid", how)
        return [Job(train, 0), Job(own, 1)] if own else [Job(train, None)]
    fraction = _fraction(valid)
    if fraction is None:
        other = stream(str(valid), "valid", how) or stream(str(valid), "train", how)
        assert other
        if {file.identity for file in train.files} & {file.identity for file in other.files}:
            raise InputError(f"{valid} cannot be both training and validation text; give --valid a fraction")
        return [Job(train, 0), Job(other, 1)]
    if not 0 < fraction < 1:
        raise InputError(f"a validation fraction of {valid} is not between 0 and 1; a common one is {FRACTION}")
    return [Job(train, fraction)]


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
            bad = isinstance(e, InputError) and not isinstance(e, HubError)  # and stays bad: it is no use to go on
            if bad or not (folder / CHECKPOINT).exists():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                print(f"the same command goes on from {folder}", file=sys.stderr)
            raise


def _last_state(folder: Path, jobs: list[Job], shard_tokens: int, how: Reading, encoding: Encoding) -> PreparationState:
    """The one that an earlier run left in `folder`; of other inputs, or where there is none, `folder` is emptied."""
    texts = [[text.name, text.identity, fraction] for text, fraction in jobs]
    inputs = {"texts": texts, "field": how.field, "errors": how.errors, "reading": READING}
    inputs |= {"shard_tokens": shard_tokens, "tokenizer": encoding.sha256, "version": VERSION}
    inputs |= {"vocabulary": encoding.tokenizer.vocab_size, "special_tokens": encoding.special_tokens}
    if (folder / CHECKPOINT).exists():
        saved = json.loads((folder / CHECKPOINT).read_bytes())
        if saved["inputs"] == inputs:
            job, place, *division = saved["mark"]
            mark, cut = Mark(job, Place(*place), *division), saved["cut"] and Cut(*saved["cut"])
            done, size = _bytes_done(jobs, mark), sum(job.text.size for job in jobs)
            print(f"going on from {folder}, after {done / 1e6:,.1f} of {size / 1e6:,.1f} MB", file=sys.stderr)
            counts = [Counter(**of_job) for of_job in saved["counts"]]
            return PreparationState(inputs, mark, cut, counts, saved["documents"], saved["shards"])
        print(f"starting anew: {folder} was begun from another text or with other options", file=sys.stderr)
    for name in sorted(os.listdir(folder)):  # the checkpoint first, as it is worth nothing without the others
        os.remove(folder / name)
    cut = plan(jobs[-1].text, jobs[-1].fraction, how) if jobs[-1].divided else None
    counts = [Counter() for _ in jobs]
    return PreparationState(inputs, Mark(), cut, counts, dict.fromkeys(SPLITS, 0), {split: [] for split in SPLITS})


def _bytes_done(jobs: list[Job], mark: Mark) -> int:
    return sum(job.text.size for job in jobs[: mark.job]) + mark.place.done


def _write_splits(
    folder: Path,
    jobs: list[Job],
    state: PreparationState,
    workers: int,
    shard_tokens: int,
    how: Reading,
    encoding: Encoding,
) -> dict[str, dict[str, Any]]:
    """Tokenises `jobs` from `state` on into shards in `folder`; returns the "splits" of its meta.json."""
    saved, vocabulary = _bytes_done(jobs, state.mark), encoding.tokenizer.vocab_size
    encoded = partial(_encoded, encoding=encoding)
    with (
        ShardWriter(folder, "train", shard_tokens, state.shards["train"], vocabulary) as train,
        ShardWriter(folder, "valid", shard_tokens, state.shards["valid"], vocabulary) as valid,
        ThreadPoolExecutor(workers) as pool,
        Progress(
            total=sum(job.text.size for job in jobs), initial=saved, unit="B", unit_scale=True, desc="tokenising"
        ) as progress,
    ):
        writers = {"train": train, "valid": valid}
        for batch, parts in _in_order(pool, encoded, batches(jobs, state.mark, state.cut, BATCH), 2 * workers):
            for split, (count, tokens) in parts.items():
                writers[split].write(tokens)
                state.documents[split] += count
            state.mark = batch.mark
            state.counts[batch.mark.job].update(batch.counts)
            refuse_textless(jobs[batch.mark.job].text.name, state.counts[batch.mark.job], how, least=ENOUGH_RECORDS)
            done = _bytes_done(jobs, state.mark)
            progress.update(done - progress.n)
            if done - saved >= CHECKPOINT_EVERY:
                state.shards = {split: writer.sync() for split, writer in writers.items()}
                with atomic_write(folder / CHECKPOINT, "w") as f:
                    json.dump(vars(state), f)
                saved = done
        for job, counts in zip(jobs, state.counts, strict=True):
            refuse_textless(job.text.name, counts, how)
    held_out, fraction = jobs[-1]
    sources = {"train": jobs[0].text.name, "valid": held_out.name}
    if state.cut:
        place = f"about character {state.cut.near:,} of {state.cut.characters:,}"
        sources["valid"] = f"the end of {held_out.name}, after {place}"
    elif fraction != 1:
        sources["valid"] = f"{FRACTION if fraction is None else fraction} of {held_out.name}"
    return {
        split: {
            "source": sources[split],
            "field": how.field,
            "errors": how.errors,
            "read": dict(state.counts[job]),
            "documents": state.documents[split],
            "tokens": sum(shard["tokens"] for shard in writers[split].shards),
            "shards": writers[split].shards,
        }
        for job, split in ((0, "train"), (-1, "valid"))
    }


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


def _encoded(batch: Batch, encoding: Encoding) -> dict[str, tuple[int, np.ndarray]]:
    """Of each split in a batch, the number of documents that end there, and the tokens."""
    parts = batch.parts.items()
    return {split: (sum(piece.ends for piece in pieces), _tokens(pieces, encoding)) for split, pieces in parts}


def _tokens(pieces: list[Piece], encode: Encoding) -> np.ndarray:
    """The tokens of the pieces, with the end-of-text token where a document ends. A piece that another follows is
    encoded by itself.
    """
    found = []
    for ends, those in groupby(pieces, key=lambda piece: piece.ends):
        texts = [piece.text for piece in those]
        found += [encode(texts)] if ends else [encode([text])[:-1] for text in texts]
    return np.concatenate(found)


def main() -> None:
    """Prepares a source of text for training."""
    parser = ArgumentParser(
        prog="python -m data.text.prepare",
        description="Tokenise text into a folder of shards. What was stopped goes on with the same command.",
        epilog="example: python -m data.text.prepare stories.jsonl --valid 0.01 --out prepared",
    )
    parser.add_argument("source", metavar="SOURCE", nargs="+", help=f"the text: {ACCEPTED}")
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="the folder to write; it must not exist, or be empty"
    )
    parser.add_argument(
        "--valid",
        metavar="SOURCE|FRACTION",
        help="validation text, or the fraction to hold out for it (default: what comes with SOURCE, else "
        f"{FRACTION} of its documents, or the end of a single text)",
    )
    parser.add_argument(
        "--field", metavar="NAME", default=Reading.field, help="of a record, that holds its text (default: %(default)s)"
    )
    parser.add_argument(
        "--errors",
        choices=ERRORS,
        default=Reading.errors,
        help="what to do about bytes that are no UTF-8: refuse the file, or put U+FFFD there (default: %(default)s)",
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
    source = ",".join(options.source)
    if parts(source) != [part for given in options.source for part in parts(given)]:
        raise InputError(f"{source} is the name of a file or folder too; rename that, or name the folder of the others")
    how = Reading(options.field, options.errors)
    tokenizer = of_folder(resolve(options.tokenizer)) if options.tokenizer else gpt2()
    prepare(
        source,
        options.out,
        options.valid,
        options.workers,
        options.shard_tokens,
        how,
        tokenizer,
        options.special_tokens,
    )


if __name__ == "__main__":
    run(main)
