"""`python -m tinygrad_impl.compare`: what a model wrote and lost before training, beside what it does after."""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import load, resolve
from data.checkpoints.tensors import read_json
from data.cli import ArgumentParser, InputError, Progress, integer, run
from data.files import atomic_write
from data.runs.report_comparison import TOKENIZERS_DIFFER, comparison_page, other_tokenizers
from data.runs.revision import revision
from data.runs.run_folder import read_sealed, run_of, write_sealed
from data.text.formats import AS_GIVEN, ERRORS, Reading
from data.text.loader import first_tokens, windows, windows_of
from data.text.prepare import prepared
from data.text.sampling import Sampler
from data.text.shards import made_with, read_meta, tokenizer_of
from data.text.tokenizer import Tokenizer, of_folder
from tinygrad_impl.device import open_device
from tinygrad_impl.evaluate import Evaluator
from tinygrad_impl.generate import (
    COMPILING,
    Generator,
    add_sampling_options,
    backend_for,
    encode,
    pieces,
    sampling,
    setup,
)
from tinygrad_impl.model import GPT2

PROMPTS = ["Once upon a time", "One day, a little girl named Lily", "The dog was sad because"]
BATCH_SIZE = 4


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m tinygrad_impl.compare",
        description="Two models side by side: the same prompts with the same seed, and the loss on the same text.",
        usage="%(prog)s --pretrained MODEL --finetuned MODEL [options]",
        epilog="example: python -m tinygrad_impl.compare --pretrained gpt2 --finetuned runs/mine --html compare.html",
    )
    models = parser.add_argument_group("the two models")
    models.add_argument(
        "--pretrained", required=True, metavar="MODEL", help="gpt2, or a folder such as runs/mine/checkpoints/step-0"
    )
    models.add_argument("--finetuned", required=True, metavar="MODEL", help="a run, or a folder of Hugging Face's form")
    loss = parser.add_argument_group("whose loss is measured")
    loss.add_argument("--data", metavar="TEXT", help="a source or prepared folder; by default the run's, else stories")
    loss.add_argument(
        "--valid", metavar="TEXT|FRACTION", help="of --data, its validation text, or the fraction held out"
    )
    loss.add_argument(
        "--field", default=AS_GIVEN.field, metavar="NAME", help="of the records in --data, that holds their text (text)"
    )
    loss.add_argument(
        "--errors", default=AS_GIVEN.errors, choices=ERRORS, help="for bytes in --data that are no UTF-8 (strict)"
    )
    loss.add_argument(
        "--eval-tokens", type=integer(0), default=16_384, metavar="N", help="its first N (16384); 0: all of it"
    )
    loss.add_argument("--seq-len", type=integer(1), metavar="N", help="tokens in a window; by default as in the run")
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--out", type=Path, metavar="FILE", help="Markdown, and a .json beside it; by default compare.md in the run"
    )
    written.add_argument(
        "--html", type=Path, metavar="FILE", help="a page too, with every token's probability as shading"
    )
    sampling = add_sampling_options(parser)
    sampling.add_argument("--prompt", action="append", metavar="TEXT", help="what to continue; may be given many times")
    return parser


def labelled(model: str) -> str:
    """What a model is called: by its name, and whether its weights are still random."""
    trainer = Path(model, "trainer.json")
    if trainer.is_file():
        state = read_json(trainer)
        options = state.get("options")
        if state.get("step") == 0 and isinstance(options, dict) and options.get("init") == "random":
            return f"{model} (random weights)"
    return model


def shown(items: Iterable[Any], total: int, what: str, unit: str) -> Progress:
    """The items, with how far they are."""
    return Progress(iterable=items, total=total, desc=what, unit=unit, compiling=COMPILING)


