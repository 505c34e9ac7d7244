"""The hypergradient through T steps of gradient descent, for an inner problem left unsolved."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import COST, dot, gradient, theta_gradient, update_operator, update_vjp
from bilevel_lite.refuse import (
    at_least,
    require_as_drawn,
    require_batch,
    require_finite,
    require_problem,
    require_variable,
    versions,
)
from bilevel_lite.same_function import SameDraws
from bilevel_lite.surroundings import differentiating, ordinary

__all__ = ["UnrollInfo", "unrolled_hypergradient"]


@dataclass
class UnrollInfo:
    """What an unrolled hypergradient was made of.

    Attributes:
        theta: The last inner iterate theta_T, like ``theta0``.
        outer_loss: f(lam, theta_T), a scalar tensor.
        stored: Numbers kept in memory beyond one iterate: the iterates stored for the way back
            (reverse), or the sensitivity d theta / d lam (forward).
        gradients: Total cost in gradient-equivalents.
    """

    theta: Tensor
    outer_loss: Tensor
    stored: int
    gradients: float


@overload
def unrolled_hypergradient(
    problem: BilevelProblem, lam: Tensor, theta0: Tensor, steps: int, lr: float,
    mode: str = "reverse", truncate: int | None = None, inner_batch: Any = None,
    outer_batch: Any = None, return_info: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def unrolled_hypergradient(
    problem: BilevelProblem, lam: Tensor, theta0: Tensor, steps: int, lr: float,
    mode: str = "reverse", truncate: int | None = None, inner_batch: Any = None,
    outer_batch: Any = None, *, return_info: Literal[True],
) -> tuple[Tensor, UnrollInfo]: ...  # fmt: skip
@overload
def unrolled_hypergradient(
    problem: BilevelProblem, lam: Tensor, theta0: Tensor, steps: int, lr: float,
    mode: str = "reverse", truncate: int | None = None, inner_batch: Any = None,
    outer_batch: Any = None, return_info: bool = False,
) -> Tensor | tuple[Tensor, UnrollInfo]: ...  # fmt: skip
@differentiating
def unrolled_hypergradient(
    problem: BilevelProblem,
    lam: Tensor,
    theta0: Tensor,
    steps: int,
    lr: float,
    mode: str = "reverse",
    truncate: int | None = None,
    inner_batch: Any = None,
    outer_batch: Any = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, UnrollInfo]:
    r"""The derivative of f(lam, theta_T(lam)) through T steps theta <- theta - lr grad_theta g.

        reverse:  w = grad_theta f(theta_T);  for t = T-1, ..., T-K:
                      h <- h - lr J_t w,   w <- w - lr H_t w
        forward:  D_0 = 0;  D_{t+1} = D_t - lr (H_t D_t + J_t^T);
                      h = grad_lam f + D_T^T grad_theta f

    Reverse mode stores the iterates (K of them) and recomputes everything else, so it holds one
    graph at a time. Forward mode stores one column of D per entry of lam, whatever T is.

    What is differentiated is the descent that was done: each step's batch is drawn once, in order,
    and kept for the way back; and where g drew random numbers from torch's generators (dropout in
    training mode), the way back evaluates it with the same numbers. Afterwards the generators are
    where the descent and f left them.

    Args:
        problem: The two losses.
        lam: Outer variable, any shape.
        theta0: Start of the inner descent, shape (d,); taken not to depend on lam.
        steps: T, at least 1.
        lr: Inner step size.
        mode: ``"reverse"`` or ``"forward"``.
        truncate: K: differentiate the last K steps only (reverse mode); None means all.
        inner_batch: Batch of g; or a function t -> batch, or a sampler with ``draw()``, for a
            different one at each step, called once a step.
        outer_batch: Batch of f.
        return_info: Also return an `UnrollInfo`.

    Returns:
        A detached tensor like ``lam``; with ``return_info=True`` a pair (tensor, info).

    Raises:
        TypeError: if ``lam`` or ``theta0`` is not a floating-point tensor, or a batch is none.
        ValueError: if ``steps`` or ``truncate`` is below 1, ``lr`` is not positive, ``mode`` is
            unknown, ``truncate`` is used in forward mode, a batch was changed in place before the
            way back, or the descent or its derivative grows beyond the largest number.

    Cost: reverse, T gradients and 2 per differentiated step; forward, 2 per step and entry of
    lam; 1 for f. Source: Franceschi et al. (2017), both modes; Shaban et al. (2019), truncation.

    Example:
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: ((theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> lam, theta0 = torch.zeros(2), torch.ones(2)
        >>> h = bl.unrolled_hypergradient(problem, lam, theta0, steps=20, lr=0.2)
        >>> h.round(decimals=3)  # theta* = lam here, and Phi = ||lam - 1||^2
        tensor([-2., -2.])
    """
    require_problem(problem)
    require_variable("lam", lam)
    require_variable("theta0", theta0)
    at_least("steps", steps, 1)
    if truncate is not None:
        at_least("truncate", truncate, 1)
    if not lr > 0:
        raise ValueError(f"lr: got {lr}, expected a positive number")
    if mode not in ("reverse", "forward"):
        raise ValueError(f"mode: got {mode!r}, expected 'reverse' or 'forward'")
    if mode == "forward" and truncate is not None:
        raise ValueError(f"truncate: got {truncate} with mode='forward'; only reverse truncates")
    require_batch("outer_batch", outer_batch, problem.outer_loss)
    lam, theta0, outer_batch = map(ordinary, (lam.detach(), theta0.detach(), outer_batch))
    batch_at = _batch_at(inner_batch, problem)
    unroll = _unroll_reverse if mode == "reverse" else _unroll_forward
    h, info = unroll(problem, lam, theta0, steps, lr, truncate, batch_at, outer_batch)
    require_finite(
        {"hypergradient": h},
        lambda: f" (after {steps} steps of size {lr}; is lr above 2 / curvature?)",
    )
    return (h, info) if return_info else h


def _batch_at(inner_batch: Any, problem: BilevelProblem) -> Callable[[int], Any]:
    """The function t -> batch of a batch, a sampler, or such a function."""

    def batch_at(t):
        batch = inner_batch
        if callable(getattr(inner_batch, "draw", None)):
            batch = inner_batch.draw()
        elif callable(inner_batch):
            batch = inner_batch(t)
        require_batch("inner_batch", batch, problem.inner_loss)
        return ordinary(batch)

    return batch_at


def _unroll_reverse(problem, lam, theta, steps, lr, truncate, batch_at, outer_batch):
    kept = deque(maxlen=steps if truncate is None else min(truncate, steps))
    for t in range(steps):
        g, batch = SameDraws(problem.inner_loss), batch_at(t)
        kept.append((g, theta, batch, versions(batch)))
        _, step = theta_gradient(g, lam, theta, batch, "inner_loss")
        theta = theta - lr * step
    outer_loss, h, w = gradient(problem.outer_loss, lam, theta, outer_batch, "outer_loss")
    cost = COST["gradient"] * (steps + 1) + COST["hvp"] * len(kept)
    info = UnrollInfo(theta, outer_loss, len(kept) * theta.numel(), cost)
    while kept:
        g, theta_t, batch, as_drawn = kept.pop()
        require_as_drawn("inner_batch", batch, as_drawn)
        jw, hw = update_vjp(g, lam, theta_t, batch, w)
        h, w = h - lr * jw, w - lr * hw
    return h, info


def _unroll_forward(problem, lam, theta, steps, lr, truncate, batch_at, outer_batch):
    basis = torch.eye(lam.numel(), dtype=lam.dtype, device=lam.device).view(-1, *lam.shape)
    z = [torch.zeros_like(theta) for _ in basis]
    for t in range(steps):
        q, along = update_operator(problem.inner_loss, lam, theta, batch_at(t))
        z = [column - lr * along(e, column) for e, column in zip(basis, z, strict=True)]
        theta = theta - lr * q
    outer_loss, direct, b = gradient(problem.outer_loss, lam, theta, outer_batch, "outer_loss")
    h = direct + torch.stack([dot(column, b) for column in z]).view_as(lam).to(lam)
    cost = COST["hvp"] * steps * lam.numel() + COST["gradient"]
    return h, UnrollInfo(theta, outer_loss, lam.numel() * theta.numel(), cost)
