"""stocBiO: a Neumann series whose every factor sees its own batch."""

from typing import Any

from torch import Tensor

from bilevel_lite.algorithms.method import Method, require_positive
from bilevel_lite.linsolve import at_least
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import cross_vp, hvp

__all__ = ["StocBiO"]


class StocBiO(Method):
    r"""Stochastic approximate implicit differentiation with a stochastic Neumann product.

        theta <- inner_steps optimiser steps on g(lam, .)
        v     = step sum_{q=0}^{terms-1} prod_{j=1}^{q} (I - step H(batch_j)) b
        lam   <- lam - outer_lr (grad_lam f - J v)

    Each H has a fresh batch: where these are drawn independently, the mean of a product is the
    product of the means, and v is unbiased for the series with the mean H. (Batches drawn without
    replacement within a pass are not quite independent. Released code leaves out the first summand
    and the factor ``step`` of the others; this is the sum as written. ``terms`` counts summands;
    the paper's Q is terms - 1.)

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied.
        inner_steps: T, steps on theta per outer iteration.
        terms: Summands of the series; terms - 1 products.
        step: Of the series, below 2 / largest curvature.
        **common: See `bilevel_lite.algorithms.method.Method`.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an option out of range.

    Cost of a step: inner_steps + 1 gradients, terms - 1 products, 1 cross product.
    Source: Ji, Yang and Liang (2021), arXiv 2010.07962.
    """

    choices = ("Hessian, a batch a factor", "Neumann series", "double loop")
    roles = ("inner", "outer", "curvature", "cross")
    step_sizes = {"step": "series_step"}

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        inner_steps: int = 10,
        terms: int = 4,
        step: float = 0.1,
        **common: Any,
    ):
        at_least("inner_steps", inner_steps, 1)
        at_least("terms", terms, 1)
        require_positive("step", step)
        super().__init__(problem, lam, theta, **common)
        self.inner_steps, self.terms, self.series_step = inner_steps, terms, step

    def _direction(self):
        inner_loss = self._inner_steps(self.inner_steps)
        outer_loss, direct, b = self._outer_gradient(self._draw("outer"))
        loss, at = self.problem.inner_loss, (self.lam, self.theta)
        p, total = b.clone(), b.clone()
        for _ in range(self.terms - 1):
            batch = self._draw_curvature()
            self._spend("hvp", batch)
            p.sub_(hvp(loss, *at, batch, p), alpha=self.series_step)
            total.add_(p)
        cross = self._draw("cross" if self.batches["cross"] is not None else "inner")
        self._spend("cross", cross)
        jv = cross_vp(loss, *at, cross, self.series_step * total)
        return inner_loss, outer_loss, direct - jv, None
