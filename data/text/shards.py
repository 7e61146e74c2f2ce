"""Prepared data on disk: shards of tokens, and the folder that holds them.

A shard is a header of 64 bytes, then its tokens, each a little-endian uint16. The header, little-endian:

    bytes  0-7    magic, b"GPT2TOKS"
           8-11   format version (uint32)
          12-15   vocabulary size of the tokenizer (uint32); every token is below it
          16-23   number of tokens (uint64)
          24-55   sha256 of the tokens' bytes
          56-63   zero

A prepared folder holds `train-00000.bin`, ..., `valid-00000.bin`, ... and, written last, `meta.json`:

    version     format version of the folder and its shards
    tokenizer   sha256 of the tokenizer that the tokens were made with; GPT-2's is that of its rank file
    checksum    sha256 over the sha256s of all shards, train's first
    splits      {"train": ..., "valid": ...}, each with `source` (for people), `documents`, `tokens`, and `shards`,
                a list of {"name", "tokens", "sha256"} in order; and of what was prepared since these exist, `field` and
                `errors` (see `data.text.formats.Reading`) and `read`, what was counted in its source
    vocabulary  of another tokenizer than GPT-2's: {"name", "size", "eot"}; its files lie beside the shards
    given       the arguments that named the text: {"source", "valid"}; old folders lack it
    special_tokens  true where what spells a special token in the text became that token

`python -m data.text.shards DIR` reads every token of a folder and checks it against all of this.
"""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, Any

import numpy as np

from data.cli import ArgumentParser, InputError, run
from data.files import atomic_write, sync_folder
from data.text import token_files
from data.text.tokenizer import (
    EOT,
    LARGEST_VOCAB,
    RANKS_SHA256,
    VOCAB_SIZE,
    Tokenizer,
    from_files,
    gpt2,
    read_files,
)

MAGIC = b"GPT2TOKS"
VERSION = 1
HEADER = struct.Struct("<8sIIQ32s8x")
MAX_SHARD_TOKENS = 100_000_000
SPLITS = ("train", "valid")
VERIFY_BLOCK = 1 << 22  # bytes checked at a time

AGAIN = "prepare it again with `python -m data.text.prepare`"


