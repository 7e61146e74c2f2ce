"""`python -m parity_tests.mutants`: is every bug of a catalogue caught, and is the right part blamed for it?

A mutant is a plausible bug, planted from outside: a function of the port with a few words of its source exchanged. The
proof judges those of the model and of the optimiser. Loader, checkpoints and sampling have a check of their own here,
which states in numpy and PyTorch what they promise.
"""

import inspect
import json
import multiprocessing
import os
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from tinygrad import dtypes

import data.checkpoints.checkpoint
import data.runs.run_folder as R
import data.text.loader as L
import tinygrad_impl.backend as B
import tinygrad_impl.cached_model as C
import tinygrad_impl.cpu_adamw as P
import tinygrad_impl.cpu_attention as A
import tinygrad_impl.formulas as F
import tinygrad_impl.generate as G
import tinygrad_impl.model as M
import tinygrad_impl.trainer as T
import torch_ref.generate
import torch_ref.model
from data.checkpoints.config import GPT2Config, parameter_shapes
from data.cli import ArgumentParser, InputError, Progress, integer, refuse_missing_folder, run
from data.files import atomic_write
from data.text.sampling import Sampler
from data.text.shards import ShardWriter, write_meta
from data.text.tokenizer import EOT, VOCAB_SIZE
from parity_tests.proof import prove
from parity_tests.setting import Setting, random_batches
from parity_tests.weights import hard_weights, random_weights
from tinygrad_impl.device import open_device
from torch_ref.testing import Scripted, hugging_face

BOTH = ("float64", "float32")
DTYPES = (*BOTH, "bfloat16")
# 379 tokens, so that the head has padding; 14 positions, so that the rows ignore different numbers of targets
CONFIG = GPT2Config(vocab_size=379, n_layer=2, n_head=2, n_embd=16, n_positions=16, layer_norm_epsilon=1e-3)
ROWS, LENGTH = 2, 14

Plant = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutant:
    """A bug, the check that has to catch it, and how sentences that blame the right part begin (patterns)."""

    name: str
    where: str  # proof, loader, checkpoint or generation
    plant: Plant
    named: tuple[str, ...]
    dtypes: tuple[str, ...] = BOTH

    def names(self, sentence: str | None) -> bool:
        return sentence is not None and any(re.match(pattern, sentence) for pattern in self.named)


