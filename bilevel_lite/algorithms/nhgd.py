"""NHGD: the inner steps' own gradients, kept as an inverse Fisher matrix, stand for H^-1."""

from bilevel_lite.algorithms.method import Method
from bilevel_lite.algorithms.rank_one import rank_one_inverse
from bilevel_lite.kfac import KFAC
from bilevel_lite.options import fraction, instance, one_of, positive, whole
from bilevel_lite.problem import examples

__all__ = ["NHGD", "rank_one_inverse"]


class NHGD(Method):
    r"""Natural hypergradient descent: no system is solved, the Fisher's inverse is kept up to date.

        for each inner step, with q the gradient of g on its batch of n examples:
            F    <- beta F + (1 - beta) scale q q^T,     of which the inverse is kept:
            F^-1 <- (1/beta) [ F^-1 - (1-beta) scale u u^T / (beta + (1-beta) scale q^T u) ],
                    u = F^-1 q
            theta <- an optimiser step with q
        lam <- lam - outer_lr ( grad_lam f - J F^-1 b )

    The mean gradient of n examples has 1/n of the Fisher as second moment (at the optimum, where
    the gradients' mean vanishes), so scale = n makes F the empirical Fisher; scale = 1 is the
    recursion without that correction, whose F is n times too small. With ``beta=None`` F is the
    plain average of all steps, beta = (t - 1)/t at the t-th, the start counting as the first.

    F equals the Hessian only where the model is well specified and theta optimal. With noisy labels
    or weights it does not: q q^T scales with the weights squared (chapter 17). q is the gradient of
    all of g, an l2 term included, whose own curvature F does not have.
    The start F = initial I is forgotten at the rate beta; once it is, directions that few gradients
    point to have a small F, and F^-1 grows there as beta^-t: with d above the memory 1 / (1 - beta)
    give a KFAC instead (with ``fisher="empirical"`` and an ``ema``): the same running average is
    kept of its Kronecker factors, which need no d x d matrix and have its damping inside; they are
    inverted once, with the gradient of the last inner step.

    Cost of a step: inner_steps + 1 gradients, 1 cross product; F^-1 costs 4 d^2 operations an inner
    step, a KFAC with an ema its estimate (about 1 gradient) an inner step.
    Source: Kong et al. (2026), arXiv 2602.10905; the scale and the start are our reading.

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.NHGD(problem, lam, theta, inner_lr=0.3, outer_lr=0.1)
        >>> steps = [method.step() for _ in range(60)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    inner_steps: int = whole(default=10, help="T, steps on theta per outer iteration")
    beta: float | None = fraction(
        default=0.99, none=True, help="Memory of the average; None: plain", search=(0.5, 0.99)
    )
    initial: float = positive(default=1.0, help="F at the start, times the identity")
    scale: str = one_of("fisher", "plain", default="fisher", help="n (1 without rows), or 1")
    kfac: KFAC | None = instance(
        KFAC, "a bilevel_lite.KFAC", default=None, help="For F, without beta, initial and scale"
    )

    choices = ("empirical Fisher (or KFAC)", "rank-one updates of the inverse", "double loop")
    remembers = ("m", "updates")
    roles = ("inner", "outer", "cross")

    def __post_init__(self):
        super().__post_init__()
        if self.beta == 0:
            raise ValueError(f"beta: got {self.beta}, expected a positive number")
        if self.kfac is not None and self.kfac.every > 1:
            raise ValueError(f"kfac: has every = {self.kfac.every}, but F moves each step; give 1")
        d = self.theta.numel()
        if self.kfac is None and d > 20_000:
            raise ValueError(
                f"theta: has {d} entries, so F would have as many rows; give "
                "kfac=KFAC(fisher='empirical', ema=...) instead"
            )
        self.solver, self.updates = self.kfac, 1
        self.m = None if self.kfac else self.theta.new_ones(d).div(self.initial).diag()

    def _direction(self):
        for step in range(self.inner_steps):
            batch = self._draw("inner")
            inner_loss, q = self._g_theta(batch)
            inverse = self._update(q, batch, last=step == self.inner_steps - 1)
            self._move_theta(q)
        f = self._f(self._draw("outer"))
        v = self.v = inverse(f.theta)
        return inner_loss, f.value, f.lam - self._cross(self._draw("cross"), v), None

    def _update(self, q, batch, last):
        """Take q into the average; after the last step, return b -> F^-1 b."""
        if self.kfac is not None:
            return self._preconditioner(batch) if last else self._observe(batch)
        self.updates += 1
        beta = self.beta if self.beta is not None else (self.updates - 1) / self.updates
        rows = getattr(self.problem.inner_loss, "seen", lambda lam, batch: batch)(self.lam, batch)
        count = (self.scale == "fisher" and examples(rows)) or 1
        self.m = rank_one_inverse(self.m, q.reshape(-1), beta, (1 - beta) * count)
        return lambda b, m=self.m: m.mv(b.reshape(-1)).view_as(b)