class ShardWriter:
    """Writes the tokens of one split as `SPLIT-00000.bin`, ... in `folder`, each of `shard_tokens` but the last.

    A context manager. A shard gets its header when it is whole and on disk: one that an error interrupts is none.
    vocabulary: each token is below it.
    shards: what `sync` of another writer returned. What was written until then is kept, and this one goes on behind it;
      raises `InputError` where it is not there any more.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        shard_tokens: int = MAX_SHARD_TOKENS,
        shards: Sequence[dict[str, Any]] = (),
        vocabulary: int = VOCAB_SIZE,
    ):
        self.folder = folder
        self.split = split
        self.shard_tokens = shard_tokens
        self.vocabulary = vocabulary
        self.shards: list[dict[str, Any]] = []  # the finished ones, as meta.json has them
        self._file: IO[bytes] | None = None
        for shard in shards:
            if shard["tokens"] == shard_tokens:
                _open_listed(folder, shard, vocabulary)
                self.shards.append(shard)
            else:
                self._reopen(shard)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._file and e is None:
            self._finish(self._file)
        elif self._file:
            self._file.close()

    def write(self, tokens: np.ndarray) -> None:
        """Appends `tokens` (uint16, 1-d)."""
        while len(tokens):
            file = self._file or self._begin()
            part = tokens[: self.shard_tokens - self._count]
            data = part.astype("<u2", copy=False).tobytes()
            file.write(data)
            self._sha256.update(data)
            self._count += len(part)
            if self._count == self.shard_tokens:
                self._finish(file)
            tokens = tokens[len(part) :]

    def sync(self) -> list[dict[str, Any]]:
        """Makes durable what was written, and returns all shards as meta.json would have them if they ended here."""
        if not self._file:
            return list(self.shards)
        self._file.flush()
        os.fsync(self._file.fileno())
        return [*self.shards, self._entry()]

    def _begin(self) -> IO[bytes]:
        self._name = f"{self.split}-{len(self.shards):05d}.bin"
        self._count = 0
        self._sha256 = hashlib.sha256()
        self._file = (self.folder / self._name).open("wb")
        self._file.write(bytes(HEADER.size))  # the header says what follows, so it is written last
        sync_folder(self.folder)
        return self._file

    def _reopen(self, shard: dict[str, Any]) -> None:
        """Goes on with an unfinished shard, and cuts off what was written after it was synced."""
        path = self.folder / shard["name"]
        if not os.path.isfile(path):
            raise InputError(f"shard {path} is missing; {AGAIN}")
        self._name, self._count = shard["name"], shard["tokens"]
        self._file = path.open("r+b")
        self._file.truncate(HEADER.size + 2 * self._count)
        self._file.seek(HEADER.size)
        self._sha256 = hashlib.sha256()
        for block in iter(partial(self._file.read, VERIFY_BLOCK), b""):
            self._sha256.update(block)
        if self._entry() != shard:
            self._file.close()
            raise InputError(f"shard {path} is corrupted: its tokens differ from its checksum; {AGAIN}")

    def _finish(self, file: IO[bytes]) -> None:
        file.seek(0)
        file.write(HEADER.pack(MAGIC, VERSION, self.vocabulary, self._count, self._sha256.digest()))
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        self.shards.append(self._entry())

    def _entry(self) -> dict[str, Any]:
        return {"name": self._name, "tokens": self._count, "sha256": self._sha256.hexdigest()}


def open_shard(path: Path, vocabulary: int = VOCAB_SIZE) -> np.memmap:
    """The tokens of a shard, uint16 of shape (tokens,), mapped read-only.

    Raises `InputError` for a file that is missing, truncated, of another kind, version or vocabulary. The tokens are
    not read: that is `verify`.
    """
    return _open(path, vocabulary)[0]


def verify(path: Path, vocabulary: int = VOCAB_SIZE) -> None:
    """Reads all tokens of a shard; `InputError` where they differ from its checksum or lie beyond the vocabulary."""
    _, expected = _open(path, vocabulary)
    sha256 = hashlib.sha256()
    with open(path, "rb") as f:  # not mapped: a page fault would hold up all threads
        f.seek(HEADER.size)
        for block in iter(partial(f.read, VERIFY_BLOCK), b""):
            sha256.update(block)
            check_vocabulary(np.frombuffer(block, "<u2"), path, vocabulary)
    if sha256.hexdigest() != expected:
        raise InputError(f"shard {path} is corrupted: its tokens differ from its checksum; {AGAIN}")


def check_vocabulary(tokens: np.ndarray, path: Path, vocabulary: int) -> None:
    """Raises `InputError` where one of `tokens`, read from the shard at `path`, is no token of the vocabulary."""
    if len(tokens) and (worst := int(tokens.max())) >= vocabulary:
        raise InputError(f"shard {path} holds token {worst}, beyond the vocabulary of {vocabulary}; {AGAIN}")


def _open(path: Path, vocabulary: int) -> tuple[np.memmap, str]:
    """The mapped tokens of a shard, and their sha256 according to its header (in hexadecimal)."""
    if not os.path.isfile(path):
        raise InputError(f"shard {path} is missing; {AGAIN}")
    with open(path, "rb") as f:
        header = f.read(HEADER.size)
        size = os.fstat(f.fileno()).st_size
    if not size:
        raise InputError(f"shard {path} is empty; {AGAIN}")
    if not header.startswith(MAGIC):
        raise InputError(f"{path} is no shard of tokens (it does not begin with {MAGIC.decode()}); {AGAIN}")
    if len(header) < HEADER.size:
        raise InputError(f"shard {path} is truncated within its header; {AGAIN}")
    _, version, size_of_vocabulary, count, sha256 = HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f"shard {path} has format version {version}, this program reads version {VERSION}; {AGAIN}")
    if size_of_vocabulary != vocabulary:
        raise InputError(
            f"shard {path} has a vocabulary of {size_of_vocabulary}, the tokenizer one of {vocabulary}; {AGAIN}"
        )
    expected = HEADER.size + 2 * count
    if size != expected or not count:
        fault = "is truncated" if size < expected else "has a wrong size"
        raise InputError(
            f"shard {path} {fault}: {size:,} bytes, its header's {count:,} tokens need {expected:,}; {AGAIN}"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER.size, shape=(count,)), sha256.hex()


def write_meta(
    folder: Path,
    splits: dict[str, dict[str, Any]],
    tokenizer: Tokenizer | None = None,
    special_tokens: bool = False,
    given: dict[str, str | None] | None = None,
) -> dict[str, Any]:
    """Completes a folder whose shards are written: writes the files of its tokenizer, unless that is GPT-2's (None),
    then meta.json, and returns what that holds. special_tokens: whether the tokens may be special ones.
    given: the arguments that named the text.
    """
    tokenizer = tokenizer or gpt2()
    sha256 = tokenizer.special_sha256 if special_tokens else tokenizer.sha256
    meta = {"version": VERSION, "tokenizer": sha256, "checksum": _checksum(splits), "splits": splits}
    if (sha256, tokenizer.vocab_size) != (RANKS_SHA256, VOCAB_SIZE):
        meta["vocabulary"] = {"name": tokenizer.name, "size": tokenizer.vocab_size, "eot": tokenizer.eot}
        for name, text in tokenizer.files().items():
            with atomic_write(folder / name) as f:
                f.write(text.encode())
    if given:
        meta["given"] = given
    if special_tokens:
        meta["special_tokens"] = True
    with atomic_write(folder / "meta.json", "w") as f:
        json.dump(meta, f, indent=2)
    return meta


def read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json of a prepared folder says; of a folder of token files (`data.text.token_files`), the like of it.

    Raises `InputError` for a folder that is missing or was not prepared to the end, a damaged meta.json, another format
    version, and tokens of another tokenizer than GPT-2's that it says nothing of.
    """
    how = "prepare one with `python -m data.text.prepare SOURCE --out DIR`"
    if not os.path.isdir(folder):
        raise InputError(f"there is no folder {folder} of prepared data; {how}")
    if token_files.holds(folder):
        return {"version": VERSION, "tokenizer": RANKS_SHA256, **token_files.described(folder)}
    if not os.path.isfile(folder / "meta.json"):
        raise InputError(f"{folder} is no folder of prepared data (it has no meta.json); {how}")
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        version, unknown = meta["version"], meta["tokenizer"] != RANKS_SHA256 and "vocabulary" not in meta
        whole = version != VERSION or unknown or _whole(meta)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(f"{folder}/meta.json is damaged; {AGAIN}")
    if version != VERSION:
        raise InputError(f"{folder} has format version {version}, this program reads version {VERSION}; {AGAIN}")
    if unknown:
        raise InputError(f"{folder} was prepared with another tokenizer; {AGAIN}")
    return meta


