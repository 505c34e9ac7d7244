"""The bilevel problem, and the checks that every loss value passes.

A problem is two functions of (lam, theta, batch). A batch is whatever they take; for supervised
tasks it is a tuple (x, y, index), where ``index`` holds the examples' positions in the training
set: that is how a weight finds its entry of lam.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.refuse import (
    NotFinite,
    looked_at,
    require_scalar,
    require_unwritten,
    tensors,
    versions,
)
from bilevel_lite.surroundings import nothing_again

__all__ = ["BilevelProblem", "Loss", "NotFinite", "Portion", "evaluate", "examples", "tensors"]

Loss = Callable[[Tensor, Tensor, Any], Tensor]


class BilevelProblem:
    """min over lam of f(lam, theta*(lam)), theta*(lam) = argmin over theta of g(lam, theta).

    Args:
        inner_loss: g, called as ``inner_loss(lam, theta, batch)``; returns a scalar tensor.
        outer_loss: f, called the same way.

    Raises:
        TypeError: if one of the two cannot be called.

    Example:
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: ((theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> problem.outer_loss(None, torch.zeros(2), None)
        tensor(2.)
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
        ValueError: if the value is not a scalar tensor, if the loss writes into lam, theta or the
            batch, or (on a CPU) if the value is not finite. On a GPU the finiteness check would
            stall the device; there `hypergradient` checks its result, and a method's step its
            losses and variables.
        TypeError: if the loss needs a batch and there is none.
    """
    before = versions((lam, theta, batch))
    try:
        with nothing_again(name):
            value = loss(lam, theta, batch)
    except (TypeError, RuntimeError) as error:
        require_unwritten(name, before, versions((lam, theta, batch)))
        if batch is None and "NoneType" in str(error):
            raise TypeError(f"batch: got None, but {name} needs a batch ({error})") from error
        raise
    require_unwritten(name, before, versions((lam, theta, batch)))
    require_scalar(name, value)
    if looked_at(value) and not torch.isfinite(value):
        raise NotFinite(f"{name}: value is {value.item()}; {_culprit(lam, theta, batch)}")
    return value


class Portion(tuple):
    """A batch of which only some rows are here (`bilevel_lite.parallel.shard`).

    Attributes:
        whole: How many there are in all; costs are counted by these.
    """

    whole: int


def examples(batch: Any) -> int | None:
    """Number of examples: rows of the first of the `tensors`; None if it has none.

    Of several batches, those of a sum of risks, the first counts.
    """
    if isinstance(batch, Portion):
        return batch.whole
    first = next(tensors(batch), None)
    return len(first) if first is not None and first.dim() else None


def relative_size(batch: Any, unit: Any) -> float:
    """Number of examples in ``batch`` over that in ``unit``; 1 where one of them has no rows.

    Costs are counted in gradients on the inner batch, so work on a batch twice as large counts
    twice.
    """
    sizes = [examples(batch), examples(unit)]
    if sizes[1] == 0:
        raise ValueError("inner_batch: holds no examples")
    return 1.0 if None in sizes else sizes[0] / sizes[1]


def _culprit(lam, theta, batch) -> str:
    """Say which input of a loss holds NaN or infinity; looked at only once a value is bad."""
    parts = batch if isinstance(batch, tuple | list | dict) else (batch,)
    items = parts.items() if isinstance(parts, dict) else enumerate(parts)
    named = [("lam", lam), ("theta", theta)] + [(f"batch[{i!r}]", p) for i, p in items]
    if examples(batch) == 0:
        return "the batch holds no examples"
    for name, tensor in named:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                return f"{name} has {bad} entries that are NaN or infinite"
    return "lam, theta and batch are finite, so the loss itself overflowed (a step size too large?)"
