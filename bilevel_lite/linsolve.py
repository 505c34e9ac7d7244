"""Solve H v = b for an operator H: directly, by CG, by a Neumann series, by Richardson steps.

An operator is any function v -> H v. Each solver is the textbook's, with three promises: it
returns the iterate that it has when it converges, it adds damping once, and it says what it met
on the way (residual, curvature along its directions, products spent).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import TypeVar, cast

import torch
from torch import Tensor

from bilevel_lite.params import dot
from bilevel_lite.products import COST
from bilevel_lite.refuse import NotFinite, at_least, looked_at, require_number

__all__ = [
    "DivergenceWarning",
    "NegativeCurvatureWarning",
    "SolveInfo",
    "cg",
    "cg_normal",
    "direct",
    "neumann",
    "richardson",
]

Operator = Callable[[Tensor], Tensor]
F = TypeVar("F", bound=Callable)


class NegativeCurvatureWarning(UserWarning):
    """CG met a direction p with p^T H p <= 0: H is not positive definite and CG does not apply.

    Example:
        >>> import warnings
        >>> from bilevel_lite import linsolve
        >>> with warnings.catch_warnings(record=True) as seen:
        ...     warnings.simplefilter("always")
        ...     info = linsolve.cg(lambda v: -v, torch.ones(2), iters=2)
        >>> seen[0].category.__name__
        'NegativeCurvatureWarning'
    """


class DivergenceWarning(UserWarning):
    """A Neumann series or Richardson iteration that grows: it is no approximation of H^-1 b.

    Example:
        >>> import warnings
        >>> from bilevel_lite import linsolve
        >>> with warnings.catch_warnings(record=True) as seen:
        ...     warnings.simplefilter("always")
        ...     info = linsolve.neumann(lambda v: 3 * v, torch.ones(2), terms=9, step=1.0)
        >>> seen[0].category.__name__
        'DivergenceWarning'
    """


@dataclass
class SolveInfo:
    """The diagnosis of one solve.

    Attributes:
        solution: v, like b; None from a `bilevel_lite.solvers.Solver`, which gives v beside it.
        iterations: Steps taken.
        products: Products with H spent on v (one for a residual alone is not counted).
        residual: ||b - (H + damping I) v||, in b's units; None where it was not computed.
        relative_residual: The same divided by ||b||: 0 is solved, 1 is no better than v = 0.
        curvature: (smallest, largest) Rayleigh quotient p^T H p / p^T p met, damping included;
            None for solvers that meet none.
        negative_curvature: True if a quotient was zero, to rounding, or negative.
        converged: True if the tolerance was reached; None for solvers without one.
        gradients: Cost of v in gradient-equivalents.
        solver: Name of the solver.
        cross: How J v was computed, and why so; "" where only v was asked for.
    """

    solution: Tensor | None
    iterations: int
    products: int
    residual: float | None = None
    relative_residual: float | None = None
    curvature: tuple[float, float] | None = None
    negative_curvature: bool = False
    converged: bool | None = None
    gradients: float | None = None
    solver: str = ""
    cross: str = ""

    def __post_init__(self):
        if self.gradients is None:
            self.gradients = COST["hvp"] * self.products

    def measured(self, r: Tensor, b: Tensor) -> "SolveInfo":
        """Note the residual r = b - (H + damping I) v; return itself."""
        scale = _lift(b)
        r, b = (r, b) if scale == 1 else (r * scale, b * scale)
        self.residual, self.relative_residual = _sizes(*_read(r.norm(), b.norm()))
        self.residual /= scale
        return self


class _Watched:
    """v -> (H + damping I) v, which counts its products and notes the curvature it meets."""

    def __init__(self, matvec: Operator, damping: float):
        require_number("damping", damping)
        self.matvec, self.damping, self.products = matvec, damping, 0
        self.low, self.high = math.inf, -math.inf

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        hv = self.matvec(v)
        return torch.add(hv, v, alpha=self.damping) if self.damping else hv

    def along(self, php: float, pp: float) -> float:
        """Note p^T H p / p^T p, the curvature along p, and return it."""
        quotient = php / pp
        self.low, self.high = min(self.low, quotient), max(self.high, quotient)
        return quotient

    def info(
        self, v: Tensor, steps: int, residual=None, relative=None, converged=None
    ) -> SolveInfo:
        """The diagnosis, with what was met on the way."""
        met = (self.low, self.high) if self.low <= self.high else None
        negative = met is not None and self.low <= 0
        return SolveInfo(v, steps, self.products, residual, relative, met, negative, converged)


def _read(*scalars: Tensor) -> list[float]:
    """Scalars as numbers, in one look: each look waits until a GPU has caught up."""
    return torch.stack(scalars).tolist()


def _sizes(residual: float, b_norm: float) -> tuple[float, float]:
    """The residual's norm, and the same relative to b's."""
    return residual, residual / b_norm if b_norm else residual


def _require_finite(what: str, *values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise NotFinite(f"{what} is not finite, or too large for its norm")


def _start(x0: Tensor | None, b: Tensor) -> Tensor:
    """A copy of the start in b's float type and place: in another, no residual is its own."""
    return torch.zeros_like(b) if x0 is None else x0.detach().to(b, copy=True)


