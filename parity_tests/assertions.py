"""What the tests assert of the rows of a proof."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.checkpoints.checkpoint import load
from parity_tests.proof import Batch, Row, Setting, flow_rows, gradient_rows, judge, named
from torch_ref.testing import hugging_face_results, torch_results


def assert_passed(rows: Sequence[Row], culprit: str | None = None) -> None:
    """Fails, with the failing rows and the culprit, unless there are rows and all of them pass."""
    failed = [
        f"{r.check} {r.name}: error {r.error:.1e}, allowed {r.allowed:.1e} {r.reason}" for r in rows if not r.passed
    ]
    assert rows
    assert not failed, "\n".join([f"culprit: {culprit}", *failed])


def assert_passes_equal(setting: Setting, batches: Sequence[Batch], flows: bool = True) -> None:
    """Fails unless tinygrad's gradients, out of the graph that trains, are right, and with `flows` every edge too."""
    references = setting.references()
    rows = flow_rows(setting, references, batches) if flows else []
    rows += gradient_rows(setting, setting.trainer(), references, [[batch] for batch in batches])
    failed = [row for row in rows if not row.passed]
    assert_passed(rows, named(setting, failed, batches, 1) if failed else None)


def assert_reference_is_hugging_face(folder: Path, batches: Sequence[Batch]) -> None:
    """Fails unless the truth, torch_ref in float64, gives the logits, loss and gradients of HF's model in float64."""
    config, arrays = load(folder)
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    results = []
    for batch in batches:
        ours = torch_results(config, exact, *batch)
        results.append((hugging_face_results(folder, torch.float64, *batch), ours, ours))
    assert_passed(judge("gradient", "float64", results))
