"""F2SA: a penalty on the inner problem's gap, with no second derivative anywhere."""

from bilevel_lite.algorithms.method import Method
from bilevel_lite.options import not_negative, positive, whole

__all__ = ["F2SA"]


class F2SA(Method):
    r"""Fully first-order: min over lam of  min_theta max_z  f(lam, theta) + c [g(theta) - g(z)].

        inner_steps times:  z     <- z - inner_lr grad_theta g(lam, z)
                            theta <- theta - inner_lr (grad_theta f / c + grad_theta g)(lam, theta)
        lam <- lam - outer_lr ( grad_lam f(theta) + c [grad_lam g(theta) - grad_lam g(z)] )
        c   <- c + growth

    At convergence the direction misses the hypergradient by O(1 / c). theta's step is inner_lr / c
    on the penalised loss, whose curvature grows with c. The two values of grad_lam g are taken on
    one batch and subtracted: at a large c that loses digits in float32.

    Cost of a step: 3 inner_steps + 3 gradients.
    Source: Kwon et al. (2023), arXiv 2301.10945.

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.F2SA(problem, lam, theta, inner_lr=0.1, outer_lr=0.1)
        >>> steps = [method.step() for _ in range(40)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    inner_steps: int = whole(default=10, help="T, steps on z, which starts at theta, and on theta")
    penalty: float = positive(default=1.0, help="c at the start", search=(0.1, 10.0))
    growth: float = not_negative(default=0.1, help="Added to c after each outer iteration")

    choices = ("none: a penalty", "none", "double loop, two inner problems")
    remembers = ("z", "penalty")
    plain_inner = True

    def __post_init__(self):
        super().__post_init__()
        self.z = self.theta.clone()

    def _direction(self):
        for _ in range(self.inner_steps):
            batch = self._draw("inner")
            self.z = self.z - self._lr * self._g_theta(batch, self.z)[1]
            inner_loss, g_theta = self._g_theta(batch)
            self._move_theta(self._f(self._draw("outer")).theta / self.penalty + g_theta)
        f, batch = self._f(self._draw("outer")), self._draw("inner")
        with self._same_draws():
            h = f.lam + self.penalty * (self._g(batch).lam - self._g(batch, self.z).lam)
        self.penalty += self.growth
        return inner_loss, f.value, h, None
