"""`python -m tinygrad_impl`: which commands and versions there are."""

from data.cli import ArgumentParser, command, run, versions

COMMANDS = {
    "tinygrad_impl.train": "train GPT-2 in tinygrad",
    "tinygrad_impl.generate": "continue a prompt",
    "tinygrad_impl.compare": "models side by side: their texts, what can be counted of them, and their loss",
    "tinygrad_impl.evaluate": "score a model on tasks of lm-evaluation-harness",
    "tinygrad_impl.bench": "how fast training is, beside PyTorch",
    "tinygrad_impl.scaling": "what a step would cost on many GPUs, from what was measured on few",
    "torch_ref.train": "train GPT-2 in PyTorch, with the same options and files",
    "torch_ref.evaluate": "the same as tinygrad_impl.evaluate, in PyTorch",
    "parity_tests": "prove that both compute the same, on any weights and device",
    "data.text.prepare": "tokenise text into a folder of shards",
    "data.text.shards": "verify such a folder",
    "data.runs.report": "training runs as one HTML page",
    "data.runs.accept": "accept a checkpoint that was edited on purpose",
    "data.publish": "upload a checkpoint to the Hugging Face hub",
    "torch_ref.convert": "convert weights that torch.save pickled",
}


def main() -> None:
    parser = ArgumentParser("python -m tinygrad_impl", description="Lists the project's commands and versions.")
    parser.parse_args()
    width = max(len(command(module)) for module in COMMANDS)
    for module, purpose in COMMANDS.items():
        print(f"{command(module):{width}}  {purpose}")
    print("Each has --help.", *(f"{name} {version}" for name, version in versions().items()), sep="\n")


if __name__ == "__main__":
    run(main)
