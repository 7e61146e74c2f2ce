import contextlib
import hashlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from huggingface_hub import constants

from data.checkpoints import hub as hub_models
from data.checkpoints.checkpoint import INDEX, WEIGHTS, load, resolve, save
from data.checkpoints.config import PRESETS, GPT2Config, parameter_shapes, to_hf
from data.checkpoints.initialize import initial_weights
from data.checkpoints.tensors import DTYPES, read_safetensors, write_safetensors
from data.cli import InputError
from data.text.tokenizer import VOCAB_SIZE, gpt2

SMALL = GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=2, n_head=2)

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**to_hf(SMALL)))
    for parameter in model.parameters():  # biases and norms too, which start out all alike
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def arrays(model: transformers.GPT2LMHeadModel) -> Arrays:
    return {name: tensor.detach().numpy().copy() for name, tensor in model.transformer.named_parameters()}


@pytest.fixture
def folder(tmp_path: Path, model: transformers.GPT2LMHeadModel) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path, model: transformers.GPT2LMHeadModel) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="3KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Stands in the hub's place: it accepts connections and, unless a test makes it, never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_models, "TIMEOUT", 0.2)
        # it asks that about something of its own too
        monkeypatch.setattr("huggingface_hub.utils._detect_agent._REGISTRY_FETCH_TIMEOUT", 0.2)
        yield server


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def assert_same(ours: Arrays, theirs: Arrays) -> None:
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        assert array.shape == theirs[name].shape, name
        assert array.tobytes() == theirs[name].tobytes(), name


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What is read


def test_a_folder_written_by_transformers(folder: Path, arrays: Arrays) -> None:
    config, weights = load(folder)
    assert config == SMALL
    assert_same(weights, arrays)
    assert_same(load(str(folder))[1], arrays)


def test_shards(sharded: Path, arrays: Arrays) -> None:
    assert_same(load(sharded)[1], arrays)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float16", np.float16), ("float32", np.float32), ("float64", np.float64), ("bfloat16", np.float32)],
)
def test_floats_stay_what_they_are_and_bfloat16_is_widened_exactly(
    tmp_path: Path, model: transformers.GPT2LMHeadModel, dtype: str, expected: type
) -> None:
    cast = transformers.GPT2LMHeadModel(model.config).to(getattr(torch, dtype))
    cast.load_state_dict(model.state_dict())
    cast.save_pretrained(tmp_path)
    weights = load(tmp_path)[1]
    wide = cast.float() if dtype == "bfloat16" else cast
    assert_same(weights, {name: tensor.detach().numpy() for name, tensor in wide.transformer.named_parameters()})
    assert all(array.dtype == expected for array in weights.values())


def test_every_bfloat16_there_is(tmp_path: Path) -> None:
    bits = torch.arange(2**16).to(torch.uint16)
    safetensors.torch.save_file({"x": bits.view(torch.bfloat16)}, tmp_path / "x.safetensors")
    wide = read_safetensors(tmp_path / "x.safetensors")["x"]
    assert np.array_equal(wide.view(np.uint32), np.arange(2**16, dtype=np.uint32) << 16)


def test_bare_names_with_mask_buffers_and_the_head_beside_as_in_the_hubs_own_file(folder: Path, arrays: Arrays) -> None:
    mask = np.tril(np.ones((1, 1, 16, 16), dtype=np.float32))
    buffers = {f"h.{i}.attn.bias": mask for i in range(2)} | {"h.0.attn.masked_bias": np.array(-1e4, np.float32)}
    safetensors.numpy.save_file(arrays | buffers, folder / WEIGHTS)
    assert_same(load(folder)[1], arrays)
    safetensors.numpy.save_file(arrays | buffers | {"lm_head.weight": arrays["wte.weight"]}, folder / WEIGHTS)
    assert_same(load(folder)[1], arrays)


