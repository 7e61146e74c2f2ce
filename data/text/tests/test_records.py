"""Records in .jsonl, .json, .csv and .parquet; packed files; bytes that are no text."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from data.cli import InputError
from data.text import division, formats, json_values, prepare, records
from data.text.formats import Reading, opened
from data.text.sources import stream
from data.text.tests.test_sources import counted, documents

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = [
    "one",
    'a "quoted", one\nof two lines',
    "日本 é",
    "{[,]}",
    "\\",
    *(f"text {i} " * (i % 7 + 1) for i in range(40)),
]
REPLACE = Reading(errors="replace")


def csv_of(rows: list[list[Any]]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


def parquet_of(values: Any, **settings: Any) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(len(values)), "text": values}), out, **settings)
    return out.getvalue()


OBJECTS = [{"id": i, "text": text, "meta": {"text": "no"}} for i, text in enumerate(TEXTS)]
FORMS = {
    "a.jsonl": "".join(json.dumps(one) + "\n" for one in OBJECTS).encode(),
    "list.json": json.dumps(OBJECTS).encode(),
    "indented.json": b"\xef\xbb\xbf \n" + json.dumps(OBJECTS, indent=2, ensure_ascii=False).encode() + b"\n",
    "strings.json": json.dumps(TEXTS, ensure_ascii=False).encode(),
    "lines.json": "\n".join(json.dumps(one, indent=1) for one in OBJECTS).encode(),
    "a.csv": csv_of([["id", "text"], *([i, text] for i, text in enumerate(TEXTS))]),
    "a.parquet": parquet_of(TEXTS, row_group_size=9),
    "dictionary.parquet": parquet_of(pyarrow.array(TEXTS).dictionary_encode()),
    "large.parquet": parquet_of(pyarrow.array(TEXTS, pyarrow.large_string()), compression="zstd"),
    "a.txt": "<|endoftext|>".join(TEXTS).encode(),
}


@pytest.mark.parametrize("block", [19, 100, 1 << 16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_documents(
    form: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read at a time, and wherever reading goes on."""
    monkeypatch.setattr(formats, "BLOCK", block)
    for module in (formats, records, json_values):
        monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(records, "ROWS", 4)
    expected = [text.strip() for text in TEXTS]
    assert documents(tmp_path / form, FORMS[form]) == expected
    if not form.endswith(".parquet") and block == 100:
        assert documents(tmp_path / f"{form}.gz", gzip.compress(FORMS[form])) == expected
        assert documents(tmp_path / f"{form}.ZST", zstandard.compress(FORMS[form])) == expected


def test_packed_files_of_several_members(tmp_path: Path) -> None:
    for name, pack in (("a.txt.gz", gzip.compress), ("a.txt.zst", zstandard.compress)):
        assert documents(tmp_path / name, pack(b"one<|endof") + pack(b"") + pack(b"text|>two")) == ["one", "two"]


