"""How v = H^-1 b is found: one small class for each choice of what stands for H and how to solve.

Every solver is called the same way,

    v, info = solver.solve(problem, lam, theta, batch, b)

and says what it did. A solver may remember things between calls (its last v, for a warm start);
`state_dict` and `load_state_dict` carry that across an interruption.
"""

from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor, nn

from bilevel_lite import linsolve
from bilevel_lite.curvature import GGN
from bilevel_lite.products import (
    COST,
    SecondDerivatives,
    cross_and_route,
    dense,
    has_slopes,
    hvp_operator,
)
from bilevel_lite.surroundings import differentiating, ordinary

__all__ = ["CG", "CGNormal", "Direct", "Identity", "Neumann", "SolveInfo", "Solver"]


@dataclass
class SolveInfo:
    """The diagnosis of one solve.

    Attributes:
        solver: Name of the solver.
        iterations: Steps taken.
        products: Curvature products spent on v (the one for a residual is not counted).
        gradients: Cost of v in gradient-equivalents.
        residual: ||b - (H + damping I) v||; None if ``diagnose=False`` and it is not free.
        relative_residual: The same divided by ||b||: 0 is solved, 1 is no better than v = 0.
        curvature: (smallest, largest) curvature met along the solver's directions, or None.
        negative_curvature: True if one of them was zero or negative.
        converged: True if the solver's tolerance was met, None if it has none.
        cross: How J v was computed, and why so; "" where only v was asked for.
    """

    solver: str
    iterations: int
    products: int
    gradients: float
    residual: float | None = None
    relative_residual: float | None = None
    curvature: tuple[float, float] | None = None
    negative_curvature: bool = False
    converged: bool | None = None
    cross: str = ""


def _entry(method):
    """Let a solver's method compute where gradients are off, with tensors made there, too."""

    @wraps(method)
    @differentiating
    def called(self, *args, **options):
        options = {name: ordinary(value) for name, value in options.items()}
        return method(self, *map(ordinary, args), **options)

    return called


