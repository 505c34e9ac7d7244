"""Products with second derivatives, without ever forming a matrix.

Costs are stated in gradient-equivalents: one forward and backward pass of the loss is 1. A product
with a second derivative is counted as 2 (measured between 1 and 3, depending on the model and on
what is kept). See `COST`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_lite.exact import exactly, exactly_once
from bilevel_lite.parallel import Sharded, apart
from bilevel_lite.params import dot, norm_of
from bilevel_lite.problem import Loss, evaluate
from bilevel_lite.refuse import looked_at
from bilevel_lite.risk import SumOfRisks, Term, is_structured, only_reads, same_terms
from bilevel_lite.same_function import SameDraws, back_is_due, same_back, same_twice, watching
from bilevel_lite.slopes import slopes_and_route
from bilevel_lite.surroundings import (
    differentiating,
    nodes,
    ordinary,
    require_twice,
    second_order,
    way_out,
)

__all__ = [
    "COST",
    "SecondDerivatives",
    "cross_and_route",
    "cross_differences",
    "differences",
    "cross_from_slopes",
    "cross_vp",
    "dense",
    "first_and_second",
    "gradient",
    "hessian",
    "hvp",
    "hvp_operator",
    "lam_gradient",
    "theta_gradient",
    "update_graph",
    "update_operator",
    "update_vjp",
]

# The package's unit of account, in gradient-equivalents.
COST = {"gradient": 1, "hvp": 2, "cross": 2}


def _leaf(value: Tensor, loss: Loss) -> Tensor:
    """A point to differentiate at: a copy, unless this loss is known not to write into it."""
    value = value.detach()
    return (ordinary(value) if only_reads(loss) else value.clone()).requires_grad_()


@differentiating
def gradient(
    loss: Loss,
    lam: Tensor,
    theta: Tensor,
    batch: Any = None,
    name: str = "loss",
    need_lam: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value and both gradients of a loss: (loss, grad_lam, grad_theta).

    Args:
        loss: ``loss(lam, theta, batch)`` -> scalar.
        lam: Outer variable, any shape.
        theta: Inner variable, shape (d,).
        batch: Passed on to ``loss``.
        name: What error messages call the loss.
        need_lam: Refuse a loss that does not depend on ``lam``.

    Returns:
        The value, shape (); its gradient with respect to ``lam`` (zeros where the loss does not
        depend on it); its gradient with respect to ``theta``. All detached.

    Raises:
        ValueError: if the value is not one finite number or does not depend on ``theta``.

    Cost: 1 gradient.

    Example:
        >>> from bilevel_lite import products
        >>> g = lambda lam, theta, batch: (lam * theta**3).sum()
        >>> lam, theta = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> products.gradient(g, lam, theta)
        (tensor(3.), tensor([1., 1.]), tensor([3., 6.]))
    """
    lam, theta = _leaf(lam, loss), _leaf(theta, loss)
    with way_out(name):
        value = _first(loss, lam, theta, batch, name)
    grad_lam, grad_theta = _same_grad(value, (lam, theta), name, loss)
    if grad_theta is None:
        raise ValueError(f"{name}: does not depend on theta (its gradient is not even defined)")
    if grad_lam is None:
        _require_dependence(lam=not need_lam)
        grad_lam = torch.zeros_like(lam)
    return value.detach(), grad_lam, grad_theta


@differentiating
def theta_gradient(
    loss: Loss, lam: Tensor, theta: Tensor, batch: Any = None, name: str = "loss"
) -> tuple[Tensor, Tensor]:
    """Return the value and the gradient in theta alone: (loss, grad_theta); what inner steps need.

    Arguments, errors and cost are those of `gradient`; lam's part of the backward pass is saved.
    """
    lam, theta = lam.detach().clone(), _leaf(theta, loss)
    with way_out(name):
        value = _first(loss, lam, theta, batch, name)
    grad = _grad(value, (theta,), name)[0] if value.requires_grad else None
    if grad is None:
        raise ValueError(f"{name}: does not depend on theta (its gradient is not even defined)")
    return value.detach(), grad


