"""How v = H^-1 b is found: one small class for each choice of what stands for H and how to solve.

Every solver is called the same way, at once or in two steps,

    v, info = solver.solve(problem, lam, theta, batch, b)

    at = solver.prepare(problem, lam, theta, batch)         # H, or what stands for it, built once
    v, info = at.solve(b);   jv, how = at.cross(v)

and says what it did. A solver may remember things between calls (its last v, for a warm start);
`state_dict` and `load_state_dict` carry that across an interruption.
"""

from dataclasses import dataclass, fields
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from bilevel_lite import linsolve
from bilevel_lite.curvature import GGN
from bilevel_lite.linsolve import SolveInfo
from bilevel_lite.options import (
    again,
    check,
    dataclass_transform,
    document,
    flag,
    fraction,
    instance,
    not_negative,
    one_of,
    option,
    positive,
    whole,
)
from bilevel_lite.products import (
    SecondDerivatives,
    cross_and_route,
    dense,
    has_slopes,
    hvp_operator,
)
from bilevel_lite.refuse import require_state, require_variable, versions
from bilevel_lite.surroundings import differentiating, ordinary

__all__ = [
    "CG", "CGNormal", "Direct", "Identity", "Neumann", "Prepared", "SolveInfo", "Solver",
    "require_inverse",
]  # fmt: skip


def _entry(method):
    """Let a method compute where gradients are off, with tensors made there, too."""

    @wraps(method)
    @differentiating
    def called(self, *args, **options):
        options = {name: ordinary(value) for name, value in options.items()}
        return method(self, *map(ordinary, args), **options)

    return called


def require_inverse(name: str, kfac: Any) -> None:
    """Refuse a KFAC with ``rest="drop"`` where it is to precondition.

    Raises:
        ValueError: naming the argument and the way out.
    """
    if getattr(kfac, "rest", None) == "drop":
        raise ValueError(
            f"{name}: was made with rest='drop', which is singular where a parameter has no block, "
            "so that the iteration would not converge; use rest='diagonal' or 'damping'"
        )


class Prepared:
    """H, or what stands for it, at one point, and J there; made by `Solver.prepare`.

    Attributes:
        matvec: v -> H v, built when it is first applied.
        cost: Gradient-equivalents spent on preparing; counted in each solve's.
        precondition: r -> M r, M an approximate inverse of H; None without.

    Args:
        solver, problem, lam, theta, batch: What is prepared.
        shared: Keep the graph of grad_theta g in lam too, so that J v can be read from it.
    """

    def __init__(self, solver, problem, lam, theta, batch, shared: bool):
        self.solver, self.loss = solver, problem.inner_loss
        self.lam, self.theta, self.batch = lam, theta, batch
        self.written = versions((lam, theta, batch))
        hessian = SecondDerivatives if shared else hvp_operator
        operator = GGN if solver.curvature == "ggn" else hessian
        self.matvec = _Lazy(partial(operator, self.loss, lam, theta, batch))
        self.precondition, self.cost = None, 0.0

    @_entry
    def solve(
        self, b: Tensor, diagnose: bool = True, want_v: bool = True
    ) -> tuple[Tensor | None, SolveInfo]:
        """Return v, an approximation of H^-1 b, and what it took.

        Args:
            b: Right-hand side, like theta.
            diagnose: Also compute the residual where it is not free (one more product, not counted
                in the cost).
            want_v: False where J v is all that is wanted: a solver that need not form v then gives
                None in its place.

        Raises:
            ValueError: if ``b`` does not have theta's shape, if lam, theta or the batch was written
                into since, or as the solver says.
        """
        solver = self.solver
        self._require_unwritten()
        solver._require_like(b, self.theta)
        info = self._solve(b, diagnose or want_v)
        info.solver, info.gradients = type(solver).__name__, info.gradients + self.cost
        v, info.solution = info.solution, None  # whoever keeps the diagnosis keeps no v
        if v is not None:
            v = v.detach()
        if solver.warm_start:
            solver._v = v.clone()  # the caller may write into theirs
        if diagnose and info.residual is None:
            info.measured(b - self.matvec(v) - solver.damping * v, b)
        return v, info

    def _solve(self, b, want_v) -> SolveInfo:
        return self.solver._solve(self, b)

    @_entry
    def cross(self, v: Tensor | None) -> tuple[Tensor, str]:
        """Return J v, like lam, on the batch of H, and a line that says how it was computed.

        From the graph of H where there is one; if so, it is freed, and no solve can follow.
        """
        self._require_unwritten()
        return self._cross(v)

    def _require_unwritten(self) -> None:
        if versions((self.lam, self.theta, self.batch)) != self.written:
            raise ValueError(
                "prepare: lam, theta or the batch was written into since, and H and J are of what "
                "they hold now; prepare anew, or give it copies"
            )

    def _cross(self, v):
        operator = self.matvec.operator
        if getattr(operator, "recorded", False):
            return operator.cross(v), "double backward, recorded"
        if isinstance(operator, SecondDerivatives) and not _dear(self.loss):
            return operator.cross(v), "double backward"
        return cross_and_route(self.loss, self.lam, self.theta, self.batch, v)


