"""NBO: one Hessian serves two systems, the Newton step of theta and the linear system of v."""

from typing import Any

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import Method, require_positive
from bilevel_lite.linsolve import at_least, cg
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import cross_vp, hvp_operator

__all__ = ["NBO"]


class NBO(Method):
    r"""Newton-based bilevel optimisation.

        n ~ H^-1 grad_theta g,     w ~ H^-1 (H v - b),     H and b at (lam, theta)
        theta <- theta - n,        v <- v - w
        lam   <- lam - outer_lr ( grad_lam f - J v ),      at the new theta and v

    With n exact the error of theta after the step is quadratic in the error before. That of v is of
    first order, for H and b belong to the old theta, and so is the hypergradient's (chapter 17).
    Both systems start from zero; that of v is a warm start written as a correction. Three ways to
    solve them:

        "gd"     steps + 1 gradient steps of linear_lr on each quadratic, H of one batch (NBO-GD)
        "sgd"    the same with a fresh batch of H for each step (NSBO-SGD)
        "cg"     that many CG steps on each (NBO-CG)

    With steps = 0, "gd" moves n = linear_lr grad_theta g and w = linear_lr (H v - b): a step of
    SOBA, but for lam, which moves after theta and v, not with them.

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied.
        solve: ``"gd"``, ``"sgd"`` or ``"cg"``.
        steps: Further steps on each system after the first.
        linear_lr: Step size on the systems, in units of 1 / curvature ("gd" and "sgd").
        warm_up: Gradient steps of ``linear_lr`` on theta before the first iteration: Newton's
            method is local.
        **common: See `bilevel_lite.algorithms.method.Method`. ``inner_lr`` scales n; 1 by default.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an option out of range.

    Cost of a step: 1 gradient of g and 2 of f, 2 steps + 1 products (with "cg" 2 (steps + 1) + 1;
    H v is free while v is zero), 1 cross product.
    Source: Dong et al. (2025), arXiv 2505.02101; equations from secondary sources.
    """

    choices = (
        "Hessian, for theta and v",
        "gradient or CG steps, warm start",
        "single loop, Newton",
    )
    remembers = ("v", "warmed")
    roles = ("inner", "outer", "curvature", "cross")
    step_sizes = {"linear_lr": "linear_lr"}

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        solve: str = "gd",
        steps: int = 1,
        linear_lr: float | None = None,
        warm_up: int = 0,
        **common: Any,
    ):
        if solve not in ("gd", "sgd", "cg"):
            raise ValueError(f"solve: got {solve!r}, expected 'gd', 'sgd' or 'cg'")
        at_least("steps", steps, 0)
        at_least("warm_up", warm_up, 0)
        if solve != "cg" or warm_up:
            require_positive("linear_lr", linear_lr)
        if common.get("inner_lr") is None and common.get("inner_optimizer") is None:
            common["inner_lr"] = 1.0
        super().__init__(problem, lam, theta, **common)
        self.solve, self.steps, self.linear_lr, self.warm_up = solve, steps, linear_lr, warm_up
        self.v, self.warmed = torch.zeros_like(self.theta), False

    def _direction(self):
        loss = self.problem.inner_loss
        for _ in range(0 if self.warmed else self.warm_up):
            self.theta -= self.linear_lr * self._inner_gradient(self._draw("inner"))[1]
        self.warmed = True

        inner, outer = self._draw("inner"), self._draw("outer")
        inner_loss, g_theta = self._inner_gradient(inner)
        _, _, b = self._outer_gradient(outer)
        batch = inner if self.batches["curvature"] is None else self._draw("curvature")
        matvec = self._hessian(batch)
        r = (matvec(self.v) if bool(self.v.any()) else 0) - b
        n, w = self._solve_two(matvec, g_theta, r)
        self._move_theta(n)
        self.v = self.v - w

        outer_loss, direct, _ = self._outer_gradient(outer)
        cross = inner if self.batches["cross"] is None else self._draw("cross")
        self._spend("cross", cross)
        jv = cross_vp(loss, self.lam, self.theta, cross, self.v)
        return inner_loss, outer_loss, direct - jv, None

    def _hessian(self, batch: Any):
        """v -> H v at the present point, counted; the graph is kept for all products."""
        operator = hvp_operator(self.problem.inner_loss, self.lam, self.theta, batch)

        def matvec(v):
            self._spend("hvp", batch)
            return operator(v)

        return matvec

    def _solve_two(self, matvec, *rights: Tensor) -> list[Tensor]:
        """H^-1 r for both right-hand sides, from zero."""
        if self.solve == "cg":
            return [cg(matvec, r, self.steps + 1).solution for r in rights]
        out = [self.linear_lr * r for r in rights]
        for _ in range(self.steps):
            if self.solve == "sgd":
                matvec = self._hessian(self._draw_curvature())
            out = [x - self.linear_lr * (matvec(x) - r) for x, r in zip(out, rights, strict=True)]
        return out