def test_a_file_that_keeps_the_head_alone_of_the_tied_pair(folder: Path, arrays: Arrays) -> None:
    head = {name: array for name, array in arrays.items() if name != "wte.weight"}
    safetensors.numpy.save_file(head | {"lm_head.weight": arrays["wte.weight"]}, folder / WEIGHTS)
    assert_same(load(folder)[1], arrays)


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod.", "module.", "model.", "module._orig_mod.transformer.", "model.model."]
)
def test_names_within_what_wrapped_the_model(wrapper: str, folder: Path, arrays: Arrays) -> None:
    mask = {f"{wrapper}h.0.attn.bias": np.tril(np.ones((1, 1, 16, 16), dtype=np.float32))}
    named = {wrapper + name: array for name, array in arrays.items()}
    safetensors.numpy.save_file(named | mask | {f"{wrapper}lm_head.weight": arrays["wte.weight"]}, folder / WEIGHTS)
    assert_same(load(folder)[1], arrays)
    safetensors.numpy.save_file(named | {"ln_f.bias": arrays["ln_f.bias"]}, folder / WEIGHTS)
    with pytest.raises(InputError, match=f"both ln_f.bias and {wrapper}ln_f.bias are there; keep one of them"):
        load(folder)


def test_an_untied_head(tmp_path: Path, arrays: Arrays) -> None:
    untied, head = replace(SMALL, tie_word_embeddings=False), {"lm_head.weight": arrays["wte.weight"] + 1}
    save(tmp_path, untied, arrays | head)
    assert load(tmp_path)[0] == untied
    assert_same(load(tmp_path)[1], arrays | head)
    rewrite(tmp_path / "config.json", tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"differs from wte.weight, and config.json says .*; .* to false$"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"'lm_head.weight' missing"):
        save(tmp_path, untied, arrays)


def test_every_type_that_numpy_has(tmp_path: Path) -> None:
    types = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1"]
    arrays = {name: np.array([[1, 2, 3], [4, 100, 7]], name) for name in types} | {"bool": np.array([True, False])}
    for name in types:
        arrays[name][0, 0] = np.iinfo(name).max if name[0] in "iu" else np.finfo(name).max
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    assert_same(dict(sorted(read_safetensors(tmp_path / "x.safetensors").items())), dict(sorted(arrays.items())))


def test_one_file_comes_before_shards(sharded: Path, arrays: Arrays) -> None:
    changed = {name: array + 1 for name, array in arrays.items()}
    safetensors.numpy.save_file(changed, sharded / WEIGHTS)
    assert_same(load(sharded)[1], changed)


def test_weights_that_are_not_finite_are_read(folder: Path, arrays: Arrays) -> None:
    """Also where the head lies beside the embedding: NaN differs from itself, the head does not."""
    arrays["wte.weight"][3, 2] = np.nan
    safetensors.numpy.save_file(arrays | {"lm_head.weight": arrays["wte.weight"]}, folder / WEIGHTS)
    assert_same(load(folder)[1], arrays)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 1e-3])
def test_the_epsilon_of_a_folder(epsilon: float, folder: Path, tmp_path: Path, arrays: Arrays) -> None:
    rewrite(folder / "config.json", layer_norm_epsilon=epsilon)
    config = load(folder)[0]
    assert config == GPT2Config(61, 16, 8, 2, 2, epsilon)
    save(tmp_path / "again", config, arrays)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["layer_norm_epsilon"] == epsilon
    assert load(tmp_path / "again")[0] == config


# What is written


