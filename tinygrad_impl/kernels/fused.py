"""The backend on Triton's kernels: a graph's nodes are joined and lowered; AdamW and the norm are of all parameters."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tinygrad import Tensor, dtypes
from tinygrad.dtype import Invalid
from tinygrad.uop.ops import Ops, UOp

from data.checkpoints.config import GPT2Config
from tinygrad_impl.functional import lower
from tinygrad_impl.kernels import GPU, adamw, joins
from tinygrad_impl.kernels.decode import Decoder
from tinygrad_impl.kernels.launch import launch, new
from tinygrad_impl.kernels.operations import Operations, constant, rounded
from tinygrad_impl.model import GPT2

Tensors = Mapping[str, Tensor]  # by a parameter's name


@dataclass
class Fused:
    """Computes the nodes with kernels for one GPU. `strict`: a rule of joins.py that should fire and does not is an
    error instead of a note.
    """

    gpu: GPU
    strict: bool = False
    copies: dict[UOp, Tensor] = field(default_factory=dict)  # in bfloat16, of the matrices of bound parameters
    parameters: Tensors = field(default_factory=dict)

    name = "fused"
    dtype = dtypes.bfloat16

    @property
    def operations(self) -> Operations:
        return Operations(self.gpu, self.copies)

    def bind(self, parameters: Tensors) -> "Fused":
        """With copies of the matrices, which `adamw` keeps up to date. Those of a model that has them are shared."""
        if all(p.uop in self.copies for name, p in matrices(parameters)):
            return self
        bound = Fused(self.gpu, self.strict, {}, parameters)
        for name, p in matrices(parameters):
            bound.copies[p.uop] = rounded(p, name).clone().realize()
        return bound

    def refresh(self) -> None:
        for name, p in matrices(self.parameters):
            self.copies[p.uop].assign(rounded(p, name)).realize()

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

    def squares(self, gradients: Tensors) -> list[Tensor]:
        sums = []
        for names in by_layer(gradients):
            kernel = adamw.squares([gradients[name].numel() for name in names])
            like = gradients[names[0]]
            out = new(like, *kernel.grid, dtype=dtypes.float32)
            sums += launch(kernel, [out], *(gradients[name] for name in names))
        return sums

    def adamw(
        self,
        state: tuple[Tensors, Tensors, Tensors, Tensors],
        scalars: Tensor,
        decays: Mapping[str, float],
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        parameters, exp_avg, exp_avg_sq, gradients = state
        changed = []
        for names in by_layer(parameters):
            sizes = [parameters[name].numel() for name in names]
            copied = [name for name in names if parameters[name].uop in self.copies]
            places = [copied.index(name) if name in copied else None for name in names]
            kernel = adamw.step(sizes, [decays[name] for name in names], places, *betas, eps)
            outs = [tensors[name] for tensors in (parameters, exp_avg, exp_avg_sq) for name in names]
            outs += [self.copies[parameters[name].uop] for name in copied]
            changed += launch(kernel, outs, *(gradients[name] for name in names), scalars)
        Tensor.realize(*changed)

    def decoder(self, model: GPT2, N: int, chunk: int, V: int) -> Decoder:
        return Decoder(model, self, N, chunk, V)


def matrices(parameters: Tensors) -> list[tuple[str, Tensor]]:
    """Those that GEMMs read."""
    return [(name, p) for name, p in parameters.items() if p.ndim == 2 and name != "wpe.weight"]


def written(uop: UOp) -> UOp | None:
    """What `new` made, if the uop is that after kernels have written it."""
    while uop.op in (Ops.RESHAPE, Ops.AFTER):
        if uop.op is Ops.AFTER and uop.src[1].op is Ops.STORE:
            return uop if constant(uop) is Invalid else None
        uop = uop.src[0]
    return None


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Names of parameters in groups of a layer's, which are alike, so that one compiled kernel serves them all."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.split(".")[1] if name.startswith("h.") else ""].append(name)
    return list(groups.values())
