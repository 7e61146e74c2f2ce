"""Weights that torch.save pickled: what they become, and that nothing in them is run."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import torch_ref.convert
from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import GPT2Config, parameter_shapes, to_hf
from data.checkpoints.initialize import initial_weights
from data.checkpoints.tensors import read_safetensors
from data.cli import InputError
from data.testing import Result, call, refused
from torch_ref.model import GPT2

SMALL = GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=2, n_head=2, activation_function="gelu")
TOKENS = torch.arange(60, 44, -1)[None]

State = dict[str, torch.Tensor]


def convert(cwd: Path, *argv: object) -> Result:
    return call(torch_ref.convert.main, *argv, cwd=cwd)


def nano_gpt(biases: bool) -> State:
    """Random weights with nanoGPT's names, in nn.Linear's layout [out, in]."""
    torch.manual_seed(1)
    shapes = {
        name: shape[::-1] if torch_ref.convert.LINEAR.search(name) else shape
        for name, shape in parameter_shapes(SMALL).items()
        if biases or not name.endswith(".bias")
    }
    state = {f"transformer.{name}": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def logits_of(state: State, gelu: str) -> torch.Tensor:
    """nanoGPT's function of `TOKENS`, written down by itself."""
    state = {name.removeprefix("transformer."): t for name, t in state.items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (8,), state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = state["wte.weight"][TOKENS] + state["wpe.weight"]
    for h in ("h.0", "h.1"):
        q, k, v = (t.unflatten(2, (2, 4)).mT for t in linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(8, 2))
        q, k, v = (t.permute(0, 3, 1, 2) for t in (q, k, v))  # (1, 2, 16, 4)
        scores = (q @ k.mT / 2).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
        x = x + linear((scores.softmax(3) @ v).transpose(1, 2).flatten(2), f"{h}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate=gelu), f"{h}.mlp.c_proj")
    return linear(norm(x, "ln_f"), "lm_head")


def model_args(**more: Any) -> dict[str, Any]:
    return {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 61, "dropout": 0.2} | more


@pytest.mark.parametrize(
    ("given", "gelu", "notes"),
    [
        ({"bias": True}, "none", ["GELU"]),
        ({"bias": False}, "none", ["GELU", "without biases"]),
        ({}, "tanh", []),  # of before nanoGPT had a choice, when its GELU was another
    ],
)
def test_nano_gpt(given: dict[str, Any], gelu: str, notes: list[str], tmp_path: Path) -> None:
    state = nano_gpt(biases=given.get("bias", True))
    saved = {"model": {f"_orig_mod.{name}": t for name, t in state.items()}, "model_args": model_args(**given)}
    torch.save(saved | {"optimizer": {"state": {}}, "iter_num": 7, "config": {"out_dir": "out"}}, tmp_path / "ckpt.pt")
    result = convert(tmp_path, "ckpt.pt", "--out", "mine")
    assert (result.code, result.out) == (0, "Written to mine\n")
    assert len(result.err.splitlines()) == len(notes)
    for line, words in zip(result.err.splitlines(), notes, strict=True):
        assert line.startswith("note: ckpt.pt ")
        assert words in line
    config, arrays = load(tmp_path / "mine")
    assert config.activation_function == {"none": "gelu", "tanh": "gelu_new"}[gelu]
    ours = GPT2(config, arrays)(TOKENS)[0]
    torch.testing.assert_close(ours, logits_of(state, gelu), rtol=0, atol=1e-5)


def hugging_face(folder: Path, **variant: Any) -> transformers.GPT2LMHeadModel:
    """A folder that has its weights as pytorch_model.bin, as transformers wrote them before safetensors."""
    torch.manual_seed(2)
    config = transformers.GPT2Config(**to_hf(SMALL) | variant)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def assert_is(folder: Path, model: transformers.GPT2LMHeadModel) -> None:
    ours = GPT2(*load(folder))(TOKENS)[0]
    torch.testing.assert_close(ours, model(TOKENS).logits, rtol=0, atol=1e-5)


def test_a_folder_with_a_pickle_is_loaded_by_a_process_of_its_own(tmp_path: Path) -> None:
    """Without PyTorch in this one, which data/ never imports."""
    model = hugging_face(tmp_path / "dialogpt", n_inner=24)
    assert_is(tmp_path / "dialogpt", model)
    assert sorted(os.listdir(tmp_path / "dialogpt")) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
def test_a_state_dict_with_its_config_beside(key: str | None, tmp_path: Path) -> None:
    model = hugging_face(tmp_path / "cerebras", n_inner=24, layer_norm_epsilon=1e-6)
    tensors = model.state_dict() if key else dict(model.named_parameters())  # parameters carry their gradients' wish
    state = {f"module.{name}": t for name, t in tensors.items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "cerebras" / "last.pth")
    (tmp_path / "cerebras" / "pytorch_model.bin").unlink()
    assert convert(tmp_path, "cerebras/last.pth", "--out", "out").code == 0
    assert_is(tmp_path / "out", model)
    assert load(tmp_path / "out")[0].layer_norm_epsilon == 1e-6


def test_shards_and_bfloat16(tmp_path: Path) -> None:
    model = hugging_face(tmp_path / "model").bfloat16()
    state, files = model.state_dict(), ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    weight_map = {name: files[i % 2] for i, name in enumerate(state)}
    for file in files:
        torch.save({n: t for n, t in state.items() if weight_map[n] == file}, tmp_path / "model" / file)
    (tmp_path / "model" / "pytorch_model.bin").unlink()
    index = tmp_path / "model" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert convert(tmp_path, "model", "--out", "out").code == 0
    assert_is(tmp_path / "out", model.float())
    index.write_text(json.dumps({"weight_map": weight_map | {"ghost": files[0]}}))
    refused(convert(tmp_path, "model", "--out", "more"), "index.json and its files disagree on 'ghost'; ")
    index.write_text(json.dumps({"weight_map": weight_map | {"ghost": "../x.bin"}}))
    refused(convert(tmp_path, "model", "--out", "more"), "names '../x.bin', which is no .bin file beside it; ")


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_a_pickle_that_would_run_code_runs_none(tmp_path: Path) -> None:
    for place in (lambda state: {"model": Hostile()} | state, lambda state: state | {"model": Hostile()}):
        torch.save(place({"wte.weight": torch.zeros(2, 2)}), tmp_path / "ckpt.pt")
        result = convert(tmp_path, "ckpt.pt", "--out", "out")
        refused(result, "ckpt.pt has more in it than tensors and plain values (", "system), and loading that could run")
        assert sorted(os.listdir(tmp_path)) == ["ckpt.pt"]


def test_what_is_refused(tmp_path: Path) -> None:
    model = hugging_face(tmp_path / "model")
    whole = (tmp_path / "model" / "pytorch_model.bin").read_bytes()
    damaged = "x.bin is damaged, or not what torch.save writes; download or copy it again"
    for raw in (b"", b"no pickle", b"Some words.\n" * 9, whole[:1000], whole[:-100]):
        (tmp_path / "x.bin").write_bytes(raw)
        refused(convert(tmp_path, "x.bin", "--out", "out"), damaged)
    (tmp_path / "x.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    refused(convert(tmp_path, "x.bin", "--out", "out"), "x.bin has more in it than tensors and plain values (")
    for content, words in (
        ([1, 2], "x.bin has no weights by name; save model.state_dict() with torch.save"),
        ({"model": {}}, "x.bin has no weights by name"),
        ({1: torch.ones(2)}, "x.bin has no weights by name"),
        ({"wte.weight": torch.eye(2).to_sparse()}, "x.bin has no weights by name"),
        (model.state_dict(), "x.bin does not say what its model is (how many heads, ...); put its config.json beside"),
        (
            {"model": nano_gpt(True), "model_args": {"n_layer": 2}},
            "x.bin has no n_head, n_embd, block_size, vocab_size",
        ),
        (
            {"model": nano_gpt(True), "model_args": model_args(n_head=3)},
            "x.bin: n_embd 8 does not divide into n_head 3",
        ),
        ({"model": nano_gpt(False), "model_args": model_args()}, "x.bin: 'h.0.attn.c_attn.bias', "),
    ):
        torch.save(content, tmp_path / "x.bin")
        refused(convert(tmp_path, "x.bin", "--out", "out"), words)
    refused(convert(tmp_path, "y.bin", "--out", "out"), "there is no file y.bin; pass a .bin, .pt or .pth")
    refused(convert(tmp_path, "y.json", "--out", "out"), "there is no file y.json; pass a pytorch_model.bin.index.json")
    (tmp_path / "empty").mkdir()
    refused(convert(tmp_path, "empty", "--out", "out"), "empty has no pytorch_model.bin or ")
    refused(convert(tmp_path, "model", "--out", "model"), "model is there and is not an empty folder; pass another")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


def test_safetensors_come_before_a_pickle(tmp_path: Path) -> None:
    hugging_face(tmp_path / "model")
    arrays = initial_weights(SMALL, 3)
    save(tmp_path / "other", SMALL, arrays)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "model")
    np.testing.assert_array_equal(load(tmp_path / "model")[1]["wte.weight"], arrays["wte.weight"])
    assert read_safetensors(tmp_path / "model" / "model.safetensors").keys() == arrays.keys()


def test_without_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "ckpt.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"ckpt.pt is a pickle, which PyTorch has to convert; `pip install torch`$"):
        load(tmp_path / "ckpt.pt")
