"""GPT-2's sizes and variants, the tensors they imply, and the reading and writing of Hugging Face's config.json.

The field and tensor names are Hugging Face's, so that both implementations and every checkpoint mean the same thing.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from math import prod
from pathlib import Path
from reprlib import repr as short  # a hostile file's values must not flood the one-sentence error
from typing import Any

from data.cli import InputError

# Beyond these no GPT-2 exists: such a number is a damaged file, and would only end in a failed allocation.
LARGEST = {
    "vocab_size": 2**20,
    "n_positions": 2**20,
    "n_embd": 2**16,
    "n_layer": 2**10,
    "n_head": 2**10,
    "n_inner": 2**18,
}
ACTIVATIONS = ("gelu_new", "gelu", "relu")  # of the MLP: the tanh form of GELU, GELU itself (with erf), and ReLU


@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2, and in what it may differ from OpenAI's. Raises `InputError` on values of another type, out
    of range, or that do not divide.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    n_inner: int | None = None  # the MLP's width; None: 4 n_embd
    activation_function: str = "gelu_new"
    tie_word_embeddings: bool = True  # whether the head is wte.weight, or a parameter of its own: lm_head.weight
    # how many positions training saw, where its windows were shorter than the context; None: all. Nothing that is
    # computed depends on it, and transformers keeps it as it is.
    trained_positions: int | None = field(default=None, compare=False)

    @property
    def context(self) -> int:
        """How many tokens a text may have for the model to go on with it: positions from there on are untrained."""
        return self.trained_positions or self.n_positions

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            if type(value) is not int or not 1 <= value <= largest:  # `type`, because True is an int
                raise InputError(f"{name} is {short(value)}; it has to be a whole number from 1 to {largest}")
        epsilon = self.layer_norm_epsilon
        if type(epsilon) is not float or not 0 < epsilon < 1:
            raise InputError(f"layer_norm_epsilon is {short(epsilon)}; it has to be a number between 0 and 1")
        if self.activation_function not in ACTIVATIONS:
            raise InputError(
                f"activation_function is {short(self.activation_function)}, which makes another model; "
                f"choose weights with {' or '.join(map(repr, ACTIVATIONS))}"
            )
        if type(self.tie_word_embeddings) is not bool:
            raise InputError(f"tie_word_embeddings is {short(self.tie_word_embeddings)}; it has to be true or false")
        trained = self.trained_positions
        if trained is not None and (type(trained) is not int or not 1 <= trained <= self.n_positions):
            raise InputError(f"trained_positions is {short(trained)}; it has to be a whole number up to n_positions")
        if self.n_embd % self.n_head:
            raise InputError(
                f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads; choose a multiple of n_head"
            )

    @property
    def inner(self) -> int:
        """The width inside of the MLP."""
        return self.n_inner or 4 * self.n_embd


PRESETS = {
    "tiny": GPT2Config(n_layer=2, n_head=4, n_embd=64, n_positions=32),
    "tinystories": GPT2Config(n_layer=6, n_head=6, n_embd=384, n_positions=256),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600),
}


def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, in the model's order. A head that is tied to `wte.weight` is not listed.

    Matrices are [in, out], as in Hugging Face's `Conv1D`: y = x @ weight + bias.
    """
    n_embd, inner = config.n_embd, config.inner
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, n_embd),
        "wpe.weight": (config.n_positions, n_embd),
    }
    for i in range(config.n_layer):
        shapes |= {
            f"h.{i}.ln_1.weight": (n_embd,),
            f"h.{i}.ln_1.bias": (n_embd,),
            f"h.{i}.attn.c_attn.weight": (n_embd, 3 * n_embd),
            f"h.{i}.attn.c_attn.bias": (3 * n_embd,),
            f"h.{i}.attn.c_proj.weight": (n_embd, n_embd),
            f"h.{i}.attn.c_proj.bias": (n_embd,),
            f"h.{i}.ln_2.weight": (n_embd,),
            f"h.{i}.ln_2.bias": (n_embd,),
            f"h.{i}.mlp.c_fc.weight": (n_embd, inner),
            f"h.{i}.mlp.c_fc.bias": (inner,),
            f"h.{i}.mlp.c_proj.weight": (inner, n_embd),
            f"h.{i}.mlp.c_proj.bias": (n_embd,),
        }
    shapes |= {"ln_f.weight": (n_embd,), "ln_f.bias": (n_embd,)}
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (config.vocab_size, n_embd)}


def parameter_count(config: GPT2Config) -> int:
    """The number of trained values; the tied head counts once."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def flops_a_token(config: GPT2Config, T: int) -> int:
    """Floating-point operations to train on a token in a window of T (PaLM, Chowdhery et al. 2022, appendix B).

    A matmul with an (in, out) matrix takes 2 in*out of them a token forward and twice that backward; attention adds 2
    matmuls of T x C a layer. Rows of the position table, and of a token table that is no head too, are looked up, which
    takes none.
    """
    looked_up = config.n_positions + (0 if config.tie_word_embeddings else config.vocab_size)
    multiplied = parameter_count(config) - looked_up * config.n_embd
    return 6 * multiplied + 12 * config.n_layer * config.n_embd * T


# The settings of config.json under which a model computes another function than ours, and the values under which it
# computes ours; a setting left out means the first. Dropout is not among them: generation uses none, and this project
# trains without it, so `attn_pdrop`, `embd_pdrop` and `resid_pdrop` are ignored.
OURS: dict[str, tuple[Any, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "is_causal": (True,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None,),  # the model is code that comes with the weights
}


# what a config.json may leave out: it then means GPT2Config's default
VARIANTS = ("n_inner", "activation_function", "tie_word_embeddings")


def from_hf(raw: dict[str, Any], where: str | Path) -> GPT2Config:
    """The model that `raw` describes, the content of the config.json at `where`.

    Raises `InputError`, naming the setting, when one is missing or impossible, or when the model would not compute the
    function that this project implements.
    """
    if raw.get("model_type") != "gpt2":
        raise InputError(f"{where}: model_type is {short(raw.get('model_type'))}; choose weights of model_type 'gpt2'")
    optional = {*VARIANTS, "trained_positions"}
    settings = {field.name: raw[field.name] for field in fields(GPT2Config) if field.name in raw}
    if missing := [field.name for field in fields(GPT2Config) if field.name not in {*settings, *optional}]:
        raise InputError(f"{where}: {', '.join(missing)} is missing; take the config.json that belongs to the weights")
    try:
        if settings.get("activation_function") == "gelu_pytorch_tanh":  # another name of the same function
            settings["activation_function"] = "gelu_new"
        config = GPT2Config(**settings)
    except InputError as e:
        raise InputError(f"{where}: {e}") from None
    ours = OURS | {"n_ctx": (config.n_positions,)}  # n_positions' old name
    for name, values in ours.items():
        if name in raw and raw[name] not in values:
            supported = " or ".join(map(short, values))
            raise InputError(
                f"{where}: {name} is {short(raw[name])}, which makes another model; choose weights with {supported}"
            )
    return replace(config, n_inner=None) if config.n_inner == 4 * config.n_embd else config


def to_hf(config: GPT2Config) -> dict[str, Any]:
    """The content of a config.json with which `transformers` builds the same model."""
    sizes = {name: value for name, value in asdict(config).items() if (name, value) != ("trained_positions", None)}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **sizes,
        "n_ctx": config.n_positions,  # its old name, which llama.cpp's converter reads
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }
