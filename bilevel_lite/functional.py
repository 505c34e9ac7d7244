"""Functional bilevel optimisation: the inner unknown is a function, whatever represents it.

    o*_lam = argmin over functions o of E_in l_in(lam, o(x), .)
    Phi(lam) = E_out l_out(lam, o*_lam(x), .)

The inner loss need be convex in the prediction o(x) only, not in the weights of a network. The
place of v in theta's space is taken by a function of x, with Omega = d^2 l_in / do^2:

    v = argmin over functions v of  E_in[ 1/2 v(x)^T Omega v(x) ] - E_out[ v(x)^T d l_out / do ]
    dPhi/dlam = d E_out l_out / dlam - E_in[ (d^2 l_in / dlam do) v(x) ]

Minus v is what the source calls the adjoint function. Here it is sought among the combinations
v(x) = Z(x) v of k given functions, a linear system of k unknowns. With Z(x) the derivative of the
outputs in the weights, the system is that of the GGN and v is its v (`tangents`): then, and only
then, it is the parametric hypergradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.exact import exactly
from bilevel_lite.refuse import require_finite, require_number, require_variable
from bilevel_lite.same_function import same_twice
from bilevel_lite.surroundings import (
    differentiating,
    ordinary,
    require_twice,
    second_order,
    way_out,
)
from bilevel_lite.trust import tolerance, wave

__all__ = ["functional_hypergradient", "spread", "tangents"]

Pointwise = Callable[[Tensor, Tensor, Any], Tensor]
Basis = Callable[[Tensor], Tensor]


def tangents(outputs: Callable[[Tensor, Tensor], Tensor], theta: Tensor) -> Basis:
    """Z(x) = d outputs(theta, x) / d theta, shape (n, C, d): dense, for small models.

    Args:
        outputs: (theta, x) -> predictions, shape (n, C).
        theta: Shape (d,).
    """
    return lambda x: torch.func.jacrev(lambda t: outputs(t, x))(ordinary(theta.detach()))


def spread(features: Callable[[Tensor], Tensor], outputs: int) -> Basis:
    """Z(x) of v(x) = features(x) W with W of shape (p, C), as one basis of shape (n, C, p C)."""

    def basis(x):
        phi = features(x)
        return torch.einsum(
            "np,ce->ncpe", phi, torch.eye(outputs, dtype=phi.dtype, device=phi.device)
        ).flatten(2)

    return basis


@differentiating
def functional_hypergradient(
    inner_loss: Pointwise,
    outer_loss: Pointwise,
    lam: Tensor,
    predict: Callable[[Tensor], Tensor],
    basis: Basis,
    inner_batch: Any,
    outer_batch: Any,
    damping: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""The hypergradient through a function v(x) = Z(x) v, and the coefficients v.

        ( mean_in Z^T Omega Z + damping I ) v = mean_out Z^T d l_out / do
        h = d mean_out l_out / dlam - mean_in d/dlam < d l_in / do, Z v >

    Args:
        inner_loss: (lam, o, batch) -> losses, shape (n,); o are predictions, shape (n, C).
        outer_loss: The same.
        lam: Outer variable.
        predict: x -> o*_lam(x), shape (n, C), the inner solution; it is not differentiated.
        basis: x -> Z(x), shape (n, C, k); see `tangents` and `spread`.
        inner_batch: (x, ...), over which the inner mean is taken.
        outer_batch: (x, ...), likewise.
        damping: Added to the diagonal of the system.

    Returns:
        The hypergradient, like ``lam``, and v, shape (k,); both detached.

    Raises:
        TypeError: if ``lam`` is not a floating-point tensor.
        ValueError: if ``damping`` is negative, losses or basis have another shape, the system is
            singular or not positive (an inner loss that is not convex in the prediction), or the
            result is not finite.

    Cost: dense, of order n C k^2 + k^3. Source: Petrulionyte, Mairal and Arbel (2024), arXiv
    2403.20233, equations 4 and 5; their closed form is `spread` of the last layer's inputs.

    Example:
        >>> from bilevel_lite.functional import functional_hypergradient, spread
        >>> pull = lambda lam, o, batch: ((o - lam) ** 2).sum(1) / 2  # o* = lam
        >>> aim = lambda lam, o, batch: ((o - 1) ** 2).sum(1) / 2
        >>> x, lam = (torch.zeros(4, 1),), torch.tensor(3.0)
        >>> ones = spread(lambda x: torch.ones(len(x), 1), outputs=1)
        >>> h, v = functional_hypergradient(pull, aim, lam, lambda x: 3 + 0 * x, ones, x, x)
        >>> h  # Phi = (lam - 1)^2 / 2
        tensor(2.)
    """
    require_variable("lam", lam)
    require_number("damping", damping)
    lam = lam.detach().clone().requires_grad_()
    inner_batch, outer_batch = ordinary(inner_batch), ordinary(outer_batch)
    with torch.no_grad():
        within, beyond = (ordinary(predict(batch[0])) for batch in (inner_batch, outer_batch))
        near, far = (ordinary(basis(batch[0])) for batch in (inner_batch, outer_batch))
    for name, b, h in (("inner_batch", near, within), ("outer_batch", far, beyond)):
        if h.dim() and not len(h):
            raise ValueError(f"{name}: holds no examples")
        if h.dim() != 2 or b.dim() != 3 or b.shape[:2] != h.shape:
            raise ValueError(
                f"basis: got shape {tuple(b.shape)} on {name} for predictions of shape "
                f"{tuple(h.shape)}, expected (n, C, k) and (n, C)"
            )
    with torch.enable_grad(), second_order(), way_out():
        beyond = beyond.detach().requires_grad_()
        outer = _losses("outer_loss", outer_loss, lam, beyond, outer_batch).mean()
        pull = _slope(outer, beyond)
        within = within.detach().requires_grad_()
        losses = _losses("inner_loss", inner_loss, lam, within, inner_batch)
        slope = _slope(losses.sum(), within, create_graph=True)
        require_twice("inner_loss", slope)
        _require_pointwise(inner_loss, lam, within, inner_batch)
        for name, found in (("outer_loss", pull), ("inner_loss", slope)):
            if found is None:
                raise ValueError(f"{name}: does not depend on the predictions")
        (direct,) = torch.autograd.grad(outer, lam, allow_unused=True)
        rows = [_slope(s.sum(), within) for s in slope.unbind(1)]  # None: linear in them
        curvature = torch.stack([torch.zeros_like(within) if r is None else r for r in rows], 1)
        system = torch.einsum("nck,nce,nel->kl", near, curvature, near) / len(near)
        system = system + damping * torch.ones_like(system[0]).diag()
        right = torch.einsum("nck,nc->k", far, pull)
        factor, failed = torch.linalg.cholesky_ex(system)
        small = (
            factor.diagonal().square().min()
            <= len(system) * torch.finfo(system.dtype).eps * system.diagonal().max()
        )
        if int(failed) or bool(small):
            raise ValueError(
                "basis: the system for v is singular or not positive (functions that depend on "
                "each other, more of them than inner examples, or an inner loss that is not convex "
                "in the prediction); give a damping above zero, or fewer functions"
            )
        v = torch.cholesky_solve(right[:, None], factor)[:, 0]
        along = torch.einsum("nck,k->nc", near, v)
        (cross,) = torch.autograd.grad((slope * along).sum() / len(near), lam, allow_unused=True)
    if cross is None:
        raise ValueError("inner_loss: does not depend on lam")
    h = -cross if direct is None else direct - cross
    require_finite({"hypergradient": h})
    return h.detach(), v.detach()


