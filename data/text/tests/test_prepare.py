import csv
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data import cli
from data.cli import InputError
from data.files import locked
from data.testing import call
from data.text import formats, json_values, prepare, records, sources
from data.text import tokenizer as tokenizer_module
from data.text.formats import Chunk, Chunks, Piece, Place, Reading
from data.text.shards import SPLITS, ShardWriter, open_split, verify
from data.text.sources import File, Stream
from data.text.tokenizer import EOT, EOT_TEXT, GPT2Tokenizer, gpt2, tokenizer

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

REPOSITORY = Path(__file__).parents[3]
TINYSTORIES = REPOSITORY.parent / "shared" / "data" / "tinystories" / "valid.txt"

DOCUMENTS = [f"Story {i}: the bear ran {i * i} steps." for i in range(300)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(f"\n{EOT_TEXT}\n".join(DOCUMENTS))
    return path


@pytest.fixture(autouse=True)
def many_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "BATCH", 200)
    encoding = tokenizer()  # one for all threads of all runs: making them would take longer than all else
    monkeypatch.setattr(tokenizer_module, "tokenizer", lambda: encoding)


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split, from its tokens."""
    tokens = np.concatenate(open_split(folder, split)).tolist()
    assert tokens[-1] == EOT
    return tokenizer().decode(tokens).split(EOT_TEXT)[:-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_lands_once_in_order(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    meta = prepare.prepare(str(text), out, valid=0.2)
    assert meta == json.loads((out / "meta.json").read_text())
    train, valid = decoded(out, "train"), decoded(out, "valid")
    assert train == [d for d in DOCUMENTS if d not in set(valid)]
    assert valid == [d for d in DOCUMENTS if d not in set(train)]
    assert 30 < len(valid) < 90  # 60 expected of 300
    assert meta["splits"]["valid"]["documents"] == len(valid)
    assert not (tmp_path / "out.partial").exists()
    assert capsys.readouterr().out.count("documents") == 2


@pytest.mark.parametrize("valid", [None, 0.1])
def test_workers_do_not_change_a_byte(valid: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "STORIES", {"train": (0, 100_000), "valid": (1, 10_000)})
    for workers in (1, 3):
        prepare.prepare("stories", tmp_path / str(workers), valid, workers=workers, shard_tokens=9_000)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert "train-00001.bin" in contents(tmp_path / "1")


def held_out(documents: list[str], fraction: float) -> list[str]:
    """Those whose checksum is in the lowest `fraction` of all that there are."""
    return [d for d in documents if zlib.crc32(d.encode("utf-8")) < fraction * 2**32]


def test_a_hash_of_the_text_decides_what_is_held_out(text: Path, tmp_path: Path) -> None:
    for fraction in (0.2, "0.6"):
        meta = prepare.prepare(str(text), tmp_path / f"out-{fraction}", fraction)
        assert decoded(tmp_path / f"out-{fraction}", "valid") == held_out(DOCUMENTS, float(fraction))
        assert meta["splits"]["valid"]["source"] == f"{float(fraction)} of {text}"
        assert meta["splits"]["train"]["source"] == str(text)
    meta = prepare.prepare(str(text), tmp_path / "out")
    assert meta["splits"]["valid"]["source"] == f"0.01 of {text}"
    assert decoded(tmp_path / "out", "valid") == held_out(DOCUMENTS, 0.01) != []


def test_the_hash_is_of_all_of_a_text(tmp_path: Path) -> None:
    """Of texts that begin alike, and end alike, some are held out."""
    alike = [f"{'the same ' * 600}{i}{' as ever' * 600}" for i in range(40)]
    (tmp_path / "text.txt").write_text(f"\n{EOT_TEXT}\n".join(alike))
    prepare.prepare(str(tmp_path / "text.txt"), tmp_path / "out", 0.3)
    assert decoded(tmp_path / "out", "valid") == held_out(alike, 0.3)
    assert 0 < len(held_out(alike, 0.3)) < 40


def test_the_command_passes_its_options_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pools: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int):
            pools.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(prepare, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    options = ["--valid", "0.37", "--workers", "3", "--shard-tokens", "123"]
    assert call(prepare.main, "text.txt", "--out", "some/where", *options, cwd=tmp_path).code == 0
    splits = json.loads((tmp_path / "some" / "where" / "meta.json").read_text())["splits"]
    assert splits["valid"]["source"] == "0.37 of text.txt"
    assert decoded(tmp_path / "some" / "where", "valid") == held_out(DOCUMENTS, 0.37)
    assert [max(shard["tokens"] for shard in splits[split]["shards"]) for split in splits] == [123, 123]
    assert call(prepare.main, "text.txt", "--out", "other", "--valid", "stories.jsonl", cwd=tmp_path).code == 2
    (tmp_path / "stories.jsonl").write_text('{"text": "Held out."}')
    assert call(prepare.main, "text.txt", "--out", "other", "--valid", "stories.jsonl", cwd=tmp_path).code == 0
    splits = json.loads((tmp_path / "other" / "meta.json").read_text())["splits"]
    assert splits["valid"]["source"] == "stories.jsonl"
    assert [len(splits[split]["shards"]) for split in splits] == [1, 1]
    assert decoded(tmp_path / "other", "train") == DOCUMENTS
    assert decoded(tmp_path / "other", "valid") == ["Held out."]
    assert pools == [3, 5]  # 5: one a core


def test_validation_of_our_own_stories(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a source that has validation text, that is taken, not what it has to train on."""
    monkeypatch.setattr(sources, "STORIES", {"train": (0, 2_000), "valid": (1, 1_000)})
    with_text = prepare.prepare(str(text), tmp_path / "out", valid="stories")
    alone = prepare.prepare("stories", tmp_path / "alone")
    for meta in (with_text, alone):
        assert meta["splits"]["valid"]["source"] == "stories (seed 1)"
    assert with_text["splits"]["valid"]["shards"] == alone["splits"]["valid"]["shards"]
    assert alone["splits"]["train"]["source"] == "stories (seed 0)"


