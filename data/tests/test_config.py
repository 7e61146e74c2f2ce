import json
from typing import Any

import pytest
import torch
import transformers

from data.cli import InputError
from data.config import PRESETS, GPT2Config, from_hf, parameter_count, parameter_shapes, to_hf

SMALL = GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=2, n_head=2)


@pytest.mark.parametrize(
    ("preset", "layers", "parameters"),
    [
        ("gpt2", 12, 124_439_808),
        ("gpt2-medium", 24, 354_823_168),
        ("gpt2-large", 36, 774_030_080),
        ("gpt2-xl", 48, 1_557_611_200),
    ],
)
def test_the_published_sizes(preset: str, layers: int, parameters: int) -> None:
    config = PRESETS[preset]
    assert parameter_count(config) == parameters
    assert (config.vocab_size, config.n_positions, config.n_layer) == (50257, 1024, layers)
    assert config.n_embd == 64 * config.n_head
    assert len(parameter_shapes(config)) == 12 * layers + 4


@pytest.mark.parametrize("preset", PRESETS)
def test_names_shapes_and_order_are_those_of_transformers(preset: str) -> None:
    with torch.device("meta"):
        model = transformers.GPT2Model(transformers.GPT2Config(**to_hf(PRESETS[preset])))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert list(parameter_shapes(PRESETS[preset]).items()) == list(theirs.items())


@pytest.mark.parametrize("config", [*PRESETS.values(), SMALL])
def test_config_json_round_trip(config: GPT2Config) -> None:
    assert from_hf(json.loads(json.dumps(to_hf(config))), "config.json") == config


def test_what_transformers_writes_is_read_and_dropout_is_ignored() -> None:
    theirs = transformers.GPT2Config(n_layer=3, n_embd=96, layer_norm_epsilon=1e-6, attn_pdrop=0.3)
    ours = GPT2Config(n_layer=3, n_embd=96, layer_norm_epsilon=1e-6)
    assert from_hf(json.loads(theirs.to_json_string(use_diff=True)), "config.json") == ours
    assert from_hf(theirs.to_dict(), "config.json") == ours


@pytest.mark.parametrize(
    ("name", "value"),
    [("activation_function", "gelu_pytorch_tanh"), ("n_inner", 32), ("n_ctx", 16), ("quantization_config", None)],
)
def test_other_words_for_the_same_function_are_accepted(name: str, value: object) -> None:
    assert from_hf(to_hf(SMALL) | {name: value}, "config.json") == SMALL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("n_inner", 31),
        ("n_ctx", 8),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("is_causal", False),
        ("tie_word_embeddings", False),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}),
        ("auto_map", {"AutoModel": "code.Model"}),
    ],
)
def test_whatever_makes_another_function_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^there/config.json: {name} is "):
        from_hf(to_hf(SMALL) | {name: value}, "there/config.json")


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon"])
def test_missing_mistyped_and_absurd_numbers_are_refused_by_name(name: str) -> None:
    raw = to_hf(SMALL)
    values: list[Any] = [True, "8", None, -1, 0, 10**400, 1.5, float("nan"), [8] * 10**6]
    for value in values:
        with pytest.raises(InputError, match=f"^config.json: {name} is .*; it has to be a") as e:
            from_hf(raw | {name: value}, "config.json")
        assert len(str(e.value)) < 200
    del raw[name]
    with pytest.raises(InputError, match=f"^config.json: {name} is missing"):
        from_hf(raw, "config.json")


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(InputError, match="n_embd 64 does not divide into n_head 5"):
        GPT2Config(n_embd=64, n_head=5)


def test_model_type_has_to_be_there() -> None:
    with pytest.raises(InputError, match="model_type is None"):
        from_hf({}, "config.json")
