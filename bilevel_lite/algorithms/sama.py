"""SAMA: first order only; the curvature is what the inner optimiser takes it to be."""

from bilevel_lite.algorithms.adaptation import adaptation, require_known
from bilevel_lite.algorithms.method import Method
from bilevel_lite.options import positive, whole
from bilevel_lite.refuse import looked_at

__all__ = ["SAMA", "adaptation"]


class SAMA(Method):
    r"""Identity Jacobian, adapted to the inner optimiser, J v by a finite difference.

        theta <- inner_steps steps of an optimiser, theta+ = theta - u(grad_theta g)
        v     = D grad_theta f,   D = du / d grad (diagonal, at the last inner step)
        J v   ~ [ grad_lam g(lam, theta + eps v) - grad_lam g(lam, theta - eps v) ] / (2 eps),
                eps = alpha / ||v||, at the new theta, on the last inner batch
        lam   <- lam - outer_lr (grad_lam f - J v)

    One inner step is differentiated (T1-T2), with D in place of step times identity. D carries the
    learning rate for every optimiser, so that outer step sizes transfer between them (released
    code takes D = I for SGD). Where weights read the losses, the difference tends to another J v,
    that of weights that are not detached ((14.6) in chapter 14).

    Args:
        **common: See `bilevel_lite.algorithms.method.Method`; the inner optimiser is SGD (with or
            without momentum), Adam or AdamW.

    Cost of a step: inner_steps + 3 gradients.
    Source: Choe et al. (2023), arXiv 2310.05674.

    Example:
        >>> g = lambda lam, theta, _: ((theta - lam) ** 2).sum()
        >>> f = lambda lam, theta, _: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> method = bl.SAMA(problem, lam, theta, inner_lr=0.1, outer_lr=0.3)
        >>> steps = [method.step() for _ in range(60)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    inner_steps: int = whole(default=10, help="Steps on theta per outer iteration")
    alpha: float = positive(
        default=0.1, help="Length of the finite difference in theta", search=(0.03, 3.0)
    )

    knows_decay = True
    choices = ("inner optimiser's diagonal", "one diagonal product", "double loop")

    def __post_init__(self):
        super().__post_init__()
        require_known(self.inner_optimizer)

    def _direction(self):
        with self.descending():
            for left in reversed(range(self.inner_steps)):
                batch = self._draw("inner")
                inner_loss, grad = self._g_theta(batch)
                if not left:
                    d = adaptation(self.inner_optimizer, self.theta, grad)
                self._move_theta(grad)
        f = self._f(self._draw("outer"))
        v = d * f.theta
        size = float(v.norm())
        if size == 0:
            return inner_loss, f.value, f.lam, None
        eps = self.alpha / size
        ends = [self.theta + s * eps * v for s in (1, -1)]
        # half of it, by length, is the least that must be left of the perturbation
        left_out = (ends[0] - ends[1] - 2 * eps * v).norm()
        if looked_at(v) and float(left_out) > self.alpha:
            raise ValueError(
                f"alpha: got {self.alpha}, which is lost in the rounding of a theta in "
                f"{self.theta.dtype}; expected a larger one"
            )
        with self._same_draws():
            up, down = (self._g_lam(batch, theta)[1] for theta in ends)
        return inner_loss, f.value, f.lam - (up - down) / (2 * eps), None
