"""Inner steps that unrolling differentiates: momentum, Adam, AdamW, or one of the user's own.

A step is a map with a state u (momentum, say), the gradient q = grad_theta g(lam, theta_t) and, if
it likes, lam itself:

    theta_{t+1}, u_{t+1} = step(theta_t, u_t, q_t; lam, t)

`bilevel_lite.unrolled_hypergradient` needs nothing else of it: it differentiates the map by
autograd and q by itself. So lam may be a learning rate, or a schedule of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bilevel_lite import options
from bilevel_lite.options import option

__all__ = ["SGD", "Adam", "AdamW", "Update", "window"]

State = tuple[Tensor, ...]
Rate = float | Callable[[Tensor, int], Any]


def _rate(expected: str, fits: Callable[[float], bool], default: Any = options.MISSING) -> Any:
    """A number that fits, or a function (lam, t) -> number.

    A tensor that asks for a gradient is made of lam, perhaps, and would be taken for a constant.
    """

    def right(value: Any) -> bool:
        return callable(value) or (not getattr(value, "requires_grad", False) and fits(value))

    return option(f"{expected}, or a function (lam, t) of what it depends on", right, default)


class Update:
    """An inner step of one's own: subclass it and write `step` (and `start`, if it has a state).

    Example:
        >>> class SignStep(bl.updates.Update):
        ...     def step(self, theta, state, q, lam, t):
        ...         return theta - 0.1 * torch.tanh(q / lam), state
        >>> g, f = lambda lam, theta, _: (theta**2).sum(), lambda lam, theta, _: theta.sum()
        >>> problem = bl.BilevelProblem(g, f)
        >>> lam, theta0 = torch.tensor(1.0), torch.tensor([0.5])
        >>> bl.unrolled_hypergradient(problem, lam, theta0, 1, update=SignStep()).round(decimals=4)
        tensor(0.0420)
    """

    def start(self, theta: Tensor) -> State:
        """Return u_0, a tuple of tensors like ``theta``; here the empty one."""
        return ()

    def step(
        self, theta: Tensor, state: State, q: Tensor, lam: Tensor, t: int
    ) -> tuple[Tensor, State]:
        """Return theta_{t+1} and u_{t+1}, by operations that autograd knows; write into nothing."""
        raise NotImplementedError(f"update: {type(self).__name__} has no method step")


@dataclass(frozen=True)
class _Known(Update):
    """An update whose hyperparameters are numbers or functions (lam, t) -> number."""

    lr: Rate = _rate("a positive number", lambda v: v > 0)

    def __post_init__(self):
        options.check(self)

    def at(self, name: str, lam: Tensor, t: int) -> Any:
        """Return the hyperparameter ``name`` at step t."""
        value = getattr(self, name)
        if not callable(value):
            return value
        value = value(lam, t)
        if not isinstance(value, Real | Tensor):
            got = type(value).__name__
            raise TypeError(f"{name}: its function returned {got}, expected a number or a tensor")
        return value


@dataclass(frozen=True)
class SGD(_Known):
    r"""Gradient descent with heavy-ball momentum beta and weight decay, as ``torch.optim.SGD``.

        u_{t+1} = beta u_t + q_t + weight_decay theta_t,     u_0 = 0
        theta_{t+1} = theta_t - lr u_{t+1}

    Args:
        lr: A positive number, or a function (lam, t) -> scalar, as are the others.
        momentum: beta, from 0 up to, not including, 1.
        weight_decay: Zero or positive; 2 rho of a penalty rho ||theta||^2.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> g, f = lambda lam, theta, _: (theta**2).sum(), lambda lam, theta, _: (theta**2).sum()
        >>> update = bl.updates.SGD(lr=lambda lam, t: lam, momentum=0.5)
        >>> at = bl.BilevelProblem(g, f), torch.tensor(0.1), torch.tensor([1.0])
        >>> h = bl.unrolled_hypergradient(*at, steps=2, update=update)
        >>> h.round(decimals=4)  # theta_2 = 1 - 5 lr + 4 lr^2, so that h = 2 theta_2 (8 lr - 5)
        tensor(-4.5360)
    """

    momentum: Rate = _rate("a number from 0 up to, not including, 1", lambda v: 0 <= v < 1, 0.0)
    weight_decay: Rate = _rate("a number that is zero or positive", lambda v: v >= 0, 0.0)

    def start(self, theta: Tensor) -> State:
        """Return the momentum's zeros; nothing where momentum is the number 0."""
        return () if self.momentum == 0 else (torch.zeros_like(theta),)

    def step(self, theta, state, q, lam, t):
        """Return the step above."""
        u = q
        if self.weight_decay != 0:
            u = u + self.at("weight_decay", lam, t) * theta
        if state:
            u = self.at("momentum", lam, t) * state[0] + u
        return theta - self.at("lr", lam, t) * u, (u,) if state else ()


