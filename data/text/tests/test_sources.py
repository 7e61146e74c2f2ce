import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from data.cli import InputError
from data.text import formats, hub, records, sources, stories
from data.text.formats import AS_GIVEN, LONGEST_PIECE, Place, Reading
from data.text.sources import Stream, stream
from data.text.tokenizer import EOT_TEXT

TINYSTORIES = Path(__file__).parents[4] / "shared" / "data" / "tinystories" / "valid.txt"


def documents(path: Path, content: bytes, how: Reading = AS_GIVEN) -> list[str]:
    """What a file with `content` reads as, from its beginning, and from each place where reading may begin again."""
    path.write_bytes(content)
    text = stream(str(path), "train", how)
    assert text
    assert text.size == len(content)
    return checked(text)


def checked(text: Stream) -> list[str]:
    chunks = list(text.chunks())
    ends = [chunk.end for chunk in chunks]
    assert ends == sorted(ends)
    assert ends[-1].done == text.size
    pieces = [piece for chunk in chunks for piece in chunk.pieces]
    assert not pieces or pieces[-1].ends
    for i, end in enumerate(ends):
        rest = list(text.chunks(end)) if end != Place() else chunks
        after = chunks if end == Place() else chunks[i + 1 :]
        assert [p for chunk in rest for p in chunk.pieces] == [p for chunk in after for p in chunk.pieces]
        assert total(rest) == total(after)
    return joined(pieces)


def joined(pieces: list[formats.Piece]) -> list[str]:
    found = [""]
    for piece in pieces:
        found[-1] += piece.text
        found += [""] * piece.ends
    return found[:-1]


def total(chunks: list[formats.Chunk]) -> Counter[str]:
    return +sum((chunk.counts for chunk in chunks), Counter())


def counted(path: Path, how: Reading = AS_GIVEN) -> dict[str, int]:
    text = stream(str(path), "train", how)
    assert text
    return dict(total(list(text.chunks())))


@pytest.mark.parametrize(
    "content",
    [
        "one\nline\n<|endoftext|>\ntwo\n<|endoftext|>\n",
        "one\nline\n<|endoftext|>\ntwo",  # no separator at the end
        "one\nline<|endoftext|>\ntwo<|endoftext|>",  # at the end of the text's own line
        "\n<|endoftext|>\n<|endoftext|>\none\nline\n<|endoftext|>\n \n<|endoftext|>\ntwo\n",  # empty documents
        "one\r\nline\r\n<|endoftext|>\r\ntwo\r\n<|endoftext|>\r\n",
        "\ufeffone\nline\n<|endoftext|>\ntwo",  # a byte order mark
    ],
)
def test_txt_forms(content: str, tmp_path: Path) -> None:
    assert documents(tmp_path / "a.txt", content.encode()) == ["one\nline", "two"]


@pytest.mark.parametrize(
    ("content", "expected", "markers"),
    [
        ("one<|endoftext|>two<|endoftext|>three", ["one", "two", "three"], 2),
        ("one<|endoftext|>   two <|endoftext|> \t\nthree<|endoftext|>", ["one", "two", "three"], 3),
        ("<|endoftext|>one\r\n<|endoftext|>\r\n<|endoftext|><|endoftext|>two", ["one", "two"], 4),
        ("\ufeff<|endoftext|>one<|endoftext|>\ufefftwo", ["one", "\ufefftwo"], 2),
        ("a <|endoftext| > b <|endoftext|", ["a <|endoftext| > b <|endoftext|"], 0),
    ],
)
@pytest.mark.parametrize("block", [1, 6, 1000])
def test_a_marker_ends_a_document_wherever_it_stands(
    content: str, expected: list[str], markers: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "BLOCK", block)
    assert documents(tmp_path / "a.txt", content.encode()) == expected
    assert counted(tmp_path / "a.txt") == ({"marker": markers} if markers else {})


