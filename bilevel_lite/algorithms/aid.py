"""AID: approximate implicit differentiation, the double loop that most methods are a variant of."""

from bilevel_lite.algorithms.method import Method
from bilevel_lite.options import instance, one_of, whole
from bilevel_lite.solvers import Solver

__all__ = ["AID"]


class AID(Method):
    r"""Approximate implicit differentiation with a warm-started inner problem.

        repeat:  theta <- inner_steps optimiser steps on g(lam, .), from the last theta
                 v     <- solver(H, b),  b = grad_theta f
                 lam   <- Proj( optimiser step with  grad_lam f - J v )

    Cost of a step: inner_steps gradients and one hypergradient.
    Source: Domke (2012); Pedregosa (2016); Grazzi et al. (2020).

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.AID(problem, lam, theta, bl.CG(2), inner_lr=0.3, outer_lr=0.3)
        >>> steps = [method.step() for _ in range(20)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    solver: Solver = instance(Solver, "a solver such as bilevel_lite.CG(3)", help="How v is found")
    inner_steps: int = whole(default=10, help="Steps on theta per outer iteration")
    cross_mode: str = one_of(
        "auto", "double_backward", default="auto", help="See `bilevel_lite.hypergradient`"
    )

    choices = ("any solver's", "any solver", "double loop")
    roles = ("inner", "outer", "curvature", "cross")

    def _direction(self):
        inner_loss = self._inner_steps(self.inner_steps)
        system = self._draw_system()
        h, info = self._hypergradient(self._draw("outer"), *system, cross_mode=self.cross_mode)
        return inner_loss, info.outer_loss, h, info.solve
