import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.checkpoint import read_safetensors, write_safetensors
from data.cli import InputError
from data.config import GPT2Config
from data.initialize import initial_weights
from data.run_folder import RunFolder, load_checkpoint, refuse_occupied

CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=1, n_head=2)
PNG = b"\x89PNG\r\n\x1a\n"


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / 3 + step, "val_loss": 2.5} if step else {"step": 0, "val_loss": 3.5}


def parts(step: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """The parameters, moments and trainer.json of a checkpoint, different for each step."""
    arrays = initial_weights(CONFIG, step)
    moments = {f"{m}.{name}": a + step for m in ("exp_avg", "exp_avg_sq") for name, a in arrays.items()}
    return arrays, moments, {"step": step, "tokens": 10 * step, "seconds": 0.5, "loader": {"position": step}}


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
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_what_a_run_leaves(run: RunFolder) -> None:
    assert json.loads((run.path / "run.json").read_text(encoding="utf-8")) == {"seed": 1}
    assert rows(run) == run.metrics == [row(step) for step in range(5)]
    assert sorted(os.listdir(run.path / "checkpoints")) == ["latest", "step-0", "step-2", "step-4"]
    samples = (run.path / "samples.md").read_text(encoding="utf-8")
    assert samples.startswith("## Step 0\n\nA text\n\nof step 0.\n\n---\n\n## Step 2\n")


def test_checkpoints_come_back_exactly(run: RunFolder) -> None:
    config, arrays, moments, state = load_checkpoint(run.path)
    expected = parts(4)
    assert (config, state) == (CONFIG, expected[2])
    for ours, theirs in ((arrays, expected[0]), (moments, expected[1])):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])


def test_draw(run: RunFolder) -> None:
    run.draw()
    assert (run.path / "loss.png").read_bytes().startswith(PNG)


def test_an_occupied_folder_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds a run; pass `--resume .*run`"):
        RunFolder.create(run.path, {})
    assert json.loads((run.path / "run.json").read_text(encoding="utf-8")) == {"seed": 1}
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="is not empty; pass another --out"):
            refuse_occupied(path)
    (tmp_path / "empty").mkdir()
    refuse_occupied(tmp_path / "empty")
    refuse_occupied(tmp_path / "new")


def test_resuming_forgets_what_came_after_the_checkpoint(run: RunFolder) -> None:
    resumed = RunFolder.resume(run.path, 2)
    assert rows(resumed) == resumed.metrics == [row(step) for step in range(3)]
    assert resumed.samples == [(0, "A text\n\nof step 0."), (2, "A text\n\nof step 2.")]
    resumed.add_metrics(row(3))
    resumed.add_sample(4, "new")
    assert rows(resumed) == [row(step) for step in range(4)]
    samples = (run.path / "samples.md").read_text(encoding="utf-8")
    assert samples.count("## Step") == 3
    assert samples.endswith("of step 2.\n\n---\n\n## Step 4\n\nnew\n\n---\n\n")


def test_resuming_overlooks_half_a_line_at_the_end(run: RunFolder) -> None:
    """Such as a run leaves that was killed while it wrote."""
    with open(run.path / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 5, "lo')
    assert RunFolder.resume(run.path, 4).metrics == [row(step) for step in range(5)]
    assert rows(run) == [row(step) for step in range(5)]


def test_resuming_overlooks_half_a_letter_of_a_sample(run: RunFolder) -> None:
    with open(run.path / "samples.md", "ab") as f:
        f.write("## Step 5\n\né".encode()[:-1])
    assert [step for step, _ in RunFolder.resume(run.path, 4).samples] == [0, 2, 4]


@pytest.mark.parametrize("line", ["{no JSON}\n", "[]\n", "3\n", '{"loss": 1}\n', '{"step": "x"}\n', "\xff\n"])
def test_damaged_metrics_are_refused(line: str, run: RunFolder) -> None:
    with open(run.path / "metrics.jsonl", "a", encoding="latin-1") as f:
        f.write(line)
    before = (run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing or damaged"):
        RunFolder.resume(run.path, 4)
    assert (run.path / "metrics.jsonl").read_bytes() == before


def test_missing_metrics_are_refused(run: RunFolder) -> None:
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing or damaged"):
        RunFolder.resume(run.path, 4)


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
    assert load_checkpoint(run.path)[3]["step"] == 4


def test_what_a_killed_run_left_does_not_hinder(run: RunFolder) -> None:
    for name in ("step-6.partial", "step-6"):  # the second: killed before `latest` named it
        (run.path / "checkpoints" / name).mkdir()
        (run.path / "checkpoints" / name / "rubbish").write_text("")
    arrays, moments, state = parts(6)
    folder = run.save_checkpoint(CONFIG, arrays, moments, state)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "optimizer.safetensors", "trainer.json"]
    assert not (run.path / "checkpoints" / "step-6.partial").exists()
    assert load_checkpoint(run.path)[3]["step"] == 6


def test_moments_of_another_model_are_refused(run: RunFolder) -> None:
    folder = run.path / "checkpoints" / "step-4"
    moments = read_safetensors(folder / "optimizer.safetensors")
    moments.pop("exp_avg.ln_f.bias")
    write_safetensors(folder / "optimizer.safetensors", moments, {"format": "pt"})
    with pytest.raises(InputError, match="does not fit the model"):
        load_checkpoint(run.path)


@pytest.mark.parametrize(
    "state", [{}, {"step": "4", "tokens": 0, "loader": {}}, {"step": 4, "tokens": 0, "loader": []}]
)
def test_a_damaged_trainer_state_is_refused(state: dict[str, Any], run: RunFolder) -> None:
    (run.path / "checkpoints" / "step-4" / "trainer.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"trainer\.json is damaged"):
        load_checkpoint(run.path)
