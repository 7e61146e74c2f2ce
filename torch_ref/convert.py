"""`python -m torch_ref.convert`: weights that torch.save pickled, as a Hugging Face folder in safetensors.

Read with `torch.load(weights_only=True)`, which runs no code. data/checkpoints/pickles.py calls this for --init and
--model.
"""

import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.checkpoints import pickles
from data.checkpoints.checkpoint import model_weights, read_config, save
from data.checkpoints.config import GPT2Config, parameter_shapes
from data.checkpoints.tensors import read_json
from data.cli import ArgumentParser, InputError, command, ending, run

NANO_GPT = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions"}
STATE_DICTS = ("model", "state_dict", "model_state_dict", "module")  # under which training programs put theirs
LINEAR = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")


def read_pickle(path: Path) -> Any:
    """What torch.save wrote. Raises `InputError` when it is damaged, or more than tensors and plain values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; pass a .bin, .pt or .pth that torch.save wrote") from None
    except Exception as e:  # PyTorch raises many kinds
        if found := re.search(r"GLOBAL (\S+)|class (\S+)", str(e)):
            what = found[1] or found[2]
            raise InputError(
                f"{path} has more in it than tensors and plain values ({what}), and loading that could run code; "
                "nothing was loaded; ask for the weights as safetensors"
            ) from None
        if ending(e):  # the system refuses, not the file
            raise
        # PyTorch's own words are left out: they tell to load with weights_only=False, which runs code
        raise InputError(f"{path} is damaged, or not what torch.save writes; download or copy it again") from None


def state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The tensors by name: all that was saved, or what a training program saved beside other things."""
    for found in [content, *(content.get(name) for name in STATE_DICTS if isinstance(content, dict))]:
        if isinstance(found, dict) and found and all(is_weight(*item) for item in found.items()):
            return {name: tensor.detach() for name, tensor in found.items()}
    raise InputError(f"{path} has no weights by name; save model.state_dict() with torch.save")


def is_weight(name: object, tensor: object) -> bool:
    """Whether it is a name with a tensor whose elements lie in memory as they are."""
    return isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided


def read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files beside `index`, a pytorch_model.bin.index.json, that it lists."""
    if not index.is_file():
        raise InputError(f"there is no file {index}; pass a pytorch_model.bin.index.json")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{index} has no weight_map from tensors to files; download or copy it again")
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".bin"):
            raise InputError(f"{index} names {shard!r}, which is no .bin file beside it; copy it again")
        tensors |= state_dict(read_pickle(index.parent / shard), index.parent / shard)
    if wrong := tensors.keys() ^ weight_map.keys():
        raise InputError(f"{index} and its files disagree on {min(wrong)!r}; download or copy them again")
    return tensors


def nano_gpt_config(model_args: Mapping[str, Any], path: Path) -> GPT2Config:
    """The configuration that nanoGPT keeps in its checkpoints."""
    if missing := [name for name in (*NANO_GPT, "vocab_size") if name not in model_args]:
        raise InputError(f"{path} has no {', '.join(missing)} in its model_args; pass one that nanoGPT wrote")
    sizes = {ours: model_args[theirs] for theirs, ours in NANO_GPT.items()}
    # its GELU was the tanh form until 17 May 2023; `bias` came on 27 January 2023
    activation = "gelu" if "bias" in model_args else "gelu_new"
    if activation == "gelu":
        convert = command("torch_ref.convert", path, "--out", "converted")
        note(
            f"{path.name} is nanoGPT's: its GELU is the one with erf since May 2023; if it is older, convert it with "
            f"`{convert}` and set activation_function to gelu_new in the config.json"
        )
    try:
        return GPT2Config(vocab_size=model_args["vocab_size"], activation_function=activation, **sizes)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None


def converted(path: Path) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """The configuration and the weights of a pickle: nanoGPT's, or one with its config.json beside it."""
    content = read_shards(path) if path.suffix == ".json" else read_pickle(path)
    tensors = state_dict(content, path)
    arrays = {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in tensors.items()}
    model_args = content.get("model_args")
    if isinstance(model_args, dict):
        config = nano_gpt_config(model_args, path)
    elif (path.parent / "config.json").is_file():
        config = read_config(path.parent)
    else:
        raise InputError(f"{path} does not say what its model is (how many heads, ...); put its config.json beside it")
    if any(name.endswith("attn.c_attn.weight") and a.shape[0] > a.shape[-1] for name, a in arrays.items()):
        # of nn.Linear, [out, in], which c_attn tells, the others being square or of any width
        arrays = {name: a.T if LINEAR.search(name) else a for name, a in arrays.items()}
    if isinstance(model_args, dict) and model_args.get("bias") is False:
        note(f"{path.name} was trained without biases; they are there now, and 0, which computes the same")
        shapes = parameter_shapes(config)
        arrays |= {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name.endswith(".bias")}
    return config, model_weights(config, arrays, path)


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def main() -> None:
    parser = ArgumentParser(
        prog="python -m torch_ref.convert",
        description="Convert weights that torch.save pickled to a Hugging Face folder in safetensors. No code in them "
        "is run.",
        epilog="example: python -m torch_ref.convert out/ckpt.pt --out models/mine",
    )
    parser.add_argument("pickle", type=Path, metavar="FILE", help="nanoGPT's ckpt.pt, pytorch_model.bin, ...; a folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write")
    args = parser.parse_args()
    path, out = args.pickle, args.out
    if path.is_dir():
        found = pickles.within(path)
        if found is None:
            raise InputError(f"{path} has no {' or '.join(pickles.OF_FOLDERS)} to convert; pass the file itself")
        path = found
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there and is not an empty folder; pass another --out")
    config, arrays = converted(path)
    save(out, config, arrays)
    print(f"Written to {out}")


if __name__ == "__main__":
    run(main)
