"""What the step that an optimiser is about to take owes to the gradient: its derivative."""

import torch
from torch import Tensor

__all__ = ["adaptation", "require_known"]


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
    require_known(optimizer)
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


def require_known(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser whose derivative is not known.

    Raises:
        ValueError: naming those that are.
    """
    group = optimizer.param_groups[0]
    known = isinstance(optimizer, torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW)
    if not known or group.get("amsgrad") or group.get("maximize"):
        raise ValueError(
            f"inner_optimizer: SAMA knows the derivative of SGD, Adam and AdamW steps (no amsgrad, "
            f"no maximize), got {type(optimizer).__name__}"
        )