def _vanishes(pp: float, like: Tensor) -> bool:
    """Whether ||p||^2 is so near underflow that p^T H p = 0 says nothing of H."""
    precision = torch.finfo(like.dtype)
    return pp <= precision.tiny / precision.eps**2


def _lift(b: Tensor) -> float:
    """1, or a power of two (times which is exact) by which squares of b do not underflow."""
    precision, top = torch.finfo(b.dtype), _top(b)
    small = 0 < top < math.sqrt(precision.tiny) / precision.eps
    return 2.0 ** -math.frexp(top)[1] if small else 1.0


def _top(b: Tensor) -> float:
    return float(b.detach().abs().max()) if looked_at(b) and b.numel() else 0.0


def _lift_of_h(r: Tensor, hr: Tensor) -> float:
    """1, or a power of two by which ||H H r||^2 does not underflow where H is small."""
    top, along = _top(r), _top(hr)
    if not 0 < along < top or not _vanishes((along / top * along) ** 2, r):
        return 1.0
    return 2.0 ** (math.frexp(top)[1] - math.frexp(along)[1])


def _in_range(solve: F) -> F:
    """Give a solver b in a range where its squares do not underflow."""

    @wraps(solve)
    def solved(matvec, b, *args, **options):
        scale = _lift(b)
        if scale == 1:
            return solve(matvec, b, *args, **options)
        given = signature(solve).bind(matvec, b * scale, *args, **options)
        if given.arguments.get("x0") is not None:
            given.arguments["x0"] = given.arguments["x0"] * scale
        info = solve(*given.args, **given.kwargs)
        info.solution = info.solution / scale
        info.residual = None if info.residual is None else info.residual / scale
        return info

    return cast(F, solved)


