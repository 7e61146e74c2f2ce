"""The scores out of the harness's results, and where a run keeps them."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.runs.run_folder import read_sealed, write_sealed

FILE = "evaluation.json"  # in a run's folder
SAME = ("step", "task", "metric", "by", "limit")  # of a row that takes the place of an older one


def score_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each score of a task: `task`, `metric`, `value` and `stderr` (None: the harness has none), and how many
    `questions` it is of. The metric has the name of its filter after it, where it has been through one.
    """
    rows = []
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = found.get(f"{metric}_stderr,{kind}")
                known = isinstance(stderr, int | float) and math.isfinite(stderr)
                row = {"task": task, "metric": metric if kind == "none" else key, "value": float(value)}
                row |= {"stderr": float(stderr) if known else None}
                rows.append(row | {"questions": results["n-samples"].get(task, {}).get("effective")})
    return rows


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The scores as columns of metrics.jsonl: `task/metric`."""
    return {f"{row['task']}/{row['metric']}": row["value"] for row in rows}


def keep(run: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
    """Adds the rows with these facts (the model's step, who computed it, ...) to the run's file, where they take the
    place of older ones of the same. Returns the file.
    """
    file = run / FILE
    new = [{**row, **facts, "harness": importlib.metadata.version("lm_eval")} for row in rows]
    named = {tuple(row.get(key) for key in SAME) for row in new}
    old = read_sealed(file)["rows"] if file.is_file() else []
    write_sealed(file, {"rows": [*(r for r in old if tuple(r.get(key) for key in SAME) not in named), *new]})
    return file
