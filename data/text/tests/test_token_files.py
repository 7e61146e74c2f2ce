"""Token files of nanoGPT and llm.c: read in place as our shards are, and refused where they are something else."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.cli import InputError
from data.testing import call, refused
from data.text import shards, token_files
from data.text.loader import Loader, windows
from data.text.prepare import prepared
from data.text.shards import Verification, open_split, read_meta, verify_folder

TRAIN, VALID = np.arange(1000, 31_000), np.arange(50_256, 49_000, -1)
ONE, TWO = "fineweb_train_000001.bin", "fineweb_train_000002.bin"


def bare(tokens: np.ndarray) -> bytes:
    return tokens.astype("<u2").tobytes()


def llm_c(tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """As llm.c's `write_datafile` has it."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + bare(tokens)


@pytest.fixture
def fineweb(tmp_path: Path) -> Path:
    folder = tmp_path / "fineweb"
    folder.mkdir()
    (folder / TWO).write_bytes(llm_c(TRAIN[9_000:]))
    (folder / ONE).write_bytes(llm_c(TRAIN[:9_000]))
    (folder / "fineweb_val_000000.bin").write_bytes(llm_c(VALID))
    return folder


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    folder = tmp_path / "nano"
    folder.mkdir()
    (folder / "train.bin").write_bytes(bare(TRAIN))
    (folder / "val.bin").write_bytes(bare(VALID))
    return folder


@pytest.fixture(params=["fineweb", "nano"])
def folder(request: pytest.FixtureRequest) -> Path:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Path)
    return found


def test_the_tokens_are_read_in_place(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    np.testing.assert_array_equal(np.concatenate(open_split(folder, "train")), TRAIN)
    np.testing.assert_array_equal(np.concatenate(open_split(folder, "valid")), VALID)
    assert all(isinstance(shard, np.memmap) and not shard.flags.writeable for shard in open_split(folder, "train"))
    verify_folder(folder)
    loader = Loader(folder, "train", 4, 7, seed=3)
    inputs, targets = loader.next_batch()
    order = np.random.default_rng((3, 0)).permutation((len(TRAIN) - 1) // 7)
    np.testing.assert_array_equal(inputs, [TRAIN[i * 7 : i * 7 + 7] for i in order[:4]])
    np.testing.assert_array_equal(targets, inputs + 1)
    (first, _), *_ = windows(folder, "valid", 2, 5)
    np.testing.assert_array_equal(first.ravel(), VALID[:10])
    assert prepared(str(folder)) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_stands_for_meta_json(folder: Path) -> None:
    meta = read_meta(folder)
    assert {split: found["tokens"] for split, found in meta["splits"].items()} == {"train": 30_000, "valid": 1256}
    assert [shard["name"] for shard in meta["splits"]["train"]["shards"]] in (["train.bin"], [ONE, TWO])
    with pytest.raises(InputError, match="there is no split 'val'; the splits are train and valid"):
        open_split(folder, "val")


@pytest.mark.parametrize("name", ["tiny_shakespeare_{}.bin", "TinyStories_{}.bin", "{}_7.bin", "a_train_{}_12.bin"])
def test_names(name: str, tmp_path: Path) -> None:
    for split, tokens in (("train", TRAIN), ("val", VALID)):
        (tmp_path / name.format(split)).write_bytes(llm_c(tokens))
    (tmp_path / "other.bin").write_bytes(b"of something else")
    np.testing.assert_array_equal(np.concatenate(open_split(tmp_path, "train")), TRAIN)
    np.testing.assert_array_equal(np.concatenate(open_split(tmp_path, "valid")), VALID)


def test_files_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"x_train_{number}.bin").write_bytes(llm_c(TRAIN[number : number + 1]))
    (tmp_path / "x_val_0.bin").write_bytes(llm_c(VALID))
    np.testing.assert_array_equal(np.concatenate(open_split(tmp_path, "train")), TRAIN[:12])


def test_a_file_is_what_its_header_says(nano: Path) -> None:
    """Also by nanoGPT's names: its header is not taken for tokens, which it could not be."""
    (nano / "train.bin").write_bytes(llm_c(TRAIN))
    np.testing.assert_array_equal(np.concatenate(open_split(nano, "train")), TRAIN)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (llm_c(TRAIN[:9])[:-2], "is truncated: 1,040 bytes, its header's 9 tokens need 1,042; copy or download it"),
        (llm_c(TRAIN[:9])[:-1], "is truncated: 1,041 bytes"),
        (llm_c(TRAIN)[:1023], "is truncated within its header"),
        (llm_c(TRAIN[:9]) + b"ab", "has a wrong size: 1,044 bytes"),
        (llm_c(TRAIN[:0]), "has a wrong size"),
        (llm_c(TRAIN[:9], count=-9), "has a wrong size"),
        (llm_c(TRAIN, version=2), "has version 2 of llm.c's form, not 1; pass its text as --data"),
        (llm_c(TRAIN, 20240801, 7), "holds uint32 tokens of Llama 3, not GPT-2's"),
        (llm_c(TRAIN, 20240522), r"is not of llm.c's form \(it does not begin with 20240520\)"),
        (bare(TRAIN), "is not of llm.c's form .* files without a header are named train.bin and val.bin"),
        (b"", "is not of llm.c's form"),
        (b"GPT2TOKS" + bytes(100), "holds a shard of prepared data"),
    ],
)
def test_files_of_another_form(content: bytes, fault: str, fineweb: Path) -> None:
    """Are refused at once, by headers and sizes alone."""
    (fineweb / ONE).write_bytes(content)
    for read in (lambda: open_split(fineweb, "train"), lambda: read_meta(fineweb)):
        with pytest.raises(InputError, match=rf"^{re.escape(str(fineweb / ONE))} {fault}"):
            read()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty; copy or write it again"),
        (b"abc", "ends within a token; copy or write it again"),
        (TRAIN.astype("<u4").tobytes(), "holds numbers of 32 bits or more, not GPT-2's tokens as uint16"),
        (TRAIN.astype("<i8").tobytes(), "holds numbers of 32 bits or more"),
        (bare(np.arange(30_000) % 65), "holds characters or bytes"),
        (
            bare(np.append(TRAIN, 50_257)),
            "holds token 50257, beyond GPT-2's vocabulary of 50257: it is damaged",
        ),
        (bare(np.append(TRAIN, np.zeros(15_000))), "has zeros in place of tokens: a part is missing"),
    ],
)
def test_tokens_of_another_kind(content: bytes, fault: str, nano: Path) -> None:
    """Are told from their samples, before a step is trained."""
    (nano / "train.bin").write_bytes(content)
    with pytest.raises(InputError, match=rf"train.bin {fault}"):
        read_meta(nano)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("wrong", [50_257, 0])
