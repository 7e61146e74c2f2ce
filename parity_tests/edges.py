"""Both models taken apart at the edges between their sub-layers: what flows forward there, and what flows back.

An edge is the output of a module (`h.3.attn.c_attn`) or its input (`h.3.attn.c_attn.input`). The modules are watched
from outside: no model knows of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tinygrad import Tensor, dtypes, nn

import tinygrad_impl.model
import torch_ref.model
from data.checkpoints.config import GPT2Config
from tinygrad_impl.backend import Backend

Arrays = dict[str, np.ndarray]


@dataclass
class Flow:
    """What one pass over a batch computes at each edge, in the order in which the model reaches them: float64 arrays.

    `gradients` has the loss's at every edge, and those of every parameter.
    """

    values: Arrays
    gradients: Arrays


def edges(config: GPT2Config) -> dict[str, tuple[str, str]]:
    """Every edge in order, with the sub-layers that its value and its gradient come from when the others are right."""
    table: dict[str, tuple[str, str]] = {}
    before = "wte + wpe"
    for i in range(config.n_layer):
        h = f"h.{i}"
        attention, wiring = f"{h}.attn.scaled_dot_product_attention", f"{h} (its wiring)"
        activation = f"{h}.mlp.{config.activation_function.removesuffix('_new')}"
        table |= {
            f"{h}.input": (before, f"{h} residual"),
            f"{h}.ln_1.input": (wiring, f"{h}.ln_1"),
            f"{h}.ln_1": (f"{h}.ln_1", wiring),
            f"{h}.attn.c_attn.input": (wiring, f"{h}.attn.c_attn"),
            f"{h}.attn.c_attn": (f"{h}.attn.c_attn", attention),
            f"{h}.attn.c_proj.input": (attention, f"{h}.attn.c_proj"),
            f"{h}.attn.c_proj": (f"{h}.attn.c_proj", f"{h} residual"),
            f"{h}.ln_2.input": (f"{h} residual", f"{h}.ln_2"),
            f"{h}.ln_2": (f"{h}.ln_2", wiring),
            f"{h}.mlp.c_fc.input": (wiring, f"{h}.mlp.c_fc"),
            f"{h}.mlp.c_fc": (f"{h}.mlp.c_fc", activation),
            f"{h}.mlp.c_proj.input": (activation, f"{h}.mlp.c_proj"),
            f"{h}.mlp.c_proj": (f"{h}.mlp.c_proj", f"{h} residual"),
        }
        before = f"{h} residual"
    table |= {
        "ln_f.input": (before, "ln_f"),
        "ln_f": ("ln_f", "lm_head"),
        "lm_head": ("lm_head", "cross_entropy"),
        "loss": ("cross_entropy", "cross_entropy"),
    }
    return table


def watched(config: GPT2Config) -> dict[str, bool]:
    """The modules with an edge before them, and whether there is one after them too."""
    names = edges(config)
    return {name.removesuffix(".input"): name.removesuffix(".input") in names for name in names if ".input" in name}


def flow_in_torch(
    config: GPT2Config,
    arrays: Mapping[str, np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    autocast: torch.dtype | None = None,
    device: str = "cpu",
    fed: Flow | None = None,
) -> Flow:
    """The flow through torch_ref's model.

    With `fed`, every sub-layer gets that flow's values as its inputs, and that flow's gradients at its outputs, so that
    what is wrong in one stays in it. The gradient of a tied wte.weight is then in two parts: the embedding's under its
    own name, the head's as lm_head.weight.
    """
    model = torch_ref.model.GPT2(config, arrays).to(device)
    values: dict[str, torch.Tensor] = {}
    leaves: dict[str, torch.Tensor] = {}

    def edge(name: str, value: torch.Tensor) -> torch.Tensor:
        values[name] = value
        if fed is None:
            return value
        leaves[name] = torch.tensor(fed.values[name]).to(value).requires_grad_()
        return leaves[name]

    for name, after in watched(config).items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, inputs, name=name: (edge(f"{name}.input", inputs[0]),))
        if after:
            module.register_forward_hook(lambda _, __, output, name=name: edge(name, output))
    head = model.head
    model.head = lambda x: edge("lm_head", head(x))  # type: ignore[method-assign]
    with torch.autocast(device, autocast, enabled=autocast is not None):
        _, loss = model(torch.tensor(x, device=device), torch.tensor(y, device=device))
    assert loss is not None
    values["loss"] = loss

    def backward(roots: list[str], targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = None if fed is None else [torch.tensor(fed.gradients[root]).to(values[root]) for root in roots]
        found = torch.autograd.grad(
            [values[root] for root in roots], list(targets.values()), given, retain_graph=True, materialize_grads=True
        )
        return dict(zip(targets, found, strict=True))

    parameters = dict(model.named_parameters())
    gradients = gradients_from(backward, values, leaves, parameters, fed is not None)
    return Flow(
        {n: v.detach().double().cpu().numpy() for n, v in values.items()},
        {n: g.double().cpu().numpy() for n, g in gradients.items()},
    )


def flow_in_tinygrad(
    config: GPT2Config,
    arrays: Mapping[str, np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    backend: Backend,
    fed: Flow | None = None,
) -> Flow:
    """The flow through tinygrad_impl's model, on that backend; otherwise as `flow_in_torch`.

    A model that does not reach every edge of `fed` gives the names of those that it reaches, with empty arrays.
    """
    model = tinygrad_impl.model.GPT2(config, arrays)
    parameters = nn.state.get_state_dict(model)
    values: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def edge(name: str, value: Tensor) -> Tensor:
        values[name] = value
        if fed is None:
            return value if backend.dtype is None else value.contiguous()  # so that no kernel computes across the edge
        leaves[name] = Tensor(fed.values[name]).cast(value.dtype).realize()
        return leaves[name]

    class Watched:
        def __init__(self, module: Callable[..., Tensor], name: str, after: bool):
            self.module, self.name, self.after = module, name, after

        def __call__(self, x: Tensor, *more: Any) -> Tensor:
            out = self.module(edge(f"{self.name}.input", x), *more)
            return edge(self.name, out) if self.after else out

    for name, after in reversed(watched(config).items()):  # what is inside a block before the block itself
        *path, last = name.split(".")
        parent: Any = model
        for part in path:
            parent = parent[int(part)] if part.isdecimal() else getattr(parent, part)
        if last.isdecimal():
            parent[int(last)] = Watched(parent[int(last)], name, after)
        else:
            setattr(parent, last, Watched(getattr(parent, last), name, after))
    head, V = model.head, config.vocab_size

    def watched_head(x: Tensor) -> Tensor:
        logits = head(x)  # (B, T, V padded with -inf)
        if fed is None:
            return edge("lm_head", logits)
        return edge("lm_head", logits[:, :, :V]).cat(logits[:, :, V:], dim=-1)  # with the padding that the head gave

    model.head = watched_head  # type: ignore[method-assign]
    _, loss = model(Tensor(x), Tensor(y))
    assert loss is not None
    values["loss"] = loss
    values = dict(zip(values, backend.lower(*values.values()), strict=True))
    if fed is not None and values.keys() != fed.values.keys():
        return Flow({name: np.empty(0) for name in values}, {})  # it reaches other edges: nothing can be fed backward

    def backward(roots: list[str], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        if fed is None:
            sources = {name: tensor for name, tensor in (values | parameters).items() if name != "loss"}
            found = backend.gradient(values["loss"], list(sources.values()))
            one = Tensor(np.ones(()))  # by itself
            return {**dict(zip(sources, found, strict=True)), "loss": one}
        given = [Tensor(fed.gradients[root]).cast(values[root].dtype).realize() for root in roots]
        total = sum(((values[root] * g).sum() for root, g in zip(roots, given, strict=True)), start=Tensor(0.0))
        return dict(zip(targets, backend.gradient(total, list(targets.values())), strict=True))

    gradients = gradients_from(backward, values, leaves, parameters, fed is not None)
    for flow in (values, gradients):
        flow["lm_head"] = flow["lm_head"][:, :, :V]
    Tensor.realize(*values.values(), *gradients.values())
    return Flow({n: as_float64(v) for n, v in values.items()}, {n: as_float64(g) for n, g in gradients.items()})


def gradients_from(
    backward: Callable[[list[str], dict[str, Any]], dict[str, Any]],
    values: dict[str, Any],
    leaves: dict[str, Any],
    parameters: dict[str, Any],
    fed: bool,
) -> dict[str, Any]:
    """The gradients of a flow, from `backward(roots, targets)`."""
    if not fed:
        return backward(["loss"], values | parameters)
    first = [name for name in values if name not in ("lm_head", "loss")]
    last = {name: leaves[name] for name in ("ln_f", "lm_head")}
    body = {name: leaf for name, leaf in leaves.items() if name not in last} | parameters
    head = body.pop("lm_head.weight", parameters["wte.weight"])
    return backward(first, body) | backward(["loss", "lm_head"], last | {"lm_head.weight": head})


def as_float64(x: Tensor) -> np.ndarray:
    return (x.float() if x.dtype == dtypes.bfloat16 else x).numpy().astype(np.float64)
