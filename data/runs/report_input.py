"""Reads what a run's folder holds for the report. The files may be a stranger's, so the form of each is checked."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cli import InputError
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
SIDE = {"name": str, "loss": NUMBER, "perplexity": NUMBER}
TOKENS = {"pieces": [str], "probabilities": [NUMBER]}
COMPARISON: dict[str, Any] = {
    **{"pretrained": SIDE, "finetuned": SIDE, "data": str, "tokens": int, "seq_len": int, "sampling": dict},
    **{"texts": [{"prompt": str, "pretrained": TOKENS, "finetuned": TOKENS}]},
}

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

    facts, parity, comparison = read("run.json", RUN), read("parity.json", PARITY), read("compare.json", COMPARISON)
    assert facts
    whole = fits(facts.setdefault("continued", []), CONTINUED)
    if not whole or not all(known(part) for part in [facts, *facts["continued"]]):
        raise InputError(f"{folder / 'run.json'} is damaged or of another version; copy it again or remove it")
    sizes = [comparison[side].get("vocab_size", 2) for side in ("pretrained", "finetuned")] if comparison else []
    if not all(fits(size, int) and size > 1 for size in sizes):  # older comparisons have none
        raise InputError(f"{folder / 'compare.json'} is damaged or of another version; copy it again or remove it")
    sides = [text[side] for text in (comparison or {"texts": []})["texts"] for side in ("pretrained", "finetuned")]
    for side in ("pretrained", "finetuned") if comparison else ():
        if not isinstance(comparison[side].get("bits_per_byte"), NUMBER):  # type: ignore[index]
            raise InputError(f"{folder / 'compare.json'} is damaged (bits per byte are no number); make it again")
    if any(len(side["pieces"]) != len(side["probabilities"]) for side in sides):
        raise InputError(f"{folder / 'compare.json'} is damaged (pieces without probabilities); make it again")
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
    )


def drawable(value: float | None) -> bool:
    """Whether it is a finite number, and far enough below float64's largest that differences cannot overflow."""
    return value is not None and abs(value) < 1e300
