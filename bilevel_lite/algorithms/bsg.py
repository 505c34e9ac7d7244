"""BSG-1: both second derivatives as products of first ones."""

from typing import Any

from torch import Tensor

from bilevel_lite.algorithms.method import Method
from bilevel_lite.linsolve import at_least
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import dot, gradient

__all__ = ["BSG1"]


class BSG1(Method):
    r"""Rank-one models of both second derivatives.

        H ~ g_theta g_theta^T,   J ~ g_lam g_theta^T,   g_theta = grad_theta g, g_lam = grad_lam g
        direction = grad_lam f - [ <grad_theta f, g_theta> / (||g_theta||^2 + floor) ] g_lam

    Ill-defined where the inner problem is solved (0 / 0): it lives on few inner steps. For one
    inner variable and a loss that is half the square of a residual a theta - r(lam), a constant, it
    is exact but for the floor (J / H = g_lam / g_theta).

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied.
        inner_steps: Steps on theta per outer iteration.
        floor: Added to the denominator.
        **common: See `bilevel_lite.algorithms.method.Method`; the gradients of g are of a fresh
            inner batch.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an option out of range.

    Cost of a step: inner_steps + 2 gradients.
    Source: Giovannelli, Kent and Vicente (2021), arXiv 2110.00604.
    """

    choices = ("rank-one gradient product", "one division", "double loop")

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        inner_steps: int = 1,
        floor: float = 1e-4,
        **common: Any,
    ):
        at_least("inner_steps", inner_steps, 1)
        if not floor >= 0:
            raise ValueError(f"floor: got {floor}, expected a number that is zero or positive")
        super().__init__(problem, lam, theta, **common)
        self.inner_steps, self.floor = inner_steps, floor

    def _direction(self):
        inner_loss = self._inner_steps(self.inner_steps)
        batch = self._draw("inner")
        self._spend("gradient", batch)
        _, g_lam, g_theta = gradient(
            self.problem.inner_loss, self.lam, self.theta, batch, "inner_loss"
        )
        outer_loss, direct, b = self._outer_gradient(self._draw("outer"))
        ratio = dot(b, g_theta) / (dot(g_theta, g_theta) + self.floor)
        return inner_loss, outer_loss, direct - ratio * g_lam, None
