"""stocBiO: a Neumann series whose every factor sees its own batch."""

from bilevel_lite.algorithms.method import Method
from bilevel_lite.linsolve import neumann
from bilevel_lite.options import positive, whole

__all__ = ["StocBiO"]


class StocBiO(Method):
    r"""Stochastic approximate implicit differentiation with a stochastic Neumann product.

        theta <- inner_steps optimiser steps on g(lam, .)
        v     = linear_lr sum_{q=0}^{terms-1} prod_{j=1}^{q} (I - linear_lr H(batch_j)) b
        lam   <- lam - outer_lr (grad_lam f - J v)

    Each H has a fresh batch: where these are drawn independently, the mean of a product is the
    product of the means, and v is unbiased for the series with the mean H. (Batches drawn without
    replacement within a pass are not quite independent. Released code leaves out the first summand
    and the factor ``linear_lr`` of the others; this is the sum as written. ``terms`` counts
    summands; the paper's Q is terms - 1.)

    Cost of a step: inner_steps + 1 gradients, terms - 1 products, 1 cross product.
    Source: Ji, Yang and Liang (2021), arXiv 2010.07962.

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.StocBiO(problem, lam, theta, inner_lr=0.3, outer_lr=0.3)
        >>> steps = [method.step() for _ in range(40)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    inner_steps: int = whole(default=10, help="T, steps on theta per outer iteration")
    terms: int = whole(default=4, help="Summands of the series, one more than products")
    linear_lr: float = positive(
        default=0.1, help="Step of the series, below 2 / largest curvature", search=(0.02, 1.0)
    )

    choices = ("Hessian, a batch a factor", "Neumann series", "double loop")
    roles = ("inner", "outer", "curvature", "cross")
    step_sizes = ("linear_lr",)

    def _direction(self):
        inner_loss = self._inner_steps(self.inner_steps)
        f = self._f(self._draw("outer"))
        v = neumann(self._fresh_hessian, f.theta, self.terms, self.linear_lr).solution
        jv = self._cross(self._draw("cross"), v)
        return inner_loss, f.value, f.lam - jv, None
