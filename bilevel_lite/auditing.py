r"""Where the error of a hypergradient comes from: `audit` splits it into four parts that add up.

Take four hypergradients between the truth and what a method computes:

    h0  at theta*, exact H, full batches                            the truth, dPhi/dlam
    h1  at theta,  exact H, full batches
    h2  at theta,  the solver's own system solved exactly           (its curvature, its damping)
    h3  at theta,  the solver's own answer
    h4  as h3, on minibatches                                       what a run sees

    h4 - h0 = (h1 - h0)  +  (h2 - h1)  +  (h3 - h2)  +  (h4 - h3)
              inner         curvature     linear        minibatch

    inner      theta is not theta*
    curvature  another matrix than the Hessian stands for H, or damping is added
    linear     the solver stops before it has solved its system
    minibatch  the batches are not all of the data

The parts are vectors and add up exactly; their lengths do not, for parts may cancel.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.checking import short
from bilevel_lite.hypergrad import hypergradient
from bilevel_lite.params import norm_of
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.refuse import at_least, require_function, require_like, require_variable
from bilevel_lite.solvers import CG, Direct, Solver
from bilevel_lite.surroundings import differentiating

__all__ = ["AuditReport", "AuditRow", "PARTS", "audit"]

PARTS = ("inner", "curvature", "linear", "minibatch")


@dataclass
class AuditRow:
    """One solver's error against the truth.

    Attributes:
        name: What the table calls the solver.
        relative_error: ||h - h0|| / ||h0||: on the full batches, or with minibatches the root of
            its mean square over the draws.
        cosine: Of the angle between h and h0 (with minibatches the mean over the draws). A
            hypergradient of zero has no angle: such a draw is left out, and NaN says that all are.
        length: ||h|| / ||h0||, the same.
        parts: Part -> its length over ||h0||; for ``"minibatch"`` the root of the mean square.
            A part that was not asked for is missing.
        vectors: The parts themselves, like lam (of ``"minibatch"`` the mean over the draws: the
            bias that minibatches add).
        products: Curvature products of one full-batch solve.
        gradients: Cost of one full-batch hypergradient.
    """

    name: str
    relative_error: float
    cosine: float
    length: float
    parts: dict[str, float]
    vectors: dict[str, Tensor] = field(repr=False)
    products: int
    gradients: float


@dataclass
class AuditReport:
    """The rows of `audit`; prints as a table, and `figure` draws it.

    Attributes:
        truth: The hypergradient that all are compared with, like lam.
        rows: One for each solver.
    """

    truth: Tensor = field(repr=False)
    rows: list[AuditRow]

    def __str__(self):
        parts = [part for part in PARTS if part in self.rows[0].parts]
        width = max(len(row.name) for row in self.rows)
        head = f"{'solver':<{width}}  {'error':>8} {'cosine':>7} {'length':>7}  | "
        lines = [head + " ".join(f"{part:>9}" for part in parts) + f"  | {'gradients':>9}"]
        for row in self.rows:
            lines.append(
                f"{row.name:<{width}}  {_digits(row.relative_error):>8} {row.cosine:7.3f} "
                f"{row.length:7.3f}  | "
                + " ".join(f"{_digits(row.parts[part]):>9}" for part in parts)
                + f"  | {row.gradients:9g}"
            )
        return "\n".join(lines)

    def figure(self):
        """Draw the parts of every solver's error beside each other; returns the figure."""
        from bilevel_lite.plotting import draw_audit

        return draw_audit(self)


@differentiating
def audit(
    problem: BilevelProblem,
    lam: Tensor,
    theta: Tensor,
    inner_batch: Any = None,
    outer_batch: Any = None,
    solvers: Sequence[Solver] | dict[str, Solver] = (),
    solve_inner: Callable[[Tensor], Tensor] | None = None,
    inner_sampler: Any = None,
    outer_sampler: Any = None,
    draws: int = 16,
) -> AuditReport:
    """Compare solvers with the truth and split each error into its parts (see the module).

    Each solver is used in a fresh copy: what it remembers is not touched.

    Args:
        problem: The two losses.
        lam: Outer variable.
        theta: Inner variable at which the solvers work.
        inner_batch: All of the data of g.
        outer_batch: All of the data of f.
        solvers: Solvers, name -> solver, or a single one.
        solve_inner: lam -> theta*(lam); without it theta counts as the solution, and there is no
            inner part.
        inner_sampler: Draws minibatches of g (anything with ``draw()``), for H and J together;
            without samplers there is no minibatch part.
        outer_sampler: The same for f; without it f stays on ``outer_batch``.
        draws: Minibatch hypergradients per solver.

    Returns:
        `AuditReport`.

    Raises:
        TypeError: if ``lam``, ``theta`` or what ``solve_inner`` returns is no floating-point
            tensor, a solver, a sampler or ``solve_inner`` is none, or a solver's name no string.
        ValueError: if ``solvers`` is empty, ``draws`` is below 1, the truth is zero, theta*(lam)
            has another shape than ``theta``, or CG cannot solve the system of a problem that is
            too large for `Direct`.

    Cost: d products for each exact solve (one at theta*, one at theta, one for each solver whose
    system is another), the solvers themselves, and ``draws`` minibatch hypergradients each.

    Example:
        >>> scale = torch.tensor([1.0, 9.0])
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: (scale * (theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> at = problem, torch.zeros(2), torch.zeros(2), None, None  # the truth is (-2, -2)
        >>> report = bl.audit(*at, solvers=[bl.CG(1), bl.CG(2)])
        >>> [(row.name, round(row.relative_error, 3)) for row in report.rows]
        [('CG', 0.8), ('CG (2)', 0.0)]
    """
    require_variable("lam", lam)
    require_variable("theta", theta)
    named = _named(solvers)
    for name, sampler in (("inner_sampler", inner_sampler), ("outer_sampler", outer_sampler)):
        if sampler is not None and not callable(getattr(sampler, "draw", None)):
            raise TypeError(
                f"{name}: got {type(sampler).__name__}, expected a sampler with draw(), such as "
                "bilevel_lite.data.Batches"
            )
    if solve_inner is not None:
        require_function("solve_inner", solve_inner, "lam -> theta*(lam)")
    at_least("draws", draws, 1)

    def h(solver, theta, inner=inner_batch, outer=outer_batch):
        return hypergradient(
            problem, lam, theta, inner, outer, copy.deepcopy(solver), return_info=True,
            diagnose=False,
        )  # fmt: skip

    def exact(solver, theta):
        return h(_exact(solver, theta), theta)[0]

    at_theta = truth = exact(Direct(), theta)
    if solve_inner is not None:
        star = solve_inner(lam)
        require_like("solve_inner(lam)", star, theta)
        truth = exact(Direct(), star.detach())
    size = norm_of(truth)
    if size == 0:
        raise ValueError("lam: the true hypergradient is zero here, so no error is relative to it")

    batches = []  # the same for every solver
    if inner_sampler is not None or outer_sampler is not None:
        for _ in range(draws):
            inner = inner_batch if inner_sampler is None else inner_sampler.draw()
            outer = outer_batch if outer_sampler is None else outer_sampler.draw()
            batches.append((inner, outer))

    rows = []
    for name, solver in named.items():
        answer, info = h(solver, theta)
        limit = solver.limit()
        solved = answer if limit is None else exact(limit, theta)
        vectors = {"curvature": solved - at_theta, "linear": answer - solved}
        if solve_inner is not None:
            vectors = {"inner": at_theta - truth, **vectors}
        parts = {part: norm_of(vector) / size for part, vector in vectors.items()}
        seen = [answer]
        if batches:
            worker = copy.deepcopy(solver)  # its own draws go on from one minibatch to the next
            seen = [hypergradient(problem, lam, theta, *pair, worker) for pair in batches]
            noise = torch.stack([one - answer for one in seen])
            vectors["minibatch"] = noise.mean(0)
            parts["minibatch"] = _root_mean_square(noise) / size
        errors = torch.stack([one - truth for one in seen])
        rows.append(
            AuditRow(
                name,
                _root_mean_square(errors) / size,
                _mean(_cosine(one, truth) for one in seen if bool(one.any())),
                _mean(norm_of(one) / size for one in seen),
                parts,
                vectors,
                info.solve.products,
                info.gradients,
            )
        )
    return AuditReport(truth, rows)


def _exact(solver: Solver, theta: Tensor) -> Solver:
    """A direct solver as it is where d allows, else CG run until nothing is left."""
    if isinstance(solver, Direct) and theta.numel() > solver.max_dim:
        return _Thorough(theta.numel(), 1e-10, solver.damping, solver.curvature)
    return solver


class _Thorough(CG):
    """CG that must converge."""

    def _solve(self, at, b):
        done = super()._solve(at, b)
        if done.relative_residual > 1e-6:
            raise ValueError(
                f"theta: has too many entries for a direct solve, and CG stopped at a relative "
                f"residual of {done.relative_residual:.1e}; is the Hessian positive definite here?"
            )
        return done


def _named(solvers: Any) -> dict[str, Solver]:
    """Name -> solver, all of them checked."""
    several = solvers if isinstance(solvers, Iterable) else [solvers]
    named = several if isinstance(several, dict) else _names(several)
    if not named:
        raise ValueError("solvers: is empty, expected at least one solver")
    for name, solver in named.items():
        if not isinstance(solver, Solver):
            raise TypeError(f"solvers: got {solver!r}, expected solvers such as bilevel_lite.CG(3)")
        if not isinstance(name, str):
            raise TypeError(f"solvers: got {name!r} as a name, expected strings")
    return named


def _names(solvers: Iterable[Solver]) -> dict[str, Solver]:
    named: dict[str, Solver] = {}
    for solver in solvers:
        name, number = type(solver).__name__, 1
        while name in named:
            number += 1
            name = f"{type(solver).__name__} ({number})"
        named[name] = solver
    return named


def _digits(value: float) -> str:
    return short(value, ".3g", "0")


def _root_mean_square(vectors: Tensor) -> float:
    return float(vectors.flatten(1).double().square().sum(1).mean().sqrt())


def _cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float((one * other).sum() / (one.norm() * other.norm()))


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan
