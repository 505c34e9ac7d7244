"""AID: approximate implicit differentiation, the double loop that most methods are a variant of."""

from typing import Any

from torch import Tensor

from bilevel_lite.algorithms.method import Method
from bilevel_lite.hypergrad import implicit
from bilevel_lite.linsolve import at_least
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.solvers import Solver

__all__ = ["AID"]


class AID(Method):
    r"""Approximate implicit differentiation with a warm-started inner problem.

        repeat:  theta <- inner_steps optimiser steps on g(lam, .), from the last theta
                 v     <- solver(H, b),  b = grad_theta f
                 lam   <- Proj( optimiser step with  grad_lam f - J v )

    Args:
        problem: The two losses.
        lam: Start of the outer variable, any shape; copied.
        theta: Start of the inner variable, shape (d,); copied.
        solver: How v is found.
        inner_steps: Inner steps per outer iteration, at least 1.
        inner_lr, outer_lr, inner_batch, outer_batch: See `bilevel_lite.algorithms.method.Method`.
        cross_mode: See `bilevel_lite.hypergradient`.
        **common: Further batches, optimisers, schedules, projection; see `Method`.

    Raises:
        TypeError: if ``solver`` is no `bilevel_lite.solvers.Solver`, or as `Method`.
        ValueError: if ``inner_steps`` is below 1, or as `Method`.

    Cost of a step: inner_steps gradients and one hypergradient.
    Source: Domke (2012); Pedregosa (2016); Grazzi et al. (2020).
    """

    choices = ("any solver's", "any solver", "double loop")
    roles = ("inner", "outer", "curvature", "cross")

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        solver: Solver,
        inner_steps: int = 10,
        inner_lr: float | None = None,
        outer_lr: float | None = None,
        inner_batch: Any = None,
        outer_batch: Any = None,
        cross_mode: str = "auto",
        **common: Any,
    ):
        require_solver(solver)
        at_least("inner_steps", inner_steps, 1)
        if cross_mode not in ("auto", "double_backward"):
            raise ValueError(
                f"cross_mode: got {cross_mode!r}, expected 'auto' or 'double_backward'"
            )
        super().__init__(
            problem, lam, theta, inner_lr, outer_lr, inner_batch, outer_batch, **common
        )
        self.solver, self.inner_steps, self.cross_mode = solver, inner_steps, cross_mode

    def _direction(self):
        inner_loss = self._inner_steps(self.inner_steps)
        curvature, cross = self._draw_system()
        h, info = implicit(
            self.problem,
            self.lam,
            self.theta,
            inner_batch=self._unit,
            outer_batch=self._draw("outer"),
            solver=self.solver,
            cross_batch=cross,
            curvature_batch=curvature,
            cross_mode=self.cross_mode,
        )
        self._spend(info.gradients, self._unit)
        return inner_loss, info.outer_loss, h, info.solve


def require_solver(solver: Any) -> None:
    """Refuse what is no solver.

    Raises:
        TypeError: naming the argument.
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver: got {solver!r}, expected a solver such as bilevel_lite.CG(3)")
