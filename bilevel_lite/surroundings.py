"""What torch keeps for a whole process or a whole model, set right while we differentiate.

Gradients may be switched off where a hypergradient is asked for, attention may run in a kernel
without second derivatives, forward mode has one level for all threads, a functional call swaps the
parameters of a module that another thread uses, a model may draw random numbers. Each of these has
its one place here; what no setting cures is refused in a sentence that names the way out.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "SameDraws",
    "differentiating",
    "forward_level",
    "lock_of",
    "ordinary",
    "plain_attention",
    "random_state",
    "restore_random_state",
    "same_twice",
    "uncompiled",
    "way_out",
]


def differentiating(function: Callable) -> Callable:
    """Let a function compute with gradients on, also under ``no_grad`` and ``inference_mode``."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return wrapped


def ordinary(value: Any) -> Any:
    """Copy tensors made under ``inference_mode``, in a tuple, list or dict too; all else as it is.

    Call it where that mode is off: a copy made within it would be of the same kind.
    """
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        parts = {key: ordinary(part) for key, part in value.items()}
        same = all(parts[key] is part for key, part in value.items())
        return value if same else parts
    if isinstance(value, tuple | list):
        parts = [ordinary(part) for part in value]
        if all(part is before for part, before in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


# ------------------------------------------------------------------ threads

_forward = threading.RLock()
_guard = threading.Lock()
_locks: WeakKeyDictionary = WeakKeyDictionary()


@contextmanager
def forward_level() -> Iterator[None]:
    """Torch's one level of forward-mode differentiation: one thread at a time."""
    with _forward, fwad.dual_level():
        yield


def lock_of(model: nn.Module) -> Any:
    """The lock under which a module is called with other parameters: one thread at a time."""
    with _guard:
        return _locks.setdefault(uncompiled(model), threading.RLock())


# ------------------------------------------------------------------ compiled models


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile(model)``: compiled code has no second derivatives."""
    return getattr(model, "_orig_mod", model)


# ------------------------------------------------------------------ attention


class _PlainAttention:
    """A switch of the whole process that several threads may hold at once."""

    def __init__(self):
        self.holders, self.before, self.kernel = 0, True, None

    def __enter__(self):
        with _guard:
            if not self.holders:
                self.before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
                self.kernel = sdpa_kernel(SDPBackend.MATH)
                self.kernel.__enter__()
            self.holders += 1

    def __exit__(self, *error):
        with _guard:
            self.holders -= 1
            if not self.holders:
                self.kernel.__exit__(None, None, None)
                torch.backends.mha.set_fastpath_enabled(self.before)


_plain_attention = _PlainAttention()


def plain_attention() -> Any:
    """Attention in operations that have every derivative (torch's math kernel); back afterwards."""
    return _plain_attention


# ------------------------------------------------------------------ random numbers


def random_state(like: Tensor) -> list[Tensor]:
    """The states of torch's own generators that a model on this device may draw from."""
    states = [torch.default_generator.get_state()]
    if like.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(like.device))
    return states


def restore_random_state(states: list[Tensor], like: Tensor) -> None:
    """Put back what `random_state` returned."""
    torch.default_generator.set_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], like.device)


class SameDraws:
    """A loss that draws the same random numbers (dropout's, say) at every call as at its first.

    The first call draws as the loss itself would. Each further one starts from the state in which
    the first found torch's generators, and leaves them as it found them. Numbers from a generator
    of the loss's own are not seen.
    """

    def __init__(self, loss: Callable[..., Tensor]):
        self.loss, self.state = loss, None  # a state is kept only if the first call drew

    def __call__(self, lam: Tensor, theta: Tensor, batch: Any) -> Tensor:
        """Evaluate the loss."""
        now = random_state(theta)
        if self.state is None:
            value = self.loss(lam, theta, batch)
            if not _equal(now, random_state(theta)):
                self.state = now
            return value
        restore_random_state(self.state, theta)
        try:
            return self.loss(lam, theta, batch)
        finally:
            restore_random_state(now, theta)


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@contextmanager
def same_twice(
    what: str, like: Tensor, again: Callable[[], Tensor] | None = None
) -> Iterator[None]:
    """Refuse what draws random numbers inside: another evaluation would be another function.

    Args:
        what: What the message names.
        like: A tensor on the device of the model.
        again: Evaluates anew. Where numbers were drawn, a few equal values acquit the model: the
            generators are the whole process's, and another thread may have drawn.

    Raises:
        ValueError: naming ``what`` and the way out.
    """
    before = random_state(like)
    yield
    if _equal(before, random_state(like)):
        return
    with torch.no_grad():
        values = [] if again is None else [again() for _ in range(4)]
    if not values or not all(torch.equal(values[0], value) for value in values):
        raise ValueError(
            f"{what}: draws random numbers (dropout in training mode?), so b, H and J would each "
            "belong to another function; call model.eval() before differentiating, or draw once "
            "and put what was drawn into the batch"
        )


# ------------------------------------------------------------------ torch's own words

_INFERENCE = "inference tensor"
_HOPELESS = (  # what torch says where a derivative is missing
    "not implemented",
    "forward AD",
    "does not support",
    "is not differentiable",
    "modified by an inplace operation",
    "a leaf Variable",
    "isDifferentiableType",
    "double backward",
    "once_differentiable",
    "Trying to backward through the graph",
    "does not require grad and does not have a grad_fn",
)


@contextmanager
def way_out(what: str = "inner_loss", times: str = " twice") -> Iterator[None]:
    """Say in a sentence what torch says where a derivative is missing (empty ``times``: a first).

    Raises:
        ValueError: naming ``what``, torch's reason and what to do.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        said = " ".join(str(error).split())
        if _INFERENCE in said.lower():
            raise ValueError(
                f"{what}: a tensor of the batch or of the model was made under "
                "torch.inference_mode, which no derivative can pass; clone it outside of that mode"
            ) from error
        if any(words in said for words in _HOPELESS):
            raise ValueError(
                f"{what}: torch cannot differentiate it{times} ({said[:300]}); use an operation "
                f"that can be differentiated{times} (attention: the math kernel, "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH); an embedding: max_norm=None, "
                "sparse=False; a torch.autograd.Function: a backward that is differentiable)"
            ) from error
        raise
