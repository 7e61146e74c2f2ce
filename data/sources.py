"""Where text comes from: a SOURCE names a stream of documents, read in constant memory.

stories          a small language written by `data.stories`: no download, the default
tinystories      TinyStoriesV2-GPT4 from the Hugging Face hub (Eldan & Li 2023, arXiv 2305.07759)
tinystories-v1   the first TinyStories, from the same place
FILE.txt         UTF-8 text; a line that ends with `<|endoftext|>` ends a document
FILE.jsonl       one JSON object a line, its document in the string field `text`
"""

import codecs
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError

from data.cli import InputError
from data.stories import stories
from data.tokenizer import EOT_TEXT

ACCEPTED = "`stories`, `tinystories`, `tinystories-v1`, or a file that ends in .txt or .jsonl"

STORIES = {"train": (0, 8_000_000), "valid": (1, 400_000)}  # split: seed, characters; 3.65 to a token

HUB_REPO = "roneneldan/TinyStories"
HUB_FILES = {
    "tinystories": {"train": "TinyStoriesV2-GPT4-train.txt", "valid": "TinyStoriesV2-GPT4-valid.txt"},
    "tinystories-v1": {"train": "TinyStories-train.txt", "valid": "TinyStories-valid.txt"},
}
HUB_TIMEOUT = 10  # seconds

BLOCK = 1 << 16  # bytes read at a time; strings of a MiB would leave holes in the heap, and it would grow
LONGEST_DOCUMENT = 1 << 16  # characters: some 16,000 tokens, many times the context of any GPT-2
LONGEST_LINE = 64 << 20  # bytes of one JSON line, which has to be parsed whole

Advance = Callable[[int], object]
"""Called with the number of bytes consumed since the last call."""


@dataclass(frozen=True)
class Stream:
    """One readable stream of documents: `name` for people, `size` in bytes of text."""

    name: str
    size: int
    read: Callable[[Advance], Iterator[str]]

    def documents(self, advance: Advance = lambda n: None) -> Iterator[str]:
        """The documents in order, without surrounding white space; empty ones are left out.

        A document longer than `LONGEST_DOCUMENT` characters comes as several, cut after the last line end, else the
        last space, that fits (else in mid-word), so that memory stays bounded whatever the file. Raises `InputError`
        for bytes that are no UTF-8, for a bad JSON line, and at the end where there was no document at all.
        """
        empty = True
        for text in self.read(advance):
            if document := text.strip():
                empty = False
                yield document
        if empty:
            raise InputError(f"{self.name} holds no document; give a file with some text in it")


def stream(source: str, split: str) -> Stream | None:
    """The `split` ("train" or "valid") of `source`; None for the "valid" of a local file, which has none of its own.

    Raises `InputError` for an unknown or unreadable source, and where the hub cannot be reached.
    """
    if source == "stories":
        seed, size = STORIES[split]
        return Stream(f"stories (seed {seed})", size, partial(_generated, seed, size))
    if source in HUB_FILES:
        path = _download(HUB_FILES[source][split])
        return Stream(f"{HUB_REPO}/{path.name}", path.stat().st_size, partial(_txt, path))

    readers = {".txt": _txt, ".jsonl": _jsonl}
    path = Path(source)
    reader = readers.get(path.suffix.lower())
    if os.path.isdir(path):
        raise InputError(f"{source} is a folder, not a source of text; the sources are {ACCEPTED}")
    if reader is None:
        raise InputError(f"{source!r} is not a source of text; the sources are {ACCEPTED}")
    if not os.path.isfile(path):
        raise InputError(f"there is no file {source}; the sources are {ACCEPTED}")
    return Stream(source, path.stat().st_size, partial(reader, path)) if split == "train" else None


def _generated(seed: int, size: int, advance: Advance) -> Iterator[str]:
    """Stories until `size` characters are reached (ASCII: as many bytes); the last one is whole."""
    written = 0
    for story in stories(seed):
        step = min(len(story), size - written)  # the progress ends at `size`, not beyond
        written += step
        advance(step)
        yield story
        if written == size:
            return


