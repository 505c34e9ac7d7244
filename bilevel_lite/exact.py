"""Operations of which torch has a wrong higher derivative, and says nothing; here in another form.

torch 2.13, found by comparing its derivatives with differences of those one order lower:

second order  weight norm (its norms are taken for constants); cross-entropy of a linear map in
              chunks; embeddings with ``scale_grad_by_freq`` (the scale is forgotten), which no form
              can mend, since that gradient is the gradient of nothing; sparse tensors of learned
              values, scan, while_loop (parts are missing); solve, det, slogdet under forward mode
third order   layer_norm, batch_norm and instance_norm with their own statistics
at one point  second order again: x^q where q is learned and exactly 0; |x| at exactly 0 within a
              smooth function, |x|^2, say (mended for real x; a complex one is to be written by its
              real and imaginary parts, a 1-norm of one entry as |x|; kinks that cancel, as
              max(x, 0) and |x| do in a logistic loss by hand, cannot be told from others)

A loss that itself holds a derivative (forces, gradient penalties) raises each order by one or two.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel_lite.refuse import switched_on
from bilevel_lite.surroundings import nodes, transforming
from bilevel_lite.trust import STEERING, doubling, steers

__all__ = ["aside", "exactly", "exactly_once"]


def exactly(loss: Callable[..., Any], *args: Any) -> Any:
    """Call ``loss(*args)`` so that all derivatives of what it returns are right.

    A loss that both normalises and differentiates is evaluated once more, with the normalisation
    written out: its third derivatives are slower to take, and no other loss needs them. (Running
    statistics of a layer in training mode then move twice.)

    Raises:
        ValueError: for an operation that has no right derivative, also where it came by a name that
            is not known here (``torch.export``, TorchScript, ``torch.ops``).
    """
    return _told(2, loss, *args)[0]


def _told(order: int, loss: Callable[..., Any], *args: Any) -> tuple[Any, bool]:
    """What `exactly` returns, and whether a plain call may return something else."""
    mode = _Exactly(order)
    with mode:
        value = loss(*args)
    if mode.differentiates and (mode.normalises or mode.special and order == 1):
        with _Exactly(order, written_out=True):
            value = loss(*args)
    if not transforming():
        _require_right(value, order + 2 * mode.differentiates)
    return value, mode.differentiates or mode.replaces


# loss -> [how often it was called, whether it was seen to need other forms]
_seen: WeakKeyDictionary = WeakKeyDictionary()


def exactly_once(of: Any, loss: Callable[..., Any], *args: Any) -> Any:
    """`exactly` where first derivatives alone are wanted: a call of ``loss`` that evaluates ``of``.

    Torch has first derivatives wrong only of what holds a derivative itself. Whether ``of`` does,
    or has an operation in another form, is looked at in its call 1, 2, 4, 8 ...; until it is seen
    to, the other calls are plain ones.
    """
    try:
        record = _seen.setdefault(of, [0, False])
    except TypeError:  # has no hash or no weak references
        return _told(1, loss, *args)[0]
    record[0] += 1
    needs = record[1]
    if not (needs or doubling(record[0])):
        return loss(*args)
    record[1] = True  # stays so where it is refused
    value, other = _told(1, loss, *args)
    record[1] = needs or other
    return value


# nodes of torch's own that have wrong derivatives of second order, and of third
_WRONG = "WeightNormInterface"
_CUT = ("SparseCooTensor", "SparseCompressedTensor")
_WRONG_THIRD = ("NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
_SCALED = (
    "model: an embedding has scale_grad_by_freq=True, so what training follows is the gradient of "
    "no function, and torch's second derivative forgets the scale; use scale_grad_by_freq=False"
)
_BUILT = (
    "model: builds a sparse tensor ({}) from values that depend on theta or lam, and torch's "
    "derivative of that has no graph, so H and J would be short of a part; keep the values dense "
    "(index_add or scatter in place of the sparse product)"
)
_CONTROL = (
    "model: holds {} of torch's own control flow (scan, while_loop, map, cond), whose second "
    "derivative torch has wrong or not at all; write it as a Python loop or branch"
)


_SOLVED = (
    "model: takes a forward-mode derivative (torch.func.jvp, say) of {}, and the gradient of that "
    "is wrong in torch; use torch.linalg.inv(A) @ B, or a reverse derivative (torch.func.vjp)"
)


def _pushing_forward() -> bool:
    """True inside a forward-mode transform of ``torch.func``."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def _scaled(function, args, kwargs):
    by_place = args[3:4] if function in (torch.embedding, torch.embedding_bag) else ()
    return kwargs.get("scale_grad_by_freq", any(by_place))


def _require_right(value: Any, order: int) -> None:
    """Refuse a value whose graph holds what has wrong derivatives up to this order."""
    for node in nodes(value):
        if getattr(node, "_saved_scale_grad_by_freq", False):
            raise ValueError(_SCALED)
        name = node.name()
        if order > 1 and name.startswith(_CUT):
            raise ValueError(_BUILT.format(name.removesuffix("Backward0")))
        made_by = getattr(getattr(node, "_forward_cls", None), "__module__", "")
        if order > 1 and made_by in STEERING:
            raise ValueError(_CONTROL.format(name.removesuffix("AutogradOpBackward")))
        own_statistics = getattr(node, "_saved_training", getattr(node, "_saved_train", True))
        wrong = name.startswith(_WRONG) or (
            order > 2 and name.startswith(_WRONG_THIRD) and own_statistics
        )
        if wrong:
            raise ValueError(
                f"model: {name.removesuffix('Backward0')} came by another way than torch's own "
                "functions (torch.export, TorchScript, torch.ops?), and torch has its higher "
                "derivatives wrong; use the module as it was before it was exported or scripted, "
                "or write the operation out"
            )


