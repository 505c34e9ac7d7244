"""F2SA: a penalty on the inner problem's gap, with no second derivative anywhere."""

from typing import Any

from torch import Tensor

from bilevel_lite.algorithms.method import (
    Method,
    require_plain_inner,
    require_positive,
)
from bilevel_lite.linsolve import at_least
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import gradient, theta_gradient
from bilevel_lite.same_function import SameDraws

__all__ = ["F2SA"]


class F2SA(Method):
    r"""Fully first-order: min over lam of  min_theta max_z  f(lam, theta) + c [g(theta) - g(z)].

        inner_steps times:  z     <- z - inner_lr grad_theta g(lam, z)
                            theta <- theta - inner_lr (grad_theta f / c + grad_theta g)(lam, theta)
        lam <- lam - outer_lr ( grad_lam f(theta) + c [grad_lam g(theta) - grad_lam g(z)] )
        c   <- c + growth

    At convergence the direction misses the hypergradient by O(1 / c). theta's step is inner_lr / c
    on the penalised loss, whose curvature grows with c. The two values of grad_lam g are taken on
    one batch and subtracted: at a large c that loses digits in float32.

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied. z starts there too.
        inner_steps: T.
        penalty: c at the start.
        growth: Added to c after each outer iteration.
        **common: See `bilevel_lite.algorithms.method.Method`. The inner level is plain gradient
            descent: give ``inner_lr``.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an option out of range.

    Cost of a step: 3 inner_steps + 3 gradients.
    Source: Kwon et al. (2023), arXiv 2301.10945.
    """

    choices = ("none: a penalty", "none", "double loop, two inner problems")
    remembers = ("z", "penalty")

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        inner_steps: int = 10,
        penalty: float = 1.0,
        growth: float = 0.1,
        **common: Any,
    ):
        at_least("inner_steps", inner_steps, 1)
        require_positive("penalty", penalty)
        if not growth >= 0:
            raise ValueError(f"growth: got {growth}, expected a number that is zero or positive")
        require_plain_inner(type(self).__name__, common)
        super().__init__(problem, lam, theta, **common)
        self.inner_steps, self.penalty, self.growth = inner_steps, penalty, growth
        self.z = self.theta.clone()

    def _direction(self):
        g, lr = self.problem.inner_loss, self.inner_optimizer.param_groups[0]["lr"]
        for _ in range(self.inner_steps):
            batch = self._draw("inner")
            self._spend("gradient", batch)
            self.z = self.z - lr * theta_gradient(g, self.lam, self.z, batch, "inner_loss")[1]
            inner_loss, g_theta = self._inner_gradient(batch)
            _, _, f_theta = self._outer_gradient(self._draw("outer"))
            self._move_theta(f_theta / self.penalty + g_theta)
        outer_loss, direct, _ = self._outer_gradient(self._draw("outer"))
        batch, g = self._draw("inner"), SameDraws(g)
        self._spend("gradient", batch, times=2)
        here = gradient(g, self.lam, self.theta, batch, "inner_loss")[1]
        there = gradient(g, self.lam, self.z, batch, "inner_loss")[1]
        h = direct + self.penalty * (here - there)
        self.penalty += self.growth
        return inner_loss, outer_loss, h, None
