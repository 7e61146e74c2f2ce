"""Reading a file of records, each with its document in one field (`--field`, by default `text`).

.jsonl      a JSON object a line; blank lines are skipped
.json       a list of JSON objects, or of strings; or objects one after the other
.csv        a line of column names, then the records (RFC 4180)
.parquet    a column of strings; needs pyarrow

A record whose field is missing, null or blank is skipped and counted. Where no record at the beginning of a file has
the field at all, the file is refused, and its fields are named.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from data.cli import InputError
from data.text.formats import (
    BLOCK,
    MANY_RECORDS,
    Chunk,
    Chunks,
    Piece,
    Place,
    Reader,
    Reading,
    ended,
    extra,
    not_utf8,
    opened,
    read_txt,
    repaired,
)
from data.text.json_values import LONGEST, Values, every
from data.text.tokenizer import EOT_TEXT

LONGEST_RECORD = LONGEST
FIRST = 100  # records, one of which has to have the field
ROWS = 256  # of a parquet file, read at a time
KINDS = {int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


class _Gathered:
    """The documents of records, until they are worth a chunk."""

    def __init__(self, path: Path, start: Place, how: Reading):
        self._path, self._how = path, how
        self._found = start.offset > 0  # the field, in any record
        self._names: dict[str, None] = {}  # of fields
        self._begin()

    def _begin(self) -> None:
        self._pieces: list[Piece] = []
        self._counts: Counter[str] = Counter()
        self._size = 0

    def add(self, record: Any) -> None:
        """Takes the text of a record. Raises `InputError` with what is wrong with it."""
        field, counts = self._how.field, self._counts
        if not isinstance(record, dict):
            raise InputError(f"has no string field `{field}`: it is no object; a record must read {self._example()}")
        counts["record"] += 1
        if not self._found:
            self._found = field in record
            self._names |= dict.fromkeys(record)
            if not self._found and counts["record"] == FIRST:
                raise InputError(f"has no field `{field}`, nor has any before it; {_there(self._names)}")
        text = record.get(field)
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise InputError(f"has no string field `{field}`, but {KINDS[type(text)]}; name another with --field")
        if self._how.errors == "replace":
            text = repaired(text, counts)
        elif not text.isascii():
            try:
                text.encode()  # JSON can spell what no UTF-8 can
            except UnicodeEncodeError:
                raise InputError(
                    "has half a surrogate pair in its text; repair or remove it, or pass --errors replace"
                ) from None
        pieces = ended(text)
        counts["skipped"] += not pieces
        counts["spelled"] += text.count(EOT_TEXT)
        self._pieces += pieces
        self._size += len(text)

    def add_json(self, text: str) -> None:
        """Takes the text of the record that `text` spells."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            raise InputError(f"is not valid JSON; every line must read {self._example()}") from None
        self.add(record)

    def _example(self) -> str:
        return f'{{{json.dumps(self._how.field)}: "..."}}'

    @property
    def full(self) -> bool:
        return self._size >= BLOCK or self._counts["record"] >= MANY_RECORDS

    def chunk(self, offset: int, done: int, last: bool = False) -> Chunk:
        """What came since the last chunk. Raises `InputError` where no record to the `last` had the field."""
        if last and not self._found and self._counts["record"]:
            raise no_field(self._path, self._how.field, self._names)
        chunk = Chunk(self._pieces, Place(0, offset, False, done), +self._counts)
        self._begin()
        return chunk


def no_field(path: Path, field: str, names: Iterable[str]) -> InputError:
    """The records of a file have fields of these `names`, but not the one that is asked for."""
    return InputError(f"{path} has no field `{field}`; {_there(names)}")


def _there(names: Iterable[str]) -> str:
    names = list(names)
    if len(names) == 1 and set(names[0]) & {";", "\t"}:
        return f"there is one column, {names[0][:40]!r}: separate columns by commas"
    shown = ["".join(c if c.isprintable() else "?" for c in name[:40]) for name in names[:20]]
    return f"there is {', '.join(shown) or 'none'}: name the one that holds the text with --field"


def read_jsonl(path: Path, start: Place, how: Reading) -> Chunks:
    """The field of the object on every line."""
    gathered = _Gathered(path, start, how)
    end = start.offset
    with opened(path, end) as (stored, text):
        for line in iter(partial(text.readline, LONGEST_RECORD + 1), b""):
            _refuse_long(line, path, end)
            try:
                decoded = line.decode("utf-8-sig", how.decoding)
                if decoded.strip():
                    gathered.add_json(decoded)
            except UnicodeDecodeError as e:
                raise not_utf8(path, end, e) from None
            except InputError as e:
                raise InputError(f"line {_line_number(path, end)} of {path} {e}") from None
            end += len(line)
            if gathered.full:
                yield gathered.chunk(end, stored.tell() if text is not stored else end)
        yield gathered.chunk(end, stored.tell(), last=True)


def _refuse_long(line: bytes, path: Path, start: int) -> None:
    if len(line) > LONGEST_RECORD:
        raise InputError(
            f"line {_line_number(path, start)} of {path} is longer than {LONGEST_RECORD >> 20} MiB; "
            "split its text over several lines"
        )


def _line_number(path: Path, offset: int) -> int:
    """The number of the line that begins at byte `offset`: counted when there is something to say about it only."""
    number = 1
    with opened(path) as (_, text):
        while offset:
            block = text.read(min(offset, BLOCK))
            number += block.count(b"\n")
            offset -= len(block)
    return number