def test_a_marker_in_a_record_is_text_and_counted(tmp_path: Path) -> None:
    text = f"it {EOT_TEXT} ends {EOT_TEXT}"
    assert documents(tmp_path / "a.jsonl", json.dumps({"text": text}).encode()) == [text]
    assert counted(tmp_path / "a.jsonl") == {"record": 1, "spelled": 2}


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Separators, line ends and characters that straddle two blocks."""
    line_ends = ("\r\n", "\n") * 5
    content = "".join(f"\ufeffé{i}\r\n日本<|endoftext|>{end}" for i, end in enumerate(line_ends)).encode()
    whole = documents(tmp_path / "a.txt", content)
    assert whole == ["é0\n日本", *(f"\ufeffé{i}\n日本" for i in range(1, 10))]  # a byte order mark is one at the start
    for block in (1, 2, 3, 7):
        monkeypatch.setattr(formats, "BLOCK", block)
        assert documents(tmp_path / "a.txt", content) == whole


@pytest.mark.parametrize("block", [1, 5, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aa bb\ncc dd ee ff gg hh", ["aa bb", "\ncc dd ee", " ff gg hh"]),  # before a line end, else before a space
        ("aaaa bbbb cccc", ["aaaa bbbb", " cccc"]),
        ("x" * 35, ["x" * 10, "x" * 10, "x" * 10, "x" * 5]),
        ("a\nbb\ncc dd ee ff", ["a\nbb", "\ncc dd ee", " ff"]),  # the last of each that fits
        ("abcdefghij", ["abcdefghij"]),  # just fits
        ("abcd\nefg h", ["abcd\nefg h"]),  # as does this, which could be cut
        ("abcd\nefg hi", ["abcd", "\nefg hi"]),
        ("abc \n\n  defg hi", ["abc", " \n\n  defg", " hi"]),  # before all of the white space
        ("abcdefghij klm", ["abcdefghij", " klm"]),
        (
            " " * 25 + "abc" + " " * 25 + "d" * 8 + " " * 12,
            ["abc", " " * 5 + "ddddd", "ddd", ""],
        ),  # of white space, the last
    ],
)
def test_long_documents_come_in_pieces(
    text: str, expected: list[str], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "LONGEST_PIECE", 10)
    monkeypatch.setattr(formats, "BLOCK", block)
    for name, content in (
        ("a.txt", f"{text}{EOT_TEXT}\nz"),
        ("a.jsonl", f'{json.dumps({"text": text})}\n{{"text": "z"}}'),
    ):
        documents(tmp_path / name, content.encode())
        found = stream(str(tmp_path / name), "train")
        assert found
        pieces = [piece for chunk in found.chunks() for piece in chunk.pieces]
        assert [piece.text for piece in pieces] == [*expected, "z"]
        assert [piece.ends for piece in pieces] == [False] * (len(expected) - 1) + [True, True]


def test_one_huge_line_stays_bounded(tmp_path: Path) -> None:
    content = b"ab " * LONGEST_PIECE
    assert documents(tmp_path / "a.txt", content) == [content.decode().strip()]
    text = stream(str(tmp_path / "a.txt"), "train")
    assert text
    lengths = [len(piece.text) for chunk in text.chunks() for piece in chunk.pieces]
    assert max(lengths) <= LONGEST_PIECE
    assert len(lengths) == 4  # three times the longest, in pieces of just under one


def test_jsonl(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"text": " one\\n", "id": 1}\r\n\n{"text": ""}\n{"text": "\xc3\xa9"}'
    assert documents(tmp_path / "a.jsonl", content) == ["one", "é"]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.txt", b"ok\xff", r"a\.txt is not UTF-8 at byte 2 "),
        ("a.txt", b"\xef\xbb\xbfok\r\n\xc3", r"a\.txt is not UTF-8 at byte 7 "),
        ("a.txt", b"x" * (3 << 20) + b"\xe9t\xe9", r"a\.txt is not UTF-8 at byte 3,145,728 "),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl is not UTF-8 at byte 24 "),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"line 3 of .*a\.jsonl is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"line 1 of .*a\.jsonl is not valid JSON"),
        ("a.jsonl", b'{"txt": "a"}', r"a\.jsonl has no field `text`; there is txt: name the one"),
        ("a.jsonl", b'{"text": 1}', r"line 1 of .* has no string field `text`"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1 of .* has half a surrogate pair"),
        ("a.jsonl", b'["text"]', r"line 1 of .* has no string field `text`"),
        ("a.txt", b"", r"a\.txt holds no document"),
        ("a.txt", b" \n<|endoftext|>\n\n", r"a\.txt holds no document"),
        ("a.jsonl", b'\n{"text": " "}\n', r"a\.jsonl holds no document"),
    ],
)
def test_bad_content(name: str, content: bytes, fault: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=fault):
        documents(tmp_path / name, content)


def test_lines_are_counted_from_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": 1}\n')
    text = stream(str(path), "train")
    assert text
    with pytest.raises(InputError, match="line 3 of"):
        list(text.chunks(Place(0, 14)))


def test_the_number_of_a_line_far_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are counted over several blocks, and none behind the bad one."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 6 + "bad\n" + '{"text": "a"}\n' * 5)
    for block in (1, 7, 14, 28, 1000):
        monkeypatch.setattr(records, "BLOCK", block)
        with pytest.raises(InputError, match=r"^line 7 of .*a\.jsonl is not valid JSON"):
            documents(path, path.read_bytes())


def test_the_longest_line_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end counts; one byte more is too long, and the sentence says how long a line may be."""
    monkeypatch.setattr(records, "LONGEST_RECORD", 2 << 20)
    monkeypatch.setattr(formats, "LONGEST_PIECE", 4 << 20)
    text = "a" * ((2 << 20) - len('{"text": ""}\n'))
    assert documents(tmp_path / "a.jsonl", json.dumps({"text": text}).encode() + b"\n") == [text]
    with pytest.raises(InputError, match=r"line 1 of .* is longer than 2 MiB; split its text over several lines"):
        documents(tmp_path / "a.jsonl", json.dumps({"text": text + "a"}).encode() + b"\n")