def documents(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts between the end-of-text tokens; the last is empty where the tokens end with one."""
    return [tokenizer.decode(part.tolist()) for part in split_at(tokens, tokenizer.eot)]


def stripped(texts: list[str]) -> list[str]:
    """Without the white space around them, which some tokenizers add."""
    return [text.strip() for text in texts]


def split_at(tokens: np.ndarray, eot: int) -> list[np.ndarray]:
    """The parts between the end-of-text tokens."""
    first, *rest = np.split(tokens, np.flatnonzero(tokens == eot))
    return [first, *(part[1:] for part in rest)]


def translated(row: np.ndarray, by: Tokenizer, to: Tokenizer) -> np.ndarray:
    """The tokens in `to` of the same text. As the first of `row` is no target, so is the first of these; the targets
    that follow have the same text.
    """
    before = [to.eot] if row[0] == by.eot else [to.eot, *to.encode(by.decode(row[:1].tolist()))]
    after = to.encode_documents(documents(row[1:], by))
    return np.concatenate([before[-1:], after[:-1]]).astype(np.int32)  # nothing says that the last document ends


def main() -> None:
    args = parser().parse_args()
    settings = sampling(args, args.finetuned)
    new_tokens = settings.pop("max_new_tokens")
    how = Reading(args.field, args.errors)
    if args.data is None and (args.valid is not None or how != AS_GIVEN):
        raise InputError("--valid, --field and --errors say how to read the text of --data; give that too")
    if run_folder := run_of(args.finetuned):
        try:
            facts = read_sealed(run_folder / "run.json")
            source, seq_len, beside = str(facts["data"]["folder"]), int(facts["options"]["seq_len"]), run_folder
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{run_folder / 'run.json'} is damaged; copy a checkpoint out of it and pass that"
            ) from None
    else:
        source, seq_len, beside = "stories", None, Path()
    out = args.out or beside / "compare.md"
    if out.suffix == ".json":
        raise InputError(
            f"--out {out} names the Markdown file, beside which a .json is written; give it another suffix"
        )
    for option, path in (("--out", out), ("--html", args.html or out)):
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; name a file to write")
        if not path.parent.is_dir():
            raise InputError(f"there is no folder {path.parent} to write {path.name} into; name another {option}")

    folders = {"pretrained": resolve(args.pretrained), "finetuned": resolve(args.finetuned)}
    models = {"pretrained": load(args.pretrained), "finetuned": load(args.finetuned)}
    tokenizers = {side: of_folder(folder, models[side][0].vocab_size) for side, folder in folders.items()}
    device = open_device(args.device)
    folder = prepared(source if args.data is None else args.data, args.valid, how, tokenizers["finetuned"])
    context = min(config.n_positions for config, _ in models.values())
    seq_len = args.seq_len or seq_len or min(config.context for config, _ in models.values())
    if seq_len > context:
        raise InputError(
            f"--seq-len {seq_len} is over the context of {context} tokens that both models have; give fewer"
        )
    meta, of_data = read_meta(folder), tokenizer_of(folder)
    targets = meta["splits"]["valid"]["tokens"] - 1
    measured = min(targets, args.eval_tokens or targets)
    prompts = args.prompt or PROMPTS
    names = {"pretrained": labelled(args.pretrained), "finetuned": labelled(args.finetuned)}
    found: dict[str, Any] = {"data": str(folder), "tokens": measured, "seq_len": seq_len}
    found["sampling"] = {**settings, "max_new_tokens": new_tokens}
    row = first_tokens(folder, "valid", measured + 1)
    found["bytes"] = sum(len(text.encode()) for text in documents(row[1:], of_data))
    found["source"] = revision()
    found["texts"] = [{"prompt": prompt} for prompt in prompts]
    for side, (config, arrays) in models.items():
        model = GPT2(config, {name: array.astype(np.float32) for name, array in arrays.items()})
        tokenizer = tokenizers[side]
        backend = backend_for(args.dtype, config, device)
        print(setup(names[side], config, device, backend), file=sys.stderr)
        if made_with(meta, tokenizer):
            count, batches = measured, windows(folder, "valid", BATCH_SIZE, seq_len, measured)
        else:
            own = translated(row, of_data, tokenizer)
            if stripped(documents(own[1:], tokenizer)) != stripped(documents(row[1:], of_data)):
                print(f"note: the tokenizer of {names[side]} loses a part of this text", file=sys.stderr)
            count, batches = len(own) - 1, windows_of(own, BATCH_SIZE, seq_len)
        steps = math.ceil(count / (BATCH_SIZE * seq_len))
        loss = Evaluator(model, backend)(shown(batches, steps, "loss", "batch"))
        bits = loss * count / math.log(2) / found["bytes"] if found["bytes"] else None
        found[side] = {"name": names[side], "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}
        found[side] |= {"tokens": count, "tokenizer": tokenizer.sha256, "vocab_size": config.vocab_size}
        tokens = [encode(tokenizer, prompt, args.special_tokens) for prompt in prompts]
        generator = Generator(model, backend, tokenizer.vocab_size, tokenizer.eot)
        new = generator.stream(tokens, new_tokens, Sampler(**settings))
        drawn = list(shown(new, new_tokens, "texts", "token"))
        for i, text in enumerate(found["texts"]):
            written = list(pieces(tokenizer, tokens[i], (step[i] for step in drawn if step[i])))
            text[side] = {"pieces": [piece for piece, _ in written], "probabilities": [p for _, p in written]}

    page = f"# {names['pretrained']} and {names['finetuned']}\n\n"
    page += f"On {folder}, the first {measured:,} of {targets:,} validation tokens, {seq_len} at a time:\n\n"
    page += "| | loss (nats a token) | perplexity | tokens | bits per byte |\n|---|---|---|---|---|\n"
    for side, name in names.items():
        side_found, bits = found[side], found[side]["bits_per_byte"]
        page += f"| {name} | {side_found['loss']:.4f} | {side_found['perplexity']:.2f} | "
        page += f"{side_found['tokens']:,} | {'-' if bits is None else f'{bits:.4f}'} |\n"
    page += f"\n{TOKENIZERS_DIFFER}\n" if other_tokenizers(found) else ""
    for text in found["texts"]:
        page += f"\n## {text['prompt']}\n"
        for side in models:
            quoted = "".join([text["prompt"], *text[side]["pieces"]]).strip().replace("\n", "\n> ")
            page += f"\n**{names[side]}**\n\n> {quoted}\n"
    chosen = [f"{name.replace('_', '-')} {value}, " for name, value in settings.items() if value is not None]
    page += f"\nThe same for both: {''.join(chosen)}at most {new_tokens} new tokens.\n"
    with atomic_write(out, "w") as f:
        f.write(page)
    write_sealed(out.with_suffix(".json"), found)
    if args.html:
        with atomic_write(args.html, "w") as f:
            f.write(comparison_page(found))
    *files, last = [out, out.with_suffix(".json"), *([args.html] if args.html else [])]
    print(f"{page}\nWritten to {', '.join(map(str, files))} and {last}")


if __name__ == "__main__":
    run(main)