def _download(name: str) -> Path:
    """The local copy of a file of `HUB_REPO`, fetched when the cache lacks it; a broken download resumes."""
    try:
        return Path(hf_hub_download(HUB_REPO, name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        # One question with a short wait first: without an answer, `hf_hub_download` goes on asking for minutes.
        get_hf_file_metadata(hf_hub_url(HUB_REPO, name, repo_type="dataset"), timeout=HUB_TIMEOUT)
        return Path(hf_hub_download(HUB_REPO, name, repo_type="dataset"))
    except Exception as e:  # the hub client passes on the errors of whichever HTTP and transfer libraries it has
        if isinstance(e, OSError) and e.errno:  # ours, such as a full disk
            raise
        reason = str(e).strip().partition("\n")[0].rstrip(".") or type(e).__name__
        raise InputError(
            f"the Hugging Face hub cannot be reached for {HUB_REPO}/{name} ({reason}); "
            f"try again, or pass a local .txt or .jsonl file, or `stories`, which needs no download"
        ) from None


def _txt(path: Path, advance: Advance) -> Iterator[str]:
    """Documents of a text file; CRLF reads as LF."""
    end = EOT_TEXT + "\n"
    rest = ""
    for text in _decoded(path, advance):
        *whole, rest = (rest + text).split(end)
        for document in whole:
            yield from _pieces(document)
        *pieces, rest = _pieces(rest, spare=len(end))  # spare: the last characters may be the first half of an `end`
        yield from pieces
    yield from _pieces(rest.removesuffix(EOT_TEXT))


def _decoded(path: Path, advance: Advance) -> Iterator[str]:
    """The text of a UTF-8 file in blocks, with "\\n" for every line end and without a byte order mark."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    with open(path, "rb") as f:
        while True:
            block = f.read(BLOCK)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise _not_utf8(path, f.tell(), e) from None
            if not block:
                return
            advance(len(block))


def _pieces(document: str, spare: int = 0) -> Iterator[str]:
    """`document` in pieces of at most `LONGEST_DOCUMENT` characters, the last of up to `spare` more."""
    while len(document) > LONGEST_DOCUMENT + spare:
        line_end = document.rfind("\n", 0, LONGEST_DOCUMENT)
        cut = 1 + (line_end if line_end >= 0 else document.rfind(" ", 0, LONGEST_DOCUMENT)) or LONGEST_DOCUMENT
        yield document[:cut]
        document = document[cut:]
    yield document


def _jsonl(path: Path, advance: Advance) -> Iterator[str]:
    """The `text` of every line; blank lines are skipped."""
    with open(path, "rb") as f:
        for number, line in enumerate(iter(partial(f.readline, LONGEST_LINE + 1), b""), start=1):
            where = f"line {number} of {path}"
            if len(line) > LONGEST_LINE:
                raise InputError(f"{where} is longer than {LONGEST_LINE >> 20} MiB; split its text over several lines")
            try:
                text = line.decode("utf-8-sig")
                document = json.loads(text)["text"] if text.strip() else ""
                document.encode()  # JSON can spell what no UTF-8 can
            except UnicodeDecodeError as e:
                raise _not_utf8(path, f.tell(), e) from None
            except UnicodeEncodeError:
                raise InputError(f"{where} has half a surrogate pair in its text; repair or remove the line") from None
            except (KeyError, TypeError, AttributeError):
                raise InputError(
                    f'{where} has no string field `text`; every line must read {{"text": "..."}}'
                ) from None
            except (ValueError, RecursionError):
                raise InputError(f'{where} is not valid JSON; every line must read {{"text": "..."}}') from None
            yield from _pieces(document)
            advance(len(line))


def _not_utf8(path: Path, read: int, error: UnicodeDecodeError) -> InputError:
    """`error` met in bytes that ended at offset `read` of the file."""
    offset = read - len(error.object) + error.start
    return InputError(f"{path} is not UTF-8 at byte {offset:,} ({error.reason}); convert it to UTF-8 first")
