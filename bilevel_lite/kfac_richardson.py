"""KFAC as a preconditioner: what it gets wrong is corrected by Hessian products."""

from bilevel_lite.kfac import KFAC
from bilevel_lite.linsolve import richardson
from bilevel_lite.options import again, flag, instance, positive, whole
from bilevel_lite.solvers import Direct, Solver, require_inverse

__all__ = ["KFACRichardson"]


class KFACRichardson(Solver):
    r"""Richardson iteration on the true Hessian, preconditioned by KFAC and warm-started.

        v <- v - step G^-1 ((H + damping I) v - b),      starting from the last call's v

    What KFAC gets wrong is corrected by one Hessian product a step, and the warm start spreads the
    correction over the outer iterations. It converges if every eigenvalue of G^-1 (H + damping I)
    lies between 0 and 2 / step; KFAC does not guarantee that, so watch the residual.

    Raises:
        ValueError: for an option out of range; in `solve`, if v grows beyond the largest number,
            or as `KFAC`.

    Cost: one product a step (one less from zero) and the KFAC build.
    Source: our reading of AmIGO (arXiv 2111.14580) with KFAC, as arXiv 2603.29108 suggests it.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> inner = bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=0.1)
        >>> problem = bl.BilevelProblem(inner, bl.WeightedRisk(model))
        >>> batch = torch.eye(2), torch.tensor([0, 1]), torch.arange(2)
        >>> at = problem, torch.ones(2), torch.zeros(6), batch, batch
        >>> solver = bl.KFACRichardson(iters=30, kfac=bl.KFAC(fisher="exact", damping=0.1))
        >>> bl.hypergradient(*at, solver=solver).round(decimals=3)
        tensor([-0.2780, -0.2780])
        >>> bl.hypergradient(*at, solver=bl.Direct()).round(decimals=3)  # the truth
        tensor([-0.2780, -0.2780])
    """

    iters: int = whole(default=1, help="Steps per call")
    kfac: KFAC | None = instance(
        KFAC, "a bilevel_lite.KFAC", default=None,
        help="The preconditioner, None for ``KFAC()``; its ``every`` builds it less often",
    )  # fmt: skip
    step: float = positive(default=1.0, help="Step size", search=(0.05, 2.0))
    damping: float = again(
        Direct, "damping", help="Added to H's diagonal, once; the preconditioner has its own"
    )
    warm_start: bool = flag(
        default=True,
        help="Start from the last call's v; else from zero, where the first step takes no product",
    )

    def __post_init__(self):
        super().__post_init__()
        require_inverse("kfac", self.kfac)
        self.kfac = self.kfac or KFAC()

    def prepare(self, problem, lam, theta, batch, cross=False, once=False):
        """As `Solver.prepare`, with KFAC's factors."""
        at = super().prepare(problem, lam, theta, batch, cross, once)
        at.precondition = self.kfac.inverse(problem.inner_loss, lam, theta, batch)
        at.cost = self.kfac.last_cost
        return at

    def _solve(self, at, b):
        x0 = self._v if self.warm_start else None
        return richardson(at.matvec, b, self.iters, self.step, self.damping, x0, at.precondition)

    def state_dict(self) -> dict:
        """Return the last v and what the KFAC remembers."""
        return {**super().state_dict(), "kfac": self.kfac.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self._require_own(state, "kfac")
        self.kfac.load_state_dict(state["kfac"])
        super().load_state_dict(state)
