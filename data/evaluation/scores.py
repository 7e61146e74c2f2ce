"""The scores out of the harness's results, and where a run keeps them."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.cli import counted
from data.runs.run_folder import change_scores

# of a row that takes the place of an older one
SAME = ("step", "task", "version", "metric", "by", "limit", "shots", "file_sha256", "dtype", "kernels")


def score_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each score of a task: `task`, its `version`, `metric`, `value` and `stderr` (None: the harness has
    none); how many `questions` it is of, `of` how many, after how many examples (`shots`); what `chance` gives, where
    that is known; and the user's own `file`, if there is one, with its SHA-256. The metric has the name of its filter
    after it, where it has been through one.
    """
    rows = []
    for task, found in results["results"].items():
        counts, choices = results["n-samples"].get(task, {}), results.get("choices", {}).get(task)
        facts = {
            "questions": counts.get("effective"),
            "of": counts.get("original"),
            "version": results.get("versions", {}).get(task),
            "shots": results.get("n-shot", {}).get(task),
            **results.get("files", {}).get(task, {"file": None, "file_sha256": None}),
        }
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = found.get(f"{metric}_stderr,{kind}")
                known = isinstance(stderr, int | float) and math.isfinite(stderr)
                row = {"task": task, "metric": metric if kind == "none" else key, "value": float(value)}
                row |= {"stderr": float(stderr) if known else None}
                chance = sum(1 / n for n in choices) / len(choices) if choices and metric.startswith("acc") else None
                rows.append(row | facts | {"chance": chance})
    return rows


def chances(results: Mapping[str, Any]) -> list[str]:
    """Of each task of choices a line on what answers without knowledge would score."""
    lines = []
    for task, choices in results["choices"].items():
        if choices:
            few, many, chance = min(choices), max(choices), sum(1 / n for n in choices) / len(choices)
            several = f"{few}" if few == many else f"{few} to {many}"
            lines.append(f"{task}: {counted(len(choices), 'question')} of {several} choices; chance is {chance:.4g}")
    return lines


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The scores as columns of metrics.jsonl: `task/metric`."""
    return {f"{row['task']}/{row['metric']}": row["value"] for row in rows}


def keep(run: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
    """Adds the rows with these facts (the model's step and weights, who computed it, ...) to the run's file, where they
    take the place of older ones of the same. Returns the file.
    """
    new = [{**row, **facts, "harness": importlib.metadata.version("lm_eval")} for row in rows]
    named = {tuple(row.get(key) for key in SAME) for row in new}
    return change_scores(run, lambda old: [*(r for r in old if tuple(r.get(key) for key in SAME) not in named), *new])
