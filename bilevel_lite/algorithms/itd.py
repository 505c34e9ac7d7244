"""ITD: iterative differentiation, the derivative of the inner descent itself."""

from typing import Any

import torch

from bilevel_lite.algorithms.method import Method
from bilevel_lite.options import one_of, whole
from bilevel_lite.problem import evaluate
from bilevel_lite.refuse import require_as_drawn, versions
from bilevel_lite.unroll import unrolled_hypergradient

__all__ = ["ITD"]


class ITD(Method):
    r"""Unroll the inner steps, differentiate through all or the last of them, and go on from there.

        theta_0 = the last theta;  theta_{t+1} = theta_t - inner_lr grad_theta g(lam, theta_t)
        lam <- lam - outer_lr d f(lam, theta_T(lam)) / d lam,     theta <- theta_T

    theta_0 counts as a constant, so that only the dependence on lam within the T steps is seen;
    with a warm start that misses the earlier steps, and T, or the number of truncated steps,
    decides what is left of the hypergradient (chapter 02).

    Cost of a step: T + 1 gradients, one double backward pass (2) a differentiated step, and half a
    gradient for a look at g in the end. In forward mode 2 a step and entry of lam, instead of the
    T gradients and of the double backward passes.
    Source: Maclaurin et al. (2015); Franceschi et al. (2017); truncated: Shaban et al. (2019).

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.ITD(problem, lam, theta, inner_steps=5, inner_lr=0.3, outer_lr=0.3)
        >>> steps = [method.step() for _ in range(20)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    inner_steps: int = whole(default=10, help="T, steps on theta per outer iteration")
    truncate: int | None = whole(
        default=None, help="Differentiate the last steps only; None means all"
    )
    mode: str = one_of(
        "reverse", "forward", default="reverse", help="See `bilevel_lite.unrolled_hypergradient`"
    )

    choices = ("what T steps see of it", "unrolling", "double loop")
    plain_inner = True

    def __post_init__(self):
        super().__post_init__()
        if self.mode == "forward" and self.truncate is not None:
            raise ValueError(f"truncate: got {self.truncate}, but mode='forward' sees all steps")

    def _direction(self):
        batches, as_drawn = [], []
        for _ in range(self.inner_steps):
            batches.append(self._draw("inner"))
            as_drawn.append(versions(batches[-1], contents=True))
        require_as_drawn("inner_batch", batches, as_drawn)
        outer = self._draw("outer")
        h, info = unrolled_hypergradient(
            self.problem, self.lam, self.theta, self.inner_steps, self._lr, self.mode,
            self.truncate, lambda t: batches[t], outer, return_info=True,
        )  # fmt: skip
        self._set_theta(info.theta)
        with torch.no_grad():
            at = self.lam, self.theta, batches[-1]
            inner_loss = evaluate(self.problem.inner_loss, *at, "inner_loss")
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
