"""ITD: iterative differentiation, the derivative of the inner descent itself."""

from typing import Any

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import Method, require_plain_inner
from bilevel_lite.linsolve import at_least
from bilevel_lite.problem import BilevelProblem, evaluate, require_as_drawn, versions
from bilevel_lite.unroll import unrolled_hypergradient

__all__ = ["ITD"]


class ITD(Method):
    r"""Unroll the inner steps, differentiate through all or the last of them, and go on from there.

        theta_0 = the last theta;  theta_{t+1} = theta_t - inner_lr grad_theta g(lam, theta_t)
        lam <- lam - outer_lr d f(lam, theta_T(lam)) / d lam,     theta <- theta_T

    theta_0 counts as a constant, so that only the dependence on lam within the T steps is seen;
    with a warm start that misses the earlier steps, and T, or the number of truncated steps,
    decides what is left of the hypergradient (chapter 02).

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied.
        inner_steps: T.
        truncate: Differentiate the last steps only; None means all.
        mode: ``"reverse"`` or ``"forward"``; see `bilevel_lite.unrolled_hypergradient`.
        **common: See `bilevel_lite.algorithms.method.Method`. The inner level is plain gradient
            descent: give ``inner_lr``.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an inner optimiser or an option out of
            range.

    Cost of a step: T + 1 gradients, one double backward pass (2) a differentiated step, and half a
    gradient for a look at g in the end. In forward mode 2 a step and entry of lam, instead of the
    T gradients and of the double backward passes.
    Source: Maclaurin et al. (2015); Franceschi et al. (2017); truncated: Shaban et al. (2019).
    """

    choices = ("what T steps see of it", "unrolling", "double loop")

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        inner_steps: int = 10,
        truncate: int | None = None,
        mode: str = "reverse",
        **common: Any,
    ):
        at_least("inner_steps", inner_steps, 1)
        if truncate is not None:
            at_least("truncate", truncate, 1)
        if mode not in ("reverse", "forward"):
            raise ValueError(f"mode: got {mode!r}, expected 'reverse' or 'forward'")
        if mode == "forward" and truncate is not None:
            raise ValueError(f"truncate: got {truncate}, but mode='forward' sees all steps")
        require_plain_inner(type(self).__name__, common)
        super().__init__(problem, lam, theta, **common)
        self.inner_steps, self.truncate, self.mode = inner_steps, truncate, mode

    def _direction(self):
        batches, as_drawn = [], []
        for _ in range(self.inner_steps):
            batches.append(self._draw("inner"))
            as_drawn.append(versions(batches[-1]))
        require_as_drawn("inner_batch", batches, as_drawn)
        outer = self._draw("outer")
        h, info = unrolled_hypergradient(
            self.problem,
            self.lam,
            self.theta,
            self.inner_steps,
            self.inner_optimizer.param_groups[0]["lr"],
            self.mode,
            self.truncate,
            inner_batch=lambda t: batches[t],
            outer_batch=outer,
            return_info=True,
        )
        self._set_theta(info.theta)
        with torch.no_grad():
            inner_loss = evaluate(
                self.problem.inner_loss, self.lam, self.theta, batches[-1], "inner_loss"
            )
        self._count(batches, outer)
        return inner_loss, info.outer_loss, h, None

    def _count(self, batches: list, outer: Any) -> None:
        seen = len(batches) - (self.truncate or len(batches))  # steps before the differentiated
        for t, batch in enumerate(batches):
            if self.mode == "forward":
                self._spend("hvp", batch, times=self.lam.numel())
                continue
            self._spend("gradient", batch)
            if t >= seen:
                self._spend("hvp", batch)
        self._spend("gradient", outer)
        self._spend(0.5, batches[-1])
