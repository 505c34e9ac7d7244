"""MRBO: one loop, with recursive momentum (STORM) on both levels."""

from bilevel_lite.algorithms.method import Method
from bilevel_lite.options import fraction, instance, not_negative
from bilevel_lite.solvers import Solver

__all__ = ["MRBO"]


class MRBO(Method):
    r"""Momentum-based recursive bilevel optimiser.

        d_k = grad_theta g(k)  + inner_memory (d_{k-1} - grad_theta g(k-1))
        e_k = h(k)             + outer_memory (e_{k-1} - h(k-1))
        theta <- theta - eta_k inner_lr d_k,     lam <- lam - eta_k outer_lr e_k,  together

    (k) and (k-1) are the current and the last point, evaluated on the SAME batches: the
    difference of two evaluations then has little noise, and the memory may be long. h is the
    hypergradient with any solver; the paper's is a Neumann series, MRBO-KFAC puts KFAC there
    (two builds a step, with the same draws).

    With ``decay`` c > 0 (the paper's schedule) eta_k = (c / (c + k))^(1/3) and the memory of
    iteration k is 1 - (1 - memory) eta_{k-1}^2; without it both stay as they are, as in the
    authors' code. Memory 0 is the plain single loop.

    Args:
        **common: See `bilevel_lite.algorithms.method.Method`; plain gradient steps are meant.

    Cost of a step: 2 gradients and 2 hypergradients; half of that at the first step, which has no
    last point.
    Source: Yang, Ji and Liang (2021), arXiv 2106.04692; with KFAC arXiv 2603.29108, our reading.

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.MRBO(problem, lam, theta, bl.CG(2), inner_lr=0.3, outer_lr=0.1)
        >>> steps = [method.step() for _ in range(60)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    solver: Solver = instance(
        Solver,
        "a solver such as bilevel_lite.CG(3)",
        help="How v is found at each of the two points",
    )
    inner_memory: float = fraction(default=0.1, help="Memory of d", search=(0.1, 0.95))
    outer_memory: float = fraction(default=0.1, help="Memory of e", search=(0.1, 0.95))
    decay: float = not_negative(default=0.0, help="c, or 0 for constants")

    choices = (
        "Hessian (or any solver's)",
        "Neumann series (or any)",
        "single loop, recursive momentum",
    )
    remembers = ("before", "d", "e")
    roles = ("inner", "outer", "curvature", "cross")

    def __post_init__(self):
        super().__post_init__()
        self.before = self.d = self.e = None  # the last point (lam, theta) and directions

    def _direction(self):
        inner, outer = self._draw("inner"), self._draw("outer")
        system = [self._draw_or(role, inner) for role in ("curvature", "cross")]
        drawn = self.solver.state_dict()  # both evaluations make the same draws
        now = [self.lam.clone(), self.theta.clone()]
        with self._same_draws():
            if self.before is not None:
                _, d_before, e_before, _ = self._evaluate(*self.before, inner, outer, system)
                self.solver.load_state_dict(drawn)
            inner_loss, d, e, info = self._evaluate(*now, inner, outer, system)
        if self.before is not None:
            d = d + self._memory(self.inner_memory) * (self.d - d_before)
            e = e + self._memory(self.outer_memory) * (self.e - e_before)
        self.before, self.d, self.e = now, d, e
        eta = self._eta(self.iteration)
        self._move_theta(eta * d)
        return inner_loss, info.outer_loss, eta * e, info.solve

    def _evaluate(self, lam, theta, inner, outer, system):
        """g, its gradient, the hypergradient and what it was made of, at one point."""
        inner_loss, d = self._g_theta(inner, theta, lam)
        return inner_loss, d, *self._hypergradient(outer, *system, theta, lam)

    def _eta(self, k: int) -> float:
        return (self.decay / (self.decay + k)) ** (1 / 3) if self.decay else 1.0

    def _memory(self, memory: float) -> float:
        return 1 - (1 - memory) * self._eta(self.iteration - 1) ** 2
