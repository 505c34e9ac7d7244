"""One pass of forward-mode differentiation, with the derivatives that training follows."""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel_lite.same_function import same_twice
from bilevel_lite.surroundings import forward_level, second_order

__all__ = ["NoForwardMode", "push_forward"]


class NoForwardMode(Exception):
    """An operation of the model has no forward-mode derivative, or none that training follows."""


class _AsTrained(TorchFunctionMode):
    """Forward mode with the derivatives that training follows, without products with zeros.

    A linear map of an input without tangent is pushed forward as W' x + c': torch adds W 0, a
    product with a tangent of zeros as large as the batch, which for the first layer on a whole
    training set costs three times the rest. The row ``padding_idx`` of an embedding has no tangent,
    as it has no gradient.
    """

    maps = (F.linear, F.conv2d)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.maps and len(args) > 2 and not kwargs:
            x, weight, bias = args[:3]
            along = [None if t is None else fwad.unpack_dual(t).tangent for t in args[:3]]
            if along[0] is None and along[1] is not None and not x.requires_grad:
                plain = [None if t is None else fwad.unpack_dual(t).primal for t in (weight, bias)]
                out = function(x, *plain, *args[3:])
                return fwad.make_dual(out, function(x, *along[1:], *args[3:]))
        out = function(*args, **kwargs)
        if function in (F.embedding, torch.embedding):
            return _without_padding(function, out, *args, **kwargs)
        return out


def _without_padding(function, out, *args, **kwargs):
    """The output of an embedding, its tangent zero where the padding row was read."""
    given = {**dict(zip(_BY_PLACE[function], args, strict=False)), **kwargs}
    if given.get("scale_grad_by_freq"):
        raise NoForwardMode("embedding: scale_grad_by_freq changes the gradient only")
    value, along = fwad.unpack_dual(out)
    padding = given.get("padding_idx")
    if along is None or padding is None or (function is torch.embedding and padding < 0):
        return out
    read = given["indices"] == padding % len(given["weight"])
    return fwad.make_dual(value, along.masked_fill(read[..., None], 0))


# the first arguments, by place
_BY_PLACE = {
    F.embedding: ("indices", "weight", "padding_idx"),
    torch.embedding: ("weight", "indices", "padding_idx", "scale_grad_by_freq"),
}


def push_forward(
    outputs: Callable[[Tensor], Tensor], theta: Tensor, v: Tensor, of: Any = None
) -> tuple[Tensor, Tensor]:
    """Return outputs(theta) and its directional derivative along v, detached.

    Gradients stay on, for models that differentiate inside.

    Args:
        outputs: A function of theta.
        theta: Shape (d,).
        v: Direction, shape (d,).
        of: The model, where its code is not known; see `same_twice`.

    Raises:
        NoForwardMode: naming the operation that has no such derivative.
        ValueError: if the outputs do not depend on theta, or the model draws random numbers or
            keeps something from pass to pass.

    Cost: two forward passes' worth of arithmetic.
    """
    try:
        once = same_twice("inner_loss", theta, lambda: outputs(theta.detach()), of)
        with second_order(), once as watch, forward_level(), _AsTrained():
            dual = outputs(fwad.make_dual(theta.detach(), v.detach().to(theta)))
            value, along = fwad.unpack_dual(dual)
            if along is None:
                raise ValueError("inner_loss: does not depend on theta")
            watch.value = value = value.detach().clone()
            along = along.detach().clone()
        return value, along
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        raise NoForwardMode(" ".join(str(error).split())[:200]) from error
