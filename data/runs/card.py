"""The model card of a run's checkpoint: README.md, as the Hugging Face hub wants it.

Its front matter says what is known and no more: a base model and data sets only where they have a name on the hub, a
language only of data that is known here, and no licence, which is for whoever publishes the weights to say.
"""

import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from data.checkpoints.sums import CURVE, weights_sha256
from data.checkpoints.tensors import read_json
from data.evaluation.losses import perplexity
from data.runs.run_folder import SCORES, read_metrics, read_samples, read_sealed
from data.text.fineweb import is_fineweb
from data.text.sources import HUB_FILES

ROWS = 12  # of the table of validation losses
TABLE = "| task | metric | value"  # what the scores of a card begin with
ENGLISH = ("stories", *HUB_FILES)


def card_of(checkpoint: Path) -> str:
    """The card of a checkpoint in its run's folder, from the files there. Raises `InputError` where one is damaged."""
    run = checkpoint.parent.parent
    state = read_json(checkpoint / "trainer.json")
    samples = read_samples(run / "samples.md") if (run / "samples.md").exists() else []
    return evaluated(card(run, state, read_metrics(run), samples), scores_of(checkpoint))


def scores_of(checkpoint: Path) -> list[dict[str, Any]]:
    """What was evaluated of a run's checkpoint, as rows of `data.evaluation.scores`: of its step, and of the weights
    that it has now.
    """
    file = checkpoint.parent.parent / SCORES
    rows = read_sealed(file).get("rows", []) if file.is_file() else []
    step, weights = read_json(checkpoint / "trainer.json").get("step"), weights_sha256(checkpoint)
    return [row for row in rows if weights and (row.get("step"), row.get("weights")) == (step, weights)]


def evaluated(page: str, scores: Sequence[Mapping[str, Any]]) -> str:
    """A card with these scores in its section `Evaluation`, instead of those that it had there. What somebody else has
    written in a section of that name stays before them.
    """
    parts = sections(page)
    place = next((i for i, part in enumerate(parts) if part.startswith("## Evaluation\n")), None)
    if place is None:
        place = next((i for i, part in enumerate(parts) if part.startswith("## Sample\n")), len(parts))
        parts.insert(place, "")
    words = parts[place].partition(TABLE)[0].removeprefix("## Evaluation\n").strip()
    said = [text for text in (words, evaluation(scores) if scores else "") if text]
    parts[place] = "\n\n".join(["## Evaluation", *said]) + "\n\n" if said else ""
    return "".join(parts).rstrip("\n") + "\n"


def sections(page: str) -> list[str]:
    """The parts of a page that begin with a heading of the second level. What looks like one in a fence is none."""
    parts, fence = [""], ""
    for line in page.splitlines(keepends=True):
        mark = re.match("`{3,}", line)
        if mark and (not fence or line.strip() == fence):
            fence = "" if fence else mark[0]
        if line.startswith("## ") and not fence:
            parts.append("")
            if not parts[-2].endswith("\n\n") and parts[-2]:
                parts[-2] += "\n"
        parts[-1] += line
    if parts[-1] and not parts[-1].endswith("\n\n"):
        parts[-1] = parts[-1].rstrip("\n") + "\n\n"
    return parts