def test_the_files_of_the_tokenizer_come_along(tmp_path: Path) -> None:
    files = {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json"}
    for name, tokenizer, beside in (("with", gpt2(), files), ("without", None, set[str]())):
        config = GPT2Config(VOCAB_SIZE + 47, n_positions=4, n_embd=2, n_layer=1, n_head=1)
        save(tmp_path / name, config, initial_weights(config, 0), tokenizer)
        assert {path.name for path in (tmp_path / name).iterdir()} == {"config.json", WEIGHTS} | beside


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_round_trip(tmp_path: Path, arrays: Arrays, dtype: type) -> None:
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    save(tmp_path / "new" / "folder", SMALL, arrays)
    config, weights = load(tmp_path / "new" / "folder")
    assert config == SMALL
    assert_same(weights, arrays)


def test_transformers_loads_what_is_saved(tmp_path: Path, model: transformers.GPT2LMHeadModel, arrays: Arrays) -> None:
    save(tmp_path, SMALL, arrays)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    with safetensors.safe_open(tmp_path / WEIGHTS, "np") as f:
        assert f.metadata() == {"format": "pt"}  # which older versions of transformers ask for
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert {loaded.config.attn_pdrop, loaded.config.embd_pdrop, loaded.config.resid_pdrop} == {0.0}
    theirs, ours = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes(), name
    tokens = torch.arange(16)[None]
    assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


def test_any_memory_layout_and_any_type_is_written_as_it_reads(tmp_path: Path) -> None:
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {
        "step": np.array(7),
        "transposed": grid.T,
        "strided": grid[:, ::2],
        "swapped": grid.astype(">f4"),
        "empty": grid[:0],
        "flags": grid > 3,
        "bytes": np.arange(3, dtype=np.uint8),
    }
    digest = write_safetensors(tmp_path / "x.safetensors", arrays, {"format": "np"})
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    read = read_safetensors(tmp_path / "x.safetensors")
    native = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    native["swapped"] = grid
    assert_same(dict(sorted(read.items())), dict(sorted(native.items())))


def test_the_bytes_are_those_that_the_library_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the names and types, and in however many pieces they are written."""
    monkeypatch.setattr("data.checkpoints.tensors.PIECE", 10)
    arrays = {f'{kind} "ü\u2028\\\n\x1f\x7f': np.arange(5).astype(kind) for kind in DTYPES.values()}
    arrays |= {"b": np.zeros((0, 3), np.float32), "a": np.array(2.5, np.float32), "c": np.ones((3, 2), np.float16)}
    for metadata in ({"format": "pt"}, {}):
        digest = write_safetensors(tmp_path / "x.safetensors", arrays, metadata)
        expected = safetensors.numpy.save(arrays, metadata)
        assert (tmp_path / "x.safetensors").read_bytes() == expected
        assert digest == hashlib.sha256(expected).hexdigest()


def test_a_save_that_does_not_fit_writes_nothing(tmp_path: Path, arrays: Arrays) -> None:
    for name, wrong, message in [
        ("wpe.weight", np.zeros((2, 2), np.float32), r"wpe.weight is \[2, 2\] where config.json makes it \[16, 8\]"),
        ("h.0.ln_1.bias", np.zeros(8, np.int32), "h.0.ln_1.bias is of type int32"),
        ("h.2.ln_1.bias", np.zeros(8, np.float32), "'h.2.ln_1.bias' not part of the model"),
    ]:
        with pytest.raises(InputError, match=message):
            save(tmp_path / "out", SMALL, arrays | {name: wrong})
    del arrays["ln_f.bias"]
    with pytest.raises(InputError, match=r"'ln_f.bias' missing"):
        save(tmp_path / "out", SMALL, arrays)
    assert not (tmp_path / "out").exists()


def test_a_save_that_fails_leaves_the_old_files(
    tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, SMALL, arrays)
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / WEIGHTS, {"x": np.zeros(3)}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    assert_same(load(tmp_path)[1], arrays)


def test_saving_onto_a_file_is_refused(tmp_path: Path, arrays: Arrays) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file"):
        save(tmp_path / "file", SMALL, arrays)


# What is refused: tensors


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("ln_f.bias", None, r"'ln_f.bias' missing"),
        ("h.2.ln_1.bias", np.zeros(8, np.float32), r"'h.2.ln_1.bias' not part of the model"),
        (
            "h.1.mlp.c_fc.weight",
            np.zeros((32, 8), np.float32),
            r"another size, h.1.mlp.c_fc.weight is \[32, 8\] where config.json makes it \[8, 32\]",
        ),
        ("h.0.ln_2.weight", np.zeros(8, np.int64), r"h.0.ln_2.weight is of type int64"),
        ("transformer.wte.weight", np.zeros((61, 8), np.float32), r"both wte.weight and transformer.wte.weight"),
        ("lm_head.weight", np.zeros((61, 8), np.float32), r"lm_head.weight differs from wte.weight"),
        ("lm_head.weight", np.zeros((61, 9), np.float32), r"lm_head.weight differs from wte.weight"),
    ],
)
def test_tensors_that_are_not_the_models(folder: Path, arrays: Arrays, name: str, tensor: object, message: str) -> None:
    changed = arrays | {name: tensor}
    safetensors.numpy.save_file({k: v for k, v in changed.items() if v is not None}, folder / WEIGHTS)  # type: ignore[misc]
    with pytest.raises(InputError, match=message):
        load(folder)


def test_weights_of_another_size_name_the_first_and_count_them(folder: Path) -> None:
    rewrite(folder / "config.json", n_embd=16)
    with pytest.raises(InputError, match=r"wte.weight is \[61, 8\] .* it \[61, 16\] \(28 such tensors\)"):
        load(folder)


def test_float8_is_refused(folder: Path, model: transformers.GPT2LMHeadModel) -> None:
    tensors = {name: tensor.detach().to(torch.float8_e4m3fn) for name, tensor in model.transformer.named_parameters()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match=r"' is of type F8_E4M3"):
        load(folder)


@pytest.mark.parametrize(("count", "more"), [(3, ""), (4, " and 1 more"), (6, " and 3 more")])
def test_three_names_stand_for_many(count: int, more: str, folder: Path, arrays: Arrays) -> None:
    lost = sorted(arrays)[:count]
    assert lost[:3] == ["h.0.attn.c_attn.bias", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.bias"]
    safetensors.numpy.save_file({k: v for k, v in arrays.items() if k not in lost}, folder / WEIGHTS)
    listed = "'h.0.attn.c_attn.bias', 'h.0.attn.c_attn.weight', 'h.0.attn.c_proj.bias'"
    with pytest.raises(InputError, match=rf"model: {listed}{more} missing; the weights are not those"):
        load(folder)


# What is refused: files


def test_another_model_is_refused_by_its_config(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="llama")
    with pytest.raises(InputError, match=r"model/config.json: model_type is 'llama'"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"n_embd": ' + "9" * 5000 + "}", "\udcff"])
def test_a_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"model/config.json is damaged"):
        load(folder)


def test_missing_files(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"neither {WEIGHTS} nor {INDEX}"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"model has no config.json; pass the folder of a run or of a whole"):
        load(folder)


def test_damaged_safetensors(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    empty = b'{"x":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % 2**63
    for damaged in (
        b"",
        whole[:4],
        whole[:100],
        whole[:-1],
        whole + b"\0",
        b"\xff" * 8 + whole[8:],
        (10**12).to_bytes(8, "little") + whole[8:],
        (20).to_bytes(8, "little") + b"[" * 20,
        len(empty).to_bytes(8, "little") + empty,
    ):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(InputError, match=r"model.safetensors is damaged"):
            load(folder)


def test_damaged_shards(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    weight_map = index["weight_map"]
    first, last = min(weight_map.values()), max(weight_map.values())
    name = next(name for name in weight_map if weight_map[name] == first)

    for outside in ("../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "pytorch_model.bin"):
        rewrite(sharded / INDEX, weight_map=weight_map | {name: outside})
        with pytest.raises(InputError, match=r"index.json names '.*', which is no .safetensors file beside it"):
            load(sharded)
    for damaged in (None, 3, {name: 3}):
        rewrite(sharded / INDEX, weight_map=damaged)
        with pytest.raises(InputError, match=r"index.json has no weight_map"):
            load(sharded)
    rewrite(sharded / INDEX, weight_map=weight_map | {name: last})
    with pytest.raises(InputError, match=f"{first} and {INDEX} disagree on '{name}'"):
        load(sharded)
    rewrite(sharded / INDEX, weight_map=weight_map | {"ghost": first})
    with pytest.raises(InputError, match=f"{first} and {INDEX} disagree on 'ghost'"):
        load(sharded)
    rewrite(sharded / INDEX, weight_map=weight_map)
    (sharded / last).unlink()
    with pytest.raises(InputError, match=f"{last} is missing"):
        load(sharded)


# Where a name leads


def test_a_run_stands_for_its_latest_checkpoint(tmp_path: Path, folder: Path, arrays: Arrays) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"run has no checkpoint yet"):
        resolve(run)
    save(run / "checkpoints" / "step-100", SMALL, {name: array + 1 for name, array in arrays.items()})
    shutil.copytree(folder, run / "checkpoints" / "step-300")
    latest = run / "checkpoints" / "latest"
    with pytest.raises(InputError, match=r"checkpoints/latest does not name a checkpoint beside it"):
        resolve(run)
    latest.write_text("step-300\n")
    assert resolve(run) == run / "checkpoints" / "step-300"
    assert_same(load(run)[1], arrays)
    for damaged in (b"", b"\n", b"step-200", b"..", b".", b"../..", b"step-300\nstep-100", b"\0\xff", b"9" * 10_000):
        latest.write_bytes(damaged)
        with pytest.raises(InputError, match=r"checkpoints/latest does not name a checkpoint beside it"):
            resolve(run)


@pytest.mark.parametrize("name", ["./gpt2", "../gpt2", "/no/such", "~/no-such", "a/b/c", Path("gpt2")])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name: str | Path, hub: socket.socket) -> None:
    others = ", or a hub name such as gpt2" if isinstance(name, str) else ""
    with pytest.raises(InputError, match=f"^there is no folder {name}; pass the folder .* or of a checkpoint{others}$"):
        load(name)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_file_of_a_checkpoint_stands_for_its_folder(name: str, folder: Path, arrays: Arrays) -> None:
    assert resolve(folder / name) == folder
    assert_same(load(str(folder / name))[1], arrays)


def test_another_file_is_no_folder(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "mine.safetensors")
    sentence = (
        r"mine.safetensors is a file; pass the folder that holds config.json and the weights as model.safetensors"
    )
    with pytest.raises(InputError, match=sentence):
        load(folder / "mine.safetensors")


@pytest.mark.parametrize("name", ["out/ckpt.pt", "gpt2.safetensors"])
def test_a_file_that_is_not_there_is_not_asked_of_the_hub(name: str, hub: socket.socket) -> None:
    with pytest.raises(InputError, match=f"^there is no file {name}; pass"):
        load(name)


def test_the_files_of_a_run_that_name_a_checkpoint(tmp_path: Path, folder: Path, arrays: Arrays) -> None:
    places = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder, places / "step-300")
    save(places / "step-400", SMALL, {name: array + 1 for name, array in arrays.items()})
    (places / "latest").write_text("step-400\n")
    (places / "best").write_text("step-300\n")
    assert resolve(places / "best") == places / "step-300"
    assert_same(load(str(places / "best"))[1], arrays)
    assert resolve(places / "latest") == resolve(places) == places / "step-400"
    (places / "best").write_text("step-7\n")
    with pytest.raises(InputError, match=r"checkpoints/best does not name a checkpoint beside it \('step-7'\); "):
        resolve(places / "best")
    (folder / "latest").write_text("step-300\n")  # which is no run's
    with pytest.raises(InputError, match=r"model/latest is a file; pass the folder"):
        resolve(folder / "latest")


@pytest.mark.parametrize("name", ["a b", "gpt2 ", "x" * 300])
def test_what_cannot_be_a_hub_name(name: str) -> None:
    with pytest.raises(InputError, match="neither a folder nor a name that the hub could have"):
        load(name)


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_silent_hub_is_given_up_and_its_cache_used(
    name: str, hub: socket.socket, hub_cache: Path, folder: Path, arrays: Arrays
) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=f"no folder {name}.*hub cannot be reached.*; check the name, or pass"):
        load(name)
    assert time.monotonic() - start < 10
    cached = hub_cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, cached / "snapshots" / "0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    assert_same(load(name)[1], arrays)


def with_files(*names: str) -> Any:
    """What the hub says of a model."""
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])


@pytest.mark.parametrize(
    ("files", "patterns"),
    [
        (["config.json", "pytorch_model.bin"], ["pytorch_model*.bin", "pytorch_model.bin.index.json"]),
        (["config.json", "pytorch_model-00001-of-00002.bin"], ["pytorch_model*.bin", "pytorch_model.bin.index.json"]),
        (["config.json", "model-1.safetensors"], ["model*.safetensors", "model.safetensors.index.json"]),
        (["config.json", "model/a.safetensors"], None),
        (["gguf/config.json", "gguf/model.safetensors"], None),
        (["config.json", "adapter_model.safetensors"], None),
        (["pytorch_model.bin"], None),
        ([], None),
    ],
)
def test_what_a_model_of_the_hub_has(files: list[str], patterns: list[str] | None) -> None:
    if patterns:
        assert hub_models.weights_among(files, "some/model") == patterns
        return
    has = ", ".join(map(repr, sorted(files))) or "nothing"
    sentence = (
        "the hub's some/model has no config.json with model.safetensors or pytorch_model.bin beside it, but "
        f"{has}; choose another, or `hf download some/model` and pass the folder that has them"
    )
    with pytest.raises(InputError, match=f"^{sentence}$"):
        hub_models.weights_among(files, "some/model")


@pytest.mark.parametrize("reachable", [True, False])
def test_what_the_hub_is_asked_for(
    reachable: bool, monkeypatch: pytest.MonkeyPatch, folder: Path, arrays: Arrays
) -> None:
    """Whether the model is there, with a short wait; then for configuration, weights and tokenizer, of the cache if
    need be.
    """
    asked: list[Any] = []

    class Hub:
        def model_info(self, name: str, timeout: float) -> Any:
            asked.append((name, timeout))
            if not reachable:
                raise ConnectionError("no route\nmore")
            return with_files("config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx")

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options))
        if options["local_files_only"] and len(asked) > 2:
            raise FileNotFoundError("not cached")
        return str(folder)

    monkeypatch.setattr(hub_models, "HfApi", Hub)
    monkeypatch.setattr(hub_models, "snapshot_download", snapshot)
    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    if not reachable:
        patterns += ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
    patterns += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"]
    patterns += ["special_tokens_map.json", "chat_template.jinja"]
    patterns += ["vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"]
    assert_same(load("some/model")[1], arrays)
    options = {"allow_patterns": patterns, "local_files_only": not reachable}
    assert asked == [("some/model", 5), ("some/model", options)]
    if not reachable:
        with pytest.raises(InputError, match=r"the hub cannot be reached \(no route\); check the name, or pass"):
            load("some/model")


def test_a_cache_that_cannot_be_written_is_not_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def model_info(self, name: str, timeout: float) -> Any:
            return with_files("config.json", "model.safetensors")

    errors: list[Exception] = [OSError(28, "No space left on device"), OSError("odd")]
    monkeypatch.setattr(hub_models, "HfApi", Hub)
    monkeypatch.setattr(hub_models, "snapshot_download", lambda *args, **options: (_ for _ in ()).throw(errors.pop(0)))
    with pytest.raises(OSError, match="No space"):
        load("some/model")
    with pytest.raises(InputError, match=r"cannot be reached \(odd\)"):
        load("some/model")


def test_a_model_that_the_hub_does_not_have(hub: socket.socket, hub_cache: Path) -> None:
    def answer() -> None:
        with contextlib.suppress(OSError):  # once the test is over, its socket is closed
            while True:  # the library asks about other things as well
                connection, _ = hub.accept()
                with connection:
                    connection.recv(10_000)
                    connection.sendall(b"HTTP/1.1 404 No\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(InputError, match="no folder runs/lost, and the hub has no public model runs/lost"):
        load("runs/lost")


@pytest.mark.hub
def test_the_hubs_gpt2() -> None:
    try:
        folder = resolve("gpt2")
    except InputError as e:
        pytest.skip(str(e))
    config, weights = load(folder)
    assert config == PRESETS["gpt2"]
    assert {name: array.shape for name, array in weights.items()} == parameter_shapes(config)
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
