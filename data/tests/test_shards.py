import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from data.cli import InputError
from data.shards import (
    HEADER,
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
from data.tokenizer import VOCAB_SIZE

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
    assert raw[64:] == TOKENS[800:].astype("<u2").tobytes()


def test_round_trip(prepared: Path) -> None:
    shards = open_split(prepared, "train")
    assert isinstance(shards[0], np.memmap)
    assert shards[0].dtype == np.uint16
    np.testing.assert_array_equal(np.concatenate(shards), TOKENS)
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


def header(**changes: Any) -> bytes:
    fields = {"magic": b"GPT2TOKS", "version": 1, "vocabulary": VOCAB_SIZE, "count": 400, "sha256": b""} | changes
    return HEADER.pack(*fields.values())


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda raw: b"", "is empty"),
        (lambda raw: raw[:30], "truncated within its header"),
        (lambda raw: raw[:-1], "is truncated"),
        (lambda raw: raw + b"\0\0", "wrong size"),
        (lambda raw: b"PK\3\4" + raw[4:], "is no shard"),
        (lambda raw: header(version=2) + raw[64:], "format version 2"),
        (lambda raw: header(vocabulary=50304) + raw[64:], "vocabulary of 50304"),
        (lambda raw: header(count=0), "wrong size"),
    ],
)
def test_damaged_shard(damage: Callable[[bytes], bytes], fault: str, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train-00000.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"train-00000\.bin .*{fault}.*python -m data\.prepare"):
        open_shard(path)


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train-00000\.bin is missing"):
        open_shard(tmp_path / "train-00000.bin")


@pytest.mark.parametrize(("token", "fault"), [(7, "corrupted"), (VOCAB_SIZE, f"token {VOCAB_SIZE}, beyond")])
def test_verify_reads_every_token(token: int, fault: str, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepared / "valid-00002.bin"
    monkeypatch.setattr("data.shards.VERIFY_BLOCK", 64)
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

    monkeypatch.setattr("data.shards.verify_folder", slow)
    verification = Verification(prepared)
    verification.check()  # does not wait
    begin.set()
    for timeout in (None, 0):
        with pytest.raises(InputError, match=r"valid-00002\.bin is corrupted"):
            verification.check(timeout)


def test_command_line(prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["shards", str(prepared)])
    main()
    assert capsys.readouterr().out.splitlines()[0] == "train: 1,000 tokens in 3 shard(s), whole"


def test_a_shard_of_another_folder(prepared: Path) -> None:
    write(prepared, tokens=TOKENS[::-1].copy())
    with pytest.raises(InputError, match=r"train-00000\.bin is not the one"):
        open_split(prepared, "train")


def test_unknown_split(prepared: Path) -> None:
    with pytest.raises(InputError, match="no split 'test'; the splits are train and valid"):
        open_split(prepared, "test")


def test_not_a_prepared_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder .*nowhere.*python -m data\.prepare SOURCE --out DIR"):
        read_meta(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no meta\.json.*python -m data\.prepare SOURCE --out DIR"):
        read_meta(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"version": 1}', "\udcff"])
def test_damaged_meta(content: str, prepared: Path) -> None:
    (prepared / "meta.json").write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=r"meta\.json is damaged"):
        read_meta(prepared)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda meta: meta.update(version=2), "format version 2"),
        (lambda meta: meta.update(tokenizer="00"), "another tokenizer"),
        (lambda meta: meta.update(checksum="00"), "damaged"),
        (lambda meta: meta["splits"].pop("valid"), "damaged"),
        (lambda meta: meta["splits"]["train"].update(tokens=999), "damaged"),
        (lambda meta: meta["splits"]["train"]["shards"][1].update(sha256="00"), "damaged"),
        (lambda meta: meta["splits"]["train"]["shards"][1].update(name=1), "damaged"),
    ],
)
def test_meta_that_contradicts_itself(change: Callable[[Any], Any], fault: str, prepared: Path) -> None:
    meta = read_meta(prepared)
    change(meta)
    (prepared / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=fault):
        read_meta(prepared)