def read_json(path: Path, start: Place, how: Reading) -> Chunks:
    """The field of every object, or every string, of a list; or of objects one after the other, as on the hub."""
    gathered = _Gathered(path, start, how)
    with opened(path) as (_, text):
        listed = Values(path, text, 0, how).next() == "["
    with opened(path, start.offset) as (stored, text):
        values = Values(path, text, start.offset, how)
        for record in every(values, listed, start.offset == 0):
            try:
                gathered.add({how.field: record} if listed and isinstance(record, str) else record)
            except InputError as e:
                raise InputError(f"the record that ends at byte {values.offset:,} of {path} {e}") from None
            if gathered.full:
                yield gathered.chunk(values.offset, stored.tell())
        end = values.offset  # before the bracket: whoever goes on here has to find it
        if listed:
            values.skip()
        if values.next():
            raise values.fault()
        yield gathered.chunk(end, stored.tell(), last=True)


class _Lines:
    """The lines of a file, for the csv module; `end` is the byte behind those that it took."""

    def __init__(self, path: Path, text: IO[bytes], start: int, how: Reading):
        self._path, self._text, self._how, self.end = path, text, how, start

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(LONGEST_RECORD + 1)
        if not line:
            raise StopIteration
        _refuse_long(line, self._path, self.end)
        try:
            decoded = line.decode("utf-8" if self.end else "utf-8-sig", self._how.decoding)
        except UnicodeDecodeError as e:
            raise not_utf8(self._path, self.end, e) from None
        self.end += len(line)
        return decoded


def read_csv(path: Path, start: Place, how: Reading) -> Chunks:
    """The field of every record; blank lines are skipped."""
    csv.field_size_limit(LONGEST_RECORD)
    gathered = _Gathered(path, start, how)
    with opened(path) as (_, text):
        lines = _Lines(path, text, 0, how)
        names = next(_rows(path, lines), [])
        begin = max(start.offset, lines.end)
    if how.field not in names:
        if not names:
            return
        raise no_field(path, how.field, names)
    with opened(path, begin) as (stored, text):
        lines = _Lines(path, text, begin, how)
        end = begin
        for row in _rows(path, lines):
            try:
                if row and len(row) != len(names):
                    raise InputError(
                        f"has {len(row)} fields where the first line names {len(names)}; "
                        'put fields with commas or line ends in them in "quotes"'
                    )
                if row:
                    gathered.add(dict(zip(names, row, strict=True)))
            except InputError as e:
                raise InputError(f"line {_line_number(path, end)} of {path} {e}") from None
            end = lines.end
            if gathered.full:
                yield gathered.chunk(end, stored.tell() if text is not stored else end)
        yield gathered.chunk(end, stored.tell(), last=True)


def _rows(path: Path, lines: _Lines) -> Iterator[list[str]]:
    """The records as the csv module reads them. Raises `InputError` for what it refuses."""
    end = lines.end
    try:
        for row in csv.reader(lines, strict=True):
            yield row
            end = lines.end
    except csv.Error as e:
        raise InputError(
            f"{path} is not valid CSV in the record that begins on line {_line_number(path, end)} ({e}); "
            'put fields with commas, quotes or line ends in them in "quotes", and double the quotes within'
        ) from None


def read_parquet(path: Path, start: Place, how: Reading) -> Chunks:
    """The column, one group of rows after the other."""
    arrow = extra("pyarrow", "parquet", path)
    parquet = extra("pyarrow.parquet", "parquet", path)
    gathered = _Gathered(path, start, how)
    size, row = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if how.field not in names:
                raise no_field(path, how.field, names)
            kind = file.schema_arrow.field(how.field).type
            kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                raise InputError(f"field `{how.field}` of {path} holds {kind}, not text; name another with --field")
            rows = max(1, file.metadata.num_rows)
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if row + count <= start.offset:
                    row += count
                    continue
                for batch in file.iter_batches(ROWS, [group], [how.field], use_threads=False):
                    column = batch.column(0)
                    column = column.dictionary_decode() if arrow.types.is_dictionary(column.type) else column
                    for value in column.cast(arrow.large_binary()).to_pylist():
                        row += 1
                        if row <= start.offset:
                            continue
                        gathered.add({how.field: None if value is None else _decoded(value, row, path, how)})
                        if gathered.full:
                            yield gathered.chunk(row, size * row // rows)
    except (arrow.ArrowException, OSError) as e:
        if isinstance(e, OSError) and e.errno:  # of this machine
            raise
        reason = str(e).partition("\n")[0].rstrip(".")
        raise InputError(f"{path} is damaged or no parquet file ({reason}); fetch or write it again") from None
    yield gathered.chunk(row, size, last=True)


def _decoded(value: bytes, row: int, path: Path, how: Reading) -> str:
    try:
        return value.decode("utf-8", how.decoding)
    except UnicodeDecodeError as e:
        raise InputError(
            f"row {row:,} of {path} is not UTF-8 ({e.reason}); write it again, or pass --errors replace"
        ) from None


READERS: dict[str, Reader] = {  # by suffix, the one that is preferred where a dataset has several first
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".txt": read_txt,
}


def suffix_of(name: str) -> str | None:
    """The suffix that says how a file is read, without that of its packing; None for a file that cannot be read."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    return suffix if suffix in READERS and not (suffix == ".parquet" != path.suffix) else None