def test_unpacking_is_bounded(tmp_path: Path) -> None:
    """A file that unpacks to 200 MB of one character is read in blocks."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b" " * (200 << 20)))
    with opened(path) as (_, text):
        assert text.read(10) == b" " * 10
        frames: Any = text
        assert len(frames.raw._text) <= 128 << 20


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst", "a.json.zst", "a.csv.gz"])
def test_a_packed_file_that_is_damaged(name: str, tmp_path: Path) -> None:
    pack = gzip.compress if name.endswith("gz") else zstandard.compress
    suffix = name.split(".")[1]
    whole = pack(
        {"txt": b"some text", "csv": b"text\nsome\n", "json": b'["some"]'}.get(suffix, b'{"text": "some"}\n') * 1
    )
    for content in (whole[:-3], whole[: len(whole) // 2], whole[:8], b"no such file at all", whole + b"rest"):
        with pytest.raises(InputError, match=rf"{name} is damaged or cut short \(.*\); fetch it again"):
            documents(tmp_path / name, content)


def test_blanks_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n{"text": null}\n\n{"text": " "}\n{"text": "a"}\n')
    assert documents(path, path.read_bytes()) == ["a"]
    assert counted(path) == {"record": 4, "skipped": 3}
    for name, content in (
        ("a.csv", b'text,id\r\n,1\r\n\r\n" ",2\r\na,3\r\n'),
        ("a.json", b'[{"text": null}, {}, {"text": "a"}]'),
        ("a.parquet", parquet_of([None, "", "a"])),
    ):
        assert documents(tmp_path / name, content) == ["a"]
        assert counted(tmp_path / name) == {"record": 3, "skipped": 2}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_blank_records_are_refused_before_all_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (records, division):
        monkeypatch.setattr(module, "MANY_RECORDS", 1000)
    blank = [""] * 10_000
    if name == "a.parquet":
        (tmp_path / name).write_bytes(parquet_of(blank))
    elif name == "a.csv":
        (tmp_path / name).write_text("id,text\n" + "".join(f"1,{text}\n" for text in blank))
    else:
        (tmp_path / name).write_text("\n".join(json.dumps({"text": text}) for text in blank))
    (tmp_path / "valid.txt").write_text("held out")
    for valid in (None, str(tmp_path / "valid.txt")):
        with pytest.raises(InputError, match=r"1,000 of 1,000 records of .* have no text in `text`"):
            prepare.prepare(str(tmp_path / name), tmp_path / "out", valid)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.csv", "a.parquet"])
def test_another_field(name: str, tmp_path: Path) -> None:
    content = {
        "a.jsonl": b'{"text": "no", "the story": "yes"}',
        "list.json": b'[{"text": "no", "the story": "yes"}]',
        "a.csv": b"text,the story\nno,yes",
        "a.parquet": FORMS["a.parquet"],
    }[name]
    if name == "a.parquet":
        with pytest.raises(InputError, match=r"field `id` of .*a\.parquet holds int64, not text; name another"):
            documents(tmp_path / name, content, Reading("id"))
    else:
        assert documents(tmp_path / name, content, Reading("the story")) == ["yes"]
    with pytest.raises(
        InputError, match=r"has no field `body`; there is (text, the story|id, text): name the one that"
    ):
        documents(tmp_path / name, content, Reading("body"))


def test_a_field_that_comes_late_is_found(tmp_path: Path) -> None:
    lines = [b'{"id": 1}\n'] * 99 + [b'{"text": "a"}\n']
    assert documents(tmp_path / "a.jsonl", b"".join(lines)) == ["a"]
    with pytest.raises(
        InputError, match=r"line 100 of .* has no field `text`, nor has any before it; there is id: name"
    ):
        documents(tmp_path / "a.jsonl", b"".join([lines[0], *lines]))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.json", b'[{"text": "a"}', "not valid JSON from byte 14 on"),
        ("a.json", b'[{"text": "a"},]', "not valid JSON from byte 15 on"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "not valid JSON from byte 15 on"),
        ("a.json", b'[{"text": "a"}] more', "not valid JSON from byte 16 on"),
        ("a.json", b'["a", 5]', "the record that ends at byte 7 .* has no string field `text`: it is no object"),
        ("a.json", b'"a"', "ends at byte 3 of .* has no string field `text`: it is no object"),
        ("a.json", b'{"data": [{"text": "a"}]}', "has no field `text`; there is data: name"),
        ("a.json", b"[" * 100_000, "not valid JSON from byte"),
        ("a.json", b'["a", "\xff"]', r"a\.json is not UTF-8 at byte 7 "),
        ("a.json", b"[]", "holds no document"),
        ("a.json", b"", "holds no document"),
        ("a.csv", b'id,"a\nb\0",c\n1,2,3\n', r"there is id, a\?b\?, c: name the one"),
        ("a.csv", b"", "holds no document"),
        ("a.csv", b"text\n", "holds no document"),
        (
            "a.csv",
            b'id,text\n1,"two\nlines"\n2,a, b\n',
            r"line 4 of .*a\.csv has 3 fields where the first line names 2",
        ),
        ("a.csv", b'id,text\n1,"never ends\n2,b\n', "not valid CSV in the record that begins on line 2"),
        ("a.csv", b'id,text\n1,"one"two\n', "not valid CSV in the record that begins on line 2"),
        ("a.csv", b"id,text\n1,\xe9\n", r"a\.csv is not UTF-8 at byte 10 "),
        ("a.parquet", b"", r"a\.parquet is damaged or no parquet file"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is damaged or no parquet file"),
        ("a.parquet", FORMS["a.parquet"][:-100], r"a\.parquet is damaged or no parquet file"),
    ],
)
def test_bad_files(name: str, content: bytes, fault: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=fault):
        documents(tmp_path / name, content)


def not_utf8(values: list[bytes]) -> bytes:
    table = pyarrow.table({"text": pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())})
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


BAD: dict[str, tuple[bytes, str]] = {
    "a.txt": (b"ok\xff\xc3", "not UTF-8 at byte 2"),
    "a.jsonl": (b'{"text": "ok\xff\xc3"}', "not UTF-8 at byte 12"),
    "a.json": (b'["ok\xff\xc3"]', "not UTF-8 at byte 4"),
    "a.csv": (b"text\nok\xff\xc3\n", "not UTF-8 at byte 7"),
    "a.parquet": (not_utf8([b"ok\xff\xc3"]), "row 1 of .* is not UTF-8"),
    "b.jsonl": (
        b'{"text": "ok\\ud800\\udc01\\udc00\\ud801"}',
        "line 1 of .* has half a surrogate pair .* --errors replace",
    ),
    "b.json": (b'["ok\\ud800\\udc01\\udc00\\ud801"]', "has half a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_replaced_only_when_asked_for(name: str, tmp_path: Path) -> None:
    content, fault = BAD[name]
    with pytest.raises(InputError, match=fault):
        documents(tmp_path / name, content)
    pair = "\U00010001" if name[0] == "b" else ""
    assert documents(tmp_path / name, content, REPLACE) == [f"ok{pair}\ufffd\ufffd"]
    assert counted(tmp_path / name, REPLACE)["replaced"] == 2


def test_reading_goes_on_behind_bad_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted as they are in the file: a replacement is longer."""
    monkeypatch.setattr(formats, "BLOCK", 3)
    content = b"".join(b"%d\xff\xe9\xe6\x97<|endoftext|>\xed\xa0\x80\n" % i for i in range(9))
    found = documents(tmp_path / "a.txt", content, REPLACE)
    assert found[:2] == ["0" + "\ufffd" * 4, "\ufffd" * 3 + "\n1" + "\ufffd" * 4]
    assert counted(tmp_path / "a.txt", REPLACE) == {"marker": 9, "replaced": 9 * 7}


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_missing_package_is_named(name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    extra = {"pyarrow": "parquet", "zstandard": "zstd"}[module]
    command = rf"{sys.executable} -m pip install {module}` .*pip install '\.\[{extra}\]'"
    with pytest.raises(InputError, match=command):
        stream(str(tmp_path / name), "train")


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_not_taken_for_utf8(encoding: str, errors: str, tmp_path: Path) -> None:
    """Not where bad bytes are replaced, and not without its mark, which is no bad byte at all."""
    (tmp_path / "a.txt").write_bytes(("Once upon a time there was a hen.\n" * 9).encode(encoding))
    text = stream(str(tmp_path / "a.txt"), "train", Reading(errors=errors))
    assert text
    with pytest.raises(
        InputError, match=r"a.txt is UTF-16, or no text, as its beginning shows; try `iconv -f UTF-16 -t "
    ):
        list(text.chunks())


def test_columns_that_commas_do_not_separate(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id;text\n1;Once\n")
    text = stream(str(tmp_path / "a.csv"), "train")
    assert text
    with pytest.raises(InputError, match="there is one column, 'id;text': separate columns by commas"):
        list(text.chunks())
