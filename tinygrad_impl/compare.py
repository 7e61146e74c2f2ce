"""`python -m tinygrad_impl.compare`: what models write and lose, side by side: before training and after, say."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import load, resolve
from data.checkpoints.tensors import read_json
from data.cli import ArgumentParser, InputError, Progress, command, integer, run
from data.evaluation.losses import perplexity
from data.evaluation.packing import losses_as_drawn
from data.files import atomic_write
from data.ranks import refuse_ranks
from data.runs.comparison import add_copied, add_measures, markdown, sample
from data.runs.report_comparison import comparison_page
from data.runs.revision import revision
from data.runs.run_folder import read_sealed, run_of, write_sealed
from data.text.formats import AS_GIVEN, ERRORS, Reading
from data.text.loader import first_tokens, windows, windows_of
from data.text.prepare import prepared
from data.text.sampling import Sampler
from data.text.shards import made_with, open_split, read_meta, tokenizer_of
from data.text.tokenizer import Tokenizer, of_folder
from tinygrad_impl.device import open_device
from tinygrad_impl.generate import (
    COMPILING,
    Generator,
    add_sampling_options,
    backend_for,
    encode,
    not_a_number,
    pieces,
    sampling,
    setup,
)
from tinygrad_impl.live.serve import add_serving_options, serve, serving
from tinygrad_impl.losses import Evaluator
from tinygrad_impl.model import GPT2

PROMPTS = ["Once upon a time", "One day, a little girl named Lily", "The dog was sad because"]
BATCH_SIZE = 4


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m tinygrad_impl.compare",
        description="Models side by side: the same prompts with the same random numbers, what can be counted of their "
        "texts, and the loss on the same text.",
        usage="%(prog)s MODEL [MODEL ...] [options]",
        epilog="example: python -m tinygrad_impl.compare gpt2 runs/mine --num-samples 20 --html compare.html",
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="a run, a folder such as runs/mine/checkpoints/step-0, or gpt2"
    )
    for option in ("--pretrained", "--finetuned"):  # of earlier versions
        parser.add_argument(option, help=argparse.SUPPRESS)
    loss = parser.add_argument_group("whose loss is measured")
    loss.add_argument(
        "--data", metavar="TEXT", help="a source or prepared folder; by default that of the last run, else stories"
    )
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
    copying = parser.add_argument_group("checking for memorized text")
    copying.add_argument(
        "--trained-on",
        metavar="TEXT",
        help="a source or prepared folder, to look in its training text; by default that of the last run, else nowhere",
    )
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="Markdown, and a .json beside it (compare.md in the last run)",
    )
    written.add_argument(
        "--html", type=Path, metavar="FILE", help="a page too, with every token's probability as shading"
    )
    add_serving_options(parser)
    sampling = add_sampling_options(parser)
    sampling.add_argument("--prompt", action="append", metavar="TEXT", help="what to continue; may be given many times")
    sampling.add_argument(
        "--num-samples",
        type=integer(1),
        default=1,
        metavar="N",
        help="texts that each model writes for each prompt (1)",
    )
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


@dataclass(frozen=True)
class LastRun:
    """What a comparison takes from the last of its models that is a run, unless told otherwise."""

    folder: Path
    data: str
    seq_len: int


def last_run(models: Sequence[str]) -> LastRun | None:
    """Raises `InputError` where its run.json is damaged."""
    folder = next((run for model in reversed(models) if (run := run_of(model))), None)
    if not folder:
        return None
    try:
        facts = read_sealed(folder / "run.json")
        return LastRun(folder, str(facts["data"]["folder"]), int(facts["options"]["seq_len"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / 'run.json'} is damaged; copy a checkpoint out of it and pass that") from None


def training_text(trained_on: str | None, last: LastRun | None) -> Path | None:
    """The prepared folder to look for copied words in, if any."""
    if trained_on is not None:
        return prepared(trained_on)
    if not last:
        return None
    try:
        open_split(Path(last.data), "train")
    except InputError as e:
        print(f"note: copied words are not counted ({e}); --trained-on TEXT names the training text", file=sys.stderr)
        return None
    return Path(last.data)


def files_to_write(args: argparse.Namespace, last: LastRun | None) -> tuple[Path, Path | None]:
    """Those of --out and --html. Raises `InputError` where they cannot be written."""
    out = args.out or (last.folder if last else Path()) / "compare.md"
    if out.suffix == ".json":
        raise InputError(
            f"--out {out} names the Markdown file, beside which a .json is written; give it another suffix"
        )
    for option, path in (("--out", out), ("--html", args.html or out)):
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; name a file to write")
        if not path.parent.is_dir():
            raise InputError(f"there is no folder {path.parent} to write {path.name} into; name another {option}")
    return out, args.html


def written(
    generator: Generator,
    losses: Callable[..., list[np.ndarray]],
    tokenizer: Tokenizer,
    rows: list[list[int]],
    new_tokens: int,
    sampler: Sampler,
) -> list[dict[str, Any]]:
    """What the model makes of each row of tokens, without the row, as `data.runs.comparison.sample` has it. `losses`
    are `losses_as_drawn` of the model: the probability of a token is exp(-loss).
    """
    drawn = list(shown(generator.stream(rows, new_tokens, sampler), new_tokens, "texts", "token"))
    own = [[step[i][0] for step in drawn if step[i]] for i in range(len(rows))]
    texts = list(zip(rows, own, strict=True))
    with Progress(total=sum(map(len, own)), desc="their losses", unit="token", part=True) as progress:
        found = losses(texts, shown=progress.update)
    samples = []
    for (row, new), lost in zip(texts, found, strict=True):
        probabilities = np.exp(-lost.astype(np.float64)).tolist()
        samples.append(sample(pieces(tokenizer, row, zip(new, probabilities, strict=True)), len(new) < new_tokens))
    return samples


def main() -> None:
    args = parser().parse_args()
    refuse_ranks("a comparison")
    if args.pretrained or args.finetuned:
        again = command("tinygrad_impl.compare", *filter(None, [args.pretrained, args.finetuned]), *args.models)
        raise InputError(f"models are named without --pretrained and --finetuned: `{again}`")
    if not args.models:
        raise InputError("there is nothing to compare; name models: `python -m tinygrad_impl.compare gpt2 runs/mine`")
    last = last_run(args.models)
    settings = sampling(args, str(last.folder) if last else args.models[-1])
    if serving(parser(), args):
        serve([(labelled(model), model) for model in args.models], (args.prompt or PROMPTS)[0], settings, args)
        return
    new_tokens = settings.pop("max_new_tokens")
    how = Reading(args.field, args.errors)
    if args.data is None and (args.valid is not None or how != AS_GIVEN):
        raise InputError("--valid, --field and --errors say how to read the text of --data; give that too")
    out, html = files_to_write(args, last)

    models = [load(model) for model in args.models]
    tokenizers = [
        of_folder(resolve(name), config.vocab_size) for name, (config, _) in zip(args.models, models, strict=True)
    ]
    device = open_device(args.device)
    source = args.data if args.data is not None else last.data if last else "stories"
    folder = prepared(source, args.valid, how, tokenizers[-1])
    trained_on = training_text(args.trained_on, last)
    context = min(config.n_positions for config, _ in models)
    seq_len = args.seq_len or (last.seq_len if last else min(config.context for config, _ in models))
    if seq_len > context:
        raise InputError(
            f"--seq-len {seq_len} is over the context of {context} tokens that all models have; give fewer"
        )
    meta, of_data = read_meta(folder), tokenizer_of(folder)
    targets = meta["splits"]["valid"]["tokens"] - 1
    measured = min(targets, args.eval_tokens or targets)
    row = first_tokens(folder, "valid", measured + 1)
    prompts = args.prompt or PROMPTS
    found: dict[str, Any] = {"models": [], "data": str(folder), "tokens": measured, "valid_tokens": targets}
    found["bytes"] = sum(len(text.encode()) for text in documents(row[1:], of_data))
    found |= {"seq_len": seq_len, "training_text": str(trained_on) if trained_on else None, "source": revision()}
    found["sampling"] = {**settings, "max_new_tokens": new_tokens, "num_samples": args.num_samples}
    found["texts"] = [{"prompt": prompt, "models": []} for prompt in prompts]
    for given, tokenizer, (config, arrays) in zip(args.models, tokenizers, models, strict=True):
        name = labelled(given)
        model = GPT2(config, {key: array.astype(np.float32) for key, array in arrays.items()})
        backend = backend_for(args.dtype, config, device)
        print(setup(name, config, device, backend), file=sys.stderr)
        if made_with(meta, tokenizer):
            count, batches = measured, windows(folder, "valid", BATCH_SIZE, seq_len, measured)
        else:
            own = translated(row, of_data, tokenizer)
            if stripped(documents(own[1:], tokenizer)) != stripped(documents(row[1:], of_data)):
                print(f"note: the tokenizer of {name} loses a part of this text", file=sys.stderr)
            count, batches = len(own) - 1, windows_of(own, BATCH_SIZE, seq_len)
        steps = math.ceil(count / (BATCH_SIZE * seq_len))
        evaluator = Evaluator(model, backend)
        loss = evaluator(shown(batches, steps, "loss", "batch"))
        if not math.isfinite(loss):
            raise InputError(not_a_number(name))
        bits = loss * count / math.log(2) / found["bytes"] if found["bytes"] else None
        confusion = perplexity(loss)
        entry = {"name": name, "loss": loss, "perplexity": confusion if confusion < math.inf else None}
        entry |= {"bits_per_byte": bits}
        entry |= {"tokens": count, "tokenizer": tokenizer.sha256, "vocab_size": config.vocab_size}
        found["models"].append(entry)
        generator = Generator(model, backend, tokenizer.vocab_size, tokenizer.eot, name)
        rows = [encode(tokenizer, prompt, args.special_tokens) for prompt in prompts for _ in range(args.num_samples)]
        # in batches of as many tokens, so that windows as long as those of the text above need no graph of their own
        losses = partial(losses_as_drawn, evaluator.of_tokens, context=config.context, tokens=BATCH_SIZE * seq_len)
        samples = written(generator, losses, tokenizer, rows, new_tokens, Sampler(**settings))
        for i, text in enumerate(found["texts"]):
            text["models"].append({"samples": samples[i * args.num_samples : (i + 1) * args.num_samples]})
    if trained_on:
        add_copied([one for text in found["texts"] for own in text["models"] for one in own["samples"]], trained_on)
    add_measures(found)

    page = markdown(found)
    with atomic_write(out, "w") as f:
        f.write(page)
    write_sealed(out.with_suffix(".json"), found)
    if html:
        with atomic_write(html, "w") as f:
            f.write(comparison_page(found))
    *files, final = [out, out.with_suffix(".json"), *([html] if html else [])]
    print(f"{page}\nWritten to {', '.join(map(str, files))} and {final}")


if __name__ == "__main__":
    run(main)
