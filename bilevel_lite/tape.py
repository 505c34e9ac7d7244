r"""One forward pass through a model, remembered: inputs of its linear maps, gradients at outputs.

KFAC needs, for each layer z = W a, the inputs a and the output gradients g = (dz/doutputs)^T s of
probes s at the model's outputs. The tape keeps the inputs on the way forward; backward passes stop
at the layers' outputs, so that no weight gradient is ever formed. Parameters without a Kronecker
block (norms, embeddings, shared weights) get the exact diagonal of the same Fisher.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, jvp, vjp, vmap

from bilevel_lite.curvature import require_batch
from bilevel_lite.params import trainable
from bilevel_lite.risk import WeightedRisk

__all__ = ["Layer", "Tape", "output_columns", "places_of", "split_parameters", "squared_gradients"]


@dataclass
class Layer:
    """A linear map with a Kronecker block: where its parameters stand in theta."""

    name: str
    module: nn.Module
    weight: slice | None
    bias: slice | None
    joint: bool = False

    def read(self, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Cut V, shape (d1, d2), bias as last column if joint, and a separate bias, (d1, 1)."""
        weight = None if self.weight is None else v[self.weight].view(len(self.module.weight), -1)
        bias = None if self.bias is None else v[self.bias][:, None]
        return (torch.cat([weight, bias], 1), None) if self.joint else (weight, bias)

    def write(self, out: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """Put both back into a flat vector; the inverse of `read`."""
        if self.joint:
            weight, bias = weight[:, :-1], weight[:, -1:]
        if weight is not None:
            out[self.weight] = weight.reshape(-1)
        if bias is not None:
            out[self.bias] = bias.reshape(-1)


@dataclass
class Call:
    """One call of a module in the forward pass."""

    module: nn.Module
    input: Tensor | None  # None if the module does not take exactly one tensor
    version: int
    edge: Any  # where the gradient in the call's output arrives; None if it is not one tensor
    shape: torch.Size | None  # of the output

    @property
    def usable(self) -> bool:
        """True if one tensor went in and one came out."""
        return self.input is not None and self.edge is not None


class Tape:
    """One forward pass in which the calls of all modules that own parameters are kept.

    A backward pass stops at the layers' outputs and never forms a gradient in the parameters. What
    a parameter does outside of its own module's calls (a weight that a decoder borrows, say) is
    therefore not seen: its block leaves that part out, and `slopes` gives None.

    Args:
        risk: The weighted risk.
        theta: Inner variable.
        batch: (x, y, ...).
        bias: ``"joint"`` or ``"separate"``.

    Raises:
        ValueError: for a precision below float32, an empty batch, or a layer in training mode
            whose output is random or mixes examples.
    """

    def __init__(self, risk: WeightedRisk, theta: Tensor, batch: Any, bias: str = "joint"):
        _require_precision(theta)
        _require_eval(risk.model)
        self.calls: dict[str, list[Call]] = {}
        self.x = batch[0]
        places = places_of(risk.model)
        self.names = {id(p): name for name, p in trainable(risk.model).items()}
        modules = dict(risk.model.named_modules())
        owners = {owner for _, where in places.values() for owner, _ in where}
        hooks = [modules[o].register_forward_hook(self._hook(o), with_kwargs=True) for o in owners]
        nodes: dict[str, Any] = {}
        hooks.append(risk.model.register_forward_pre_hook(partial(_origins, places, nodes)))
        try:
            with torch.enable_grad():
                self.outputs = risk.outputs(theta.detach().requires_grad_(), batch)
        finally:
            for hook in hooks:
                hook.remove()
        require_batch(self.outputs)
        self.n = self.outputs.shape[0]
        once = {name for name, calls in self.calls.items() if len(calls) == 1 and calls[0].usable}
        self.layers, self.rest = split_parameters(places, modules, once, bias)
        uses = _uses(self.outputs, nodes.values())
        self.borrowed = any(
            uses[node] > self._expected(places[name][1], modules) for name, node in nodes.items()
        )

    def _expected(self, where: list, modules: dict) -> float:
        """How often the calls of a parameter's owners use it; no bound for a module of its own."""
        calls = sum(len(self.calls.get(owner, ())) for owner, _ in where)
        known = all(isinstance(modules[owner], ONCE_A_CALL) for owner, _ in where)
        return calls if known or not calls else math.inf

    def _hook(self, name):
        def keep(module, inputs, options, output):
            single = len(inputs) == 1 and isinstance(inputs[0], Tensor) and not options
            ours = isinstance(output, Tensor) and output.requires_grad
            call = Call(
                module,
                inputs[0].detach() if single else None,
                inputs[0]._version if single else 0,
                get_gradient_edge(output) if ours else None,
                output.shape if ours else None,
            )
            self.calls.setdefault(name, []).append(call)

        return keep

    def backward(self, probe: Tensor, keep: bool) -> dict[str, list[Tensor]]:
        """Send one output probe back to the outputs of every kept call."""
        flat = [c for calls in self.calls.values() for c in calls]
        edges = [c.edge for c in flat if c.edge is not None]
        grads = iter(
            torch.autograd.grad(self.outputs, edges, probe, retain_graph=keep, allow_unused=True)
        )
        return {
            name: [None if c.edge is None else next(grads) for c in calls]
            for name, calls in self.calls.items()
        }

    def slopes(self, grads: dict[str, list[Tensor]], params: dict, v: dict) -> Tensor | None:
        """< gradient of example i in theta, v >, shape (n,), from what the tape has kept.

            sum over calls of  g_i . (dz_i along v),     for a linear map  g_i . (V a_i)

        Args:
            grads: What `backward` returned for the gradients of the examples' losses.
            params: theta by name.
            v: The direction by name.

        Returns:
            Shape (n,), or None if a call did not take and give one tensor with an example a row,
            or a parameter is used outside of its module's calls.
        """
        if self.borrowed:
            return None
        total = self.outputs.new_zeros(self.n)
        for name, calls in self.calls.items():
            for call, g in zip(calls, grads[name], strict=True):
                if g is None:
                    continue
                rows = call.usable and len(call.input) == len(g) == self.n
                if not rows or call.input._version != call.version:
                    return None
                total += (g * _along(call, params, v, self.names)).flatten(1).sum(1)
        return total

    def input_columns(self, layer: Layer) -> Tensor:
        """The layer's inputs a, one column for each example and position, shape (d2, R).

        Raises:
            ValueError: if a was overwritten in place later in the forward pass.
        """
        (call,) = self.calls[layer.name]
        if call.input._version != call.version:
            raise ValueError(
                f"model: the input of layer {layer.name!r} was changed in place after the layer "
                "had read it; use the operation that makes a copy"
            )
        return _input_columns(call.module, call.input, layer.joint)


def _require_precision(theta: Tensor) -> None:
    if theta.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"theta: has dtype {theta.dtype}; KFAC needs float32 or float64 (its factors are "
            "squares, and a Cholesky factorisation exists for no shorter type)"
        )


