"""GPT-2 in PyTorch: the reference. tinygrad_impl/model.py is the same file in tinygrad, line against line.

The architecture is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", as Hugging Face
ships it: the same parameter names, shapes and order ("Conv1D" weights are [in, out]), so that checkpoints need no
renaming and no transposing. There is no dropout.

In the comments B is the batch, T the sequence length, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.checkpoints.config import GPT2Config


class Conv1D(nn.Module):
    """x @ weight + bias, with weight [in, out]: the transpose of nn.Linear's, as in OpenAI's code."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)  # (..., in) -> (..., out)


class KVCache:
    """The keys and values of the tokens before, so that each is computed once: of B rows, in n_positions slots a layer.

    A token's slot is its position. `lengths`, integers (B,), is how many tokens each row has; the caller sets it before
    every call of `GPT2.hidden`. No slot from there on is seen before it is written, so 0 begins a row anew.
    """

    def __init__(self, model: "GPT2", B: int):
        config = model.config
        self.slots = torch.arange(config.n_positions, device=model.wte.weight.device)
        shape = (B, config.n_head, config.n_positions, config.n_embd // config.n_head)
        zeros = torch.zeros(shape, dtype=model.wte.weight.dtype, device=model.wte.weight.device)
        self.keys = [zeros.clone() for _ in range(config.n_layer)]
        self.values = [zeros.clone() for _ in range(config.n_layer)]
        self.lengths = self.slots.new_zeros(B)

    def positions(self, T: int) -> Tensor:
        """Those of each row's next T tokens: (B, T). What is past the last position is padding."""
        return (self.lengths[:, None] + torch.arange(T, device=self.slots.device)).clamp(max=len(self.slots) - 1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps k, v (B, H, T, D) of the next T tokens. Gives those of all slots, (B, H, n_positions, D), and which of
        the slots each token sees: (B, 1, T, n_positions).
        """
        T = k.shape[2]
        nth = self.slots - self.lengths[:, None]  # (B, n_positions): which of the T tokens a slot is for
        index = nth.clamp(0, T - 1)
        kept = (index != nth)[:, None, :, None]  # where it is for none of them
        index = index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])  # (B, H, n_positions, D)
        self.keys[layer] = torch.where(kept, self.keys[layer], k.gather(2, index))
        self.values[layer] = torch.where(kept, self.values[layer], v.gather(2, index))
        seen = self.slots <= self.positions(T)[:, None, :, None]
        return self.keys[layer], self.values[layer], seen


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, C) -> (B, T, 3C)
        q, k, v = (t.reshape(B, T, self.n_head, -1).transpose(1, 2) for t in qkv.split(C, dim=2))  # each (B, H, T, D)
        seen = None
        if cache is not None:
            k, v, seen = cache.update(self.layer, k, v)
        # softmax(q @ k.T / sqrt(D)) @ v: (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by the names of Hugging Face
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),  # Hendrycks & Gimpel 2016
    "gelu": lambda x: F.gelu(x, approximate="none"),  # the same paper's, of which that is an approximation
    "relu": lambda x: F.relu(x),
}


class MLP(nn.Module):
    """Two layers, wider inside (n_inner, mostly 4 C), with an activation between them."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.inner)
        self.c_proj = Conv1D(config.inner, config.n_embd)
        self.activation = config.activation_function

    def forward(self, x: Tensor) -> Tensor:
        x = ACTIVATIONS[self.activation](self.c_fc(x))  # (B, T, C) -> (B, T, n_inner)
        return self.c_proj(x)  # -> (B, T, C)


class Block(nn.Module):
    """One layer: attention, then MLP, each on the normalised residual stream and added to it (pre-norm)."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT2(nn.Module):
    """The language model. Its head is tied to the token embedding, unless `config` says that it has weights of its own.

    `arrays` are the parameters by name, as data/checkpoints/checkpoint.py loads them; the model computes in their
    dtype, or with bfloat16 matmuls inside `torch.autocast`.
    """

    def __init__(self, config: GPT2Config, arrays: Mapping[str, np.ndarray]):
        super().__init__()
        self.config = config
        # of no numbers yet: drawing some for the vocabulary takes longer than all else here
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.n_positions, config.n_embd), freeze=False)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        untied = not config.tie_word_embeddings
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False) if untied else None
        self.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()}, assign=True)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens, targets: integers (B, T), T <= n_positions. Gives logits (B, T, V) and, given targets, the loss: the
        mean of -log p(target) in nats, a scalar, over the targets that are not -100.
        """
        logits = self.head(self.hidden(tokens))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.long().flatten(), ignore_index=-100)
        return logits, loss

    def losses(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, targets: integers (B, T), T <= n_positions. Gives -log p(target) in nats of each target, (B, T), 0
        where it is -100; and whether the target is the likeliest token, bool (B, T).
        """
        logits = self.head(self.hidden(tokens))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.long().flatten(), ignore_index=-100, reduction="none")
        return losses.reshape(targets.shape), logits.argmax(-1) == targets

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> the residual stream after the last layer, normalised: (B, T, C). With a cache they are the
        next T tokens of each row, after the `cache.lengths` that it has already.
        """
        T = tokens.shape[1]
        positions = self.wpe.weight[:T] if cache is None else F.embedding(cache.positions(T), self.wpe.weight)
        x = F.embedding(tokens, self.wte.weight) + positions  # (B, T, C) + (T, C) or (B, T, C)
        for block in self.h:
            x = block(x, cache)
        return self.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> logits (B, T, V)."""
        return F.linear(x, (self.lm_head or self.wte).weight)

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters by name, copied."""
        return {name: p.detach().cpu().numpy().copy() for name, p in self.named_parameters()}
