"""Models side by side, as `tinygrad_impl.compare` measured them: for its own page, and for the report of a run."""

import math
from typing import Any

from data.evaluation.losses import perplexity
from data.runs.comparison import SHOWN, TOKENIZERS_DIFFER, meaning, measures_table, other_tokenizers
from data.runs.report_charts import number
from data.runs.report_html import breakable, escaped, page, spoken, table

GPT2_VOCABULARY = 50_257  # of every model that was compared before compare.json said it


def comparison_page(c: dict[str, Any]) -> str:
    """The page that shows a comparison alone. `c` is what compare.json holds, with the keys of `COMPARISON`."""
    count = len(c["models"])
    title = {1: "One model", 2: "Two models", 3: "Three models"}.get(count, f"{count} models")
    header = f'<header><p class="kicker">GPT-2 in tinygrad</p><h1>{title}</h1></header>'
    return page(title, header + comparison(escaped(c)))


def comparison(c: dict[str, Any]) -> str:
    """Models side by side. Its strings are escaped already."""
    models = c["models"]
    heads, keys = (
        ["model", "loss (nats a token)", "perplexity", "bits per byte"],
        ["loss", "perplexity", "bits_per_byte"],  # older comparisons have no bits per byte
    )
    rows = [[breakable(model["name"]), *(number(model.get(key)) for key in keys)] for model in map(as_numbers, models)]
    differ = f"<p>{TOKENIZERS_DIFFER}</p>" if other_tokenizers(c) else ""
    sampling = [f"{key.replace('_', ' ')} {spoken(value)}" for key, value in c["sampling"].items() if value is not None]
    vocabulary = max(model.get("vocab_size", GPT2_VOCABULARY) for model in models)
    steps = {f"{100 * p:g}&nbsp;%": p for p in (1, 0.1, 0.01, 0.001, 0.0001)} | {f"1/{vocabulary:,}": 1 / vocabulary}
    legend = " ".join(shaded([f" {name} "], [p], vocabulary) for name, p in steps.items())
    return f"""<h3>Side by side</h3>
<p>On {c["tokens"]:,} validation tokens of {breakable(c["data"])}, {c["seq_len"]} at a time.</p>
{table(heads, rows, "loss of each model")}{differ}
{counted(c)}
<p>All continue the same prompts with the same random numbers: {", ".join(sampling)}. The stronger a token's shade, the
less likely it was to the model that wrote it, on a logarithmic scale up to chance, which is 1 in {vocabulary:,} tokens:
<span class="text">{legend}</span>. Over each text is its perplexity to the model that wrote it: a model that knows
nothing has about {vocabulary:,}.</p>
{"".join(side_by_side(text, c, vocabulary) for text in c["texts"])}"""


def as_numbers(model: dict[str, Any]) -> dict[str, Any]:
    """A model of a comparison, with infinity for its perplexity where compare.json has null."""
    return model | ({"perplexity": math.inf} if model["perplexity"] is None else {})


def counted(c: dict[str, Any]) -> str:
    """What was counted of all texts of each model; nothing of an older comparison."""
    if not any(model["measures"] for model in c["models"]):
        return ""
    count = sum(len(text["models"][0]["samples"]) for text in c["texts"])
    means = f"<p>Of {count} text{'s' * (count > 1)} of each model, mean ± standard deviation. {meaning(c)}</p>"
    return means + measures([model["measures"] for model in c["models"]], c, "what was counted of the texts")


def measures(found: list[list[dict[str, Any]]], c: dict[str, Any], label: str) -> str:
    """A table of the measures of each model."""
    names = [breakable(model["name"]) for model in c["models"]]
    heads, cells = measures_table(list(zip(names, found, strict=True)))
    return table(["model", *heads[1:]], cells, label)


def side_by_side(text: dict[str, Any], c: dict[str, Any], vocabulary: int) -> str:
    """What the models made of a prompt, beside each other on a screen of any width."""
    samples = max(len(model["samples"]) for model in text["models"])
    of_prompt = [model["measures"] for model in text["models"]]
    means = measures(of_prompt, c, "of this prompt") if samples > 1 else ""
    rows = ""
    for i in range(min(samples, SHOWN)):
        columns = ""
        for model, found in zip(c["models"], text["models"], strict=True):
            one = found["samples"][i]
            written = shaded(one["pieces"], one["probabilities"], vocabulary)
            columns += f"""<div><h5>{breakable(model["name"])}</h5>
<p class="note">perplexity of the text {number(perplexity_of(one["probabilities"]))}</p>
<p class="text"><b>{text["prompt"]}</b>{written}</p></div>"""
        rows += f'<div class="sides" style="--n:{len(c["models"])}">{columns}</div>'
    return f"<section><h4>“{text['prompt']}”</h4>{means}{rows}</section>"


def perplexity_of(probabilities: list[float | None]) -> float | None:
    """The perplexity of a text to the model that drew its tokens, or None where no probability is known."""
    known = [p for p in probabilities if p is not None]
    if not known:
        return None
    return perplexity(-sum(map(math.log, known)) / len(known)) if all(0 < p < math.inf for p in known) else math.inf


def shaded(pieces: list[str], probabilities: list[float | None], vocabulary: int) -> str:
    """Tokens on a ground whose strength is the logarithm of their probability, from 1 down to chance: 1/vocabulary."""
    spans = []
    for i, (piece, p) in enumerate(zip(pieces, probabilities, strict=True)):
        strength = min(max(0, -math.log(p) / math.log(vocabulary)), 1) if p and 0 < p < math.inf else 1
        visible = piece.replace("\n", "↵").replace("\t", "⇥")  # in the tooltip
        kind = "token newline" if "\n" in piece else "token"
        percent = "no probability" if p is None else f"{number(100 * p)} %"
        if piece == "\n" and pieces[i + 1 : i + 2] == ["\n"]:
            piece = ""  # of a run of empty lines the last one breaks: each has its ↵ already
        spans.append(f'<span class="{kind}" style="--s:{strength:.2f}" title="“{visible}” {percent}">{piece}</span>')
    return "".join(spans)
