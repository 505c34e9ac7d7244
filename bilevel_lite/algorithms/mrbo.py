"""MRBO: one loop, with recursive momentum (STORM) on both levels."""

from typing import Any

from torch import Tensor

from bilevel_lite.algorithms.aid import require_solver
from bilevel_lite.algorithms.method import Method, require_fraction
from bilevel_lite.hypergrad import hypergradient
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import theta_gradient
from bilevel_lite.same_function import SameDraws
from bilevel_lite.solvers import Solver

__all__ = ["MRBO"]


class MRBO(Method):
    r"""Momentum-based recursive bilevel optimiser.

        d_k = grad_theta g(k)  + inner_memory (d_{k-1} - grad_theta g(k-1))
        e_k = h(k)             + outer_memory (e_{k-1} - h(k-1))
        theta <- theta - eta_k inner_lr d_k,     lam <- lam - eta_k outer_lr e_k,  together

    (k) and (k-1) are the current and the last point, evaluated on the SAME batches: the
    difference of two evaluations then has little noise, and the memory may be long. h is the
    hypergradient with any solver; the paper's is a Neumann series, MRBO-KFAC puts KFAC there
    (two builds a step, with the same draws).

    With ``decay`` c > 0 (the paper's schedule) eta_k = (c / (c + k))^(1/3) and the memory of
    iteration k is 1 - (1 - memory) eta_{k-1}^2; without it both stay as they are, as in the
    authors' code. Memory 0 is the plain single loop.

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied.
        solver: How v is found at each of the two points.
        inner_memory: From 0 up to, not including, 1.
        outer_memory: The same for lam.
        decay: c, or 0 for constants.
        **common: See `bilevel_lite.algorithms.method.Method`; plain gradient steps are meant.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an option out of range.

    Cost of a step: 2 gradients and 2 hypergradients; half of that at the first step, which has no
    last point.
    Source: Yang, Ji and Liang (2021), arXiv 2106.04692; with KFAC arXiv 2603.29108, our reading.
    """

    choices = (
        "Hessian (or any solver's)",
        "Neumann series (or any)",
        "single loop, recursive momentum",
    )
    remembers = ("before", "d", "e")
    roles = ("inner", "outer", "curvature", "cross")

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        solver: Solver,
        inner_memory: float = 0.1,
        outer_memory: float = 0.1,
        decay: float = 0.0,
        **common: Any,
    ):
        require_solver(solver)
        require_fraction("inner_memory", inner_memory)
        require_fraction("outer_memory", outer_memory)
        if not decay >= 0:
            raise ValueError(f"decay: got {decay}, expected a number that is zero or positive")
        super().__init__(problem, lam, theta, **common)
        self.solver, self.decay = solver, decay
        self.inner_memory, self.outer_memory = inner_memory, outer_memory
        self.before = self.d = self.e = None  # the last point (lam, theta) and directions

    def _direction(self):
        inner, outer = self._draw("inner"), self._draw("outer")
        curvature, cross = self.batches["curvature"], self.batches["cross"]
        system = (
            inner if curvature is None else self._draw("curvature"),
            inner if cross is None else self._draw("cross"),
        )
        drawn = self.solver.state_dict()  # both evaluations make the same draws
        g, f = SameDraws(self.problem.inner_loss), SameDraws(self.problem.outer_loss)
        if self.before is not None:
            _, d_before, _, e_before, _ = self._evaluate(g, f, *self.before, inner, outer, system)
            self.solver.load_state_dict(drawn)
        inner_loss, d, outer_loss, e, solve = self._evaluate(
            g, f, self.lam, self.theta, inner, outer, system
        )
        if self.before is not None:
            d = d + self._memory(self.inner_memory) * (self.d - d_before)
            e = e + self._memory(self.outer_memory) * (self.e - e_before)
        self.before, self.d, self.e = [self.lam.clone(), self.theta.clone()], d, e
        eta = self._eta(self.iteration)
        self._move_theta(eta * d)
        return inner_loss, outer_loss, eta * e, solve

    def _evaluate(self, g, f, lam, theta, inner, outer, system):
        """g, its gradient, f, the hypergradient and the diagnosis at one point."""
        self._spend("gradient", inner)
        inner_loss, d = theta_gradient(g, lam, theta, inner, "inner_loss")
        h, info = hypergradient(
            BilevelProblem(self.problem.inner_loss, f), lam, theta, self._unit, outer, self.solver,
            cross_batch=system[1], curvature_batch=system[0], return_info=True, diagnose=False,
        )  # fmt: skip
        self._spend(info.gradients, self._unit)
        return inner_loss, d, info.outer_loss, h, info.solve

    def _eta(self, k: int) -> float:
        return (self.decay / (self.decay + k)) ** (1 / 3) if self.decay else 1.0

    def _memory(self, memory: float) -> float:
        return 1 - (1 - memory) * self._eta(self.iteration - 1) ** 2