def test_line_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_RECORD", 20)
    with pytest.raises(InputError, match=r"line 2 of .* is longer"):
        documents(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "aaaaaaaaaaaaaa"}\n')


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("nowhere.txt", "no file"),
        ("shakespeare", "not a source"),
        ("a.pdf", "not a source"),
        ("*.txt", "no file matches"),
        ("", "an empty name is no source"),
        (" ", "an empty name is no source"),
    ],
)
def test_bad_sources(source: str, fault: str) -> None:
    with pytest.raises(InputError, match=rf"{fault}.* the sources are `stories`, .*\.txt"):
        stream(source, "train")


def test_a_file_is_known_by_its_ending_in_either_case(tmp_path: Path) -> None:
    for name, content in (("A.TXT", b"one"), ("a.JsonL", b'{"text": "one"}')):
        assert documents(tmp_path / name, content) == ["one"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of texts and other files, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "texts/b.txt": "b",
        "texts/a.jsonl": '{"text": "a"}\n{"text": "aa"}',
        "texts/deep/er/c.TXT": "c",
        "texts/notes.md": "no",
        "texts/.hidden.txt": "no",
        "texts/.git/x.txt": "no",
        "texts/empty.txt": "",
        "other/test.txt": "d",
        "model/config.json": "{}",
        "model/merges.txt": "#version",
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    return tmp_path / "texts"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("texts", ["a", "aa", "b", "c"]),
        ("texts/", ["a", "aa", "b", "c"]),
        ("texts/*", ["a", "aa", "b"]),
        ("[ot]*/**/*.[tT]*", ["d", "b", "c"]),
        ("texts/?.txt", ["b"]),
        ("texts/b.txt,other/test.txt,texts/deep", ["b", "d", "c"]),
    ],
)
def test_several_files_are_one_source(source: str, expected: list[str], folder: Path) -> None:
    text = stream(source, "train")
    assert text
    assert checked(text) == expected
    assert text.name == source
    assert text.size == sum(file.size for file in text.files)
    assert stream(source, "valid") is None


def test_what_is_left_out_is_named(folder: Path) -> None:
    for source in ("texts", "texts/*"):
        text = stream(source, "train")
        assert text
        assert text.notes == (f"left out of {source}, as no text: notes.md",)
    for source, fault in (
        ("model", r"model is no folder of texts: it has config\.json, as models, runs, prepared data do"),
        ("texts/*.md", "holds no file in a format that can be read"),
        ("texts/b.txt,gone.txt", "there is no file gone.txt"),
        ("texts/b.txt,", "'texts/b.txt,' has a comma with no name beside it"),
        (",texts/b.txt", "',texts/b.txt' has a comma with no name beside it"),
        ("texts/b.txt,stories", "'stories' is not a source of text"),
    ):
        with pytest.raises(InputError, match=fault):
            stream(source, "train")