def _whole(meta: dict[str, Any]) -> bool:
    """Whether the parts of a meta.json agree. Raises KeyError or TypeError where one is missing or of a wrong type."""
    splits = [meta["splits"][name] for name in SPLITS]
    vocabulary = meta.get("vocabulary", {"name": "", "size": VOCAB_SIZE, "eot": EOT})
    given = meta.get("given", {"source": "", "valid": None})
    if not isinstance(given["source"], str) or not isinstance(given["valid"], str | None):
        return False
    if not isinstance(vocabulary["name"], str) or not 0 <= vocabulary["eot"] < vocabulary["size"] <= LARGEST_VOCAB:
        return False
    return meta["checksum"] == _checksum(meta["splits"]) and all(
        split["documents"] > 0
        and split["tokens"] == sum(shard["tokens"] for shard in split["shards"]) > 0
        and all(isinstance(shard["name"], str) for shard in split["shards"])
        for split in splits
    )


def vocabulary_size(meta: dict[str, Any]) -> int:
    """The number below which the tokens of a prepared folder are, by its meta.json."""
    return int(meta["vocabulary"]["size"]) if "vocabulary" in meta else VOCAB_SIZE


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer that a prepared folder was made with. Raises `InputError` like `read_meta`, and where the files in
    the folder are another one's.
    """
    meta = read_meta(folder)
    if "vocabulary" not in meta:
        return gpt2()
    said = meta["vocabulary"]
    found = from_files(str(folder), read_files(folder), said["eot"])
    if not made_with(meta, found) or (found.vocab_size, found.eot) != (said["size"], said["eot"]):
        raise InputError(f"the tokenizer in {folder} is not the one that its tokens were made with; {AGAIN}")
    return found


def made_with(meta: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a prepared folder, by its meta.json, are those that `tokenizer` has for the text."""
    return meta["tokenizer"] in (tokenizer.sha256, tokenizer.special_sha256) and (
        vocabulary_size(meta) <= max(tokenizer.vocab_size, VOCAB_SIZE)
    )