@differentiating
def lam_gradient(
    loss: Loss, lam: Tensor, theta: Tensor, batch: Any = None, name: str = "loss"
) -> tuple[Tensor, Tensor]:
    """Return the value and the gradient in lam alone: (loss, grad_lam), as `gradient` gives them.

    Theta's part of the backward pass is saved: with lam in the weights of examples, all of that
    through the model. A theta that the loss does not read, or a NaN in its gradient, is not seen;
    where a loss of unknown code is due to be looked at, it is `gradient` that is called.
    """
    if not only_reads(_alone(loss)) and back_is_due(_alone(loss)):
        return gradient(loss, lam, theta, batch, name)[:2]
    lam, theta = _leaf(lam, loss), _leaf(theta, loss)
    with way_out(name):
        value = _first(loss, lam, theta, batch, name)
    grad = _same_grad(value, (lam,), name, loss)[0] if value.requires_grad else None
    return value.detach(), torch.zeros_like(lam) if grad is None else grad


def _first(loss, lam, theta, batch, name):
    """The value of a loss whose first derivatives are wanted; code that we know holds none."""
    of = _alone(loss)
    if only_reads(of):
        return evaluate(loss, lam, theta, batch, name)
    if is_structured(of) or not back_is_due(of):
        return exactly_once(of, evaluate, loss, lam, theta, batch, name)
    with watching(every=False) as watch:
        value = exactly_once(of, evaluate, loss, lam, theta, batch, name)
    _parameters_behind(value, lam, theta, name, watch)
    return value


def _alone(loss):
    """The loss itself, without what draws the same numbers for it or shares its batch."""
    return apart(loss.loss if isinstance(loss, SameDraws) else loss)[0]


def _grad(value, inputs, name, **kwargs):
    if not value.requires_grad:
        wanted = "theta" if len(inputs) == 1 else "lam or on theta"
        raise ValueError(f"{name}: does not depend on {wanted}")
    with way_out(name):
        return torch.autograd.grad(value, inputs, allow_unused=True, **kwargs)


def _graph(value, inputs, loss):
    """Gradients of the inner loss with their graph, to be differentiated once more."""
    grads = _same_grad(value, inputs, "inner_loss", loss, create_graph=True)
    require_twice("inner_loss", *grads)
    return grads


def _same_grad(value, inputs, name, loss, **kwargs):
    back, of = partial(_grad, value, inputs, name, **kwargs), _alone(loss)
    return same_back(name, back, None if only_reads(of) else of)


def _require_dependence(**depends: bool) -> None:
    for name, it_does in depends.items():
        if not it_does:
            raise ValueError(f"inner_loss: does not depend on {name}")


def _value(loss, lam, theta, batch):
    """The value of the inner loss, refused where it is another function at each evaluation."""

    def again():
        return loss(lam.detach(), theta.detach(), batch)

    plain = not is_structured(loss)
    of = None if only_reads(loss) else loss
    if not plain:
        same_terms(loss, lam.detach(), batch)
    own = []
    with same_twice("inner_loss", theta, again, of, every=plain) as watch:
        watch.value = value = exactly(evaluate, loss, lam, theta, batch, "inner_loss")
        if plain:
            own = _parameters_behind(value, lam, theta, "inner_loss", watch)
    if own and back_is_due(_alone(loss)):
        watch.evaluate(again, 1)
    if any(p._version != version for p, version in own):  # written into when evaluated again
        raise ValueError(_PUT.format(name="inner_loss"))
    return value


_PUT = (
    "{name}: puts theta into a module's parameters (vector_to_parameters, load_state_dict, copy_) "
    "and computes with these, so no derivative of it reaches theta; use "
    "bilevel_lite.params.predict(model, theta, x) or torch.func.functional_call"
)


_ITSELF = (
    "{name}: reads parameters of {model} itself, for which theta stands in (a penalty on "
    "model.parameters(), say, or a call of the model), so they are constants; read them from "
    "theta: bilevel_lite.unflatten(model, theta) has them by name"
)


def _parameters_behind(value, lam, theta, name, watch):
    """The parameters that a loss reads beside lam and theta, with the count of writes into each."""
    found = [getattr(node, "variable", None) for node in nodes(value)]
    found = [p for p in found if isinstance(p, nn.Parameter) and p is not lam and p is not theta]
    place = theta.untyped_storage().data_ptr()
    if any(p.untyped_storage().data_ptr() == place for p in found):
        raise ValueError(_PUT.format(name=name))
    read = {id(p) for p in found}
    for model, before in watch.stood_for:
        own = [p._version == version for p, version in before if id(p) in read]
        if own:
            why = _ITSELF if all(own) else _PUT
            raise ValueError(why.format(name=name, model=type(model).__name__))
    return [(p, p._version) for p in found]


