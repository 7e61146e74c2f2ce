import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import cli, prepare, sources
from data.cli import InputError
from data.prepare import encode
from data.shards import open_split, verify
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
    documents = list(text.documents())[:500]
    expected = [token for d in documents for token in [*tokenizer().encode_ordinary(d), EOT]]
    assert encode(documents).tolist() == expected


def test_interrupted_run_leaves_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bool] = []

    def interrupted(documents: list[str], fraction: float) -> Any:
        written.append((tmp_path / "out.partial").is_dir())
        if len(written) > 20:
            raise KeyboardInterrupt
        return {"train": (len(documents), encode(documents))}

    monkeypatch.setattr(prepare, "_encode_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(str(text), tmp_path / "out", workers=1, shard_tokens=100)
    assert all(written)
    assert os.listdir(tmp_path) == [text.name]


def test_parts_of_a_killed_run_are_replaced(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "train-00007.bin").write_bytes(b"half")
    (partial / "train-00008.bin.tmp").write_bytes(b"half")
    prepare.prepare(str(text), tmp_path / "out", valid=0.2)
    assert "replacing" in capsys.readouterr().err
    assert sorted(contents(tmp_path / "out")) == ["meta.json", "train-00000.bin", "valid-00000.bin"]


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
