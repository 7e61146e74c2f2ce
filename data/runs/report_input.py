"""Reads what a run's folder holds for the report. The files may be a stranger's, so the form of each is checked."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.checkpoints.sums import weights_sha256
from data.cli import InputError
from data.runs.comparison import modern
from data.runs.run_folder import SCORES as SCORES_FILE
from data.runs.run_folder import read_metrics, read_samples, read_sealed

# what the files of a run have to hold for the report, at least; see `fits`
NUMBER = int | float | None
RUN: dict[str, Any] = {
    **{"command": [str], "options": dict, "parameters": int, "device": str, "card": str, "versions": dict},
    **{"config": {"n_layer": int, "n_head": int, "n_embd": int}, "data": {"folder": str, "checksum": str}},
}
ROW = {"check": str, "name": str, "error": NUMBER, "own": NUMBER, "allowed": NUMBER, "passed": bool}
CONTINUED = [{"step": int, "command": [str]}]
SOURCE = {"commit": str | None, "clean": bool | None}  # as `data.runs.revision.revision` says; older runs have none
RANKS = {"world_size": int, "hosts": dict, "cards": dict, "global_batch": int, "global_batch_tokens": int}
PARITY: dict[str, Any] = {
    **{"verdict": str, "culprit": str | None, "summary": str, "dtype": str, "device": str, "versions": dict},
    **{"model": {"sha256": str}, "sources": dict, "rows": [ROW]},
}
MODEL = {"name": str, "loss": NUMBER, "perplexity": NUMBER}
TOKENS = {"pieces": [str], "probabilities": [NUMBER]}
MEASURES = {"measures": [{"name": str, "mean": int | float, "spread": NUMBER}]}
COMPARED = {"data": str, "tokens": int, "seq_len": int, "sampling": dict}
COMPARISON: dict[str, Any] = {
    **COMPARED,
    **{"models": [MODEL | MEASURES], "training_text": str | None},
    **{"texts": [{"prompt": str, "models": [{"samples": [TOKENS]} | MEASURES]}]},
}
OLDER_COMPARISON: dict[str, Any] = {  # see `data.runs.comparison.modern`
    **COMPARED,
    **{"pretrained": MODEL, "finetuned": MODEL},
    **{"texts": [{"prompt": str, "pretrained": TOKENS, "finetuned": TOKENS}]},
}

SCORE = {"task": str, "metric": str, "value": NUMBER, "stderr": NUMBER, "questions": int | None, "step": int | None}
SCORE_SINCE: dict[str, Any] = {  # which rows of earlier versions lack
    **{"of": int | None, "shots": int | None, "chance": NUMBER, "file": str | None, "file_sha256": str | None},
    **{"by": str, "dtype": str | None, "kernels": str | None, "harness": str, "version": int | float | str | None},
}
SCORES: dict[str, Any] = {"rows": [SCORE]}

AXES = ["step", "tokens", "seconds"]
SERIES = ["loss", "val_loss", "lr", "grad_norm", "tokens_per_second"]  # columns of metrics.jsonl


@dataclass(frozen=True)
class Run:
    """A run's folder as it was read: what is missing there is empty or None here."""

    name: str
    command: str
    facts: dict[str, Any]  # run.json
    metrics: list[dict[str, float]]  # AXES and SERIES, as far as a row has them
    left_out: int  # values of metrics.jsonl that are no finite numbers
    samples: list[tuple[int, str]]  # (step, text)
    parity: dict[str, Any] | None
    comparison: dict[str, Any] | None
    scores: list[dict[str, Any]]  # of tasks: the rows of evaluation.json
    scored: list[dict[str, float]]  # of tasks, while it was trained: "step", and columns such as "stories/acc"


def fits(value: Any, shape: Any) -> bool:
    """Whether a value out of JSON is of a type, or an object with such keys at least, or a list of such elements.

    A whole number has to be one that counts something, as those of any length could not be shown.
    """
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], s) for key, s in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(element, shape[0]) for element in value)
    return isinstance(value, shape) and not (isinstance(value, int) and abs(value) > 2**64)


def known(part: dict[str, Any]) -> bool:
    """Whether what is said of the beginning of a run, or of where it goes on, is what the report can show of it."""
    ranks = part.get("ranks", {"hosts": {}, "cards": {}})
    if not fits({"device": "", "card": ""} | part, {"device": str, "card": str}):  # older runs do not say it again
        return False
    rates = all(fits(part.get(key, 1), int | float) and part.get(key, 1) > 0 for key in ("peak_flops", "flops_a_token"))
    if not rates or not fits(part.get("source", {"commit": None, "clean": None}), SOURCE):
        return False
    if "ranks" in part and not (fits(ranks, RANKS) and ranks["world_size"] > 0):
        return False
    return all(fits(count, int) for kind in ("hosts", "cards") for count in ranks[kind].values())


