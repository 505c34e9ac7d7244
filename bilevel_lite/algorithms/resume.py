"""What a method remembers: its state copied out, and put back as if never interrupted.

There are values (numbers, tensors, lists of them) and parts (what has a state of its own:
optimisers, schedules, a solver, samplers, a generator).
"""

import copy
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.parallel import Shards
from bilevel_lite.refuse import require_state, require_variable
from bilevel_lite.surroundings import differentiating

__all__ = ["Resumable", "has_state"]


_KEYS = ("iteration", "lam", "theta", "values", "kinds", "parts")


class Resumable:
    """``state_dict`` and ``load_state_dict`` from a list of values and one of parts."""

    def _values(self) -> tuple[str, ...]:
        """Names of the attributes, beyond lam and theta, that the next step depends on."""
        raise NotImplementedError

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, by name; the first may refuse a state before any is set."""
        raise NotImplementedError

    @differentiating
    def state_dict(self) -> dict:
        """Return everything that the next step depends on, as copies."""
        return self._state(copies=True)

    def _state(self, copies: bool) -> dict:
        """The state; without ``copies`` what a step only replaces is not copied."""
        keep = copied if copies else (lambda value: value)
        parts = self._parts()
        return {
            "method": type(self).__name__,
            "iteration": self.iteration,
            "lam": self.lam.clone(),
            "theta": self.theta.clone(),
            "values": {name: keep(getattr(self, name)) for name in self._values()},
            "kinds": {name: _kind(part) for name, part in parts.items()},
            # a solver replaces what it remembers, all others may change it in place
            "parts": {
                name: (keep if name == "solver" else copied)(_state_of(part))
                for name, part in parts.items()
            },
        }

    @differentiating
    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned, as if never interrupted.

        Raises:
            ValueError: if the state is another method's, of variables of other shapes or dtypes,
                or of other optimisers, schedulers, samplers or another solver; or whatever a part
                raises. Everything here is then as it was before the call.
        """
        self._require_own(state)
        before = self._state(copies=False)
        try:
            self._load(state)
        except BaseException:
            self._load(before)
            raise

    def _require_own(self, state: dict) -> None:
        """Refuse a state that is not this one's kind."""
        require_state(state, "method", *_KEYS)
        name, parts = type(self).__name__, self._parts()
        if state.get("method") != name:
            raise ValueError(f"state: is of method {state.get('method')!r}, expected {name!r}")
        for variable in ("lam", "theta"):
            here, there = getattr(self, variable), state[variable]
            require_variable(f"state: {variable}", there)
            if (here.shape, here.dtype) != (there.shape, there.dtype):
                raise ValueError(
                    f"state: {variable} has shape {tuple(there.shape)}, expected "
                    f"{tuple(here.shape)} (and is {there.dtype}, expected {here.dtype})"
                )
        if not isinstance(state["iteration"], int) or state["iteration"] < 0:
            raise ValueError(f"state: iteration is {state['iteration']!r}, expected a number")
        here = {key: _kind(part) for key, part in parts.items()}
        there = state["kinds"]
        for key in sorted(set(here) | set(there)):
            if here.get(key) != there.get(key):
                raise ValueError(
                    f"state: {key} was {there.get(key)}, expected {here.get(key)} as given here"
                )
        require_state(state["parts"], *parts)
        require_state(state["values"], *self._values())

    def _load(self, state: dict) -> None:
        device = self.theta.device
        # copies: torch would go on in the given tensors, and the state be good for one load only
        for key, part in self._parts().items():
            _restore(part, copied(state["parts"][key], device if key == "solver" else None))
        for key in self._values():
            setattr(self, key, copied(state["values"][key], device))
        with torch.no_grad():
            self.lam.copy_(state["lam"])
            self.theta.copy_(state["theta"])
        self.iteration = state["iteration"]


def has_state(part: Any) -> bool:
    """True for what is resumed by a state of its own, False for a value."""
    return hasattr(part, "state_dict") or isinstance(part, torch.Generator)


def _kind(part: Any) -> str:
    """What a part is; of a shared sampler the sampler, so that any number of processes go on."""
    return type(part.sampler if isinstance(part, Shards) else part).__name__


def _state_of(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _restore(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state.cpu())
    else:
        part.load_state_dict(state)


def copied(value: Any, device: torch.device | None = None) -> Any:
    """Copy a value, lists and dicts in full, tensors to a device if one is given."""
    if isinstance(value, Tensor):
        return value.clone() if device is None else value.clone().to(device)
    if type(value) in (list, tuple):
        return type(value)(copied(item, device) for item in value)
    if type(value) is dict:
        return {key: copied(item, device) for key, item in value.items()}
    return copy.deepcopy(value)