def evaluation(scores: Sequence[Mapping[str, Any]]) -> str:
    """What was evaluated, and of what."""
    lines = [
        f"{TABLE} | standard error | chance | questions | examples | computed by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in scores:
        around = "-" if row.get("stderr") is None else f"{row['stderr']:.4f}"
        chance = "-" if row.get("chance") is None else f"{row['chance']:.4g}"
        shots = "-" if row.get("shots") is None else row["shots"]
        numbered = isinstance(row.get("version"), int | float)  # the harness says Yaml where a task has none
        task = f"{row['task']} (version {row['version']})" if numbered else row["task"]
        lines += [
            f"| {task} | {row['metric']} | {row['value']:.4f} | {around} | {chance} | {questions_of(row)} | {shots} | "
            f"{computed_by(row)} |"
        ]
    versions = sorted({row["harness"] for row in scores if "harness" in row})
    said = (
        f"By lm-evaluation-harness{' ' if versions else ''}{', '.join(versions)}; examples are those before a question."
    )
    own = sorted({f"`{row['file']}` has the SHA-256 `{row['file_sha256']}`" for row in scores if row.get("file")})
    return "\n".join([*lines, "", said, *(f"{each}." for each in own)])


def questions_of(score: Mapping[str, Any]) -> str:
    """How many questions a score is of, and whose, where they may be others than those that the task's name says."""
    count, all_of = score.get("questions"), score.get("of")
    said = "-" if count is None else f"{count:,}"
    said = f"the first {count:,} of {all_of:,}" if count and all_of and count < all_of else said
    return f"{said}, from {score['file']}, a local file" if score.get("file") else said


def computed_by(score: Mapping[str, Any]) -> str:
    """Which implementation computed a score, in which dtype, and with whose kernels where there is a choice."""
    names = {"tinygrad_impl": "tinygrad", "torch_ref": "PyTorch"}
    by = names.get(score.get("by", "-"), score.get("by", "-"))
    kernels = f"{score['kernels']} kernels" if score.get("kernels") else None
    return ", ".join(str(part) for part in (by, score.get("dtype"), kernels) if part)


def card(
    folder: Path,
    state: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    samples: Sequence[tuple[int, str]],
) -> str:
    """The card of the checkpoint that trainer.json says `state` of, of the run in `folder`.

    metrics, samples: the run's; losses of later steps are left out, and samples of any other. Raises `InputError` where
    run.json or parity.json is damaged.
    """
    run = read_sealed(folder / "run.json")
    parity = read_sealed(folder / "parity.json") if (folder / "parity.json").is_file() else None
    options, config, step = state["options"], run["config"], state["step"]
    hub = run.get("hub", {"model": None, "dataset": None})  # runs of earlier versions do not say
    rows = [row for row in metrics if row["step"] <= step]
    losses = [row for row in rows if "val_loss" in row]
    data = front_matter(run, options, hub)
    size = f"{run['parameters'] / 1e6:,.1f}M parameters"
    lines = [f"---\n{data.to_yaml()}\n---", f"# GPT-2, {size}, after {step:,} steps"]
    begun = (
        "random weights"
        if options["init"] == "random"
        else f"the weights of `{hub['model'] or shown(options['init'])}`"
    )
    lines += [
        f"A GPT-2 of {config['n_layer']} layers, {config['n_head']} heads and a width of {config['n_embd']}, with a "
        f"context of {config['n_positions']:,} tokens. It began with {begun}, and was trained for {step:,} of "
        f"{options['steps']:,} steps, on {state['tokens']:,} tokens of `{hub['dataset'] or shown(options['data'])}`."
    ]
    lines += ["## How to use it", usage(), "## Training", *training(run, state, rows)]
    if losses:
        lines += ["## Validation", *validation(losses, step)]
    if step:
        lines += [f"![Training and validation loss]({CURVE})"]
    if texts := [text for at, text in samples if at == step]:  # others are of other weights
        lines += ["## Sample", f"After {step:,} steps, {sampled(run)}:", quoted(texts[-1])]
    lines += ["## Equality with PyTorch", verdict(parity)]
    lines += ["## How to repeat this", *commands(run, step)]
    return "\n\n".join(lines) + "\n"


def front_matter(run: Mapping[str, Any], options: Mapping[str, Any], hub: Mapping[str, Any]) -> ModelCardData:
    """What the hub reads of the card."""
    framework = "tinygrad" if "tinygrad" in run["versions"] else "pytorch"
    return ModelCardData(
        language="en" if options["data"] in ENGLISH or is_fineweb(options["data"]) else None,
        base_model=hub["model"],
        datasets=[hub["dataset"]] if hub["dataset"] else None,
        library_name="transformers",
        tags=["gpt2", framework],
        pipeline_tag="text-generation",
    )


def shown(source: str) -> str:
    """A source without the folders that lead to it, which are nobody else's business."""
    return ",".join(os.path.basename(part.rstrip("/")) for part in source.split(","))


def usage() -> str:
    return (
        "```python\nfrom transformers import pipeline\n\n"
        'write = pipeline("text-generation", model=".")  # this folder, or the name of this model on the hub\n'
        'print(write("Once upon a time", max_new_tokens=100)[0]["generated_text"])\n```'
    )


def training(run: Mapping[str, Any], state: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How it was trained, as a table."""
    options = state["options"]
    rates = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    update = options["grad_accum"] * options["batch_size"] * options["seq_len"]
    first, second = options["betas"]
    facts = {
        "tokens per optimizer step": f"{update:,}, in windows of {options['seq_len']:,}",
        "learning rate": f"up to {options['lr']:g} in {options['warmup']:,} steps, down to {options['min_lr']:g}",
        "AdamW": f"betas {first:g} and {second:g}, weight decay {options['weight_decay']:g}",
        "gradient clipping (global norm)": f"{options['clip']:g}",
        "dtype of matmuls": options.get("dtype"),
        "seed": f"{options['seed']}",
        "device": f"{run['device']} ({run['card']})",
        "seconds of training": f"{state['seconds']:,.0f}",
    }
    facts |= {"tokens/s (median)": f"{rates[len(rates) // 2]:,.0f}"} if rates else {}
    return ["| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)]


def validation(losses: Sequence[Mapping[str, Any]], step: int) -> list[str]:
    """The validation losses until this step, in a few rows, the last of them and the best said first."""
    last, best = losses[-1], min(losses, key=lambda row: row["val_loss"])
    confusion = f"{perplexity(last['val_loss']):,.2f}".replace("inf", "∞")
    said = f"Loss {last['val_loss']:.4f} nats a token, perplexity {confusion}"
    said += "" if last["step"] == step else f", measured after {last['step']:,} steps"
    said += "." if best is last else f"; the best was {best['val_loss']:.4f}, after {best['step']:,} steps."
    every = max(1, math.ceil((len(losses) - 1) / (ROWS - 1)))
    kept = [*losses[:-1:every], last]
    table = "| step | training loss | validation loss |\n|---|---|---|\n"
    for row in kept:
        trained = f"{row['loss']:.4f}" if "loss" in row else "-"
        table += f"| {row['step']:,} | {trained} | {row['val_loss']:.4f} |\n"
    return [said, table.rstrip()]


def sampled(run: Mapping[str, Any]) -> str:
    """How samples are drawn, in words."""
    chosen = [
        f"{name.replace('_', '-')} {value}" for name, value in run.get("sampling", {}).items() if value is not None
    ]
    return f"drawn with {', '.join(chosen)}" if chosen else "drawn"


def quoted(text: str) -> str:
    """A text as it is, whatever it spells in Markdown: in a fence that it does not hold."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def verdict(parity: Mapping[str, Any] | None) -> str:
    """What the certificate says, and no more than it says."""
    if not parity:
        return "Not checked in this run."
    how = f", in {parity['dtype']} on {parity['device']}" if {"dtype", "device"} <= parity.keys() else ""
    return (
        f"**{str(parity['verdict']).upper()}**: before training, the loss, gradients and AdamW steps were compared "
        f"with PyTorch's{how}. {parity.get('summary', '')}".rstrip()
    )


def commands(run: Mapping[str, Any], step: int) -> list[str]:
    """The commands of the run until this step, with the versions and commits that ran them."""
    parts = [run, *(part for part in run.get("continued", []) if part["step"] < step)]
    said = [f"```sh\n{chr(10).join(shlex.join(part['command']) for part in parts)}\n```"]
    source = parts[-1].get("source", {})
    commit = f" Commit {source['commit']}{'' if source['clean'] else ', with changes'}." if source.get("commit") else ""
    versions = parts[-1].get("versions", run["versions"])
    said += [f"With {', '.join(f'{name} {version}' for name, version in versions.items())}.{commit}"]
    return [*said, f"Trained on data with the SHA-256 `{run['data']['checksum']}`."]