def _gradients(loss, lam, theta, batch, need_lam=True):
    """Value and both gradients of the inner loss, these with the graph that products go back by."""
    with second_order(), way_out():
        value = _value(loss, lam, theta, batch)
        grad_lam, grad = _graph(value, (lam, theta), loss)
    _require_dependence(lam=grad_lam is not None or not need_lam, theta=grad is not None)
    return value, grad_lam, grad


def _theta_graph(loss, lam, theta, batch):
    """That in theta alone."""
    with second_order(), way_out():
        (grad,) = _graph(_value(loss, lam, theta, batch), (theta,), loss)
    _require_dependence(theta=grad is not None)
    return grad


@differentiating
def _back(grad, variables, v, keep=False):
    """The derivatives of < grad, v >, each like its variable: zeros where there is none of it."""
    if v.shape != grad.shape:
        raise ValueError(
            f"v: got shape {tuple(v.shape)}, expected {tuple(grad.shape)}, that of theta"
        )
    out = [None] * len(variables)
    if grad.requires_grad:
        with way_out():
            out = torch.autograd.grad(
                grad, variables, ordinary(v), retain_graph=keep, allow_unused=True
            )
    return [torch.zeros_like(x) if d is None else d for x, d in zip(variables, out, strict=True)]


@differentiating
def hvp_operator(
    loss: Loss, lam: Tensor, theta: Tensor, batch: Any = None
) -> Callable[[Tensor], Tensor]:
    r"""Return the function v -> H v, with H the Hessian of the loss in theta.

        H v = grad_theta < grad_theta g(lam, theta), v >

    The graph of the first gradient is built once and kept, so that each further product is one
    backward pass through it. It lives as long as the returned function does.

    Args:
        loss: ``loss(lam, theta, batch)`` -> scalar.
        lam: Outer variable.
        theta: Inner variable, shape (d,).
        batch: Passed on to ``loss``.

    Returns:
        A function that takes and gives a detached tensor like ``theta``.

    Raises:
        ValueError: if the loss is not one finite number, does not depend on ``theta``, is another
            function at each call (dropout in training mode, a model that counts its calls: H would
            not be that of b and J), or holds an operation without a second derivative.

    Cost: counted as 2 gradients per product.

    Example:
        >>> from bilevel_lite import products
        >>> g = lambda lam, theta, batch: (lam * theta**3).sum()
        >>> lam, theta = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> products.hvp_operator(g, lam, theta)(torch.ones(2))
        tensor([ 6., 12.])
    """
    lam, theta = lam.detach().clone(), _leaf(theta, loss)
    grad = _theta_graph(loss, lam, theta, batch)
    return lambda v: _back(grad, (theta,), v, keep=True)[0]


class SecondDerivatives:
    r"""H v and J v of a loss at one point, from one graph of its first gradient.

        H v = grad_theta < grad_theta g, v >,     J v = grad_lam < grad_theta g, v >

    Called, it gives H v, as `hvp_operator` does; `cross` gives J v without another forward pass.

    Args:
        loss: ``loss(lam, theta, batch)`` -> scalar.
        lam: Outer variable.
        theta: Inner variable, shape (d,).
        batch: Passed on to ``loss``.

    Raises:
        ValueError: as `hvp_operator`; in `cross`, if the loss does not depend on ``lam``.

    Cost: counted as 2 gradients per product.
    """

    @differentiating
    def __init__(self, loss: Loss, lam: Tensor, theta: Tensor, batch: Any = None):
        self.lam, self.theta = lam.detach().requires_grad_(), theta.detach().requires_grad_()
        self.at = loss, batch
        self.grad = _theta_graph(loss, self.lam, self.theta, batch)
        self.freed = False

    def __call__(self, v: Tensor) -> Tensor:
        """Return H v."""
        return self._product(self.theta, v, keep=True)

    def cross(self, v: Tensor) -> Tensor:
        """Return J v, like ``lam``; the graph is freed: no product can follow."""
        out = self._product(self.lam, v, keep=False)
        if not bool(out.any()):
            loss, batch = self.at
            gradient(loss, self.lam, self.theta, batch, "inner_loss", need_lam=True)
        return out

    def _product(self, variable: Tensor, v: Tensor, keep: bool) -> Tensor:
        if self.freed:
            raise ValueError(
                "solver: J v was read from the graph of H, which is gone with it; prepare anew"
            )
        self.freed = not keep
        return _back(self.grad, (variable,), v, keep)[0]