@_in_range
def cg(
    matvec: Operator,
    b: Tensor,
    iters: int,
    tol: float = 1e-10,
    damping: float = 0.0,
    x0: Tensor | None = None,
    precondition: Operator | None = None,
) -> SolveInfo:
    r"""Conjugate gradients on (H + damping I) v = b, for symmetric positive definite H.

    With r the residual, z = M r its preconditioned form and p the direction:

        a = <r, z> / <p, H p>,  v += a p,  r -= a H p,  beta = <r', z'> / <r, z>,  p = z' + beta p

    Args:
        matvec: v -> H v.
        b: Right-hand side, any shape; a scalar works.
        iters: Steps at most; exact arithmetic needs as many as H has distinct eigenvalues.
        tol: Stop when ||r|| <= tol ||b||.
        damping: Added to H's diagonal, once.
        x0: Start (warm start); zero by default, which saves one product.
        precondition: r -> M r, with M an approximate inverse of H, symmetric positive definite.

    Returns:
        `SolveInfo`; ``residual`` is the recurrence's own (begun anew, once, where the rounding of a
        start far away would hide what is left).

    Raises:
        ValueError: for a negative damping, fewer than one step, or a product that is not finite.

    Warns:
        NegativeCurvatureWarning: and stops with the last good iterate, if p^T H p <= 0, or is lost
            in the rounding of H p (H is singular, and b has a part that no H v reaches).

    Cost: one product per step, plus one with ``x0``. Source: Hestenes and Stiefel (1952).

    Example:
        >>> from bilevel_lite import linsolve
        >>> H, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
        >>> linsolve.cg(lambda v: H @ v, b, iters=2).solution.round(decimals=4)
        tensor([0.2000, 0.6000])
    """
    at_least("iters", iters, 1)
    require_number("tol", tol)
    apply = _Watched(matvec, damping)
    precondition, eps = precondition or (lambda r: r), torch.finfo(b.dtype).eps
    v = _start(x0, b)
    r = b.clone() if x0 is None else b - apply(v)
    z = precondition(r)
    p, rz = z.clone(), dot(r, z)
    steps = 0
    size = [] if x0 is None else [(b - r).norm(), v.norm()]  # ||H x0||, ||x0||
    b_norm, residual, pp, *size = _read(b.norm(), r.norm(), dot(p, p), *size)
    _require_finite("b: the right-hand side", b_norm)
    _require_finite("b - H x0, or what precondition makes of it,", residual, pp)
    size = size[0] / size[1] if size and size[1] else 0.0  # of H, at least
    far = residual if residual > b_norm else 0.0  # a start far away, whose rounding r carries
    while steps < iters and residual > tol * b_norm:
        if pp == 0:  # the direction underflowed: nothing is left to solve
            break
        hp = apply(p)
        php, along = _read(dot(p, hp), hp.norm())
        if not math.isfinite(php):
            raise NotFinite(f"matvec: p^T H p is {php} at CG step {steps + 1}: H v is not finite")
        if php <= 0 and _vanishes(pp, b):
            break
        quotient = apply.along(php, pp)
        size = max(size, along / math.sqrt(pp) if math.isfinite(along) else 0.0)
        if abs(quotient) <= eps * size > 0:
            if residual > eps**0.75 * b_norm:  # else all is solved that can be
                apply.low = min(apply.low, 0.0)
                warnings.warn(
                    f"CG stopped at step {steps + 1}: the curvature along its direction is "
                    f"{quotient:.3g}, nothing beside {size:.3g}, so H is singular to working "
                    "precision and H v = b has no solution that CG can find; the result is the "
                    f"iterate after {steps} step(s). Add damping or an l2 term",
                    NegativeCurvatureWarning,
                    stacklevel=3,
                )
            break
        if quotient <= 0:
            warnings.warn(
                f"CG stopped at step {steps + 1}: the curvature along its direction is "
                f"{quotient:.3g}, so H is not positive definite and H v = b is not what CG "
                f"solves; the result is the iterate after {steps} step(s), not the solution. "
                f"Solve the inner problem further, or add damping above {-quotient:.3g}",
                NegativeCurvatureWarning,
                stacklevel=3,
            )
            break
        alpha = rz / php
        v.addcmul_(alpha, p)
        r.addcmul_(-alpha, hp)
        steps += 1
        z = precondition(r)
        rz, rz_old = dot(r, z), rz
        p = torch.addcmul(z, rz / rz_old, p)
        residual, pp = _read(r.norm(), dot(p, p))
        if residual <= tol * b_norm < far * eps:  # lost in its rounding
            r = b - apply(v)
            z = precondition(r)
            p, rz = z.clone(), dot(r, z)
            residual, pp = _read(r.norm(), dot(p, p))
            far = 0.0
        _require_finite(f"matvec: the residual after CG step {steps}", residual, pp)
    return apply.info(v, steps, *_sizes(residual, b_norm), residual <= tol * b_norm)


