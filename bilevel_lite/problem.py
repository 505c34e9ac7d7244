"""The bilevel problem, and the checks that every loss value passes.

A problem is two functions of (lam, theta, batch). A batch is whatever they take; for supervised
tasks it is a tuple (x, y, index), where ``index`` holds the examples' positions in the training
set: that is how a weight finds its entry of lam.
"""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

__all__ = ["BilevelProblem", "Loss", "NotFinite", "evaluate"]

Loss = Callable[[Tensor, Tensor, Any], Tensor]

_every_look: ContextVar[bool] = ContextVar("every_look", default=False)


@contextmanager
def every_look():
    """Check intermediate values on a GPU too, where each check waits for the device."""
    token = _every_look.set(True)
    try:
        yield
    finally:
        _every_look.reset(token)


def looked_at(value: Tensor) -> bool:
    """True where intermediate values are checked: on a CPU, and within `every_look`."""
    return value.device.type == "cpu" or _every_look.get()


class NotFinite(ValueError):
    """A loss or a derivative came out as NaN or infinite."""


class BilevelProblem:
    """min over lam of f(lam, theta*(lam)), theta*(lam) = argmin over theta of g(lam, theta).

    Args:
        inner_loss: g, called as ``inner_loss(lam, theta, batch)``; returns a scalar tensor.
        outer_loss: f, called the same way.

    Raises:
        TypeError: if one of the two cannot be called.
    """

    def __init__(self, inner_loss: Loss, outer_loss: Loss):
        for name, loss in (("inner_loss", inner_loss), ("outer_loss", outer_loss)):
            if not callable(loss):
                raise TypeError(
                    f"{name}: got {type(loss).__name__}, expected a function "
                    "(lam, theta, batch) -> scalar"
                )
        self.inner_loss = inner_loss
        self.outer_loss = outer_loss


def evaluate(loss: Loss, lam: Tensor, theta: Tensor, batch: Any, name: str = "loss") -> Tensor:
    """Call ``loss(lam, theta, batch)`` and refuse anything but one finite number.

    Args:
        loss: The function to call.
        lam: Outer variable.
        theta: Inner variable, usually flat, shape (d,).
        batch: Whatever ``loss`` takes.
        name: What error messages call the function.

    Returns:
        Scalar tensor, shape ().

    Raises:
        ValueError: if the value is not a scalar tensor, or (on a CPU) not finite. On a GPU the
            finiteness check would stall the device; there `hypergradient` checks its result, and
            a method's step its losses and variables.
    """
    value = loss(lam, theta, batch)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: returned {type(value).__name__}, expected a scalar tensor")
    if value.dim() != 0:
        raise ValueError(
            f"{name}: returned shape {tuple(value.shape)}, expected a scalar, shape (); "
            "did you forget .mean() or .sum()?"
        )
    if looked_at(value) and not torch.isfinite(value):
        raise NotFinite(f"{name}: value is {value.item()}; {_culprit(lam, theta, batch)}")
    return value


def require_variable(name: str, value: Tensor) -> None:
    """Refuse a lam or theta that cannot be differentiated.

    Raises:
        TypeError: if ``value`` is not a floating-point tensor.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected a floating-point tensor")


def relative_size(batch: Any, unit: Any) -> float:
    """Number of examples in ``batch`` over that in ``unit``; 1 where batches are not (x, y, ...).

    Costs are counted in gradients on the inner batch, so work on a batch twice as large counts
    twice.
    """
    sizes = [
        len(b[0])
        if isinstance(b, tuple | list) and b and isinstance(b[0], Tensor) and b[0].dim()
        else None
        for b in (batch, unit)
    ]
    if sizes[1] == 0:
        raise ValueError("inner_batch: holds no examples")
    return 1.0 if None in sizes else sizes[0] / sizes[1]


def _culprit(lam, theta, batch) -> str:
    """Say which input of a loss holds NaN or infinity; looked at only once a value is bad."""
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    named = [("lam", lam), ("theta", theta)] + [(f"batch[{i}]", p) for i, p in enumerate(parts)]
    for name, tensor in named:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                return f"{name} has {bad} entries that are NaN or infinite"
    return "lam, theta and batch are finite, so the loss itself overflowed (a step size too large?)"


def check_labels(y: Tensor, num_classes: int) -> None:
    """Refuse labels outside 0..num_classes-1.

    Raises:
        ValueError: naming the offending label.
    """
    low, high = torch.aminmax(y)
    if low < 0 or high >= num_classes:
        bad = int(low) if low < 0 else int(high)
        raise ValueError(f"labels: found {bad}, expected integers from 0 to {num_classes - 1}")