def edited(function: Any, *changes: tuple[str, str]) -> Any:
    """The function with words of its source exchanged. LookupError if they do not stand there once: it has changed."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        if source.count(old) != 1:
            raise LookupError(f"{function.__qualname__} has {source.count(old)} times {old!r}")
        source = source.replace(old, new)
    made: dict[str, Any] = {}
    exec(source, function.__globals__, made)
    return made[function.__name__]


MUTANTS: list[Mutant] = []
named: str | tuple[str, ...]  # of the loops below
edits: list[Any]


def mutant(
    name: str, named: str | tuple[str, ...], *edits: tuple[Any, str, tuple[str, str]], where: str = "proof", **more: Any
) -> None:
    """Adds a mutant to the catalogue. `edits`: (owner, its function, (words, other words)), also several of one."""

    @contextmanager
    def plant() -> Iterator[None]:
        with ExitStack() as stack:
            for owner, attribute in dict.fromkeys(edit[:2] for edit in edits):
                changes = [change for *place, change in edits if place == [owner, attribute]]
                stack.enter_context(patch.object(owner, attribute, edited(getattr(owner, attribute), *changes)))
            yield

    MUTANTS.append(Mutant(name, where, plant, (named,) if isinstance(named, str) else named, **more))


# --- the model ---------------------------------------------------------------------------------------------------

GELU = r"h\.\d\.mlp\.gelu "
NORM = r"(h\.\d\.ln_[12]|ln_f) "
ATTENTION = r"h\.\d\.attn\.scaled_dot_product_attention "
MATMULS = r"h\.\d\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj) "
WIRING = (r"h\.\d \(its wiring\)", r"h\.\d residual")
RESIDUAL = r"h\.\d residual"
EMBEDDING = (r"wte \+ wpe", "wpe ")
LOSS = "cross_entropy "

plain_gelu = "y = x * sigmoid"
for name, other in {
    "erf GELU": "y = x * 0.5 * (1 + (x / 2**0.5).erf())",
    "sigmoid GELU": "y = x * (1.702 * x).sigmoid()",
    "ReLU for GELU": "y = x.relu()",
    "GELU's coefficient 0.044": "y = 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044 * x**3)).tanh())",
}.items():
    mutant(name, GELU, (F, "gelu", (plain_gelu, other)))
mutant("GELU's derivative without its second term", GELU, (F, "gelu", ("slope = sigmoid +", "slope = sigmoid + 0 *")))
mutant("GELU's derivative from another 0.044715", GELU, (F, "gelu", ("3 * 0.044715", "3 * 0.0447")))

plain_norm = "x.layernorm(eps=eps)"
centred = "(lambda c: c * (c.square().mean(-1, keepdim=True) + eps).rsqrt())"
for name, other in {
    "layer norm's eps 1e-6": "x.layernorm(eps=1e-6)",
    "layer norm's eps 1e-5 for every model": "x.layernorm(eps=1e-5)",
    "layer norm's variance over n - 1": "(x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + eps).rsqrt()",
    "eps outside layer norm's root": "(x - x.mean(-1, keepdim=True)) / (x.var(-1, True, 0).sqrt() + eps)",
    "RMS norm for layer norm": f"{centred}(x)",
    "layer norm in bfloat16": "x.cast('bfloat16').layernorm(eps=eps).cast(x.dtype)",
    "layer norm's mean detached": f"{centred}(x - x.mean(-1, keepdim=True).detach())",
}.items():
    mutant(name, NORM, (F, "layer_norm", (plain_norm, other)))
mutant("layer norm's gain plus one", NORM, (F, "layer_norm", ("for_rows(weight, x)", "for_rows(1 + weight, x)")))

formula = "is_cpu(q) and is_causal and q.dtype in cpu.TYPES", "False"  # and not the kernel in C
root, T_T = " / math.sqrt(q.shape[-1])", "Tensor.ones(*scores.shape[-2:], dtype=dtypes.bool).tril("
itself = " | (Tensor.arange(q.shape[-2]).unsqueeze(-1) + Tensor.arange(q.shape[-2]) == 0)"  # row 0 has nothing else
for name, change in {
    "unscaled scores": (root, ""),
    "scores over sqrt(C)": (root, " / math.sqrt(q.shape[-1] * q.shape[1])"),
    "mask lets the next token through": (f"{T_T})", f"{T_T}1)"),
    "strict mask": (f"{T_T})", f"({T_T}-1){itself})"),
    "no causal mask": ("if is_causal:", "if False:"),
    "softmax over the queries": ("softmax(-1)", "softmax(-2)"),
    "softmax in bfloat16": ("scores.softmax(-1)", "scores.cast('bfloat16').softmax(-1)"),
    "v detached": (".contiguous() @ v", ".contiguous() @ v.detach()"),
    "softmax detached": (".cast(v.dtype)", ".cast(v.dtype).detach()"),
}.items():
    mutant(name, ATTENTION, (F, "attention", formula), (F, "attention", change))
mutant("gradients of k and v exchanged", ATTENTION, (A, "_gradient", ("found[:3]", "(found[0], found[2], found[1])")))
split = "t.reshape(B, T, self.n_head, -1).transpose(1, 2)"
for name, change in {
    "q and k exchanged": ("attention(q, k, v,", "attention(k, q, v,"),
    "k and v exchanged": ("attention(q, k, v,", "attention(q, v, k,"),
    "heads split as (B, T, D, H)": (split, "t.reshape(B, T, -1, self.n_head).permute(0, 3, 1, 2)"),
    "heads split without transposing": (split, "t.reshape(B, self.n_head, T, -1)"),
    "heads merged without transposing": ("y.transpose(1, 2)", "y"),
}.items():
    mutant(name, ATTENTION, (M.CausalSelfAttention, "__call__", change))

unbiased = "type('Unbiased', (Conv1D,), {'__call__': lambda self, x: F.linear(x, self.weight, self.bias * 0)})"
loaded = "verbose=False)"
mutant(
    "no bias in h.1.mlp.c_proj",
    r"h\.1\.mlp\.c_proj ",
    (M.GPT2, "__init__", (loaded, f"{loaded}\n    self.h[1].mlp.c_proj.__class__ = {unbiased}")),
)
transposed = "self.weight.T if self.weight.shape[0] == self.weight.shape[1] else self.weight"
mutant("attn.c_proj's weight transposed", r"h\.0\.attn\.c_proj ", (M.Conv1D, "__call__", ("self.weight", transposed)))
half = "(bias.detach() + 0.5 * (bias - bias.detach()))"
mutant("half of the biases' gradients", MATMULS, (F, "linear", ("cast(bias, dtype)", f"cast({half}, dtype)")))
first = "cast(bias.detach(), dtype) + cast(bias - bias.detach(), dtype) * (Tensor.arange(x.shape[0]) == 0).reshape(-1, 1, 1)"
mutant("biases' gradients from the first row only", MATMULS, (F, "linear", ("cast(bias, dtype)", first)))

matmul = "x.matmul(weight, dtype=dtypes.float32)"
for name, function, change in (
    ("sums of matmuls in bfloat16", "linear", (matmul, "x.matmul(weight, dtype=x.dtype)")),
    ("no gradient of biases in bfloat16", "_linear_gradient", ("drows.sum(0)", "(0 * drows.sum(0))")),
    (
        "gradient of matmuls a tenth short in bfloat16",
        "_linear_gradient",
        ("(dy @ weight.T)", "(0.9 * dy @ weight.T)"),
    ),
):
    mutant(name, MATMULS, (F, function, change), dtypes=("bfloat16",))

attend, think = "x = x + self.attn(self.ln_1(x), cache)", "x = x + self.mlp(self.ln_2(x))"
after = ((attend, "x = self.ln_1(x + self.attn(x))"), (think, "x = self.ln_2(x + self.mlp(x))"))
block = (M.Block, "__call__")
mutant("post-norm", WIRING, *((*block, change) for change in after))
mutant(
    "ln_1 and ln_2 exchanged", WIRING, (*block, ("ln_1(x)", "ln_2(x)")), (*block, ("mlp(self.ln_2", "mlp(self.ln_1"))
)
mutant("no residual around attention", RESIDUAL, (*block, (attend, "x = self.attn(self.ln_1(x))")))
mutant("no residual around the MLP", RESIDUAL, (*block, (think, "x = self.mlp(self.ln_2(x))")))
narrow = "x = (x + self.attn(self.ln_1(x))).cast('bfloat16')"
mutant("residual stream in bfloat16", RESIDUAL, (*block, (attend, narrow)), dtypes=("bfloat16",))
normalised = "x = self.ln_1(x)\n    x = x + self.attn(x)"
mutant("layer norm inside the residual stream", RESIDUAL, (*block, (attend, normalised)))
parallel = "return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))"
mutant("attention and MLP in parallel", WIRING, (*block, (attend, parallel)))
mutant("residual detached", RESIDUAL, (*block, (think, "x = x.detach() + self.mlp(self.ln_2(x))")))

hidden = (M.GPT2, "hidden")
mutant("no ln_f", "ln_f", (*hidden, ("self.ln_f(x)", "x")))
mutant("positions shifted by one", EMBEDDING, (*hidden, ("weight[:T]", "weight[1 : T + 1]")))
mutant("no position embedding", EMBEDDING, (*hidden, ("self.wpe.weight[:T]", "0 * self.wpe.weight[:T]")))
mutant(
    "embeddings times sqrt(C)",
    EMBEDDING,
    (*hidden, ("F.embedding(tokens", "self.wpe.weight.shape[1]**0.5 * F.embedding(tokens")),
)
mutant("layers in the wrong order", r"h \(its wiring\)", (*hidden, ("in self.h:", "in reversed(self.h):")))
mutant("layer 0 in place of layer 1", r"h\.1", (*hidden, ("in self.h:", "in [self.h[0]] * len(self.h):")))
mutant(
    "one block for all layers",
    (r"h\.0\.", r"h\.1"),
    (M.GPT2, "__init__", ("[Block(config, i) for i in range(config.n_layer)]", "[Block(config, 0)] * config.n_layer")),
)
mutant(
    "layer 1 has layer 0's weights",
    r"h\.1\.ln_1 ",
    (M.GPT2, "__init__", ("Tensor(array) for", "Tensor(arrays[name.replace('h.1.', 'h.0.')]) for")),
)
mutant(
    "embedding's gradient keeps the last of repeated tokens",
    "wte ",
    (F, "_add_rows", ("cell.load() + rows", "rows")),
)
mutant(
    "embedding's gradient in bfloat16",
    "wte ",
    (F, "_embedding_gradient", ("gradient.reshape(", "gradient.cast(dtypes.bfloat16).cast(gradient.dtype).reshape(")),
)

HEAD = "lm_head "
head = (M.GPT2, "head")
mutant("untied head", HEAD, (*head, ("or self.wte).weight", "or self.wte).weight.detach()")))
stale = "self.stale = (lambda copy: lambda: copy)(Tensor(arrays['wte.weight']).realize())"
mutant(
    "stale head",
    (HEAD, "only the graph that trains"),
    (M.GPT2, "__init__", (loaded, f"{loaded}\n    {stale}")),
    (*head, ("or self.wte).weight", "or self.wte).weight + (self.stale() - self.wte.weight).detach()")),
)
mutant(
    "head's padding not masked",
    (HEAD, LOSS),
    (F, "lm_head", ("if is_cpu(x):", "if False:")),
    (F, "lm_head", ("contiguous_backward(), -math.inf", "contiguous_backward(), 0")),
)
mutant("head scaled by 1 / sqrt(C)", HEAD, (*head, ("F.lm_head(x,", "F.lm_head(x / x.shape[-1]**0.5,")))

mean = "long_sum(losses.flatten()) / scored.sum()"
for name, change in {
    "loss in bfloat16": ("at_least_float32(logits)", "logits.cast('bfloat16')"),
    "loss averaged by sequence": (mean, "(losses.sum(-1) / scored.sum(-1)).mean()"),
    "loss's mean counts ignored targets": ("/ scored.sum()", "/ scored.numel()"),
    "loss summed": ("/ scored.sum()", ""),
    "ignored targets scored": ("targets != ignore_index", "targets == targets"),
    "label smoothing 0.001": (
        "- chosen",
        "- 0.999 * chosen - 0.001 * (logits > -1e30).where(logits, 0).sum(-1) / (logits > -1e30).sum(-1)",
    ),
}.items():
    mutant(name, LOSS, (F, "cross_entropy", change))
scored = "F.cross_entropy(logits, targets,"
shifted = "F.cross_entropy(logits[:, :-1], targets[:, 1:],"
mutant("targets shifted by one", LOSS, (M.GPT2, "__call__", (scored, shifted)))
mutant("last position never trained", LOSS, (M.GPT2, "__call__", (scored, shifted.replace("1:]", ":-1]"))))

# --- optimiser, schedule, accumulation -----------------------------------------------------------------------------

DECAY, CLIPPING, UPDATE, GRAPH = "weight decay", "clipping", "AdamW's update", "only the graph that trains"
adamw, decays = (B.Plain, "adamw"), (T.Trainer, "adamw")
formula = "if on_cpu(part):", "if False:"  # and not the kernel in C
# where the bug needs what only the trainer knows
known = (*decays, ("for part in", "self.backend.trainer = self\n    for part in"))
matrices, decayed = "self.weight_decay if p.ndim == 2 else 0.0", "p * (1 - lr * decays[s.name])"
m_hat, mean = "(lr / correction1) * m", "total / self.trainer.count"
root_v, scaled = "((v / correction2).sqrt() + eps)", "total * scale + total * rest"
for name, change in {
    "decay of biases and gains too": (matrices, "self.weight_decay"),
    "no decay of wte": ("p.ndim == 2", "p.ndim == 2 and name != 'wte.weight'"),
    "decay of vectors, not matrices": ("p.ndim == 2", "p.ndim != 2"),
}.items():
    mutant(name, DECAY, (*decays, change))
for name, named, *changes in (
    ("decay without the learning rate", DECAY, (decayed, "p * (1 - decays[s.name])")),
    ("decay after the step", DECAY, (decayed, "(p"), (root_v, f"{root_v}) * (1 - lr * decays[s.name])")),
    (
        "L2 in the gradient",
        DECAY,
        (scaled, f"{scaled} + decays[s.name] * p"),
        (decayed, "p"),
    ),
    ("no bias correction", UPDATE, ("(lr / correction1)", "lr"), ("(v / correction2)", "v")),
    ("no bias correction of exp_avg_sq", UPDATE, ("(v / correction2)", "v")),
    ("eps inside the root", UPDATE, (root_v, "(v / correction2 + eps).sqrt()")),
    ("exp_avg_sq without its root", UPDATE, (root_v, "((v / correction2) + eps)")),
    ("Nesterov's step", UPDATE, (m_hat, "(lr / correction1) * (beta1 * m + (1 - beta1) * g)")),
    ("the step before the moments' update", UPDATE, (m_hat, "(lr / correction1) * ((m - (1 - beta1) * g) / beta1)")),
    ("beta1 0.8", r"AdamW's exp_avg:", ("beta1, beta2 = betas", "beta1, beta2 = 0.8, betas[1]")),
    ("betas exchanged", (r"AdamW's exp_avg:", r"AdamW's exp_avg_sq:"), ("beta1, beta2 =", "beta2, beta1 =")),
    ("exp_avg_sq of the unclipped gradient", (r"AdamW's exp_avg_sq:", CLIPPING), ("* g * g", f"* ({mean}) ** 2")),
    ("exp_avg in bfloat16", r"AdamW's exp_avg:", ("m.assign(beta1 * m + (1 - beta1) * g)", "m.assign((beta1 * m + (1 - beta1) * g).cast('bfloat16').cast(m.dtype))")),
    ("clipping of the step, not the gradient", CLIPPING, (scaled, mean), (m_hat, f"{m_hat} * (scale * self.trainer.count)")),
    ("clipping by each tensor's norm", CLIPPING, (scaled, f"{mean} * (self.trainer.clip / (({mean}).square().sum().sqrt() + 1e-6)).minimum(1)")),
    ("clipping by value", CLIPPING, (scaled, f"({mean}).clip(-self.trainer.clip, self.trainer.clip)")),
):  # fmt: skip
    mutant(name, named, known, *((*adamw, change) for change in [formula, *changes]))
for name, named, *changes in (
    ("decay of what follows what decays", DECAY, ("{decay!r}", "{segments[0][2]!r}")),
    ("betas exchanged in C", (r"AdamW's exp_avg:", r"AdamW's exp_avg_sq:"), ("size = int(", "betas, size = betas[::-1], int(")),
    ("eps 1e-6 in C", UPDATE, ("repr(eps)", "repr(1e-6)")),
):  # fmt: skip
    mutant(name, named, *((P, "_adamw", change) for change in changes))

init, update = (T.Trainer, "__init__"), (T.Trainer, "update")
mutant(
    "norm without wte",
    ("AdamW's norm", CLIPPING),
    (B.Plain, "squares", ("if on_cpu(parts[0]):", "if False:")),
    (B.Plain, "squares", ("for s in part.segments]", "for s in part.segments if s.name != 'wte.weight']")),
)
clipped, root = "min(self.clip / (norm + 1e-6), 1.0)", "math.sqrt(squares[: self.shards, 1:].sum()) / self.count"
for name, named, *changes in (
    ("clipping scales up too", CLIPPING, (clipped, "self.clip / (norm + 1e-6)")),
    ("clipping without its 1e-6", CLIPPING, ("(norm + 1e-6)", "norm")),
    ("no clipping", CLIPPING, (clipped, "1.0")),
    ("clipping before the mean over micro-batches", (CLIPPING, "accumulate", "AdamW's norm"), (root, "math.sqrt(squares.sum())")),
    ("accumulation without 1 / k", "accumulate", (root, "math.sqrt(squares.sum())"), (", 1.0) / self.count", ", 1.0)")),
    ("reported loss without 1 / k", ("accumulate", "loss"), ("loss = float(squares[:, 0].mean()) / self.count", "loss = float(squares[:, 0].mean())")),
):  # fmt: skip
    mutant(name, named, *((*update, change) for change in changes))
mutant("beta2 0.999", r"AdamW's exp_avg_sq:", (*init, ("(0.9, 0.95)", "(0.9, 0.999)")))
mutant("eps 1e-6", UPDATE, (*init, ("eps: float = 1e-8", "eps: float = 1e-6")))
mutant("weight decay 0.01", DECAY, (*init, ("weight_decay: float = 0.1", "weight_decay: float = 0.01")))
ahead = (("beta1**self.steps", "beta1 ** (self.steps + 1)"), ("beta2**self.steps", "beta2 ** (self.steps + 1)"))
mutant("bias correction off by one step", UPDATE, *((*update, change) for change in ahead))
finite = "math.isfinite(loss + norm)"
for name, other in {"an infinite norm": "math.isfinite(loss)", "an infinite loss": "math.isfinite(norm)"}.items():
    mutant(f"{name} updates the weights", "update of what is not finite", (*update, (finite, other)))
frozen = "self.__dict__.setdefault('frozen', lr)"
mutant(
    "learning rate frozen in the graph",
    (UPDATE, "learning_rate", GRAPH),
    (*update, ("rest, lr,", f"rest, {frozen},")),
)
mutant(
    "scalars in float32",
    (r"AdamW's exp_avg:", UPDATE),
    (*update, ("np.array(scalars, self.dtype)", "np.array(scalars, 'float32')")),
    dtypes=("float64",),
)
mutant("step without 1 / k", "accumulate", (*update, (", 1.0) / self.count", ", 1.0)")))

RATE = "learning_rate"
rate = (T, "learning_rate")
mutant("schedule off by one", RATE, (*rate, ("(step - warmup)", "(step + 1 - warmup)")))
mutant("warmup off by one", RATE, (*rate, ("(step + 1) / warmup", "step / warmup")))
mutant("cosine over the whole run", RATE, (*rate, ("(step - warmup) / max(1, steps - warmup)", "step / steps")))
mutant("cosine down to 0", RATE, (*rate, ("minimum + (peak - minimum)", "peak")))
mutant("linear for cosine", RATE, (*rate, ("0.5 * (1 + math.cos(math.pi * progress))", "(1 - progress)")))

mutant(
    "accumulation keeps the last micro-batch only",
    "accumulate",
    (B.Plain, "added", ("total.assign(total + new)", "total.assign(new)")),
)
mutant(
    "accumulation is never begun anew",
    ("accumulate", GRAPH),
    (
        T.Trainer,
        "accumulate",
        ("enumerate(batches, 1)", "enumerate([*batches, *batches[:1]] if self.steps else batches, 1)"),
    ),
)
mutant(
    "micro-batches past the second are left out",
    "accumulate",
    (T.Trainer, "accumulate", ("enumerate(batches, 1)", "enumerate(batches[:2], 1)")),
)
mutant("replay on the batch that was captured", GRAPH, (T.Trainer, "_input", ("overwrite(tensor, array)", "pass")))

# --- loader --------------------------------------------------------------------------------------------------------

order = "_order(self.seed, epoch, self.windows)"
further = "np.concatenate([rows[:, 2:], rows[:, :1]], axis=1)"
for name, named, *edits in (
    ("targets shifted by two", "targets", (L.Loader, "next_batch", ("rows[:, 1:].copy()", further))),
    ("targets are the inputs", "targets", (L.Loader, "next_batch", ("rows[:, 1:].copy()", "rows[:, :-1].copy()"))),
    ("a rank sees the first one's rows", "ranks", (L.Loader, "own", (" + self.rank * self.batch_size", ""))),
    ("windows overlap", "windows", (L.Loader, "_window", ("* self.seq_len", "* (self.seq_len - 1)"))),
    (
        "windows skip a token",
        "(windows|number)",
        (L.Loader, "_window", ("* self.seq_len", "* (self.seq_len + 1)")),
        (L.Loader, "__init__", ("(self.tokens - 1) // seq_len", "(self.tokens - 1) // (seq_len + 1)")),
    ),
    (
        "a shard's last token is lost",
        "windows",
        (L._Tokens, "__init__", ("open_split(folder, split)", "[s[:-1] for s in open_split(folder, split)]")),
    ),
    (
        "the first token after a shard's end is read twice",
        "windows",
        (L._Tokens, "read", ("row[done : done + len(part)] = part", "row[done : done + len(part)] = part if not done else np.r_[part[:1], part[:-1]]")),
    ),
    ("the same order in every epoch", "order", (L.Loader, "_window", (order, order.replace("epoch", "0")))),
    ("orders of seed + epoch", "order", (L, "_order", ("(seed, epoch)", "seed + epoch"))),
    ("seed unused", "order", (L, "_order", ("(seed, epoch)", "epoch"))),
    ("not shuffled", "order", (L, "_order", (".permutation(", ".bit_generator and ("))),
    ("state without the position", "state", (L.Loader, "state", ('"position": self.position', '"position": 0'))),
    ("restored a batch late", "state", (L.Loader, "restore", ('state["position"]', 'state["position"] + self.batch_size'))),
    ("last window dropped", "number", (L.Loader, "__init__", ("(self.tokens - 1) // seq_len", "(self.tokens - 1) // seq_len - 1"))),
    ("one window too many", "number", (L.Loader, "__init__", ("(self.tokens - 1) // seq_len", "self.tokens // seq_len"))),
    ("evaluation's padding is scored", "evaluation", (L, "_in_order", ("np.full(step, IGNORED, np.int32)", "np.zeros(step, np.int32)"))),
    ("evaluation drops the last batch", "evaluation", (L, "_in_order", ("range(rank * step, targets, ", "range(rank * step, targets - step, "))),
):  # fmt: skip
    mutant(name, f"loader: {named}", *edits, where="loader")

# --- checkpoints ---------------------------------------------------------------------------------------------------

written, restore = "name: arrays[name] for name in", (T.Trainer, "restore")
moment = 'moments[f"{moment}.{name}"]'
for name, named, *edits in (
    ("moments not restored", "moments", (*restore, (moment, f"0 * {moment}"))),
    ("exp_avg not saved", "moments", (R.RunFolder, "save_checkpoint", ("(optimizer, moments,", '(optimizer, {n: a * n.startswith("exp_avg_sq") for n, a in moments.items()},'))),
    ("exp_avg and exp_avg_sq exchanged", "moments", (*restore, ('(("exp_avg", part.exp_avg), ("exp_avg_sq", part.exp_avg_sq))', '(("exp_avg_sq", part.exp_avg), ("exp_avg", part.exp_avg_sq))'))),
    ("moments in float16", "moments", (R.RunFolder, "save_checkpoint", ("(optimizer, moments,", '(optimizer, {n: a.astype("float16") for n, a in moments.items()},'))),
    ("step lost", "step", (*restore, ("self.steps = steps", "self.steps = 0"))),
    ("step saved one early", "step", (R.RunFolder, "save_checkpoint", ("json.dumps(state |", "json.dumps(state | {'step': state['step'] - 1} |"))),
    ("weights saved in the other order", "weights", (R, "save", (written, "name: arrays[name].T.reshape(arrays[name].shape) for name in"))),
    ("a tensor left out", "weights", (R, "save", ("in parameter_shapes(config)}", "in parameter_shapes(config) if name != 'ln_f.bias'}"))),
    ("tensors renamed", "weights", (R, "save", (written, "name.replace('h.', 'layers.'): arrays[name] for name in"))),
    ("weights in float16", "weights", (R, "save", (written, "name: arrays[name].astype('float16') for name in"))),
    ("ln_1 and ln_2 exchanged in the file", "weights", (R, "save", (written, "name: arrays[name.translate({49: 50, 50: 49}) if '.ln_' in name and name[2] == '0' else name] for name in"))),
    ("weights not restored", "weights", (*restore, ("self._put(arrays)", "pass"))),
    (
        "matrices [out, in] in the file alone",
        "transformers",
        (R, "save", (written, "name: arrays[name].T if name.endswith('attn.c_proj.weight') else arrays[name] for name in")),
        (data.checkpoints.checkpoint, "model_weights", ("name: weights[name] for", "name: weights[name].T if name.endswith('attn.c_proj.weight') else weights[name] for")),
    ),
    ("config.json has another epsilon", "configuration", (R, "save", ("to_hf(config)", "to_hf(config) | {'layer_norm_epsilon': 1e-3}"))),
):  # fmt: skip
    mutant(name, f"checkpoint: {named}", *edits, where="checkpoint")

# --- sampling ------------------------------------------------------------------------------------------------------

for name, named, owner, function, change in (
    ("logits of the token before", "inside", G.Generator, "stream", ("[row[-1] for", "[row[-2:][0] for")),
    ("only the first chunk of a prompt", "inside", G.Generator, "stream", ("while any(", "if any(")),
    ("padding counted as text", "inside", G.Generator, "stream", ("+= len(chunk)", "+= CHUNK")),
    ("the cache not emptied for another call", "another call", G.Generator, "stream", ("    held = [0] * N", "    held = self.__dict__.setdefault('held', [0] * N)")),
    ("the window never slides", "beyond", G.Generator, "stream", ("if len(row) - starts[i] > context:", "if False:")),
    ("the window slides early", "beyond", G.Generator, "stream", ("> context", ">= context")),
    ("the window slides late", "beyond", G.Generator, "stream", ("> context", "> context + 1")),
    ("the window slides by one", "beyond", G.Generator, "stream", ("max(1, context // 2)", "context")),
    ("rows slide together", "beyond", G.Generator, "stream", ("if len(row) - starts[i]", "if max(map(len, rows)) - starts[i]")),
    ("keys stay where the window slid", "beyond", G.Generator, "stream", ("context // 2), 0", "context // 2), context // 2 - 1")),
    ("end of text ignored", "end", G.Generator, "stream", (" or token == self.eot", "")),
    ("end of text forgotten", "end", G.Generator, "stream", ("ended[i] or token == self.eot", "token == self.eot")),
    ("end of text in the text", "end", G.Generator, "stream", ("ended[i] = ended[i] or token == self.eot", "ended[i] = ended[i] or self.eot in rows[i][len(prompts[i]) :]")),
    ("cached positions off by one", "inside", M.KVCache, "positions", ("lengths[:, None] +", "lengths[:, None] + 1 +")),
    ("positions of the first row for all", "inside", M.KVCache, "positions", ("self.lengths[:, None]", "self.lengths[:1, None]")),
    ("slots of the first row for all", "inside", M.KVCache, "update", ("self.lengths[:, None]", "(0 * self.lengths + self.lengths[:1])[:, None]")),
    ("slots off by one", "inside", M.KVCache, "update", ("self.slots - ", "self.slots - 1 - ")),
    ("a stale slot seen", "inside", M.KVCache, "update", ("self.slots <= self.positions(T)[:, None, :, None]", "(self.slots <= self.positions(T)[:, None, :, None]) | (self.keys[layer][:, :1, :, 0] != 0).unsqueeze(1)")),
    ("the next slot seen", "inside", M.KVCache, "update", ("self.slots <= ", "self.slots <= 1 + ")),
    ("keys of another row", "inside", M.KVCache, "update", ("return self.keys[layer]", "return self.keys[layer].flip(0)")),
    ("keys in place of values", "inside", M.KVCache, "update", ("self.values[layer], seen", "self.keys[layer], seen")),
    ("one cache for all layers", "inside", M.CausalSelfAttention, "__call__", ("cache.update(self.layer", "cache.update(0")),
):  # fmt: skip
    mutant(name, f"generation: {named}", (owner, function, change), where="generation")
mutant(
    "lengths frozen in the graph",
    "generation: inside",
    (C.CachedModel, "draw", ("Tensor(lengths).realize()", "lengths")),
    (C.CachedModel, "_decode", ("= lengths", "= Tensor(lengths)")),
    where="generation",
)  # fmt: skip

# --- the checks: None, or a sentence that names what is wrong ------------------------------------------------------


def check_proof(dtype: str, seed: int, steps: int) -> str | None:
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), dtype, "CPU")
    return prove(setting, ROWS, LENGTH, seed, steps, generated=0, quiet=True)[1]


def check_loader(_: str, seed: int, __: int) -> str | None:
    """Windows, order, ranks, state and evaluation as data/text/loader.py promises them, of shards of 37 tokens."""
    size, batch = 8, 3
    tokens = np.random.default_rng(seed).permutation(VOCAB_SIZE)[: 11 * size + 45].astype(np.uint16)  # no two alike
    with tempfile.TemporaryDirectory() as temporary:
        folder, splits = Path(temporary), {}
        row, valid = tokens[: 11 * size].astype(np.int32), tokens[11 * size :].astype(np.int32)  # row: 1 short of 11
        for split, part in {"train": row, "valid": valid}.items():
            with ShardWriter(folder, split, shard_tokens=37) as writer:
                writer.write(part.astype(np.uint16))
            splits[split] = {"source": "", "documents": 1, "tokens": len(part), "shards": writer.shards}
        write_meta(folder, splits)
        expected = [row[i * size : i * size + size + 1] for i in range(10)]
        loader = L.Loader(folder, "train", batch, size, seed)
        if loader.windows != len(expected):
            return f"loader: number of windows: {loader.windows}, not {len(expected)}"
        batches = [loader.next_batch() for _ in range(10)]  # three epochs, and no batch ends with the first
        x, y = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        if (x.dtype, y.dtype) != (np.int32, np.int32) or not np.array_equal(x[:, 1:], y[:, :-1]):
            return "loader: targets are not the inputs shifted by one"
        shown = [tuple(a) + tuple(b[-1:]) for a, b in zip(x, y, strict=True)]
        where = {tuple(window): i for i, window in enumerate(expected)}
        if strange := [i for i, window in enumerate(shown) if window not in where]:
            return f"loader: windows: number {strange[0]} is none of the text's"
        promised = [int(i) for epoch in range(3) for i in np.random.default_rng((seed, epoch)).permutation(10)]
        if [where.get(window) for window in shown] != promised:
            return "loader: order of the windows"
        ranks = [L.Loader(folder, "train", 1, size, seed, rank, batch) for rank in range(batch)]
        for whole_batch in batches[:4]:
            parts = zip(*(rank.next_batch() for rank in ranks), strict=True)
            if not all(np.array_equal(np.concatenate(p), w) for p, w in zip(parts, whole_batch, strict=True)):
                return "loader: ranks do not share a batch out"
        resumed, stopped = (L.Loader(folder, "train", batch, size, seed) for _ in range(2))
        for _batch in batches[:4]:
            stopped.next_batch()
        resumed.restore(json.loads(json.dumps(stopped.state())))
        if not all(np.array_equal(*pair) for pair in zip(resumed.next_batch(), batches[4], strict=True)):
            return "loader: state does not go on with the next batch"
        pairs = list(L.windows(folder, "valid", 2, size))
        x, y = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in range(2))
        if not (np.array_equal(y[y != L.IGNORED], valid[1:]) and np.array_equal(x[y != L.IGNORED], valid[:-1])):
            return "loader: evaluation does not score every token but the first once"
    return None


def check_checkpoint(_: str, seed: int, __: int) -> str | None:
    """Two steps, a checkpoint, two more: the bits of four steps. And `transformers` reads it as the same model."""
    config = GPT2Config(vocab_size=99, n_layer=1, n_head=2, n_embd=16, n_positions=16)
    batches = random_batches(config, 2, 12, seed, 4)

    def train(trainer: T.Trainer, some: Sequence[tuple[np.ndarray, np.ndarray]]) -> T.Trainer:
        for pair in some:
            trainer.step([pair], 1e-2)
        return trainer

    def differs(ours: T.Trainer, theirs: T.Trainer, *states: str) -> str | None:
        """The first of the trainers' arrays or moments that is not the same bit by bit."""
        both = ((f"{of} {n}", a, getattr(theirs, of)()[n]) for of in states for n, a in getattr(ours, of)().items())
        return next((name for name, a, b in both if not np.array_equal(a, b)), None)

    began = random_weights(config, seed, 0.2)
    through = train(T.Trainer(config, began), batches[:2])
    with tempfile.TemporaryDirectory() as temporary:
        state = {"step": through.steps, "tokens": 48, "seconds": 1.0, "loader": {"position": 4}, "options": {}}
        out = R.RunFolder.create(Path(temporary) / "run", {})
        folder = out.save_checkpoint(config, through.model.arrays(), through.moments(), state)
        try:
            found, arrays, moments, read = R.load_checkpoint(folder)
        except InputError as e:
            return f"checkpoint: weights or moments cannot be read: {str(e).rpartition('/')[2]}"
        model = hugging_face(folder, torch.float32)
    if wrong := [n for n, a in through.model.arrays().items() if not np.array_equal(a, arrays[n])]:
        return f"checkpoint: weights in the file: {wrong[0]}"
    if found != config:
        return "checkpoint: configuration in the file"
    if {name: read[name] for name in state} != state:
        return f"checkpoint: {'step' if read['step'] != state['step'] else 'state'} in the file"
    theirs = {n.removeprefix("transformer."): p.detach().numpy() for n, p in model.named_parameters()}
    reference = torch_ref.model.GPT2(config, through.model.arrays())
    tokens = torch.tensor(batches[0][0])
    with torch.no_grad():
        near = torch.allclose(model(tokens.long()).logits, reference(tokens)[0], rtol=1e-4, atol=1e-4)
    if theirs.keys() != parameter_shapes(config).keys():
        return "checkpoint: transformers finds other tensors"
    if wrong := [n for n, a in through.model.arrays().items() if not np.array_equal(a, theirs[n])]:
        return f"checkpoint: transformers reads another {wrong[0]}"
    if not near:
        return "checkpoint: transformers computes other logits"
    # of other weights than the file's, so that what is not restored shows
    resumed = T.Trainer(config, began)
    resumed.restore(arrays, moments, read["step"])
    if name := differs(through, resumed, "arrays"):
        return f"checkpoint: weights as restored: {name}"
    if name := differs(through, resumed, "moments"):
        return f"checkpoint: moments as restored: {name}"
    if resumed.steps != through.steps:
        return f"checkpoint: step {resumed.steps} as restored, not {through.steps}"
    if name := differs(train(through, batches[2:]), train(resumed, batches[2:]), "arrays", "moments"):
        return f"checkpoint: going on is not the same: {name}"
    return None


