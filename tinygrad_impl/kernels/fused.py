"""The backend on Triton's kernels: a graph's nodes are joined and lowered; AdamW and the norm are of all parameters."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import UOp

from data.checkpoints.config import GPT2Config
from tinygrad_impl.backend import Part
from tinygrad_impl.flat import REST, Bucket, Flat, joined_segments
from tinygrad_impl.functional import in_place, lower
from tinygrad_impl.internals import part_of
from tinygrad_impl.kernels import GPU, adamw, joins
from tinygrad_impl.kernels.decode import Decoder
from tinygrad_impl.kernels.launch import launch, new, stored
from tinygrad_impl.kernels.operations import Operations, padded
from tinygrad_impl.model import GPT2

TOGETHER = 24  # vectors that one kernel adds to their totals


@dataclass
class Fused:
    """Computes the nodes with kernels for one GPU. `strict`: a rule of joins.py that should fire and does not is an
    error instead of a note.
    """

    gpu: GPU
    strict: bool = False
    matrices: Mapping[str, Tensor] = field(default_factory=dict)  # of the bound parameters, those that GEMMs read
    copies: Flat | None = None  # of these, in bfloat16

    name = "fused"
    prompt_tokens = 256  # 512 take half as long again where there are few
    dtype = dtypes.bfloat16

    @property
    def operations(self) -> Operations:
        copies: Mapping[str, Tensor] = self.copies or {}
        return Operations(self.gpu, {self.matrices[name].uop: copy for name, copy in copies.items()})

    def bind(self, parameters: Mapping[str, Tensor], ranks: int | None = None) -> "Fused":
        """With copies of the matrices, which `adamw` keeps up to date. Those of a model that has them are shared."""
        matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and name != "wpe.weight"}
        if self.matrices.keys() == matrices.keys() and all(p.uop is matrices[n].uop for n, p in self.matrices.items()):
            return self
        shapes = {name: padded(p.shape, name) for name, p in matrices.items()}
        device = str(parameters["wte.weight"].device)
        bound = Fused(self.gpu, self.strict, matrices, Flat(shapes, dtypes.bfloat16, device, ranks or 1))
        if ranks is None:
            bound.refresh()
        return bound

    def reads(self, bucket: Bucket) -> bool:
        return bucket.name == REST

    def kept(self, bucket: Bucket) -> Tensor | None:
        assert self.copies is not None, "a trainer's backend is bound to its parameters"
        alike = bucket in self.copies.buckets  # element for element
        return self.copies.memory[bucket.name] if alike else None

    def refresh(self, buckets: bool = True) -> None:
        assert self.copies is not None
        written = list[Tensor]()
        for bucket in self.copies.buckets if buckets else self.copies.buckets[-1:]:
            for name in bucket.starts:
                matrix = self.matrices[name]
                written += launch(self.gpu, adamw.rounding(int(matrix.numel())), [self.copies[name]], matrix)
        Tensor.realize(*written)  # together: one alone would be compiled before the next is begun

    def round_off(self, parts: Sequence[Part], rank: int) -> None:
        for part in parts:
            if (copy := self._copy(part, rank)) is not None:
                Tensor.realize(*launch(self.gpu, adamw.rounding(int(copy.numel())), [copy], part.parameters))

    def _copy(self, part: Part, rank: int) -> Tensor | None:
        """The memory of the copy of the rank-th part, of a bucket that the copies have as it is."""
        memory = self.kept(part.bucket)
        size = int(part.parameters.numel())
        return memory if memory is None or part.whole else part_of(memory, rank * size, size)

    def lower(self, *tensors: Tensor, loss_of: GPT2Config | None = None) -> list[Tensor]:
        graph = joins.joined(UOp.sink(*(t.uop for t in tensors)))
        if loss_of and (missing := joins.missing(graph, loss_of)):
            said = ", ".join(f"{name} ({how})" for name, how in missing.items())
            said = f"these rules of kernels/joins.py did not fire as often as the model needs: {said}"
            if self.strict:
                raise RuntimeError(said)
            print(f"note: slower than it could be, as {said}", file=sys.stderr)
        return lower(map(Tensor, graph.src), self.operations)

    def gradient(self, out: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        graph = joins.norms_again(joins.joined(UOp.sink(*(g.uop for g in out.gradient(*targets))), joins.GRADIENTS))
        graph = joins.grouped(graph, "column_sums", besides=1)  # that of the first layer norm
        if self.gpu.has_copy_engine:
            graph = joins.grouped(graph, "weight_gradients")
        return lower(map(Tensor, graph.src), self.operations)

    def written(self, totals: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        return in_place(totals, values)

    def added(self, totals: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        small = [i for i, total in enumerate(totals) if total.ndim < 2]
        groups = [[i] for i, total in enumerate(totals) if total.ndim == 2]
        groups += [small[first : first + TOGETHER] for first in range(0, len(small), TOGETHER)]
        found: dict[int, Tensor] = {}
        for group in groups:
            kernel = adamw.adding([int(totals[i].numel()) for i in group])
            outs = launch(self.gpu, kernel, [stored(totals[i]) for i in group], *(values[i] for i in group))
            found |= zip(group, outs, strict=True)
        return [found[i] for i in range(len(totals))]

    def squares(self, parts: Sequence[Part]) -> list[Tensor]:
        sums = []
        for part in parts:
            kernel = adamw.squares(int(part.gradients.numel()))
            sums += launch(self.gpu, kernel, [new(part.gradients, *kernel.grid, dtype=dtypes.float32)], part.gradients)
        return sums

    def adamw(
        self,
        part: Part,
        rank: int,
        scalars: Tensor,
        decays: Mapping[str, float],
        betas: tuple[float, float],
        eps: float,
    ) -> list[Tensor]:
        assert self.copies is not None
        starts: dict[str, int | None] = dict.fromkeys(part.bucket.starts)  # of the parameters' copies
        if (copy := self._copy(part, rank)) is not None:
            starts |= {s.name: s.start for s in part.segments}
        elif part.whole:  # the last bucket, of which the copies have some only, and rows of padding in between
            tables = self.copies.buckets[-1]
            copy = self.copies.memory[tables.name]
            starts |= tables.starts
        sizes, places, of_decay, of_copy = joined_segments(part.segments, decays, starts)
        if not sizes:  # a small bucket may have nothing but padding in a part
            return [part.parameters]
        kernel = adamw.step(sizes, places, of_decay, of_copy, *betas, eps)
        copy = new(scalars, 1) if copy is None else copy  # which nothing is written to
        changed = [part.parameters, part.exp_avg, part.exp_avg_sq, copy]
        return launch(self.gpu, kernel, changed, part.gradients, scalars)

    def decoder(self, model: GPT2, N: int, chunk: int, V: int) -> Decoder:
        return Decoder(model, self, N, chunk, V)
