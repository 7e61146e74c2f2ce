import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from data.cli import InputError
from data.testing import call, refused
from data.text.shards import (
    HEADER,
    MAX_SHARD_TOKENS,
    SPLITS,
    ShardWriter,
    Verification,
    main,
    open_shard,
    open_split,
    read_meta,
    verify,
    verify_folder,
    write_meta,
)
from data.text.tokenizer import RANKS, VOCAB_SIZE

TOKENS = np.arange(1000, dtype=np.uint16) * 50  # 50 * 999 = 49950, a token of the vocabulary


def write(folder: Path, split: str = "train", tokens: np.ndarray = TOKENS, shard_tokens: int = 400) -> list[Any]:
    with ShardWriter(folder, split, shard_tokens) as writer:
        for start in range(0, len(tokens), 333):
            writer.write(tokens[start : start + 333])
    return writer.shards


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    splits = {
        split: {"source": "a test", "documents": 1, "tokens": len(TOKENS), "shards": write(tmp_path, split)}
        for split in ("train", "valid")
    }
    write_meta(tmp_path, splits)
    return tmp_path


def test_layout_on_disk(tmp_path: Path) -> None:
    shards = write(tmp_path)
    assert [shard["tokens"] for shard in shards] == [400, 400, 200]
    assert sorted(p.name for p in tmp_path.iterdir()) == [shard["name"] for shard in shards]
    raw = (tmp_path / "train-00002.bin").read_bytes()
    assert raw[:8] == b"GPT2TOKS"
    assert int.from_bytes(raw[8:12], "little") == 1
    assert int.from_bytes(raw[12:16], "little") == VOCAB_SIZE
    assert int.from_bytes(raw[16:24], "little") == 200
    assert raw[24:56] == hashlib.sha256(raw[64:]).digest()
    assert raw[56:64] == bytes(8)
    assert raw[64:] == TOKENS[800:].astype("<u2").tobytes()
    assert shards[2] == {"name": "train-00002.bin", "tokens": 200, "sha256": hashlib.sha256(raw[64:]).hexdigest()}


def test_meta_json(tmp_path: Path) -> None:
    splits = {
        split: {"source": "", "documents": 1, "tokens": len(tokens), "shards": write(tmp_path, split, tokens)}
        for split, tokens in {"train": TOKENS, "valid": TOKENS[:500]}.items()
    }
    written = write_meta(tmp_path, splits)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert list(meta) == ["version", "tokenizer", "checksum", "splits"]
    assert meta["version"] == 1
    assert meta["tokenizer"] == hashlib.sha256(RANKS.read_bytes()).hexdigest()
    names = ["train-00000.bin", "train-00001.bin", "train-00002.bin", "valid-00000.bin", "valid-00001.bin"]
    sums = [hashlib.sha256((tmp_path / name).read_bytes()[64:]).hexdigest() for name in names]
    assert meta["checksum"] == hashlib.sha256("".join(sums).encode()).hexdigest()
    assert meta["splits"] == splits
    assert read_meta(tmp_path) == meta == written


def test_a_shard_is_of_a_hundred_million_tokens_at_most(tmp_path: Path) -> None:
    assert ShardWriter(tmp_path, "train").shard_tokens == MAX_SHARD_TOKENS == 100_000_000


def test_one_token_more_than_a_shard_begins_another(tmp_path: Path) -> None:
    for count, shards in ((4, [4]), (5, [4, 1]), (8, [4, 4]), (9, [4, 4, 1])):
        found = write(tmp_path, tokens=TOKENS[:count], shard_tokens=4)
        assert [shard["tokens"] for shard in found] == shards
        with ShardWriter(tmp_path, "train", 4) as writer:  # and token by token
            for i in range(count):
                writer.write(TOKENS[i : i + 1])
        assert writer.shards == found


def test_nothing_written_is_no_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", 400) as writer:
        writer.write(TOKENS[:0])
        assert writer.sync() == []
    assert writer.shards == []
    assert not list(tmp_path.iterdir())


