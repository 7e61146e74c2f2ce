"""GPT-2's sizes, the tensors they imply, and the reading and writing of Hugging Face's config.json.

The field and tensor names are Hugging Face's, so that both implementations and every checkpoint mean the same thing.
"""

from dataclasses import asdict, dataclass, field, fields
from math import prod
from pathlib import Path
from reprlib import repr as short  # a hostile file's values must not flood the one-sentence error
from typing import Any

from data.cli import InputError

# Beyond these no GPT-2 exists: such a number is a damaged file, and would only end in a failed allocation.
LARGEST = {"vocab_size": 2**20, "n_positions": 2**20, "n_embd": 2**16, "n_layer": 2**10, "n_head": 2**10}


@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2. Raises `InputError` on values of another type, out of range, or that do not divide."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
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
            if type(value) is not int or not 1 <= value <= largest:  # `type`, because True is an int
                raise InputError(f"{name} is {short(value)}; it has to be a whole number from 1 to {largest}")
        epsilon = self.layer_norm_epsilon
        if type(epsilon) is not float or not 0 < epsilon < 1:
            raise InputError(f"layer_norm_epsilon is {short(epsilon)}; it has to be a number between 0 and 1")
        trained = self.trained_positions
        if trained is not None and (type(trained) is not int or not 1 <= trained <= self.n_positions):
            raise InputError(f"trained_positions is {short(trained)}; it has to be a whole number up to n_positions")
        if self.n_embd % self.n_head:
            raise InputError(
                f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads; choose a multiple of n_head"
            )


PRESETS = {
    "tiny": GPT2Config(n_layer=2, n_head=4, n_embd=64, n_positions=32),
    "tinystories": GPT2Config(n_layer=6, n_head=6, n_embd=384, n_positions=256),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600),
}


def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, in the model's order. The head is tied to `wte.weight` and is not listed.

    Matrices are [in, out], as in Hugging Face's `Conv1D`: y = x @ weight + bias.
    """
    n_embd = config.n_embd
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
            f"h.{i}.mlp.c_fc.weight": (n_embd, 4 * n_embd),
            f"h.{i}.mlp.c_fc.bias": (4 * n_embd,),
            f"h.{i}.mlp.c_proj.weight": (4 * n_embd, n_embd),
            f"h.{i}.mlp.c_proj.bias": (n_embd,),
        }
    return shapes | {"ln_f.weight": (n_embd,), "ln_f.bias": (n_embd,)}


def parameter_count(config: GPT2Config) -> int:
    """The number of trained values; the tied head counts once."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def flops_a_token(config: GPT2Config, T: int) -> int:
    """Floating-point operations to train on a token in a window of T (PaLM, Chowdhery et al. 2022, appendix B).

    A matmul with an (in, out) matrix takes 2 in*out of them a token forward and twice that backward; attention adds 2
    matmuls of T x C a layer. Rows of the position table are looked up, which takes none.
    """
    multiplied = parameter_count(config) - config.n_positions * config.n_embd
    return 6 * multiplied + 12 * config.n_layer * config.n_embd * T


# The settings of config.json under which a model computes another function than ours, and the values under which it
# computes ours; a setting left out means the first. Dropout is not among them: generation uses none, and this project
# trains without it, so `attn_pdrop`, `embd_pdrop` and `resid_pdrop` are ignored.
OURS: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "is_causal": (True,),
    "tie_word_embeddings": (True,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None,),  # the model is code that comes with the weights
}


def from_hf(raw: dict[str, Any], where: str | Path) -> GPT2Config:
    """The sizes in `raw`, the content of the config.json at `where`.

    Raises `InputError`, naming the setting, when one is missing or impossible, or when the model would not compute the
    function that this project implements.
    """
    if raw.get("model_type") != "gpt2":
        raise InputError(f"{where}: model_type is {short(raw.get('model_type'))}; choose weights of model_type 'gpt2'")
    names = [field.name for field in fields(GPT2Config)]
    raw = {"trained_positions": None} | raw
    if missing := [name for name in names if name not in raw]:
        raise InputError(f"{where}: {', '.join(missing)} is missing; take the config.json that belongs to the weights")
    try:
        config = GPT2Config(**{name: raw[name] for name in names})
    except InputError as e:
        raise InputError(f"{where}: {e}") from None
    ours = OURS | {"n_inner": (None, 4 * config.n_embd), "n_ctx": (config.n_positions,)}  # n_ctx: n_positions' old name
    for name, values in ours.items():
        if name in raw and raw[name] not in values:
            supported = " or ".join(map(short, values))
            raise InputError(
                f"{where}: {name} is {short(raw[name])}, which makes another model; choose weights with {supported}"
            )
    return config


def to_hf(config: GPT2Config) -> dict[str, Any]:
    """The content of a config.json with which `transformers` builds the same model."""
    sizes = {name: value for name, value in asdict(config).items() if (name, value) != ("trained_positions", None)}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **sizes,
        "n_inner": None,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }
