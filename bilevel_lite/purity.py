"""Is a model a pure function of theta and its inputs? What it reads past theta, writes and keeps.

Nothing in torch asks for that. A parameter that is kept in a list is trained like any other, and is
a constant where theta stands in for the modules' parameters; a constraint by ``.data`` goes round
the count of writes; a weight that is computed once and kept belongs to the theta of that call. Each
model is looked at in its evaluation 1, 2, 4, 8 ...; what is kept outside of the model (a global
dict, an attribute of its class) is not seen.
"""

from collections import deque
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bilevel_lite.exact import aside
from bilevel_lite.refuse import attributes, recording, switched_on, versions
from bilevel_lite.same_function import (
    OWN,
    containers,
    kept_by,
    moved_since,
    near,
    parts_of,
    random_state,
    restore_random_state,
)
from bilevel_lite.surroundings import nodes, transforming
from bilevel_lite.trust import doubling, known_code, still, wave

__all__ = ["looking", "only_looking", "pure"]

Named = dict[str, Tensor]


def pure(
    model: nn.Module, evaluate: Callable[[Named], Any], named: Named, inputs: tuple[Any, ...]
) -> Any:
    """Return ``evaluate(named)``, refused if the model is seen not to be a function of these alone.

    Args:
        model: What is evaluated.
        evaluate: Takes the parts of theta by name, and evaluates the model with them on ``inputs``,
            or on what comes second.
        named: The parts of theta.
        inputs: What else goes in.

    Raises:
        ValueError: if the model reads a parameter of its own in place of theta's, gives one another
            value, or keeps what decides the next value; naming it and the way out.

    Cost: nothing, or, where it is looked at and not all of its code is known, some copies of theta,
    a few examples forward and back, and two more forward passes if it kept something.
    """
    if not named or recording() or transforming():  # which hide what is computed
        return evaluate(named)
    counts = _evaluated.setdefault(model, {})
    modes = tuple(module.training for module in model.modules())
    count = counts.get(modes, 0) + 1
    outputs = _looked_at(model, evaluate, named, inputs) if doubling(count) else evaluate(named)
    counts[modes] = count  # what was refused does not count: it is looked at again
    return outputs


# model -> for each setting of its modes, training or not, how many evaluations there were
_evaluated: WeakKeyDictionary = WeakKeyDictionary()


def _looked_at(model, evaluate, named, inputs):
    if known_code(model):
        outputs = evaluate(named)
        _require_read(model, outputs, [*named.values(), *inputs])
        return outputs
    alone = not torch.is_grad_enabled() or _of_theta_alone(model, evaluate, named, inputs)
    memos, copies = _Memos(model), {k: p.detach().clone() for k, p in named.items()}
    counted = versions((None, [*named.values()]))
    like = next(iter(copies.values()))
    drawn = random_state(like)

    def as_before():
        restore_random_state(drawn, like)
        return evaluate(named)

    outputs = evaluate(named)  # after the look, so that what hooks keep is of this pass
    if versions((None, [*named.values()])) == counted:  # counted writes are for others to judge
        _require_parameters_unwritten(model, named, copies)
    _require_read(model, outputs, [*named.values(), *inputs])
    with looking():
        memos.require_none(
            lambda: evaluate({k: _nearby(p) for k, p in copies.items()}), like, as_before
        )
    if not alone:
        raise ValueError(
            f"model: {type(model).__name__} gives another value or gradient when its own "
            "parameters hold other numbers, so it reads them, and not theta alone: by a tensor "
            "that shares a parameter's memory, or in a backward pass that runs a module again "
            "(checkpointing, reversible layers); read the parameters from the modules in forward, "
            "and switch that off"
        )
    return outputs


_looking: ContextVar[bool] = ContextVar("looking", default=False)


def looking():
    """Evaluations that only look: who notes a model's calls (`bilevel_lite.tape`) skips them."""
    return switched_on(_looking)


def only_looking() -> bool:
    """True within `looking`."""
    return _looking.get()


def _require_parameters_unwritten(model: nn.Module, named: dict[str, Tensor], copies: dict) -> None:
    """Refuse a model that gives its parameters other values by ``.data``, which nothing counts."""
    for name, was in copies.items():
        now = named[name].detach()
        if now.shape != was.shape or bool((now != was).logical_and(was == was).any()):
            raise ValueError(
                f"model: {type(model).__name__} writes into parameter {name!r} in forward (by "
                ".data, which torch does not count), so what it computes is no function of theta; "
                "project after each step, or compute the constrained value in forward"
            )


def _require_read(model: nn.Module, outputs: Any, given: list[Any]) -> None:
    """Refuse a model that reads a parameter of its own in place of theta's part.

    One that is kept outside of the modules' parameters (a list, a closure, a transpose made in
    ``__init__``) is a constant for theta. It is seen from the graph.
    """
    parts = [one for one in tree_leaves(outputs) if isinstance(one, Tensor)]
    given = [one for one in given if isinstance(one, Tensor)]
    own = {id(p): name for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    for one in given:
        own.pop(id(one), None)  # handed over as theta
    for node in nodes(*parts, without=given):
        name = own.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise ValueError(
                f"model: {type(model).__name__} reads its parameter {name!r} past the module that "
                "holds it (from a list, a closure, or a tensor made of it in __init__), so theta "
                "does not reach it; read it from the module in forward"
            )


def _nearby(p: Tensor) -> Tensor:
    """Another value, not a multiple (a normalised weight would not show one), none of it drawn."""
    return p + 0.03 * p.abs().mean() * wave(p)


def _of_theta_alone(
    model: nn.Module, evaluate: Callable[..., Any], named: Named, inputs: tuple[Any, ...]
) -> bool:
    """False if value or gradient depend on what the model's own parameters hold meanwhile.

    A tensor that shares a parameter's memory reads them, and so does a backward pass that runs a
    module again. So a few examples go through the model twice, the second time with other numbers
    in the parameters. Parameters, attributes and generators are afterwards as they were.
    """
    own = {name: p for name, p in model.named_parameters() if name in named}
    if any(p.device.type == "cpu" and p.is_shared() for p in own.values()):
        return True  # other processes would see them move
    was, moved = {name: p.detach().clone() for name, p in own.items()}, []
    at = {name: p.detach().clone().requires_grad_() for name, p in named.items()}
    few, like, before = _few(inputs), next(iter(at.values())), _attributes(model)
    drawn = random_state(like)

    def made() -> list[Tensor]:
        restore_random_state(drawn, like)
        with still(model), aside():  # which copies buffers as they are now
            out = tree_leaves(evaluate(at, few))
            out = [one for one in out if isinstance(one, Tensor) and one.requires_grad]
            back = list(map(wave, out))
            grads = torch.autograd.grad(out, [*at.values()], back, allow_unused=True)
        pairs = zip(grads, at.values(), strict=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in pairs]
        return [torch.cat([one.detach().reshape(-1) for one in some]) for some in (out, grads)]

    with looking():
        try:
            made()  # what is kept from the pass before is of this point, too
            here = made()
            for name, p in own.items():
                p.data.add_(0.3 * p.data.abs().mean() * wave(p))
                moved.append(name)
            there = made()
            # another one each time is for others to refuse
            return all(map(near, here, there)) or not all(map(near, there, made()))
        except Exception:  # whatever a model says to a few examples
            return True
        finally:
            for name in moved:
                own[name].data.copy_(was[name])
            _put_back(before)
            restore_random_state(drawn, like)


def _few(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """At most four examples of a model's inputs: the rows of all that has as many as the first.

    All of them where one has no rows to take: a sparse or a nested tensor.
    """
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    if any(x.is_nested or x.layout != torch.strided for x in tensors):
        return inputs
    rows = next(map(len, tensors), 0)
    has = lambda x: isinstance(x, Tensor) and x.dim() > 0 and len(x) == rows  # noqa: E731
    return tree_map(lambda x: x[:4] if has(x) else x, inputs)


class _Memos:
    """Does an evaluation leave something in the model that decides the value of the next one?

    A weight that is computed once and kept (under a name, or in a dict by shape) belongs to the
    theta of the first evaluation, and the next one, with another theta, reads it as a constant.

    Args:
        model: Looked at now, before it is evaluated.
    """

    def __init__(self, model: nn.Module):
        self.model, self.before = model, kept_by(model)
        self.attributes = _attributes(model)

    def require_none(
        self, evaluate: Callable[[], Any], like: Tensor, last: Callable[[], Any]
    ) -> None:
        """Evaluate at another theta, with what was left and without, if anything was left.

        Then ``last``, where there are hooks: what they keep is of the last pass.

        Raises:
            ValueError: naming what is kept, and the way out.

        Cost: nothing, or two forward passes.
        """
        moved = moved_since(self.model, self.before)
        if not moved:
            return
        drawn, now, values = random_state(like), _attributes(self.model), []
        try:
            with still(self.model):
                for attributes in (now, self.attributes):
                    _put_back(attributes)
                    restore_random_state(drawn, like)
                    made = [v.detach() for v in tree_leaves(evaluate()) if isinstance(v, Tensor)]
                    values.append(made)
                if any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules()):
                    _put_back(self.attributes)
                    last()
        finally:
            _put_back(now)
            restore_random_state(drawn, like)
        for one, other in zip(*values, strict=True):
            if one.is_floating_point() and not near(one, other):
                _put_back(self.attributes)  # or the next call would read the memo
                raise ValueError(
                    f"model: {type(self.model).__name__} has another value after a call than it "
                    f"would have without that call: it keeps something from call to call "
                    f"({', '.join(map(repr, moved[:3]))}; of another theta, perhaps), so b, H and "
                    "J would each belong to another function; compute it in every call"
                )


def _attributes(model: nn.Module) -> list[tuple[nn.Module, dict, list]]:
    """Of each module the attributes of its own, and copies of the containers in them."""
    kept, seen = [], set()
    for module in model.modules():
        own = {k: a for k, a in vars(module).items() if k not in OWN}
        inside = [(held, _kept_in(held)) for a in own.values() for held in containers(a, seen)]
        kept.append((module, own, inside))
    return kept


def _put_back(kept: list[tuple[nn.Module, dict, list]]) -> None:
    for module, own, inside in kept:
        for name in [k for k in vars(module) if k not in OWN and k not in own]:
            del vars(module)[name]
        vars(module).update(own)
        for held, was in inside:
            now, before = parts_of(held), parts_of(was)
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                _put_into(held, was)


def _kept_in(held: Any) -> Any:
    """A copy of a container; of an object its attributes by name."""
    container = isinstance(held, MutableMapping | list | tuple | set | deque)
    return copy(held) if container else attributes(held)


def _put_into(held: Any, was: Any) -> None:
    if isinstance(held, list | deque):
        held.clear()
        held.extend(was)
    elif isinstance(held, MutableMapping | set):
        held.clear()
        held.update(was)
    else:
        for name in attributes(held).keys() - was.keys():
            object.__delattr__(held, name)
        for name, value in was.items():
            object.__setattr__(held, name, value)
