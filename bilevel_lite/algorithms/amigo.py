"""AmIGO: the linear system is warm-started too, so that a few gradient steps on it are enough."""

from typing import Any

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import Method, require_positive
from bilevel_lite.kfac import KFAC
from bilevel_lite.linsolve import at_least
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import cross_vp, hvp

__all__ = ["AmIGO"]


class AmIGO(Method):
    r"""Amortised implicit gradient optimisation: theta and v both go on from their last values.

        theta <- inner_steps optimiser steps on g(lam, .)
        v     <- v - linear_lr (H v - b),   linear_steps times, a fresh batch for each H
        lam   <- lam - outer_lr (grad_lam f - J v)

    With a KFAC there are two readings, for the paper that names AmIGO-KFAC gives no equations:

        "precondition"   v <- v - linear_lr G^-1 (H v - b),  G the KFAC matrix of that batch
        "replace"        v = G^-1 b: nothing is left of the warm start, and the method is AID
                         (but for J, which has a batch of its own here)

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied.
        inner_steps: T, steps on theta per outer iteration.
        linear_steps: N, steps on v per outer iteration.
        linear_lr: Step on v, in units of 1 / curvature (about 1 with a preconditioner); needed
            unless ``reading="replace"``.
        kfac: A `bilevel_lite.KFAC`, or None.
        reading: ``"precondition"`` or ``"replace"``; used with a ``kfac`` only.
        **common: See `bilevel_lite.algorithms.method.Method`.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an option out of range.

    Cost of a step: inner_steps + 1 gradients, linear_steps products (one less at the first call,
    where v is zero), 1 cross product, the KFAC builds.
    Source: Arbel and Mairal (2022), arXiv 2111.14580; with KFAC arXiv 2603.29108, our readings.
    """

    choices = ("Hessian (KFAC as option)", "gradient steps, warm start", "double loop")
    remembers = ("v",)
    roles = ("inner", "outer", "curvature", "cross")
    step_sizes = {"linear_lr": "linear_lr"}

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        inner_steps: int = 10,
        linear_steps: int = 10,
        linear_lr: float | None = None,
        kfac: KFAC | None = None,
        reading: str = "precondition",
        **common: Any,
    ):
        at_least("inner_steps", inner_steps, 1)
        at_least("linear_steps", linear_steps, 1)
        if reading not in ("precondition", "replace"):
            raise ValueError(f"reading: got {reading!r}, expected 'precondition' or 'replace'")
        if kfac is not None and not isinstance(kfac, KFAC):
            raise TypeError(f"kfac: got {kfac!r}, expected a bilevel_lite.KFAC")
        self.replaces = kfac is not None and reading == "replace"
        if not self.replaces:
            require_positive("linear_lr", linear_lr)
        super().__init__(problem, lam, theta, **common)
        self.inner_steps, self.linear_steps, self.linear_lr = inner_steps, linear_steps, linear_lr
        self.solver, self.v = kfac, torch.zeros_like(self.theta)

    def _direction(self):
        inner_loss = self._inner_steps(self.inner_steps)
        outer_loss, direct, b = self._outer_gradient(self._draw("outer"))
        for _ in range(1 if self.replaces else self.linear_steps):
            self._move_v(b, self._draw_curvature())
        cross = self._draw("cross" if self.batches["cross"] is not None else "inner")
        self._spend("cross", cross)
        jv = cross_vp(self.problem.inner_loss, self.lam, self.theta, cross, self.v)
        return inner_loss, outer_loss, direct - jv, None

    def _move_v(self, b: Tensor, batch: Any) -> None:
        loss, at = self.problem.inner_loss, (self.lam, self.theta, batch)
        precondition = None
        if self.solver is not None:
            precondition = self.solver.inverse(loss, *at)
            self._spend(self.solver.last_cost, batch)
        if self.replaces:
            self.v = precondition(b)
            return
        r = -b
        if bool(self.v.any()):
            r = hvp(loss, *at, self.v) - b
            self._spend("hvp", batch)
        self.v = self.v - self.linear_lr * (r if precondition is None else precondition(r))
