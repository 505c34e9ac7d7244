"""The implicit hypergradient: dPhi/dlam = grad_lam f - J v,  H v = b, at theta ~ theta*.

By unrolling: `bilevel_lite.unroll`. By finite differences: `bilevel_lite.checking`.
"""

from dataclasses import dataclass
from typing import Any, Literal, overload

from torch import Tensor

from bilevel_lite.parallel import require_shared
from bilevel_lite.problem import BilevelProblem, relative_size
from bilevel_lite.products import COST, cross_and_route
from bilevel_lite.recorded import Recordings
from bilevel_lite.refuse import (
    require_batch,
    require_finite,
    require_problem,
    require_unwritten,
    require_variable,
    versions,
)
from bilevel_lite.risk import only_reads
from bilevel_lite.solvers import Direct, SolveInfo, Solver
from bilevel_lite.surroundings import differentiating, ordinary, transforming

__all__ = ["HypergradientInfo", "hypergradient", "implicit"]


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

    Five things are not seen here: a ``torch.autograd.Function`` whose backward leaves autograd (by
    NumPy, say) without being marked ``once_differentiable``, so that H and J come out short of a
    part (`check` finds it); what a loss keeps outside of its model from one call to the next; a
    weight that the model computed and kept in a call before this one, of other parameters; a loss
    that reads a lam of its own surroundings beside the argument, which is a constant (to `check`,
    too: take all of lam from the argument); and a loss that stops or turns a gradient on purpose
    (detach, no_grad, gradient reversal), whose H and J are autograd's, not the derivative of the
    field that a training would follow (`check` sees it by the solved problem's differences).

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

    Example:
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: ((theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> lam = torch.zeros(2)  # theta* = lam here, and Phi = ||lam - 1||^2
        >>> bl.hypergradient(problem, lam, lam, None, None, solver=bl.CG(2))
        tensor([-2., -2.])
    """
    if transforming():
        raise ValueError(
            "hypergradient: is called inside a transform of torch.func (vmap, grad, ...), which "
            "hides the graphs that it needs; call it in a loop, or see bilevel_lite.meta for many "
            "problems at once"
        )
    require_problem(problem)
    require_variable("lam", lam)
    require_variable("theta", theta)
    solver = Direct() if solver is None else solver
    if isinstance(solver, type) or not hasattr(solver, "prepare"):
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
    recorded: Recordings | None = None,
) -> tuple[Tensor, HypergradientInfo]:
    """`hypergradient` and its diagnosis, for callers that can do without v.

    Without ``want_v`` KFAC need not form it, and ``info.v`` may be None: J v reads v along the
    layers' inputs only. With ``recorded`` what has fixed shapes is replayed, on a GPU.
    """
    recorded = recorded or Recordings(on=False)
    require_shared(solver, problem.outer_loss)
    curvature_batch = inner_batch if curvature_batch is None else curvature_batch
    cross_batch = inner_batch if cross_batch is None else cross_batch
    lam, theta = lam.detach().clone(), theta.detach()  # models may write into them
    if not (only_reads(problem.inner_loss) and only_reads(problem.outer_loss)):
        theta = theta.clone()
    before = versions((lam, theta))
    outer_loss, direct, b = recorded.gradient(
        problem.outer_loss, lam, theta, outer_batch, "outer_loss"
    )
    shared = cross_mode == "auto" and cross_batch is curvature_batch
    at = recorded.prepare(solver, problem, lam, theta, curvature_batch, cross=shared)
    v, solve = at.solve(b, diagnose, want_v or not shared)
    if shared:
        jv, solve.cross = at.cross(v)
    else:
        del at  # with the graph of H
        jv, solve.cross = cross_and_route(
            problem.inner_loss, lam, theta, cross_batch, v, cross_mode
        )
    require_unwritten("inner_loss", before, versions((lam, theta)))
    total = direct - jv
    require_finite({"hypergradient": total}, lambda: f" (||b|| = {float(b.norm()):.3g})")
    cost = (
        COST["gradient"] * relative_size(outer_batch, inner_batch)
        + solve.gradients * relative_size(curvature_batch, inner_batch)
        + COST["cross"] * relative_size(cross_batch, inner_batch)
    )
    return total, HypergradientInfo(outer_loss, direct, -jv, v, b, solve, cost)
