"""Two models side by side, as `tinygrad_impl.compare` measured them: for its own page, and for the report of a run."""

import math
from typing import Any

from data.runs.report_charts import number, perplexity
from data.runs.report_html import breakable, escaped, page, spoken, table

SIDES = ("pretrained", "finetuned")
TOKENIZERS_DIFFER = (
    "The two models have different tokenizers, so that a token is not the same amount of text to both: only their bits "
    "per byte can be compared, which are of the same text."
)
GPT2_VOCABULARY = 50_257  # of every model that was compared before compare.json said it


def comparison_page(c: dict[str, Any]) -> str:
    """The page that shows a comparison alone. `c` is what compare.json holds, with the keys of `COMPARISON`."""
    header = '<header><p class="kicker">GPT-2 in tinygrad</p><h1>Two models</h1></header>'
    return page("Two models", header + comparison(escaped(c)))


def comparison(c: dict[str, Any]) -> str:
    """Two models side by side. Its strings are escaped already."""
    heads, keys = (
        ["model", "loss (nats a token)", "perplexity", "bits per byte"],
        ["loss", "perplexity", "bits_per_byte"],  # older comparisons have no bits per byte
    )
    rows = [[breakable(c[side]["name"]), *(number(c[side].get(key)) for key in keys)] for side in SIDES]
    differ = f"<p>{TOKENIZERS_DIFFER}</p>" if other_tokenizers(c) else ""
    sampling = [f"{key.replace('_', ' ')} {spoken(value)}" for key, value in c["sampling"].items() if value is not None]
    vocabulary = max(c[side].get("vocab_size", GPT2_VOCABULARY) for side in SIDES)
    steps = {f"{100 * p:g}&nbsp;%": p for p in (1, 0.1, 0.01, 0.001, 0.0001)} | {f"1/{vocabulary:,}": 1 / vocabulary}
    legend = " ".join(shaded([f" {name} "], [p], vocabulary) for name, p in steps.items())
    return f"""<h3>Side by side</h3>
<p>On {c["tokens"]:,} validation tokens of {breakable(c["data"])}, {c["seq_len"]} at a time.</p>
{table(heads, rows, "loss of each model")}{differ}
<p>Both continue the same prompts with the same random numbers: {", ".join(sampling)}. The stronger a token's shade, the
less likely it was to the model that wrote it, on a logarithmic scale up to chance, which is 1 in {vocabulary:,} tokens:
<span class="text">{legend}</span>. Over each text is its perplexity to the model that wrote it: a model that knows
nothing has about {vocabulary:,}.</p>
{"".join(pair(text, c, vocabulary) for text in c["texts"])}"""


def other_tokenizers(c: dict[str, Any]) -> bool:
    """Whether the models of a comparison have different tokenizers."""
    return bool(c["pretrained"].get("tokenizer") != c["finetuned"].get("tokenizer"))


def pair(text: dict[str, Any], c: dict[str, Any], vocabulary: int) -> str:
    """What both models made of a prompt, beside each other on a screen of any width."""
    columns = ""
    for side in SIDES:
        written = shaded(**text[side], vocabulary=vocabulary)
        columns += f"""<div><h5>{breakable(c[side]["name"])}</h5>
<p class="note">perplexity of the text {number(perplexity_of(text[side]["probabilities"]))}</p>
<p class="text"><b>{text["prompt"]}</b>{written}</p></div>"""
    return f'<section><h4>“{text["prompt"]}”</h4><div class="sides">{columns}</div></section>'


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