_aside: ContextVar[bool] = ContextVar("aside", default=False)


def aside():
    """Derivatives that are taken within a loss only to look at something: it holds none of them."""
    return switched_on(_aside)


class _Exactly(TorchFunctionMode):
    def __init__(self, order: int, written_out: bool = False):
        super().__init__()
        self.order, self.written_out = order, written_out
        self.normalises = self.differentiates = self.replaces = self.special = False
        self.level = fwad._current_level

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _DIFFERENTIATE:
            self.differentiates = self.differentiates or not _aside.get()
        elif function in _OTHER_FORMS:
            self.replaces = True
            return _OTHER_FORMS[function](*args, **kwargs)
        elif function in _NORMALISE:
            self.normalises = True
            inside = fwad._current_level > self.level  # a forward mode of the loss's own
            if self.written_out or inside or transforming():
                self.replaces = True
                return _NORMALISE[function](*args, **kwargs)
        elif function in _AT_ONE_POINT:
            self.special = True
            inside = fwad._current_level > self.level or transforming()
            if (self.order > 1 or self.written_out) and not inside:
                return _AT_ONE_POINT[function](function, *args, **kwargs)
        elif function in _WRONG_OF_FORWARD and (
            fwad._current_level > self.level or _pushing_forward()
        ):
            raise ValueError(_SOLVED.format(function.__name__))
        elif transforming() and _scaled(function, args, kwargs):  # the graph is hidden
            raise ValueError(_SCALED)
        elif self.order > 1 and steers(function):
            raise ValueError(_CONTROL.format(function.name()))  # its own errors are none of ours
        return function(*args, **kwargs)


# ------------------------------------------------------------------ other forms


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    return F.linear_cross_entropy(*args, **kwargs)


def _normalised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, *cudnn):
    out = _normalised(input, list(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _per_channel(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1] + [1] * (out.dim() - 2)
    out = out if weight is None else out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):  # fmt: skip
    plain = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        return plain  # statistics that stand still
    dims = [d for d in range(input.dim()) if d != 1]
    return _per_channel(_normalised(input, dims, eps), weight, bias)


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
    momentum=0.1, eps=1e-5,
):  # fmt: skip
    plain = F.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )
    if not use_input_stats:
        return plain
    return _per_channel(_normalised(input, list(range(2, input.dim())), eps), weight, bias)


def _power(function, input, exponent, **kwargs):
    """base ** exponent; as exp(exponent log base) where a learned exponent is 0."""
    out = function(input, exponent, **kwargs)
    if kwargs or not getattr(exponent, "requires_grad", False) or out.is_complex():
        return out
    base = torch.as_tensor(input, device=out.device).to(out.dtype)
    at = (exponent == 0) & (base > 0)
    return torch.where(at, (exponent * torch.where(at, base, 1).log()).exp().to(out), out)


class _Abs(torch.autograd.Function):
    """|x| with the derivative 1 at x = 0 where what is made of it has slope 0 there, else 0.

    The gradient is torch's; of |x|^2 = x^2 the second derivative is that of x^2.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.sign = None
        return x.abs()

    @staticmethod
    def backward(ctx, g):
        if ctx.sign is None:  # of the gradient; when that is differentiated it stays
            (x,) = ctx.saved_tensors
            ctx.sign = torch.where((x == 0) & (g == 0), 1, x.sgn()).detach()
        return g * ctx.sign


def _absolute(function, input, **kwargs):
    followed = input.requires_grad and torch.is_grad_enabled() and not input.is_complex()
    return _Abs.apply(input) if followed and not kwargs else function(input, **kwargs)


def _l1_loss(function, input, target, *args, reduction="mean", **kwargs):
    other = args or any(value is not None for value in kwargs.values())
    if other or reduction != "none" or input.shape != target.shape:
        return function(input, target, *args, reduction=reduction, **kwargs)
    return _absolute(torch.abs, input - target)


def _in_place(form, function):
    return lambda _, input, *args, **kw: input.copy_(form(function, input.clone(), *args, **kw))


def _low_batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn_enabled):
    return _batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _low_instance_norm(x, weight, bias, mean, var, use_input_stats, momentum, eps, cudnn_enabled):
    return _instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps)


_WRONG_OF_FORWARD = {
    torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve, torch.linalg.det,
    torch.linalg.slogdet, torch.det, torch.slogdet, Tensor.det, Tensor.slogdet,
}  # fmt: skip
_DIFFERENTIATE = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
_OTHER_FORMS = {torch._weight_norm: _weight_norm}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    _OTHER_FORMS[F.linear_cross_entropy] = _linear_cross_entropy
_AT_ONE_POINT = {
    **dict.fromkeys((torch.abs, torch.absolute, Tensor.abs, Tensor.absolute), _absolute),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _power),
    **dict.fromkeys((torch.float_power, Tensor.float_power), _power),
    **dict.fromkeys((Tensor.abs_, Tensor.absolute_), _in_place(_absolute, torch.abs)),
    **dict.fromkeys((Tensor.pow_, Tensor.__ipow__), _in_place(_power, torch.pow)),
    F.l1_loss: _l1_loss,
}
_NORMALISE = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _low_batch_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _low_instance_norm,
}
