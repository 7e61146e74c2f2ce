"""Reading a file of text: its documents, a few at a time, in constant memory, and where reading may go on.

.txt             UTF-8 text; `<|endoftext|>` ends a document wherever it stands
.txt.gz, .zst    the same, packed by gzip or Zstandard; so are the formats of `data.text.records`
"""

import codecs
import gzip
import io
import re
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from data.cli import InputError
from data.text.tokenizer import EOT_TEXT

BLOCK = 1 << 16  # bytes read at a time; strings of a MiB would fragment the heap, and memory would grow
PACKED_BLOCK = 1 << 11  # bytes unpacked at a time: those of Zstandard may hold 2^15 times as many
MANY_RECORDS = 10_000  # read at a time, where they have little or no text
LONGEST_PIECE = 1 << 16  # characters: some 16,000 tokens, many times the context of any GPT-2

ERRORS = ("strict", "replace")
SURROGATE = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Reading:
    """How files are read: the `field` of a record that is its text, and whether what is no UTF-8 is an error."""

    field: str = "text"
    errors: str = "strict"

    @property
    def decoding(self) -> str:
        """Python's name for it. A bad byte becomes a surrogate, which `repaired` replaces, so that none is lost."""
        return "strict" if self.errors == "strict" else "surrogateescape"


AS_GIVEN = Reading()


class Piece(NamedTuple):
    """A document, or a piece of a long one: the pieces of a document in a row are its text, the last one `ends` it."""

    text: str
    ends: bool = True


class Place(NamedTuple):
    """Where reading a source goes on: at `offset` (bytes of text, or rows) of its file number `file`."""

    file: int = 0
    offset: int = 0
    inside: bool = False  # within a document
    done: int = 0  # bytes of the files, as they are stored, that lie before; for progress bars


class Chunk(NamedTuple):
    """Some pieces, the place where those after them begin, and how many of these came before it in this chunk:

    marker      `<|endoftext|>` that ended a document
    spelled     `<|endoftext|>` that stayed text, in a record
    record      records, and `skipped`: those without text
    replaced    bytes or lone surrogates that are no text, replaced by U+FFFD
    """

    pieces: list[Piece]
    end: Place
    counts: Counter[str]


Chunks = Iterator[Chunk]
Reader = Callable[[Path, Place, Reading], Chunks]


def extra(module: str, name: str, path: str | Path) -> ModuleType:
    """The package `module`, which only the optional dependencies `name` bring. Raises `InputError` without it."""
    try:
        return import_module(module)
    except ImportError:
        raise InputError(
            f"reading {path} needs {module}; install it with `{sys.executable} -m pip install {module}` "
            f"(or with the project: `pip install '.[{name}]'`)"
        ) from None


@contextmanager
def opened(path: Path, start: int = 0) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file as it is stored, and its text, unpacked, from byte `start` of it on.

    Raises `InputError` where a packed file is damaged or cut short; also while the text is read.
    """
    faults: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    with open(path, "rb") as stored:
        text: Any = stored
        if path.suffix.lower() == ".gz":
            text = gzip.GzipFile(fileobj=stored)
        elif path.suffix.lower() == ".zst":
            zstandard = extra("zstandard", "zstd", path)
            faults += (zstandard.ZstdError,)
            text = io.BufferedReader(_Frames(stored, zstandard.ZstdDecompressor()), BLOCK)
        try:
            if not start:
                refuse_utf16(path, text.peek(BLOCK)[:BLOCK])
            if text is stored:
                text.seek(start)
            while text is not stored and start and (skipped := text.read(min(start, BLOCK))):
                start -= len(skipped)
            yield stored, text
        except faults as e:
            reason = str(e).rstrip(".") or type(e).__name__
            raise InputError(f"{path} is damaged or cut short ({reason}); fetch it again, or pack it again") from None


def refuse_utf16(path: Path, beginning: bytes) -> None:
    """Raises `InputError` for a text that begins as UTF-16 does: much of it would pass for UTF-8 with NUL between."""
    marked = beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked or 4 * beginning.count(0) > len(beginning):
        utf8 = f"iconv -f UTF-16 -t UTF-8 {shlex.quote(str(path))} > utf8{path.suffix}"
        raise InputError(f"{path} is UTF-16, or no text, as its beginning shows; try `{utf8}`")


class _Frames(io.RawIOBase):
    """What the frames of a Zstandard file unpack to. The library's own reader takes one that is cut short for whole."""

    def __init__(self, stored: IO[bytes], decompressor: Any):
        self._stored = stored
        self._decompressor = decompressor
        self._frame: Any = None  # the one that was begun
        self._packed = self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            packed = self._packed or self._stored.read(PACKED_BLOCK)
            if not packed and self._frame:
                raise EOFError("it ends within a frame")
            if not packed:
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._text = self._frame.decompress(packed)
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size


