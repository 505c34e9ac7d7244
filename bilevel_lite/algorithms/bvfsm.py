"""BVFSM: the value function as an interior-point constraint."""

import math
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import (
    Method,
    require_plain_inner,
    require_positive,
    require_steps,
)
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import gradient, theta_gradient

__all__ = ["BVFSM"]


class BVFSM(Method):
    r"""Value-function sequential minimisation: a barrier keeps theta nearly optimal for g.

        z     <- steps on g(lam, z) + mu_k ||z||^2;        value V = g(lam, z) + mu_k ||z||^2
        theta <- steps on f(lam, theta) - nu_k log( V + slack_k - g(lam, theta) )
        lam   <- a step with the gradient of the same expression, V's own dependence on lam included

    mu, nu and slack shrink as (1 + k)^(-decay); what is left of them is the bias. The barrier needs
    a positive gap V + slack - g(lam, theta): where theta has lost it (lam moved), theta starts
    again from z, which has it; and a step that would lose it is halved until it does not.

    (Ports of the method in other code take the gap's value to be g(z) + constant always, which
    turns the barrier into a penalty. This is the barrier as written.)

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied. z starts there too.
        inner_steps: Steps on z, and on theta.
        mu: Weight of ||z||^2 at the start; zero for a strongly convex g.
        nu: Weight of the barrier at the start.
        slack: At the start.
        decay: Power with which the three shrink.
        **common: See `bilevel_lite.algorithms.method.Method`. The inner level is plain gradient
            descent: give ``inner_lr``.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an option out of range.

    Cost of a step: 3 inner_steps + 3 gradients, and a forward pass (half a gradient) for each look
    at the gap.
    Source: Liu et al. (2021), arXiv 2106.07991.
    """

    choices = ("none: the value of g", "none", "double loop, barrier")
    remembers = ("z",)

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        inner_steps: int = 10,
        mu: float = 0.0,
        nu: float = 0.1,
        slack: float = 0.1,
        decay: float = 0.5,
        **common: Any,
    ):
        require_steps("inner_steps", inner_steps)
        require_positive("nu", nu)
        require_positive("slack", slack)
        for name, value in (("mu", mu), ("decay", decay)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: got {value}, expected a number that is zero or positive")
        require_plain_inner(type(self).__name__, common)
        super().__init__(problem, lam, theta, **common)
        self.inner_steps, self.mu, self.nu, self.slack = inner_steps, mu, nu, slack
        self.decay, self.z = decay, self.theta.clone()

    def _direction(self):
        g, f, lam = self.problem.inner_loss, self.problem.outer_loss, self.lam
        lr = self.inner_optimizer.param_groups[0]["lr"]
        shrink = (1 + self.iteration) ** -self.decay
        mu, nu, slack = self.mu * shrink, self.nu * shrink, self.slack * shrink
        inner, outer = self._draw("inner"), self._draw("outer")
        for _ in range(self.inner_steps):
            step = theta_gradient(g, lam, self.z, inner, "inner_loss")[1] + 2 * mu * self.z
            self.z = self.z - lr * step
        value, value_lam, _ = gradient(g, lam, self.z, inner, "inner_loss")
        level = value + mu * self.z.square().sum() + slack
        self._spend("gradient", inner, times=self.inner_steps + 1)

        if self._gap(level, self.theta, inner) <= 0:
            self.theta.copy_(self.z)
        for _ in range(self.inner_steps):
            here, g_theta = self._inner_gradient(inner)
            self._spend("gradient", outer)
            f_theta = theta_gradient(f, lam, self.theta, outer, "outer_loss")[1]
            step = lr * (f_theta + nu / (level - here) * g_theta)
            while self._gap(level, self.theta - step, inner) <= 0:
                step = step / 2
            self.theta -= step
        here, here_lam, _ = gradient(g, lam, self.theta, inner, "inner_loss")
        self._spend("gradient", inner)
        outer_loss, direct, _ = self._outer_gradient(outer)
        return here, outer_loss, direct + nu / (level - here) * (here_lam - value_lam), None

    def _gap(self, level: Tensor, theta: Tensor, batch: Any) -> float:
        """V + slack - g(lam, theta): half a gradient, and the barrier's argument."""
        self._spend(0.5, batch)
        with torch.no_grad():
            return float(level - self.problem.inner_loss(self.lam, theta, batch))