def load_run(folder: Path) -> Run:
    """Reads a run's folder, also while it is being written. Raises `InputError`, naming the file that is damaged."""
    if not (folder / "run.json").is_file():
        raise InputError(f"{folder} holds no run (it has no run.json); pass the folder of one")

    def read(name: str, shape: dict[str, Any]) -> dict[str, Any] | None:
        if not (folder / name).is_file():
            return None
        value = read_sealed(folder / name)
        if not fits(value, shape):
            raise InputError(f"{folder / name} is damaged or of another version; copy it again or remove it")
        return value

    facts, parity = read("run.json", RUN), read("parity.json", PARITY)
    scores = read(SCORES_FILE, SCORES) or {"rows": []}
    for row in scores["rows"]:
        if not fits(dict.fromkeys(SCORE_SINCE) | {"by": "", "harness": ""} | row, SCORE_SINCE):
            raise InputError(f"{folder / SCORES_FILE} is damaged or of another version; copy it again or remove it")
    assert facts
    whole = fits(facts.setdefault("continued", []), CONTINUED)
    if not whole or not all(known(part) for part in [facts, *facts["continued"]]):
        raise InputError(f"{folder / 'run.json'} is damaged or of another version; copy it again or remove it")
    comparison = read_comparison(folder / "compare.json") if (folder / "compare.json").is_file() else None
    path = folder / "metrics.jsonl"
    try:
        rows = read_metrics(folder) if path.exists() else []
        for i, row in enumerate(rows):
            numbers = {key: NUMBER for key in AXES + SERIES if fits(row, dict) and key in row}
            if not fits(row, numbers | {"step": int}):
                raise ValueError(f"line {i + 1} is no object with a step and other numbers")
            if i and row["step"] <= rows[i - 1]["step"]:
                raise ValueError(f"line {i + 1} is no later step than the line before")
    except (ValueError, RecursionError, KeyError, TypeError) as e:
        raise InputError(f"{path} is damaged ({e}); copy it again") from None
    samples = folder / "samples.md"
    return Run(
        name=folder.resolve().name,
        command=shlex.join(facts["command"]),
        facts=facts,
        metrics=[{key: row[key] for key in AXES + SERIES if key in row and drawable(row[key])} for row in rows],
        left_out=sum(not drawable(row[key]) for row in rows for key in AXES + SERIES if key in row),
        samples=read_samples(samples) if samples.exists() else [],
        parity=parity,
        comparison=comparison,
        scores=[row for row in scores["rows"] if not of_other_weights(row, folder)],
        scored=[row for row in map(task_columns, rows) if len(row) > 1],
    )


def of_other_weights(score: dict[str, Any], run: Path) -> bool:
    """Whether the checkpoint of the step that was scored has other weights now."""
    now = weights_sha256(run / "checkpoints" / f"step-{score['step']}")
    return now is not None and score.get("weights", now) != now


def task_columns(row: dict[str, Any]) -> dict[str, float]:
    """The step, and the scores of tasks that were measured at it."""
    return {key: value for key, value in row.items() if key == "step" or ("/" in key and fits(value, int | float))}


def read_comparison(file: Path) -> dict[str, Any]:
    """What a compare.json says, an older one as it would be now. Raises `InputError` where it is damaged."""
    c = read_sealed(file)
    older = "models" not in c
    if not fits(c, OLDER_COMPARISON if older else COMPARISON):
        raise InputError(f"{file} is damaged or of another version; copy it again or remove it")
    c = modern(c) if older else c
    sizes = [model.get("vocab_size", 2) for model in c["models"]]  # older comparisons have none
    samples = [len(model["samples"]) for text in c["texts"] for model in text["models"]]
    whole = c["models"] and all(len(text["models"]) == len(c["models"]) for text in c["texts"])
    if not whole or len({*samples}) > 1 or not all(fits(size, int) and size > 1 for size in sizes):
        raise InputError(f"{file} is damaged or of another version; copy it again or remove it")
    if not all(isinstance(model.get("bits_per_byte"), NUMBER) for model in c["models"]):
        raise InputError(f"{file} is damaged (bits per byte are no number); make it again")
    texts = [one for text in c["texts"] for model in text["models"] for one in model["samples"]]
    if any(len(one["pieces"]) != len(one["probabilities"]) for one in texts):
        raise InputError(f"{file} is damaged (pieces without probabilities); make it again")
    return c


def drawable(value: float | None) -> bool:
    """Whether it is a finite number, and far enough below float64's largest that differences cannot overflow."""
    return value is not None and abs(value) < 1e300
