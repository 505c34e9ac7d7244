"""BVFSM: the value function as an interior-point constraint."""

import math
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import (
    Method,
    require_plain_inner,
    require_positive,
)
from bilevel_lite.linsolve import at_least
from bilevel_lite.problem import BilevelProblem, NotFinite
from bilevel_lite.products import dot, gradient, theta_gradient
from bilevel_lite.same_function import SameDraws

__all__ = ["BVFSM"]


class BVFSM(Method):
    r"""Value-function sequential minimisation: a barrier keeps theta nearly optimal for g.

        z     <- steps on g(lam, z) + mu_k ||z||^2;        value V = g(lam, z) + mu_k ||z||^2
        theta <- steps on f(lam, theta) - nu_k log( V + slack_k - g(lam, theta) )
        lam   <- a step with the gradient of the same expression, V's own dependence on lam included

    mu, nu and slack shrink as (1 + k)^(-decay). What is left of them is the bias: with mu = 0 and
    nu and slack in a fixed proportion it falls as sqrt(slack), since g(lam, theta) may exceed its
    minimum by the slack. Shrink them no faster than inner_steps can follow: the barrier's curvature
    grows as 1 / nu.

    The barrier needs a positive gap V + slack - g(lam, theta): where theta has lost it (lam moved),
    theta starts again from z, which has it. No fixed step serves a barrier: a step on theta is
    halved until the gap stays positive and the expression falls enough (Armijo's rule), and the
    next step starts from there.

    (Ports of the method in other code take the gap's value to be g(z) + constant always, which
    turns the barrier into a penalty. This is the barrier as written; the paper's further, vanishing
    ||theta||^2, for an f without a minimum of its own, is left out.)

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
            descent: give ``inner_lr``, the step on z and the first that is tried on theta.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an option out of range, and in `step` for
            a slack that has become too small for g's rounding.

    Cost of a step: 3 inner_steps + 3 gradients, and a forward pass (half a gradient) for each look
    at g, and at f where the gap is positive.
    Source: Liu et al. (2021), arXiv 2106.07991 and 2110.04974.
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
        at_least("inner_steps", inner_steps, 1)
        require_positive("nu", nu)
        require_positive("slack", slack)
        for name, value in (("mu", mu), ("decay", decay)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: got {value}, expected a number that is zero or positive")
        require_plain_inner(type(self).__name__, common)
        super().__init__(problem, lam, theta, **common)
        self.inner_steps, self.mu, self.nu, self.slack = inner_steps, mu, nu, slack
        self.decay, self.z = decay, self.theta.clone()
        self._same = (problem.inner_loss, problem.outer_loss)

    def _direction(self):
        # every value below is compared with another, so all are of one g and one f
        g, f = SameDraws(self.problem.inner_loss), SameDraws(self.problem.outer_loss)
        self._same, lam = (g, f), self.lam
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
            lr = self._descend(level, nu, lr, inner, outer)
        self._set_theta(self.theta)
        here, here_lam, _ = gradient(g, lam, self.theta, inner, "inner_loss")
        outer_loss, direct, _ = gradient(f, lam, self.theta, outer, "outer_loss")
        self._spend("gradient", inner)
        self._spend("gradient", outer)
        return here, outer_loss, direct + nu / (level - here) * (here_lam - value_lam), None

    def _descend(self, level: Tensor, nu: float, lr: float, inner: Any, outer: Any) -> float:
        """One step on f - nu log(level - g) by backtracking from ``lr``; the next one's ``lr``."""
        (g, f), lam = self._same, self.lam
        here, g_theta = theta_gradient(g, lam, self.theta, inner, "inner_loss")
        loss, f_theta = theta_gradient(f, lam, self.theta, outer, "outer_loss")
        self._spend("gradient", inner)
        self._spend("gradient", outer)
        gap = float(level - here)
        if not gap > 0:
            raise NotFinite(
                f"slack: is lost in the rounding of g = {float(here):.3g} at step "
                f"{self.iteration + 1}; give a larger slack or a smaller decay"
            )
        slope = f_theta + nu / gap * g_theta
        value, steep = float(loss) - nu * math.log(gap), float(dot(slope, slope))
        if not math.isfinite(steep):
            raise NotFinite(f"direction for theta: its squared norm is {steep}")
        # below the rounding of the two losses no fall can be seen
        seen = float(loss.abs()) + nu * (abs(math.log(gap)) + float(level.abs()) / gap)
        enough = value + 4 * torch.finfo(self.theta.dtype).eps * seen
        first, trial = lr, self.theta - lr * slope
        while not self._barrier(level, nu, trial, inner, outer) <= enough - lr / 4 * steep:
            lr /= 2
            if lr < torch.finfo(self.theta.dtype).tiny:
                raise NotFinite("direction for theta: no step along it lowers the barrier")
            trial = self.theta - lr * slope
        self.theta.copy_(trial)
        top = self.inner_optimizer.param_groups[0]["lr"]
        return min(2 * lr, top) if lr == first else lr

    def _barrier(self, level: Tensor, nu: float, theta: Tensor, inner: Any, outer: Any) -> float:
        gap = self._gap(level, theta, inner)
        if not gap > 0:
            return math.inf
        self._spend(0.5, outer)
        with torch.no_grad():
            return float(self._same[1](self.lam, theta, outer)) - nu * math.log(gap)

    def _gap(self, level: Tensor, theta: Tensor, batch: Any) -> float:
        """V + slack - g(lam, theta): half a gradient, and the barrier's argument."""
        self._spend(0.5, batch)
        with torch.no_grad():
            return float(level - self._same[0](self.lam, theta, batch))
