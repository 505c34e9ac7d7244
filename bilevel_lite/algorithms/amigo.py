"""AmIGO: the linear system is warm-started too, so that a few gradient steps on it are enough."""

import torch

from bilevel_lite.algorithms.method import Method
from bilevel_lite.kfac import KFAC
from bilevel_lite.linsolve import richardson
from bilevel_lite.options import check, instance, one_of, positive, whole
from bilevel_lite.solvers import require_inverse

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

    Cost of a step: inner_steps + 1 gradients, linear_steps products (one less at the first call,
    where v is zero), 1 cross product, the KFAC builds.
    Source: Arbel and Mairal (2022), arXiv 2111.14580; with KFAC arXiv 2603.29108, our readings.

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.AmIGO(problem, lam, theta, linear_lr=0.3, inner_lr=0.3, outer_lr=0.3)
        >>> steps = [method.step() for _ in range(20)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    inner_steps: int = whole(default=10, help="T, steps on theta per outer iteration")
    linear_steps: int = whole(default=10, help="K, steps on v per outer iteration")
    linear_lr: float | None = positive(
        default=None,
        help="Step on v, in units of 1 / curvature (about 1 with a preconditioner)",
        search=(0.02, 1.0),
    )
    kfac: KFAC | None = instance(
        KFAC, "a bilevel_lite.KFAC", default=None, help="The preconditioner, or what replaces H"
    )
    reading: str = one_of(
        "precondition", "replace", default="precondition", help="What a kfac is for"
    )

    choices = ("Hessian (KFAC as option)", "gradient steps, warm start", "double loop")
    remembers = ("v",)
    roles = ("inner", "outer", "curvature", "cross")
    step_sizes = ("linear_lr",)

    def __post_init__(self):
        super().__post_init__()
        self.replaces = self.kfac is not None and self.reading == "replace"
        if not self.replaces:
            check(self, "linear_lr")
            require_inverse("kfac", self.kfac)
        self.solver, self.v = self.kfac, torch.zeros_like(self.theta)

    def _direction(self):
        inner_loss = self._inner_steps(self.inner_steps)
        f = self._f(self._draw("outer"))
        if self.replaces:
            self.v = self._preconditioner(self._draw("curvature"))(f.theta)
        else:
            for _ in range(self.linear_steps):
                batch = self._draw("curvature")
                m = self._preconditioner(batch)
                step = richardson(
                    self._hessian(batch), f.theta, 1, self.linear_lr, x0=self.v, precondition=m
                )
                self.v = step.solution
        jv = self._cross(self._draw("cross"), self.v)
        return inner_loss, f.value, f.lam - jv, None