def check_generation(_: str, seed: int, __: int) -> str | None:
    """The tokens of torch_ref, which computes every row anew at every step, after prompts of different lengths: in the
    context, beyond it, up to end-of-text, and after other prompts.
    """
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_layer=2, n_head=2, n_embd=16, n_positions=16)
    # in float64: rounding decides between two nearly equal tokens
    arrays = {n: a.astype(np.float64) for n, a in random_weights(config, seed, 0.2).items()}
    reference, model = torch_ref.model.GPT2(config, arrays), M.GPT2(config, arrays)
    # by the CPU's own decoder, and by that of any device
    generators = [G.Generator(model, B.Plain(dtype), eot=EOT) for dtype in (None, dtypes.float64)]
    prompts = [[46, 32, 18, 57, 92, 32, 13], [98, 74]]
    script = [[5, 6], [EOT, 7], [8, 9], [10, EOT], [11, 12], [13, 14]]
    for case, given, new, sampler in (
        ("inside the context, greedy", prompts, 9, lambda: Sampler(0)),
        ("another call", [[74], [18, 92]], 9, lambda: Sampler(0)),
        ("inside the context, sampled", prompts, 9, lambda: Sampler(1.0, seed=seed)),
        ("beyond the context, greedy", prompts, 34, lambda: Sampler(0)),
        ("beyond the context, sampled", prompts[::-1], 34, lambda: Sampler(1.0, 40, 0.9, seed)),
        ("end of text", prompts, len(script), lambda: Scripted(script)),
    ):
        theirs = torch_ref.generate.generate(reference, given, new, sampler(), eot=EOT)
        for generator in generators:
            with patch.object(G, "CHUNK", 4):
                ours = generator(given, new, sampler())
            if ours != theirs:
                return f"generation: {case}: {ours[0][:9]}... for {theirs[0][:9]}..."
    return None


