"""What is refused, each with one sentence: what came, what was expected, and the way out.

Options say their own range (`bilevel_lite.options`); here is every other guard that more than one
module needs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import partial
from inspect import isclass, ismodule, isroutine
from numbers import Integral, Real
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = [
    "NotFinite",
    "Unseen",
    "at_least",
    "attributes",
    "check_labels",
    "every_look",
    "every_look_on",
    "looked_at",
    "recording",
    "require_as_drawn",
    "require_batch",
    "require_finite",
    "require_fraction",
    "require_function",
    "require_generator",
    "require_like",
    "require_number",
    "require_problem",
    "require_scalar",
    "require_state",
    "require_unwritten",
    "require_variable",
    "switched_on",
    "versions",
    "while_recording",
]

_every_look: ContextVar[bool] = ContextVar("every_look", default=False)
_recording: ContextVar[bool] = ContextVar("recording", default=False)


@contextmanager
def switched_on(flag: ContextVar[bool]) -> Iterator[None]:
    """A flag of this thread, True inside."""
    token = flag.set(True)
    try:
        yield
    finally:
        flag.reset(token)


def every_look():
    """Check intermediate values on a GPU too, where each check waits for the device."""
    return switched_on(_every_look)


def while_recording():
    """Check no intermediate value: what is recorded cannot wait (`bilevel_lite.recorded`)."""
    return switched_on(_recording)


def every_look_on() -> bool:
    """True within `every_look`."""
    return _every_look.get()


def recording() -> bool:
    """True within `while_recording`."""
    return _recording.get()


def looked_at(value: Tensor) -> bool:
    """True where intermediate values are checked: on a CPU, and within `every_look`."""
    return not _recording.get() and (value.device.type == "cpu" or _every_look.get())


class Unseen(TypeError):
    """A loss whose model, likelihood and weights cannot be seen, where they must be."""


class NotFinite(ValueError):
    """A loss or a derivative came out as NaN or infinite."""


def require_finite(named: dict[str, Tensor], why: Callable[[], str] = str) -> None:
    """Refuse tensors with NaN or infinity in them; one look for all.

    Args:
        named: Name -> tensor.
        why: What to add to the sentence, made only if there is one.

    Raises:
        NotFinite: naming the first that is bad.
    """
    counts = torch.stack([(~torch.isfinite(value)).sum() for value in named.values()])
    for (name, value), bad in zip(named.items(), counts.tolist(), strict=True):
        if bad:
            raise NotFinite(f"{name}: {bad} of {value.numel()} entries are NaN or infinite{why()}")


def require_problem(problem: Any) -> None:
    """Refuse what is no bilevel problem, and an outer loss whose gradient is not of its value.

    Raises:
        TypeError: naming the argument.
        ValueError: if the weights of ``outer_loss`` read its losses, see `WeightedRisk`.
    """
    if not (hasattr(problem, "inner_loss") and hasattr(problem, "outer_loss")):
        raise TypeError(
            f"problem: got {type(problem).__name__}, expected a bilevel_lite.BilevelProblem"
        )
    for risk in getattr(problem.outer_loss, "risks", [problem.outer_loss]):
        if getattr(risk, "reads_losses", False) is True:
            raise ValueError(
                "outer_loss: its weights read the losses, which come detached, so that its "
                "gradient is not that of its value; write it as a function of (lam, theta, batch)"
            )


def require_variable(name: str, value: Tensor) -> None:
    """Refuse a lam or theta that cannot be differentiated.

    Raises:
        TypeError: if ``value`` is not a dense floating-point tensor.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected a floating-point tensor")
    if value.layout != torch.strided or value.is_nested or value.is_meta:
        got = "a meta tensor" if value.is_meta else f"layout {value.layout}"
        raise TypeError(f"{name}: got {got}, expected a dense tensor of numbers")