def hvp(loss: Loss, lam: Tensor, theta: Tensor, batch: Any, v: Tensor) -> Tensor:
    """One Hessian-vector product H v, shape (d,); see `hvp_operator` for many at one point.

    Cost: 2 gradients.

    Example:
        >>> from bilevel_lite import products
        >>> g = lambda lam, theta, batch: (lam * theta**3).sum()
        >>> lam, theta = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> products.hvp(g, lam, theta, None, torch.ones(2))  # 6 lam theta v
        tensor([ 6., 12.])
    """
    return hvp_operator(loss, lam, theta, batch)(v)


def hessian(loss: Loss, lam: Tensor, theta: Tensor, batch: Any = None) -> Tensor:
    """The Hessian in theta as a matrix, shape (d, d), column by column; for small problems.

    Cost: d products.

    Example:
        >>> from bilevel_lite import products
        >>> g = lambda lam, theta, batch: (lam * theta**3).sum()
        >>> lam, theta = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> products.hessian(g, lam, theta)
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    return dense(hvp_operator(loss, lam, theta, batch), theta)


def dense(matvec: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """A symmetric operator on tensors like theta as a matrix, shape (d, d), column by column.

    Cost: d products.
    """
    eye = torch.eye(theta.numel(), dtype=theta.dtype, device=theta.device)
    columns = [matvec(e.view_as(theta)).reshape(-1) for e in eye]
    matrix = torch.stack(columns, dim=1)
    return 0.5 * (matrix + matrix.T)  # symmetric up to rounding; make it exactly so


def cross_vp(
    loss: Loss, lam: Tensor, theta: Tensor, batch: Any, v: Tensor, mode: str = "auto"
) -> Tensor:
    r"""The cross-derivative product J v, with J = d2 g / (dlam dtheta), shaped like lam.

        J v = grad_lam < grad_theta g(lam, theta), v >

    A plain function of (lam, theta, batch) is differentiated twice in reverse: the formula as
    written. A `WeightedRisk` whose lam is in its weights needs the examples' slopes only,

        J v = grad_lam (1/n) sum_i sigma_i(lam) < grad_theta l_i, v >

    which are one forward-mode pass of the model, held against an ordinary gradient
    (`bilevel_lite.slopes.slopes_and_route`).

    Args:
        loss: ``loss(lam, theta, batch)`` -> scalar.
        lam: Outer variable, any shape.
        theta: Inner variable, shape (d,).
        batch: Passed on to ``loss``.
        v: Direction, shaped like ``theta``.
        mode: ``"auto"``, or ``"double_backward"`` for the formula as written in any case.

    Returns:
        Tensor like ``lam``, detached. Zeros where g depends on lam but not jointly with theta.

    Raises:
        ValueError: if the loss is not one finite number, does not depend on ``lam``, ``mode`` is
            unknown, or an operation cannot be differentiated twice (attention's fast kernels are
            replaced by the one that can).

    Cost: counted as 2 gradients.

    Example:
        >>> from bilevel_lite import products
        >>> g = lambda lam, theta, batch: (lam * theta**3).sum()
        >>> lam, theta = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> products.cross_vp(g, lam, theta, None, torch.ones(2))  # 3 theta^2 v
        tensor([3., 3.])
    """
    return cross_and_route(loss, lam, theta, batch, v, mode)[0]


@differentiating
def cross_and_route(
    loss: Loss, lam: Tensor, theta: Tensor, batch: Any, v: Tensor, mode: str = "auto"
) -> tuple[Tensor, str]:
    """`cross_vp`, and a line that says how it was computed: the one place that decides it."""
    if mode not in ("auto", "double_backward"):
        raise ValueError(f"mode: got {mode!r}, expected 'auto' or 'double_backward'")
    if isinstance(loss, Sharded) and has_slopes(loss.loss):  # each its own rows, then the sum
        own, route = cross_and_route(loss.loss, lam, theta, batch, v, mode)
        return loss.total(own, batch, "lam"), route
    if mode == "double_backward" or not has_slopes(loss):
        return _cross_twice(loss, lam, theta, batch, v), "double backward"
    terms = same_terms(loss, lam.detach(), batch)
    parts = [slopes_and_route(t.risk, t.read(theta), t.batch, t.read(v), True) for t in terms]
    if twice := [route for slope, route in parts if slope is None]:
        return _cross_twice(loss, lam, theta, batch, v), twice[0]
    slopes = [slope for slope, _ in parts]
    if looked_at(theta) and not all(bool(torch.isfinite(s.sum())) for s in slopes):
        evaluate(loss, lam, theta, batch, "inner_loss")  # says why, if the loss itself is bad
    routes = dict.fromkeys(route for _, route in parts)
    return cross_from_slopes(lam, theta, terms, slopes), " and ".join(routes)


def has_slopes(loss: Loss) -> bool:
    """True if J v of this loss is read from the examples' slopes: lam stands in weights only."""
    if not is_structured(loss):
        return False
    risks = loss.risks if isinstance(loss, SumOfRisks) else [loss]
    weighted = any(risk.weight is not None for risk in risks)
    return weighted and all(risk.inputs is None for risk in risks)