def test_files_that_are_all_named_by_split(folder: Path) -> None:
    (folder.parent / "set").mkdir()
    for name in ("train-1", "train-2", "my_val", "Test"):
        Path("set", f"{name}.txt").write_text(name)
    for source in ("set", "set/*"):
        train, valid = stream(source, "train"), stream(source, "valid")
        assert train
        assert valid
        assert (checked(train), checked(valid)) == (["train-1", "train-2"], ["my_val"])
        assert train.notes[-1] == f"2 file(s) of {source} are its train split"
    Path("set", "trains.txt").write_text("of another kind")  # "trains" is no word for a split
    for source, more in (("set", []), ("set,texts/b.txt", ["b"])):
        train, valid = stream(source, "train"), stream(source, "valid")
        assert train
        assert valid
        assert (checked(train), checked(valid)) == (["train-1", "train-2", *more], ["my_val"])
        assert train.notes[-1] == "left out of set, as their names say no split and those of others do: trains.txt"
    assert stream("set/train-1.txt,set/my_val.txt", "valid") is None  # files that are named are meant
    for name in ("train-1", "train-2"):
        Path("set", f"{name}.txt").unlink()
    train = stream("set", "train")
    assert train
    assert len(checked(train)) == 3
    assert stream("set", "valid") is None


def test_files_of_the_same_name_in_several_folders(folder: Path) -> None:
    for name in ("1/train", "2/train", "2/valid"):
        Path("set", name).parent.mkdir(parents=True, exist_ok=True)
        Path("set", f"{name}.txt").write_text(name)
    for source in ("set", "set/*/*.txt"):
        train, valid = stream(source, "train"), stream(source, "valid")
        assert train
        assert valid
        assert (checked(train), checked(valid)) == (["1/train", "2/train"], ["2/valid"])


def test_names_with_commas(folder: Path) -> None:
    Path("my,t").mkdir()
    for name in ("c,d.txt", "c.txt", "my,t/train.txt", "my,t/valid.txt"):
        Path(name).write_text(name)
    for source, expected, of_valid in (
        ("c,d.txt", ["c,d.txt"], None),
        ("c,d.txt,texts/b.txt", ["c,d.txt", "b"], None),
        ("texts/b.txt,c,d.txt", ["b", "c,d.txt"], None),
        ("my,t", ["my,t/train.txt"], ["my,t/valid.txt"]),
        ("my,t/*.txt,c.txt", ["my,t/train.txt", "c.txt"], ["my,t/valid.txt"]),
        ("texts/b*,c.*", ["b", "c.txt"], None),
    ):
        train, valid = stream(source, "train"), stream(source, "valid")
        assert train
        assert checked(train) == expected
        assert (valid and checked(valid)) == of_valid


def test_several_files_together_hold_a_document(folder: Path) -> None:
    text = stream("texts/empty.txt,texts/empty.txt", "train")
    assert text
    with pytest.raises(InputError, match=r"texts/empty\.txt,texts/empty\.txt holds no document"):
        list(text.chunks())


def test_a_file_has_no_validation_text_of_its_own(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text("")
        assert stream(str(tmp_path / name), "valid") is None


def test_what_tells_one_file_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place, its length and its time: a change of any makes it another text; its name as given does not."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("one")
        os.utime(name, ns=(0, 10**18))

    def identity(name: str) -> str:
        text = stream(name, "train")
        assert text
        assert text.name == name
        return text.identity

    first = identity("a.txt")
    assert identity("./a.txt") == identity(str(tmp_path / "a.txt")) == first
    os.utime("a.txt", ns=(7, 10**18))
    assert identity("a.txt") == first  # that it was read changes nothing
    os.utime("a.txt", ns=(0, 10**18 + 1))
    other_time = identity("a.txt")
    Path("a.txt").write_text("three")
    os.utime("a.txt", ns=(0, 10**18))
    assert len({first, other_time, identity("a.txt"), identity("b.txt")}) == 4


def test_our_stories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """8 MB of seed 0 to train on, 0.4 MB of seed 1 to validate on; other text when their generator changes."""
    identities = []
    for split, seed, size in (("train", 0, 8_000_000), ("valid", 1, 400_000)):
        text = stream("stories", split)
        assert text
        assert (text.name, text.size) == (f"stories (seed {seed})", size)
        found = [piece.text for chunk in islice(text.chunks(), 3) for piece in chunk.pieces]
        assert found == list(islice(stories.stories(seed), 3))
        again = stream("stories", split)
        assert again
        assert again.identity == text.identity
        identities.append(text.identity)
    (tmp_path / "stories.py").write_text("another")
    monkeypatch.setattr(stories, "__file__", str(tmp_path / "stories.py"))
    changed = stream("stories", "train")
    assert changed
    assert len({*identities, changed.identity}) == 3


def test_stories_have_their_own_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "STORIES", {"train": (0, 20_000), "valid": (1, 10_000)})
    train, valid = stream("stories", "train"), stream("stories", "valid")
    assert train
    assert valid
    told = checked(train)
    assert sum(map(len, told)) - len(told[-1]) < train.size == 20_000 <= sum(map(len, told))
    assert not set(told) & set(checked(valid))