def _require_eval(model: nn.Module) -> None:
    for name, module in model.named_modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training and dropout or norm and (module.training or module.running_mean is None):
            effect = "makes its output random" if dropout else "mixes the examples of a batch"
            raise ValueError(
                f"model: layer {name!r} ({type(module).__name__}) is in training mode, which "
                f"{effect}, so there is no curvature per example; call model.eval()"
            )


def places_of(model: nn.Module) -> dict:
    """Name -> (slice in theta, the (module, attribute) pairs that own it), in theta's order."""
    where: dict[int, list] = {}
    for prefix, module in model.named_modules():
        for local, p in module._parameters.items():
            if p is not None:
                where.setdefault(id(p), []).append((prefix, local))
    places, start = {}, 0
    for name, p in trainable(model).items():
        places[name] = (slice(start, start + p.numel()), where[id(p)])
        start += p.numel()
    return places


def split_parameters(places: dict, modules: dict, once: set, bias: str) -> tuple[list[Layer], dict]:
    """Split the parameters: those of linear maps used once, and the rest."""
    layers, rest = {}, {}
    for name, (place, where) in places.items():
        owner, local = where[0]
        single = len(where) == 1 and owner in once and local in ("weight", "bias")
        if single and _is_linear_map(modules[owner]):
            layer = layers.setdefault(owner, Layer(owner, modules[owner], None, None))
            setattr(layer, local, place)
        else:
            rest[name] = (place, where)
    for layer in layers.values():
        layer.joint = bias == "joint" and layer.weight is not None and layer.bias is not None
    return list(layers.values()), rest


def _origins(places: dict, nodes: dict, model: nn.Module, _) -> None:
    """Note the graph node of each parameter, as the model sees it in this forward pass."""
    for name, (_, where) in places.items():
        owner, local = where[0]
        p = model.get_submodule(owner)._parameters[local]
        if p.grad_fn is not None:
            nodes[name] = p.grad_fn


def _uses(outputs: Tensor, nodes) -> Counter:
    """How often the graph of the outputs goes back to each node."""
    wanted, seen, stack, uses = set(nodes), set(), [outputs.grad_fn], Counter()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted:
            continue
        for before, _ in node.next_functions:
            if before in wanted:
                uses[before] += 1
            stack.append(before)
    return uses


def _is_linear_map(module: nn.Module) -> bool:
    conv = isinstance(module, nn.Conv2d) and module.groups == 1
    return conv or isinstance(module, nn.Linear)


def _input_columns(module: nn.Module, a: Tensor, ones: bool) -> Tensor:
    """Inputs of a linear map as columns; for a convolution its patches, written in one copy."""
    if isinstance(module, nn.Linear):
        rows = a.reshape(-1, a.shape[-1])
        return (torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if ones else rows).T
    windows = _windows(module, a)  # (C, kh, kw, n, oh, ow), a view
    d = math.prod(windows.shape[:3])
    columns = a.new_empty(d + ones, *windows.shape[3:])
    columns[:d].view(windows.shape).copy_(windows)
    if ones:
        columns[d] = 1
    return columns.view(d + ones, -1)


