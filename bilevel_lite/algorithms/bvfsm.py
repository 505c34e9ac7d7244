"""BVFSM: the value function as an interior-point constraint."""

import math

import torch

from bilevel_lite.algorithms.method import Method
from bilevel_lite.options import not_negative, positive, whole
from bilevel_lite.params import dot
from bilevel_lite.refuse import NotFinite

__all__ = ["BVFSM"]


class BVFSM(Method):
    r"""Value-function sequential minimisation: a barrier keeps theta nearly optimal for g.

        z     <- steps on g(lam, z) + mu_k ||z||^2;        value V = g(lam, z) + mu_k ||z||^2
        theta <- steps on f(lam, theta) - nu_k log( V + slack_k - g(lam, theta) )
        lam   <- a step with the gradient of the same expression, V's own dependence on lam included

    mu, nu and slack shrink as (1 + k)^(-decay); no faster than inner_steps can follow, for the
    barrier's curvature grows as 1 / nu. What is left of them is the bias: with mu = 0 and nu and
    slack in a fixed proportion it falls as sqrt(slack), by which g may exceed its minimum.

    The barrier needs a positive gap V + slack - g(lam, theta): where theta lost it as lam moved, it
    starts again from z. A step on theta, at first inner_lr as those on z, is halved until the gap
    stays positive and the expression falls enough (Armijo's rule); the next starts from there.
    Other code takes the gap's value to be g(z) + constant, which makes the barrier a penalty. The
    paper's further, vanishing ||theta||^2, for an f without a minimum of its own, is left out.

    Cost of a step: 3 inner_steps + 3 gradients, half a one for a look at g, or at f where gap > 0.
    Source: Liu et al. (2021), arXiv 2106.07991 and 2110.04974.

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.BVFSM(problem, lam, theta, inner_lr=0.1, outer_lr=0.1)
        >>> steps = [method.step() for _ in range(50)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    inner_steps: int = whole(default=10, help="Steps on z, and on theta")
    mu: float = not_negative(default=0.0, help="Weight of ||z||^2; 0 for a strongly convex g")
    nu: float = positive(default=0.1, help="Weight of the barrier at the start", search=(0.01, 1.0))
    slack: float = positive(default=0.1, help="At the start", search=(0.01, 1.0))
    decay: float = not_negative(default=0.5, help="Power with which the three shrink")

    choices = ("none: the value of g", "none", "double loop, barrier")
    remembers = ("z",)
    plain_inner = True

    def __post_init__(self):
        super().__post_init__()
        self.z = self.theta.clone()

    def _direction(self):
        lr, shrink = self._lr, float((1.0 + self.iteration) ** -self.decay)
        mu, nu, slack = self.mu * shrink, self.nu * shrink, self.slack * shrink
        inner, outer = self._draw("inner"), self._draw("outer")
        with self._same_draws():  # each value is compared with another: all are of one g, one f
            for _ in range(self.inner_steps):
                self.z = self.z - lr * (self._g_theta(inner, self.z)[1] + 2 * mu * self.z)
            best = self._g(inner, self.z)
            level = best.value + mu * self.z.square().sum() + slack
            if level <= self._value("inner_loss", inner, self.theta):
                self.theta.copy_(self.z)
            for _ in range(self.inner_steps):
                lr = self._descend(level, nu, lr, inner, outer)
            self._set_theta(self.theta)
            here, f = self._g(inner), self._f(outer)
        return here.value, f.value, f.lam + nu / (level - here.value) * (here.lam - best.lam), None

    def _descend(self, level, nu, lr, inner, outer):
        """One step on f - nu log(level - g) by backtracking from ``lr``; the next one's ``lr``."""
        (here, g_theta), (loss, f_theta) = self._g_theta(inner), self._f_theta(outer)
        gap = float(level - here)
        if not gap > 0:
            raise NotFinite(f"slack: is lost in the rounding of g = {here:.3g}; give a larger one")
        slope = f_theta + nu / gap * g_theta
        value, steep = float(loss) - nu * math.log(gap), float(dot(slope, slope))
        # below the rounding of the two losses no fall can be seen
        seen = float(loss.abs()) + nu * (abs(math.log(gap)) + float(level.abs()) / gap)
        enough = value + 4 * torch.finfo(self.theta.dtype).eps * seen
        first = lr
        while lr >= torch.finfo(self.theta.dtype).tiny and math.isfinite(steep):
            trial = self.theta - lr * slope
            if self._barrier(level, nu, trial, inner, outer) <= enough - lr / 4 * steep:
                self.theta.copy_(trial)
                return min(2 * lr, self._lr) if lr == first else lr
            lr /= 2
        raise NotFinite(f"direction for theta: no step along it, squared norm {steep:.3g}, helps")

    def _barrier(self, level, nu, theta, inner, outer):
        gap = float(level - self._value("inner_loss", inner, theta))
        if not gap > 0:
            return math.inf
        return float(self._value("outer_loss", outer, theta)) - nu * math.log(gap)
