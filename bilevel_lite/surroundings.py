"""What torch keeps for a whole process or a whole model, set right while we differentiate.

Gradients may be switched off where a hypergradient is asked for, attention may run in a kernel
without second derivatives, forward mode has one level for all threads, a functional call swaps the
parameters of a module that another thread uses. Each of these has its one place here; what no
setting cures is refused in a sentence that names the way out.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar, cast

import torch
import torch.autograd.forward_ad as fwad
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.utils import parametrize

__all__ = [
    "differentiating",
    "forward_level",
    "lock_of_modules",
    "nodes",
    "nothing_again",
    "ordinary",
    "require_twice",
    "second_order",
    "transforming",
    "way_out",
]


F = TypeVar("F", bound=Callable)


def differentiating(function: F) -> F:
    """Let a function compute with gradients on, also under ``no_grad`` and ``inference_mode``."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return cast(F, wrapped)


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


class _Switch:
    """A setting of the whole process that several threads, and calls in calls, may hold at once.

    Args:
        on: Makes the setting and returns a function that takes it back.
    """

    def __init__(self, on: Callable[[], Callable[[], None]]):
        self.on, self.holders = on, 0

    def __enter__(self):
        with _guard:
            self.holders += 1
            if self.holders == 1:
                self.back = self.on()

    def __exit__(self, *error):
        with _guard:
            self.holders -= 1
            if not self.holders:
                self.back()


def _no_fast_path() -> Callable[[], None]:
    """Attention's fast path off: what it gives at padded positions is another function.

    Torch takes it where nothing inside needs a gradient (a frozen encoder): b and H would differ.
    """
    mha = torch.backends.mha
    was = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    return lambda: mha.set_fastpath_enabled(was)


def _nothing_cached() -> Callable[[], None]:
    """Nothing is kept by `parametrize.cached()` around us: weights computed of another theta."""
    was, kept = parametrize._cache_enabled, parametrize._cache
    if not was:  # what is kept within one forward pass belongs to its theta
        return lambda: None
    parametrize._cache_enabled, parametrize._cache = 0, {}

    def back():
        parametrize._cache_enabled += was
        parametrize._cache = kept

    return back


def _math_alone() -> Callable[[], None]:
    """Attention by torch's math kernel, and nothing compiled: neither has second derivatives."""
    stack = ExitStack()
    for get, put in _kernels():
        stack.callback(put, get())
        put(put is torch.backends.cuda.enable_math_sdp)
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    return stack.close


def _kernels() -> list[tuple[Callable, Callable]]:
    """Pairs (is it on?, switch it) of what torch may compute attention with."""
    cuda = torch.backends.cuda
    pairs = [
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    ]
    if hasattr(cuda, "enable_cudnn_sdp"):  # torch 2.5
        pairs.append((cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp))
    return pairs


_fast_path_off, _second_order = _Switch(_no_fast_path), _Switch(_math_alone)
_uncached = _Switch(_nothing_cached)


def second_order() -> Any:
    """Operations that have every derivative: attention by torch's math kernel, nothing compiled.

    A context manager for the forward pass whose gradient is differentiated again, or which forward
    mode follows; the caller's settings are back afterwards.
    """
    return _second_order


# ------------------------------------------------------------------ saved tensors

_HOOKS = "bilevel_lite: no hooks on saved tensors"
_local = threading.local()


def _no_checkpoints() -> Callable[[], None]:
    """Where this thread refuses it, reentrant checkpointing is an error.

    Torch only warns where its inputs have no gradient, and what is inside then gets none at all.
    """
    module = torch.utils.checkpoint
    was = module.check_backward_validity

    def check(inputs):
        if getattr(_local, "refusing", 0):
            raise RuntimeError(_HOOKS)
        was(inputs)

    def back():
        module.check_backward_validity = was

    module.check_backward_validity = check
    return back


_checkpoints_watched = _Switch(_no_checkpoints)


@contextmanager
def _refusing_checkpoints() -> Iterator[None]:
    with _checkpoints_watched:
        _local.refusing = getattr(_local, "refusing", 0) + 1
        try:
            yield
        finally:
            _local.refusing -= 1


@contextmanager
def nothing_again(what: str) -> Iterator[None]:
    """A forward pass with other parameters than the module's: it is not to be run again.

    Activation checkpointing is refused: what the backward pass runs again, it would run with the
    module's own parameters and not with theta, and the gradient would be of neither. Attention's
    fast path and the caller's cache of parametrized weights are off, see `_no_fast_path` and
    `_nothing_cached`.

    Raises:
        ValueError: naming ``what`` and the way out.
    """
    with ExitStack() as stack:
        with suppress(RuntimeError):  # the caller has hooks of their own around all of it
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS))
        stack.enter_context(_fast_path_off)
        stack.enter_context(_uncached)
        if torch.is_grad_enabled():
            stack.enter_context(_refusing_checkpoints())
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
    "stateless API",
    "no autograd formula",
    "is_coalesced expected",
    "higher order operator",
    "functions with out=... arguments",
    "deepcopy protocol",
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
                "sparse=False; a torch.autograd.Function or custom operator: a backward that is "
                "differentiable; a sparse tensor: to_dense(); torch.cond, scan: Python's own; "
                "nn.DataParallel: the module inside)"
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
    for node in nodes(*grads):
        if node.name() == "torch::autograd::Error":
            raise ValueError(
                f"{what}: holds a torch.autograd.Function whose backward is marked "
                "once_differentiable, so its second derivative is missing; write a backward that "
                "is differentiable"
            )


def transforming() -> bool:
    """True inside a transform of ``torch.func`` (grad, vmap ...), which hides the graph."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def nodes(*values: Any, without: Iterable[Tensor] = ()) -> Iterator[Any]:
    """Each node of the graph behind some tensors, once; not what lies behind those of ``without``.

    Whatever is no tensor is passed over. A leaf that needs a gradient is a node with an attribute
    ``variable``.
    """
    seen = {value.grad_fn for value in without}
    left = [value.grad_fn for value in values if isinstance(value, Tensor)]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        left += [parent for parent, _ in node.next_functions]
