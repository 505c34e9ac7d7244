"""BOME: the inner problem as a constraint on its value, first order only."""

import torch

from bilevel_lite.algorithms.method import Method
from bilevel_lite.options import one_of, positive, whole
from bilevel_lite.params import dot

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

    Cost of a step: copy_steps + 3 gradients.
    Source: Ye et al. (2022), arXiv 2209.08709.

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.BOME(problem, lam, theta, inner_lr=0.1, outer_lr=0.1)
        >>> steps = [method.step() for _ in range(60)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    copy_steps: int = whole(default=10, help="T, steps of the copy's descent")
    copy_lr: float | None = positive(
        default=None,
        help="Step of the copy's descent, the present inner_lr for None",
        search=(0.02, 1.0),
    )
    eta: float = positive(default=0.5, help="Of phi", search=(0.01, 1.0))
    barrier: str = one_of(
        "squared", "gap", default="squared", help="phi: eta ||grad q||^2 (the theory), or eta q"
    )

    choices = ("none: the value of g", "none", "loop over a copy, multiplier")
    remembers = ("multiplier",)
    step_sizes = ("copy_lr",)

    def __post_init__(self):
        super().__post_init__()
        self.multiplier = torch.zeros(())  # the last c, for those who want to look at it

    def _direction(self):
        batch, copy = self._draw("inner"), self.theta.clone()
        lr = self._lr if self.copy_lr is None else self.copy_lr
        with self._same_draws():
            for _ in range(self.copy_steps):
                copy -= lr * self._g_theta(batch, copy)[1]
            here = self._g(batch)
            there, there_lam = self._g_lam(batch, copy)
        f = self._f(self._draw("outer"))
        q_lam, q_theta = here.lam - there_lam, here.theta

        square = dot(q_lam, q_lam) + dot(q_theta, q_theta)
        phi = self.eta * (square if self.barrier == "squared" else here.value - there)
        along = dot(f.lam, q_lam) + dot(f.theta, q_theta)
        c = torch.where(square > 0, ((phi - along) / square).clamp(min=0), torch.zeros_like(square))
        self.multiplier = c
        self._move_theta(f.theta + c * q_theta)
        return here.value, f.value, f.lam + c * q_lam, None
