"""Is another evaluation one of the same function? What is drawn, and what a model keeps.

b, H and J are derivatives at one point of one function. A model that draws random numbers, counts
its calls, remembers activations or moves a buffer at each forward pass is another function every
time. Running statistics of BatchNorm are no such state: what moves them does not read them. What a
pass leaves in the model's attributes may be a memo, read as a constant by the next: see
`bilevel_lite.purity`.
"""

import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from bilevel_lite.refuse import attributes, recording
from bilevel_lite.trust import doubling, known_code, low_precision, still

__all__ = [
    "OWN",
    "SameDraws",
    "back_is_due",
    "containers",
    "due",
    "equal_states",
    "kept_by",
    "moved_since",
    "near",
    "note",
    "parts_of",
    "random_state",
    "require_same",
    "restore_random_state",
    "same_back",
    "same_twice",
    "stand_in",
    "was_the_same",
    "watching",
]


# ------------------------------------------------------------------ random numbers


def random_state(like: Tensor, known: bool = False) -> list[Any]:
    """The states of the global generators that a model on this device may draw from.

    Python's, NumPy's and torch's own; where all of the code is known, torch's own alone.
    """
    others = None
    if not known:
        kind, keys, *rest = np.random.get_state()
        others = random.getstate(), (kind, keys.tobytes(), *rest)
    states = [others, torch.default_generator.get_state()]
    if like.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(like.device))
    return states


def restore_random_state(states: list[Any], like: Tensor) -> None:
    """Put back what `random_state` returned."""
    others, own, *cuda = states
    if others is not None:
        python, (kind, keys, *rest) = others
        random.setstate(python)
        np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))
    torch.default_generator.set_state(own)
    if cuda:
        torch.cuda.set_rng_state(cuda[0], like.device)


class SameDraws:
    """A loss that draws the same random numbers (dropout's, say) at every call as at its first.

    The first call draws as the loss itself would. Each further one starts from the state in which
    the first found torch's generators, and leaves them as it found them. Numbers from a generator
    of the loss's own are not seen. What keeps something else from call to call is refused, as by
    `same_twice`.
    """

    def __init__(self, loss: Callable[..., Tensor]):
        self.loss, self.state = loss, None  # a state is kept only if the first call drew
        self.compared = False

    def __call__(self, lam: Tensor, theta: Tensor, batch: Any) -> Tensor:
        """Evaluate the loss."""
        if self.state is not None:
            return self._replayed(lam, theta, batch)
        before = random_state(theta)
        with watching(not hasattr(self.loss, "terms")) as watch:
            value = self.loss(lam, theta, batch)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value  # `evaluate` says what is wrong
        if not equal_states(before, random_state(theta)):
            self.state = before
        if not self.compared:
            self.compared = True
            if (moved := watch.moved()) or due(self.loss):
                again = partial(self._replayed, lam, theta, batch)
                require_same("loss", [value.detach(), *watch.evaluate(again, 1)], moved)
            was_the_same(self.loss)
        return value

    def _replayed(self, lam, theta, batch):
        if self.state is None:
            return self.loss(lam, theta, batch)
        now = random_state(theta)
        restore_random_state(self.state, theta)
        try:
            return self.loss(lam, theta, batch)
        finally:
            restore_random_state(now, theta)


def equal_states(one: list[Any], other: list[Any]) -> bool:
    """True if two results of `random_state` are the same: nothing was drawn in between."""
    return one[0] == other[0] and all(map(torch.equal, one[1:], other[1:]))


# ------------------------------------------------------------------ what a model keeps

_local = threading.local()
OWN = {*vars(nn.Module()), "_flat_weights"}  # what torch keeps in every module


def stand_in(model: nn.Module) -> None:
    """Tell whoever watches in this thread that a theta stands for the model's parameters."""
    for watch in getattr(_local, "watches", ()):
        watch.stood_for.append((model, [(p, p._version) for p in model.parameters()]))


def note(model: nn.Module, inputs: Any = None) -> None:
    """Tell whoever watches in this thread that the model is about to be evaluated."""
    for watch in getattr(_local, "watches", ()):
        watch.see(model)


class _Watch:
    """The models that are evaluated inside, and what each held before."""

    def __init__(self):
        self.models: list[tuple[nn.Module, dict]] = []
        self.seen: set[int] = set()
        self.stood_for: list[tuple[nn.Module, list[tuple[Tensor, int]]]] = []
        self.value: Tensor | None = None

    def see(self, model):
        if id(model) not in self.seen:
            self.seen |= {id(module) for module in model.modules()}
            _require_still_norms(model)
            self.models.append((model, kept_by(model)))

    def moved(self) -> list[str]:
        """Names of buffers and attributes that are not what they were."""
        return [name for model, before in self.models for name in moved_since(model, before)]

    def evaluate(self, again: Callable[[], Tensor], times: int) -> list[Tensor]:
        """Evaluate anew, so many times; buffers stay as they are."""
        with ExitStack() as stack:
            for model, _ in self.models:
                stack.enter_context(still(model))
            stack.enter_context(torch.enable_grad())  # a model may differentiate inside
            return [again().detach() for _ in range(times)]


