"""Values of a JSON file one after the other, in bounded memory: Python's parser takes whole texts only."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data.cli import InputError
from data.text.formats import BLOCK, Reading, not_utf8

LONGEST = 64 << 20  # bytes of a value, which has to be parsed whole
SPACE = " \t\r\n"


class Values:
    """Values one after the other in a file of JSON, of which only the one that is parsed is in memory."""

    def __init__(self, path: Path, text: IO[bytes], start: int, how: Reading):
        self._path, self._text, self._read, self._how = path, text, start, how
        self._decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")(how.decoding)
        self._rest = ""
        self._parse = json.JSONDecoder().raw_decode

    @property
    def offset(self) -> int:
        """The byte where what is to be parsed begins."""
        undecoded, _ = self._decoder.getstate()
        return self._read - len(undecoded) - len(self._rest.encode("utf-8", self._how.decoding))

    def next(self) -> str:
        """The next character that is no space; "" at the end."""
        while not (rest := self._rest.lstrip(SPACE)) and self._more():
            pass
        self._rest = rest
        return rest[:1]

    def skip(self) -> None:
        self._rest = self._rest[1:]

    def value(self) -> Any:
        """The value that begins here. Raises `InputError` where there is none."""
        while True:
            try:
                value, end = self._parse(self._rest)
            except RecursionError:
                raise self.fault() from None
            except ValueError:
                if len(self._rest) > LONGEST or not self._more():
                    raise self.fault() from None
                continue
            self._rest = self._rest[end:]
            return value

    def fault(self) -> InputError:
        return InputError(
            f"{self._path} is not valid JSON from byte {self.offset:,} on (or a value there is longer than "
            f"{LONGEST >> 20} MiB); mend it, or convert it to .jsonl"
        )

    def _more(self) -> bool:
        """Reads as much again, so that a long value is tried a few times only; False at the end."""
        block = self._text.read(max(BLOCK, len(self._rest)))
        self._read += len(block)
        try:
            self._rest += self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            raise not_utf8(self._path, self._read - len(e.object), e) from None
        return bool(block)


def every(values: Values, listed: bool, first: bool) -> Iterator[Any]:
    """All that there are, up to the bracket that closes a list."""
    if listed and first and values.next():
        values.skip()
    while values.next() != ("]" if listed else ""):
        if listed and not first:
            if values.next() != ",":
                raise values.fault()
            values.skip()
            values.next()
        first = False
        yield values.value()