def _cross_twice(loss, lam, theta, batch, v):
    lam, theta = _leaf(lam, loss), _leaf(theta, loss)
    return _back(_gradients(loss, lam, theta, batch)[2], (lam,), v)[0]


def cross_differences(loss: Loss, lam: Tensor, theta: Tensor, batch: Any, v: Tensor) -> Tensor:
    r"""J v by central differences along v; first derivatives only, for `bilevel_lite.check`.

        J v ~ ( grad_lam g(lam, theta + h v) - grad_lam g(lam, theta - h v) ) / (2 h)

    h ||v|| / max(1, ||theta||) is the cube root of theta's machine epsilon, where the error of the
    differences and that of rounding are about equal.

    Args:
        loss: ``loss(lam, theta, batch)`` -> scalar.
        lam: Outer variable.
        theta: Inner variable, shape (d,).
        batch: Passed on to ``loss``.
        v: Direction, shaped like ``theta``.

    Cost: 2 gradients; where weights read the losses, 2 passes for each entry of lam.
    """
    if not v.any():
        return torch.zeros_like(lam)
    if is_structured(loss) and any(t.risk.reads_losses for t in loss.terms(lam, batch)):
        return _field_differences(loss, lam, theta, batch, v)
    return differences(lambda at: gradient(loss, lam, at, batch, "inner_loss")[1], theta, v)


def differences(field: Callable[[Tensor], Tensor], theta: Tensor, v: Tensor) -> Tensor:
    """The derivative of a field along v, not zero, with the step of `cross_differences`."""
    h = torch.finfo(theta.dtype).eps ** (1 / 3) * max(1.0, float(theta.norm())) / norm_of(v)
    return (field(theta + h * v) - field(theta - h * v)) / (2 * h)


def _field_differences(loss, lam, theta, batch, v):
    """The same for weights that read the losses: < grad_theta g, v > along each entry of lam.

    There grad_lam g is not the derivative of what grad_theta g is the gradient of.
    """
    h = torch.finfo(lam.dtype).eps ** (1 / 3) * max(1.0, float(lam.abs().max()))
    axes = torch.eye(lam.numel(), dtype=lam.dtype, device=lam.device).view(-1, *lam.shape)

    def along(point):
        return dot(theta_gradient(loss, point, theta, batch, "inner_loss")[1], v)

    changes = [(along(lam + h * e) - along(lam - h * e)) / (2 * h) for e in axes]
    return torch.stack(changes).view_as(lam).to(lam)


@differentiating
def cross_from_slopes(
    lam: Tensor,
    theta: Tensor,
    terms: list[Term],
    slopes: list[Tensor],
    outputs: list[Tensor] | None = None,
) -> Tensor:
    """J v of a risk from < grad_theta l_i, v >, shape (n,) for each term: like lam, detached.

        J v = grad_lam sum over terms of c (1/n) sum_i sigma_i(lam) < grad_theta l_i, v >

    Args:
        lam: Outer variable.
        theta: Inner variable, for weights that read the losses.
        terms: From ``risk.terms(lam, batch)``.
        slopes: For each term.
        outputs: The model's outputs for each term, if they are at hand.

    Raises:
        ValueError: if the weights do not depend on lam.

    Cost: that of the weights alone, and of the losses if they read them.
    """
    lam = lam.detach().requires_grad_()
    total = 0.0
    for k, (term, slope) in enumerate(zip(terms, slopes, strict=True)):
        risk, losses = term.risk, None
        if risk.weight is None:
            continue
        if risk.reads_losses:
            made = risk.outputs(term.read(theta), term.batch) if outputs is None else outputs[k]
            losses = risk.output_losses(made.detach(), term.batch[1])
        total = total + term.coefficient * (risk.weights(lam, term.batch, losses) * slope).mean()
    _require_dependence(lam=total.requires_grad)
    return torch.autograd.grad(total, lam)[0]