@contextmanager
def watching(every: bool) -> Iterator[_Watch]:
    """Note the models that `predict` evaluates inside; or every module that is called."""
    watches = _local.__dict__.setdefault("watches", [])
    watches.append(watch := _Watch())
    with ExitStack() as stack:
        stack.callback(watches.remove, watch)
        if every:
            hook = nn.modules.module.register_module_forward_pre_hook(note)
            stack.callback(hook.remove)
        yield watch


def kept_by(model: nn.Module) -> dict[str, Any]:
    """Present state, by name, of what the model's own code might carry from pass to pass."""
    if known_code(model):
        return {}
    kept, seen = {}, set()
    for path, module in model.named_modules():
        buffers, own = module._buffers, module._parameters
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            buffers = {}
        others = [
            (k, a)
            for k, a in vars(module).items()
            if k not in OWN and f"{k}_g" not in own and f"{k}_orig" not in own  # weight_norm's
        ]
        for name, value in (*buffers.items(), *others):
            kept[f"{path}.{name}" if path else name] = _mark(value, seen)
    return kept


def moved_since(model: nn.Module, before: dict[str, Any]) -> list[str]:
    """Names of what is not as `kept_by` found it before."""
    now = kept_by(model)
    return [k for k, one in now.items() if k not in before or not _same(before[k], one)]


_LIBRARY = sys.stdlib_module_names - {"types"}  # whose objects keep no memo of a model's


def parts_of(value: Any) -> list[Any] | None:
    """What a container, or an object of the model's own, holds (no keys); None for all else."""
    if isinstance(value, MutableMapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | deque):
        return list(value)
    library = type(value).__module__.partition(".")[0] in _LIBRARY
    if library or isinstance(value, Tensor | nn.Module | type):
        return None
    held = attributes(value)
    return None if held is None else list(held.values())


def containers(value: Any, seen: set[int]) -> Iterator[Any]:
    """What holds something in a value, one in another: at most 300, and none that was ``seen``."""
    left, most = [value], len(seen) + 300
    for one in left:
        parts = parts_of(one)
        if parts is not None and id(one) not in seen and len(seen) < most:
            seen.add(id(one))
            left += [p for p in parts if not isinstance(p, int | str | float | None)]
            yield one


def _mark(value: Any, seen: set[int]) -> list[Any]:
    """Something that is `_same` as long as nothing in the value is replaced or written into."""
    marks = []
    for parts in ([value], *map(parts_of, containers(value, seen))):
        marks.append(len(parts))
        for part in parts:
            version = part._version if isinstance(part, Tensor) and not part.is_inference() else 0
            marks += [part if parts_of(part) is None else None, version]
    return marks


def _same(was: list[Any], now: list[Any]) -> bool:
    return len(was) == len(now) and all(map(_same_part, was, now))


def _same_part(was: Any, now: Any) -> bool:
    return was is now or (type(was) is type(now) and isinstance(was, int | str) and was == now)


_SPECTRAL = (
    nn.utils.parametrizations._SpectralNorm,
    import_module("torch.nn.utils.spectral_norm").SpectralNorm,  # a function hides the module
)


def _require_still_norms(model: nn.Module) -> None:
    """Refuse spectral normalisation that goes on with its power iteration at each pass.

    Also at its fixed point: its vectors u, v count as constants there, and the first derivative is
    right, but the second is not.
    """
    for name, module in model.named_modules():
        parts = [module, *module._forward_pre_hooks.values()]  # the new form, and the old one
        if module.training and any(isinstance(part, _SPECTRAL) for part in parts):
            raise ValueError(
                f"model: {name or type(model).__name__} is under spectral_norm in training mode, "
                "whose power iteration goes on at each forward pass, so b, H and J would each "
                "belong to another function; call model.eval() before differentiating"
            )


# ------------------------------------------------------------------ the comparison

# loss or model -> how often it was used without a fault, and gone back through
_uses: WeakKeyDictionary = WeakKeyDictionary()
_ways_back: WeakKeyDictionary = WeakKeyDictionary()


def due(of: Any, counted: WeakKeyDictionary = _uses) -> bool:
    """True at the 1st, 2nd, 4th, 8th ... use, and until a comparison has come out well."""
    if recording():  # compared before, by the plain path
        return False
    if of is None or isinstance(of, SameDraws):  # it compares for itself
        return False
    if isinstance(of, nn.Module) and known_code(of):
        return False
    try:
        uses = counted.get(of, 0) + 1
    except TypeError:  # has no hash or no weak references
        return True
    return doubling(uses)


