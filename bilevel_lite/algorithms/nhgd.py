"""NHGD: the inner steps' own gradients, kept as an inverse Fisher matrix, stand for H^-1."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import Method, require_fraction, require_positive
from bilevel_lite.kfac import KFAC
from bilevel_lite.linsolve import at_least
from bilevel_lite.problem import BilevelProblem, examples
from bilevel_lite.products import cross_vp, dot

__all__ = ["NHGD"]


class NHGD(Method):
    r"""Natural hypergradient descent: no system is solved, the Fisher's inverse is kept up to date.

        for each inner step, with q the gradient of g on its batch of B examples:
            F <- beta F + (1 - beta) scale q q^T,           kept as M = F^-1:
            M <- (1/beta) [ M - (1-beta) scale M q q^T M / (beta + (1-beta) scale q^T M q) ]
            theta <- an optimiser step with q
        lam <- lam - outer_lr ( grad_lam f - J M grad_theta f )

    The mean gradient of B examples has 1/B of the Fisher as second moment (at the optimum, where
    the gradients' mean vanishes), so scale = B makes F the empirical Fisher; scale = 1 is the
    recursion without that correction, whose F is B times too small. With ``beta=None`` F is the
    plain average of all steps, beta = (t - 1)/t at the t-th, the start counting as the first.

    F equals the Hessian only where the model is well specified and theta optimal. With noisy labels
    or weights it does not: q q^T scales with the weights squared (chapter 17).

    The start F = initial I is forgotten at the rate beta; once it is, directions that few gradients
    point to have a small F, and M grows there as beta^-t: with d above the memory 1 / (1 - beta)
    give a KFAC instead. q is the gradient of all of g, an l2 term included, whose own curvature F
    does not have.

    With ``kfac`` (made with ``fisher="empirical"`` and an ``ema``) the same running average is kept
    of its Kronecker factors, which need no d x d matrix; its damping is inside. They are inverted
    once, with the gradient of the last inner step.

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied.
        inner_steps: S, steps on theta per outer iteration.
        beta: Memory of the average, or None for the plain one.
        initial: F at the start, times the identity.
        scale: ``"fisher"`` (B) or ``"plain"`` (1). B is the length of the batch's first tensor, 1
            for a batch that is no tuple, list or dict of such.
        kfac: The Kronecker variant; ``beta``, ``initial`` and ``scale`` are then without effect.
        **common: See `bilevel_lite.algorithms.method.Method`.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an option out of range, or a matrix of
            more than 20,000 rows.

    Cost of a step: inner_steps + 1 gradients, 1 cross product; M costs 4 d^2 operations an inner
    step, a KFAC with an ema its estimate (about 1 gradient) an inner step.
    Source: Kong et al. (2026), arXiv 2602.10905; the scale and the start are our reading.
    """

    choices = ("empirical Fisher (or KFAC)", "rank-one updates of the inverse", "double loop")
    remembers = ("m", "updates")
    roles = ("inner", "outer", "cross")

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        inner_steps: int = 10,
        beta: float | None = 0.99,
        initial: float = 1.0,
        scale: str = "fisher",
        kfac: KFAC | None = None,
        **common: Any,
    ):
        at_least("inner_steps", inner_steps, 1)
        require_positive("initial", initial)
        if beta is not None:
            require_fraction("beta", beta)
            require_positive("beta", beta)
        if scale not in ("fisher", "plain"):
            raise ValueError(f"scale: got {scale!r}, expected 'fisher' or 'plain'")
        if kfac is not None and not isinstance(kfac, KFAC):
            raise TypeError(f"kfac: got {kfac!r}, expected a bilevel_lite.KFAC")
        if kfac is not None and kfac.every > 1:
            raise ValueError(
                f"kfac: has every = {kfac.every}, but the average changes at each step; give 1"
            )
        super().__init__(problem, lam, theta, **common)
        if kfac is None and theta.numel() > 20_000:
            raise ValueError(
                f"theta: has {theta.numel()} entries, so F would have as many rows; give "
                "kfac=KFAC(fisher='empirical', ema=...) instead"
            )
        self.inner_steps, self.beta, self.scale = inner_steps, beta, scale
        self.solver, self.updates = kfac, 1
        self.m = None
        if kfac is None:
            self.m = torch.eye(len(theta), dtype=theta.dtype, device=theta.device) / initial

    def _direction(self):
        loss = self.problem.inner_loss
        for step in range(self.inner_steps):
            batch = self._draw("inner")
            inner_loss, q = self._inner_gradient(batch)
            inverse = self._update(q, batch, last=step == self.inner_steps - 1)
            self._move_theta(q)
        outer_loss, direct, b = self._outer_gradient(self._draw("outer"))
        v = self.v = inverse(b)
        cross = self._draw("cross" if self.batches["cross"] is not None else "inner")
        self._spend("cross", cross)
        return inner_loss, outer_loss, direct - cross_vp(loss, self.lam, self.theta, cross, v), None

    def _update(self, q: Tensor, batch: Any, last: bool) -> Callable[[Tensor], Tensor] | None:
        """Take q into the average; after the last step, return b -> F^-1 b."""
        at = self.problem.inner_loss, self.lam, self.theta, batch
        if self.solver is not None and not last:
            self._spend(self.solver.observe(*at), batch)
            return None
        if self.solver is not None:
            inverse = self.solver.inverse(*at)
            self._spend(self.solver.last_cost, batch)
            return inverse
        self.updates += 1
        beta = self.beta if self.beta is not None else (self.updates - 1) / self.updates
        count = examples(batch) if self.scale == "fisher" else None
        self.m = rank_one_inverse(self.m, q, beta, (1 - beta) * (1 if count is None else count))
        return self.m.mv


def rank_one_inverse(m: Tensor, q: Tensor, beta: float, weight: float) -> Tensor:
    r"""(beta M^-1 + weight q q^T)^-1, by Sherman and Morrison.

        M' = (1/beta) [ M - weight M q q^T M / (beta + weight q^T M q) ]

    Args:
        m: M, symmetric, shape (d, d).
        q: Shape (d,).
        beta: Above zero.
        weight: Not below zero.

    Returns:
        M', shape (d, d).

    Cost: 4 d^2 operations.
    """
    mq = m @ q
    return (m - torch.outer(mq, mq) * (weight / (beta + weight * dot(q, mq)))) / beta
