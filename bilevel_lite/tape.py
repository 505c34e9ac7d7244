r"""One forward pass through a model, remembered: inputs of its linear maps, gradients at outputs.

KFAC needs, for each layer z = W a, the inputs a and the output gradients gamma = (dz/doutputs)^T s
of probes s at the model's outputs. The tape keeps the inputs on the way forward; backward passes
stop at the layers' outputs, so that no weight gradient is ever formed. Parameters without a
Kronecker block (norms, embeddings, shared weights) get the exact diagonal of the same Fisher.

A module's class says by which formula its gradient is put together, never that this is right: the
formulas are held against autograd's own gradient, parameter by parameter, on the whole batch for a
model not seen before and on a few examples at each call. What differs has no block, no examples, or
neither, and everything that would have rested on it takes another way or is refused by name.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, vjp, vmap

from bilevel_lite.params import leaves, predict, trainable
from bilevel_lite.purity import only_looking
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.same_function import same_twice
from bilevel_lite.surroundings import lock_of_modules, second_order
from bilevel_lite.trust import known_code, on_few, tolerance, verdicts_of

__all__ = [
    "Call",
    "Layer",
    "Tape",
    "along",
    "output_columns",
    "places_of",
    "split_parameters",
    "squared_gradients",
]


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)
KNOWN = {
    cls: cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, *NORMS)
}


UNLIKE = "its gradient does not go example by example with the rows of the batch"


@dataclass
class Layer:
    """A linear map with a Kronecker block: where its parameters stand in theta."""

    name: str
    module: nn.Module
    weight: slice | None
    bias: slice | None
    joint: bool = False

    @property
    def dims(self) -> tuple[int, int]:
        """d1 and d2, up to the bias."""
        weight = self.module.weight
        return len(weight), weight[0].numel()

    def read(self, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Cut V, shape (d1, d2), bias as last column if joint, and a separate bias, (d1, 1)."""
        weight = None if self.weight is None else v[self.weight].view(len(self.module.weight), -1)
        bias = None if self.bias is None else v[self.bias][:, None]
        return (torch.cat([weight, bias], 1), None) if self.joint else (weight, bias)

    def split(
        self, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What `read` gave, in the shapes of the module's parameters."""
        if self.joint:
            weight, bias = weight[:, :-1], weight[:, -1:]
        return (
            None if weight is None else weight.reshape(self.module.weight.shape),
            None if bias is None else bias.reshape(-1),
        )

    def write(self, out: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """Put both back into a flat vector; the inverse of `read`."""
        weight, bias = self.split(weight, bias)
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

    def __post_init__(self):
        # one example alone, without a dimension for several: an image, a vector
        least = {nn.Conv2d: 4, nn.Linear: 2}.get(kind_of(self.module), 0)
        alone = len(self.shape or ()) < least
        # one tensor in, one out
        self.usable = self.input is not None and self.edge is not None and not alone

    @property
    def shapes(self) -> tuple:
        """Shapes of the one tensor that went in and of the one that came out."""
        return None if self.input is None else self.input.shape, self.shape


class Tape:
    """One forward pass in which the calls of all modules that own parameters are kept.

    A backward pass stops at the layers' outputs and never forms a gradient in the parameters. What
    a parameter does outside of its own module's calls is not seen; `verify` notices it.

    Args:
        risk: The weighted risk.
        theta: Inner variable.
        batch: (x, y, ...).
        bias: ``"joint"`` or ``"separate"``.

    Raises:
        ValueError: for a precision below float32, an empty batch, a layer in training mode whose
            output is random or mixes examples, or a model that draws random numbers.
    """

    def __init__(self, risk: WeightedRisk, theta: Tensor, batch: Any, bias: str = "joint"):
        _require_precision(theta)
        _require_eval(risk.model)
        self.risk, self.theta, self.batch, self.bias = risk, theta.detach(), batch, bias
        self.calls: dict[str, list[Call]] = {}
        self.x = batch[0]
        self.places = places_of(risk.model)
        self.names = {id(p): name for name, p in trainable(risk.model).items()}
        self.modules = dict(risk.model.named_modules())
        self.owners = sorted({o for _, where in self.places.values() for o, _ in where})
        self.known = known_code(risk.model)
        self._run(risk, batch)
        self.n = self.outputs.shape[0]
        self.once = {
            name for name, calls in self.calls.items() if len(calls) == 1 and calls[0].usable
        }
        self.layers, self.rest = split_parameters(self.places, self.modules, self.once, bias)
        self.unlike: dict[str, str] = {}  # parameter -> why its gradient has no examples here

    def _run(self, risk, batch):
        compiled = any(m._compiled_call_impl is not None for m in self.modules.values())
        compiled = compiled or any("_orig_mod" in m._modules for m in self.modules.values())
        again = partial(risk.outputs, self.theta, batch)
        # known code (in eval mode, as required) draws nothing and keeps nothing
        once = same_twice("model", self.theta, again, risk.model)
        once = nullcontext() if self.known else once
        for owner in self.owners:
            if isinstance(self.modules[owner], torch.jit.ScriptModule):
                raise ValueError(
                    f"model: layer {owner!r} is scripted, so what goes through it cannot be seen; "
                    "use the module as it was before torch.jit.script, or a solver that need not "
                    "see it, such as CG"
                )
        with once as watch, lock_of_modules():
            hooks = [
                self.modules[o].register_forward_hook(self._hook(o), with_kwargs=True)
                for o in self.owners
            ]
            try:
                with torch.enable_grad(), second_order() if compiled else nullcontext():
                    # a model of unknown code may write into what it is given (max_norm does)
                    own = self.theta if self.known else self.theta.clone()
                    self._leaves = leaves(risk.model, own)
                    self.outputs = risk.outputs(self._leaves, batch)
                    if watch is not None:
                        watch.value = self.outputs
            finally:
                for hook in hooks:
                    hook.remove()

    def _hook(self, name):
        def keep(module, inputs, options, output):
            if only_looking():
                return
            single = len(inputs) == 1 and isinstance(inputs[0], Tensor) and not options
            ours = isinstance(output, Tensor) and output.requires_grad
            if single and inputs[0].layout != torch.strided:
                raise ValueError(
                    f"model: layer {name!r} takes a sparse tensor ({inputs[0].layout}), expected a "
                    "dense one; put x.to_dense() into the batch"
                )
            x = inputs[0].detach() if single else None
            if single and x.is_floating_point():  # autocast inside of the model
                x = x.to(self.theta.dtype)
            call = Call(
                module,
                x,
                x._version if single else 0,
                get_gradient_edge(output) if ours else None,
                output.shape if ours else None,
            )
            self.calls.setdefault(name, []).append(call)

        return keep

    def backward(self, probe: Tensor, keep: bool) -> dict[str, list[Tensor]]:
        """Send one output probe back to the outputs of every kept call."""
        flat = [c for calls in self.calls.values() for c in calls]
        edges = [c.edge for c in flat if c.edge is not None]
        if not edges:
            return {name: [None] * len(calls) for name, calls in self.calls.items()}
        grads = iter(
            None if g is None else g.to(probe.dtype)
            for g in torch.autograd.grad(
                self.outputs, edges, probe, retain_graph=keep, allow_unused=True
            )
        )
        return {
            name: [None if c.edge is None else next(grads) for c in calls]
            for name, calls in self.calls.items()
        }

    def release(self) -> None:
        """Let go of the graph, once nothing more is sent back through it."""
        self.outputs, self._leaves = self.outputs.detach(), None
        for calls in self.calls.values():
            for call in calls:
                call.edge = None

    def exclude(self, name: str) -> None:
        """Let the parameters of one layer have no block."""
        self.once = self.once - {name}
        self.layers, self.rest = split_parameters(self.places, self.modules, self.once, self.bias)

    # -- held against autograd

    def verify(
        self, probe: Tensor, grads: dict[str, list[Tensor]], params: dict, by_example: bool
    ) -> None:
        r"""Compare what the formulas make of one probe with autograd's gradient of the same.

            sum_i c_i G_i  =  grad_theta sum_i c_i < s_i, outputs_i >,    G_i = sum of g a^T

        On a model, or a pattern of shapes, not seen before: with random c_i on the whole batch.
        After that nothing more where all of the model's code is known. Else a few examples alone,
        other ones at each call; where those differ, or the model cannot take them, the whole batch
        decides again. And if examples are to be told apart, the probe c_i s_i is sent back, which
        must give c_i g_i in every row.

        Afterwards ``layers`` holds linear maps whose blocks are right, and ``unlike`` names the
        parameters whose gradient does not go example by example with the batch's rows.

        Args:
            probe: s, like the outputs; its graph is still there.
            grads: What `backward` made of it.
            params: theta by name.
            by_example: Whether gradients example by example are wanted of it.

        Cost: nothing for known code; else a few examples, and half a gradient if ``by_example``; 1
        gradient (and the rest's gradients, example by example) where the whole batch is compared.
        """
        seen, key = verdicts_of(self.risk.model), self._key()
        with lock_of_modules():
            if key in seen:
                self._take(*seen[key])
            if key not in seen or not (self.known or self._some(probe, grads, params)):
                verdict = self._whole(probe, grads, params)
                seen.setdefault(key, verdict)
                self._take(*verdict)
            elif by_example and not self.known:
                self._separate(probe, grads)

    def settled(self) -> bool:
        """True if `verify` will compare nothing: known code, whose verdict is there."""
        return self.known and self._key() in verdicts_of(self.risk.model)

    def _separate(self, probe, grads) -> None:
        """Note the modules in whose calls a row is not an example, on this very batch."""
        c = self._weights_of_examples(probe)
        scaled = self.backward(probe * c.view(-1, *[1] * (probe.dim() - 1)), keep=True)
        sizes, apart, names = [], [], []
        for name, calls in self.calls.items():
            for call, g, made in zip(calls, grads[name], scaled[name], strict=True):
                if g is not None and not self._rows(call):
                    g = self._by_example(g) * c.view(-1, *[1] * g.dim())
                    sizes.append(made.norm())
                    apart.append((self._by_example(made) - g).norm())
                    names.append(name)
        if not names:
            return
        sizes, apart = torch.stack(sizes), torch.stack(apart)
        least = torch.finfo(self.theta.dtype).eps * sizes.max()
        bad = ~(apart <= tolerance(self.theta) * sizes + least)
        mixed = {name for name, b in zip(names, bad.tolist(), strict=True) if b}
        more = {
            name: UNLIKE
            for name, (_, where) in self.places.items()
            if any(owner in mixed for owner, _ in where)
        }
        self.unlike = {**more, **self.unlike}

    def _weights_of_examples(self, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.n)
        return torch.randn(self.n, generator=generator, device="cpu").to(like)

    def _key(self) -> tuple:
        return ("tape", self.bias, *self._pattern())

    def _pattern(self):
        """What a verdict rests on beside the model: the modules called, and the rows they took."""
        for name, calls in self.calls.items():
            for c in calls:
                shapes = tuple(
                    None if s is None else tuple(d == self.n for d in s) for s in c.shapes
                )
                yield name, shapes, self._rows(c) == ""
        yield self.theta.dtype, self.theta.device, *sorted(self.once), *self.names.values()

    def _take(self, without_block: frozenset, unlike: dict[str, str]) -> None:
        self.unlike = unlike
        if without_block:
            once = self.once - without_block
            self.layers, self.rest = split_parameters(self.places, self.modules, once, self.bias)

    def _whole(self, probe, grads, params) -> tuple[frozenset, dict[str, str]]:
        """The verdict of the whole batch: owners without a block, parameters without examples."""
        c = self._weights_of_examples(probe)
        truth = self._autograd(probe * c.view(-1, *[1] * (probe.dim() - 1)))
        unlike = self._differ(truth, grads, params, c)
        in_blocks = [layer for layer in self.layers if set(self.parameters_of(layer)) & set(unlike)]
        without = frozenset()
        if in_blocks:  # no examples, but perhaps a block: the sum over all rows is enough for that
            truth_all = self._autograd(probe)
            wrong = self._differ(truth_all, grads, params, None, in_blocks)
            without = frozenset(
                l.name for l in in_blocks if set(self.parameters_of(l)) & set(wrong)
            )
        if without:
            self._take(without, unlike)
            unlike = self._differ(truth, grads, params, c)
        return without, unlike

    def _autograd(self, probe: Tensor) -> dict[str, Tensor]:
        """Autograd's own gradient of every parameter, `_projected`."""
        return _gradients(self.outputs, self._leaves, probe)

    def _some(self, probe, grads, params) -> bool:
        """True if a few examples, passed through the model alone, have the gradients made here."""

        def agree(few, rows):
            with torch.enable_grad():
                outputs = self.risk.outputs(self._leaves, few)
            truth = _gradients(outputs, self._leaves, probe[rows])
            truth = {name: t for name, t in truth.items() if name not in self.unlike}
            return not self._differ(truth, grads, params, rows)

        return on_few(agree, self.batch, self.n)

    def _differ(self, truth, grads, params, c, layers=None) -> dict[str, str]:
        """Parameter -> why what the formulas make of it is not the truth, along one direction.

        ``truth``: from `_gradients`. ``c``: weights of all examples, or a list of rows, or None for
        the sum over all rows.
        """
        made: dict[str, Tensor | str] = {}
        for layer in self.layers if layers is None else layers:
            made |= self._of_block(layer, grads, c)
        if layers is None:
            for name in self.rest:
                if name in truth:
                    made[name] = self._of_rest(name, grads, params, c)
        names = [name for name in made if name in truth]
        differ = {name: made[name] for name in names if isinstance(made[name], str)}
        names = [name for name in names if name not in differ]
        if not names:
            return differ
        sizes = torch.stack([truth[name].norm() for name in names])
        apart = torch.stack([(made[name] - truth[name]).norm() for name in names])
        least = torch.finfo(self.theta.dtype).eps * sizes.max()
        bad = ~(apart <= tolerance(self.theta) * sizes + least)
        return differ | {name: UNLIKE for name, b in zip(names, bad.tolist(), strict=True) if b}

    def parameters_of(self, layer: Layer) -> list[str]:
        """Names of the parameters of one linear map."""
        return [
            name
            for name, (_, where) in self.places.items()
            if name not in self.rest and where[0][0] == layer.name
        ]

    def _of_block(self, layer: Layer, grads: dict, c) -> dict[str, Tensor | str]:
        """sum_i c_i g_i a_i^T for the weight and the bias of one linear map."""
        (call,), (g,) = self.calls[layer.name], grads[layer.name]
        names = self.parameters_of(layer)
        if g is None:
            return dict.fromkeys(names, self.outputs.new_zeros(()))
        if c is not None and (why := self._rows(call)):
            return dict.fromkeys(names, f"its module {layer.name!r} {why}")
        a = call.input
        if isinstance(c, list):
            a, g = (self._by_example(t)[c].flatten(0, 1) for t in (a, g))
        columns = output_columns(call.module, g)
        if isinstance(c, Tensor):
            columns = columns * c.repeat_interleave(columns.shape[1] // self.n)
        made = {}
        for name in names:
            if self.places[name][1][0][1] == "bias":
                made[name] = columns.sum(1)
            else:
                a_columns = _input_columns(call.module, a, False)
                made[name] = columns @ (a_columns.T @ _direction(len(a_columns), a))
        return made

    def _of_rest(self, name: str, grads: dict, params: dict, c) -> Tensor | str:
        """sum_i c_i G_i of a parameter without a block, from its gradients example by example."""
        total = torch.zeros_like(_projected(params[name]))
        for owner, local in self.rest[name][1]:
            for call, g in zip(self.calls.get(owner, ()), grads.get(owner, ()), strict=True):
                if not call.usable or len(call.input) != self.n or call.shape[0] != self.n:
                    return (
                        f"its module {owner!r} does not take and give one tensor with an example "
                        "a row"
                    )
                if g is None:
                    continue
                a = call.input
                if isinstance(c, list):
                    a, g = a[c], g[c]
                weight = c if torch.is_tensor(c) else g.new_ones(len(g))
                if kind_of(call.module) is nn.Embedding:
                    total = total + _embedding_sum(call.module, a, g, weight)
                    continue
                try:
                    per = _per_example(call.module, a, local, g, params, self.names)
                except RuntimeError as error:  # torch.func cannot take this module
                    said = " ".join(str(error).split())[:100]
                    return f"its module {owner!r} cannot be cut into examples ({said})"
                total = total + _projected(torch.tensordot(weight, per, 1))
        return total

    def _rows(self, call: Call) -> str:
        """Why a call cannot be cut into examples; "" if its first dimension may be."""
        if not call.usable:
            return "does not take and give one tensor"
        if not call.input.dim() or len(call.input) % self.n or call.shape[0] % self.n:
            return f"takes shape {tuple(call.input.shape)}, not the {self.n} examples a row"
        return ""

    def _by_example(self, t: Tensor) -> Tensor:
        return t.reshape(self.n, -1, *t.shape[1:])

    # -- J v

    def slopes_of(self, name: str, grads: dict, along: Callable[[Call], Tensor]) -> Tensor | float:
        """sum over one module's calls of g_i . (dz_i along v), shape (n,); `along` gives dz."""
        total = 0.0
        for call, g in zip(self.calls[name], grads[name], strict=True):
            if call.input._version != call.version:
                raise ValueError(_overwritten(name))
            if g is not None:
                with lock_of_modules():  # `along` calls the module with other parameters
                    change = along(call)
                total = total + (g * change).reshape(self.n, -1).sum(1)
        return total

    def input_columns(self, layer: Layer) -> Tensor:
        """The layer's inputs a, one column for each example and position, shape (d2, R).

        Raises:
            ValueError: if a was overwritten in place later in the forward pass.
        """
        (call,) = self.calls[layer.name]
        if call.input._version != call.version:
            raise ValueError(_overwritten(layer.name))
        return _input_columns(call.module, call.input, layer.joint)

    def places_of(self, layer: Layer) -> torch.Size:
        """What its columns run over: (n, positions ...), the output without d1."""
        (call,) = self.calls[layer.name]
        linear = isinstance(call.module, nn.Linear)
        return call.shape[:-1] if linear else call.shape[:1] + call.shape[2:]


def _gradients(outputs: Tensor, at: dict[str, Tensor], probe: Tensor) -> dict[str, Tensor]:
    """Gradient of < probe, outputs > in each leaf, `_projected`; zero where it has none.

    Each is projected as it arrives, so that no two layers' gradients are held at once.
    """
    made = {name: _projected(torch.zeros_like(leaf)) for name, leaf in at.items()}

    def keep(name: str, leaf: Tensor) -> None:
        made[name], leaf.grad = _projected(leaf.grad), None

    hooks = [
        leaf.register_post_accumulate_grad_hook(partial(keep, name)) for name, leaf in at.items()
    ]
    try:
        torch.autograd.backward(outputs, probe, retain_graph=True, inputs=list(at.values()))
    finally:
        for hook in hooks:
            hook.remove()
    return made


def _projected(t: Tensor) -> Tensor:
    """A gradient of shape (d1, ...) along one fixed direction of its other dimensions, (d1,)."""
    if t.dim() < 2:
        return t.reshape(-1)
    rows = t.reshape(len(t), -1)
    return rows @ _direction(rows.shape[1], t)


def _direction(size: int, like: Tensor) -> Tensor:
    return _directions(size, like.dtype, like.device)


@lru_cache(maxsize=256)
def _directions(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    draws = torch.Generator().manual_seed(size)
    normal = torch.randn(size, generator=draws, dtype=torch.float64, device="cpu")
    return normal.to(device, dtype)


def _overwritten(name: str) -> str:
    return (
        f"model: the input of layer {name!r} was changed in place after the layer had read it; use "
        "the operation that makes a copy"
    )


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
            what = "is in training mode" if module.training else "keeps no running statistics"
            effect = "makes its output random" if dropout else "mixes the examples of a batch"
            way = "call model.eval()" if module.training else "give it track_running_stats=True"
            raise ValueError(
                f"model: layer {name!r} ({type(module).__name__}) {what}, which {effect}, so there "
                f"is no curvature per example; {way}"
            )


def places_of(model: nn.Module) -> dict:
    """Name -> (slice in theta, the (module, attribute) pairs that own it), in theta's order."""
    where: dict[int, list] = {}
    with lock_of_modules():
        params = trainable(model)
        for prefix, module in model.named_modules():
            for local, p in module._parameters.items():
                if p is not None:
                    where.setdefault(id(p), []).append((prefix, local))
    places, start = {}, 0
    for name, p in params.items():
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


def kind_of(module: nn.Module) -> type | None:
    """The class whose formulas a module follows: its own, or that of which it changes nothing."""
    own = type(module)
    for cls, forward in KNOWN.items():
        if isinstance(module, cls):
            same = own.forward is forward and "forward" not in vars(module)
            same = same and getattr(own, "_conv_forward", 0) is getattr(cls, "_conv_forward", 0)
            plain = set(module._parameters) <= {"weight", "bias"} and not module._modules
            plain = plain and not (hasattr(own, "weight") or hasattr(own, "bias"))
            special = any(
                getattr(module, option, None) for option in ("sparse", "scale_grad_by_freq")
            )
            return cls if same and plain and not special else None
    return None


def _is_linear_map(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is nn.Linear or kind is nn.Conv2d and module.groups == 1


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
        columns[d].fill_(1)
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
    """Sum over examples of the squared per-example gradient, for a parameter without a block.

        sum_i G_i^2,    G_i summed over the calls in which the parameter is used

    Args:
        tape: The pass; it knows where the parameter is used.
        name: The parameter's, one of ``tape.rest``.
        grads: What `Tape.backward` returned for one probe.
        params: theta by name.

    Returns:
        Flat, as theta has it.

    Raises:
        ValueError: if the parameter's gradient does not go example by example with the batch.

    Cost: norms and embeddings as much as their own gradient; other modules one such gradient an
    example, held at once.
    """
    place, where = tape.rest[name]
    if name in tape.unlike:
        raise ValueError(
            f"model: parameter {name!r} has no Kronecker block, and {tape.unlike[name]}, so it has "
            "no diagonal block either; pass rest='damping' (damping alone) or rest='drop' (v = 0), "
            "or freeze it"
        )
    used = [
        (call, local, g)
        for owner, local in where
        for call, g in zip(tape.calls.get(owner, ()), grads.get(owner, ()), strict=True)
        if g is not None
    ]
    if not used:  # the outputs do not depend on it
        return params[name].new_zeros(place.stop - place.start)
    call, _, g = used[0]
    if kind_of(call.module) is nn.Embedding and len(used) == 1:
        return _embedding_squares(call.module, call.input, g)
    with lock_of_modules():
        summed = sum(_per_example(c.module, c.input, k, g, params, tape.names) for c, k, g in used)
    return summed.square().sum(0).reshape(-1)


def _per_example(
    module: nn.Module, a: Tensor, local: str, g: Tensor, params: dict, names: dict
) -> Tensor:
    """Gradient of each example in one parameter of one call, shape (n, *parameter shape)."""
    own = _named(module, params, names)
    if kind_of(module) in NORMS and len(own) == 2:  # y = weight xhat + bias
        if local == "weight":  # xhat is the layer with unit weight
            unit = {"weight": torch.ones_like(own["weight"]), "bias": torch.zeros_like(own["bias"])}
            g = g * functional_call(module, unit, (a,))
        if isinstance(module, nn.LayerNorm):
            return g.reshape(len(g), -1, *module.normalized_shape).sum(1)
        return g.reshape(*g.shape[:2], -1).sum(2)

    def one(a_i, g_i):
        def run(p):
            return predict(module, {**own, local: p}, a_i[None])

        return vjp(run, own[local])[1](g_i[None])[0]

    return vmap(one)(a, g)


def _named(module: nn.Module, values: dict, names: dict) -> dict[str, Tensor]:
    """What theta (or a direction) holds for the parameters of a module and of its children."""
    return {k: values[names[id(p)]] for k, p in module.named_parameters() if id(p) in names}


def along(call: Call, params: dict[str, Tensor]) -> Tensor:
    """Derivative of a call's output along a direction of the module's own parameters.

    Every kind of module that is known is linear in its parameters: its derivative is the module
    itself with the direction as parameters, those not in ``params`` zero.
    """
    module = call.module
    zeros = {k: torch.zeros_like(p) for k, p in module._parameters.items() if p is not None}
    if getattr(module, "padding_idx", None) is not None:  # that row is not trained
        weight = params["weight"].clone()
        weight[module.padding_idx].zero_()
        params = {"weight": weight}
    return functional_call(module, {**zeros, **params}, (call.input,))


def _embedding_sum(module: nn.Embedding, index: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """sum_i c_i G_i of an embedding along one direction, shape (num_embeddings,)."""
    along = g @ _direction(g.shape[-1], g) * c.view(-1, *[1] * (g.dim() - 2))
    out = g.new_zeros(module.num_embeddings).index_add_(0, index.reshape(-1), along.reshape(-1))
    if module.padding_idx is not None:
        out[module.padding_idx].zero_()
    return out


def _embedding_squares(module: nn.Embedding, index: Tensor, g: Tensor) -> Tensor:
    """Squared per-example gradients of an embedding: sum a token's positions, square, sum."""
    rows = module.num_embeddings
    positions = index.reshape(len(index), -1)
    key = torch.arange(len(index), device=index.device)[:, None] * rows + positions
    key, order = key.flatten().sort(stable=True)
    # a place for each pair of example and token, as many as there may be: how many there are would
    # have to be waited for
    place = F.pad((key[1:] != key[:-1]).cumsum(0), (1, 0))[: len(key)]
    summed = g.new_zeros(len(key), g.shape[-1])
    summed.index_add_(0, place, g.reshape(-1, g.shape[-1])[order])
    token = torch.zeros_like(key).scatter_(0, place, key % rows)
    out = g.new_zeros(rows, g.shape[-1]).index_add_(0, token, summed.square())
    if module.padding_idx is not None:
        out[module.padding_idx].zero_()
    return out.reshape(-1)
