"""Files of GPT-2's tokens as other programs write them, read in place.

nanoGPT   `train.bin` and `val.bin`: tokens, each a little-endian uint16, and nothing else
llm.c     `NAME_train_000001.bin`, ... and `NAME_val_000000.bin`, ..., or `NAME_train.bin` and `NAME_val.bin`: a header
          of 256 little-endian int32 (20240520, the version 1, the number of tokens, zeros), then tokens as above

These files have no checksums, and reading gigabytes to make some would hold up every start. What tells the data of a
run from other data is therefore a SHA-256 over all names, sizes and headers, and over blocks of tokens that lie evenly
apart, from the first token to the last. It changes with every file that is added, removed, renamed, cut or written
anew from another text. A few tokens changed between the blocks escape it.
"""

import hashlib
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import InputError
from data.text.tokenizer import VOCAB_SIZE

NAME = re.compile(r"(?:(.+)_)?(train|val)(?:_([0-9]+))?\.bin")
BARE = {"train.bin", "val.bin"}  # nanoGPT's
SPLIT = {"train": "train", "val": "valid"}  # theirs: ours

MAGIC = (20240520).to_bytes(4, "little")  # as uint16, the first two bytes are no token of GPT-2's
VERSION = 1
HEADER = 1024  # bytes
OTHERS = {
    (20240801).to_bytes(4, "little"): "uint32 tokens of Llama 3",
    b"GPT2TOKS": "a shard of prepared data",
}
BLOCK = 4096  # bytes of tokens
BLOCKS = 512  # of a split, but at least MIN_BLOCKS of each file
MIN_BLOCKS = 4
READ = 1 << 22  # bytes that are verified at a time
ENOUGH = 256  # tokens by which other kinds are told from GPT-2's