CHECKS = {"proof": check_proof, "loader": check_loader, "checkpoint": check_checkpoint, "generation": check_generation}


def checked(where: str, dtype: str, seed: int, steps: int) -> str | None:
    """The check's verdict: None, or what is wrong. An exception counts as caught, but blames nothing."""
    try:
        return CHECKS[where](dtype, seed, steps)
    except Exception as e:
        return f"stopped by {type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"


# --- the command ---------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """One check, of a mutant or (`mutant` is None) of the port as it is."""

    mutant: str | None
    where: str
    dtype: str
    by: str | None  # the sentence of the check
    named: bool
    seconds: float
    what: str = ""  # the configuration, to repeat it


Task = tuple[str | None, str, str, int, int]  # mutant, where ("configuration" for a random one), dtype, seed, steps


def configuration(number: int, seed: int) -> tuple[Setting, int, int, str]:
    """A random model, batch size and length, and all of it in words. Every second is float32, two of four are hard.

    At least two tokens: with one, attention gives its value whatever query and key are, whose gradients are rounding. At
    least four channels: layer norm makes nothing of one and next to nothing of two, and gradients are then rounding.
    """
    random = np.random.default_rng((seed, number))
    heads = int(random.integers(1, 7))
    width = heads * int(random.integers(-(-4 // heads), 48 // heads + 1))
    sizes: dict[str, Any] = {"n_layer": int(random.integers(1, 4)), "n_head": heads, "n_embd": width}
    sizes |= {"vocab_size": int(random.integers(50, 401)), "n_positions": int(random.integers(2, 33))}
    epsilon = (1e-5, 1e-6, 1e-3)[number % 3]
    rows, length = int(random.integers(1, 4)), int(random.integers(2, sizes["n_positions"] + 1))
    config, dtype = GPT2Config(**sizes, layer_norm_epsilon=epsilon), BOTH[number % 2]
    if number // 2 % 2:
        arrays, kind = hard_weights(config, number), f"hard_weights(config, {number})"
    else:
        wide = (0.02, 0.2)[number // 4 % 2]
        arrays, kind = random_weights(config, number, wide), f"random_weights(config, {number}, {wide})"
    what = f"{config}, {kind}, {dtype}, {rows} x {length} tokens, prove's seed {number}"
    return Setting(config, arrays, dtype, "CPU"), rows, length, what


def work(task: Task) -> Result:
    name, where, dtype, seed, steps = task
    started, what = time.perf_counter(), ""
    if where == "configuration":
        number = int(dtype)
        setting, rows, length, what = configuration(number, seed)
        dtype = setting.dtype
        try:
            by = prove(setting, rows, length, number, steps, quiet=True)[1]
        except Exception as e:
            by = f"stopped by {type(e).__name__}: {e}"
        return Result(None, "proof", dtype, by, False, time.perf_counter() - started, what)
    planted = next((m for m in MUTANTS if m.name == name), None)
    with planted.plant() if planted else ExitStack():
        by = checked(where, dtype, seed, steps)
    named = planted is not None and planted.names(by)
    return Result(name, where, dtype, by, named, time.perf_counter() - started, what)


def prepare() -> None:
    """Once in every process: tinygrad on the CPU, and torch on one core, as there is a process for each."""
    transformers.utils.logging.disable_progress_bar()
    open_device("CPU")
    torch.set_num_threads(1)


def line(r: Result) -> str:
    """The table's line for a result; empty where nothing was planted and nothing was found."""
    if r.mutant is None:
        return f"FALSE ALARM: {r.where} {r.dtype}: {r.by}" + f"\n  {r.what}" * bool(r.what) if r.by else ""
    blame = "right" if r.named else "WRONG" if r.by else ""
    return f"{r.mutant:52} {r.dtype:8} {'yes' if r.by else 'NO':6} {blame:5}  {r.by or ''}"


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m parity_tests.mutants",
        description="Plant the bugs of a catalogue in the port one by one, and see which are caught and what is blamed. "
        "Exit code 0 if all are caught, 95 % blamed on the right part, and nothing is blamed without a bug.",
        epilog="example: python -m parity_tests.mutants --only clipping --dtype float32",
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="only mutants with this in their name")
    parser.add_argument("--dtype", choices=(*DTYPES, "all"), default="all", help="of the proof")
    parser.add_argument(
        "--configs", type=integer(0), default=0, metavar="N", help="also look for false alarms on N random models"
    )
    parser.add_argument("--jobs", type=integer(1), default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of the tokens and random models")
    parser.add_argument("--steps", type=integer(1), default=6, metavar="N", help="AdamW steps of each proof")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result there")
    return parser


def tasks(only: str, dtype: str, configs: int, seed: int, steps: int) -> list[Task]:
    """Mutants, then the same checks without any, then random models."""
    dtypes = DTYPES if dtype == "all" else (dtype,)
    chosen = [m for m in MUTANTS if only in m.name]
    found: list[Task] = []
    for m in chosen:
        of_it = [d for d in m.dtypes if d in dtypes] if m.where == "proof" else [""]
        found += [(m.name, m.where, d, seed, steps) for d in of_it]
    clean = dict.fromkeys(task[1:3] for task in found)
    return (
        found
        + [(None, where, d, seed, steps) for where, d in clean]
        + [(None, "configuration", str(number), seed, steps) for number in range(configs)]
    )


def main() -> None:
    args = parser().parse_args()
    refuse_missing_folder(args.json)
    todo = tasks(args.only, args.dtype, args.configs, args.seed, args.steps)
    if not todo:
        raise InputError(f"no mutant has {args.only!r} in its name; give another --only")
    started, results = time.perf_counter(), []
    context = multiprocessing.get_context("spawn")  # each process has a tinygrad of its own
    with (
        # and not for long: what it keeps of every graph slows it down
        context.Pool(min(args.jobs, len(todo)), prepare, maxtasksperchild=12) as pool,
        Progress(total=len(todo), desc="mutants", unit="check") as progress,
    ):
        progress.line(f"{'mutant':52} {'dtype':8} {'caught':6} {'named':5}  by")
        for result in pool.imap(work, todo):
            results.append(result)
            if text := line(result):
                progress.line(text)
            progress.update()
    mutants, clean = ([r for r in results if (r.mutant is None) == none] for none in (False, True))
    alarms = [r for r in clean if r.by]
    caught, named = sum(r.by is not None for r in mutants), sum(r.named for r in mutants)
    kinds, count = len({r.mutant for r in mutants}), len(mutants)
    seconds = time.perf_counter() - started
    print(f"\n{kinds} mutants, {count} checks of them: {caught} caught, {named} named right", end="")
    print(f"; {len(clean)} checks without one: {len(alarms)} false alarms ({seconds:.0f} s)")
    if args.json:
        totals: dict[str, float] = {"mutants": kinds, "checks": count, "caught": caught, "named": named}
        totals |= {"clean": len(clean), "false_alarms": len(alarms)}
        totals |= {"seconds": round(seconds, 1), "seed": args.seed, "steps": args.steps}
        with atomic_write(args.json, "w") as f:
            f.write(json.dumps(totals | {"results": [vars(r) for r in results]}, indent=1) + "\n")
    sys.stdout.flush()
    if caught < count or named < 0.95 * count or alarms:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