@_in_range
def cg_normal(
    matvec: Operator,
    b: Tensor,
    iters: int,
    tol: float = 1e-10,
    damping: float = 0.0,
    x0: Tensor | None = None,
) -> SolveInfo:
    """CG on the normal equations H^2 v = H b; works for indefinite H, squares the condition number.

    Here because published numbers used it under the name of CG. Damping is added once, to H.

    Args:
        matvec: v -> H v, H symmetric, not necessarily definite.
        b: Right-hand side.
        iters: Steps at most.
        tol: Stop when ||H r|| <= tol ||H b||.
        damping: Added to H's diagonal, once.
        x0: Start; zero by default, which saves two products: H x0, and H b for the tolerance.

    Returns:
        `SolveInfo`; ``residual`` is that of H v = b and costs no product (it is carried along),
        ``curvature`` holds Rayleigh quotients of H^2, which are never negative.

    Raises:
        ValueError: as `cg`.

    Cost: 2 products per step plus 1, as in the released code of arXiv 2603.29108; with ``x0``
    plus 3.

    Example:
        >>> from bilevel_lite import linsolve
        >>> H, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
        >>> linsolve.cg_normal(lambda v: H @ v, b, iters=2).solution.round(decimals=4)
        tensor([0.2000, 0.6000])
    """
    at_least("iters", iters, 1)
    require_number("tol", tol)
    apply = _Watched(matvec, damping)
    v = _start(x0, b)
    r = b.clone() if x0 is None else b - apply(v)  # residual of H v = b
    s = apply(r)  # residual of the normal equations, H r
    hb = s if x0 is None else apply(b)
    times, lift = apply, _lift_of_h(r, s)
    if lift != 1:  # (lift H) (v / lift) = b
        times, s, hb, v = (lambda p: apply(p) * lift), s * lift, hb * lift, v / lift
    p, ss = s.clone(), dot(s, s)
    steps = 0
    s_norm, hb_norm, b_norm = _read(s.norm(), hb.norm(), b.norm())
    _require_finite("b: the right-hand side", b_norm)
    _require_finite("matvec: H b", s_norm, hb_norm)
    far = s_norm if s_norm > hb_norm else 0.0  # as in `cg`
    while steps < iters and s_norm > tol * hb_norm:
        hp = times(p)
        hphp, pp = _read(dot(hp, hp), dot(p, p))
        _require_finite(f"matvec: ||H p||^2 at step {steps + 1}", hphp, pp)
        if pp == 0:  # the direction underflowed: nothing is left to solve
            break
        if hphp == 0 and _vanishes(pp, b):
            break
        if hphp == 0:
            raise ValueError(f"matvec: ||H p||^2 is {hphp} at step {steps + 1}: H is singular")
        apply.along(hphp / lift**2, pp)
        alpha = ss / hphp
        v.addcmul_(alpha, p)
        r.addcmul_(-alpha, hp)
        s = times(r)
        steps += 1
        ss, ss_old = dot(s, s), ss
        p = s + (ss / ss_old) * p
        (s_norm,) = _read(s.norm())
        if s_norm <= tol * hb_norm < far * torch.finfo(b.dtype).eps:
            r = b - times(v)
            s, far = times(r), 0.0
            p, ss = s.clone(), dot(s, s)
            (s_norm,) = _read(s.norm())
        _require_finite(f"matvec: the residual after step {steps}", s_norm)
    sizes = _sizes(*_read(r.norm()), b_norm)
    return apply.info(v if lift == 1 else v * lift, steps, *sizes, s_norm <= tol * hb_norm)