@dataclass(frozen=True)
class TokenFile:
    """Where the tokens of a file lie."""

    path: Path
    offset: int  # bytes
    count: int  # tokens

    def open(self) -> np.memmap:
        """The tokens, uint16 of shape (count,), mapped read-only."""
        # a Path would be resolved, and a file of the hub's cache be called by its hash
        return np.memmap(os.path.abspath(self.path), dtype="<u2", mode="r", offset=self.offset, shape=(self.count,))

    def verify(self) -> None:
        """Reads all tokens. Raises `InputError` for one that GPT-2 does not have, and where a part is missing."""
        with open(self.path, "rb") as f:  # not mapped: a page fault would hold up all threads
            f.seek(self.offset)
            for block in iter(partial(f.read, READ), b""):
                self._check(np.frombuffer(block, "<u2"))

    def _check(self, tokens: np.ndarray) -> None:
        """Raises `InputError` for a token that GPT-2 does not have, and for a gap where a download left zeros."""
        if len(tokens) >= ENOUGH and not tokens.any():
            raise InputError(f"{self.path} has zeros in place of tokens: a part is missing; copy or download it again")
        if (worst := int(tokens.max())) >= VOCAB_SIZE:
            raise InputError(
                f"{self.path} holds token {worst}, beyond GPT-2's vocabulary of {VOCAB_SIZE}: it is damaged, or was "
                "written with another tokenizer; write it again with GPT-2's, or pass its text as --data"
            )

    def sample(self, blocks: int) -> bytes:
        """So many blocks of tokens, evenly apart from the first to the last; the whole file where they would meet.

        Raises `InputError` where they show that the tokens are not GPT-2's.
        """
        size = 2 * self.count
        starts = range(0, size, BLOCK)
        if len(starts) > blocks:
            starts = [(size - BLOCK) // 2 * i // (blocks - 1) * 2 for i in range(blocks)]  # type: ignore[assignment]
        with open(self.path, "rb") as f:
            parts = [os.pread(f.fileno(), min(BLOCK, size - start), self.offset + start) for start in starts]
        for part in parts:
            self._check(np.frombuffer(part, "<u2"))
        return b"".join(parts)


def holds(folder: Path) -> bool:
    """Whether it is a folder of such files: some have names like theirs, and it is not one that we prepared."""
    return not (folder / "meta.json").exists() and any(NAME.fullmatch(path.name) for path in folder.glob("*.bin"))


def token_files(folder: Path) -> dict[str, list[TokenFile]]:
    """The files of each split, "train" and "valid", in order. Reads their headers only.

    Raises `InputError` where a split is missing, for files of several texts, for a vocabulary that is not GPT-2's, and
    for a file that is truncated or of another kind.
    """
    if (folder / "meta.pkl").exists():
        raise InputError(
            f"{folder} has a vocabulary of its own (meta.pkl), so its tokens are not GPT-2's; "
            "train on its text instead: `--data TEXT.txt`"
        )
    found = defaultdict[str, list[tuple[int, Path]]](list)
    texts = set[str]()
    for path in folder.glob("*.bin"):
        if match := NAME.fullmatch(path.name):
            found[SPLIT[match[2]]].append((int(match[3] or 0), path))
            texts.add(match[1] or "")
    if len(texts) > 1:
        names = ", ".join(sorted(text or "train.bin" for text in texts))
        raise InputError(f"{folder} holds the tokens of several texts ({names}); give each a folder of its own")
    for theirs, ours in SPLIT.items():
        if not found[ours]:
            name = "_".join([*filter(None, texts), theirs])
            raise InputError(
                f"{folder} has no {'training' if ours == 'train' else 'validation'} tokens: {name}.bin or "
                f"{name}_000000.bin is missing; add it, or give a file of the other split that name"
            )
    return {split: [_examined(path) for _, path in sorted(found[split])] for split in SPLIT.values()}


def described(folder: Path) -> dict[str, Any]:
    """The splits of a folder, and what tells it from others (`checksum`), as meta.json has them of prepared data.

    Raises `InputError` as `token_files` does, and where the samples show that the tokens are not GPT-2's.
    """
    identity = hashlib.sha256()
    splits = {}
    for split, files in token_files(folder).items():
        samples = []
        for file in files:
            identity.update(f"{split} {file.path.name} {file.count}\n".encode())
            with open(file.path, "rb") as f:
                identity.update(f.read(file.offset))
            samples.append(file.sample(max(MIN_BLOCKS, BLOCKS // len(files))))
            identity.update(samples[-1])
        _refuse_other_kinds(files[0].path, np.frombuffer(b"".join(samples), "<u2"))
        splits[split] = {
            "source": str(folder),
            "tokens": sum(file.count for file in files),
            "shards": [{"name": file.path.name, "tokens": file.count} for file in files],
        }
    return {"checksum": identity.hexdigest(), "splits": splits}


def _refuse_other_kinds(path: Path, tokens: np.ndarray) -> None:
    """Raises `InputError` for tokens that are below GPT-2's vocabulary and yet cannot be those of a text."""
    if len(tokens) < ENOUGH:
        return
    kind = None
    if not tokens[::2].any() or not tokens[1::2].any():
        kind = "numbers of 32 bits or more"
    elif tokens.max() < 256:
        kind = "characters or bytes"
    if kind:
        raise InputError(f"{path} holds {kind}, not GPT-2's tokens as uint16; train on its text: `--data TEXT.txt`")


def _examined(path: Path) -> TokenFile:
    """A file, by its header and its size. Raises `InputError` as `token_files` does."""
    if not path.is_file():
        raise InputError(f"{path} is missing (it is a link to nothing, or no file); put it back or get it again")
    size = path.stat().st_size
    with open(path, "rb") as f:
        header = f.read(HEADER)
    for beginning, kind in OTHERS.items():
        if header.startswith(beginning):
            raise InputError(f"{path} holds {kind}, not GPT-2's tokens; pass its text as --data")
    if not header.startswith(MAGIC):
        if path.name not in BARE:
            raise InputError(
                f"{path} is not of llm.c's form (it does not begin with {int.from_bytes(MAGIC, 'little')}); "
                "files without a header are named train.bin and val.bin"
            )
        if not size or size % 2:
            fault = "ends within a token" if size else "is empty"
            raise InputError(f"{path} {fault}; copy or write it again")
        return TokenFile(path, 0, size // 2)
    if len(header) < HEADER:
        raise InputError(f"{path} is truncated within its header; copy or download it again")
    _, version, count = (int(number) for number in np.frombuffer(header[:12], "<i4"))
    if version != VERSION:
        raise InputError(f"{path} has version {version} of llm.c's form, not {VERSION}; pass its text as --data")
    expected = HEADER + 2 * count
    if count < 1 or size != expected:
        fault = "is truncated" if size < expected else "has a wrong size"
        raise InputError(
            f"{path} {fault}: {size:,} bytes, its header's {count:,} tokens need {expected:,}; "
            "copy or download it again"
        )
    return TokenFile(path, HEADER, count)
