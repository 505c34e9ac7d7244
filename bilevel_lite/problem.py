"""The bilevel problem, and the checks that every loss value passes.

A problem is two functions of (lam, theta, batch). A batch is whatever they take; for supervised
tasks it is a tuple (x, y, index), where ``index`` holds the examples' positions in the training
set: that is how a weight finds its entry of lam.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from inspect import isclass, isroutine
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bilevel_lite.surroundings import nothing_again

__all__ = ["BilevelProblem", "Loss", "NotFinite", "evaluate", "examples"]

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
        ValueError: if the value is not a scalar tensor, if the loss writes into lam or theta, or
            (on a CPU) if the value is not finite. On a GPU the finiteness check would stall the
            device; there `hypergradient` checks its result, and a method's step its losses and
            variables.
        TypeError: if the loss needs a batch and there is none.
    """
    before = versions((lam, theta))
    try:
        with nothing_again(name):
            value = loss(lam, theta, batch)
    except (TypeError, RuntimeError) as error:
        require_unwritten(name, before, versions((lam, theta)))
        if batch is None and "NoneType" in str(error):
            raise TypeError(f"batch: got None, but {name} needs a batch ({error})") from error
        raise
    require_unwritten(name, before, versions((lam, theta)))
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


def versions(value: Any) -> Any:
    """How often each tensor was written into, in a tuple, list or dict too; torch's own count.

    It does not count for tensors of ``inference_mode``, nor what NumPy writes.
    """
    if isinstance(value, Tensor):
        return 0 if value.is_inference() else value._version
    if isinstance(value, dict):
        value = list(value.values())
    return [versions(part) for part in value] if isinstance(value, tuple | list) else None


def require_as_drawn(name: str, batch: Any, before: Any) -> None:
    """Refuse a batch that was written into since ``before = versions(batch)``.

    Raises:
        ValueError: naming the argument and the way out.
    """
    if versions(batch) != before:
        raise ValueError(
            f"{name}: a batch was changed in place after it was drawn, but it is needed again; "
            "draw new tensors each time"
        )


def require_unwritten(name: str, before: list[int], after: list[int]) -> None:
    """Refuse a loss that wrote into lam or theta: their `versions` before and after.

    Raises:
        ValueError: naming the loss, the variable and the way out.
    """
    for variable, was, now in zip(("lam", "theta"), before, after, strict=True):
        if was != now:
            raise ValueError(
                f"{name}: changes {variable} in place, so it is no function of it (an embedding "
                "with max_norm does: give max_norm=None, or project after each step)"
            )


def require_problem(problem: Any) -> None:
    """Refuse what is no bilevel problem.

    Raises:
        TypeError: naming the argument.
    """
    if not (hasattr(problem, "inner_loss") and hasattr(problem, "outer_loss")):
        raise TypeError(
            f"problem: got {type(problem).__name__}, expected a bilevel_lite.BilevelProblem"
        )


_NOT_A_BATCH = (
    (DataLoader, "its batches are next(iter(loader)) and so on"),
    (Dataset, "put its tensors into a tuple"),
    (Iterator, "it can be read only once: take a batch from it, next(iterator)"),
    (str | bytes, "load the data first, bilevel_lite.data.load"),
)


def require_batch(name: str, batch: Any, loss: Any = None, sampler: bool = False) -> None:
    """Refuse what is no batch, before a loss stumbles over it.

    A batch is whatever the losses take, but it is evaluated more than once, so it cannot be
    something that is used up; a `WeightedRisk` needs a tuple (x, y, ...).

    Args:
        name: What the message calls it.
        batch: The batch, or with ``sampler`` something that draws batches.
        loss: The loss that will take it.
        sampler: Whether a sampler may be given.

    Raises:
        TypeError: naming the argument, what came, what was expected and the way out.
    """
    draws = callable(getattr(batch, "draw", None)) and not isclass(batch)
    if sampler and draws:
        return
    reasons = [hint for kind, hint in _NOT_A_BATCH if isinstance(batch, kind)]
    if draws:
        reasons = ["it is a sampler: give a batch of it, sampler.draw()"]
    if isroutine(batch) or isclass(batch) or isinstance(batch, partial):
        reasons = ["call it first"]
    if reasons:
        or_sampler = " or a sampler with draw(), such as bilevel_lite.data.Batches" * sampler
        got = type(batch).__name__
        raise TypeError(
            f"{name}: got {got}, expected a batch such as (x, y, index){or_sampler}; {reasons[0]}"
        )
    if hasattr(loss, "require_batch"):
        loss.require_batch(batch, name)


def examples(batch: Any) -> int | None:
    """Number of examples: rows of the first tensor of a tuple, list or dict; None for others."""
    parts = list(batch.values()) if isinstance(batch, dict) else batch
    if not isinstance(parts, tuple | list) or not parts:
        return None
    first = parts[0]
    return len(first) if isinstance(first, Tensor) and first.dim() else None


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


def check_labels(y: Tensor, num_classes: int) -> None:
    """Refuse labels outside 0..num_classes-1.

    Raises:
        ValueError: naming the offending label.
    """
    low, high = torch.aminmax(y)
    if low < 0 or high >= num_classes:
        bad = int(low) if low < 0 else int(high)
        raise ValueError(f"labels: found {bad}, expected integers from 0 to {num_classes - 1}")