def was_the_same(of: Any, counted: WeakKeyDictionary = _uses) -> None:
    """Count a use that was compared and came out well, or that was not due."""
    with suppress(TypeError):
        counted[of] = counted.get(of, 0) + 1


def back_is_due(of: Any) -> bool:
    """True where `same_back` will go back twice."""
    return due(of, _ways_back)


def same_back(
    what: str, back: Callable[..., tuple[Tensor | None, ...]], of: Any = None
) -> tuple[Tensor | None, ...]:
    """Gradients, refused if the way back through their graph is another one each time.

    A backward pass or a hook may draw random numbers, or count its calls. So the way is gone twice
    at the 1st, 2nd, 4th, 8th ... use of ``of``.

    Args:
        what: What the message names.
        back: Goes back; with ``retain_graph=True`` it can be called again.
        of: The loss; None where all of its code is known.

    Raises:
        ValueError: naming ``what`` and the way out.

    Cost: nothing, or half of a gradient where the way is gone twice.
    """
    if not back_is_due(of):
        was_the_same(of, _ways_back)
        return back()
    try:
        grads = back(retain_graph=True)
    except RuntimeError as error:  # what inductor compiled frees parts of its graph on the way
        if "donated buffers" not in str(error):
            raise
        was_the_same(of, _ways_back)
        return back()
    for one, other in zip(grads, back(retain_graph=True), strict=True):
        if one is not None and not near(one.detach(), other.detach()):
            raise ValueError(
                f"{what}: has another gradient when the same graph is gone back once more: a "
                "backward pass or a hook draws random numbers, or keeps something from call to "
                "call, so b, H and J would each belong to another function; take it out, or put "
                "what is drawn into the batch"
            )
    was_the_same(of, _ways_back)
    return grads


@contextmanager
def same_twice(
    what: str, like: Tensor, again: Callable[[], Tensor], of: Any = None, every: bool = False
) -> Iterator[_Watch]:
    """Refuse what is not the same function when it is evaluated once more.

    It is evaluated anew where random numbers were drawn (the generators are the whole process's:
    another thread may have drawn, and equal values acquit), where a model's buffers or attributes
    changed, and at the 1st, 2nd, 4th, 8th ... use of ``of`` whatever was seen. Running statistics
    stay as the one pass left them.

    Args:
        what: What the message names.
        like: A tensor on the device of the model.
        again: Evaluates anew.
        of: The loss, or the model; None where all of its code is known.
        every: Watch every module that is called, not only those of `predict`: for plain functions.

    Yields:
        An object whose ``value`` is to be set to what came out inside.

    Raises:
        ValueError: naming ``what``, what moved, and the way out.

    Cost: nothing, or the forward passes of ``again`` in the cases above.
    """
    if recording():
        yield _Watch()
        return
    known = of is None and not every
    before = random_state(like, known)
    with watching(every) as watch:
        yield watch
    drew = not equal_states(before, random_state(like, known))
    moved = watch.moved()
    if not (due(of) or drew or moved):
        return was_the_same(of)
    values = [] if watch.value is None else [watch.value.detach()]
    values += watch.evaluate(again, 4 if drew else 2 - len(values))
    if drew and not all(torch.equal(values[-1], value) for value in values[-4:]):
        raise ValueError(
            f"{what}: draws random numbers (dropout in training mode?), so b, H and J would each "
            "belong to another function; call model.eval() before differentiating, or draw once "
            "and put what was drawn into the batch"
        )
    require_same(what, values, moved)
    was_the_same(of)


def require_same(what: str, values: list[Tensor], moved: list[str]) -> None:
    """Refuse values of one function at one point that differ by more than rounding.

    Raises:
        ValueError: naming ``what``, ``moved`` and the way out.
    """
    first, *others = values
    for other in others:
        if not near(first, other):
            kept = f" ({', '.join(map(repr, moved[:3]))})" if moved else ""
            raise ValueError(
                f"{what}: has another value when it is evaluated once more at the same point: it "
                f"keeps something from call to call{kept}, or draws from a generator of its own, "
                "so b, H and J would each belong to another function; call model.eval(), or put "
                "what is kept or drawn into the batch"
            )


def near(one: Tensor, other: Tensor) -> bool:
    """True if two values of one function differ by no more than rounding; NaN passes."""
    eps = torch.finfo(one.dtype).eps
    rtol = max(min(1e3 * eps, 3e-2), 3e-2 if low_precision(one) else 0.0)
    return not bool((other - one).norm() > rtol * one.norm())
