"""A module's parameters as one vector.

Everywhere in the package theta is a flat tensor, as in the equations. A module is only a way to
read that vector: `unflatten` cuts it into named views with a single `split` (the backward of one
split is one concatenation; the backward of a slice per layer would write a full-size zero tensor
for each layer).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel_lite.purity import pure
from bilevel_lite.same_function import note, stand_in
from bilevel_lite.surroundings import lock_of_modules, nothing_again


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that theta holds: those that require a gradient, tied ones once.

    One without entries is left out.

    Args:
        model: Any module. Freeze a layer with ``requires_grad_(False)`` to keep it out of theta.

    Returns:
        Name to parameter, in the module's own order.

    Raises:
        TypeError: if it is no module.
        ValueError: if no parameter requires a gradient, or one has no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    with lock_of_modules():  # another thread may have swapped the parameters for a call
        for name, p in model.named_parameters():
            if nn.parameter.is_lazy(p):
                raise ValueError(
                    f"model: parameter {name!r} of a lazy module has no shape yet; call the module "
                    "once on an example first"
                )
        params = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    if not params:
        raise ValueError(
            f"model: {type(model).__name__} has no parameter with requires_grad=True, "
            "so theta would be empty"
        )
    return params


def flatten(model: nn.Module) -> Tensor:
    """Copy the module's trainable parameters into one detached vector theta, shape (d,).

    Raises:
        ValueError: if no parameter requires a gradient, or if two share memory (a training would
            move both at once, theta would not).

    Example:
        >>> bl.flatten(torch.nn.Linear(3, 2)).shape
        torch.Size([8])
    """
    params = trainable(model)
    _require_apart(params)
    return torch.cat([p.detach().reshape(-1) for p in params.values()])


def _require_apart(params: dict[str, nn.Parameter]) -> None:
    """Refuse two parameters that share an entry in memory: one is a view of the other."""
    spans: dict[int, list[tuple[str, Tensor]]] = {}
    for name, p in params.items():
        spans.setdefault(p.untyped_storage().data_ptr(), []).append((name, p))
    for there in spans.values():
        if len(there) == 1:
            continue
        size = there[0][1].untyped_storage().nbytes() // there[0][1].element_size()
        held = torch.full((size,), -1)  # by which of them, an entry of the storage
        for k, (name, p) in enumerate(there):
            mine = torch.arange(size).as_strided(p.shape, p.stride(), p.storage_offset()).flatten()
            if (other := int(held[mine].max())) >= 0:
                raise ValueError(
                    f"model: parameters {there[other][0]!r} and {name!r} share their memory, so a "
                    "training moves both at once, but theta would hold them twice; make them one "
                    "parameter (b.weight = a.weight), or compute one from the other in forward"
                )
            held[mine] = k


def unflatten(model: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    """Read theta as the module's parameters; the inverse of `flatten`, without copying.

    Args:
        model: The module whose shapes are used; its own parameters are not touched.
        theta: Flat vector, shape (d,).

    Returns:
        Name to view of ``theta`` with the parameter's shape; gradients flow back to ``theta``.

    Raises:
        TypeError: if ``model`` is no module, or ``theta`` no tensor.
        ValueError: if ``theta`` does not have exactly as many entries as the module.

    Example:
        >>> named = bl.unflatten(torch.nn.Linear(3, 2), torch.arange(8.0))
        >>> named["weight"].shape, named["bias"]
        (torch.Size([2, 3]), tensor([6., 7.]))
    """
    params = trainable(model)
    sizes = [p.numel() for p in params.values()]
    if not isinstance(theta, Tensor):
        raise TypeError(
            f"theta: got {type(theta).__name__}, expected a tensor of shape ({sum(sizes)},)"
        )
    if theta.shape != (sum(sizes),):
        raise ValueError(
            f"theta: got shape {tuple(theta.shape)}, expected ({sum(sizes)},), "
            f"the trainable parameters of {type(model).__name__}"
        )
    if theta.requires_grad:
        stand_in(model)
    chunks = theta.split(sizes)
    return {
        name: chunk.view(p.shape) for (name, p), chunk in zip(params.items(), chunks, strict=True)
    }


def leaves(model: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    """`unflatten`, each part a leaf: gradients arrive layer by layer and are never put together."""
    return {k: t.detach().requires_grad_() for k, t in unflatten(model, theta.detach()).items()}


def predict(model: nn.Module, theta: Tensor | dict[str, Tensor], *inputs: Tensor) -> Tensor:
    """Evaluate ``model(*inputs)`` with the parameters in ``theta``, shape (d,), or by name.

    Raises:
        TypeError: as `unflatten`, or if the model is scripted or traced.
        ValueError: if theta does not fit the model, or the model is seen to compute from something
            else, too (see `bilevel_lite.purity`).

    Example:
        >>> from bilevel_lite.params import predict
        >>> predict(torch.nn.Linear(2, 1), torch.tensor([1.0, 2.0, 0.5]), torch.eye(2))
        tensor([[1.5000],
                [2.5000]])
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model: is a scripted or traced module, for whose parameters no theta can stand in; "
            "give the module that it was made of"
        )
    named = theta if isinstance(theta, dict) else unflatten(model, theta)
    note(model)

    def evaluate(at: dict[str, Tensor], given: tuple = inputs) -> Any:
        return functional_call(model, places_for(model, at), given, tie_weights=False)

    with lock_of_modules(), nothing_again("model"):
        return pure(model, evaluate, named, inputs)


def places_for(model: nn.Module, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """``named`` with every place where a module holds one of these parameters, each place once.

    Tied weights have several places. A module that stands in two places of a model has one; torch
    would name it twice (``tie_weights=True``) and, restoring it twice, leave what it was given.
    """
    values = {id(p): named[name] for name, p in model.named_parameters() if name in named}
    return {
        f"{prefix}.{local}" if prefix else local: values[id(p)]
        for prefix, module in model.named_modules()
        for local, p in module._parameters.items()
        if id(p) in values
    }


def norm_of(t: Tensor) -> float:
    """||t||, in double precision: the squares of small numbers are zero in float32."""
    return float(t.double().norm())


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two tensors of the same shape, also of scalars; a tensor of shape ()."""
    return torch.dot(a.reshape(-1), b.reshape(-1))
