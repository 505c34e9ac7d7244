"""How steeply each example's loss rises along a direction: all that J v needs of lam in weights.

    J v = grad_lam (1/n) sum_i sigma_i(lam) < grad_theta l_i, v >

The slopes come from one forward-mode pass, which is believed only after it was compared with the
gradient that training follows.
"""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.exact import exactly
from bilevel_lite.forward_mode import NoForwardMode, push_forward
from bilevel_lite.params import dot, leaves, unflatten
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.same_function import same_twice
from bilevel_lite.surroundings import differentiating, require_twice, second_order, way_out
from bilevel_lite.trust import (
    ByHand,
    known_code,
    mixes_examples,
    numbers,
    on_few,
    still,
    tolerance,
    verdicts_of,
)

__all__ = ["slopes_and_route"]


@differentiating
def slopes_and_route(
    risk: WeightedRisk, theta: Tensor, batch: Any, v: Tensor, as_trained: bool = False
) -> tuple[Tensor | None, str]:
    r"""Return < grad_theta l_i, v > for each example, and a line that says how they were computed.

        < grad_theta l_i, v > = s_i . (J_i v),   s_i = p_i - e_{y_i}  (mse: outputs_i - y_i)

    J_i v, the directional derivative of the outputs, is one pass of forward-mode differentiation:
    give theta the tangent v and read the outputs' tangent. It is held against an ordinary gradient
    at every call (`_confirmed`); where it differs, or an operation has no forward mode, the losses
    are differentiated twice in reverse.

    Args:
        risk: Of one term; its weights are not read.
        theta: Inner variable, shape (d,).
        batch: As the model sees it.
        v: Direction, shape (d,).
        as_trained: Give None where code that is not known has no slopes by forward mode: a hook
            that clips gradients, say, makes of the losses' slopes another thing than of the risk's.

    Returns:
        Shape (n,), detached, and the line.

    Raises:
        ValueError: as `WeightedRisk.losses`, if the outputs do not depend on theta, or if the model
            has an operation that cannot be differentiated twice.

    Cost: two forward passes' worth of arithmetic and 1/n gradients; 2 gradients the other way.
    """
    theta, v = theta.detach(), v.detach()
    by_hand = None if known_code(risk.model) else ByHand(risk.model)

    def forward(t: Tensor) -> Tensor:
        with by_hand or nullcontext():
            return risk.outputs(t, batch)

    try:
        outputs, along = push_forward(forward, theta, v, risk.model)
        slopes = (risk.output_gradient(outputs, batch[1]) * along).flatten(1).sum(1)
    except NoForwardMode as error:
        why = f"no forward mode: {error}"
    else:
        if _confirmed(risk, theta, batch, v, slopes, by_hand):
            return slopes, "forward mode"
        why = "forward mode is not the gradient that training follows"
    slopes = None if as_trained and by_hand else _twice(risk, theta, batch, v)
    return slopes, f"double backward ({why})"


def _twice(risk: WeightedRisk, theta: Tensor, batch: Any, v: Tensor) -> Tensor:
    """The same as d/dc_i of < grad_theta sum_i c_i l_i, v >, by double backward."""
    fixed, theta = theta.detach(), theta.detach().requires_grad_()
    again = partial(risk.losses, fixed, batch)
    with second_order(), way_out():
        with same_twice("inner_loss", fixed, again, risk.model) as watch:
            watch.value = losses = exactly(risk.losses, theta, batch)
        c = torch.ones_like(losses).requires_grad_()
        (g,) = torch.autograd.grad(dot(c, losses), theta, create_graph=True)
        require_twice("inner_loss", g)
        return torch.autograd.grad(dot(g, v.to(g)), c)[0]


def _confirmed(
    risk: WeightedRisk,
    theta: Tensor,
    batch: Any,
    v: Tensor,
    slopes: Tensor,
    by_hand: ByHand | None,
) -> bool:
    """True if slopes are those of the gradient that training follows, an ordinary one.

    Once for each model the whole batch is compared, which is enough where all of its code is
    known. Else a few examples, other ones at each call, go through the model alone and back;
    where their gradient along v is not what their slopes say (a model may mix examples, or not
    take few), and where gradients are stopped or turned ``by_hand`` (in some rows only, it may
    be), the whole batch decides again. With random numbers c:

        sum_i c_i slope_i = < grad_theta sum_i c_i l_i, v >

    and in float32 or below with three of them (`bilevel_lite.trust.numbers`). Nothing is
    differentiated twice. Cost: a few examples; 1 gradient where all decide (2 in float32).
    """
    key = ("forward mode", mixes_examples(risk.model))
    seen = verdicts_of(risk.model)
    if key in seen and by_hand is None:
        return True

    def few_agree(few, rows):
        return _has_slopes(risk, theta, few, v, slopes[rows], by_hand)

    # else a few examples are another function, or not like the others
    if key in seen and not key[1] and not by_hand.seen:
        if on_few(few_agree, batch, len(slopes)) and not by_hand.seen:
            return True
    agrees = _has_slopes(risk, theta, batch, v, slopes)
    if agrees:
        seen[key] = True
    return agrees


def _has_slopes(
    risk: WeightedRisk, theta: Tensor, batch: Any, v: Tensor, slopes: Tensor, by_hand: Any = None
) -> bool:
    n = len(slopes)
    generator, count = torch.Generator().manual_seed(n), numbers(slopes)
    draws = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    cs = torch.randn(count, n, **draws).to(slopes)
    size, *made = torch.cat([slopes.norm()[None], cs @ slopes]).tolist()
    if not math.isfinite(size):
        return True  # nothing to compare; who asked refuses it
    pairs = zip(_along(risk, theta, batch, v, cs, by_hand), made, strict=True)
    return all(abs(given - m) <= tolerance(slopes) * size for given, m in pairs)


def _along(
    risk: WeightedRisk, theta: Tensor, batch: Any, v: Tensor, cs: Tensor, by_hand: Any
) -> list[float]:
    """< grad_theta sum_i c_i l_i, v > for each row c, by ordinary gradients.

    The model's statistics stay as they are.
    """
    here, along = leaves(risk.model, theta), unflatten(risk.model, v)
    out = []
    with still(risk.model):
        with by_hand or nullcontext():
            losses = risk.losses(here, batch)
        for k, c in enumerate(cs, 1):
            grads = torch.autograd.grad(
                losses, list(here.values()), c, retain_graph=k < len(cs), allow_unused=True
            )
            pairs = zip(grads, along.values(), strict=True)
            out.append(float(sum(dot(g, d) for g, d in pairs if g is not None)))
    return out
