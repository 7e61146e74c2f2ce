"""A checkpoint's checksums, and which checkpoint is offered in the place of a damaged one."""

import hashlib
from pathlib import Path

import pytest

from data.checkpoints.checkpoint import WEIGHTS, load, resolve, save
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.checkpoints.sums import SUMS, checkpoints, remedy, verify, write_sums
from data.cli import InputError

CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=2, n_head=2)


@pytest.fixture
def summed(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save(folder, CONFIG, initial_weights(CONFIG, 0))
    (folder / "notes.txt").write_text("notes")
    write_sums(folder)
    return folder


def test_a_checkpoint_is_on_the_disk_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's own name, then each file and its name, the configuration behind the weights."""
    events: list[str] = []
    monkeypatch.setattr("os.fsync", lambda fd: events.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    save(tmp_path / "runs" / "model", CONFIG, initial_weights(CONFIG, 0))
    assert events == ["runs", f"{WEIGHTS}.tmp", "model", "config.json.tmp", "model"]
    write_sums(tmp_path / "runs" / "model")
    assert events[5:] == [f"{SUMS}.tmp", "model"]


def test_checksums_are_those_of_sha256sum(summed: Path) -> None:
    names = sorted(path.name for path in summed.iterdir() if path.name != SUMS)
    assert {"config.json", WEIGHTS, "notes.txt"} <= set(names)
    lines = [f"{hashlib.sha256((summed / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    assert (summed / SUMS).read_text() == "".join(lines)
    verify(summed)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_files_that_are_not_what_was_written_are_not_loaded(name: str, summed: Path) -> None:
    """Though each could be: another epsilon, another weight."""
    raw = (summed / name).read_bytes()
    changed = raw.replace(b"1e-05", b"1e-06") if name == "config.json" else raw[:-1] + bytes([raw[-1] ^ 1])
    assert changed != raw
    (summed / name).write_bytes(changed)
    sentence = (
        rf"model/{name} differs from what was written \(its SHA-256 is not the one in SHA256SUMS\); if that was meant, "
        rf"run `python -m data.runs.accept .*/model`; if not, download or copy it again$"
    )
    with pytest.raises(InputError, match=sentence):
        load(summed)
    (summed / SUMS).unlink()
    load(summed)


def test_what_is_not_loaded_may_be_damaged(summed: Path) -> None:
    (summed / "notes.txt").write_text("other notes")
    load(summed)
    verify(summed, WEIGHTS, "config.json")
    for names in ((), ("notes.txt",), ("config.json", "notes.txt")):
        with pytest.raises(InputError, match=r"model/notes.txt differs from what was written"):
            verify(summed, *names)
    (summed / "notes.txt").unlink()
    with pytest.raises(InputError, match=r"model/notes.txt is missing; if that was meant, .*; if not, download"):
        verify(summed)
    (summed / "more.txt").write_text("")
    with pytest.raises(InputError, match=r"model/more.txt differs from what was"):  # not listed
        verify(summed, "more.txt")


@pytest.mark.parametrize(
    "content", ["", "\n", "0" * 64 + "  x", "0" * 63 + "  x\n", "A" * 64 + "  x\n", "0" * 64 + " x\n"]
)
def test_damaged_checksums(content: str, summed: Path) -> None:
    (summed / SUMS).write_text(content)
    with pytest.raises(InputError, match=r"model/SHA256SUMS is damaged; download"):
        load(summed)
    with (summed / SUMS).open("wb") as f:
        f.write(b"\xff" * 64 + b"  x\n")
    with pytest.raises(InputError, match=r"model/SHA256SUMS is damaged; download"):
        verify(summed)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps that text would sort otherwise, and beside them what is none."""
    run = tmp_path / "run"
    for step in (2000, 500, 1000, 20):
        checkpoint = run / "checkpoints" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text(str(step))
        write_sums(checkpoint)
    for name in ("step-3000.partial", "step-", "step-x", "best-9000", "step-" + "9" * 19):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step-4000").write_text("a file")
    return run


def test_checkpoints_come_by_their_steps(run: Path) -> None:
    names = [path.name for path in checkpoints(run / "checkpoints")]
    assert names == ["step-20", "step-500", "step-1000", "step-2000"]
    assert checkpoints(run / "nowhere") == []


def test_the_newest_good_checkpoint_is_offered(run: Path) -> None:
    """In place of the damaged one, and of a `latest` that names none; itself it is never offered."""
    folder = run / "checkpoints"
    offered = f"the newest good checkpoint of the run is {folder}/step-1000, pass that"
    assert remedy(folder / "step-2000") == offered  # whatever is wrong with it, its checksums are right
    (folder / "step-500" / "weights").write_text("damaged")
    with pytest.raises(
        InputError, match=rf"if not, the newest good checkpoint of the run is {folder}/step-2000, pass that$"
    ):
        verify(folder / "step-500")
    (folder / "step-2000" / "weights").write_text("damaged")
    with pytest.raises(
        InputError, match=rf"step-2000/weights differs .*; if not, the newest good .* is {folder}/step-1000,"
    ):
        verify(folder / "step-2000")
    (folder / "step-1000" / SUMS).unlink()
    missing = (
        rf"step-1000 is no whole checkpoint \(SHA256SUMS is missing\); the newest good .* is {folder}/step-20, pass"
    )
    with pytest.raises(InputError, match=missing):
        verify(folder / "step-1000")
    (folder / "latest").write_text("step-7" + "0" * 60)
    named = (
        rf"latest does not name a checkpoint beside it \('step-7{'0' * 34}'\); the newest good .* is {folder}/step-20, "
    )
    with pytest.raises(InputError, match=named):
        resolve(run)
    (folder / "step-20" / "weights").unlink()
    with pytest.raises(InputError, match=r"step-20/weights is missing; if .*; if not, download or copy it again$"):
        verify(folder / "step-20")