def open_split(folder: Path, split: str) -> list[np.memmap]:
    """The shards of a split, in order, as `open_shard` gives them.

    Reads the headers only. Raises `InputError` like `read_meta` and `open_shard`, and for a shard that is not the one
    meta.json lists.
    """
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; the splits are {' and '.join(SPLITS)}")
    if token_files.holds(folder):
        return [file.open() for file in token_files.token_files(folder)[split]]
    meta = read_meta(folder)
    return [_open_listed(folder, shard, vocabulary_size(meta)) for shard in meta["splits"][split]["shards"]]


def _open_listed(folder: Path, shard: dict[str, Any], vocabulary: int) -> np.memmap:
    """`open_shard` of one that its folder lists. Raises `InputError` where the file is another one."""
    path = folder / shard["name"]
    tokens, sha256 = _open(path, vocabulary)
    if (len(tokens), sha256) != (shard["tokens"], shard["sha256"]):
        raise InputError(f"shard {path} is not the one that its folder lists; {AGAIN}")
    return tokens


def verify_folder(folder: Path) -> None:
    """Reads all tokens of a prepared folder. Raises `InputError` like `open_split` and `verify`."""
    if token_files.holds(folder):
        for files in token_files.token_files(folder).values():
            for file in files:
                file.verify()
        return
    vocabulary = vocabulary_size(read_meta(folder))
    for split in SPLITS:
        for shard in open_split(folder, split):
            verify(Path(shard.filename), vocabulary)  # type: ignore[arg-type]  # a memmap of a named file has its name


class Verification(Thread):
    """`verify_folder` beside what needs not wait for it: training begins while gigabytes are read.

    A run asks after every step what was found so far, and waits for the end before it keeps anything that it trained.
    """

    def __init__(self, folder: Path):
        super().__init__(daemon=True)  # a program that ends does not wait for it
        self._folder = folder
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            verify_folder(self._folder)
        except Exception as e:
            self._error = e

    @property
    def failed(self) -> bool:
        """Whether `verify_folder` has raised something."""
        return self._error is not None

    def check(self, timeout: float | None = 0) -> None:
        """Raises what `verify_folder` raised. Waits for its end at most `timeout` seconds, or until it comes (None)."""
        self.join(timeout)
        if self._error:
            raise self._error


def _checksum(splits: dict[str, dict[str, Any]]) -> str:
    shards = "".join(shard["sha256"] for split in SPLITS for shard in splits[split]["shards"])
    return hashlib.sha256(shards.encode()).hexdigest()


def main() -> None:
    """Verifies a prepared folder."""
    parser = ArgumentParser(prog="python -m data.text.shards", description="Verifies every token of a prepared folder.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder that `python -m data.text.prepare` wrote")
    folder = parser.parse_args().folder
    verify_folder(folder)
    # token files of others have no checksums
    state = "each of them one of GPT-2's" if token_files.holds(folder) else "whole"
    for name, split in read_meta(folder)["splits"].items():
        print(f"{name}: {split['tokens']:,} tokens in {len(split['shards'])} shard(s), {state}")


if __name__ == "__main__":
    run(main)
