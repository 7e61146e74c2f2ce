"""The backend on Triton's kernels: a graph's nodes are joined and lowered; AdamW and the norm are of all parameters."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from tinygrad import Tensor, dtypes
from tinygrad.dtype import Invalid
from tinygrad.uop.ops import Ops, UOp

from data.checkpoints.config import GPT2Config
from tinygrad_impl.flat import Flat
from tinygrad_impl.functional import lower
from tinygrad_impl.kernels import GPU, adamw, joins
from tinygrad_impl.kernels.decode import Decoder
from tinygrad_impl.kernels.launch import launch, new
from tinygrad_impl.kernels.operations import Operations, constant, rounded
from tinygrad_impl.model import GPT2


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
    dtype = dtypes.bfloat16

    @property
    def operations(self) -> Operations:
        copies: Mapping[str, Tensor] = self.copies or {}
        return Operations(self.gpu, {self.matrices[name].uop: copy for name, copy in copies.items()})

    def bind(self, parameters: Mapping[str, Tensor]) -> "Fused":
        """With copies of the matrices, which `adamw` keeps up to date. Those of a model that has them are shared."""
        matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and name != "wpe.weight"}
        if self.matrices.keys() == matrices.keys() and all(p.uop is matrices[n].uop for n, p in self.matrices.items()):
            return self
        shapes = {name: rounded(p, name).shape for name, p in matrices.items()}
        device = str(parameters["wte.weight"].device)
        bound = Fused(self.gpu, self.strict, matrices, Flat(shapes, dtypes.bfloat16, device))
        bound.refresh()
        return bound

    def refresh(self) -> None:
        for name, copy in (self.copies or {}).items():
            copy.assign(rounded(self.matrices[name], name)).realize()

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
        graph = joins.joined(UOp.sink(*(g.uop for g in out.gradient(*targets))), joins.GRADIENTS)
        return lower(map(Tensor, graph.src), self.operations)

    def write(self, totals: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """What kernels would write to memory of its own, they write to that of the totals."""
        places, found = {}, []
        for total, value in zip(totals, values, strict=True):
            uop = value.uop
            if (memory := written(uop)) is None:
                uop = total.assign(value).uop
            else:
                places[memory] = total.uop.reshape(memory.shape)
            found.append(uop)
        Tensor.realize(*(Tensor(uop.base) for uop in UOp.sink(*found).substitute(places).src))

    def squares(self, gradients: Flat) -> list[Tensor]:
        sums = []
        for names in by_layer(gradients):
            kernel = adamw.squares(*places(gradients, names))
            memory = gradients.range(names)
            sums += launch(kernel, [new(memory, *kernel.grid, dtype=dtypes.float32)], memory)
        return sums

    def adamw(
        self,
        state: tuple[Flat, Flat, Flat, Flat],
        scalars: Tensor,
        decays: Mapping[str, float],
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        *changed, gradients = state
        assert self.copies is not None, "a trainer's backend is bound to its parameters"
        outs = list[Tensor]()
        for names in by_layer(gradients):
            copied = [name for name in names if name in self.copies]
            starts = dict(zip(copied, places(self.copies, copied)[1], strict=True))
            of_copies = [starts.get(name) for name in names]
            sizes = places(gradients, names)
            kernel = adamw.step(*sizes, [decays[name] for name in names], of_copies, *betas, eps)
            copies = self.copies.range(copied) if copied else new(scalars, 1)  # which nothing is written to
            written = [*(flat.range(names) for flat in changed), copies]
            outs += launch(kernel, written, gradients.range(names), scalars)
        Tensor.realize(*outs)

    def decoder(self, model: GPT2, N: int, chunk: int, V: int) -> Decoder:
        return Decoder(model, self, N, chunk, V)


def written(uop: UOp) -> UOp | None:
    """What `new` made, if the uop is that after kernels have written it."""
    while uop.op in (Ops.RESHAPE, Ops.AFTER):
        if uop.op is Ops.AFTER and uop.src[1].op is Ops.STORE:
            return uop if constant(uop) is Invalid else None
        uop = uop.src[0]
    return None


def by_layer(flat: Flat) -> list[list[str]]:
    """Names in the order in which they are in memory, in groups of a layer's, which are alike, so that one compiled
    kernel serves them all.
    """
    names = sorted(flat, key=flat.starts.__getitem__)
    return [list(group) for _, group in groupby(names, lambda name: name.split(".")[:2] if name[:2] == "h." else "")]


def places(flat: Flat, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Their sizes, and where in the range of all of them they begin."""
    return [int(flat[name].numel()) for name in names], [flat.starts[name] - flat.starts[names[0]] for name in names]
