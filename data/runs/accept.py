"""`python -m data.runs.accept`: makes a checkpoint that was edited on purpose one that is loaded again."""

from pathlib import Path

from data.checkpoints.checkpoint import read_model, resolve
from data.checkpoints.config import parameter_count
from data.checkpoints.sums import SUMS, digests, read_sums, write_sums
from data.cli import ArgumentParser, InputError, run
from data.runs.run_folder import read_checkpoint


def changes(folder: Path) -> dict[str, str]:
    """What happened to each file of the folder that is not as SHA256SUMS says, by name."""
    listed, found = read_sums(folder), digests(folder)
    if listed is None:  # which is no reason to refuse: it is made anew
        return dict.fromkeys(found, f"unknown, as {SUMS} is damaged")
    words = {name: "changed" if name in listed else "added" for name in found if found[name] != listed.get(name)}
    return words | dict.fromkeys(listed.keys() - found.keys(), "removed")


def main() -> None:
    parser = ArgumentParser(
        prog="python -m data.runs.accept",
        description=f"Accept a checkpoint whose files were edited on purpose: its {SUMS} is made anew. Shows what "
        "changed, and refuses a checkpoint that cannot be loaded.",
        epilog="example: python -m data.runs.accept runs/mine/checkpoints/step-450",
    )
    parser.add_argument("checkpoint", metavar="FOLDER", help="a checkpoint's folder, or a run's: its latest")
    folder = resolve(Path(parser.parse_args().checkpoint))
    if not (folder / SUMS).is_file():
        raise InputError(f"{folder} has no {SUMS}, so there is nothing to accept; it is loaded as it is")
    if not (changed := changes(folder)):
        print(f"{folder} is as it was written.")
        return
    for name, what in sorted(changed.items()):
        print(f"{what}: {name}")
    config, *_ = read_checkpoint(folder) if (folder / "trainer.json").exists() else read_model(folder)
    write_sums(folder)
    print(f"{folder} can be loaded ({parameter_count(config) / 1e6:.1f}M parameters). Accepted: {SUMS} is made anew.")


if __name__ == "__main__":
    run(main)