def test_shards_are_read_in_the_order_of_meta_json(tmp_path: Path) -> None:
    """Which is no order of names: the hundred-thousandth has a digit more."""
    shards = write(tmp_path)
    for shard, number in zip(shards, ("99999", "100000", "100001"), strict=True):
        (tmp_path / shard["name"]).rename(tmp_path / f"train-{number}.bin")
        shard["name"] = f"train-{number}.bin"
    split = {"source": "", "documents": 1, "tokens": len(TOKENS), "shards": shards}
    valid = {"source": "", "documents": 1, "tokens": 5, "shards": write(tmp_path, "valid", TOKENS[:5])}
    write_meta(tmp_path, {"train": split, "valid": valid})
    np.testing.assert_array_equal(np.concatenate(open_split(tmp_path, "train")), TOKENS)
    np.testing.assert_array_equal(np.concatenate(open_split(tmp_path, "valid")), TOKENS[:5])


def test_what_is_synced_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `sync` lists is in the files then, and asked of the disk; so are a finished shard and its name."""
    synced: list[str] = []
    headers: list[bytes] = []

    def sync(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        synced.append(path.name)
        if path.is_file():
            headers.append(path.read_bytes()[:8])

    monkeypatch.setattr("os.fsync", sync)
    with ShardWriter(tmp_path, "train", 400) as writer:
        writer.write(TOKENS[:450])
        assert headers == [b"GPT2TOKS"]
        assert synced == [tmp_path.name, "train-00000.bin", tmp_path.name]
        shards = writer.sync()
        assert synced[3:] == ["train-00001.bin"]
        assert [(shard["name"], shard["tokens"]) for shard in shards] == [
            ("train-00000.bin", 400),
            ("train-00001.bin", 50),
        ]
        written = (tmp_path / "train-00001.bin").read_bytes()
        assert written == bytes(64) + TOKENS[400:450].astype("<u2").tobytes()
        assert shards[1]["sha256"] == hashlib.sha256(written[64:]).hexdigest()
        shards.clear()
        assert len(writer.sync()) == 2  # the list is the caller's
    assert synced[-1] == "train-00001.bin"


def test_round_trip(prepared: Path) -> None:
    shards = open_split(prepared, "train")
    assert isinstance(shards[0], np.memmap)
    assert shards[0].dtype == np.uint16
    np.testing.assert_array_equal(np.concatenate(shards), TOKENS)
    with pytest.raises(ValueError, match="read-only"):
        shards[0][0] = 1
    for i in range(3):
        verify(prepared / f"train-0000{i}.bin")


def test_a_half_shard_is_none(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, "train", 400) as writer:
            writer.write(TOKENS[:500])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    verify(tmp_path / "train-00000.bin")
    with pytest.raises(InputError, match="is no shard"):
        open_shard(tmp_path / "train-00001.bin")


@pytest.mark.parametrize("synced", [0, 1, 399, 400, 401, 999, 1000])
def test_going_on_behind_what_was_synced(synced: int, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = write(tmp_path / "whole")
    with suppress(KeyboardInterrupt), ShardWriter(tmp_path, "train", 400) as writer:
        writer.write(TOKENS[:synced])
        shards = writer.sync()
        writer.write(TOKENS[::-1].copy())
        raise KeyboardInterrupt
    assert sum(shard["tokens"] for shard in shards) == synced
    with ShardWriter(tmp_path, "train", 400, shards) as writer:
        writer.write(TOKENS[synced:])
    assert writer.shards == whole
    for shard in whole:
        assert (tmp_path / shard["name"]).read_bytes() == (tmp_path / "whole" / shard["name"]).read_bytes()


@pytest.mark.parametrize(
    ("number", "damage", "fault"),
    [
        (0, lambda path: path.unlink(), "is missing"),
        (0, lambda path: os.truncate(path, 862), "is truncated: 862 bytes"),
        (0, lambda path: path.write_bytes(header() + path.read_bytes()[64:]), "is not the one that its folder lists"),
        (1, lambda path: path.unlink(), "is missing"),
        (1, lambda path: os.truncate(path, 662), "is corrupted: its tokens differ"),
        (1, lambda path: path.write_bytes(path.read_bytes()[:662] + b"xy" * 9), "is corrupted: its tokens differ"),
    ],
)
def test_what_was_synced_has_to_be_there(
    number: int, damage: Callable[[Path], Any], fault: str, tmp_path: Path
) -> None:
    """The finished shard, and the one that was not."""
    with suppress(KeyboardInterrupt), ShardWriter(tmp_path, "train", 400) as writer:
        writer.write(TOKENS[:700])
        shards = writer.sync()
        raise KeyboardInterrupt
    damage(tmp_path / f"train-0000{number}.bin")
    with pytest.raises(InputError, match=rf"train-0000{number}\.bin {fault}.*; prepare it again"):
        ShardWriter(tmp_path, "train", 400, shards)


def header(**changes: Any) -> bytes:
    fields = {"magic": b"GPT2TOKS", "version": 1, "vocabulary": VOCAB_SIZE, "count": 400, "sha256": b""} | changes
    return HEADER.pack(*fields.values())


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda raw: b"", "is empty"),
        (lambda raw: raw[:63], "truncated within its header"),
        (lambda raw: raw[:-1], "is truncated: 863 bytes, its header's 400 tokens need 864"),
        (lambda raw: raw[:64], "is truncated: 64 bytes, its header's 400 tokens need 864"),
        (lambda raw: raw + b"\0\0", "has a wrong size: 866 bytes, its header's 400 tokens need 864"),
        (lambda raw: b"PK\3\4" + raw[4:], "is no shard"),
        (lambda raw: header(version=2) + raw[64:], "has format version 2, this program reads version 1"),
        (lambda raw: header(vocabulary=50304) + raw[64:], "a vocabulary of 50304, the tokenizer one of 50257"),
        (lambda raw: header(count=0), "has a wrong size: 64 bytes, its header's 0 tokens need 64"),
    ],
)
def test_damaged_shard(damage: Callable[[bytes], bytes], fault: str, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train-00000.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"train-00000\.bin .*{fault}.*python -m data\.text\.prepare"):
        open_shard(path)


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train-00000\.bin is missing"):
        open_shard(tmp_path / "train-00000.bin")


@pytest.mark.parametrize(("token", "fault"), [(7, "corrupted"), (VOCAB_SIZE, f"token {VOCAB_SIZE}, beyond")])
def test_verify_reads_every_token(token: int, fault: str, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepared / "valid-00002.bin"
    monkeypatch.setattr("data.text.shards.VERIFY_BLOCK", 64)
    np.memmap(path, "<u2", "r+", offset=64)[199] = token
    open_shard(path)  # does not read them
    with pytest.raises(InputError, match=rf"valid-00002\.bin .*{fault}"):
        verify(path)
    monkeypatch.setattr(sys, "argv", ["shards", str(prepared)])
    with pytest.raises(InputError, match=rf"valid-00002\.bin .*{fault}"):
        main()


def test_verification_in_the_background(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Verification(prepared).check(timeout=None)
    np.memmap(prepared / "valid-00002.bin", "<u2", "r+", offset=64)[199] = 7
    begin = Event()

    def slow(folder: Path) -> None:
        begin.wait()
        verify_folder(folder)

    monkeypatch.setattr("data.text.shards.verify_folder", slow)
    verification = Verification(prepared)
    verification.check()  # does not wait
    assert verification.daemon  # nor does a program that ends
    begin.set()
    for timeout in (None, 0):
        with pytest.raises(InputError, match=r"valid-00002\.bin is corrupted"):
            verification.check(timeout)


def test_whatever_ends_a_verification_is_told(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only that tokens are damaged: also that the disk fails."""

    def fail(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("data.text.shards.verify_folder", fail)
    with pytest.raises(OSError, match="Input/output error"):
        Verification(prepared).check(timeout=None)


def test_command_line(prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["shards", str(prepared)])
    main()
    assert capsys.readouterr().out.splitlines() == [
        "train: 1,000 tokens in 3 shard(s), whole",
        "valid: 1,000 tokens in 3 shard(s), whole",
    ]


def test_as_a_process(prepared: Path) -> None:
    line = [sys.executable, "-m", "data.text.shards", str(prepared)]
    ended = subprocess.run(line, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("train: 1,000 tokens in 3 shard(s), whole\n")


def test_the_command_reads_both_splits_and_refuses_in_a_sentence(prepared: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        tokens = np.memmap(prepared / f"{split}-00001.bin", "<u2", "r+", offset=64)
        whole = tokens[0]
        tokens[0] = whole + 1
        refused(call(main, prepared, cwd=tmp_path), f"{split}-00001.bin is corrupted: its tokens differ")
        tokens[0] = whole
    assert call(main, prepared, cwd=tmp_path).code == 0
    refused(call(main, cwd=tmp_path), "required: DIR; see `")


def test_the_last_token_of_the_vocabulary_is_one(tmp_path: Path) -> None:
    write(tmp_path, tokens=np.array([0, VOCAB_SIZE - 1], np.uint16))
    verify(tmp_path / "train-00000.bin")
    path = tmp_path / "train-00000.bin"
    damaged = np.array([VOCAB_SIZE, 65535], "<u2").tobytes()
    path.write_bytes(header(count=2, sha256=hashlib.sha256(damaged).digest()) + damaged)
    with pytest.raises(InputError, match=r"train-00000\.bin holds token 65535, beyond the vocabulary of 50257"):
        verify(path)


def test_a_folder_of_no_tokens_is_damaged(tmp_path: Path) -> None:
    """One of a single token is none to train on, but whole."""
    train = {"source": "", "documents": 1, "tokens": 1, "shards": write(tmp_path, tokens=TOKENS[:1])}
    write_meta(tmp_path, {"train": train, "valid": train})
    assert read_meta(tmp_path)["splits"]["valid"]["tokens"] == 1
    write_meta(tmp_path, {"train": train, "valid": {"source": "", "documents": 1, "tokens": 0, "shards": []}})
    with pytest.raises(InputError, match=r"meta\.json is damaged; prepare it again"):
        read_meta(tmp_path)


@pytest.mark.parametrize("change", ["tokens", "sha256"])
def test_a_shard_that_its_folder_lists_otherwise(change: str, prepared: Path) -> None:
    """Of another length with the same checksum in its header, or the other way round."""
    path = prepared / "train-00002.bin"
    raw = path.read_bytes()
    tokens = raw[64:-2] if change == "tokens" else raw[64:]
    digest = raw[24:56] if change == "tokens" else bytes(32)
    path.write_bytes(header(count=len(tokens) // 2, sha256=digest) + tokens)
    with pytest.raises(InputError, match=r"train-00002\.bin is not the one that its folder lists"):
        open_split(prepared, "train")
    open_split(prepared, "valid")


def test_a_shard_of_another_folder(prepared: Path) -> None:
    write(prepared, tokens=TOKENS[::-1].copy())
    with pytest.raises(InputError, match=r"train-00000\.bin is not the one"):
        open_split(prepared, "train")


def test_unknown_split(prepared: Path) -> None:
    with pytest.raises(InputError, match="no split 'test'; the splits are train and valid"):
        open_split(prepared, "test")


def test_not_a_prepared_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder .*nowhere.*python -m data\.text\.prepare SOURCE --out DIR"):
        read_meta(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no meta\.json.*python -m data\.text\.prepare SOURCE --out DIR"):
        read_meta(tmp_path)


DEEP = pytest.param("[" * 10**5, id="deep")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"version": 1}', "\udcff", DEEP])
def test_damaged_meta(content: str, prepared: Path) -> None:
    (prepared / "meta.json").write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=r"meta\.json is damaged"):
        read_meta(prepared)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda meta: meta.update(version=2), "has format version 2, this program reads version 1"),
        (lambda meta: meta.update(tokenizer="00"), "another tokenizer"),
        (lambda meta: meta.update(given={"source": 1, "valid": None}), "damaged"),
        (lambda meta: meta.update(given="a.txt"), "damaged"),
        (lambda meta: meta.update(checksum="00"), "damaged"),
        (lambda meta: meta["splits"].pop("valid"), "damaged"),
        (lambda meta: meta["splits"]["train"].update(tokens=999), "damaged"),
        (lambda meta: meta["splits"]["train"]["shards"][1].update(sha256="00"), "damaged"),
        (lambda meta: meta["splits"]["train"]["shards"][1].update(name=1), "damaged"),
        (lambda meta: meta["splits"]["valid"].update(documents=0), "damaged"),
        (lambda meta: meta["splits"]["valid"].update(documents=-1), "damaged"),
        (lambda meta: meta["splits"]["valid"].update(tokens=1001), "damaged"),
        (lambda meta: meta["splits"]["valid"]["shards"][2].update(tokens=199), "damaged"),
    ],
)
def test_meta_that_contradicts_itself(change: Callable[[Any], Any], fault: str, prepared: Path) -> None:
    meta = read_meta(prepared)
    change(meta)
    (prepared / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=fault):
        read_meta(prepared)
