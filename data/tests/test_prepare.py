import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import cli, prepare, sources
from data.cli import InputError
from data.prepare import encode
from data.shards import ShardWriter, open_split, verify
from data.tokenizer import EOT, EOT_TEXT, tokenizer

REPOSITORY = Path(__file__).parents[2]
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
    monkeypatch.setattr(prepare, "tokenizer", lambda: encoding)


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
    tokens = encode(documents)
    assert tokens.dtype == np.uint16
    assert np.count_nonzero(tokens == EOT) == len(documents)
    expected = [token for d in documents for token in [*tokenizer().encode_ordinary(d), EOT]]
    assert tokens.tolist() == expected
    assert encode(documents[:1]).tolist() == expected[: len(encode(documents[:1]))]


@pytest.mark.skipif(not TINYSTORIES.exists(), reason="needs ../shared/data/tinystories/valid.txt")
def test_joined_encoding_is_that_of_each_document() -> None:
    text = sources.stream(str(TINYSTORIES), "train")
    assert text
    documents = [document for group, _ in text.documents() for document in group][:500]
    expected = [token for d in documents for token in [*tokenizer().encode_ordinary(d), EOT]]
    assert encode(documents).tolist() == expected


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
    monkeypatch.setattr(sources, "BLOCK", 300)  # a group of documents
    monkeypatch.setattr(sources, "LONGEST_DOCUMENT", 500)
    monkeypatch.setattr(prepare, "CHECKPOINT_EVERY", 1000)
    texts = [*DOCUMENTS[:60], "a long one " * 100, "\u65e5\u672c" * 300, *DOCUMENTS[60:90]]
    (tmp_path / "text.txt").write_text(f"\r\n{EOT_TEXT}\r\n".join(texts))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    txt, jsonl = str(tmp_path / "text.txt"), str(tmp_path / "text.jsonl")
    return {"txt": (txt, 0.3), "jsonl": (jsonl, 0.3), "two": (txt, jsonl), "stories": ("stories", None)}


@pytest.mark.parametrize("kind", ["txt", "jsonl", "two", "stories"])
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
    for first in count(1, 2):
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
    assert stops > 30


def test_what_a_checkpoint_holds_is_not_done_again(
    tmp_path: Path,
    sources_to_stop: dict[str, tuple[str, str | float | None]],
    stop_at: Callable[[int, BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, valid = sources_to_stop["two"]
    encoded: list[str] = []

    def counted(documents: list[str]) -> np.ndarray:
        encoded.extend(documents)
        return encode(documents)

    monkeypatch.setattr(prepare, "encode", counted)
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


@pytest.mark.parametrize("change", ["text", "shard_tokens", "valid"])
def test_other_inputs_start_anew(
    change: str,
    tmp_path: Path,
    sources_to_stop: dict[str, tuple[str, str | float | None]],
    stop_at: Callable[[int, BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, valid = sources_to_stop["txt"]
    stop_at(30, Stopped())
    with pytest.raises(Stopped):
        prepare.prepare(source, tmp_path / "out", valid, shard_tokens=300)
    shard_tokens = 300
    if change == "text":
        Path(source).write_bytes(Path(source).read_bytes().replace(b"bear", b"wolf"))
        os.utime(source, ns=(0, 0))
    elif change == "shard_tokens":
        shard_tokens = 400
    else:
        valid = 0.4
    prepare.prepare(source, tmp_path / "out", valid, shard_tokens=shard_tokens)
    assert capsys.readouterr().err.count("starting anew: ") == 1
    prepare.prepare(source, tmp_path / "whole", valid, shard_tokens=shard_tokens)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["byte", "short", "missing", "header"])
def test_damage_since_the_checkpoint_is_found(
    damage: str,
    tmp_path: Path,
    sources_to_stop: dict[str, tuple[str, str | float | None]],
    stop_at: Callable[[int, BaseException], None],
) -> None:
    source, valid = sources_to_stop["txt"]
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
    source, _ = sources_to_stop["txt"]
    out = tmp_path / "out"
    program = (
        "import os, signal; from data import prepare, sources\n"
        "sources.BLOCK, sources.LONGEST_DOCUMENT, prepare.BATCH, prepare.CHECKPOINT_EVERY = 300, 500, 200, 1000\n"
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


def test_never_deletes_what_is_not_its_own(text: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.tex is in the way"):
        prepare.prepare(str(text), tmp_path / "out", valid=0.2)
    assert (partial / "thesis.tex").read_text() == "precious"


def test_two_runs_at_once(text: Path, tmp_path: Path) -> None:
    with prepare._partial_folder(tmp_path / "out"), pytest.raises(InputError, match="another run is preparing"):
        prepare.prepare(str(text), tmp_path / "out", valid=0.2)


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
    Path("one.txt").write_text("a single document")
    Path("binary.txt").write_bytes(b"\x80abc")
    Path("out2.partial").touch()
    yield
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("", "required: SOURCE, --out"),
        ("text.txt --out", "expected one argument"),
        ("nowhere.txt --out out", "no file nowhere.txt"),
        ("binary.txt --out out", "not UTF-8 at byte 0"),
        ("text.txt --out full", "never overwritten"),
        ("text.txt --out text.txt", "never overwritten"),
        ("text.txt --out text.txt/deeper", "Not a directory"),
        ("text.txt --out out2", "in the way"),
        ("text.txt --out out --valid 1.5", "between 0 and 1"),
        ("text.txt --out out --valid nan", "between 0 and 1"),
        ("text.txt --out out --valid text.txt", "both training and validation"),
        ("text.txt --out out --valid nowhere.txt", "no file nowhere.txt"),
        ("one.txt --out out", "none of the 1 document(s) of one.txt fell to valid"),
        ("text.txt --out out --workers 0", "0 workers"),
        ("text.txt --out out --workers two", "invalid int value"),
        ("text.txt --out out --shard-tokens 0", "1 to 100,000,000"),
        ("text.txt --out out --shard-tokens 100000001", "1 to 100,000,000"),
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
        line = [sys.executable, "-m", "data.prepare", *options]
        return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)

    good = command(str(text), "--out", str(tmp_path / "out"), "--valid", "0.2")
    assert (good.returncode, good.stdout.count("documents")) == (0, 2)
    assert "100%" in good.stderr
    prepare.prepare(str(text), tmp_path / "here", valid=0.2)
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
    again = command(str(text), "--out", str(tmp_path / "out"))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
