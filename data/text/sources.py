"""Where text comes from: a SOURCE names a stream of documents, read in constant memory.

stories          a small language written by `data.text.stories`: no download, the default
tinystories      TinyStoriesV2-GPT4 from the Hugging Face hub (Eldan & Li 2023, arXiv 2305.07759)
tinystories-v1   the first TinyStories, from the same place
FILE.txt         UTF-8 text; a line that ends with `<|endoftext|>` ends a document
FILE.jsonl       one JSON object a line, its document in the string field `text`
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError

from data.cli import InputError
from data.text import stories
from data.text.tokenizer import EOT_TEXT

ACCEPTED = "`stories`, `tinystories`, `tinystories-v1`, or a file that ends in .txt or .jsonl"

STORIES = {"train": (0, 8_000_000), "valid": (1, 400_000)}  # split: seed, characters (3.65 to a token)

HUB_REPO = "roneneldan/TinyStories"
HUB_FILES = {
    "tinystories": {"train": "TinyStoriesV2-GPT4-train.txt", "valid": "TinyStoriesV2-GPT4-valid.txt"},
    "tinystories-v1": {"train": "TinyStories-train.txt", "valid": "TinyStories-valid.txt"},
}
HUB_TIMEOUT = 10  # seconds

BLOCK = 1 << 16  # bytes read at a time; strings of a MiB would fragment the heap, and memory would grow
LONGEST_DOCUMENT = 1 << 16  # characters: some 16,000 tokens, many times the context of any GPT-2
LONGEST_LINE = 64 << 20  # bytes of one JSON line, which has to be parsed whole

END = re.compile(re.escape(EOT_TEXT) + r"[\r\n]")  # of a document; the LF of a CRLF is white space before the next

Documents = Iterator[tuple[list[str], int]]
"""Some documents, and the byte where those after them begin."""


@dataclass(frozen=True)
class Stream:
    """One readable stream of documents: `name` for people, `size` in bytes of text, `identity` of its content."""

    name: str
    size: int
    identity: str
    read: Callable[[int], Documents]

    def documents(self, start: int = 0) -> Documents:
        """The documents in order, without surrounding white space, empty ones left out; a few at a time.

        With each few comes the byte where the next begin: from there as `start`, the same documents follow.

        A document longer than `LONGEST_DOCUMENT` characters comes as several, cut after the last line end, else the
        last space, that fits (else in mid-word), so that memory stays bounded whatever the file. Raises `InputError`
        for bytes that are no UTF-8, for a bad JSON line, and at the end where there was no document at all.
        """
        empty = start == 0
        for texts, end in self.read(start):
            documents = [document for text in texts if (document := text.strip())]
            empty = empty and not documents
            yield documents, end
        if empty:
            raise InputError(f"{self.name} holds no document; give a file with some text in it")


def stream(source: str, split: str) -> Stream | None:
    """The `split` ("train" or "valid") of `source`; None for the "valid" of a local file, which has none of its own.

    Raises `InputError` for an unknown or unreadable source, and where the hub cannot be reached.
    """
    if source == "stories":
        seed, size = STORIES[split]
        generator = Path(stories.__file__).read_bytes()  # a changed generator writes other stories
        identity = f"{seed} {size} {hashlib.sha256(generator).hexdigest()}"
        return Stream(f"stories (seed {seed})", size, identity, partial(_generated, seed, size))
    if source in HUB_FILES:
        path = download(HUB_REPO, HUB_FILES[source][split])
        return Stream(f"{HUB_REPO}/{path.name}", path.stat().st_size, _identity(path), partial(_txt, path))

    readers = {".txt": _txt, ".jsonl": _jsonl}
    path = Path(source)
    reader = readers.get(path.suffix.lower())
    if os.path.isdir(path):
        raise InputError(f"{source} is a folder, not a source of text; the sources are {ACCEPTED}")
    if reader is None:
        raise InputError(f"{source!r} is not a source of text; the sources are {ACCEPTED}")
    if not os.path.isfile(path):
        raise InputError(f"there is no file {source}; the sources are {ACCEPTED}")
    if split == "valid":
        return None
    return Stream(source, path.stat().st_size, _identity(path), partial(reader, path))


def _identity(path: Path) -> str:
    """What tells a file from any other, and from itself before it was changed."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _generated(seed: int, size: int, start: int) -> Documents:
    """Stories until `size` characters are reached (ASCII: as many bytes); the last one is whole."""
    tales = stories.stories(seed)
    end = 0
    while end < size:
        story = next(tales)
        end = min(end + len(story), size)  # the progress ends at `size`, not beyond
        if end > start:
            yield [story], end


