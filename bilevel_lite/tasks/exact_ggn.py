r"""The damped GGN of one batch solved exactly, for models with far more parameters than outputs.

    G = Z^T Z + 2 l2 I,     Z has a row s_ic^T Z_i / sqrt(n) for example i and class c
    v = (G + delta I)^-1 b = (b - Z^T (Z Z^T + tau I)^-1 Z b) / tau,     tau = delta + 2 l2

by the push-through (Woodbury) identity; Z_i is the Jacobian of example i's outputs, s the exact
probes of `bilevel_lite.curvature.Probes`. It is what CG on the GGN would end with and what KFAC
approximates: a study asks by it whether a better solve of the same system makes a better method.
"""

import torch

from bilevel_lite import algorithms as alg
from bilevel_lite.curvature import GGN, OutputMap, Probes
from bilevel_lite.experiment.methods import METHODS, STEPS, Recipe
from bilevel_lite.kfac import KFAC
from bilevel_lite.linsolve import SolveInfo
from bilevel_lite.options import again
from bilevel_lite.products import COST
from bilevel_lite.refuse import Unseen
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.solvers import Solver
from bilevel_lite.trust import tolerance

__all__ = ["ExactGGN"]


class ExactGGN(Solver):
    """v = (G + damping I)^-1 b, G the GGN of the batch, in the space of its outputs.

    The outputs and weights must be functions of their own rows, and the batch a tuple of tensors.

    Raises:
        ValueError: in `solve`, for no damping and no l2, which make the GGN singular; for a weight
            or an output that depends on the other examples.
        TypeError: in `solve`, if the inner loss is not a `WeightedRisk`, or has ``weight_slope``.

    Cost: a gradient for each class, n C theta-sized rows in memory, and their (n C)^2 products.
    Source: Woodbury (1950); as a solver of hypergradients, `bilevel_lite.solvers.Direct`.

    Example:
        >>> from bilevel_lite.tasks.exact_ggn import ExactGGN
        >>> inner = bl.WeightedRisk(torch.nn.Linear(2, 2), weight=lambda lam, batch: lam[batch[2]])
        >>> problem = bl.BilevelProblem(inner, bl.WeightedRisk(inner.model))
        >>> batch = torch.eye(2), torch.tensor([0, 1]), torch.arange(2)
        >>> at = problem, torch.ones(2), torch.zeros(6), batch, batch
        >>> bl.hypergradient(*at, solver=ExactGGN(0.1)).round(decimals=3)
        tensor([-0.3570, -0.3570])
        >>> bl.hypergradient(*at, solver=bl.Direct(0.1, "ggn")).round(decimals=3)  # the truth
        tensor([-0.3570, -0.3570])
    """

    damping: float = again(KFAC, "damping", help="delta")
    curvature = "ggn"

    def limit(self) -> None:
        """Return None: it is exact."""

    def _solve(self, at, b):
        risk = at.loss
        if not isinstance(risk, WeightedRisk) or risk.weight_slope:
            raise Unseen(
                f"inner_loss: got {type(risk).__name__}, expected a WeightedRisk without "
                "weight_slope; use CG with curvature='ggn'"
            )
        tau, n, z = self.damping + 2 * risk.l2, len(at.batch[1]), None
        if tau == 0:
            raise ValueError(
                "damping: is 0, as is l2, and the GGN is singular; give a positive one"
            )
        (whole,) = GGN(risk, at.lam, at.theta, at.batch).parts
        for k in range(n):  # an example by itself: its row needs no pass through the others
            one = tuple(part[k : k + 1] for part in at.batch)
            (part,) = GGN(risk, at.lam, at.theta, one).parts
            _require_alike(whole, part, k)
            probes = Probes("exact").of(part.side)
            if z is None:  # rows are written where they stay: copies of them all would be dear
                z = b.new_empty(n, len(probes), len(b))
            for row, s in zip(z[k], probes, strict=True):
                row.copy_(part.vjp(s))
        z = z.flatten(0, 1).div_(n**0.5)
        gram = (z @ z.T).double()
        gram.diagonal().add_(tau)
        v, r = torch.zeros_like(b), b
        for _ in range(2):  # once more on the residual, for float32
            c = torch.linalg.solve(gram, (z @ r).double()).to(b)
            v = v + (r - z.T @ c) / tau
            r = b - z.T @ (z @ v) - tau * v
        return SolveInfo(v, 0, 0, gradients=COST["gradient"] * len(z) / n).measured(r, b)


def _require_alike(whole: OutputMap, part: OutputMap, k: int) -> None:
    """Refuse an example that is another one by itself than in the batch."""
    pairs = (whole.outputs, part.outputs), (whole.side.sigma, part.side.sigma)
    for a, b in (pair for pair in pairs if pair[0] is not None):
        near = tolerance(a) * a.abs().max()
        if len(b) != 1 or not bool((a[k] - b[0]).abs().max() <= near):
            raise ValueError(
                f"batch: example {k} has another output or weight by itself than in the batch, "
                "whose rows are to stand alone here; use CG with curvature='ggn'"
            )


# by the name that a run or a study gives it: "bilevel_lite.tasks.exact_ggn:aid-ggn-exact"
METHODS["aid-ggn-exact"] = Recipe(
    alg.AID,
    options={"solver": lambda s: ExactGGN(s.damping), "inner_steps": STEPS},
    kinds=(int, float),
)