def test_at_most_two_batches_a_worker_wait(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory does not grow with the text."""
    waiting = most = 0

    class Turn(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            nonlocal waiting
            waiting -= 1
            return super().result(timeout)

    class Pool(ThreadPoolExecutor):
        def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:  # type: ignore[override]
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            turn = Turn()
            turn.set_result(function(*arguments))
            return turn

    monkeypatch.setattr(prepare, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(formats, "BLOCK", 300)
    prepare.prepare(str(text), tmp_path / "out", valid=0.2, workers=3)
    assert (waiting, most) == (0, 6)


def test_the_least_that_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One token a shard, and one worker where the number of cores is not known; the folder is named in full."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    Path("a.txt").write_text("one two")
    Path("b.txt").write_text("three")
    meta = prepare.prepare("a.txt", "out", "b.txt", shard_tokens=1)
    assert [[shard["tokens"] for shard in split["shards"]] for split in meta["splits"].values()] == [[1, 1, 1], [1, 1]]
    assert capsys.readouterr().out.endswith(f", prepared in {tmp_path / 'out'}\n")


MB = 1_000_000


def imagined(name: str, size: int, group: int, stop: dict[str, int]) -> Stream:
    """A text of `size` bytes in groups of `group`, of two documents each; `stop` says at which it is interrupted."""

    def read(start: Place) -> Chunks:
        for i, end in enumerate(range(group, size + 1, group)):
            if end > start.offset:
                if stop.get(name) == i:
                    raise KeyboardInterrupt
                pieces = [Piece(f"{name} {i} " * 40), Piece(f"and {name} {i} " * 30)]
                yield Chunk(pieces, Place(0, end, False, end), Counter())

    return Stream(name, (File(size, f"identity of {name}", read),))


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 3 GB to train on and 1 GB to validate on, interrupted in each: what is printed, and where it goes on."""
    stop: dict[str, int] = {}
    texts = {
        "train": imagined("lessons", 3000 * MB, 500 * MB, stop),
        "valid": imagined("exams", 1000 * MB, 100 * MB, stop),
    }
    clock = iter([50.0, 90.0, 7.0])
    monkeypatch.setattr(prepare, "stream", lambda source, split, how: texts[split])
    monkeypatch.setattr(prepare, "CHECKPOINT_EVERY", 1000 * MB)
    monkeypatch.setattr(prepare, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    whole = prepare.prepare("x", tmp_path / "whole", workers=1, shard_tokens=1000)
    tokens = {
        split: len(gpt2().encode_documents([piece.text for chunk in text.chunks() for piece in chunk.pieces]))
        for split, text in texts.items()
    }
    printed = [
        f"train: 12 documents, {tokens['train']:,} tokens, {-(-tokens['train'] // 1000)} shard(s), from lessons",
        f"valid: 20 documents, {tokens['valid']:,} tokens, {-(-tokens['valid'] // 1000)} shard(s), from exams",
    ]
    assert tokens["train"] > 1000  # a comma in them
    out, err = capsys.readouterr()
    assert out.splitlines() == [*printed, f"4,000.0 MB in 40.0 s (100.0 MB/s), prepared in {tmp_path / 'whole'}"]
    assert " 0.00/4.00G " in err.splitlines()[0]
    assert "100%" in err.splitlines()[-1]
    assert " 4.00G/4.00G " in err.splitlines()[-1]

    stop["lessons"] = 5  # two batches wait, so three are written, 1.5 GB, when the sixth is asked for
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare("x", tmp_path / "out", workers=1, shard_tokens=1000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"the same command goes on from {tmp_path / 'out.partial'}"
    assert json.loads((tmp_path / "out.partial" / "checkpoint.json").read_text())["mark"][1][1] == 1000 * MB
    stop.clear()
    monkeypatch.setattr(prepare, "CHECKPOINT_EVERY", 300 * MB)
    stop["exams"] = 9  # seven of ten are written
    clock = iter([0.0, 100.0, 112.5])
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare("x", tmp_path / "out", workers=1, shard_tokens=1000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"going on from {tmp_path / 'out.partial'}, after 1,000.0 of 4,000.0 MB"
    assert " 1.00G/4.00G " in err.splitlines()[1]
    stop.clear()
    again = prepare.prepare("x", tmp_path / "out", workers=1, shard_tokens=1000)
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == f"going on from {tmp_path / 'out.partial'}, after 3,600.0 of 4,000.0 MB"
    assert out.splitlines() == [*printed, f"400.0 MB in 12.5 s (32.0 MB/s), prepared in {tmp_path / 'out'}"]
    assert again == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_where_no_document_falls_to_a_side_the_text_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n' * 1200)  # all alike: none is apart from the others
    for fraction, held_out in ((0.01, 12), (0.999, 1199), (None, 120)):
        prepare.prepare(str(path), tmp_path / f"out-{fraction}", fraction)
        assert decoded(tmp_path / f"out-{fraction}", "valid") == ["a"] * held_out
        assert decoded(tmp_path / f"out-{fraction}", "train") == ["a"] * (1200 - held_out)
    said = "text.jsonl: 1,200 documents, too few to choose from, so its end is the validation text"
    assert capsys.readouterr().out.count(said) == 3


def test_one_long_text_is_cut_between_its_paragraphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tokens are those of the whole, at the cut as between the pieces that it is read in."""
    monkeypatch.setattr(formats, "LONGEST_PIECE", 500)
    monkeypatch.setattr(formats, "BLOCK", 300)
    text = "".join(f"{d}{mark}" for d, mark in zip(DOCUMENTS, (" ", "\n", " ", "\n\n") * 75, strict=True)).strip()
    (tmp_path / "book.txt").write_text(text + "\n")
    meta = prepare.prepare(str(tmp_path / "book.txt"), tmp_path / "out")
    [train], [valid] = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "valid")
    assert f"{train}\n\n{valid}" == text
    assert abs(len(valid) - len(text) / 10) < 100
    tokens = [np.concatenate(open_split(tmp_path / "out", split)).tolist() for split in ("train", "valid")]
    assert tokens == [[*tokenizer().encode_ordinary(side), EOT] for side in (train, valid)]
    place = f"after about character {len(text) - round(len(text) / 10):,} of {len(text):,}"
    assert meta["splits"]["valid"]["source"] == f"the end of {tmp_path / 'book.txt'}, {place}"
    assert "book.txt: one document, so its end is the validation text; --valid takes another" in capsys.readouterr().out
    prepare.prepare(str(tmp_path / "book.txt"), tmp_path / "half", 0.5)
    [train], [valid] = decoded(tmp_path / "half", "train"), decoded(tmp_path / "half", "valid")
    assert f"{train}\n\n{valid}" == text
    assert abs(len(valid) - len(text) / 2) < 100


def test_a_long_document_lies_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the hash of its first piece says, with one marker at its end, whatever the batches."""
    monkeypatch.setattr(formats, "LONGEST_PIECE", 20)
    texts = [f"{i} " + "words and more of them " * (i % 9 + 1) for i in range(60)]
    (tmp_path / "text.txt").write_text(EOT_TEXT.join(texts))
    texts = [text.strip() for text in texts]
    chosen = [text for text in texts if held_out([formats.cut(text)[0]], 0.4)]
    for batch in (1, 30, 10000):
        monkeypatch.setattr(prepare, "BATCH", batch)
        prepare.prepare(str(tmp_path / "text.txt"), tmp_path / str(batch), 0.4)
        assert decoded(tmp_path / str(batch), "valid") == chosen
        assert decoded(tmp_path / str(batch), "train") == [text for text in texts if text not in chosen]
    assert contents(tmp_path / "1") == contents(tmp_path / "30") == contents(tmp_path / "10000")


def test_what_was_read_is_said_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [{"text": f"{d} {EOT_TEXT}"} for d in DOCUMENTS] + [{"text": ""}, {"text": None}, {"other": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts) + '{"text": "half \\ud800"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff<|endoftext|> good\xfe")
    how = Reading("text", "replace")
    meta = prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", str(tmp_path / "b.txt"), how=how)
    out = capsys.readouterr().out.replace(f"{tmp_path}/", "")
    assert out.splitlines()[2:-1] == [
        "a.jsonl: 300 <|endoftext|> in records, where it is text and ends nothing",
        "a.jsonl: 3 of 304 records have no text in `text`: left out",
        "a.jsonl: 1 bytes or lone surrogates that are no text, replaced by U+FFFD",
        "b.txt: 1 <|endoftext|> markers, each the end of a document",
        "b.txt: 2 bytes or lone surrogates that are no text, replaced by U+FFFD",
    ]
    assert decoded(tmp_path / "out", "train")[-1] == "half \ufffd"
    assert meta["splits"]["train"]["read"] == {"record": 304, "skipped": 3, "spelled": 300, "replaced": 1}
    assert [meta["splits"]["valid"][name] for name in ("field", "errors")] == ["text", "replace"]


def test_a_field_that_most_records_lack_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    some = [*[{"text": "a"}] * 3, {"text": ""}] * 5
    path.write_text("\n".join(json.dumps(record) for record in some))
    prepare.prepare(str(path), tmp_path / "some")
    path.write_text("\n".join(json.dumps(record) for record in [*some, {"id": 1}]))
    with pytest.raises(InputError, match=r"^6 of 21 records of .*a\.jsonl have no text in `text`; name the field"):
        prepare.prepare(str(path), tmp_path / "out")
    monkeypatch.setattr(prepare, "ENOUGH_RECORDS", 6)  # then before the end
    path.write_text(
        "\n".join(json.dumps(record) for record in [{"text": "ab" * 200}, *[{"text": ""}] * 20, *some * 50])
    )
    monkeypatch.setattr(records, "BLOCK", 1)
    monkeypatch.setattr(prepare, "BATCH", 1)
    with pytest.raises(InputError, match=r"^20 of 22 records of"):
        prepare.prepare(str(path), tmp_path / "out")


def test_the_folder_is_on_the_disk_before_it_has_its_name(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is synced, then the folder is renamed, then its new name is synced."""
    events: list[str] = []
    rename = os.rename

    def renamed(old: Path, new: Path) -> None:
        events.append(f"{old.name} -> {new.name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", lambda fd: events.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    monkeypatch.setattr(os, "rename", renamed)
    prepare.prepare(str(text), tmp_path / "out", valid=0.2)
    assert {"train-00000.bin", "valid-00000.bin", "meta.json.tmp"} < set(events)
    assert events[-3:] == ["out.partial", "out.partial -> out", tmp_path.name]


@pytest.fixture
def sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text in the working folder, in which `prepared` keeps what it makes."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sentences.txt"
    path.write_text(f"\n{EOT_TEXT}\n".join(DOCUMENTS))
    return path


def test_a_text_is_prepared_once(sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare.prepared("sentences.txt")
    assert folder.parent == Path("runs/data")
    assert re.fullmatch(r"sentences-[0-9a-f]{8}", folder.name)
    assert capsys.readouterr().out.splitlines()[0] == f"preparing sentences.txt in {folder}"
    assert decoded(folder, "valid") == held_out(DOCUMENTS, 0.01)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare.prepared("sentences.txt") == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert capsys.readouterr().out == ""
    assert prepare.prepared(str(folder)) == folder  # a folder is what it is
    assert os.listdir("runs/data") == [folder.name]


@pytest.mark.parametrize("kept", ["size", "time", "neither"])
def test_a_text_that_was_edited_is_prepared_again(kept: str, sentences: Path) -> None:
    """Also where its length, or its time, is what it was."""
    first = prepare.prepared("sentences.txt")
    time = sentences.stat().st_mtime_ns
    text = sentences.read_text()
    sentences.write_text(text.replace("bear", "wolf" if kept == "size" else "badger"))
    os.utime(sentences, ns=(time, time if kept == "time" else time + 1_000_000))
    second = prepare.prepared("sentences.txt")
    assert second != first
    animal = "wolf" if kept == "size" else "badger"
    changed = [d.replace("bear", animal) for d in DOCUMENTS]
    assert sorted(decoded(second, "train") + decoded(second, "valid")) == sorted(changed)
    assert sorted(decoded(first, "train") + decoded(first, "valid")) == sorted(DOCUMENTS)


def test_validation_text_that_was_edited_is_prepared_again(sentences: Path) -> None:
    """Also that which comes with a folder or a pattern."""
    Path("set").mkdir()
    Path("set/train.txt").write_text("Trained on.")
    for text in ("one", "another"):
        Path("set/valid.txt").write_text(text)
        assert [decoded(prepare.prepared(source), "valid") for source in ("set", "set/*.txt")] == [[text], [text]]


def test_another_text_of_the_same_name_is_another(sentences: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "sentences.txt"
    other.write_bytes(sentences.read_bytes())
    os.utime(other, ns=(0, sentences.stat().st_mtime_ns))
    assert prepare.prepared("sentences.txt") != prepare.prepared("other/sentences.txt")
    assert prepare.prepared(str(sentences)) == prepare.prepared("sentences.txt")  # the same file, named otherwise


def test_all_that_decides_what_is_prepared_decides_the_folder(sentences: Path, tmp_path: Path) -> None:
    Path("exam.txt").write_text("One. Two.")
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("one<|endoftext|>two")
    strict, replace = Reading(), Reading(errors="replace")
    calls: list[tuple[str, str | None, Reading]] = [("sentences.txt", None, strict), ("sentences.txt", "0.1", strict)]
    calls += [("sentences.txt", "0.2", strict), ("sentences.txt", "exam.txt", strict), ("sentences.txt", None, replace)]
    calls += [("sentences.txt", None, Reading("body")), ("texts", None, strict), ("texts", "0.3", strict)]
    calls += [("sentences.txt,texts", None, strict), ("t?xts/*", None, strict)]
    folders = [prepare.prepared(*given) for given in calls]
    assert len({*folders}) == len(calls)
    assert [prepare.prepared(*given) for given in calls] == folders
    assert decoded(folders[3], "valid") == ["One. Two."]
    assert decoded(folders[1], "valid") == held_out(DOCUMENTS, 0.1)
    time = Path("exam.txt").stat().st_mtime_ns + 1_000_000
    os.utime("exam.txt", ns=(time, time))
    assert prepare.prepared(*calls[3]) not in folders
    (tmp_path / "texts" / "b.txt").write_text("three")
    assert prepare.prepared(*calls[6]) not in folders


def test_options_do_not_change_what_is_prepared_already(sentences: Path) -> None:
    folder = str(prepare.prepared("sentences.txt"))
    for valid, how in (("0.1", Reading()), (None, Reading("body")), (None, Reading(errors="replace"))):
        with pytest.raises(InputError, match=r"is prepared already, so it goes without --valid, --field and --errors"):
            prepare.prepared(folder, valid, how)


def test_validation_text_is_none_of_the_training_text(sentences: Path) -> None:
    Path("more.txt").write_text("more")
    with pytest.raises(InputError, match=r"sentences\.txt cannot be both training and validation text"):
        prepare.prepare("more.txt,sentences.txt", "out", "sentences.txt")


def test_the_hub_is_not_asked_for_what_is_prepared(sentences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(source: str, split: str, how: Reading) -> Stream:
        raise InputError(f"{source} is out of reach")

    monkeypatch.setattr(prepare, "stream", asked)
    for source in ("tinystories", "tinystories-v1"):
        with pytest.raises(InputError, match="out of reach"):
            prepare.prepared(source)
        folder = Path("runs", "data", f"{source}-{hashlib.sha256(source.encode()).hexdigest()[:8]}")
        folder.mkdir()
        assert prepare.prepared(source) == folder


def test_a_folder_without_text_or_tokens(sentences: Path) -> None:
    for name in ("empty", "others", "half"):
        (sentences.parent / name).mkdir()
    for name in ("others/a.jpg", "others/a.md", "half/train-00000.bin"):
        (sentences.parent / name).touch()
    for folder in ("empty", "others"):
        with pytest.raises(InputError, match=f"^{folder} holds no file in a format that can be read"):
            prepare.prepared(folder)
    assert prepare.prepared("half") == Path("half")  # of which `read_meta` tells what is missing


def test_what_became_of_markers_in_records_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"One. {EOT_TEXT} Two."}) + '\n{"text": "Three."}\n')
    ends = []
    for special, said in ((False, "where it is text and ends nothing"), (True, "each became the token that ends")):
        out = tmp_path / str(special)
        prepare.prepare(str(tmp_path / "a.jsonl"), out, 0.5, special_tokens=special)
        assert f"1 {EOT_TEXT} in records, {said}" in capsys.readouterr().out
        ends.append(sum(np.count_nonzero(shard == EOT) for split in SPLITS for shard in open_split(out, split)))
    assert ends[1] == ends[0] + 1


def test_shards_are_full_and_whole(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    meta = prepare.prepare(str(text), out, valid=0.2, shard_tokens=100)
    shards = meta["splits"]["train"]["shards"]
    assert {shard["tokens"] for shard in shards[:-1]} == {100}
    for shard in shards:
        verify(out / shard["name"])


def test_copies_never_straddle_the_splits(tmp_path: Path) -> None:
    path = tmp_path / "copies.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS * 3))
    prepare.prepare(str(path), tmp_path / "out", valid=0.2)
    train, valid = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "valid")
    assert len(train) + len(valid) == 3 * len(DOCUMENTS)
    assert not set(train) & set(valid)


def test_validation_source(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Held out.")
    prepare.prepare(str(text), tmp_path / "out", valid=str(other))
    assert decoded(tmp_path / "out", "train") == DOCUMENTS
    assert decoded(tmp_path / "out", "valid") == ["Held out."]


def test_end_of_text_in_a_document_stays_text() -> None:
    documents = ["plain", f"before {EOT_TEXT} after", EOT_TEXT]
    tokens = gpt2().encode_documents(documents)
    assert tokens.dtype == np.uint16
    assert np.count_nonzero(tokens == EOT) == len(documents)
    expected = [token for d in documents for token in [*tokenizer().encode_ordinary(d), EOT]]
    assert tokens.tolist() == expected
    assert gpt2().encode_documents(documents[:1]).tolist() == expected[: expected.index(EOT) + 1]


@pytest.mark.parametrize("stray", [f"{EOT_TEXT} first", f"in {EOT_TEXT} between", f"last {EOT_TEXT}", EOT_TEXT])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_single_stray_marker_stays_text(stray: str, place: int) -> None:
    documents = ["one", "two two", "three"]
    documents[place] = stray
    expected = [token for d in documents for token in [*tokenizer().encode_ordinary(d), EOT]]
    assert gpt2().encode_documents(documents).tolist() == expected


@pytest.mark.skipif(not TINYSTORIES.exists(), reason="needs TinyStories in ../shared, which no clone has")
def test_joined_encoding_is_that_of_each_document() -> None:
    text = sources.stream(str(TINYSTORIES), "train")
    assert text
    documents = [piece.text for chunk in text.chunks() for piece in chunk.pieces][:500]
    expected = [token for d in documents for token in [*tokenizer().encode_ordinary(d), EOT]]
    assert gpt2().encode_documents(documents).tolist() == expected


class Stopped(BaseException):
    """Ctrl-C, or whatever else may stop a run at any moment."""


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Sets the moment at which an error stops the run: the n-th call of whatever writes, syncs or renames from now."""
    left = 0
    raised: BaseException = Stopped()

    def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise raised
            return function(*args, **kwargs)

        return call

    def stop(n: int, error: BaseException) -> None:
        nonlocal left, raised
        left, raised = n, error

    monkeypatch.setattr(ShardWriter, "write", stopping(ShardWriter.write))
    monkeypatch.setattr(os, "fsync", stopping(lambda fd: None))
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, stopping(getattr(os, name)))
    return stop


@pytest.fixture
def sources_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, str | float | None]]:
    """A source of every kind, with what goes to validation."""
    monkeypatch.setattr(sources, "STORIES", {"train": (0, 5_000), "valid": (1, 3_000)})
    for module in (formats, records, json_values):
        monkeypatch.setattr(module, "BLOCK", 300)  # a group of documents
    monkeypatch.setattr(formats, "LONGEST_PIECE", 500)
    monkeypatch.setattr(prepare, "CHECKPOINT_EVERY", 1000)
    texts = [*DOCUMENTS[:60], "a long one " * 100, "\u65e5\u672c" * 300, *DOCUMENTS[60:90]]
    (tmp_path / "text.txt").write_text(f"\r\n{EOT_TEXT}\r\n".join(texts))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    txt, jsonl = str(tmp_path / "text.txt"), str(tmp_path / "text.jsonl")
    for name, packed in (("text.txt.gz", gzip.compress), ("text.jsonl.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(packed((tmp_path / name).with_suffix("").read_bytes()))
    (tmp_path / "text.json").write_text(json.dumps(texts, ensure_ascii=False))
    with (tmp_path / "text.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["id", "text"], *enumerate(texts)])
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, tmp_path / "text.parquet", row_group_size=7)
    (tmp_path / "folder").mkdir()
    for i in range(4):
        (tmp_path / "folder" / f"{i}.txt").write_text(EOT_TEXT.join(texts[i::4]))
    (tmp_path / "book.txt").write_text("\n".join(texts))
    kinds = {path.name: (str(path), 0.3) for path in tmp_path.iterdir()}
    return kinds | {"two": (txt, jsonl), "stories": ("stories", None)}


KINDS = ["text.txt", "text.jsonl", "two", "stories", "text.txt.gz", "text.jsonl.zst", "text.json", "text.csv"]
KINDS += ["text.parquet", "folder", "book.txt"]


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    kind: str,
    tmp_path: Path,
    sources_to_stop: dict[str, tuple[str, str | float | None]],
    stop_at: Callable[[int, BaseException], None],
) -> None:
    source, valid = sources_to_stop[kind]
    prepare.prepare(source, tmp_path / "whole", valid, shard_tokens=300)
    whole = contents(tmp_path / "whole")
    assert {"train-00002.bin", "valid-00001.bin"} < whole.keys()
    stops = 0
    some = kind in KINDS[4:]  # those differ in their reading alone, so a few of the moments will do
    for first in count(1, 11 if some else 2):
        stops_before = stops
        out = tmp_path / str(first)
        for n in (first, first // 2, 0):  # the second stop is in what goes on after the first
            stop_at(n, Stopped() if first % 4 == 1 else OSError(28, "No space left on device"))
            try:
                prepare.prepare(source, out, valid, workers=1 + n % 3, shard_tokens=300)
            except (Stopped, OSError):
                stops += 1
            if out.exists():
                break
        left = contents(out)
        left.pop(prepare.CHECKPOINT, None)  # where the stop came between the folder's rename and the end
        assert left == whole
        assert not out.with_name(f"{first}.partial").exists()
        if stops == stops_before:
            break
    assert stops > (5 if some else 30)


def test_what_a_checkpoint_holds_is_not_done_again(
    tmp_path: Path,
    sources_to_stop: dict[str, tuple[str, str | float | None]],
    stop_at: Callable[[int, BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, valid = sources_to_stop["two"]
    encoded: list[str] = []
    encode = GPT2Tokenizer.encode_documents

    def counted(self: GPT2Tokenizer, documents: list[str], special_tokens: bool) -> np.ndarray:
        encoded.extend(documents)
        return encode(self, documents, special_tokens)

    monkeypatch.setattr(GPT2Tokenizer, "encode_documents", counted)
    prepare.prepare(source, tmp_path / "whole", valid, shard_tokens=300)
    size = sum(map(len, encoded))
    encoded.clear()
    for n in (50, 40, 0):
        stop_at(n, Stopped())
        with suppress(Stopped):
            prepare.prepare(source, tmp_path / "out", valid, workers=1, shard_tokens=300)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    waiting = 3 * (prepare.BATCH + 500)  # batches ahead, each of up to one long document more
    assert size < sum(map(len, encoded)) < size + 2 * (prepare.CHECKPOINT_EVERY + waiting) + 100
    err = capsys.readouterr().err
    assert err.count("the same command goes on from") == err.count("going on from") == 2


@pytest.mark.parametrize("change", ["text", "shard_tokens", "valid", "version", "tokenizer", "special"])
def test_other_inputs_start_anew(
    change: str,
    tmp_path: Path,
    sources_to_stop: dict[str, tuple[str, str | float | None]],
    stop_at: Callable[[int, BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, valid = sources_to_stop["text.txt"]
    stop_at(30, Stopped())
    with pytest.raises(Stopped):
        prepare.prepare(source, tmp_path / "out", valid, shard_tokens=300)
    shard_tokens = 300
    if change == "text":
        Path(source).write_bytes(Path(source).read_bytes().replace(b"bear", b"wolf"))
        os.utime(source, ns=(0, 0))
    elif change == "shard_tokens":
        shard_tokens = 400
    elif change == "valid":
        valid = 0.4
    elif change == "version":
        monkeypatch.setattr(prepare, "VERSION", 0)
    elif change == "tokenizer":
        monkeypatch.setattr(GPT2Tokenizer, "sha256", "of another")
    special = change == "special"  # GPT-2's tokenizer has the same checksum with and without
    removed: list[str] = []
    remove = os.remove

    def noted(path: Path) -> None:
        removed.append(path.name)
        remove(path)

    monkeypatch.setattr(os, "remove", noted)
    meta = prepare.prepare(source, tmp_path / "out", valid, shard_tokens=shard_tokens, special_tokens=special)
    assert meta.get("special_tokens", False) is special
    assert capsys.readouterr().err.count("starting anew: ") == 1
    assert removed[0] == "checkpoint.json"  # first: it would vouch for what is gone
    assert {"train-00000.bin", "valid-00000.bin"} < set(removed)
    prepare.prepare(source, tmp_path / "whole", valid, shard_tokens=shard_tokens, special_tokens=special)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["byte", "short", "missing", "header"])
def test_damage_since_the_checkpoint_is_found(
    damage: str,
    tmp_path: Path,
    sources_to_stop: dict[str, tuple[str, str | float | None]],
    stop_at: Callable[[int, BaseException], None],
) -> None:
    source, valid = sources_to_stop["text.txt"]
    stop_at(30, Stopped())
    with pytest.raises(Stopped):
        prepare.prepare(source, tmp_path / "out", valid, shard_tokens=300)
    partial = tmp_path / "out.partial"
    shards = json.loads((partial / prepare.CHECKPOINT).read_text())["shards"]["train"]
    assert [shard["tokens"] < 300 for shard in shards[-2:]] == [False, True]
    unfinished = partial / shards[-1]["name"]
    if damage == "byte":
        with unfinished.open("r+b") as f:
            f.seek(70)
            f.write(b"\0\1")
    elif damage == "short":
        os.truncate(unfinished, 70)
    elif damage == "missing":
        unfinished.unlink()
    else:
        os.truncate(partial / shards[-2]["name"], 10)
    with pytest.raises(InputError, match=r"shard .*train-0.*prepare it again"):
        prepare.prepare(source, tmp_path / "out", valid, shard_tokens=300)
    assert not partial.exists()


def test_a_run_without_a_checkpoint_leaves_nothing(
    text: Path, tmp_path: Path, stop_at: Callable[[int, BaseException], None]
) -> None:
    stop_at(20, Stopped())
    with pytest.raises(Stopped):
        prepare.prepare(str(text), tmp_path / "out", shard_tokens=100)
    assert os.listdir(tmp_path) == [text.name]


def test_parts_without_a_checkpoint_are_replaced(text: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "train-00007.bin").write_bytes(b"half")
    (partial / "checkpoint.json.tmp").write_bytes(b"half")
    prepare.prepare(str(text), tmp_path / "out", valid=0.2)
    assert sorted(contents(tmp_path / "out")) == ["meta.json", "train-00000.bin", "valid-00000.bin"]


def test_killed_as_a_process(tmp_path: Path, sources_to_stop: dict[str, tuple[str, str | float | None]]) -> None:
    """`kill -9` while it writes, where no line of ours runs any more."""
    source, _ = sources_to_stop["text.txt"]
    out = tmp_path / "out"
    program = (
        "import os, signal; from data.text import formats, prepare\n"
        "formats.BLOCK, formats.LONGEST_PIECE, prepare.BATCH, prepare.CHECKPOINT_EVERY = 300, 500, 200, 1000\n"
        "write, left = prepare.ShardWriter.write, {left}\n"
        "def killed(*args):\n"
        "    global left\n"
        "    left -= 1\n"
        "    write(*args)\n"
        "    left or os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare.ShardWriter.write = killed\n"
        "prepare.prepare({source!r}, {out!r}, 0.3, shard_tokens=300)\n"
    )
    codes = []
    for left in (12, 12, 0):
        line = [sys.executable, "-c", program.format(left=left, source=source, out=str(out))]
        ended = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
        codes.append(ended.returncode)
    assert codes == [-9, -9, 0]
    assert "going on from" in ended.stderr
    prepare.prepare(source, tmp_path / "whole", 0.3, shard_tokens=300)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "name",
    ["thesis.tex", "train-00000.bin.bak", "my-train-00000.bin", "train-.bin", "checkpoint-json", "meta.json.tmp.tmp"],
)
def test_never_deletes_what_is_not_its_own(name: str, text: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / name).write_text("precious")
    with pytest.raises(InputError, match=rf"{re.escape(name)} is in the way and not ours; move it or name another"):
        prepare.prepare(str(text), tmp_path / "out", valid=0.2)
    assert (partial / name).read_text() == "precious"


def test_two_runs_at_once(text: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "train-00000.bin").write_bytes(b"another run's")
    refusal = rf"process {os.getpid()} on .* is preparing {tmp_path}/out; wait for it or name another"
    with locked(tmp_path / "out.lock"), pytest.raises(InputError, match=refusal):
        prepare.prepare(str(text), tmp_path / "out", valid=0.2)
    assert (partial / "train-00000.bin").read_bytes() == b"another run's"
    prepare.prepare(str(text), tmp_path / "out", valid=0.2)  # once that has ended


def test_empty_folder_is_taken(text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare.prepare(str(text), tmp_path / "out", valid=0.2)
    assert len(contents(tmp_path / "out")) == 3


@pytest.fixture
def bad_inputs(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files that the bad command lines below name, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/thesis.tex").touch()
    Path("one.txt").write_text(" a\n")
    Path("one.txt,text.txt").write_text("both")
    Path("binary.txt").write_bytes(b"\x80abc")
    Path("out2.partial").touch()
    yield
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("", "required: SOURCE, --out"),
        ("text.txt --out", "expected one argument; see `"),
        ("nowhere.txt --out out", "no file nowhere.txt"),
        (", --out out", "',' has a comma with no name beside it"),
        ("text.txt, --out out", "'text.txt,' has a comma with no name beside it"),
        ("text.txt --valid one.txt, --out out", "'one.txt,' has a comma with no name beside it"),
        ("one.txt text.txt --out out", "one.txt,text.txt is the name of a file or folder too; rename that"),
        ("binary.txt --out out", "not UTF-8 at byte 0"),
        ("text.txt --out full", "never overwritten"),
        ("text.txt --out text.txt", "never overwritten"),
        ("text.txt --out text.txt/deeper", "Not a directory"),
        ("text.txt --out out2", "in the way"),
        ("text.txt --out out --valid 1.5", "fraction of 1.5 is not between 0 and 1; a common one is 0.01"),
        ("text.txt --out out --valid 1", "fraction of 1 is not between 0 and 1"),
        ("text.txt --out out --valid 0", "fraction of 0 is not between 0 and 1"),
        ("text.txt --out out --valid nan", "between 0 and 1"),
        ("text.txt --out out --valid text.txt", "both training and validation"),
        ("text.txt --out out --valid nowhere.txt", "no file nowhere.txt"),
        ("one.txt --out out", "one.txt holds a single character, which cannot be both"),
        ("text.txt --out out --errors ignore", "invalid choice: 'ignore'"),
        ("full one.txt --out out", "full holds no file in a format that can be read"),
        ("text.txt --out out --workers 0", "0 workers cannot tokenise; give 1 or more"),
        ("text.txt --out out --workers two", "invalid int value"),
        ("text.txt --out out --shard-tokens 0", "a shard must hold 1 to 100,000,000 tokens, not 0"),
        ("text.txt --out out --shard-tokens 100000001", "must hold 1 to 100,000,000 tokens, not 100,000,001"),
    ],
)
def test_bad_command_lines(
    options: str,
    fault: str,
    bad_inputs: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare", *options.split()])
    with pytest.raises(SystemExit) as e:
        cli.run(prepare.main)
    assert e.value.code == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line and not line.startswith("tokenising")]
    assert out == ""
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert fault in errors[0]


def test_as_a_process(text: Path, tmp_path: Path) -> None:
    def command(*options: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "data.text.prepare", *options]
        return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)

    good = command(str(text), "--out", str(tmp_path / "out"), "--valid", "0.2")
    assert (good.returncode, good.stdout.count("documents")) == (0, 2)
    assert "100%" in good.stderr
    prepare.prepare(str(text), tmp_path / "here", valid=0.2)
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
    again = command(str(text), "--out", str(tmp_path / "out"))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