class Solver:
    """Base of the solvers: the operator, the residual, the remembered v."""

    damping = 0.0
    warm_start = False
    curvature = "hessian"

    def __init_subclass__(cls, **options):
        """Let a subclass's own solves compute where gradients are off, too."""
        super().__init_subclass__(**options)
        for name in ("solve", "solve_and_cross", "inverse", "observe"):
            if name in vars(cls):
                setattr(cls, name, _entry(vars(cls)[name]))

    def __init__(self):
        self._v: Tensor | None = None

    def __repr__(self):
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({options})"

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
        """Return v, an approximation of H^-1 b, and what it took.

        Args:
            problem: A `BilevelProblem`; only its ``inner_loss`` is used.
            lam: Outer variable.
            theta: Inner variable, the point where H is taken.
            batch: The curvature batch.
            b: Right-hand side, like ``theta``.
            diagnose: Also compute the residual where it is not free (one more product,
                not counted in the cost).

        Returns:
            v like ``b``, and a `SolveInfo`.

        Raises:
            ValueError: if ``b`` does not have theta's shape, or as the solver says.
        """
        self._require_like(b, theta)
        matvec = self._operator(problem, lam, theta, batch)
        return self._solve_with(matvec, problem, lam, theta, batch, b, diagnose)

    def _solve_with(self, matvec, problem, lam, theta, batch, b, diagnose):
        done = self._solve(problem, lam, theta, batch, b, matvec)
        v = done.solution.detach()
        if self.warm_start:
            self._v = v
        return v, self._info(done, matvec, b, diagnose)

    def _require_like(self, b: Tensor, theta: Tensor) -> None:
        if b.shape != theta.shape:
            raise ValueError(
                f"b: got shape {tuple(b.shape)}, expected {tuple(theta.shape)}, that of theta"
            )
        if self.warm_start and self._v is not None and self._v.shape != b.shape:
            raise ValueError(
                f"{type(self).__name__}: remembers a v of shape {tuple(self._v.shape)}, but b has "
                f"shape {tuple(b.shape)}; use a new solver for a new problem"
            )

    def _operator(self, problem, lam, theta, batch, cross: bool = False) -> "_Lazy":
        hessian = SecondDerivatives if cross else hvp_operator
        operator = GGN if self.curvature == "ggn" else hessian
        return _Lazy(lambda: operator(problem.inner_loss, lam, theta, batch))

    def _info(self, done: linsolve.LinearSolve, matvec, b: Tensor, diagnose: bool) -> SolveInfo:
        """The diagnosis, with the residual if asked for."""
        if done.residual is None and diagnose:
            v = done.solution
            done.residual = float((b - matvec(v) - self.damping * v).norm())
            b_norm = float(b.norm())
            done.relative_residual = done.residual / b_norm if b_norm else done.residual
        return SolveInfo(
            solver=type(self).__name__,
            iterations=done.iterations,
            products=done.products,
            gradients=COST["hvp"] * done.products,
            residual=done.residual,
            relative_residual=done.relative_residual,
            curvature=done.curvature,
            negative_curvature=done.negative_curvature,
            converged=done.converged,
        )

    def _solve(self, problem, lam, theta, batch, b, matvec) -> linsolve.LinearSolve:
        raise NotImplementedError

    @_entry
    def solve_and_cross(
        self,
        problem: Any,
        lam: Tensor,
        theta: Tensor,
        batch: Any,
        b: Tensor,
        diagnose: bool = True,
        want_v: bool = True,
    ) -> tuple[Tensor | None, Tensor, SolveInfo]:
        """Return v, J v on the same batch, and the diagnosis.

        A solver that passes the batch through the model itself (KFAC) shares that pass with J v;
        here the two are computed one after the other. Without ``want_v`` a solver that need not
        form v gives None in its place. Other arguments and errors are those of `solve` and
        `bilevel_lite.products.cross_vp`.
        """
        self._require_like(b, theta)
        matvec = self._operator(problem, lam, theta, batch, cross=True)
        v, info = self._solve_with(matvec, problem, lam, theta, batch, b, diagnose)
        if isinstance(matvec.operator, SecondDerivatives) and not _dear(problem.inner_loss):
            info.cross = "double backward"
            return v, matvec.operator.cross(v), info
        jv, info.cross = cross_and_route(problem.inner_loss, lam, theta, batch, v)
        return v, jv, info

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
            ValueError: if the state is another kind of solver's.
        """
        if state.get("solver") != type(self).__name__:
            raise ValueError(
                f"state: is of solver {state.get('solver')!r}, expected {type(self).__name__!r}"
            )
        self._v = state["v"]


def _dear(loss: Any) -> bool:
    """True where J v by forward mode is cheaper than from the graph of H: with convolutions.

    Measured, in gradients: LeNet 0.9 against 1.5; but 0.9 against 0.4 for a linear model.
    """
    convolution = nn.modules.conv._ConvNd
    return has_slopes(loss) and any(isinstance(m, convolution) for m in loss.model.modules())


class _Lazy:
    """An operator built when it is first applied: `Identity` without a residual never needs it."""

    def __init__(self, build):
        self.build, self.operator = build, None

    def __call__(self, v):
        if self.operator is None:
            self.operator = self.build()
        return self.operator(v)


def _check_curvature(curvature: str) -> str:
    if curvature not in ("hessian", "ggn"):
        raise ValueError(f"curvature: got {curvature!r}, expected 'hessian' or 'ggn'")
    return curvature


class Direct(Solver):
    """Form H and solve exactly, v = (H + damping I)^-1 b. The truth for small problems.

    Args:
        damping: Added to the diagonal.
        curvature: What stands for H: ``"hessian"``, or ``"ggn"`` (needs a `WeightedRisk`;
            positive semi-definite, so that CG never breaks down on it).
        max_dim: Refuse larger problems: H takes max_dim^2 numbers and d^3 operations.

    Raises:
        ValueError: in `solve`, if theta has more than ``max_dim`` entries or H is singular.

    Cost: d products (2 d gradients) and a factorisation.
    """

    def __init__(self, damping: float = 0.0, curvature: str = "hessian", max_dim: int = 4000):
        super().__init__()
        self.damping, self.curvature = damping, _check_curvature(curvature)
        self.max_dim = max_dim

    def limit(self) -> None:
        """Return None: it is exact."""

    def _solve(self, problem, lam, theta, batch, b, matvec):
        if theta.numel() > self.max_dim:
            raise ValueError(
                f"theta: has {theta.numel()} entries, more than max_dim={self.max_dim} that "
                "Direct will form a matrix for; use CG"
            )
        return linsolve.direct(dense(matvec, theta), b, self.damping)


class Identity(Solver):
    """v = step * b: H replaced by I / step. One unrolled step of size ``step`` (T1-T2, DARTS).

    Args:
        step: Step size, in units of 1 / curvature.

    Raises:
        ValueError: if ``step`` is not positive.

    Cost: nothing. Source: Luketina et al. (2016).
    """

    def __init__(self, step: float):
        super().__init__()
        if not step > 0:
            raise ValueError(f"step: got {step}, expected a positive number")
        self.step = step

    def limit(self) -> None:
        """Return None: its system is v / step = b."""

    def _solve(self, problem, lam, theta, batch, b, matvec):
        return linsolve.LinearSolve(self.step * b, iterations=0, products=0)


class Neumann(Solver):
    """v = step * sum over j < terms of (I - step H)^j b; see `bilevel_lite.linsolve.neumann`.

    Args:
        terms: Number of summands: 1 is `Identity`, K is K truncated steps of unrolling.
        step: Step size; needs step < 2 / (largest curvature).
        damping: Added to H's diagonal, once.
        curvature: What stands for H: ``"hessian"``, or ``"ggn"`` (needs a `WeightedRisk`;
            positive semi-definite, so that CG never breaks down on it).

    Raises:
        ValueError: in `solve`, if the series diverges beyond the largest number.

    Cost: terms - 1 products.
    """

    def __init__(self, terms: int, step: float, damping: float = 0.0, curvature: str = "hessian"):
        super().__init__()
        linsolve.at_least("terms", terms, 1)
        self.terms, self.step, self.damping = terms, step, damping
        self.curvature = _check_curvature(curvature)

    def _solve(self, problem, lam, theta, batch, b, matvec):
        return linsolve.neumann(matvec, b, self.terms, self.step, self.damping)


class CG(Solver):
    """Conjugate gradients on (H + damping I) v = b; see `bilevel_lite.linsolve.cg`.

    Args:
        iters: Steps at most.
        tol: Relative residual at which to stop.
        damping: Added to H's diagonal, once.
        curvature: What stands for H: ``"hessian"``, or ``"ggn"`` (needs a `WeightedRisk`;
            positive semi-definite, so that CG never breaks down on it).
        warm_start: Start from the last call's v (one more product a call).
        precondition: A `KFAC` or `EKFAC`, whose inverse preconditions the steps.

    Raises:
        ValueError: in `solve`, if a product is not finite, or as the preconditioner says.
        TypeError: if ``precondition`` has no ``inverse`` method.

    Warns:
        NegativeCurvatureWarning: if H is not positive definite along a direction.

    Cost: ``iters`` products, one more with a warm start.
    """

    def __init__(
        self,
        iters: int,
        tol: float = 1e-10,
        damping: float = 0.0,
        curvature: str = "hessian",
        warm_start: bool = False,
        precondition: Any = None,
    ):
        super().__init__()
        linsolve.at_least("iters", iters, 1)
        if precondition is not None and not hasattr(precondition, "inverse"):
            raise TypeError(
                f"precondition: got {type(precondition).__name__}, expected a KFAC or an EKFAC"
            )
        if getattr(precondition, "rest", None) == "drop":
            raise ValueError(
                "precondition: was made with rest='drop', which is singular where a parameter has "
                "no block, and CG would not converge; use rest='diagonal' or 'damping'"
            )
        self.iters, self.tol, self.damping = iters, tol, damping
        self.curvature, self.warm_start = _check_curvature(curvature), warm_start
        self.precondition = precondition

    def _info(self, done, matvec, b, diagnose):
        info = super()._info(done, matvec, b, diagnose)
        if self.precondition is not None:
            info.gradients += self.precondition.last_cost
        return info

    def _solve(self, problem, lam, theta, batch, b, matvec):
        x0 = self._v if self.warm_start else None
        m = self.precondition and self.precondition.inverse(problem.inner_loss, lam, theta, batch)
        return linsolve.cg(matvec, b, self.iters, self.tol, self.damping, x0, m)

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
        super().load_state_dict(state)
        if ("precondition" in state) != bool(self.precondition):
            words = ("with", "without") if "precondition" in state else ("without", "with")
            raise ValueError(f"state: is of a CG {words[0]} preconditioner, expected {words[1]}")
        if self.precondition:
            self.precondition.load_state_dict(state["precondition"])


class CGNormal(CG):
    """CG on the normal equations; see `bilevel_lite.linsolve.cg_normal`.

    The arguments are those of `CG`, less ``precondition``. Each step costs two products and the
    condition number is squared; for a fair comparison with `CG` give both the same number of
    products.

    Cost: 2 * iters + 1 products, two more with a warm start.
    """

    def __init__(
        self,
        iters: int,
        tol: float = 1e-10,
        damping: float = 0.0,
        curvature: str = "hessian",
        warm_start: bool = False,
    ):
        super().__init__(iters, tol, damping, curvature, warm_start)

    def _solve(self, problem, lam, theta, batch, b, matvec):
        x0 = self._v if self.warm_start else None
        return linsolve.cg_normal(matvec, b, self.iters, self.tol, self.damping, x0)