def download(repo: str, name: str) -> Path:
    """The local copy of a file of a dataset, fetched when the cache lacks it; a broken download resumes."""
    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        # One question with a short wait first: without an answer, `hf_hub_download` goes on asking for minutes.
        get_hf_file_metadata(hf_hub_url(repo, name, repo_type="dataset"), timeout=HUB_TIMEOUT)
        return Path(hf_hub_download(repo, name, repo_type="dataset"))
    except Exception as e:  # the hub client passes on the errors of whichever HTTP and transfer libraries it has
        if isinstance(e, OSError) and e.errno:  # of this machine, such as a full disk
            raise
        reason = str(e).strip().partition("\n")[0].rstrip(".") or type(e).__name__
        raise InputError(
            f"the Hugging Face hub cannot be reached for {repo}/{name} ({reason}); "
            f"try again, or pass a local .txt or .jsonl file, or `stories`, which needs no download"
        ) from None


def _txt(path: Path, start: int) -> Documents:
    """Documents of a text file; CRLF and CR read as LF."""
    spare = len(EOT_TEXT) + 1  # characters at the end of a block may be the first half of an `END`
    decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()
    rest = ""
    with open(path, "rb") as f:
        f.seek(start)
        while True:
            block = f.read(BLOCK)
            try:
                rest += decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise _not_utf8(path, f.tell(), e) from None
            *whole, rest = END.split(rest)
            texts = [piece for text in whole for piece in (_pieces(text) if len(text) > LONGEST_DOCUMENT else (text,))]
            if block:
                *pieces, rest = _pieces(rest, spare)
            else:
                pieces, rest = list(_pieces(rest.removesuffix(EOT_TEXT))), ""
            undecoded, _ = decoder.getstate()
            end = f.tell() - len(undecoded) - len(rest.encode())
            texts += pieces
            if any("\r" in text for text in texts):
                texts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
            yield texts, end
            if not block:
                return


def _pieces(document: str, spare: int = 0) -> Iterator[str]:
    """`document` in pieces of at most `LONGEST_DOCUMENT` characters, the last of up to `spare` more."""
    while len(document) > LONGEST_DOCUMENT + spare:
        line_end = document.rfind("\n", 0, LONGEST_DOCUMENT)
        cut = 1 + (line_end if line_end >= 0 else document.rfind(" ", 0, LONGEST_DOCUMENT)) or LONGEST_DOCUMENT
        yield document[:cut]
        document = document[cut:]
    yield document


def _jsonl(path: Path, start: int) -> Documents:
    """The `text` of every line; blank lines are skipped."""
    end = start
    with open(path, "rb") as f:
        f.seek(start)
        for line in iter(partial(f.readline, LONGEST_LINE + 1), b""):
            end += len(line)
            try:
                text = _text(line)
            except UnicodeDecodeError as e:
                raise _not_utf8(path, end, e) from None
            except InputError as e:
                raise InputError(f"line {_line_number(path, end - len(line))} of {path} {e}") from None
            yield list(_pieces(text)), end


def _text(line: bytes) -> str:
    """The `text` of a JSON line, "" for a blank one. Raises `InputError` with what is wrong with it."""
    if len(line) > LONGEST_LINE:
        raise InputError(f"is longer than {LONGEST_LINE >> 20} MiB; split its text over several lines")
    decoded = line.decode("utf-8-sig")
    try:
        text = json.loads(decoded)["text"] if decoded.strip() else ""
        text.encode()  # JSON can spell what no UTF-8 can
    except UnicodeEncodeError:
        raise InputError("has half a surrogate pair in its text; repair or remove the line") from None
    except (KeyError, TypeError, AttributeError):
        raise InputError('has no string field `text`; every line must read {"text": "..."}') from None
    except (ValueError, RecursionError):
        raise InputError('is not valid JSON; every line must read {"text": "..."}') from None
    return text


def _line_number(path: Path, offset: int) -> int:
    """The number of the line that begins at byte `offset`: counted when there is something to say about it only."""
    number = 1
    with open(path, "rb") as f:
        while offset:
            block = f.read(min(offset, BLOCK))
            number += block.count(b"\n")
            offset -= len(block)
    return number


def _not_utf8(path: Path, read: int, error: UnicodeDecodeError) -> InputError:
    """`error` met in bytes that ended at offset `read` of the file."""
    offset = read - len(error.object) + error.start
    return InputError(f"{path} is not UTF-8 at byte {offset:,} ({error.reason}); convert it to UTF-8 first")
