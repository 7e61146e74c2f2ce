import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from data.checkpoints.config import (
    LARGEST,
    PRESETS,
    GPT2Config,
    flops_a_token,
    from_hf,
    parameter_count,
    parameter_shapes,
    to_hf,
)
from data.cli import InputError
from data.text.tokenizer import EOT, VOCAB_SIZE

SMALL = GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=2, n_head=2)
VARIANTS: list[dict[str, Any]] = [
    {"n_inner": 31},
    {"activation_function": "gelu"},
    {"activation_function": "relu"},
    {"tie_word_embeddings": False},
]


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_the_tensors_of_transformers(variant: dict[str, Any]) -> None:
    config = replace(SMALL, **variant)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**to_hf(config)))
    theirs = {name.removeprefix("transformer."): tuple(t.shape) for name, t in model.named_parameters()}
    assert list(parameter_shapes(config).items()) == list(theirs.items())
    assert (
        type(model.transformer.h[0].mlp.act).__name__
        in {
            "gelu_new": ["NewGELUActivation"],
            "gelu": ["GELUActivation"],
            "relu": ["ReLU"],
        }[config.activation_function]
    )
    # a matmul more for what the tied table did, none for what is looked up; the MLP's two by their width
    C, more = config.n_embd, config.inner - SMALL.inner
    assert flops_a_token(config, 7) - flops_a_token(SMALL, 7) == 6 * config.n_layer * more * (2 * C + 1)


def test_what_is_no_variant() -> None:
    for name, value, words in (
        ("n_inner", 0, "n_inner is 0; it has to be a whole number from 1 to 262144"),
        ("activation_function", "gelu_fast", "activation_function is 'gelu_fast', which makes another model; choose"),
        ("activation_function", ["gelu"], r"activation_function is \['gelu'\], which makes another model; choose"),
        ("tie_word_embeddings", 1, "tie_word_embeddings is 1; it has to be true or false"),
        ("tie_word_embeddings", None, "tie_word_embeddings is None; it has to be true or false"),
    ):
        with pytest.raises(InputError, match=f"^config.json: {words}"):
            from_hf(to_hf(SMALL) | {name: value}, "config.json")


def test_presets() -> None:
    """Layers, heads, width, context; vocabulary and epsilon are the same, and a config by itself is "gpt2"."""
    sizes = {
        "tiny": (2, 4, 64, 32),
        "tinystories": (6, 6, 384, 256),
        "gpt2": (12, 12, 768, 1024),
        "gpt2-medium": (24, 16, 1024, 1024),
        "gpt2-large": (36, 20, 1280, 1024),
        "gpt2-xl": (48, 25, 1600, 1024),
    }
    assert list(PRESETS) == list(sizes)
    for name, config in PRESETS.items():
        assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == sizes[name]
        assert (config.vocab_size, config.layer_norm_epsilon) == (VOCAB_SIZE, 1e-5)
    assert GPT2Config() == PRESETS["gpt2"]


@pytest.mark.parametrize(
    ("config", "T"),
    [
        (PRESETS["gpt2"], 1024),
        (PRESETS["gpt2"], 256),
        (GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=3, n_head=2), 5),
    ],
)
def test_flops_a_token(config: GPT2Config, T: int) -> None:
    """Counted matmul by matmul: a multiplication and an addition each, forward once and twice that backward.

    Biases, gains and the embedding of tokens count as matmuls here, as in PaLM's 6 N; attention's two matmuls, of all
    T x T pairs, come on top.
    """
    C, layers, vocabulary = config.n_embd, config.n_layer, config.vocab_size
    matrices = layers * (C * 3 * C + C * C + C * 4 * C + 4 * C * C) + vocabulary * C
    vectors = layers * (2 * C + 3 * C + C + 2 * C + 4 * C + C) + 2 * C
    attention = layers * (2 * T * C + 2 * T * C)
    assert flops_a_token(config, T) == 3 * (2 * (matrices + vectors) + attention)


@pytest.mark.parametrize("preset", PRESETS)
def test_names_shapes_and_order_are_those_of_transformers(preset: str) -> None:
    with torch.device("meta"):
        model = transformers.GPT2Model(transformers.GPT2Config(**to_hf(PRESETS[preset])))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert list(parameter_shapes(PRESETS[preset]).items()) == list(theirs.items())


@pytest.mark.parametrize("config", [*PRESETS.values(), SMALL, *(replace(SMALL, **variant) for variant in VARIANTS)])
def test_config_json_round_trip(config: GPT2Config) -> None:
    assert from_hf(json.loads(json.dumps(to_hf(config))), "config.json") == config