def test_verification_reads_every_token(
    wrong: int, split: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between the samples too: a token that GPT-2 does not have, or a stretch of zeros where a download has a gap."""
    for name, value in {"BLOCK": 512, "BLOCKS": 2, "MIN_BLOCKS": 2, "READ": 512}.items():
        monkeypatch.setattr(token_files, name, value)
    verify_folder(folder)
    shard = open_split(folder, split)[-1]
    path = Path(str(shard.filename))
    with open(path, "r+b") as f:
        f.seek(shard.offset + len(shard))  # in the middle: a token has two bytes
        f.write(bare(np.full(1 if wrong else 512, wrong)))
    read_meta(folder)  # the samples do not show it
    fault = f"{path.name} {'holds token 50257, beyond' if wrong else 'has zeros in place of tokens'}"
    with pytest.raises(InputError, match=fault):
        verify_folder(folder)
    with pytest.raises(InputError, match=fault):
        Verification(folder).check(timeout=None)
    refused(call(shards.main, folder, cwd=tmp_path), fault)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    result = call(shards.main, folder, cwd=tmp_path)
    assert result.code == 0
    train, valid = result.out.splitlines()
    assert re.fullmatch(r"train: 30,000 tokens in [12] shard\(s\), each of them one of GPT-2's", train)
    assert valid == "valid: 1,256 tokens in 1 shard(s), each of them one of GPT-2's"


def test_the_identity_is_of_content_and_names_alone(folder: Path, tmp_path: Path) -> None:
    """As it is documented; a copy elsewhere, at another time, is the same data."""
    identity = hashlib.sha256()
    for split, pattern in {"train": "*train*", "valid": "*val*"}.items():
        for path in sorted(folder.glob(pattern)):
            data = path.read_bytes()
            offset = 1024 if path.name.startswith("fineweb") else 0
            identity.update(f"{split} {path.name} {(len(data) - offset) // 2}\n".encode() + data)
    checksum = read_meta(folder)["checksum"]
    assert checksum == identity.hexdigest()  # so small that the samples are all of it
    shutil.copytree(folder, tmp_path / "copy")
    assert read_meta(tmp_path / "copy")["checksum"] == checksum


@pytest.mark.parametrize("change", ["first", "middle", "last", "header", "name", "more", "fewer", "swapped"])
def test_other_data_have_another_identity(change: str, fineweb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of samples: the first and the last block of tokens, and such as lie between; and a run does not go on with it."""
    for name, value in {"BLOCK": 64, "BLOCKS": 6, "MIN_BLOCKS": 2}.items():  # three blocks of each training file
        monkeypatch.setattr(token_files, name, value)
    state = Loader(fineweb, "train", 2, 8, seed=0).state()
    one, two = fineweb / ONE, fineweb / TWO
    match change:
        case "name":
            one.rename(fineweb / "fineweb_train_000000.bin")
        case "more":
            shutil.copy(one, fineweb / "fineweb_train_000003.bin")
        case "fewer":
            two.unlink()
        case "swapped":
            one.rename(fineweb / "other")
            two.rename(one)
            (fineweb / "other").rename(two)
        case _:
            at = {"header": 12, "first": 1024, "middle": 1024 + 2 * 4490, "last": 1024 + 2 * 8999}[change]
            data = one.read_bytes()
            one.write_bytes(data[:at] + b"\x07\x07" + data[at + 2 :])
    assert read_meta(fineweb)["checksum"] != state["data"]
    with pytest.raises(InputError, match="cannot resume: the checksum of the data was "):
        Loader(fineweb, "train", 2, 8, seed=0).restore(state)


def test_little_is_read_before_the_start(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 GB, nearly all of which is a hole in the file system."""
    read: list[int] = []
    pread = os.pread

    def counted(fd: int, size: int, at: int) -> bytes:
        read.append(size)
        return b"ab" * (size // 2) if size else pread(fd, size, at)

    monkeypatch.setattr(os, "pread", counted)
    with open(nano / "train.bin", "r+b") as f:
        f.truncate(2 << 30)
    assert read_meta(nano)["splits"]["train"]["tokens"] == 1 << 30
    assert sum(read) == 512 * 4096 + 2 * len(VALID)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (["train.bin"], "has no validation tokens: val.bin or val_000000.bin is missing; add it"),
        (["val.bin"], "has no training tokens: train.bin or train_000000.bin is missing"),
        (["x_train_1.bin"], "has no validation tokens: x_val.bin or x_val_000000.bin is missing"),
        (["x_train.bin", "y_val.bin"], r"holds the tokens of several texts \(x, y\); give each a folder of its own"),
        (["train.bin", "val.bin", "y_val.bin"], r"several texts \(train.bin, y\)"),
        (["train.bin", "val.bin", "meta.pkl"], r"has a vocabulary of its own \(meta.pkl\), so its tokens are not"),
        (["x_train.bin", "x_val.bin", "meta.pkl"], r"has a vocabulary of its own \(meta.pkl\)"),
    ],
)
def test_folders_that_are_refused(files: list[str], fault: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(llm_c(TRAIN))
    for read in (lambda: open_split(tmp_path, "train"), lambda: read_meta(tmp_path), lambda: verify_folder(tmp_path)):
        with pytest.raises(InputError, match=fault):
            read()


def test_links(fineweb: Path, tmp_path: Path) -> None:
    """As the hub's cache has them: errors have the file's name, not that of what it links to."""
    links = tmp_path / "links"
    links.mkdir()
    for number, path in enumerate(sorted(fineweb.iterdir())):
        (tmp_path / f"blob{number}").write_bytes(path.read_bytes())
        (links / path.name).symlink_to(tmp_path / f"blob{number}")
    assert [str(shard.filename) for shard in open_split(links, "train")] == [str(links / ONE), str(links / TWO)]
    np.testing.assert_array_equal(np.concatenate(open_split(links, "train")), TRAIN)
    assert read_meta(links)["checksum"] == read_meta(fineweb)["checksum"]
    (tmp_path / "blob0").unlink()
    with pytest.raises(InputError, match=rf"{ONE} is missing \(it is a link to nothing"):
        open_split(links, "train")


def test_what_we_prepare_is_no_folder_of_these(tmp_path: Path, fineweb: Path) -> None:
    """And half of it neither."""
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train-00000.bin").write_bytes(b"half")
    with pytest.raises(InputError, match=r"is no folder of prepared data \(it has no meta.json\)"):
        read_meta(tmp_path / "half")
    (fineweb / "meta.json").write_text("{}")
    with pytest.raises(InputError, match=r"meta.json is damaged"):
        read_meta(fineweb)


def test_a_single_file(fineweb: Path) -> None:
    with pytest.raises(InputError, match=rf"{ONE} is one file of tokens; give --data the folder with it"):
        prepared(str(fineweb / ONE))