class _Lazy:
    """An operator built when it is first applied: `Identity` without a residual never needs it."""

    def __init__(self, build):
        self.build, self.operator = build, None

    def __call__(self, v):
        if self.operator is None:
            self.operator = self.build()
        return self.operator(v)


def _dear(loss: Any) -> bool:
    """True where J v by forward mode is cheaper than from the graph of H: with convolutions.

    Measured, in gradients: LeNet 0.9 against 1.5; but 0.9 against 0.4 for a linear model.
    """
    convolution = nn.modules.conv._ConvNd
    return has_slopes(loss) and any(isinstance(m, convolution) for m in loss.model.modules())


@dataclass_transform(
    field_specifiers=(positive, not_negative, fraction, whole, flag, one_of, instance)
)
@dataclass(eq=False, repr=False)
class Solver:
    """Base of the solvers. A subclass declares its options as fields and writes ``_solve``.

    ``_solve(at, b)`` gets what `prepare` made and returns what `bilevel_lite.linsolve` does.
    """

    damping = 0.0
    warm_start = False
    curvature = "hessian"
    _v = None  # the last v, for a warm start

    def __init_subclass__(cls, **options):
        """Take the fields for options; let solves compute where gradients are off, too."""
        super().__init_subclass__(**options)
        if "solve" in vars(cls):
            raise TypeError(
                f"{cls.__name__}: overrides solve, which hypergradients do not call; write "
                "_solve(self, at, b), or prepare"
            )
        for name in ("prepare", "inverse", "observe"):
            if name in vars(cls):
                setattr(cls, name, _entry(vars(cls)[name]))
        dataclass(eq=False, repr=False)(cls)
        document(cls)

    def __post_init__(self):
        check(self)

    def __repr__(self):
        named = (f.name for f in fields(self) if f.init)
        return f"{type(self).__name__}({', '.join(f'{k}={getattr(self, k)!r}' for k in named)})"

    @_entry
    def prepare(
        self,
        problem: Any,
        lam: Tensor,
        theta: Tensor,
        batch: Any,
        cross: bool = False,
        once: bool = False,
    ) -> Prepared:
        """Build what stands for H at this point; see `Prepared`.

        Args:
            problem: A `BilevelProblem`; only its ``inner_loss`` is used.
            lam: Outer variable.
            theta: Inner variable, the point where H is taken.
            batch: The curvature batch.
            cross: J v on this batch will be asked for: a pass that serves both is shared.
            once: One solve will be asked for, so nothing need be kept for another.

        Raises:
            TypeError, ValueError: as the solver says.
        """
        return Prepared(self, problem, lam, theta, batch, cross)

    @_entry
    def solve(
        self,
        problem: Any,
        lam: Tensor,
        theta: Tensor,
        batch: Any,
        b: Tensor,
        diagnose: bool = True,
    ) -> tuple[Tensor, SolveInfo]:
        """Return v, an approximation of H^-1 b, and what it took: `prepare` and `Prepared.solve`.

        Raises:
            ValueError: if ``b`` does not have theta's shape, or as the solver says.
        """
        return self.prepare(problem, lam, theta, batch, once=True).solve(b, diagnose)

    def _require_like(self, b: Tensor, theta: Tensor) -> None:
        if b.shape != theta.shape:
            raise ValueError(
                f"b: got shape {tuple(b.shape)}, expected {tuple(theta.shape)}, that of theta"
            )
        if (b.dtype, b.device) != (theta.dtype, theta.device):
            raise ValueError(
                f"b: got {b.dtype} on {b.device}, expected {theta.dtype} on {theta.device}, as "
                "theta is; say b.to(theta)"
            )
        if self.warm_start and self._v is not None and self._v.shape != b.shape:
            raise ValueError(
                f"{type(self).__name__}: remembers a v of shape {tuple(self._v.shape)}, but b has "
                f"shape {tuple(b.shape)}; use a new solver for a new problem"
            )

    def _solve(self, at: Prepared, b: Tensor) -> SolveInfo:
        raise NotImplementedError

    def limit(self) -> "Direct | None":
        """Return the direct solver of this solver's own system, or None if it solves it exactly.

        What it would answer with enough iterations; `bilevel_lite.audit` asks.
        """
        return Direct(self.damping, self.curvature)

    def state_dict(self) -> dict:
        """Return what is remembered between calls."""
        return {"solver": type(self).__name__, "v": self._v}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned.

        Raises:
            TypeError, ValueError: if the state is none, or another kind of solver's.
        """
        self._require_own(state)
        self._v = state["v"]

    def _require_own(self, state: dict, *more: str) -> None:
        """Refuse what is no state of this kind of solver."""
        require_state(state, "solver")
        if state["solver"] != type(self).__name__:
            raise ValueError(
                f"state: is of solver {state['solver']!r}, expected {type(self).__name__!r}"
            )
        require_state(state, "v", *more)
        if state["v"] is not None:
            require_variable("state: v", state["v"])


class Direct(Solver):
    """Form H and solve exactly, v = (H + damping I)^-1 b. The truth for small problems.

    Raises:
        ValueError: in `solve`, if theta has more than ``max_dim`` entries or H is singular.

    Cost: d products (2 d gradients) and a factorisation.

    Example:
        >>> scale = torch.tensor([1.0, 9.0])
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: (scale * (theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> at = problem, torch.zeros(2), torch.zeros(2), None, None  # the truth is (-2, -2)
        >>> bl.hypergradient(*at, solver=bl.Direct()).round(decimals=3)
        tensor([-2., -2.])
    """

    damping: float = not_negative(default=0.0, help="Added to H's diagonal, once")
    curvature: str = one_of("hessian", "ggn", help="H; the GGN needs a `WeightedRisk`")
    max_dim: int = whole(default=4000, help="Refuse larger ones: d^2 numbers, d^3 operations")

    def limit(self) -> None:
        """Return None: it is exact."""

    def _solve(self, at, b):
        if b.numel() > self.max_dim:
            raise ValueError(
                f"theta: has {b.numel()} entries, more than max_dim={self.max_dim} that "
                "Direct will form a matrix for; use CG"
            )
        if not b.numel():  # a theta without entries: there is nothing to solve
            return SolveInfo(b, iterations=0, products=0)
        return linsolve.direct(dense(at.matvec, b), b, self.damping)


class Identity(Solver):
    """v = step * b: H replaced by I / step. One unrolled step of size ``step`` (T1-T2, DARTS).

    Raises:
        ValueError: if ``step`` is not positive.

    Cost: nothing. Source: Luketina et al. (2016).

    Example:
        >>> scale = torch.tensor([1.0, 9.0])
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: (scale * (theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> at = problem, torch.zeros(2), torch.zeros(2), None, None  # the truth is (-2, -2)
        >>> bl.hypergradient(*at, solver=bl.Identity(0.1)).round(decimals=3)
        tensor([-0.4000, -3.6000])
    """

    step: float = positive(help="Step size, in units of 1 / curvature")

    def limit(self) -> None:
        """Return None: its system is v / step = b."""

    def _solve(self, at, b):
        return SolveInfo(self.step * b, iterations=0, products=0)


class Neumann(Solver):
    """v = step * sum over j < terms of (I - step H)^j b; see `bilevel_lite.linsolve.neumann`.

    Raises:
        ValueError: in `solve`, if the series diverges beyond the largest number.

    Cost: terms - 1 products.

    Example:
        >>> scale = torch.tensor([1.0, 9.0])
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: (scale * (theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> at = problem, torch.zeros(2), torch.zeros(2), None, None  # the truth is (-2, -2)
        >>> bl.hypergradient(*at, solver=bl.Neumann(100, step=0.1)).round(decimals=3)
        tensor([-2., -2.])
    """

    terms: int = whole(help="Summands: 1 is `Identity`, K is K truncated steps of unrolling")
    step: float = positive(
        help="Step size; needs step < 2 / (largest curvature)", search=(0.02, 1.0)
    )
    damping: float = again(Direct, "damping")
    curvature: str = again(Direct, "curvature")

    def _solve(self, at, b):
        return linsolve.neumann(at.matvec, b, self.terms, self.step, self.damping)


class CG(Solver):
    """Conjugate gradients on (H + damping I) v = b; see `bilevel_lite.linsolve.cg`.

    The GGN is positive semi-definite (but for a ``weight_slope`` that is negative somewhere), so
    that CG does not break down on it.

    Raises:
        ValueError: in `solve`, if a product is not finite, or as the preconditioner says.
        TypeError: if ``precondition`` is no KFAC.

    Warns:
        NegativeCurvatureWarning: if H is not positive definite along a direction.

    Cost: ``iters`` products, one more with a warm start.

    Example:
        >>> scale = torch.tensor([1.0, 9.0])
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: (scale * (theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> at = problem, torch.zeros(2), torch.zeros(2), None, None  # the truth is (-2, -2)
        >>> bl.hypergradient(*at, solver=bl.CG(1)).round(decimals=3)
        tensor([-0.4000, -3.6000])
        >>> bl.hypergradient(*at, solver=bl.CG(2)).round(decimals=3)
        tensor([-2., -2.])
    """

    iters: int = whole(help="Steps at most")
    tol: float = not_negative(default=1e-10, help="Relative residual at which to stop")
    damping: float = again(Direct, "damping")
    curvature: str = again(Direct, "curvature")
    warm_start: bool = flag(
        default=False, help="Start from the last call's v (one more product a call)"
    )
    precondition: Any = option(
        "a KFAC or an EKFAC", lambda v: hasattr(v, "inverse"), default=None, error=TypeError,
        help="What preconditions the steps with its inverse",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        require_inverse("precondition", self.precondition)

    def prepare(self, problem, lam, theta, batch, cross=False, once=False):
        """As `Solver.prepare`, with the preconditioner's factors."""
        at = super().prepare(problem, lam, theta, batch, cross, once)
        if self.precondition is not None:
            at.precondition = self.precondition.inverse(problem.inner_loss, lam, theta, batch)
            at.cost = self.precondition.last_cost
        return at

    def _solve(self, at, b):
        x0 = self._v if self.warm_start else None
        return linsolve.cg(at.matvec, b, self.iters, self.tol, self.damping, x0, at.precondition)

    def state_dict(self) -> dict:
        """Return the last v and what the preconditioner remembers."""
        own = super().state_dict()
        return {**own, "precondition": self.precondition.state_dict()} if self.precondition else own

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if the state is another solver's, or of a CG with another kind of
                preconditioner.
        """
        require_state(state)
        if ("precondition" in state) != bool(self.precondition):
            words = ("with", "without") if "precondition" in state else ("without", "with")
            raise ValueError(f"state: is of a CG {words[0]} preconditioner, expected {words[1]}")
        self._require_own(state)
        if self.precondition:
            self.precondition.load_state_dict(state["precondition"])
        super().load_state_dict(state)


class CGNormal(Solver):
    """CG on the normal equations; see `bilevel_lite.linsolve.cg_normal`.

    Each step costs two products and the condition number is squared; for a fair comparison with
    `CG` give both the same number of products.

    Cost: 2 * iters + 1 products, two more with a warm start.

    Example:
        >>> scale = torch.tensor([1.0, 9.0])
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: (scale * (theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> at = problem, torch.zeros(2), torch.zeros(2), None, None  # the truth is (-2, -2)
        >>> bl.hypergradient(*at, solver=bl.CGNormal(2)).round(decimals=3)
        tensor([-2., -2.])
    """

    iters: int = whole(help="Steps at most")  # type checkers take what `again` gives for a default
    tol: float = again(CG, "tol")
    damping: float = again(Direct, "damping")
    curvature: str = again(Direct, "curvature")
    warm_start: bool = again(CG, "warm_start", help="Start from the last call's v")

    def _solve(self, at, b):
        x0 = self._v if self.warm_start else None
        return linsolve.cg_normal(at.matvec, b, self.iters, self.tol, self.damping, x0)
