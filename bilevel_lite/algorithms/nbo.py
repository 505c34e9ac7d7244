"""NBO: one Hessian serves two systems, the Newton step of theta and the linear system of v."""

import torch

from bilevel_lite.algorithms.method import Method
from bilevel_lite.linsolve import cg, richardson
from bilevel_lite.options import check, one_of, positive, whole

__all__ = ["NBO"]


class NBO(Method):
    r"""Newton-based bilevel optimisation.

        dtheta ~ H^-1 grad_theta g,     dv ~ H^-1 (H v - b),     H and b at (lam, theta)
        theta <- theta - dtheta,        v <- v - dv
        lam   <- lam - outer_lr ( grad_lam f - J v ),      at the new theta and v

    With dtheta exact the error of theta after the step is quadratic in the error before. That of v
    is of first order, for H and b belong to the old theta, and so is the hypergradient's (chapter
    17). Both systems start from zero; that of v is a warm start written as a correction. Three ways
    to solve them:

        "gd"     steps + 1 gradient steps of linear_lr on each quadratic, H of one batch (NBO-GD)
        "sgd"    the same with a fresh batch of H for each step (NSBO-SGD)
        "cg"     that many CG steps on each (NBO-CG)

    With steps = 0, "gd" moves dtheta = linear_lr grad_theta g and dv = linear_lr (H v - b): a
    step of SOBA, but for lam, which moves after theta and v, not with them. ``inner_lr``, 1 by
    default, scales dtheta.

    Cost of a step: 1 gradient of g and 2 of f, 2 steps + 1 products (with "cg" 2 (steps + 1) + 1;
    H v is free while v is zero), 1 cross product.
    Source: Dong et al. (2025), arXiv 2505.02101; equations from secondary sources.

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.NBO(problem, lam, theta, linear_lr=0.3, outer_lr=0.1)
        >>> steps = [method.step() for _ in range(60)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    solve: str = one_of("gd", "sgd", "cg", default="gd", help="How both systems are solved")
    steps: int = whole(default=1, least=0, help="Further steps on each system after the first")
    linear_lr: float | None = positive(
        default=None,
        help="Step on the systems ('gd' and 'sgd') and of the warm-up, in units of 1 / curvature",
        search=(0.02, 1.0),
    )
    warm_up: int = whole(
        default=0,
        least=0,
        help="Gradient steps on theta before the first iteration: Newton's is local",
    )

    choices = "Hessian, for theta and v", "gradient or CG steps, warm start", "single loop, Newton"
    remembers = ("v", "warmed")
    roles = ("inner", "outer", "curvature", "cross")
    step_sizes = ("linear_lr",)

    def __post_init__(self):
        if self.inner_lr is None and self.inner_optimizer is None:
            self.inner_lr = 1.0
        super().__post_init__()
        if self.solve != "cg" or self.warm_up:
            check(self, "linear_lr")
        self.v, self.warmed = torch.zeros_like(self.theta), False

    def _direction(self):
        for _ in range(0 if self.warmed else self.warm_up):
            self.theta -= self.linear_lr * self._g_theta(self._draw("inner"))[1]
        self.warmed = True

        inner, outer = self._draw("inner"), self._draw("outer")
        inner_loss, g_theta = self._g_theta(inner)
        b = self._f(outer).theta
        h = self._hessian(self._draw_or("curvature", inner))
        n, w = self._solve_two(h, g_theta, (h(self.v) if bool(self.v.any()) else 0) - b)
        self._move_theta(n)
        self.v = self.v - w

        f = self._f(outer)
        jv = self._cross(self._draw_or("cross", inner), self.v)
        return inner_loss, f.value, f.lam - jv, None

    def _solve_two(self, h, *rights):
        """H^-1 r for both right-hand sides, from zero."""
        if self.solve == "cg":
            return [cg(h, r, self.steps + 1).solution for r in rights]

        def of_both(pair):
            one = self._hessian(self._draw("curvature")) if self.solve == "sgd" else h
            return torch.stack([one(v) for v in pair])

        return richardson(of_both, torch.stack(rights), self.steps + 1, self.linear_lr).solution
