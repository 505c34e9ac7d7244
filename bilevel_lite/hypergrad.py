"""The hypergradient: implicit, by unrolling, by finite differences.

implicit     dPhi/dlam = grad_lam f - J v,  H v = b        (at theta ~ theta*)
unrolled     the derivative of f(lam, theta_T(lam)) through T steps of gradient descent
differences  (Phi(lam + eps e) - Phi(lam - eps e)) / (2 eps)
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bilevel_lite.problem import (
    BilevelProblem,
    NotFinite,
    evaluate,
    relative_size,
    require_as_drawn,
    require_batch,
    require_problem,
    require_unwritten,
    require_variable,
    versions,
)
from bilevel_lite.products import (
    COST,
    cross_and_route,
    dot,
    gradient,
    theta_gradient,
    update_operator,
    update_vjp,
)
from bilevel_lite.risk import only_reads
from bilevel_lite.same_function import SameDraws
from bilevel_lite.solvers import Direct, SolveInfo, Solver
from bilevel_lite.surroundings import differentiating, ordinary

__all__ = [
    "HypergradientInfo",
    "UnrollInfo",
    "finite_difference_hypergradient",
    "hypergradient",
    "unrolled_hypergradient",
]


@dataclass
class HypergradientInfo:
    """What an implicit hypergradient was made of.

    Attributes:
        outer_loss: f(lam, theta) on the outer batch, a scalar tensor.
        direct: grad_lam f, like ``lam``.
        implicit: -J v, like ``lam``.
        v: The solution of H v = b, like ``theta``; None inside a method that does not need it.
        b: grad_theta f, like ``theta``.
        solve: The solver's diagnosis.
        gradients: Total cost in gradients of the inner loss on ``inner_batch``: work on another
            batch counts in proportion to its number of examples.
    """

    outer_loss: Tensor
    direct: Tensor
    implicit: Tensor
    v: Tensor | None
    b: Tensor
    solve: SolveInfo
    gradients: float


@overload
def hypergradient(
    problem: BilevelProblem, lam: Tensor, theta: Tensor, inner_batch: Any = None,
    outer_batch: Any = None, solver: Solver | None = None, cross_batch: Any = None,
    curvature_batch: Any = None, return_info: Literal[False] = False, diagnose: bool = True,
    cross_mode: str = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def hypergradient(
    problem: BilevelProblem, lam: Tensor, theta: Tensor, inner_batch: Any = None,
    outer_batch: Any = None, solver: Solver | None = None, cross_batch: Any = None,
    curvature_batch: Any = None, *, return_info: Literal[True], diagnose: bool = True,
    cross_mode: str = "auto",
) -> tuple[Tensor, HypergradientInfo]: ...  # fmt: skip
@overload
def hypergradient(
    problem: BilevelProblem, lam: Tensor, theta: Tensor, inner_batch: Any = None,
    outer_batch: Any = None, solver: Solver | None = None, cross_batch: Any = None,
    curvature_batch: Any = None, return_info: bool = False, diagnose: bool = True,
    cross_mode: str = "auto",
) -> Tensor | tuple[Tensor, HypergradientInfo]: ...  # fmt: skip
@differentiating
def hypergradient(
    problem: BilevelProblem,
    lam: Tensor,
    theta: Tensor,
    inner_batch: Any = None,
    outer_batch: Any = None,
    solver: Solver | None = None,
    cross_batch: Any = None,
    curvature_batch: Any = None,
    return_info: bool = False,
    diagnose: bool = True,
    cross_mode: str = "auto",
) -> Tensor | tuple[Tensor, HypergradientInfo]:
    r"""The implicit-function-theorem hypergradient at (lam, theta).

        b = grad_theta f,   (H + damping I) v = b,   dPhi/dlam ~ grad_lam f - J v

    It is the derivative of Phi only where theta solves the inner problem; elsewhere its error is
    proportional to the distance from theta*.

    One thing is not seen here: a ``torch.autograd.Function`` whose backward leaves autograd (by
    NumPy, say) without being marked ``once_differentiable``, so that H and J come out short of a
    part. `check` finds it.

    Args:
        problem: The two losses.
        lam: Outer variable, any shape.
        theta: Inner variable, shape (d,), near theta*(lam).
        inner_batch: Batch for H and J, unless the next two are given.
        outer_batch: Batch for f.
        solver: How v is found; `Direct` by default, for small problems.
        cross_batch: Batch for J; by default ``inner_batch``.
        curvature_batch: Batch for H; by default ``inner_batch``.
        return_info: Also return a `HypergradientInfo`.
        diagnose: With ``return_info``, have the residual computed even where it costs a product
            (not counted in the cost).
        cross_mode: How J v is computed: ``"auto"`` or ``"double_backward"``, see
            `bilevel_lite.products.cross_vp`. Under ``"auto"``, where H and J are of one batch, KFAC
            and EKFAC give J v from their own pass, if they know every layer. Equal to rounding;
            ``info.solve.cross`` says what was done.

    Returns:
        A detached tensor like ``lam``; with ``return_info=True`` a pair (tensor, info).

    Raises:
        TypeError: if ``lam`` or ``theta`` is not a floating-point tensor, or an argument is of
            another kind (a sampler or a DataLoader is no batch).
        ValueError: if a loss is not one finite number or misses a variable, if g is another
            function at each call (it draws random numbers, or its model keeps something from call
            to call) or cannot be differentiated twice, or the result is not finite.

    Cost: 1 gradient (b and the direct term), the solver's products, 1 cross product.
    Source: Bengio (2000); Pedregosa (2016); Lorraine et al. (2020).
    """
    require_problem(problem)
    require_variable("lam", lam)
    require_variable("theta", theta)
    solver = Direct() if solver is None else solver
    if not hasattr(solver, "solve"):
        raise TypeError(f"solver: got {solver!r}, expected a solver such as bilevel_lite.CG(3)")
    inner_batch, outer_batch = ordinary(inner_batch), ordinary(outer_batch)
    curvature_batch = _own_or_inner("curvature_batch", curvature_batch, inner_batch, problem)
    cross_batch = _own_or_inner("cross_batch", cross_batch, inner_batch, problem)
    require_batch("outer_batch", outer_batch, problem.outer_loss)
    total, info = implicit(
        problem, lam, theta, inner_batch, outer_batch, solver, cross_batch, curvature_batch,
        return_info and diagnose, cross_mode, want_v=return_info,
    )  # fmt: skip
    return (total, info) if return_info else total


def _own_or_inner(name: str, batch: Any, inner_batch: Any, problem: BilevelProblem) -> Any:
    """A batch of g for H or J; by default the inner one."""
    if batch is None:
        name, batch = "inner_batch", inner_batch
    require_batch(name, batch, problem.inner_loss)
    return ordinary(batch)


def implicit(
    problem: BilevelProblem,
    lam: Tensor,
    theta: Tensor,
    inner_batch: Any,
    outer_batch: Any,
    solver: Solver,
    cross_batch: Any = None,
    curvature_batch: Any = None,
    diagnose: bool = False,
    cross_mode: str = "auto",
    want_v: bool = False,
) -> tuple[Tensor, HypergradientInfo]:
    """`hypergradient` and its diagnosis, for callers that can do without v.

    Without ``want_v`` KFAC need not form it, and ``info.v`` may be None: J v reads v along the
    layers' inputs only.
    """
    curvature_batch = inner_batch if curvature_batch is None else curvature_batch
    cross_batch = inner_batch if cross_batch is None else cross_batch
    lam, theta = lam.detach().clone(), theta.detach()  # models may write into them
    if not (only_reads(problem.inner_loss) and only_reads(problem.outer_loss)):
        theta = theta.clone()
    before = versions((lam, theta))
    outer_loss, direct, b = gradient(problem.outer_loss, lam, theta, outer_batch, "outer_loss")
    at = problem, lam, theta, curvature_batch, b, diagnose
    if cross_mode == "auto" and cross_batch is curvature_batch:
        v, jv, solve = solver.solve_and_cross(*at, want_v=want_v)
    else:
        v, solve = solver.solve(*at)
        jv, solve.cross = cross_and_route(
            problem.inner_loss, lam, theta, cross_batch, v, cross_mode
        )
    require_unwritten("inner_loss", before, versions((lam, theta)))
    implicit = -jv
    total = direct + implicit
    _require_finite(total, lambda: f"||b|| = {float(b.norm()):.3g}")
    cost = (
        COST["gradient"] * relative_size(outer_batch, inner_batch)
        + solve.gradients * relative_size(curvature_batch, inner_batch)
        + COST["cross"] * relative_size(cross_batch, inner_batch)
    )
    return total, HypergradientInfo(outer_loss, direct, implicit, v, b, solve, cost)


def _require_finite(h: Tensor, context: Callable[[], str]) -> None:
    bad = int((~torch.isfinite(h)).sum())
    if bad:
        raise NotFinite(
            f"hypergradient: {bad} of {h.numel()} entries are NaN or infinite ({context()})"
        )


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

        reverse:  p = grad_theta f(theta_T);  for t = T-1, ..., T-K:
                      h <- h - lr J_t p,   p <- p - lr H_t p
        forward:  Z_0 = 0;  Z_{t+1} = Z_t - lr (H_t Z_t + J_t^T);
                      h = grad_lam f + Z_T^T grad_theta f

    Reverse mode stores the iterates (K of them) and recomputes everything else, so it holds one
    graph at a time. Forward mode stores one column of Z per entry of lam, whatever T is.

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
    """
    require_problem(problem)
    require_variable("lam", lam)
    require_variable("theta0", theta0)
    for name, value in (("steps", steps), ("truncate", truncate)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: got {value!r}, expected an integer of at least 1")
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
    _require_finite(h, lambda: f"after {steps} steps of size {lr}; is lr above 2 / curvature?")
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
    outer_loss, h, p = gradient(problem.outer_loss, lam, theta, outer_batch, "outer_loss")
    cost = COST["gradient"] * (steps + 1) + COST["hvp"] * len(kept)
    info = UnrollInfo(theta, outer_loss, len(kept) * theta.numel(), cost)
    while kept:
        g, theta_t, batch, as_drawn = kept.pop()
        require_as_drawn("inner_batch", batch, as_drawn)
        jp, hp = update_vjp(g, lam, theta_t, batch, p)
        h, p = h - lr * jp, p - lr * hp
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


@differentiating
def finite_difference_hypergradient(
    problem: BilevelProblem,
    lam: Tensor,
    solve_inner: Callable[[Tensor], Tensor],
    eps: float | None = None,
    outer_batch: Any = None,
    directions: Tensor | None = None,
) -> Tensor:
    r"""Central differences of Phi(lam) = f(lam, solve_inner(lam)).

        dPhi/dlam_j ~ (Phi(lam + eps e_j) - Phi(lam - eps e_j)) / (2 eps)

    The error is eps^2 / 6 times a third derivative, plus rounding divided by eps, plus what the
    inner solver adds: if it stops short in the same way each time (a fixed start and number of
    steps), a floor that no eps removes; if its error varies between calls, that variation over eps.

    Args:
        problem: The two losses; only ``outer_loss`` is used.
        lam: Outer variable, any shape.
        solve_inner: lam -> theta*(lam), from the same start and with the same number of steps
            each time, far enough for the accuracy that is asked of the differences.
        eps: Half the distance of the two evaluations, in lam's units; by default the cube root of
            lam's machine epsilon (6e-6 in float64, 5e-3 in float32).
        outer_batch: Batch of f.
        directions: Rows of directions like ``lam``, shape (k, *lam.shape); by default the
            coordinate axes, so that the result is the hypergradient.

    Returns:
        A tensor like ``lam``, or shape (k,) with ``directions``.

    Raises:
        TypeError: if ``lam`` or what ``solve_inner`` returns is no floating-point tensor.
        ValueError: if ``eps`` is not positive or too small for lam's float type, or f is not one
            finite number.

    Cost: two inner solves per direction.
    """
    require_problem(problem)
    require_variable("lam", lam)
    require_batch("outer_batch", outer_batch, problem.outer_loss)
    eps = torch.finfo(lam.dtype).eps ** (1 / 3) if eps is None else eps
    if not eps > 0:
        raise ValueError(f"eps: got {eps}, expected a positive number")
    lam, outer_batch = ordinary(lam.detach()), ordinary(outer_batch)
    axes = torch.eye(lam.numel(), dtype=lam.dtype, device=lam.device).view(-1, *lam.shape)
    if directions is not None and directions.shape[1:] != lam.shape:
        raise ValueError(
            f"directions: got shape {tuple(directions.shape)}, expected (k, *{tuple(lam.shape)})"
        )
    rows = axes if directions is None else directions

    def phi(point):
        theta = solve_inner(point)
        require_variable("solve_inner(lam)", theta)
        theta = theta.detach().clone()
        return evaluate(problem.outer_loss, point, theta, outer_batch, "outer_loss").detach()

    def slope(e):
        up, down = lam + eps * e, lam - eps * e
        if torch.equal(up, down):
            raise ValueError(
                f"eps: got {eps}, which is lost in the rounding of a lam in {lam.dtype}; expected "
                "a larger one"
            )
        return (phi(up) - phi(down)) / (2 * eps)

    slopes = torch.stack([slope(e) for e in rows]).to(lam)
    return slopes.view_as(lam) if directions is None else slopes
