"""SAMA: first order only; the curvature is what the inner optimiser takes it to be."""

from typing import Any

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import Method, require_positive
from bilevel_lite.linsolve import at_least
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import gradient
from bilevel_lite.same_function import SameDraws

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
    code takes D = I for SGD).

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied.
        inner_steps: Steps on theta per outer iteration.
        alpha: Length of the finite difference in theta.
        **common: See `bilevel_lite.algorithms.method.Method`; the inner optimiser is SGD (with or
            without momentum), Adam or AdamW.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for another optimiser or option.

    Cost of a step: inner_steps + 3 gradients.
    Source: Choe et al. (2023), arXiv 2310.05674.
    """

    choices = ("inner optimiser's diagonal", "one diagonal product", "double loop")

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        inner_steps: int = 10,
        alpha: float = 0.1,
        **common: Any,
    ):
        at_least("inner_steps", inner_steps, 1)
        require_positive("alpha", alpha)
        super().__init__(problem, lam, theta, **common)
        _require_known(self.inner_optimizer)
        self.inner_steps, self.alpha = inner_steps, alpha

    def _direction(self):
        for _ in range(self.inner_steps):
            batch = self._draw("inner")
            inner_loss, grad = self._inner_gradient(batch)
            d = adaptation(self.inner_optimizer, self.theta, grad)
            self._move_theta(grad)
        outer_loss, direct, b = self._outer_gradient(self._draw("outer"))
        v = d * b
        size = float(v.norm())
        if size == 0:
            return inner_loss, outer_loss, direct, None
        eps = self.alpha / size
        self._spend("gradient", batch, times=2)
        g = SameDraws(self.problem.inner_loss)
        up, down = (
            gradient(g, self.lam, self.theta + s * eps * v, batch, "inner_loss")[1] for s in (1, -1)
        )
        return inner_loss, outer_loss, direct - (up - down) / (2 * eps), None


def adaptation(optimizer: torch.optim.Optimizer, theta: Tensor, grad: Tensor) -> Tensor:
    r"""D = du / d grad for the step theta - u(grad) that the optimiser would take next.

        SGD     lr k, nesterov lr (1 + momentum k);  k = 1 - dampening, 1 at the first step
        Adam    lr [ m' / (sqrt(s) + eps) - m s' / (2 sqrt(s) (sqrt(s) + eps)^2) ]
                m, s the bias-corrected moments, m' and s' their derivatives in the gradient
        AdamW   as Adam: the decay does not depend on the gradient

    Adam's D is computed in a form that is free of cancellation (at the first step u is lr times the
    gradient's sign but for eps, so that D nearly vanishes): with m_old and s_old the moments before
    the step, uncorrected, and c1, c2 the corrections,

        D = (lr / c1) [ (1-b1) b2 s_old - b1 (1-b2) grad m_old + c2 (1-b1) eps sqrt(s) ]
            / ( c2 sqrt(s) (sqrt(s) + eps)^2 )

    Coupled weight decay (SGD, Adam) enters the gradient first. Where s is zero no gradient was ever
    seen, and D is zero (the derivative there, about lr / eps, says nothing about the loss).

    Args:
        optimizer: Before its step.
        theta: The parameter it holds.
        grad: The gradient it is about to be given.

    Returns:
        The diagonal D, like ``theta``.

    Raises:
        ValueError: for an optimiser that is none of these, or with amsgrad or maximize.
    """
    _require_known(optimizer)
    group, state = optimizer.param_groups[0], optimizer.state.get(theta, {})
    lr = group["lr"]
    if isinstance(optimizer, torch.optim.SGD):
        first = state.get("momentum_buffer") is None
        share = 1.0 if first or not group["momentum"] else 1 - group["dampening"]
        if group["nesterov"]:
            share = 1 + group["momentum"] * share
        return torch.full_like(theta, lr * share)
    beta1, beta2 = group["betas"]
    if not (isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay")):
        grad = grad + group["weight_decay"] * theta
    t = int(state.get("step", 0)) + 1
    m, s = state.get("exp_avg", 0.0), state.get("exp_avg_sq", 0.0)
    c1, c2, eps = 1 - beta1**t, 1 - beta2**t, group["eps"]
    root = ((beta2 * s + (1 - beta2) * grad.square()) / c2).sqrt()
    above = (1 - beta1) * (beta2 * s + c2 * eps * root) - beta1 * (1 - beta2) * grad * m
    d = lr / c1 * above / (c2 * root * (root + eps).square())
    return torch.where(root > 0, d, torch.zeros_like(d))


def _require_known(optimizer: torch.optim.Optimizer) -> None:
    group = optimizer.param_groups[0]
    known = isinstance(optimizer, torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW)
    if not known or group.get("amsgrad") or group.get("maximize"):
        raise ValueError(
            f"inner_optimizer: SAMA knows the derivative of SGD, Adam and AdamW steps (no amsgrad, "
            f"no maximize), got {type(optimizer).__name__}"
        )
