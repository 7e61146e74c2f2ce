"""`python -m data.publish`: uploads a checkpoint, with its model card, to the Hugging Face hub.

What others need is sent: configuration, weights, tokenizer and card. What only training needs (AdamW's moments, the
loader's state, checksums) stays here. Nothing is asked of the hub before the checkpoint is known to be whole.
"""

import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from data.checkpoints.checkpoint import CONFIG, INDEX, WEIGHTS, load, resolve
from data.checkpoints.config import parameter_count
from data.checkpoints.hub import TIMEOUT
from data.checkpoints.sums import CARD, CURVE
from data.checkpoints.tensors import listing
from data.cli import ArgumentParser, InputError, run
from data.runs.card import card_of, evaluated, scores_of
from data.runs.run_folder import run_of
from data.text.tokenizer import FILES

SENT = (CONFIG, "generation_config.json", INDEX, CURVE, *FILES)
SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
OWN = {".gitattributes"}  # which the hub puts into every repository
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]*")  # of a licence or a language


def files_of(folder: Path) -> list[Path]:
    """The files of a checkpoint that are sent, but for its card."""
    return [path for path in sorted(folder.iterdir()) if path.name in SENT or SHARD.fullmatch(path.name)]


def card_to_send(folder: Path, license: str | None, language: str | None) -> ModelCard:
    """The card in the checkpoint, or that of its run, with the licence and language given, and with what is known now
    of the scores of these weights. Raises `InputError` where there is none, or its front matter cannot be read.
    """
    written, of_run = folder / CARD, run_of(folder)
    if not written.is_file() and not (of_run and (folder / "trainer.json").is_file()):
        raise InputError(f"{folder} has no {CARD} and is no checkpoint of a run; write a model card there first")
    text = written.read_text(encoding="utf-8") if written.is_file() else card_of(folder)
    if of_run and (folder / "trainer.json").is_file():
        text = evaluated(text, scores_of(folder))
    if not (folder / CURVE).is_file():
        text = re.sub(rf"!\[[^\]]*\]\({re.escape(CURVE)}\)\n*", "", text)
    try:
        card = ModelCard(text)
    except ValueError as e:
        raise InputError(f"the front matter of {written} is damaged ({str(e).splitlines()[0]}); mend it") from None
    if license:
        card.data["license"] = license
    if language:
        card.data["language"] = language
    return card


def refuse_name(name: str) -> None:
    """Raises `InputError` unless it is OWNER/NAME as the hub allows."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        pass
    else:
        if name.count("/") == 1:
            return
    raise InputError(f"--to {name} is no name that a model could have on the hub; give USER/NAME, such as me/my-gpt2")


def refused(name: str, e: Exception) -> NoReturn:
    """Raises in one sentence what the hub said, or that it said nothing."""
    code = e.response.status_code if isinstance(e, HfHubHTTPError) and e.response is not None else None
    reason = (getattr(e, "server_message", None) or str(e)).strip().partition("\n")[0]
    if code == 401:
        raise InputError("the hub does not accept this token; log in again with `hf auth login`") from None
    if code == 403:
        raise InputError(
            f"this token may not write to {name} ({reason}); give another --to, or log in with a token that may write"
        ) from None
    if code is not None and code < 500:
        raise InputError(f"the hub refuses {name} ({reason}); mend that, and try again") from None
    raise InputError(f"the hub cannot be reached for {name} ({reason}); try again, nothing is lost") from None


def refuse_occupied(api: HfApi, name: str, files: list[str], private: bool) -> bool:
    """Whether the repository is there already. Raises `InputError` where it has files that are not among those sent, or
    everybody can read it and it was to be private.
    """
    try:
        info = api.model_info(name, timeout=TIMEOUT)
    except RepositoryNotFoundError:
        return False
    others = {file.rfilename for file in info.siblings or []} - OWN - set(files)
    if others:
        raise InputError(f"{name} has other files already ({listing(others)}); give another --to")
    if private and not info.private:
        raise InputError(f"{name} is there already, and is public; give another --to, or leave out --private")
    return True


def main() -> None:
    parser = ArgumentParser(
        prog="python -m data.publish",
        description="Upload a checkpoint, with its model card, to the Hugging Face hub. Needs a token that may write: "
        "`hf auth login`, or HF_TOKEN.",
        epilog="example: python -m data.publish runs/mine --to me/my-gpt2 --license mit --dry-run",
    )
    parser.add_argument("checkpoint", metavar="RUN|CHECKPOINT", help="a run (its latest checkpoint), or a folder")
    parser.add_argument("--to", required=True, metavar="USER/NAME", help="the model's name on the hub")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent; the hub is not asked")
    parser.add_argument("--private", action="store_true", help="a new repository is for its owner alone")
    parser.add_argument("--license", metavar="ID", help="of the weights, for the card, such as mit")
    parser.add_argument("--language", metavar="ID", help="that the model writes, for the card, such as en")
    args = parser.parse_args()
    refuse_name(args.to)
    for option, value in (("--license", args.license), ("--language", args.language)):
        if value is not None and not IDENTIFIER.fullmatch(value):
            raise InputError(f"{option} {value} is no identifier of the hub; they are spelled like mit, apache-2.0, en")
    folder = resolve(Path(args.checkpoint))
    config, _ = load(folder)  # which finds what is damaged
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        raise InputError(f"{folder} has no {WEIGHTS}; convert it with `python -m torch_ref.convert` first")
    card, files = card_to_send(folder, args.license, args.language), files_of(folder)
    names = sorted([CARD, *(path.name for path in files)])
    total = sum(path.stat().st_size for path in files) + len(str(card).encode())
    print(f"{folder}, {parameter_count(config) / 1e6:.1f}M parameters: {len(names)} files, {total / 1e6:,.1f} MB")
    if args.dry_run:
        for path in files:
            print(f"  {path.name:28} {path.stat().st_size:>15,} bytes")
        print(f"  {CARD:28} {len(str(card).encode()):>15,} bytes:\n\n{card}")
    if not card.data.get("license"):
        print("note: the card names no licence, so others may not use the weights; add --license ID", file=sys.stderr)
    if args.dry_run:
        print(f"Nothing was sent. Without --dry-run this goes to {args.to}.")
        return
    if not get_token():
        raise InputError("there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        there = refuse_occupied(api, args.to, names, args.private)
        print(f"{'updating' if there else 'making'} {args.to}, and sending the files", flush=True)
        if not there:
            api.create_repo(args.to, private=args.private, exist_ok=True)
        with ExitStack() as held:
            staged = Path(held.enter_context(tempfile.TemporaryDirectory()))
            for path in files:
                (staged / path.name).symlink_to(path.resolve())
            card.save(staged / CARD)
            commit = api.upload_folder(
                repo_id=args.to, folder_path=staged, commit_message=f"{folder.parent.parent.name}: {folder.name}"
            )
    except InputError:
        raise
    except Exception as e:  # the hub client passes on the errors of whichever HTTP and transfer libraries it has
        refused(args.to, e)
    print(f"{args.to} has it: {commit.commit_url}")


if __name__ == "__main__":
    run(main)
