"""Schedules of learning rate, momentum and weight decay, learned through the whole training.

The steps of a training are cut into windows, each with one value of the rate, which then is an
outer variable like any other: forward mode carries one column d theta_t / d value for each of
them, however long the training. A window of many steps has few columns and averages the noise of
its steps; it also hides what they want apart.
"""

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.problem import BilevelProblem
from bilevel_lite.refuse import at_least, require_finite, require_state, require_variable
from bilevel_lite.unroll import UnrollInfo, unrolled_hypergradient
from bilevel_lite.updates import SGD, window

__all__ = ["RATES", "SignSteps", "forward_schedule"]

RATES = ("lr", "momentum", "weight_decay")
Schedule = Tensor | float


def forward_schedule(
    problem: BilevelProblem,
    theta0: Tensor,
    steps: int,
    lr: Schedule,
    momentum: Schedule = 0.0,
    weight_decay: Schedule = 0.0,
    inner_batch: Any = None,
    outer_batch: Any = None,
    mode: str = "forward",
) -> tuple[dict[str, Tensor], UnrollInfo]:
    r"""The derivative of the outer loss after T steps of `SGD` in every value of its schedules.

        u_{t+1} = beta u_t + q_t + weight_decay theta_t,     theta_{t+1} = theta_t - lr u_{t+1}
        a schedule of n values gives step t its value number floor(n t / T)

    Forward mode, with H_t the Hessian of the step's batch, D = d theta / d value and S = d u / d
    value; what stands in brackets is for the value whose window the step is in:

        S <- beta S + H_t D + weight_decay D   (+ u_t for a momentum, + theta_t for a weight decay)
        D <- D - lr S                          (- u_{t+1} for a learning rate)

    Args:
        problem: The two losses, called with the schedules' values as one flat ``lam``, which they
            need not use.
        theta0: Start, shape (d,).
        steps: T.
        lr: A tensor of n values, one a window, whose derivative is wanted; or a fixed number. The
            same holds of the next two. Values of a tensor are not checked: a step may leave the
            range of a fixed number.
        momentum: beta.
        weight_decay: As of `SGD`.
        inner_batch: As in `bilevel_lite.unrolled_hypergradient`, one for each step.
        outer_batch: Batch of f.
        mode: ``"forward"``, or ``"reverse"`` for the same numbers the other way.

    Returns:
        By name, the derivative in each schedule that is a tensor, of its shape, dtype and device;
        and an `UnrollInfo`. Public code divides by the steps of a window; this is the derivative
        itself.

    Raises:
        TypeError, ValueError: as `bilevel_lite.unrolled_hypergradient`; if no schedule is a
            tensor, one is not flat or has more values than there are steps.

    Cost: forward, 2 gradients per step and value, from the value's first window on. Source:
    Micaelli and Storkey (2021), arXiv 2007.07869, algorithm 1.

    Example:
        >>> from bilevel_lite.schedules import forward_schedule
        >>> g, f = lambda lam, theta, _: (theta**2).sum() / 2, lambda lam, theta, _: theta.sum()
        >>> problem, theta0 = bl.BilevelProblem(g, f), torch.tensor([1.0])
        >>> h, info = forward_schedule(problem, theta0, steps=2, lr=torch.tensor([0.1, 0.3]))
        >>> h["lr"]  # theta_2 = (1 - lr_0) (1 - lr_1)
        tensor([-0.7000, -0.9000])
    """
    at_least("steps", steps, 1)
    require_variable("theta0", theta0)
    given = dict(zip(RATES, (lr, momentum, weight_decay), strict=True))
    learned = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if not learned:
        raise ValueError(f"lr: got {lr!r}, expected a tensor of values for one of {list(RATES)}")
    rates: dict[str, Any] = {k: v for k, v in given.items() if k not in learned}
    first = 0
    for name, values in learned.items():
        require_variable(name, values)
        if values.dim() != 1 or not 1 <= len(values) <= steps:
            raise ValueError(
                f"{name}: got shape {tuple(values.shape)}, expected (n,) with n from 1 to the "
                f"{steps} steps"
            )
        rates[name] = _windowed(first, len(values), steps)
        first += len(values)
    lam = torch.cat([values.detach().to(theta0) for values in learned.values()])
    h, info = unrolled_hypergradient(
        problem, lam, theta0, steps, mode=mode, inner_batch=inner_batch, outer_batch=outer_batch,
        update=SGD(**rates), return_info=True,
    )  # fmt: skip
    parts = h.split([len(values) for values in learned.values()])
    named = zip(learned.items(), parts, strict=True)
    return {name: part.to(values) for (name, values), part in named}, info


def _windowed(first: int, values: int, steps: int):
    return lambda lam, t: lam[first + window(t, steps, values)]


BOUNDS = {"lr": (0.0, float("inf")), "momentum": (0.0, 0.999), "weight_decay": (0.0, float("inf"))}