def test_config_json_is_what_transformers_has() -> None:
    """No field that we write has another value once `transformers` has read it, and none has its default by chance."""
    sizes: dict[str, Any] = {"vocab_size": 50_300, "n_positions": 48, "n_embd": 24, "n_layer": 3, "n_head": 6}
    variant: dict[str, Any] = {"layer_norm_epsilon": 2e-4, "n_inner": 31, "activation_function": "gelu"}
    config = GPT2Config(**sizes, **variant, tie_word_embeddings=False)
    ours = to_hf(config)
    theirs = transformers.GPT2Config(**ours).to_dict()
    assert {name: theirs[name] for name in ours} == ours
    default = transformers.GPT2Config().to_dict()
    given = sizes | variant | {"tie_word_embeddings": False, "n_ctx": 48}  # n_ctx: of llama.cpp's converter
    given |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    assert {name for name in ours if ours[name] != default.get(name)} <= {*given, "architectures"}
    assert {name: ours[name] for name in given} == given
    assert ours["architectures"] == ["GPT2LMHeadModel"]
    assert ours["bos_token_id"] == ours["eos_token_id"] == EOT
    assert ours["initializer_range"] == 0.02


@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 3e-5, 0.1, 0.999])
def test_any_epsilon_is_kept(epsilon: float) -> None:
    config = from_hf(json.loads(json.dumps(to_hf(SMALL) | {"layer_norm_epsilon": epsilon})), "config.json")
    assert config.layer_norm_epsilon == epsilon == to_hf(config)["layer_norm_epsilon"]


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -1e-5, 1, 0, True])
def test_what_is_no_epsilon(epsilon: float) -> None:
    sentence = rf"^layer_norm_epsilon is {epsilon}; it has to be a number between 0 and 1$"
    with pytest.raises(InputError, match=sentence):
        GPT2Config(layer_norm_epsilon=epsilon)


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        *(("vocab_size", 2**20), ("n_positions", 2**20), ("n_embd", 2**16), ("n_layer", 1024), ("n_head", 1024)),
        ("n_inner", 2**18),
    ],
)
def test_the_largest_and_the_smallest_number(name: str, largest: int) -> None:
    fitting: dict[str, Any] = {"n_embd": 2**16, "n_head": 1}  # so that heads divide the width
    assert largest == LARGEST[name]
    for value in (1, largest):
        assert getattr(GPT2Config(**(fitting | {name: value})), name) == value
    for value in (0, largest + 1):
        sentence = rf"^{name} is {value}; it has to be a whole number from 1 to {largest}$"
        with pytest.raises(InputError, match=sentence):
            GPT2Config(**(fitting | {name: value}))


def test_settings_that_are_left_out_are_ours() -> None:
    sizes = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon"]
    raw = {"model_type": "gpt2"} | {name: to_hf(SMALL)[name] for name in sizes}
    assert from_hf(raw, "config.json") == SMALL


def test_what_transformers_writes_is_read_and_dropout_is_ignored() -> None:
    theirs = transformers.GPT2Config(n_layer=3, n_embd=96, layer_norm_epsilon=1e-6, attn_pdrop=0.3)
    ours = GPT2Config(n_layer=3, n_embd=96, layer_norm_epsilon=1e-6)
    assert from_hf(json.loads(theirs.to_json_string(use_diff=True)), "config.json") == ours
    assert from_hf(theirs.to_dict(), "config.json") == ours


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "gelu_pytorch_tanh"),
        ("n_inner", 32),
        ("n_inner", None),
        ("n_ctx", 16),
        ("pruned_heads", {}),
        ("pruned_heads", None),
        ("is_causal", True),
        ("is_encoder_decoder", False),
        ("quantization_config", None),
        ("auto_map", None),
        ("resid_pdrop", 0.1),
    ],
)
def test_other_words_for_the_same_function_are_accepted(name: str, value: object) -> None:
    assert from_hf(to_hf(SMALL) | {name: value}, "config.json") == SMALL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "silu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("n_ctx", 8),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("is_causal", False),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}),
        ("auto_map", {"AutoModel": "code.Model"}),
    ],
)
def test_whatever_makes_another_function_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^there/config.json: {name} is .*; choose weights (with|of) ") as e:
        from_hf(to_hf(SMALL) | {name: value}, "there/config.json")
    if name != "model_type":
        right = {"activation_function": "'gelu_new' or 'gelu' or 'relu'", "n_ctx": "16"}
        right |= dict.fromkeys(["scale_attn_weights", "is_causal"], "True")
        right |= {"pruned_heads": "{} or None", "quantization_config": "None", "auto_map": "None"}
        assert str(e.value).endswith(f"which makes another model; choose weights with {right.get(name, 'False')}")


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


def test_all_that_is_missing_is_named() -> None:
    raw = {name: value for name, value in to_hf(SMALL).items() if name not in ("n_head", "n_embd")}
    with pytest.raises(InputError, match=r"^config.json: n_embd, n_head is missing; take the config.json that belongs"):
        from_hf(raw, "config.json")


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(InputError, match="n_embd 64 does not divide into n_head 5"):
        GPT2Config(n_embd=64, n_head=5)


def test_model_type_has_to_be_there() -> None:
    with pytest.raises(InputError, match="model_type is None"):
        from_hf({}, "config.json")