def _windows(conv: nn.Conv2d, a: Tensor) -> Tensor:
    """What each kernel entry sees, as a view of the padded input: (C, kh, kw, n, oh, ow)."""
    pad = conv._reversed_padding_repeated_twice
    if any(pad):
        a = F.pad(a, pad, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    for axis, size, step, gap in zip(
        (2, 3), conv.kernel_size, conv.stride, conv.dilation, strict=True
    ):
        a = a.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
    return a.permute(1, 4, 5, 0, 2, 3)


def output_columns(module: nn.Module, g: Tensor) -> Tensor:
    """Gradients in a linear map's outputs as columns, shape (d1, R)."""
    if isinstance(module, nn.Linear):
        return g.reshape(-1, g.shape[-1]).T
    return g.transpose(0, 1).reshape(g.shape[1], -1)


# ------------------------------------------------------------------ parameters without a block


def squared_gradients(tape: Tape, name: str, grads: dict, params: dict) -> Tensor:
    """Sum over examples of the squared per-example gradient, for a parameter without a block."""
    place, where = tape.rest[name]
    used = [
        (call, local, g)
        for owner, local in where
        for call, g in zip(tape.calls.get(owner, ()), grads.get(owner, ()), strict=True)
    ]
    if not used or any(not c.usable or c.input.shape[:1] != (tape.n,) for c, _, _ in used):
        raise ValueError(
            f"model: parameter {name!r} has no Kronecker block, and its layer does not take and "
            "give one tensor with an example a row, so it has no diagonal block either; pass "
            "rest='damping' (damping alone) or rest='drop' (v = 0), or freeze it"
        )
    used = [(call, local, g) for call, local, g in used if g is not None]
    if not used:  # the outputs do not depend on it
        return params[name].new_zeros(place.stop - place.start)
    call, _, g = used[0]
    if type(call.module) is nn.Embedding and len(used) == 1:
        return _embedding_squares(call.module, call.input, g)
    summed = sum(_per_example(call, local, g, params, tape.names) for call, local, g in used)
    return summed.square().sum(0).reshape(-1)


def _per_example(call: Call, local: str, g: Tensor, params: dict, names: dict) -> Tensor:
    """Gradient of each example in one parameter of one call, shape (n, *parameter shape)."""
    module, a = call.module, call.input
    own = _named(module, params, names)
    if isinstance(module, NORMS) and len(own) == 2:  # y = weight xhat + bias
        if local == "weight":  # xhat is the layer with unit weight
            unit = {"weight": torch.ones_like(own["weight"]), "bias": torch.zeros_like(own["bias"])}
            g = g * functional_call(module, unit, (a,))
        if isinstance(module, nn.LayerNorm):
            return g.reshape(len(g), -1, *module.normalized_shape).sum(1)
        return g.reshape(*g.shape[:2], -1).sum(2)

    def one(a_i, g_i):
        def run(p):
            return functional_call(module, {**own, local: p}, (a_i[None],))

        return vjp(run, own[local])[1](g_i[None])[0]

    return vmap(one)(a, g)


def _named(module: nn.Module, values: dict, names: dict) -> dict[str, Tensor]:
    """What theta (or a direction) holds for the parameters of a module and of its children."""
    return {k: values[names[id(p)]] for k, p in module.named_parameters() if id(p) in names}


def _along(call: Call, params: dict, v: dict, names: dict) -> Tensor:
    """Directional derivative of a call's output in the module's own parameters, along v."""
    module = call.module
    own = {k for k, p in module._parameters.items() if id(p) in names}
    direction = {k: t for k, t in _named(module, v, names).items() if k in own}
    if _is_linear_map(module) or isinstance(module, NORMS):  # linear in its parameters
        zeros = {
            k: torch.zeros_like(p)
            for k, p in module._parameters.items()
            if p is not None and k not in own
        }
        return functional_call(module, {**zeros, **direction}, (call.input,))
    fixed = _named(module, params, names)

    def run(moving):
        return functional_call(module, {**fixed, **moving}, (call.input,))

    return jvp(run, ({k: fixed[k] for k in own},), (direction,))[1]


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)
ONCE_A_CALL = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, *NORMS)


def _embedding_squares(module: nn.Embedding, index: Tensor, g: Tensor) -> Tensor:
    """Squared per-example gradients of an embedding: sum a token's positions, square, sum."""
    rows = module.num_embeddings
    positions = index.reshape(len(index), -1)
    key = torch.arange(len(index), device=index.device)[:, None] * rows + positions
    unique, inverse = key.flatten().unique(return_inverse=True)
    summed = g.new_zeros(len(unique), g.shape[-1]).index_add_(
        0, inverse, g.reshape(-1, g.shape[-1])
    )
    out = g.new_zeros(rows, g.shape[-1]).index_add_(0, unique % rows, summed.square())
    if module.padding_idx is not None:
        out[module.padding_idx] = 0
    return out.reshape(-1)
