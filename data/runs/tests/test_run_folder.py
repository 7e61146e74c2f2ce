import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.checkpoints.checkpoint import latest_checkpoint, load
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.checkpoints.sums import SUMS, verify, write_sums
from data.checkpoints.tensors import read_safetensors, write_safetensors
from data.cli import InputError
from data.runs.run_folder import (
    RunFolder,
    load_checkpoint,
    read_metrics,
    read_samples,
    read_sealed,
    refuse_occupied,
    write_sealed,
)

CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=1, n_head=2)
ORIGIN = {"command": ["again"]}
Change = Callable[[bytes], bytes]


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / 3 + step, "val_loss": 2.5} if step else {"step": 0, "val_loss": 3.5}


def parts(step: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """The parameters, moments and trainer.json of a checkpoint, different for each step."""
    arrays = initial_weights(CONFIG, step)
    moments = {f"{m}.{name}": a + step for m in ("exp_avg", "exp_avg_sq") for name, a in arrays.items()}
    state = {"step": step, "tokens": 10 * step, "seconds": 0.5, "loader": {"position": step}, "options": {"seed": 1}}
    return arrays, moments, state


def state_of(run: RunFolder, step: int) -> dict[str, Any]:
    """What trainer.json of a checkpoint says."""
    return load_checkpoint(run.path / "checkpoints" / f"step-{step}")[3]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of four steps with checkpoints at 0, 2 and 4."""
    run = RunFolder.create(tmp_path / "deep" / "run", {"seed": 1})
    for step in range(5):
        run.add_metrics(row(step))
        if step % 2 == 0:
            run.add_sample(step, f"A text\n\nof step {step}.")
            arrays, moments, state = parts(step)
            run.save_checkpoint(CONFIG, arrays, moments, state)
    return run


def rows(run: RunFolder) -> list[Any]:
    return read_metrics(run.path)


def test_what_a_run_leaves(run: RunFolder) -> None:
    assert read_sealed(run.path / "run.json") == {"seed": 1}
    assert rows(run) == run.metrics == [row(step) for step in range(5)]
    assert sorted(os.listdir(run.path / "checkpoints")) == ["latest", "step-0", "step-2", "step-4"]
    samples = (run.path / "samples.md").read_text(encoding="utf-8")
    assert samples.startswith("## Step 0\n\nA text\n\nof step 0.\n\n---\n\n## Step 2\n")


def test_checkpoints_come_back_exactly(run: RunFolder) -> None:
    config, arrays, moments, state = load_checkpoint(latest_checkpoint(run.path))
    expected = parts(4)
    metrics = hashlib.sha256((run.path / "metrics.jsonl").read_bytes()).hexdigest()
    assert (config, state) == (CONFIG, expected[2] | {"metrics": metrics})
    for ours, theirs in ((arrays, expected[0]), (moments, expected[1])):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])


def test_an_occupied_folder_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds a run; pass `--resume .*run`"):
        RunFolder.create(run.path, {})
    assert read_sealed(run.path / "run.json") == {"seed": 1}
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="is not empty; pass another --out"):
            refuse_occupied(path)
    (tmp_path / "empty").mkdir()
    refuse_occupied(tmp_path / "empty")
    refuse_occupied(tmp_path / "new")


def test_what_a_run_killed_at_its_beginning_left_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.tmp").write_text("{")
    assert read_sealed(RunFolder.create(tmp_path / "run", {"seed": 1}).path / "run.json") == {"seed": 1}


def test_resuming_forgets_what_came_after_the_checkpoint(run: RunFolder) -> None:
    (run.path / "checkpoints" / "step-9.partial").mkdir()  # of a run that was killed while it saved
    scores = [{"step": step, "task": "t"} for step in (0, 2, 3, 4)]
    write_sealed(run.path / "evaluation.json", {"rows": scores})
    resumed = RunFolder.resume(run.path, state_of(run, 2), ORIGIN)
    assert rows(resumed) == resumed.metrics == [row(step) for step in range(3)]
    assert read_sealed(run.path / "evaluation.json") == {"rows": scores[:2]}
    assert resumed.samples == [(0, "A text\n\nof step 0."), (2, "A text\n\nof step 2.")]
    assert latest_checkpoint(run.path).name == "step-2"  # killed now, it goes on from here
    assert sorted(os.listdir(run.path / "checkpoints")) == ["latest", "step-0", "step-2"]
    resumed.add_metrics(row(3))
    resumed.add_sample(4, "new")
    assert rows(resumed) == [row(step) for step in range(4)]
    samples = (run.path / "samples.md").read_text(encoding="utf-8")
    assert samples.count("## Step") == 3
    assert samples.endswith("of step 2.\n\n---\n\n## Step 4\n\nnew\n\n---\n\n")
    assert read_sealed(run.path / "run.json") == {"seed": 1, "continued": [ORIGIN]}


def test_the_metrics_of_a_resumed_run_are_vouched_for_too(run: RunFolder) -> None:
    resumed = RunFolder.resume(run.path, state_of(run, 2), ORIGIN)
    assert not (run.path / "checkpoints" / "step-4").exists()
    for step in (3, 4):
        resumed.add_metrics(row(step))
    arrays, moments, state = parts(4)
    resumed.save_checkpoint(CONFIG, arrays, moments, state)
    assert RunFolder.resume(run.path, state_of(run, 4), ORIGIN).metrics == [row(step) for step in range(5)]


def test_resuming_a_run_without_a_checkpoint_begins_it_anew(run: RunFolder) -> None:
    shutil.rmtree(run.path / "checkpoints")
    resumed = RunFolder.resume(run.path, None, ORIGIN)
    assert (rows(resumed), resumed.metrics, resumed.samples) == ([], [], [])


def test_resuming_overlooks_half_a_line_at_the_end(run: RunFolder) -> None:
    """Such as a run leaves that was killed while it wrote."""
    with open(run.path / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 5, "lo')
    assert RunFolder.resume(run.path, state_of(run, 4), ORIGIN).metrics == [row(step) for step in range(5)]
    assert rows(run) == [row(step) for step in range(5)]


def test_resuming_overlooks_half_a_letter_of_a_sample(run: RunFolder) -> None:
    with open(run.path / "samples.md", "ab") as f:
        f.write("## Step 5\n\né".encode()[:-1])
    assert [step for step, _ in RunFolder.resume(run.path, state_of(run, 4), ORIGIN).samples] == [0, 2, 4]


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda c: flipped(c, 30), lambda c: flipped(c, len(c) - 2), lambda c: c[:-1], lambda c: c[:20], lambda c: b""],
)
def test_damaged_metrics_are_refused(damage: Change, run: RunFolder) -> None:
    path = run.path / "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    before, state = path.read_bytes(), state_of(run, 4)
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing or damaged; begin a run with `--init .*step-4`"):
        RunFolder.resume(run.path, state, ORIGIN)
    assert path.read_bytes() == before


def test_missing_metrics_are_refused(run: RunFolder) -> None:
    state = state_of(run, 4)
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing or damaged"):
        RunFolder.resume(run.path, state, ORIGIN)


@pytest.mark.parametrize("change", [lambda c: c.replace(b"1", b"2"), lambda c: c[:-5], lambda c: b"{}"])
def test_a_changed_run_json_is_refused(change: Change, run: RunFolder) -> None:
    path = run.path / "run.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        read_sealed(path)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.json", SUMS])
@pytest.mark.parametrize("change", [lambda c: flipped(c, len(c) // 2), lambda c: c[:-1], lambda c: c + b" ", None])
def test_a_damaged_checkpoint_is_refused_and_a_good_one_named(file: str, change: Change | None, run: RunFolder) -> None:
    """Whichever bit: most of them are of numbers, in which nothing else would notice it."""
    folder = run.path / "checkpoints" / "step-4"
    if change:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
    else:
        (folder / file).unlink()
    with pytest.raises(InputError, match=r"step-4.*the newest good checkpoint of the run is .*step-2, pass that"):
        load_checkpoint(folder)
    if file in ("model.safetensors", "config.json"):  # all that is loaded to generate
        with pytest.raises(InputError, match=r"the newest good checkpoint of the run is .*step-2, pass that"):
            load(run.path)
    assert load_checkpoint(run.path / "checkpoints" / "step-2")[3]["step"] == 2


def test_the_newest_good_checkpoint_is_not_a_damaged_one(run: RunFolder) -> None:
    for step in (2, 4):
        os.truncate(run.path / "checkpoints" / f"step-{step}" / "model.safetensors", 100)
    with pytest.raises(InputError, match=r"the newest good checkpoint of the run is .*step-0, pass that"):
        load_checkpoint(run.path / "checkpoints" / "step-4")
    os.truncate(run.path / "checkpoints" / "step-0" / "trainer.json", 5)
    with pytest.raises(InputError, match="download or copy it again"):
        load_checkpoint(run.path / "checkpoints" / "step-4")


@pytest.mark.parametrize("named", [None, "", "step-7", "../step-4", "latest"])
def test_where_latest_names_nothing_a_good_one_is_named(named: str | None, run: RunFolder) -> None:
    latest = run.path / "checkpoints" / "latest"
    if named is None:
        latest.unlink()
    else:
        latest.write_text(named)
    with pytest.raises(InputError, match=r"the newest good checkpoint of the run is .*step-4, pass that"):
        latest_checkpoint(run.path)


def test_sums_are_what_sha256sum_reads(run: RunFolder) -> None:
    folder = run.path / "checkpoints" / "step-4"
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=folder, check=False).returncode == 0
    assert set(os.listdir(folder)) == {SUMS, *(line.split()[1] for line in (folder / SUMS).read_text().splitlines())}


def test_steps_are_numbers(tmp_path: Path) -> None:
    """As text 10 and 100 come before 9."""
    run = RunFolder.create(tmp_path / "run", {})
    states = {}
    for step in range(101):
        run.add_metrics(row(step))
        if step in (0, 9, 10, 100):
            run.add_sample(step, "A text.")
            run.save_checkpoint(CONFIG, *parts(step))
            states[step] = state_of(run, step)
    run.prune({9, 10, 100})
    assert sorted(os.listdir(run.path / "checkpoints")) == ["latest", "step-10", "step-100", "step-9"]
    os.truncate(run.path / "checkpoints" / "step-100" / "model.safetensors", 100)
    with pytest.raises(InputError, match=r"the newest good checkpoint of the run is .*step-10, pass that"):
        load(run.path)
    resumed = RunFolder.resume(run.path, states[10], ORIGIN)
    assert sorted(os.listdir(run.path / "checkpoints")) == ["latest", "step-10", "step-9"]
    assert [step for step, _ in resumed.samples] == [0, 9, 10]
    assert len(resumed.metrics) == 11


def test_resuming_keeps_the_checkpoints_before(run: RunFolder) -> None:
    RunFolder.resume(run.path, state_of(run, 4), ORIGIN)
    assert sorted(os.listdir(run.path / "checkpoints")) == ["latest", "step-0", "step-2", "step-4"]


@pytest.mark.parametrize("at", [12, -3])
def test_a_line_after_the_checkpoint_is_vouched_for_by_itself(at: int, run: RunFolder) -> None:
    """By its checksum: its number, and the checksum itself."""
    run.add_metrics(row(5))
    path = run.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(read_metrics(run.path)) == 6
    line = bytearray(lines[5])
    line[at - 1 if at < 0 else at] ^= 1
    path.write_bytes(b"".join(lines[:5]) + bytes(line))
    with pytest.raises(ValueError, match=r"not as it was written|Expecting|Invalid|delimiter"):
        read_metrics(run.path)


def test_lines_before_the_checkpoint_are_those_it_was_saved_with(run: RunFolder) -> None:
    """One with a right checksum of its own may still be of another run."""
    other = RunFolder(run.path.with_name("other"))
    other.path.mkdir()
    for step in range(5):
        other.add_metrics(row(step) | {"loss": 7.0})
    shutil.copy(other.path / "metrics.jsonl", run.path)
    with pytest.raises(ValueError, match="other bytes than were written"):
        read_metrics(run.path)
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing or damaged"):
        RunFolder.resume(run.path, state_of(run, 4), ORIGIN)


def test_what_is_sealed_can_be_told_in_any_order_of_names(tmp_path: Path) -> None:
    """The checksum is of what is said, not of how."""
    write_sealed(tmp_path / "a.json", {"b": 1, "a": {"d": [2.5], "c": None}})
    said = json.loads((tmp_path / "a.json").read_text())
    assert said["sha256"] == hashlib.sha256(b'{"a": {"c": null, "d": [2.5]}, "b": 1}').hexdigest()
    (tmp_path / "a.json").write_text(json.dumps(dict(reversed(said.items()))))
    assert read_sealed(tmp_path / "a.json") == {"b": 1, "a": {"d": [2.5], "c": None}}


def test_samples_as_they_are_read(run: RunFolder) -> None:
    """Steps of any length; what a text says of steps itself is text; the last may be cut short."""
    run.add_sample(1000, "Line\n## Step\n\nof it.")
    with open(run.path / "samples.md", "a", encoding="utf-8") as f:
        f.write("## Step 1500\n\ncut sh")
    assert read_samples(run.path / "samples.md") == [
        *((step, f"A text\n\nof step {step}.") for step in (0, 2, 4)),
        (1000, "Line\n## Step\n\nof it."),
        (1500, "cut sh"),
    ]


def test_a_model_of_the_run_is_what_latest_names(run: RunFolder) -> None:
    run.name("latest", "step-2")
    assert (run.path / "checkpoints" / "latest").read_text() == "step-2\n"
    np.testing.assert_array_equal(load(run.path)[1]["wte.weight"], parts(2)[0]["wte.weight"])


def test_pruning(run: RunFolder) -> None:
    run.prune({0, 4})
    assert sorted(os.listdir(run.path / "checkpoints")) == ["latest", "step-0", "step-4"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer.json", "latest"])
def test_a_full_disk_leaves_the_earlier_checkpoint(file: str, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    arrays, moments, state = parts(6)
    with pytest.raises(OSError, match="No space"):
        run.save_checkpoint(CONFIG, arrays, moments, state)
    monkeypatch.undo()
    left = os.listdir(run.path / "checkpoints")
    assert not [name for name in left if name.endswith((".partial", ".tmp"))]
    assert ("step-6" in left) == (file == "latest")
    assert load_checkpoint(latest_checkpoint(run.path))[3]["step"] == 4


def test_what_a_killed_run_left_does_not_hinder(run: RunFolder) -> None:
    for name in ("step-6.partial", "step-6"):  # the second: killed before `latest` named it
        (run.path / "checkpoints" / name).mkdir()
        (run.path / "checkpoints" / name / "rubbish").write_text("")
    arrays, moments, state = parts(6)
    folder = run.save_checkpoint(CONFIG, arrays, moments, state)
    assert "rubbish" not in os.listdir(folder)
    assert not (run.path / "checkpoints" / "step-6.partial").exists()
    assert load_checkpoint(latest_checkpoint(run.path))[3]["step"] == 6


def test_moments_of_another_model_are_refused(run: RunFolder) -> None:
    folder = run.path / "checkpoints" / "step-4"
    moments = read_safetensors(folder / "optimizer.safetensors")
    moments.pop("exp_avg.ln_f.bias")
    write_safetensors(folder / "optimizer.safetensors", moments, {"format": "pt"})
    (folder / SUMS).unlink()
    write_sums(folder)
    verify(folder)
    with pytest.raises(InputError, match="does not fit the model"):
        load_checkpoint(folder)


@pytest.mark.parametrize("wrong", [None, "missing"])
@pytest.mark.parametrize("name", ["step", "tokens", "seconds", "metrics", "loader", "options"])
def test_a_damaged_trainer_state_is_refused(name: str, wrong: str | None, run: RunFolder) -> None:
    """Whichever of its parts is missing, or of another kind."""
    folder = run.path / "checkpoints" / "step-4"
    state = json.loads((folder / "trainer.json").read_text())
    for content, whole in ((state, True), (state | {"seconds": 3}, True), ({**state, name: wrong}, False)):
        if wrong and not whole:
            del content[name]
        (folder / "trainer.json").write_text(json.dumps(content))
        (folder / SUMS).unlink()
        write_sums(folder)
        if whole:
            assert load_checkpoint(folder)[3] == content
        else:
            with pytest.raises(InputError, match=r"trainer\.json is damaged; the newest good checkpoint of the run is"):
                load_checkpoint(folder)
