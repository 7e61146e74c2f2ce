"""A comparison of models, as `tinygrad_impl.compare` makes it: what compare.json holds, and its page in Markdown.

models         of each: name, loss (nats a token), perplexity (null: beyond float64), bits_per_byte, tokens, tokenizer
               (SHA-256), vocab_size, and `measures` of all its texts (see `data.text.counts.measured`)
data, tokens, bytes, valid_tokens, seq_len   what the losses are of: a prepared folder, its first tokens for
               validation, their bytes, how many there are, and how many at a time
training_text  the prepared folder in which copied words were looked for; null where there was none
sampling       how texts were drawn, with the same random numbers for all models
source         the commit (data/runs/revision.py)
texts          of each prompt: prompt, and `models`, of each: measures, and `samples`, of each: pieces, their
               probabilities, and the keys of `data.text.counts.MEASURES`
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data.cli import Progress
from data.text.copied import N, copied, training_words
from data.text.counts import MEASURES, counts, measured, spoken
from data.text.shards import read_meta

SHOWN = 3  # samples of a prompt and a model, on a page
TOKENIZERS_DIFFER = (
    "The models have different tokenizers, so that a token is not the same amount of text to all: only their bits per "
    "byte can be compared, which are of the same text."
)
MEANING = (
    "Words are compared without case and punctuation. Repeated 4-grams are the share of four words in a row that stood "
    "in the same text before; bits per byte of its own text are what a text cost the model that wrote it."
)


def sample(pieces: Iterable[tuple[str, float]], ended: bool) -> dict[str, Any]:
    """A text as compare.json has it, of its pieces with their probabilities. ended: by the end-of-text token."""
    written = list(pieces)
    texts, probabilities = [text for text, _ in written], [p for _, p in written]
    return {"pieces": texts, "probabilities": probabilities} | counts("".join(texts), probabilities, ended)


def add_copied(samples: Sequence[dict[str, Any]], folder: Path) -> None:
    """Adds to each sample what of it stands in the training text of a prepared folder. Raises `InputError` like
    `training_words`.
    """
    total = read_meta(folder)["splits"]["train"]["tokens"]
    with Progress(total=total, desc="copied words", unit="token", unit_scale=True) as progress:
        texts = ["".join(one["pieces"]) for one in samples]
        for one, found in zip(samples, copied(texts, training_words(folder, progress.update)), strict=True):
            one |= {"longest_copied": found.longest, "copied_8grams": found.found}


def add_measures(c: dict[str, Any]) -> None:
    """Adds the means of each model over all its texts, and over those of each prompt."""
    for i, model in enumerate(c["models"]):
        model["measures"] = measured([one for text in c["texts"] for one in text["models"][i]["samples"]])
        for text in c["texts"]:
            text["models"][i]["measures"] = measured(text["models"][i]["samples"])


def modern(c: dict[str, Any]) -> dict[str, Any]:
    """A comparison of two models, from when there were no more and nothing was counted, as it would be now."""
    sides = ("pretrained", "finetuned")
    texts = [
        {"prompt": text["prompt"], "models": [{"samples": [text[side]], "measures": []} for side in sides]}
        for text in c["texts"]
    ]
    return c | {"models": [{"measures": []} | c[side] for side in sides], "texts": texts}


def other_tokenizers(c: dict[str, Any]) -> bool:
    """Whether models of a comparison have different tokenizers."""
    return len({model.get("tokenizer") for model in c["models"]}) > 1


def listed(names: Sequence[str]) -> str:
    """A, B and C."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def measures_table(rows: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> tuple[list[str], list[list[str]]]:
    """The heads and cells of a table of measures, of the name of each row and its measures."""
    keys = [key for key in MEASURES if any(row["name"] == key for _, found in rows for row in found)]
    cells = []
    for name, found in rows:
        said = {row["name"]: spoken(row) for row in found}
        cells.append([name, *(said.get(key, "-") for key in keys)])
    return ["", *(MEASURES[key] for key in keys)], cells


def meaning(c: dict[str, Any]) -> str:
    """What the measures mean, in words."""
    where = c.get("training_text")
    if not where:
        return MEANING
    return (
        f"{MEANING} Copied: verbatim overlap with the training text of {where}: the longest run, 0 where it is shorter "
        f"than {N} words, and the share of {N} words in a row."
    )


def markdown(c: dict[str, Any]) -> str:
    """The page: losses, what was counted, and the first texts."""
    names = [model["name"] for model in c["models"]]
    page = f"# {listed(names)}\n\n"
    page += (
        f"On {c['data']}, the first {c['tokens']:,} of {c['valid_tokens']:,} validation tokens, {c['seq_len']} at a "
    )
    page += "time:\n\n"
    heads = ["", "loss (nats a token)", "perplexity", "tokens", "bits per byte"]
    page += _table(heads, [[model["name"], *_losses(model)] for model in c["models"]])
    page += f"\n{TOKENIZERS_DIFFER}\n" if other_tokenizers(c) else ""
    count = sum(len(text["models"][0]["samples"]) for text in c["texts"])
    page += f"\nOf {count} text{'s' * (count > 1)} of each model, mean ± standard deviation:\n\n"
    page += _table(*measures_table([(model["name"], model["measures"]) for model in c["models"]]))
    page += f"\n{meaning(c)}\n"
    for text in c["texts"]:
        page += f"\n## {text['prompt']}\n"
        of_each = [(name, model["measures"]) for name, model in zip(names, text["models"], strict=True)]
        if len(text["models"][0]["samples"]) > 1:
            page += f"\n{_table(*measures_table(of_each))}"
        for name, model in zip(names, text["models"], strict=True):
            page += f"\n**{name}**\n"
            for one in model["samples"][:SHOWN]:
                quoted = "".join([text["prompt"], *one["pieces"]]).strip().replace("\n", "\n> ")
                page += f"\n> {quoted}\n"
    chosen = [f"{name.replace('_', '-')} {value}, " for name, value in c["sampling"].items() if value is not None]
    return page + f"\nThe same for all: {''.join(chosen).removesuffix(', ')}.\n"


def _losses(model: dict[str, Any]) -> list[str]:
    bits = model["bits_per_byte"]
    perplexity = "∞" if model["perplexity"] is None else f"{model['perplexity']:.2f}"
    cells = [f"{model['loss']:.4f}", perplexity, f"{model['tokens']:,}"]
    return [*cells, "-" if bits is None else f"{bits:.4f}"]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = f"| {' | '.join(heads)} |\n".replace("|  |", "| |", 1)  # over the names of rows there is nothing
    return f"{head}|{'---|' * len(heads)}\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