def _slope(value, predictions, **kwargs):
    """The gradient of a number in the predictions, None where it does not depend on them."""
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, predictions, retain_graph=True, allow_unused=True, **kwargs)[
        0
    ]


def _require_pointwise(loss, lam, h, batch):
    """Refuse losses that read other examples' predictions: with any c, c_i is to be slope_i's."""
    h = (h + 0.01 * h.abs().mean() * wave(h)).detach().requires_grad_()  # where slopes are not zero
    losses = exactly(loss, lam.detach(), h, batch)
    c = torch.linspace(0.5, 1.5, len(losses)).to(losses)
    slope, along = _slope(losses.sum(), h), _slope(c @ losses, h)
    if slope is None or along is None:
        return
    expected = c[:, None] * slope
    if float((along - expected).norm()) > tolerance(losses) * float(expected.norm()):
        raise ValueError(
            "inner_loss: an example's loss reads the predictions of others, so there is no loss of "
            "each prediction alone, which this hypergradient is of; write it example by example"
        )


def _losses(name, loss, lam, h, batch):
    def again():
        return loss(lam.detach(), h.detach(), batch)

    with same_twice(name, h, again, loss, every=True) as watch:
        losses = exactly(loss, lam, h, batch)
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            got = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"{name}: returned {got}, expected a floating-point tensor of losses")
        watch.value = losses
    if losses.shape != h.shape[:1]:
        raise ValueError(
            f"{name}: got losses of shape {tuple(losses.shape)}, expected one for each of the "
            f"{len(h)} examples, shape ({len(h)},)"
        )
    return losses
