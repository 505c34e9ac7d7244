"""SOBA: theta, v and lam move together, one step each, from one point."""

from typing import Any

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import Method
from bilevel_lite.options import positive
from bilevel_lite.products import COST, first_and_second

__all__ = ["SOBA"]


class SOBA(Method):
    r"""Stochastic bilevel algorithm: one loop, three coupled steps, no system solved.

        D_theta = grad_theta g,  D_v = H v - b,  D_lam = grad_lam f - J v,  at one (lam, theta, v)
        theta <- theta - inner_lr D_theta,  v <- v - linear_lr D_v,  lam <- lam - outer_lr D_lam

    At a common fixed point theta solves the inner problem, v solves H v = b, and D_lam is the
    hypergradient. One batch of g serves grad_theta g, H and J.

    Cost of a step: 2 gradients and one double backward pass (2), which gives H v and J v.
    Source: Dagreou, Ablin, Vaiter and Moreau (2022), arXiv 2201.13409.

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.SOBA(problem, lam, theta, linear_lr=0.3, inner_lr=0.3, outer_lr=0.1)
        >>> steps = [method.step() for _ in range(100)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    linear_lr: float = positive(help="Step on v, in units of 1 / curvature", search=(0.02, 1.0))

    choices = ("Hessian", "one gradient step, warm start", "single loop")
    remembers = ("v",)
    step_sizes = ("linear_lr",)

    def __post_init__(self):
        super().__post_init__()
        self.v = torch.zeros_like(self.theta)

    def _direction(self):
        inner_loss, g_theta, jv, hv = self._inner_oracle(self._draw("inner"))
        f = self._f(self._draw("outer"))
        self._move_theta(g_theta)
        self.v = self.v - self.linear_lr * (hv - f.theta)
        return inner_loss, f.value, f.lam - jv, None

    def _inner_oracle(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g, grad_theta g, J v and H v, from one double backward pass."""
        self._spend(COST["gradient"] + COST["hvp"], batch)
        return first_and_second(self.problem.inner_loss, self.lam, self.theta, batch, self.v)