@differentiating
def first_and_second(
    loss: Loss, lam: Tensor, theta: Tensor, batch: Any, p: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return g, grad_theta g, J p (like ``lam``) and H p (like ``theta``), all at one point.

    Raises:
        ValueError: if the loss does not depend on ``lam`` or on ``theta``, or as `hvp_operator`.

    Cost: counted as 3 gradients: 1 for the gradient, 2 for both products together (one double
    backward pass).
    """
    lam, theta = _leaf(lam, loss), _leaf(theta, loss)
    value, _, grad = _gradients(loss, lam, theta, batch)
    jp, hp = _back(grad, (lam, theta), p)
    return value.detach(), grad.detach(), jp, hp


@differentiating
def update_graph(
    loss: Loss, lam: Tensor, theta: Tensor, batch: Any, need_lam: bool = True
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """What a reverse step of unrolling needs: q = grad_theta g, and the function p -> (J p, H p).

    The function reads the graph of q, which is kept until it has been called, once.

    Args:
        loss: ``loss(lam, theta, batch)`` -> scalar.
        lam: Outer variable.
        theta: Inner variable, shape (d,).
        batch: Passed on to ``loss``.
        need_lam: Refuse a loss that does not depend on ``lam``.

    Raises:
        ValueError: as `first_and_second`.

    Cost: 1 gradient; the function, counted as 2, both products from one double backward pass.
    """
    lam, theta = _leaf(lam, loss), _leaf(theta, loss)
    _, grad_lam, q = _gradients(loss, lam, theta, batch, need_lam)

    def back(p: Tensor) -> tuple[Tensor, Tensor]:
        jp, hp = _back(q, (lam, theta), p)
        return jp, hp

    back.reads_lam = grad_lam is not None
    return q.detach(), back


def update_vjp(
    loss: Loss, lam: Tensor, theta: Tensor, batch: Any, p: Tensor
) -> tuple[Tensor, Tensor]:
    """Both second-derivative products that one reverse step of unrolling needs: (J p, H p).

    Returns:
        J p like ``lam`` and H p like ``theta``, from one double backward pass.

    Raises:
        ValueError: as `first_and_second`.

    Cost: counted as 2 gradients together.
    """
    return update_graph(loss, lam, theta, batch)[1](p)


@differentiating
@way_out()
def update_operator(
    loss: Loss, lam: Tensor, theta: Tensor, batch: Any, need_lam: bool = True
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    r"""What a forward step of unrolling needs: grad_theta g, and the function (e, z) -> its slope.

        H z + J^T e = grad_theta ( < grad_lam g, e > + < grad_theta g, z > )

    Second derivatives do not depend on the order, so this is the directional derivative of
    grad_theta g along (e, z) without torch's forward mode. The loss is evaluated once for all
    directions: what it draws at random is the same for all.

    Returns:
        q = grad_theta g, detached, and a function from e, like ``lam``, and z, like ``theta``, to
        H z + J^T e, like ``theta``, detached; it keeps the graph. Instead of a z of zeros, None
        saves its part; a loss without lam, which ``need_lam=False`` allows, has J = 0.

    Raises:
        ValueError: if the loss is not one finite number, does not depend on ``lam`` or on
            ``theta``, or holds an operation without a second derivative.

    Cost: counted as 2 gradients per direction (the gradient is a by-product).
    """
    lam, theta = _leaf(lam, loss), _leaf(theta, loss)
    with second_order():
        value = exactly(evaluate, loss, lam, theta, batch, "inner_loss")
        grads = _graph(value, (lam, theta), loss)
    _require_dependence(lam=grads[0] is not None or not need_lam, theta=grads[1] is not None)

    @differentiating
    @way_out()
    def along(e: Tensor, z: Tensor | None) -> Tensor:
        pairs = [
            (g, ordinary(v))
            for g, v in zip(grads, (e, z), strict=True)
            if g is not None and v is not None and g.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(theta)
        seen, directions = zip(*pairs, strict=True)
        (out,) = torch.autograd.grad(seen, theta, directions, retain_graph=True, allow_unused=True)
        return torch.zeros_like(theta) if out is None else out

    along.reads_lam = grads[0] is not None
    return grads[1].detach(), along