def read_txt(path: Path, start: Place, how: Reading) -> Chunks:
    """Documents of a text file; CRLF and CR read as LF."""
    spare = len(EOT_TEXT) - 1  # characters at the end of a block may be the first part of a marker
    decoder = codecs.getincrementaldecoder("utf-8" if start.offset else "utf-8-sig")(how.decoding)
    rest, inside, read = "", start.inside, start.offset
    with opened(path, start.offset) as (stored, text):
        while True:
            block = text.read(BLOCK)
            read += len(block)
            try:
                rest += decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise not_utf8(path, read - len(e.object), e) from None
            *whole, rest = rest.split(EOT_TEXT)
            counts = Counter(marker=len(whole))
            if not block:
                whole, rest = [*whole, rest], ""
            pieces = []
            for document in whole:
                pieces += ended(document, inside)
                inside = False
            rest = rest if inside else rest.lstrip()
            if len(rest) > LONGEST_PIECE + spare:
                *begun, rest = cut(rest, spare)
                pieces += [Piece(piece, ends=False) for piece in begun]
                inside = True
            undecoded, _ = decoder.getstate()
            offset = read - len(undecoded) - len(rest.encode("utf-8", how.decoding))
            if any("\r" in piece.text for piece in pieces):
                pieces = [Piece(text.replace("\r\n", "\n").replace("\r", "\n"), ends) for text, ends in pieces]
            if how.errors == "replace":
                pieces = [Piece(repaired(piece.text, counts), piece.ends) for piece in pieces]
            yield Chunk(pieces, Place(0, offset, inside, stored.tell() if text is not stored else offset), counts)
            if not block:
                return


def ended(document: str, inside: bool = False) -> list[Piece]:
    """A document without surrounding white space, or what is left of one; none where there is nothing else in it."""
    if len(document) <= LONGEST_PIECE:
        document = document.rstrip() if inside else document.strip()
        return [Piece(document)] if document or inside else []
    *begun, last = cut(document if inside else document.lstrip())
    pieces = [Piece(piece, ends=False) for piece in begun]
    return pieces + ended(last, inside or bool(begun))


def cut(document: str, spare: int = 0) -> list[str]:
    """A document in pieces of at most `LONGEST_PIECE` characters, the last of up to `spare` more.

    It is cut before a line end, else before another space, that follows a word: there, tokens always end as well. A
    longer word is cut at any character, and of a longer run of white space the beginning is left out.
    """
    pieces, start = [], 0
    while len(document) - start > LONGEST_PIECE + spare:
        end = start + LONGEST_PIECE
        piece = document[start:end]
        for space in "\n ":
            place = document.rfind(space, start + 1, end + 1)
            if place > 0 and (kept := document[start:place].rstrip()):
                piece = kept
                break
        if not piece.isspace():
            pieces.append(piece)
        start += len(piece)
    return [*pieces, document[start:]]


def repaired(text: str, counts: Counter[str]) -> str:
    """`text` with U+FFFD in place of every lone surrogate; `counts` tells how many there were."""
    if text.isascii():
        return text
    text, count = SURROGATE.subn(REPLACEMENT, text)
    counts["replaced"] += count
    return text


def not_utf8(path: Path, start: int, error: UnicodeDecodeError) -> InputError:
    """`error` met in bytes that begin at offset `start` of the file."""
    return InputError(
        f"{path} is not UTF-8 at byte {start + error.start:,} ({error.reason}); "
        "convert it to UTF-8 first, or pass --errors replace"
    )


def told(counts: Counter[str], how: Reading, ends_at_marker: bool = False) -> list[str]:
    """What a user has to know of what was read. ends_at_marker: whether `<|endoftext|>` in a record is a token too."""
    told = []
    if "marker" in counts:
        ends = ", each the end of a document" if counts["marker"] else ""
        told.append(f"{counts['marker']:,} {EOT_TEXT} markers{ends}")
    if counts["spelled"]:
        became = "each became the token that ends a document" if ends_at_marker else "where it is text and ends nothing"
        told.append(f"{counts['spelled']:,} {EOT_TEXT} in records, {became}")
    if counts["skipped"]:
        told.append(f"{counts['skipped']:,} of {counts['record']:,} records have no text in `{how.field}`: left out")
    if counts["replaced"]:
        told.append(f"{counts['replaced']:,} bytes or lone surrogates that are no text, replaced by U+FFFD")
    return told


def refuse_textless(name: str, counts: Counter[str], how: Reading, least: int = 1) -> None:
    """Raises `InputError` where a quarter of the records, of at least so many, have none: another field was meant."""
    if counts["record"] >= least and 4 * counts["skipped"] > counts["record"]:
        raise InputError(
            f"{counts['skipped']:,} of {counts['record']:,} records of {name} have no text in `{how.field}`; "
            "name the field that holds it with --field, or remove these records"
        )
