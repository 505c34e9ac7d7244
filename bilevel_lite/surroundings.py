"""What torch keeps for a whole process or a whole model, set right while we differentiate.

Gradients may be switched off where a hypergradient is asked for, attention may run in a kernel
without second derivatives, forward mode has one level for all threads, a functional call swaps the
parameters of a module that another thread uses, a model may draw random numbers. Each of these has
its one place here; what no setting cures is refused in a sentence that names the way out.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

__all__ = [
    "SameDraws",
    "differentiating",
    "forward_level",
    "lock_of_modules",
    "nothing_again",
    "ordinary",
    "random_state",
    "require_twice",
    "restore_random_state",
    "same_twice",
    "second_order",
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
_modules = threading.RLock()


@contextmanager
def forward_level() -> Iterator[None]:
    """Torch's one level of forward-mode differentiation: one thread at a time."""
    with _forward, fwad.dual_level():
        yield


def lock_of_modules() -> Any:
    """The lock under which modules hold other parameters or hooks of ours: one thread at a time.

    One for all models, since two may share layers (an encoder with two heads).
    """
    return _modules


# ------------------------------------------------------------------ kernels


class _SecondOrder:
    """A switch of the whole process that several threads may hold at once."""

    def __init__(self):
        self.holders = 0

    def __enter__(self):
        with _guard:
            self.holders += 1
            if self.holders > 1:
                return
            self.before = [(put, get()) for get, put in _kernels()]
            for put, _ in self.before:
                put(put is torch.backends.cuda.enable_math_sdp)
            self.stance = None
            if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                self.stance = torch.compiler.set_stance("force_eager")  # compiled: no second order
                self.stance.__enter__()

    def __exit__(self, *error):
        with _guard:
            self.holders -= 1
            if self.holders:
                return
            if self.stance is not None:
                self.stance.__exit__(None, None, None)
            for put, was in self.before:
                put(was)


def _kernels() -> list[tuple[Callable, Callable]]:
    """Pairs (is it on?, switch it) of what torch may compute attention with."""
    cuda, mha = torch.backends.cuda, torch.backends.mha
    pairs = [
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (mha.get_fastpath_enabled, mha.set_fastpath_enabled),
    ]
    if hasattr(cuda, "enable_cudnn_sdp"):  # torch 2.5
        pairs.append((cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp))
    return pairs


_second_order = _SecondOrder()


def second_order() -> Any:
    """Operations that have every derivative: attention by torch's math kernel, nothing compiled.

    A context manager for the forward pass whose gradient is differentiated again, or which forward
    mode follows; the caller's settings are back afterwards.
    """
    return _second_order


# ------------------------------------------------------------------ saved tensors

_HOOKS = "bilevel_lite: no hooks on saved tensors"


@contextmanager
def nothing_again(what: str) -> Iterator[None]:
    """Refuse activation checkpointing in a forward pass with other parameters than the module's.

    What the backward pass runs again, it runs with the module's own parameters, not with those of
    theta: the gradient would be of neither.

    Raises:
        ValueError: naming ``what`` and the way out.
    """
    with ExitStack() as stack:
        with suppress(RuntimeError):  # the caller has hooks of his own around all of it
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS))
        try:
            yield
        except RuntimeError as error:
            if _HOOKS not in str(error):
                raise
            raise ValueError(
                f"{what}: uses activation checkpointing (or other hooks on saved tensors); what "
                "the backward pass runs again, it would run with the module's own parameters and "
                "not with theta; switch it off (model.gradient_checkpointing_disable(), or call "
                "the function instead of checkpoint(function, ...))"
            ) from error


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
    "sparse tensors",
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
    "modified inplace",
    "use_reentrant",
    "stateless API",
)


@contextmanager
def way_out(what: str = "inner_loss") -> Iterator[None]:
    """Say in a sentence what torch says where a derivative is missing.

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
                f"{what}: torch cannot differentiate it as needed here ({said[:300]}); use an "
                "operation that has a second derivative (attention: the math kernel, "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH); an embedding: max_norm=None, "
                "sparse=False; a torch.autograd.Function: a backward that is differentiable; "
                "checkpointing: use_reentrant=False; nn.DataParallel: the module inside)"
            ) from error
        raise


def require_twice(what: str, *grads: Tensor | None) -> None:
    """Refuse gradients whose graph was cut by ``once_differentiable``.

    Torch raises only if it is asked for gradients in all leaves; asked for some, it leaves that
    part out and says nothing.

    Raises:
        ValueError: naming ``what`` and the way out.

    Cost: a walk over the graph, no arithmetic.
    """
    seen, left = set(), [grad.grad_fn for grad in grads if grad is not None]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise ValueError(
                f"{what}: holds a torch.autograd.Function whose backward is marked "
                "once_differentiable, so its second derivative is missing; write a backward that "
                "is differentiable"
            )
        seen.add(node)
        left += [parent for parent, _ in node.next_functions]