@_in_range
def neumann(
    matvec: Operator, b: Tensor, terms: int, step: float, damping: float = 0.0
) -> SolveInfo:
    r"""Truncated Neumann series of H^-1, the sum of ``terms`` summands.

        v = step * sum_{j=0}^{terms-1} (I - step H)^j b

    ``terms`` counts the summands, the identity one included: one term is v = step * b, and K terms
    are K truncated steps of unrolled gradient descent. (Papers that write "Neumann-K" for K
    products mean K + 1 terms here.) The error along an eigenvector with eigenvalue mu is
    (1 - step mu)^terms of the solution there, so the series needs step < 2 / mu_max.

    Args:
        matvec: v -> H v.
        b: Right-hand side.
        terms: Number of summands, at least 1.
        step: Step size, in units of 1 / curvature.
        damping: Added to H's diagonal, once.

    Returns:
        `SolveInfo`. The residual is b - H v = (I - step H)^terms b; it is not computed here
        because it would cost one more product.

    Raises:
        ValueError: for a step that is not positive, fewer than one term, or a series that has
            grown beyond the largest number (a diverging step).

    Warns:
        DivergenceWarning: if the last summand, step (I - step H)^(terms-1) b, is longer than the
            first: some |1 - step mu| > 1. It is step times the residual of the sum of the others,
            so that v = 0 would have had a smaller one.

    Cost: terms - 1 products, fewer once the summands vanish.
    Source: Lorraine et al. (2020).

    Example:
        >>> from bilevel_lite import linsolve
        >>> H, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
        >>> linsolve.neumann(lambda v: H @ v, b, terms=50, step=0.3).solution.round(decimals=4)
        tensor([0.2000, 0.6000])
    """
    at_least("terms", terms, 1)
    require_number("step", step, positive=True)
    apply = _Watched(matvec, damping)
    p = b.clone()
    total = b.clone()
    growth = 0.0
    (pp,) = _read(dot(p, p))
    _require_finite("b: the right-hand side", pp)
    bb = pp
    for _ in range(terms - 1):
        if pp < torch.finfo(p.dtype).tiny:  # the remaining summands vanish in this precision
            break
        hp = apply(p)
        php = dot(p, hp)
        p.sub_(hp, alpha=step)
        total.add_(p)
        before, (php, pp) = pp, _read(php, dot(p, p))
        if math.isfinite(php / before):
            apply.along(php, before)
            growth = max(growth, math.sqrt(pp / before))
    if not bool(torch.isfinite(total).all()):
        if not growth:  # no product was finite
            raise NotFinite("matvec: H b is not finite, or too large for its norm")
        raise NotFinite(_divergence(step, apply.low, apply.high, growth))
    if pp > bb * (1 + torch.finfo(p.dtype).eps ** 0.5):  # beyond rounding
        last = f"; the last of {terms} summands is {math.sqrt(pp / bb):.3g} times the first"
        warnings.warn(
            _divergence(step, apply.low, apply.high, growth) + last, DivergenceWarning, stacklevel=3
        )
    return apply.info(step * total, apply.products + 1)


def _divergence(step: float, low: float, high: float, growth: float) -> str:
    """Why the series diverges, from the quotients met and the largest growth of a summand.

    For H without negative eigenvalues, 1 < growth <= max |1 - step mu| = step mu_max - 1.
    """
    if low <= 0:
        why = (
            f"curvature from {low:.3g} to {high:.3g} was met, and where it is negative no step "
            "converges: solve the inner problem further, or add damping"
        )
    else:
        if 1 < growth < math.inf:
            high = max(high, (1 + growth) / step)
        why = (
            f"the largest curvature is at least {high:.3g}, if none is negative, and the series "
            f"needs step < 2 / curvature = {2 / high:.3g}"
        )
    return f"step: {step} makes the Neumann series diverge ({why})"