def _root(s: Tensor) -> Tensor:
    """sqrt(s) for s >= 0 with derivative 0 where s = 0: there the gradient has been 0 so far."""
    return torch.where(s > 0, torch.where(s > 0, s, 1).sqrt(), 0)


@dataclass(frozen=True)
class Adam(_Known):
    r"""Adam with bias correction, as ``torch.optim.Adam``.

        m <- beta1 m + (1 - beta1) q,   s <- beta2 s + (1 - beta2) q^2
        m_hat = m / (1 - beta1^(t+1)),      s_hat = s / (1 - beta2^(t+1))
        theta <- theta - lr m_hat / (sqrt(s_hat) + eps)

    The map is steep where q is of the size of eps, slope lr / eps, and so is its derivative.

    Args:
        lr: A positive number, or a function (lam, t) -> scalar, as are the others.
        beta1: From 0 up to, not including, 1.
        beta2: The same.
        eps: A positive number.
        weight_decay: Its product with theta is added to q.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> g, f = lambda lam, theta, _: lam * theta.sum(), lambda lam, theta, _: theta.sum()
        >>> at = bl.BilevelProblem(g, f), torch.tensor(1.0), torch.zeros(1)
        >>> h = bl.unrolled_hypergradient(*at, steps=5, update=bl.updates.Adam(0.1))
        >>> h.abs() < 1e-6  # Adam divides the size of the gradient out, and lam with it
        tensor(True)
    """

    beta1: Rate = _rate("a number from 0 up to, not including, 1", lambda v: 0 <= v < 1, 0.9)
    beta2: Rate = _rate("a number from 0 up to, not including, 1", lambda v: 0 <= v < 1, 0.999)
    eps: Rate = _rate("a positive number", lambda v: v > 0, 1e-8)
    weight_decay: Rate = _rate("a number that is zero or positive", lambda v: v >= 0, 0.0)

    def start(self, theta: Tensor) -> State:
        """Return zeros for m and s, and ones for the products of the betas so far."""
        one = torch.ones((), dtype=theta.dtype, device=theta.device)
        return torch.zeros_like(theta), torch.zeros_like(theta), one, one

    def _decayed(self, theta, q, lam, t):
        """theta before the step and the gradient that the moments see."""
        return theta, q + self.at("weight_decay", lam, t) * theta

    def step(self, theta, state, q, lam, t):
        """Return the step above."""
        m, s, p1, p2 = state
        b1, b2 = self.at("beta1", lam, t), self.at("beta2", lam, t)
        theta, q = self._decayed(theta, q, lam, t)
        m, s = b1 * m + (1 - b1) * q, b2 * s + (1 - b2) * q**2
        p1, p2 = b1 * p1, b2 * p2  # beta^(t+1), also where beta is a schedule
        scale = _root(s) / (1 - p2) ** 0.5 + self.at("eps", lam, t)
        return theta - self.at("lr", lam, t) * (m / (1 - p1)) / scale, (m, s, p1, p2)


class AdamW(Adam):
    r"""`Adam` with decoupled weight decay, as ``torch.optim.AdamW``.

    Before the step theta <- (1 - lr weight_decay) theta, and the moments see q alone.
    torch's default weight decay is 0.01; here it is 0.

    Example:
        >>> g, f = lambda lam, theta, _: 0 * theta.sum(), lambda lam, theta, _: theta.sum()
        >>> update = bl.updates.AdamW(0.1, weight_decay=lambda lam, t: lam)
        >>> at = bl.BilevelProblem(g, f), torch.tensor(2.0), torch.ones(1)
        >>> bl.unrolled_hypergradient(*at, steps=2, update=update)  # theta_2 = (1 - 0.1 lam)^2
        tensor(-0.1600)
    """

    def _decayed(self, theta, q, lam, t):
        return theta - self.at("lr", lam, t) * self.at("weight_decay", lam, t) * theta, q


def window(t: int, steps: int, values: int) -> int:
    """Which of ``values`` neighbouring windows of ``steps`` steps holds step t: floor(n t / T)."""
    return values * t // steps
