"""Finite differences, and a judge of hypergradients by other ways than a solver took.

exact         H formed and solved; J v by another route than the method's
differences   of Phi, with the inner problem solved anew
J v           the method's own v, J v by another route
residual      ||b - H v|| / ||b||, H v from differences of first derivatives

The judged number is a solver's, or one that somebody computed with other code.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.hypergrad import HypergradientInfo
from bilevel_lite.hypergrad import hypergradient as by_solver
from bilevel_lite.params import norm_of
from bilevel_lite.problem import BilevelProblem, evaluate
from bilevel_lite.products import (
    cross_differences,
    cross_vp,
    differences,
    dot,
    gradient,
    theta_gradient,
)
from bilevel_lite.refuse import (
    at_least,
    require_batch,
    require_function,
    require_generator,
    require_like,
    require_number,
    require_problem,
    require_variable,
)
from bilevel_lite.solvers import Direct, Solver
from bilevel_lite.surroundings import differentiating, ordinary

__all__ = ["CheckReport", "check", "finite_difference_hypergradient", "short"]


@dataclass
class CheckReport:
    """A method's hypergradient beside independent truths.

    Attributes:
        relative_error_exact: ||h - exact|| / ||exact||, exact being the direct solve at theta with
            J v by another route.
        cosine_exact: Cosine of the angle between h and exact.
        relative_error_differences: The same against finite differences.
        cosine_differences: The same.
        rtol: The relative error that was asked for.
        passed: True if all relative errors are at most ``rtol`` and ``faults`` is empty.
        info: The method's own `HypergradientInfo`; None for a given hypergradient.
        relative_error_cross: Of the method's J v against the other route with the method's v.
        residual: ||b - H v|| / ||b|| of the method's v, with H v by differences and without
            damping; what the method itself says is ``info.solve.relative_residual``, where that
            costs it nothing.
        faults: What is wrong, in words; empty if nothing but the size of the errors.
        length: ||h|| / ||exact||.
        shares: What h is made of: the numbers a and c for which a grad_lam f - c J v is nearest to
            it, under "direct" and "implicit", and under "rest" what is left, relative to ||exact||.
            1, 1 and 0 for the exact one. A part that is zero, or only rounding beside the whole,
            has no share; empty where the two parts are parallel, as for a lam of one entry.
    """

    relative_error_exact: float | None
    cosine_exact: float | None
    relative_error_differences: float | None
    cosine_differences: float | None
    rtol: float
    passed: bool
    info: HypergradientInfo | None
    relative_error_cross: float | None = None
    residual: float | None = None
    faults: tuple[str, ...] = ()
    length: float | None = None
    shares: dict[str, float] = field(default_factory=dict)

    def __str__(self):
        lines = ["against            relative error   cosine"]
        for name, error, cosine in (
            ("exact solve", self.relative_error_exact, self.cosine_exact),
            ("differences", self.relative_error_differences, self.cosine_differences),
        ):
            if error is not None:
                lines.append(f"{name:<18} {short(error):>14}   {cosine:.6f}")
        if self.relative_error_cross is not None:
            lines.append(f"{'J v, other route':<18} {short(self.relative_error_cross):>14}")
        if self.info is not None:
            solve = self.info.solve
            by = f"{solve.solver}, {solve.products} products, relative residual {self.residual:.1e}"
        else:
            by = "a given hypergradient"
            if self.length is not None and not math.isnan(self.length):
                lines.append(f"{'length':<18} {self.length:>14.3g}")
            if self.shares:
                *parts, (_, rest) = self.shares.items()
                made = "".join(f"{share if abs(share) > 1e-6 else 0:.3g} {name}, "
                               for name, share in parts)  # fmt: skip
                lines.append(f"{'made of':<18} {made}rest {short(rest)}")
        verdict = "agrees" if self.passed else "DOES NOT AGREE"
        lines.append(f"{verdict} to {self.rtol:.0e} ({by})")
        return "\n".join([*lines, *self.faults])


@differentiating
def check(
    problem: BilevelProblem,
    lam: Tensor,
    theta: Tensor,
    inner_batch: Any = None,
    outer_batch: Any = None,
    solver: Solver | None = None,
    solve_inner: Callable[[Tensor], Tensor] | None = None,
    rtol: float | None = None,
    eps: float | None = None,
    num_directions: int | None = None,
    generator: torch.Generator | None = None,
    verbose: bool = True,
    hypergradient: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
) -> CheckReport:
    """Compare one method's hypergradient with an exact solve and with finite differences.

    The solver is used in a fresh copy: what it remembers, and its generator, are not touched.

    Code of one's own is judged by what it returns: hand it over as ``hypergradient``. The exact
    one is grad_lam f - J H^-1 b; what is meant to carry damping delta is held against it on a
    problem with delta/2 ||theta - theta_0||^2 added to g, theta_0 being the point of the check.

    Args:
        problem: The two losses.
        lam: Outer variable.
        theta: Inner variable near theta*(lam).
        inner_batch: Batch of g.
        outer_batch: Batch of f.
        solver: The method to check; `Direct` by default.
        solve_inner: lam -> theta*(lam); without it the finite differences are left out.
        rtol: Relative error up to which the verdict is good; by default 1e-4, and 1e-2 where lam or
            theta is of a shorter type than float64.
        eps: Step of the finite differences; by default the cube root of the machine epsilon.
        num_directions: Difference along this many random unit directions instead of every
            coordinate; for a long lam. The error and cosine then compare the projections onto
            these directions only, a rough guide with few of them.
        generator: Source of those directions; by default one of their own with seed 0.
        verbose: Print the report.
        hypergradient: A number to judge in place of a solver's: a tensor like lam, or a function
            (lam, theta) -> such a tensor, which is called twice, on copies; two values at one
            point that differ by more than ``rtol`` are a fault, and so is writing into lam or theta
            (what the function keeps elsewhere, a model say, is not looked at).

    Returns:
        `CheckReport`.

    Raises:
        TypeError: if ``lam``, ``theta`` or what ``solve_inner`` returns is no floating-point
            tensor, ``hypergradient`` is, or returns, no tensor, ``solve_inner`` is no function or
            ``generator`` none.
        ValueError: if a number is out of range, theta*(lam) has another shape than ``theta``, there
            is nothing to compare with (theta is too large for an exact solve and no ``solve_inner``
            is given), or a solver and a hypergradient are given.

    Cost: two gradients, to see whether g is one function; where d allows, a direct solve (d
    products), a J v by another route (`cross_differences`: dear where weights read the losses and
    lam is long) and two gradients for its residual; two inner solves per direction. Of a solver one
    hypergradient, one more such J v and one more residual; of a given hypergradient a gradient of
    f, and two calls if it is a function.

    Example:
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: ((theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> at = torch.zeros(2), torch.zeros(2), None, None
        >>> report = bl.check(problem, *at, bl.CG(2), solve_inner=lambda lam: lam, verbose=False)
        >>> report.passed, report.relative_error_exact < 1e-6
        (True, True)

        Code of one's own, with the sign of J v turned round:

        >>> given = {"hypergradient": lambda lam, theta: 2 * (1 - theta), "rtol": 1e-2}
        >>> report = bl.check(problem, *at, **given)
        against            relative error   cosine
        exact solve               2.0e+00   -1.000000
        length                          1
        made of            -1 implicit, rest below 1e-9
        DOES NOT AGREE to 1e-02 (a given hypergradient)
    """
    require_problem(problem)
    require_variable("lam", lam)
    require_variable("theta", theta)
    for name, number in (("rtol", rtol), ("eps", eps)):
        if number is not None:
            require_number(name, number, positive=True)
    if num_directions is not None:
        at_least("num_directions", num_directions, 1)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    require_generator(generator)
    if solve_inner is not None:
        require_function("solve_inner", solve_inner, "lam -> theta*(lam)")
    tiny = max(torch.finfo(t.dtype).eps for t in (lam, theta))
    rtol = (1e-4 if tiny < 1e-12 else 1e-2) if rtol is None else rtol
    eps = tiny ** (1 / 3) if eps is None else eps
    at = problem.inner_loss, lam, theta, inner_batch
    info = None
    if hypergradient is None:
        h, info = by_solver(
            problem, lam, theta, inner_batch, outer_batch, copy.deepcopy(solver), return_info=True,
            diagnose=False,  # a residual has H's graph formed, from which J v would then be taken
        )  # fmt: skip
        direct, b, by_other_route = info.direct, info.b, _other_route(info.solve.cross)
        faults = _same_value_twice(*at)
    elif solver is not None:
        raise ValueError(
            "solver: got one beside hypergradient, expected one of the two: what is judged"
        )
    else:
        h, faults = _given(hypergradient, lam, theta, rtol)
        _, direct, b = gradient(problem.outer_loss, lam, theta, outer_batch, "outer_loss")
        by_other_route = cross_differences  # few codes do; Phi's differences judge one that does
        faults = _same_value_twice(*at) + faults
    if h.shape != lam.shape or h.dtype != lam.dtype or h.device != lam.device:
        faults.append(f"h: is {h.dtype} of shape {tuple(h.shape)}, expected a tensor like lam")
        h = h.to(lam) if h.shape == lam.shape else torch.full_like(lam, math.nan)
    elif not torch.isfinite(h).all():
        faults.append("h: has entries that are NaN or infinite")
    cross = residual = exact = differences = length = None
    shares: dict[str, float] = {}
    if info is not None:
        cross, _ = _compare(-info.implicit, by_other_route(*at, info.v))
        residual = _residual(*at, b, info.v)
        if not cross <= rtol:
            faults.append(f"J v by {info.solve.cross}: is not what another route gives")
    if theta.numel() <= Direct().max_dim:
        v, solved = Direct().solve(problem, lam, theta, inner_batch, b)
        largest = max(map(abs, solved.curvature)) * norm_of(v) / (norm_of(b) or 1.0)
        left = _residual(*at, b, v)
        if not left <= rtol * max(1.0, largest * tiny ** (1 / 3)):
            faults.append(
                f"H: the exact solution has a relative residual of {left:.1e} where H v comes "
                "from differences of the gradient"
            )
        implicit = -by_other_route(*at, v)
        exact = _compare(h, direct + implicit)
        length, shares = _made_of(h, direct, implicit)
    if solve_inner is not None:
        rows, projected = None, h
        if num_directions is not None:
            drawn, where = (num_directions, lam.numel()), generator.device
            rows = torch.randn(drawn, generator=generator, dtype=lam.dtype, device=where)
            rows = (rows / rows.norm(dim=1, keepdim=True)).to(lam.device)
            projected = rows @ h.reshape(-1)
            rows = rows.view(-1, *lam.shape)

        def solved(point):
            star = solve_inner(point)
            require_like("solve_inner(lam)", star, theta)
            return star

        slopes = finite_difference_hypergradient(problem, lam, solved, eps, outer_batch, rows)
        differences = _compare(projected, slopes)
    if exact is None and differences is None:
        raise ValueError(
            f"solve_inner: is needed, since theta has {theta.numel()} entries, too many for an "
            "exact solve"
        )
    results = [pair for pair in (exact, differences) if pair is not None]
    report = CheckReport(
        *(exact or (None, None)),
        *(differences or (None, None)),
        rtol=rtol,
        passed=all(error <= rtol for error, _ in results) and not faults,
        info=info,
        relative_error_cross=cross,
        residual=residual,
        faults=tuple(faults),
        length=length,
        shares=shares,
    )
    if verbose:
        print(report)
    return report


def _given(hypergradient, lam, theta, rtol: float) -> tuple[Tensor, list[str]]:
    """Somebody's hypergradient, and what is wrong with how it came."""
    if isinstance(hypergradient, Tensor):
        return hypergradient.detach(), []
    if not callable(hypergradient):
        raise TypeError(
            f"hypergradient: got {type(hypergradient).__name__}, expected a tensor like lam, or a "
            "function (lam, theta) that returns one"
        )
    values, wrote = [], False
    for _ in range(2):
        at = lam.detach().clone(), theta.detach().clone()
        value = hypergradient(*at)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"hypergradient(lam, theta): returned {type(value).__name__}, expected a tensor "
                "like lam"
            )
        values.append(value.detach().clone())
        wrote |= not (torch.equal(at[0], lam) and torch.equal(at[1], theta))
    faults = ["hypergradient: writes into lam or theta"] if wrote else []
    first, second = (value.to(lam).nan_to_num() for value in values)
    if first.shape != second.shape or _compare(first, second)[0] > rtol:
        faults.append(
            "hypergradient: gives two values at one point (does it draw random numbers, or add to "
            "what the call before left?)"
        )
    return values[0], faults


def _made_of(h: Tensor, direct: Tensor, implicit: Tensor) -> tuple[float, dict[str, float]]:
    """||h|| / ||exact||, and h as a combination of its two parts, by least squares."""
    rounding, parts = torch.finfo(h.dtype).eps ** 0.5, (h, direct, implicit)
    h, direct, implicit = (t.double() for t in parts)
    size = norm_of(direct + implicit)
    length = float(h.norm()) / size if size else (math.inf if h.norm() else math.nan)
    least = rounding * size  # below, a part is rounding beside the whole
    named = {"direct": direct, "implicit": implicit}
    parts = {name: part.flatten() for name, part in named.items() if part.norm() > least}
    if not parts or not (size and torch.isfinite(h).all()):
        return length, {}
    columns = torch.stack([part / part.norm() for part in parts.values()], 1)
    if columns.shape[1] == 2 and 1 - float(columns[:, 0] @ columns[:, 1]) ** 2 < 1e-6:
        return length, {}
    found = torch.linalg.lstsq(columns, h.flatten()[:, None]).solution[:, 0]
    rest = float((h.flatten() - columns @ found).norm()) / size
    sizes = torch.stack([part.norm() for part in parts.values()])
    return length, {**dict(zip(parts, (found / sizes).tolist(), strict=True)), "rest": rest}


def _other_route(taken: str) -> Callable[..., Tensor]:
    """J v from differences of first derivatives, or by double backward where that was not taken."""
    if "double backward" in taken:
        return cross_differences
    return lambda *arguments: cross_vp(*arguments, mode="double_backward")


def _same_value_twice(loss, lam, theta, batch) -> list[str]:
    first, second = (theta_gradient(loss, lam, theta, batch, "inner_loss") for _ in range(2))
    if torch.equal(first[0], second[0]) or _compare(first[1], second[1])[0] < 1e-3:
        return []
    return [
        "inner_loss: gives two values at one point (does it draw random numbers, or a new batch at "
        "each call?), so that b, H and J each belong to another function"
    ]


def _residual(loss, lam, theta, batch, b, v) -> float:
    """||b - H v|| / ||b||, with H v from central differences of grad_theta g along v."""
    unit = norm_of(b)
    if not v.any():
        return 1.0 if unit else 0.0
    hv = differences(lambda at: theta_gradient(loss, lam, at, batch, "inner_loss")[1], theta, v)
    residual = norm_of(b - hv)
    return residual / unit if unit else residual


def short(error: float, digits: str = ".1e", rounding: str = "below 1e-9") -> str:
    """Its digits; what is only rounding, or the error of differences, has none worth printing."""
    return rounding if error < 1e-9 else f"{error:{digits}}"


def _compare(h: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative error and cosine of h against the truth."""
    h, truth = h.double(), truth.double()
    size = norm_of(truth)
    error = norm_of(h - truth) / size if size else norm_of(h)
    product = norm_of(h) * size
    return error, float(dot(h, truth)) / product if product else float("nan")


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
        TypeError: if ``lam`` or what ``solve_inner`` returns is no floating-point tensor,
            ``solve_inner`` is no function, or ``directions`` is no tensor.
        ValueError: if ``eps`` is not positive or too small for lam's float type, ``directions`` has
            rows of another shape than lam's, or f is not one finite number.

    Cost: two inner solves per direction.

    Example:
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: ((theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> solve = lambda lam: lam  # theta*
        >>> h = bl.finite_difference_hypergradient(problem, torch.zeros(2), solve_inner=solve)
        >>> h.round(decimals=3)
        tensor([-2., -2.])
    """
    require_problem(problem)
    require_variable("lam", lam)
    require_batch("outer_batch", outer_batch, problem.outer_loss)
    require_function("solve_inner", solve_inner, "lam -> theta*(lam)")
    eps = torch.finfo(lam.dtype).eps ** (1 / 3) if eps is None else eps
    require_number("eps", eps, positive=True)
    lam, outer_batch = ordinary(lam.detach()), ordinary(outer_batch)
    rows = directions
    if rows is None:
        rows = torch.eye(lam.numel(), dtype=lam.dtype, device=lam.device).view(-1, *lam.shape)
    elif not isinstance(rows, Tensor):
        raise TypeError(f"directions: got {type(rows).__name__}, expected a tensor, a row for each")
    elif rows.shape[1:] != lam.shape:
        raise ValueError(
            f"directions: got shape {tuple(rows.shape)}, expected (k, *{tuple(lam.shape)})"
        )

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