def richardson(
    matvec: Operator,
    b: Tensor,
    steps: int,
    step: float,
    damping: float = 0.0,
    x0: Tensor | None = None,
    precondition: Operator | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> SolveInfo:
    r"""Richardson iteration: gradient steps on the quadratic 1/2 v H v - b v, preconditioned.

        v <- v - step M ((H + damping I) v - b)

    From zero, K steps without M are a Neumann series of K terms. It converges if every eigenvalue
    of M (H + damping I) lies between 0 and 2 / step. ``matvec`` may be another operator at each
    step (another batch's H): then the steps are those of stochastic gradient descent.

    Args:
        matvec: v -> H v.
        b: Right-hand side, any shape.
        steps: Number of steps, at least 1.
        step: Step size, in units of 1 / curvature; about 1 with a good M.
        damping: Added to H's diagonal, once.
        x0: Start (warm start); zero by default, which saves one product, as does an x0 of zeros.
        precondition: r -> M r, with M an approximate inverse of H.
        observe: Is given the residual b - (H + damping I) v before each step.

    Returns:
        `SolveInfo`. The residual at the end is not computed: it would cost one more product.

    Raises:
        ValueError: for fewer than one step, a step that is not positive, a negative damping, or (on
            a CPU) an iterate that is not finite.

    Warns:
        DivergenceWarning: (on a CPU) if the last residual met is longer than the first, and than b.

    Cost: one product a step, one less from zero.
    Source: Richardson (1911).

    Example:
        >>> from bilevel_lite import linsolve
        >>> H, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
        >>> linsolve.richardson(lambda v: H @ v, b, steps=50, step=0.3).solution.round(decimals=4)
        tensor([0.2000, 0.6000])
    """
    at_least("steps", steps, 1)
    require_number("step", step, positive=True)
    apply = _Watched(matvec, damping)
    v = _start(x0, b) if x0 is not None and bool(x0.any()) else None
    first = None
    for _ in range(steps):
        r = b if v is None else b - apply(v)
        first = r if first is None else first
        if observe is not None:
            observe(r)
        change = step * (r if precondition is None else precondition(r))
        v = change if v is None else v + change
    if looked_at(v) and not bool(torch.isfinite(v).all()):
        _require_finite("b: the right-hand side", float(b.norm()))
        raise NotFinite(
            f"step: {step} makes the Richardson iteration diverge, or a product is not finite: it "
            "needs step < 2 / curvature, the largest of H, or of M H where it is preconditioned"
        )
    if looked_at(v):
        last, *others = _read(r.norm(), first.norm(), b.norm())
        if last > max(others) * (1 + torch.finfo(b.dtype).eps ** 0.5):  # beyond rounding
            warnings.warn(
                f"step: {step} makes the Richardson iteration diverge: before the last of {steps} "
                f"steps the residual is {last:.3g}, that of v = 0 is {others[1]:.3g}; give a "
                "smaller step",
                DivergenceWarning,
                stacklevel=2,
            )
    return apply.info(v, steps)


def direct(matrix: Tensor, b: Tensor, damping: float = 0.0) -> SolveInfo:
    """Solve (H + damping I) v = b with H as a matrix, by LU factorisation.

    Args:
        matrix: H, shape (d, d), symmetric, not necessarily definite.
        b: Right-hand side with d entries, any shape.
        damping: Added to H's diagonal, once.

    Returns:
        `SolveInfo`, with the residual and, as ``curvature``, the extreme eigenvalues.

    Raises:
        TypeError: in half precision.
        ValueError: if the matrix is singular to working precision.

    Example:
        >>> from bilevel_lite import linsolve
        >>> H, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
        >>> linsolve.direct(H, b).solution.round(decimals=4)
        tensor([0.2000, 0.6000])
    """
    apply = _Watched(lambda v: v, damping)
    if b.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"b: is in {b.dtype}, in which torch factors no matrix, expected float32 or float64; "
            "use CG, or a theta of such a type"
        )
    matrix = matrix + damping * torch.eye(len(matrix), dtype=b.dtype, device=b.device)
    flat = b.reshape(-1)
    if not bool(torch.isfinite(matrix).all()):
        raise NotFinite("H: has entries that are NaN or infinite")
    eigenvalues = torch.linalg.eigvalsh(matrix)
    smallest = float(eigenvalues.abs().min())
    limit = len(matrix) * torch.finfo(b.dtype).eps * float(eigenvalues.abs().max())
    if smallest <= limit:
        raise ValueError(
            f"H: is singular to working precision (smallest eigenvalue in size {smallest:.3g}, "
            f"largest {float(eigenvalues.abs().max()):.3g}), so H v = b has no unique solution; "
            "add damping or an l2 term"
        )
    v = torch.linalg.solve(matrix, flat)
    apply.products = len(matrix)
    for extreme in _read(eigenvalues[0], eigenvalues[-1]):
        apply.along(extreme, 1.0)
    return apply.info(v.view_as(b), 1, converged=True).measured(flat - matrix @ v, flat)