def require_like(name: str, value: Any, like: Tensor) -> None:
    """Refuse what stands for ``like`` and has another shape.

    Raises:
        TypeError: if ``value`` is not a floating-point tensor.
        ValueError: naming both shapes.
    """
    require_variable(name, value)
    if value.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(like.shape)}")


def require_generator(generator: Any) -> None:
    """Refuse a seed, or nothing, where a generator belongs.

    Raises:
        TypeError: naming the way out.
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: got {generator!r}, expected a torch.Generator; for a seed say "
            "torch.Generator().manual_seed(0)"
        )


def require_scalar(name: str, value: Any) -> None:
    """Refuse a loss that is no number that can be differentiated.

    Raises:
        ValueError: naming the loss and what it returned.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: returned {type(value).__name__}, expected a scalar tensor")
    if value.dim() != 0:
        raise ValueError(
            f"{name}: returned shape {tuple(value.shape)}, expected a scalar, shape (); "
            "did you forget .mean() or .sum()?"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name}: returned {value.dtype}, expected a real floating-point number")


def require_state(state: Any, *keys: str) -> None:
    """Refuse what no ``state_dict`` returned, before any of it is taken.

    Raises:
        ValueError: naming the first key that is missing.
    """
    if not isinstance(state, dict):
        got = type(state).__name__
        raise ValueError(f"state: got {got}, expected the dict that state_dict() returned")
    for key in keys:
        if key not in state:
            raise ValueError(f"state: has no {key!r}, expected all that state_dict() returned")


def versions(value: Any, contents: bool = False, nested: int = 2) -> Any:
    """How often each tensor was written into, in a tuple, list, mapping or dataclass too.

    Torch's own count. It does not count what is written through ``.data``, which nobody sees; nor
    for tensors of ``inference_mode``, nor what NumPy writes:
    with ``contents`` there is a checksum of such, and objects are entered by their attributes.

    Cost: nothing; of a checksum a pass over the bytes.
    """
    if isinstance(value, Tensor):
        count = 0 if value.is_inference() else value._version
        return (count, _checksum(value)) if contents and _uncounted(value) else count
    if is_dataclass(value) and not isclass(value):
        parts, nested = [getattr(value, f.name, None) for f in fields(value)], nested - 1
    elif isinstance(value, Mapping):
        parts = [*value.values()]
    elif isinstance(value, tuple | list):
        parts = value
    elif not contents or isinstance(value, int | float | complex | str):
        return value if contents else 0
    elif found := _checksum(value):
        return found
    else:
        parts, nested = [*(attributes(value) or {}).values()], nested - 1
    return [versions(part, contents, nested) for part in parts] if nested >= 0 else 0


def attributes(value: Any) -> dict[str, Any] | None:
    """What an object holds, by name, in its ``__dict__`` or slots; None if it has no such place.

    Classes, functions and modules are not looked into.
    """
    if isclass(value) or isroutine(value) or ismodule(value):
        return None
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = {name for own in slots for name in ([own] if isinstance(own, str) else own)}
    names -= {"__dict__", "__weakref__"}
    if not (names or hasattr(value, "__dict__")):
        return None
    held = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**held, **getattr(value, "__dict__", {})}


def _uncounted(value: Tensor) -> bool:
    """True where something is written that torch does not count: memory that is not its own."""
    if value.device.type != "cpu" or value.layout != torch.strided:
        return False
    return value.is_inference() or not value.untyped_storage().resizable()


def _checksum(value: Any) -> int:
    """Of the bytes of an array or a tensor; 0 for what has none."""
    with suppress(TypeError, ValueError, BufferError):
        if isinstance(value, Tensor):
            value = value.detach().resolve_conj().reshape(-1).view(torch.uint8).numpy()
        return crc32(memoryview(value).tobytes())
    return 0