def unreachable(*args: Any, **kwargs: Any) -> None:
    raise ConnectionError("no route to the hub.\nmore")


@pytest.mark.parametrize("source", ["tinystories", "tinystories-v1"])
def test_hub_out_of_reach(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(
        InputError, match=r"hub cannot be reached .*\(no route to the hub\); .* local \.txt .*`stories`"
    ):
        stream(source, "train")


def test_hub_file_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "TinyStoriesV2-GPT4-valid.txt").write_text("a story\n<|endoftext|>\n")

    def cached(repo: str, name: str, **kwargs: Any) -> str:
        assert kwargs["local_files_only"]
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", cached)
    valid = stream("tinystories", "valid")
    assert valid
    assert checked(valid) == ["a story"]


@pytest.mark.parametrize(
    ("source", "split", "name"),
    [
        ("tinystories", "train", "TinyStoriesV2-GPT4-train.txt"),
        ("tinystories", "valid", "TinyStoriesV2-GPT4-valid.txt"),
        ("tinystories-v1", "train", "TinyStories-train.txt"),
        ("tinystories-v1", "valid", "TinyStories-valid.txt"),
    ],
)
def test_what_the_hub_is_asked(
    source: str, split: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cache first; then, whether the file is there at all, with a short wait; then for the file."""
    (tmp_path / name).write_text("a story\n<|endoftext|>\nand another")
    asked: list[Any] = []

    def download(*args: Any, local_files_only: bool = False, **kwargs: Any) -> str:
        asked.append(("file", args, kwargs, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: asked.append((url, timeout)))
    text = stream(source, split)
    assert text
    file = (("roneneldan/TinyStories", name), {"repo_type": "dataset", "revision": None})
    url = f"{constants.ENDPOINT}/datasets/roneneldan/TinyStories/resolve/main/{name}"
    assert asked == [("file", *file, True), (url, 10), ("file", *file, False)]
    assert text.name == f"roneneldan/TinyStories/{name}"
    assert text.size == (tmp_path / name).stat().st_size
    assert checked(text) == ["a story", "and another"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("\n no route. \nmore"), r"\(no route\. \)"),
        (ConnectionError("gone..."), r"\(gone\)"),
        (TimeoutError(), r"\(TimeoutError\)"),
        (OSError("no number"), r"\(no number\)"),
    ],
)
def test_why_the_hub_is_out_of_reach(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, local_files_only: bool = False, **kwargs: Any) -> None:
        raise LocalEntryNotFoundError("not cached") if local_files_only else error

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: None)
    name = "roneneldan/TinyStories/TinyStories-train.txt"
    with pytest.raises(InputError, match=rf"hub cannot be reached for {name} {reason}; try again, or pass a local"):
        stream("tinystories-v1", "train")


def test_a_full_disk_is_not_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, local_files_only: bool = False, **kwargs: Any) -> None:
        raise LocalEntryNotFoundError("not cached") if local_files_only else OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *args, **kwargs: None)
    monkeypatch.setattr(hub, "hf_hub_download", full)
    with pytest.raises(OSError, match="No space"):
        stream("tinystories", "train")


@pytest.mark.skipif(not TINYSTORIES.exists(), reason="needs TinyStories in ../shared, which no clone has")
def test_tinystories() -> None:
    text = stream(str(TINYSTORIES), "train")
    assert text
    stories = checked(text)
    assert len(stories) == 6456
    assert not any(EOT_TEXT in story for story in stories)
