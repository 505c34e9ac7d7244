"""BSG-1: both second derivatives as products of first ones."""

from bilevel_lite.algorithms.method import Method
from bilevel_lite.options import not_negative, whole
from bilevel_lite.params import dot

__all__ = ["BSG1"]


class BSG1(Method):
    r"""Rank-one models of both second derivatives.

        H ~ g_theta g_theta^T,   J ~ g_lam g_theta^T,   g_theta = grad_theta g, g_lam = grad_lam g
        direction = grad_lam f - [ <grad_theta f, g_theta> / (||g_theta||^2 + floor) ] g_lam

    Ill-defined where the inner problem is solved (0 / 0): it lives on few inner steps. For one
    inner variable and a loss that is half the square of a residual a theta - r(lam), a constant, it
    is exact but for the floor (J / H = g_lam / g_theta).

    Args:
        **common: See `bilevel_lite.algorithms.method.Method`; the gradients of g are of a fresh
            inner batch.

    Cost of a step: inner_steps + 2 gradients.
    Source: Giovannelli, Kent and Vicente (2021), arXiv 2110.00604.

    Example:
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: ((theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> method = bl.BSG1(problem, torch.zeros(1), torch.ones(1), inner_lr=0.1, outer_lr=0.1)
        >>> steps = [method.step() for _ in range(100)]
        >>> method.lam.round(decimals=1)
        tensor([1.])
    """

    inner_steps: int = whole(default=1, help="Steps on theta per outer iteration")
    floor: float = not_negative(default=1e-4, help="Added to the denominator", search=(1e-6, 1e-2))

    choices = ("rank-one gradient product", "one division", "double loop")

    def _direction(self):
        inner_loss = self._inner_steps(self.inner_steps)
        g, f = self._g(self._draw("inner")), self._f(self._draw("outer"))
        ratio = dot(f.theta, g.theta) / (dot(g.theta, g.theta) + self.floor)
        return inner_loss, f.value, f.lam - ratio * g.lam, None