def _is_number(value: Any) -> bool:
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real or isinstance(value, Tensor) and value.dim() == 0


def _require_bounds(name: str, pair: Any) -> None:
    two = isinstance(pair, tuple | list) and len(pair) == 2 and all(map(_is_number, pair))
    if not two or not pair[0] <= pair[1]:
        raise ValueError(
            f"bounds: got {pair!r} for {name}, expected (least, most), two numbers in order; "
            "infinite ones for no bound"
        )


@dataclass
class SignSteps:
    r"""Outer steps by signs alone: what is left of a derivative whose size spans many decades.

        s_j <- s_j / 2 where h_j has changed its sign
        value_j <- the nearest in its bounds to value_j - s_j sign(h_j)

    Args:
        values: By name, each a flat tensor; replaced at each step.
        sizes: By name, the s of all its values at the start.
        bounds: By name, (least, most); by default rates are not negative, momentum is at most
            0.999. Public code has no bounds, so that a rate may become negative.

    Raises:
        TypeError: if a value is no floating-point tensor, or one of the three no dict.
        ValueError: if a size is not finite and positive, bounds are not two numbers in order, or
            names differ.

    Cost: none. Source: Micaelli and Storkey (2021), arXiv 2007.07869; the bounds are ours.

    Example:
        >>> from bilevel_lite.schedules import SignSteps
        >>> outer = SignSteps({"lr": torch.zeros(2)}, {"lr": 0.1})
        >>> for h in ([-3.0, 2.0], [0.5, -1e-6]):
        ...     outer.step({"lr": torch.tensor(h)})
        >>> outer.values["lr"]  # 0 -> 0.1 -> 0.05 and, held at its bound, 0 -> 0 -> 0.05
        tensor([0.0500, 0.0500])
    """

    values: dict[str, Tensor]
    sizes: dict[str, float]
    bounds: dict[str, tuple[float, float]] = field(default_factory=lambda: dict(BOUNDS))

    def __post_init__(self):
        for part in ("values", "sizes", "bounds"):
            if not isinstance(given := getattr(self, part), dict):
                raise TypeError(f"{part}: got {type(given).__name__}, expected a dict by name")
        for name, value in self.values.items():
            require_variable(name, value)
        self.values = {name: value.detach() for name, value in self.values.items()}
        if set(self.values) != set(self.sizes) or not set(self.values) <= set(self.bounds):
            raise ValueError(
                f"sizes: got {sorted(self.sizes)}, expected {sorted(self.values)}, each with bounds"
            )
        for name, size in self.sizes.items():
            if not _is_number(size) or not 0 < size < math.inf:
                raise ValueError(
                    f"sizes: got {size!r} for {name}, expected a finite positive number"
                )
        for name in self.values:
            _require_bounds(name, self.bounds[name])
        self.size = {k: torch.full_like(v, float(self.sizes[k])) for k, v in self.values.items()}
        self.sign = {k: torch.zeros_like(v) for k, v in self.values.items()}

    def step(self, h: dict[str, Tensor]) -> None:
        """Change the values by one step against the derivatives ``h``.

        Raises:
            TypeError: if one is no floating-point tensor.
            ValueError: if one is missing or has another shape than its values.
            NotFinite: if one is not finite: its sign would mean nothing.
        """
        self._require_like("h", h)
        require_finite({f"h of {name}": value for name, value in h.items()})
        for name, value in self.values.items():
            sign = h[name].detach().sign().to(value)  # values keep their type and place
            size = self.size[name]
            self.size[name] = torch.where(sign * self.sign[name] < 0, size / 2, size)
            self.sign[name] = torch.where(sign == 0, self.sign[name], sign)
            least, most = map(float, self.bounds[name])
            self.values[name] = (value - self.size[name] * sign).clamp(least, most)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that the next step depends on."""
        return {p: {k: v.clone() for k, v in getattr(self, p).items()} for p in self._parts}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            TypeError, ValueError: if it is of other values; then nothing is changed.
        """
        require_state(state, *self._parts)
        for part in self._parts:
            self._require_like(f"state: {part}", state[part])
        for part in self._parts:
            kept = {k: v.detach().to(self.values[k], copy=True) for k, v in state[part].items()}
            setattr(self, part, kept)

    _parts = ("values", "size", "sign")

    def _require_like(self, what: str, given: dict[str, Tensor]) -> None:
        """Refuse what is not one tensor for each of the values, of its shape."""
        if not isinstance(given, dict):
            names = sorted(self.values)
            raise TypeError(f"{what}: got {type(given).__name__}, expected a dict of {names}")
        for name, value in given.items():
            require_variable(f"{what} of {name}", value)
        shapes = [{k: tuple(v.shape) for k, v in some.items()} for some in (given, self.values)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{what}: got shapes {shapes[0]}, expected {shapes[1]}")