def require_as_drawn(name: str, batch: Any, before: Any) -> None:
    """Refuse a batch that was written into since ``before = versions(batch, contents=True)``.

    Raises:
        ValueError: naming the argument and the way out.
    """
    if versions(batch, contents=True) != before:
        raise ValueError(
            f"{name}: a batch was changed in place after it was drawn, but it is needed again; "
            "draw new tensors each time"
        )


def require_unwritten(name: str, before: list, after: list) -> None:
    """Refuse a loss or a model that wrote into what it was given.

    Args:
        name: What messages call the loss or the model.
        before: `versions` of (lam, theta) or of (lam, theta, batch); None for what is not there.
        after: The same, afterwards.

    Raises:
        ValueError: naming it, what it wrote into, and the way out.
    """
    if after == before:
        return
    if before[:2] == after[:2]:
        raise ValueError(
            f"{name}: writes into its batch, so the next evaluation is one of other data (an "
            "activation with inplace=True as the first layer does); use inplace=False"
        )
    variable = "lam" if before[0] != after[0] else "theta"
    raise ValueError(
        f"{name}: changes {variable} in place, so it is no function of it (an embedding with "
        "max_norm does: give max_norm=None, or project after each step)"
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
        ValueError: for a tensor in it that requires a gradient.
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
    require_constant(name, batch)
    if hasattr(loss, "require_batch"):
        loss.require_batch(batch, name)


def require_constant(name: str, batch: Any) -> None:
    """Refuse a batch that is made of something that asks for a gradient: of lam, perhaps.

    Raises:
        ValueError: naming the argument.
    """
    if any(t.requires_grad for t in tensors(batch)):
        raise ValueError(
            f"{name}: holds a tensor that requires a gradient; what it is made of is no part of "
            "the derivative. Detach it, or let the loss make it of lam (WeightedRisk(inputs=...))"
        )


def tensors(batch: Any, nested: int = 2) -> Iterator[Tensor]:
    """The tensors of a batch: itself, or those that it holds, one in another.

    Tuples, lists and dicts are entered; dataclasses and other objects, too, ``nested`` deep.
    """
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, tuple | list | Mapping):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors(part, nested)
    elif nested and not isinstance(batch, nn.Module):
        if is_dataclass(batch) and not isclass(batch):
            parts = [getattr(batch, field.name, None) for field in fields(batch)]
        else:
            parts = [*(attributes(batch) or {}).values()]
        for part in parts:
            yield from tensors(part, nested - 1)


def check_labels(y: Tensor, num_classes: int) -> None:
    """Refuse labels that are no integers, or outside 0..num_classes-1.

    Raises:
        TypeError: if ``y`` is no tensor of integers.
        ValueError: naming the offending label.
    """
    tensor = isinstance(y, Tensor)
    if not tensor or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        got = y.dtype if tensor else type(y).__name__
        raise TypeError(
            f"labels: got {got}, expected a tensor of integers from 0 to {num_classes - 1}"
        )
    low, high = torch.aminmax(y)
    if low < 0 or high >= num_classes:
        bad = int(low) if low < 0 else int(high)
        raise ValueError(f"labels: found {bad}, expected integers from 0 to {num_classes - 1}")


def require_number(name: str, value: Any, positive: bool = False, way_out: str = "") -> None:
    """Refuse what is no finite number that is zero or positive; with ``positive`` zero, too.

    Raises:
        ValueError: naming the argument.
    """
    number = isinstance(value, Real | Tensor) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf or (positive and value == 0):
        expected = "a positive number" if positive else "a number that is zero or positive"
        raise ValueError(f"{name}: got {value!r}, expected {expected}{way_out}")


def require_fraction(name: str, value: Any, most: float = 1.0) -> None:
    """Refuse what is no number from 0 to ``most``.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{name}: got {value!r}, expected a number from 0 to {most:g}")


def require_function(name: str, value: Any, form: str) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: naming the argument, and the form of the function that was expected.
    """
    if not callable(value):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a function {form}")


def at_least(name: str, value: int, least: int) -> None:
    """Refuse what is no integer of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")
