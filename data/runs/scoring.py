"""--eval-tasks: the model scored on tasks of lm-evaluation-harness while it is trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from data.checkpoints.checkpoint import latest_checkpoint
from data.checkpoints.sums import weights_sha256
from data.evaluation.scores import columns, keep, score_rows
from data.runs.implementation import Implementation
from data.runs.start import Start


class Scoring:
    """The scores of the model as it is, the same on all ranks; none where there are no tasks."""

    def __init__(self, start: Start, by: Implementation):
        self.start, self.by, self.options = start, by, start.options
        every = start.options.eval_tasks_every
        self.every = start.options.eval_every if every is None else every  # 0: at the ends alone
        self.rows: list[dict[str, Any]] = []  # the newest

    def __call__(self, step: int, ends: bool) -> dict[str, float]:
        """Columns for metrics.jsonl, if scores are due after this step, with which training may end. Standard errors,
        of which some take long, are of the last alone.
        """
        due = ends or (self.every and step % self.every == 0)
        if not due or not self.start.tasks:
            return {}
        assert self.by.subject
        results = self.start.tasks(
            replace(self.by.subject, ranks=self.start.ranks),
            self.options.eval_limit or None,
            stderr=step == self.options.steps,
            part=True,
            disable=self.options.quiet,
        )
        self.rows = score_rows(results)
        return columns(self.rows)

    def keep(self, run: Path) -> dict[str, float]:
        """Keeps the newest scores in the run, of its last checkpoint, as `evaluate` does. Returns their columns."""
        if self.rows:
            facts = {"device": self.by.device_name, "dtype": self.options.dtype}
            facts |= {"kernels": self.by.kernels} if self.by.kernels else {}
            of = {"step": self.options.steps, "weights": weights_sha256(latest_checkpoint(run)), "by": self.by.package}
            keep(run, self.rows, {**of, "limit": self.options.eval_limit or None, **facts})
        return columns(self.rows)
