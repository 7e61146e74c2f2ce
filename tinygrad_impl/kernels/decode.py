"""The decoder on Triton's kernels: a model's cache, and the compiled graphs that add prompts to it and draw tokens.

What changes from token to token stays on the GPU, so that one step follows the other without the host. The kernels are
those of step.py and draw.py. In the comments N is the number of rows of a batch, T of tokens of each, R = N * T.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import triton
from tinygrad import Tensor, dtypes, nn
from tinygrad.dtype import DType
from tinygrad.helpers import Context

from data.checkpoints.config import GPT2Config
from data.text.sampling import Sampler, probability
from tinygrad_impl.cached_model import padded
from tinygrad_impl.internals import captured_at_once, contents, overwrite
from tinygrad_impl.kernels import GPU, draw, step
from tinygrad_impl.kernels.launch import Launch, launch, new
from tinygrad_impl.model import GPT2

if TYPE_CHECKING:
    from tinygrad_impl.kernels.fused import Fused

STEPS = 32  # tokens of a row that are drawn before the host looks at them


class Launches:
    """The launches of all kernels for R = N * T tokens of a model of these sizes."""

    def __init__(self, gpu: GPU, config: GPT2Config, N: int, T: int, V: int):
        P, C, H, inner = config.n_positions, config.n_embd, config.n_head, config.inner
        R, one = N * T, N * T == 1
        early = {"EARLY": gpu.starts_early}
        stages = 4 if gpu.shared_memory == 227 else 2
        # rows of a program: a tensor core takes 16 or more; few, to have programs enough, while there are few in all
        tall = 1 if one else min(64, max(16, triton.next_power_of_2(R)))
        rows = tall if R > 64 else min(tall, 32)
        dozens = 32 < R <= 64 and gpu.shared_memory == 227  # has tiles of its own, `quick`
        block = 32 if dozens else 16 if R <= 64 else 64  # columns of the stream that have statistics of their own
        at_once = gpu.multiprocessors >= 3 * C // 32  # programs of c_attn, were they of 32 columns
        wide = (32 if at_once else 16) if one else 16 if R <= 16 else 64 if R <= 64 else math.gcd(C, 128)
        self.R, self.C, self.inner, self.blocks = R, C, inner, C // block

        def linear(
            kernel: Any,
            reads: int,
            columns: int,
            writes: int,
            rows: int = rows,
            quick: tuple[int, int, int] | None = None,  # rows, rows of the weight at a time, stages
            **constants: Any,
        ) -> Launch:
            usual = rows, min(256, 8192 // columns), stages
            rows, deep, depth = quick if dozens and quick else usual
            deep = triton.next_power_of_2(reads) if one else math.gcd(reads, deep)
            warps = min(16, max(2, deep * columns // 8192)) if one else 8 if rows * columns >= 4096 else 4
            constants |= {"R": R, "C": C, "ROWS": rows, "BN": columns, "BK": deep} | early
            grid = triton.cdiv(writes, columns), triton.cdiv(R, rows)
            return Launch(kernel, grid, constants, warps, depth, bytes=2 * reads * writes)

        sizes = {"T": T, "P": P}
        norm: dict[str, Any] = {"EPS": config.layer_norm_epsilon, "BLOCK": block}
        embed = sizes | early | {"R": R, "C": C, "ROWS": rows, "BN": block}
        self.embed = Launch(step.embed_kernel, (C // block, triton.cdiv(R, rows)), embed, 1)
        self.qkv = linear(step.qkv_kernel, C, wide, 3 * C, quick=(32, 256, 3), **sizes, **norm, D=C // H)
        tokens = min(32, max(16, triton.next_power_of_2(T)))
        attention = sizes | early | {"H": H, "D": C // H, "ROWS": tokens, "STAGES": 3, "FEW": one}
        attention |= {"BT": 128 if one else 64}
        self.attention = Launch(step.attention_kernel, (H, N, triton.cdiv(T, tokens)), attention)
        self.project = linear(step.residual_kernel, C, block, C, quick=(64, 128, 3), K=C)
        self.expand = linear(
            step.expand_kernel, C, math.gcd(inner, wide), inner, **norm, N=inner, ACTIVATION=config.activation_function
        )
        self.contract = linear(step.residual_kernel, inner, block, C, quick=(64, 128, 5), K=inner)
        self.head = linear(step.head_kernel, C, 16 if one else 128, V, tall, (64, 64, 3), **norm, V=V)
        blocks = self.head.grid[0]
        drawing = early | {"BLOCKS": blocks, "LANES": triton.next_power_of_2(blocks)}
        self.greedy = Launch(draw.greedy_kernel, (N,), {"N": N} | drawing, warps=8)
        parts = triton.cdiv(V, draw.SORTED)
        drawing = drawing | {"V": V, "SIZE": draw.SORTED}
        self.sort = Launch(draw.sort_kernel, (parts, N), drawing)
        drawing = drawing | {"N": N, "PARTS": parts, "PART_LANES": triton.next_power_of_2(parts)}
        self.draw = Launch(draw.draw_kernel, (N,), drawing)


class Decoder:
    """A model with the cache of N rows, and the compiled graphs that work on it. What changes from token to token stays
    on the GPU, so that one step follows the other without the host. A prompt comes in chunks of so many tokens; V are
    the tokens to draw from, the first of the model's.
    """

    def __init__(self, model: GPT2, backend: "Fused", N: int, chunk: int, V: int):
        self.model, self.gpu, self.N = model, backend.gpu, N
        operations = backend.bind(nn.state.get_state_dict(model)).operations
        self.table = operations.matrix((model.lm_head or model.wte).weight)
        linears = [(b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj) for b in model.h]
        self.weights = [[operations.matrix(linear.weight) for linear in layer] for layer in linears]
        c = self.model.config
        self.one, self.many = Launches(self.gpu, c, N, 1, V), Launches(self.gpu, c, N, chunk, V)

        def zeros(*shape: int, dtype: DType) -> Tensor:
            return Tensor.zeros(*shape, dtype=dtype).contiguous().realize()

        cache = N, c.n_head, c.n_positions, c.n_embd // c.n_head
        self.keys = [zeros(*cache, dtype=dtypes.bfloat16) for _ in range(c.n_layer)]
        self.values = [zeros(*cache, dtype=dtypes.bfloat16) for _ in range(c.n_layer)]
        self.tokens, self.lengths, self.steps = (zeros(N, dtype=dtypes.int32) for _ in range(3))
        self.prompt = zeros(N, chunk, dtype=dtypes.int32)
        self.logits = zeros(N, V, dtype=dtypes.float32)
        self.numbers, self.settings = zeros(STEPS, N, dtype=dtypes.float64), zeros(3, dtype=dtypes.float64)
        self.drawn, self.chances = zeros(STEPS, N, dtype=dtypes.int32), zeros(STEPS, N, dtype=dtypes.float32)
        self.prefill, self.greedy, self.sampled = map(captured_at_once, (self._prefill, self._greedy, self._sampled))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Adds tokens (N, T), at most a chunk, to the cache, after the `lengths` (N,) that each row has there."""
        overwrite(self.prompt, padded(tokens.astype(np.int32, copy=False), self.prompt.shape[1]))
        overwrite(self.lengths, lengths.astype(np.int32, copy=False))
        self.prefill()

    def draw(
        self, tokens: np.ndarray, lengths: np.ndarray, most: int, sampler: Sampler
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What comes after tokens (N,), which are each row's next after `lengths` in the cache: the tokens drawn, and
        their probabilities, both (N,), step by step, at most so many.
        """
        count = min(most, STEPS) if sampler.follows_settings else 1
        self.start(tokens, lengths, count, sampler)
        while count:
            drawn, chances = self.finish(count)
            most -= count
            following = min(most, STEPS) if sampler.follows_settings and drawn.min() >= 0 else 0
            if following:  # the GPU goes on while the host looks at these
                self.start(drawn[-1], lengths + count, following, sampler, ahead=count)
            for i in range(count):
                if not sampler.follows_settings or drawn[i].min() < 0:  # it has to see the logits, those of this step
                    self.run(drawn[i - 1] if i else tokens, lengths + i, 1, sampler)
                    logits = contents(self.logits)
                    token = sampler(logits)
                    yield token, np.array([probability(*row) for row in zip(logits, token, strict=True)])
                    return
                sampler.random.random(self.N)  # now they are used up
                yield drawn[i], chances[i]
            tokens, lengths, count = drawn[-1], lengths + count, following

    def run(
        self, tokens: np.ndarray, lengths: np.ndarray, count: int, sampler: Sampler
    ) -> tuple[np.ndarray, np.ndarray]:
        """Takes `count` steps: the tokens drawn, -1 where that is not certain, and their probabilities (count, N)."""
        self.start(tokens, lengths, count, sampler)
        return self.finish(count)

    def start(self, tokens: np.ndarray, lengths: np.ndarray, count: int, sampler: Sampler, ahead: int = 0) -> None:
        """Has the GPU take `count` steps, with the sampler's numbers after those of so many steps `ahead`."""
        overwrite(self.tokens, tokens.astype(np.int32, copy=False))
        overwrite(self.lengths, lengths.astype(np.int32, copy=False))
        overwrite(self.steps, np.zeros(self.N, np.int32))
        step = self.greedy
        if sampler.follows_settings and sampler.temperature > 0:
            step = self.sampled
            settings = sampler.temperature, sampler.top_k or 0, sampler.top_p or 1
            overwrite(self.settings, np.array(settings, np.float64))
            overwrite(self.numbers, deepcopy(sampler.random).random((ahead + STEPS, self.N))[ahead:])
        with Context(JIT_BATCH_SIZE=0):  # a step is one CUDA graph
            for _ in range(count):
                step()

    def finish(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """What has been drawn in those steps, once they are done."""
        return contents(self.drawn)[:count], contents(self.chances)[:count]

    def _prefill(self) -> None:
        *_, changed = self.layers(self.prompt, self.many)
        Tensor.realize(*changed)

    def _greedy(self) -> None:
        best, sums, changed = self.head()
        outs = [self.tokens, self.lengths, self.steps, self.drawn, self.chances]
        Tensor.realize(*launch(self.gpu, self.one.greedy, outs, best, sums), *changed)

    def _sampled(self) -> None:
        best, sums, changed = self.head()
        k = self.one
        sizes = self.N, k.sort.grid[0], draw.SORTED
        outs = [new(best, *sizes, dtype=dtypes.int64), new(best, *sizes, dtype=dtypes.float64)]
        keys, shares = launch(self.gpu, k.sort, outs, changed[-1], best, self.settings)
        outs = [self.tokens, self.lengths, self.steps, self.drawn, self.chances]
        drawn = launch(self.gpu, k.draw, outs, best, sums, keys, shares, self.numbers, self.settings)
        Tensor.realize(*drawn, *changed)

    def head(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The largest logits and the sums of each block of tokens, and whatever else a step changes, logits last."""
        k, norm = self.one, self.model.ln_f
        x, means, squares, changed = self.layers(self.tokens, k)
        blocks = self.N, k.head.grid[0]
        outs = [self.logits, new(x, *blocks, dtype=dtypes.int64), new(x, *blocks, dtype=dtypes.float32)]
        logits, best, sums = launch(self.gpu, k.head, outs, x, means, squares, norm.weight, norm.bias, self.table)
        return best, sums, [*changed, logits]

    def layers(self, tokens: Tensor, k: Launches) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The stream (R, C) after the last layer, with its statistics, and the keys and values."""
        model, changed = self.model, list[Tensor]()

        def stream() -> list[Tensor]:
            sizes = (k.R, k.C), (k.R, k.blocks), (k.R, k.blocks)
            return [new(tokens, *size, dtype=dtypes.float32) for size in sizes]

        x = launch(self.gpu, k.embed, stream(), tokens, self.lengths, model.wte.weight, model.wpe.weight)
        for i, (block, (c_attn, attn_proj, c_fc, mlp_proj)) in enumerate(zip(model.h, self.weights, strict=True)):
            ln_1, ln_2, attn, mlp = block.ln_1, block.ln_2, block.attn, block.mlp
            outs = [new(tokens, k.R, k.C), self.keys[i], self.values[i]]
            norm = ln_1.weight, ln_1.bias
            q, keys, values = launch(self.gpu, k.qkv, outs, *x, *norm, c_attn, attn.c_attn.bias, self.lengths)
            changed += [keys, values]
            [y] = launch(self.gpu, k.attention, [new(tokens, k.R, k.C)], q, keys, values, self.lengths)
            x = launch(self.gpu, k.project, stream(), y, attn_proj, attn.c_proj.bias, x[0])
            [y] = launch(
                self.gpu, k.expand, [new(tokens, k.R, k.inner)], *x, ln_2.weight, ln_2.bias, c_fc, mlp.c_fc.bias
            )
            x = launch(self.gpu, k.contract, stream(), y, mlp_proj, mlp.c_proj.bias, x[0])
        return x[0], x[1], x[2], changed
