"""BOME: the inner problem as a constraint on its value, first order only."""

from typing import Any

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import Method, require_positive
from bilevel_lite.linsolve import at_least
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import dot, gradient, theta_gradient
from bilevel_lite.same_function import SameDraws

__all__ = ["BOME"]


class BOME(Method):
    r"""Bilevel optimisation made easy: descend on f while the gap of the inner problem closes.

        theta^ <- copy_steps gradient steps on g(lam, .) from theta, then a constant
        q      = g(lam, theta) - g(lam, theta^)                        (the gap, >= 0 at best)
        c      = max( (phi - <grad f, grad q>) / ||grad q||^2, 0 )
        phi    = eta ||grad q||^2 or eta q
        (lam, theta) <- (lam, theta) - steps of (grad f + c grad q)

    c is the least multiplier with <grad f + c grad q, grad q> >= phi: the gap falls at least as
    fast as phi says. theta^ is not differentiated, so grad_lam q is exact only where theta^ solves
    the inner problem.

    With constant steps it ends at a distance from the optimum in proportion to them: the closer the
    gap is to zero, the larger c, until a step jumps over; let both steps shrink by a schedule.

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied.
        copy_steps: T.
        copy_lr: Step of the copy's descent; by default ``inner_lr``.
        eta: Above zero.
        barrier: ``"squared"``: phi = eta ||grad q||^2 (the theory), or ``"gap"``: phi = eta q.
        **common: See `bilevel_lite.algorithms.method.Method`.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an option out of range.

    Cost of a step: copy_steps + 3 gradients.
    Source: Ye et al. (2022), arXiv 2209.08709.
    """

    choices = ("none: the value of g", "none", "loop over a copy, multiplier")
    remembers = ("multiplier",)
    step_sizes = {"copy_lr": "copy_lr"}

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        copy_steps: int = 10,
        copy_lr: float | None = None,
        eta: float = 0.5,
        barrier: str = "squared",
        **common: Any,
    ):
        at_least("copy_steps", copy_steps, 1)
        require_positive("eta", eta)
        if barrier not in ("squared", "gap"):
            raise ValueError(f"barrier: got {barrier!r}, expected 'squared' or 'gap'")
        super().__init__(problem, lam, theta, **common)
        self.copy_steps, self.eta, self.barrier = copy_steps, eta, barrier
        self.copy_lr = self.inner_optimizer.param_groups[0]["lr"] if copy_lr is None else copy_lr
        require_positive("copy_lr", self.copy_lr)
        self.multiplier = torch.zeros(())  # the last c, for those who want to look at it

    def _direction(self):
        batch, g = self._draw("inner"), SameDraws(self.problem.inner_loss)
        copy = self.theta.clone()
        for _ in range(self.copy_steps):
            copy -= self.copy_lr * theta_gradient(g, self.lam, copy, batch, "inner_loss")[1]
        here, lam_here, q_theta = gradient(g, self.lam, self.theta, batch, "inner_loss")
        there, lam_there, _ = gradient(g, self.lam, copy, batch, "inner_loss")
        self._spend("gradient", batch, times=self.copy_steps + 2)
        outer_loss, f_lam, f_theta = self._outer_gradient(self._draw("outer"))
        q_lam = lam_here - lam_there

        square = dot(q_lam, q_lam) + dot(q_theta, q_theta)
        phi = self.eta * (square if self.barrier == "squared" else here - there)
        along = dot(f_lam, q_lam) + dot(f_theta, q_theta)
        c = torch.where(square > 0, ((phi - along) / square).clamp(min=0), torch.zeros_like(square))
        self.multiplier = c
        self._move_theta(f_theta + c * q_theta)
        return here, outer_loss, f_lam + c * q_lam, None
