"""When a fast path may be used: where it is known to be right, or was compared with the plain one.

A model's class and its layers' classes say which formula might serve. Whether it is right is seen
from ordinary gradients: once on a whole batch, and, where there is code that we do not know, on a
few examples at each call. What was seen is remembered for each model.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from bilevel_lite.surroundings import lock_of_modules

__all__ = [
    "STEERING",
    "ByHand",
    "doubling",
    "known_code",
    "low_precision",
    "mixes_examples",
    "numbers",
    "on_few",
    "rowwise",
    "some_examples",
    "spots",
    "steers",
    "still",
    "tolerance",
    "verdicts_of",
    "wave",
]

# model -> what was compared, and how it came out
_verdicts: WeakKeyDictionary = WeakKeyDictionary()
_calls = itertools.count(1)


def verdicts_of(model: nn.Module) -> dict:
    """What is known of a model from comparisons with ordinary gradients."""
    return _verdicts.setdefault(model, {})


def doubling(count: int) -> bool:
    """True for 0, 1, 2, 4, 8 ...: whatever is compared now and then is compared in these uses."""
    return count & (count - 1) == 0


def spots(n: int) -> list[int]:
    """A few rows of n, evenly spread, other ones at each call: no random number is drawn."""
    few, first = min(n, 2 + n // 128), int(next(_calls) * 0.6180339887498949 % 1 * n)
    return sorted((first + k * n // few) % n for k in range(few))


def some_examples(batch: Any, rows: list[int], n: int) -> tuple:
    """These examples as a batch of their own: the rows of whatever has n rows."""
    has = (isinstance(part, Tensor) and part.dim() > 0 and len(part) == n for part in batch)
    few = tuple(part[rows] if h else part for part, h in zip(batch, has, strict=True))
    return type(batch)(few) if isinstance(batch, tuple) and not hasattr(batch, "_fields") else few


def on_few(agree: Callable[[tuple, list[int]], bool], batch: Any, n: int) -> bool:
    """Whether a few examples and their rows agree; False where a model cannot take so few."""
    rows = spots(n)
    try:
        return agree(some_examples(batch, rows, n), rows)
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception:  # whatever a model says to a batch of another size
        return False


def low_precision(like: Tensor) -> bool:
    """True where products are rounded to less than the tensors' own precision."""
    return torch.is_autocast_enabled(like.device.type) or (
        like.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    )


def tolerance(like: Tensor) -> float:
    """How far two ways to one number may be apart in this precision, relative to its size."""
    return 3e-2 if low_precision(like) else 10 * torch.finfo(like.dtype).eps ** 0.5


def numbers(like: Tensor) -> int:
    """How many random numbers to compare in this precision, so that none agrees by chance.

    One that is off by as much as its size is within the tolerance with about the probability of
    the tolerance itself: 1 in 10 million in float64, 1 in 300 in float32.
    """
    return 1 if tolerance(like) < 1e-6 else 3


def wave(like: Tensor) -> Tensor:
    """Numbers like another tensor, all different and none of them drawn."""
    return torch.arange(like.numel(), device=like.device).cos().view(like.shape).to(like)


def mixes_examples(model: nn.Module) -> bool:
    """True if a layer normalises by statistics of the batch."""
    norm = nn.modules.batchnorm._BatchNorm
    return any(
        isinstance(m, norm) and (m.training or m.running_mean is None) for m in model.modules()
    )


# Modules whose code is known: each treats every example by itself, by means of its own parameters.
ROWWISE: dict[type, Callable] = {
    cls: cls.forward
    for cls in (
        nn.Sequential, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.Flatten,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm,
        nn.Identity, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU,
        nn.ELU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout,
    )
}  # fmt: skip


def rowwise(cls: type) -> type:
    """Declare that a module's own code treats each example by itself; for our own models."""
    ROWWISE[cls] = cls.forward
    return cls


# hooks that change nothing: ours, and torch's counter of operations
_ONLY_LOOK = ("bilevel_lite.same_function", "bilevel_lite.tape", "torch.utils.module_tracker")


def _changes(hooks: Iterable[Callable]) -> bool:
    return any(getattr(hook, "__module__", "") not in _ONLY_LOOK for hook in hooks)


def known_code(model: nn.Module) -> bool:
    """True if every module of the model is one of `ROWWISE`, just as its class has it.

    No other code and no hook is in it: what was compared once stays right.
    """
    common = nn.modules.module
    hooks = [*common._global_forward_pre_hooks.values(), *common._global_forward_hooks.values()]
    back = common._global_backward_hooks, common._global_backward_pre_hooks
    if any(back) or _changes(hooks):
        return False
    return all(
        type(m) in ROWWISE
        and ROWWISE[type(m)] is type(m).forward
        and not _changes([*m._forward_hooks.values(), *m._forward_pre_hooks.values()])
        and not (m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m))
        and not (type(m) is nn.Flatten and m.start_dim != 1)
        and not (type(m) is nn.Embedding and (m.max_norm or m.sparse or m.scale_grad_by_freq))
        for m in model.modules()
    )


# where torch has its own control flow (`associative_scan` is no such: its derivatives are right)
STEERING = {f"torch._higher_order_ops.{name}" for name in ("cond", "map", "scan", "while_loop")}


def steers(function: Any) -> bool:
    """True for an operator of torch's own control flow."""
    return isinstance(function, HigherOrderOperator) and type(function).__module__ in STEERING


class ByHand(TorchFunctionMode):
    """Sees inside whether a model stops or turns gradients by hand: for some rows only, perhaps.

    Where ``seen`` is True, a few rows say nothing of the others. Torch's own control flow (scan,
    cond) is an error there: its derivatives are not to be relied on.
    """

    ways = {
        Tensor.register_hook, Tensor.detach, Tensor.detach_, torch.detach, torch.detach_,
        Tensor.data.__get__, Tensor.grad_fn.__get__, torch._C._set_grad_enabled,
    }  # fmt: skip

    def __init__(self, model: nn.Module):
        super().__init__()
        self.seen = any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen = self.seen or function in self.ways
        if steers(function):
            raise RuntimeError(f"{function.name()}: control flow of torch's own")
        return function(*args, **(kwargs or {}))


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """One more forward pass that leaves buffers (running statistics) as they were.

    The pass gets copies of them, since a graph that is still there may need the tensors unwritten.
    """
    with lock_of_modules():
        before = [(m, dict(m._buffers)) for m in model.modules() if m._buffers]
        for module, buffers in before:
            module._buffers.update({k: b if b is None else b.clone() for k, b in buffers.items()})
        try:
            yield
        finally:
            for module, buffers in before:
                module._buffers.update(buffers)
