"""`python -m tinygrad_impl.compare`: what a model wrote and lost before training, beside what it does after."""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import load, read_json
from data.cli import ArgumentParser, InputError, Progress, run, whole
from data.files import atomic_write
from data.runs.report_comparison import comparison_page
from data.runs.revision import revision
from data.runs.run_folder import read_sealed, write_sealed
from data.text.loader import windows
from data.text.prepare import prepared
from data.text.sampling import Sampler
from data.text.shards import read_meta
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
        "--eval-tokens", type=whole(0), default=16_384, metavar="N", help="its first N (16384); 0: all of it"
    )
    loss.add_argument("--seq-len", type=whole(1), metavar="N", help="tokens in a window; by default as in the run")
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


def main() -> None:
    args = parser().parse_args()
    settings = sampling(args, args.finetuned)
    new_tokens = settings.pop("max_new_tokens")
    trained = Path(args.finetuned, "run.json")
    if trained.is_file():
        try:
            facts = read_sealed(trained)
            source, seq_len, beside = str(facts["data"]["folder"]), int(facts["options"]["seq_len"]), trained.parent
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{trained} is damaged; pass one of the run's checkpoints instead") from None
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

    models = {"pretrained": load(args.pretrained), "finetuned": load(args.finetuned)}
    device = open_device(args.device)
    folder = prepared(args.data or source)
    context = min(config.n_positions for config, _ in models.values())
    seq_len = args.seq_len or seq_len or min(config.context for config, _ in models.values())
    if seq_len > context:
        raise InputError(
            f"--seq-len {seq_len} is over the context of {context} tokens that both models have; give fewer"
        )
    targets = read_meta(folder)["splits"]["valid"]["tokens"] - 1
    measured = min(targets, args.eval_tokens or targets)
    prompts = args.prompt or PROMPTS
    names = {"pretrained": labelled(args.pretrained), "finetuned": labelled(args.finetuned)}
    found: dict[str, Any] = {"data": str(folder), "tokens": measured, "seq_len": seq_len}
    found["sampling"] = {**settings, "max_new_tokens": new_tokens}
    found["source"] = revision()
    found["texts"] = [{"prompt": prompt} for prompt in prompts]
    for side, (config, arrays) in models.items():
        model = GPT2(config, {name: array.astype(np.float32) for name, array in arrays.items()})
        backend = backend_for(args.dtype, config, device)
        print(setup(names[side], config, device, backend), file=sys.stderr)
        batches = windows(folder, "valid", BATCH_SIZE, seq_len, measured)
        steps = math.ceil(measured / (BATCH_SIZE * seq_len))
        loss = Evaluator(model, backend)(shown(batches, steps, "loss", "batch"))
        found[side] = {"name": names[side], "loss": loss, "perplexity": math.exp(loss), "vocab_size": config.vocab_size}
        tokens = [encode(prompt) for prompt in prompts]
        new = Generator(model, backend).stream(tokens, new_tokens, Sampler(**settings))
        drawn = list(shown(new, new_tokens, "texts", "token"))
        for i, text in enumerate(found["texts"]):
            written = list(pieces(step[i] for step in drawn if step[i]))
            text[side] = {"pieces": [piece for piece, _ in written], "probabilities": [p for _, p in written]}

    page = f"# {names['pretrained']} and {names['finetuned']}\n\n"
    page += f"On {folder}, the first {measured:,} of {targets:,} validation tokens, {seq_len} at a time:\n\n"
    page += "| | loss (nats a token) | perplexity |\n|---|---|---|\n"
    for side in names:
        page += f"| {names[side]} | {found[side]['loss']:.4f} | {found[side]['perplexity']:.2f} |\n"
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
