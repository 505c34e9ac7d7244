"""The weighted risk: a loss whose model, likelihood and weights can be seen."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bilevel_lite.params import dot, leaves, predict, unflatten
from bilevel_lite.problem import check_labels
from bilevel_lite.surroundings import (
    differentiating,
    forward_level,
    same_twice,
    second_order,
    way_out,
)

__all__ = ["NoForwardMode", "WeightedRisk"]

# ------------------------------------------------------------------ held against a gradient

_verdicts: WeakKeyDictionary = (
    WeakKeyDictionary()
)  # model -> what was compared, and how it came out
_calls = itertools.count(1)


def verdicts_of(model: nn.Module) -> dict:
    """What is known of a model from comparisons with ordinary gradients."""
    return _verdicts.setdefault(model, {})


def spots(n: int) -> list[int]:
    """A few rows of n, evenly spread, other ones at each call: no random number is drawn."""
    few, first = min(n, 2 + n // 128), int(next(_calls) * 0.6180339887498949 % 1 * n)
    return sorted((first + k * n // few) % n for k in range(few))


def some_examples(batch: Any, rows: list[int], n: int) -> tuple:
    """These examples as a batch of their own: the rows of whatever has n rows."""
    has = (isinstance(part, Tensor) and part.dim() > 0 and len(part) == n for part in batch)
    return tuple(part[rows] if h else part for part, h in zip(batch, has, strict=True))


def tolerance(like: Tensor) -> float:
    """How far two ways to one number may be apart in this precision, relative to its size."""
    low = torch.is_autocast_enabled(like.device.type) or (
        like.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    )
    return 3e-2 if low else 10 * torch.finfo(like.dtype).eps ** 0.5


def mixes_examples(model: nn.Module) -> bool:
    """True if a layer normalises by statistics of the batch."""
    norm = nn.modules.batchnorm._BatchNorm
    return any(
        isinstance(m, norm) and (m.training or m.running_mean is None) for m in model.modules()
    )


# Modules whose code is known: each treats every example by itself, by means of its own parameters.
ROWWISE: dict[type, Callable] = {
    cls: cls.forward
    for cls in (
        nn.Sequential, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.Flatten,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm,
        nn.Identity, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU,
        nn.ELU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout,
    )
}  # fmt: skip


def rowwise(cls: type) -> type:
    """Declare that a module's own code treats each example by itself; for our own models."""
    ROWWISE[cls] = cls.forward
    return cls


def known_code(model: nn.Module) -> bool:
    """True if every module of the model is one of `ROWWISE`, just as its class has it.

    No other code and no hook is in it: what was compared once stays right.
    """
    common = nn.modules.module
    if common._global_forward_hooks or common._global_backward_hooks:
        return False
    return all(
        ROWWISE.get(type(m)) is type(m).forward
        and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks)
        and not (m._backward_pre_hooks or "forward" in vars(m))
        and not (type(m) is nn.Flatten and m.start_dim != 1)
        and not (type(m) is nn.Embedding and (m.max_norm or m.sparse or m.scale_grad_by_freq))
        for m in model.modules()
    )


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """One more forward pass that leaves the model's buffers (running statistics) as they were."""
    before = [(b, b.clone()) for b in model.buffers()] if mixes_examples(model) else []
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


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
    given = inspect.signature(_EMBEDDINGS[function]).bind(*args, **kwargs).arguments
    if given.get("scale_grad_by_freq"):
        raise NoForwardMode("embedding: scale_grad_by_freq changes the gradient only")
    value, along = fwad.unpack_dual(out)
    padding = given.get("padding_idx")
    if along is None or padding is None or (function is torch.embedding and padding < 0):
        return out
    read = given["index"] == padding % len(given["weight"])
    return fwad.make_dual(value, along.masked_fill(read[..., None], 0))


def _embedding(
    index, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False,
    sparse=False,
):  # fmt: skip
    """The arguments of torch.nn.functional.embedding, the first under a name of ours."""


def _low_embedding(weight, index, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    """The arguments of torch.embedding."""


_EMBEDDINGS = {F.embedding: _embedding, torch.embedding: _low_embedding}


class WeightedRisk:
    r"""A weighted empirical risk with an l2 term; call it like any loss.

        g(lam, theta) = (1/n) sum_i sigma_i(lam) l(model(x_i; theta), y_i) + l2 ||theta||^2

    The structure is kept (model, per-example losses, weights) because KFAC needs to see it; every
    other solver treats it as a plain function.

    Args:
        model: Module with outputs of shape (n, C). Its own parameter values are not used.
        loss: ``"cross_entropy"`` (y: integer labels, shape (n,)), or ``"mse"``
            (l = 1/2 ||output - y||^2, y of shape (n, C), the Gaussian likelihood).
        weight: ``weight(lam, batch)`` returns sigma, shape (n,); by default every weight is 1.
            Data hypercleaning uses ``lambda lam, batch: lam[batch[2]]``.
        l2: Coefficient of ||theta||^2 (its curvature is 2 * l2 on the diagonal).

    Raises:
        ValueError: for an unknown loss or a negative ``l2``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str = "cross_entropy",
        weight: Callable[[Tensor, Any], Tensor] | None = None,
        l2: float = 0.0,
    ):
        if loss not in ("cross_entropy", "mse"):
            raise ValueError(f"loss: got {loss!r}, expected 'cross_entropy' or 'mse'")
        if not l2 >= 0:
            raise ValueError(f"l2: got {l2}, expected a number that is zero or positive")
        self.model, self.loss, self.weight, self.l2 = model, loss, weight, l2

    def outputs(self, theta: Tensor, batch: Any) -> Tensor:
        """Evaluate the model on ``batch[0]``; shape (n, C)."""
        x, y = batch[0], batch[1]
        if x.shape[0] != y.shape[0]:
            raise ValueError(
                f"batch: x has {x.shape[0]} rows and y has {y.shape[0]}; expected the same number"
            )
        try:
            return predict(self.model, theta, x)
        except torch.cuda.OutOfMemoryError:
            raise  # its message speaks of sizes, too
        except RuntimeError as error:
            if "shapes cannot be multiplied" in str(error) or "size" in str(error):
                raise ValueError(
                    f"batch: {type(self.model).__name__} cannot take x of shape "
                    f"{tuple(x.shape)} ({error})"
                ) from error
            raise

    def losses(self, theta: Tensor, batch: Any) -> Tensor:
        """Return the unweighted loss of each example, shape (n,).

        Raises:
            ValueError: if x and y differ in length, x does not fit the model, or (checked on a
                CPU; `bilevel_lite.data.Batches` checks once for any device) a label is out of
                range.
        """
        outputs, y = self.outputs(theta, batch), batch[1]
        self._check_targets(outputs, y)
        if self.loss == "mse":
            return 0.5 * (outputs - y).square().flatten(1).sum(1)
        return F.cross_entropy(outputs, y, reduction="none")

    def slopes(self, theta: Tensor, batch: Any, v: Tensor) -> Tensor:
        r"""Return < grad_theta l_i, v > for each example, shape (n,), detached.

            < grad_theta l_i, v > = s_i . (J_i v),   s_i = p_i - e_{y_i}  (mse: outputs_i - y_i)

        J_i v, the directional derivative of the outputs, is one pass of forward-mode
        differentiation: give theta the tangent v and read the outputs' tangent. It is held against
        an ordinary gradient at every call (`confirms`); where it differs, or an operation has no
        forward mode, the losses are differentiated twice in reverse.

        Args:
            theta: Inner variable, shape (d,).
            batch: (x, y, ...).
            v: Direction, shape (d,).

        Raises:
            ValueError: as `losses`, if the outputs do not depend on theta, or if the model has an
                operation that cannot be differentiated twice.

        Cost: two forward passes' worth of arithmetic and 1/n gradients; 2 gradients the other way.
        """
        return self.slopes_and_route(theta, batch, v)[0]

    @differentiating
    def slopes_and_route(self, theta: Tensor, batch: Any, v: Tensor) -> tuple[Tensor, str]:
        """Return `slopes`, and a line that says how they were computed."""
        theta, v = theta.detach(), v.detach()
        try:
            outputs, along = self.along(theta, batch, v)
            slopes = (self.output_gradient(outputs, batch[1]) * along).flatten(1).sum(1)
        except NoForwardMode as error:
            why = f"no forward mode: {error}"
        else:
            if self.confirms(theta, batch, v, slopes):
                return slopes, "forward mode"
            why = "forward mode is not the gradient that training follows"
        return self._slopes_twice(theta, batch, v), f"double backward ({why})"

    def along(self, theta: Tensor, batch: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs and J v, their directional derivative, by one forward-mode pass.

        Gradients stay on, for models that differentiate inside.

        Raises:
            NoForwardMode: naming the operation that has no such derivative.
            ValueError: if the outputs do not depend on theta, or the model draws random numbers.
        """
        try:
            with second_order(), forward_level(), _AsTrained(), same_twice("inner_loss", theta):
                dual = self.outputs(fwad.make_dual(theta, v.to(theta)), batch)
                outputs, along = fwad.unpack_dual(dual)
                if along is None:
                    raise ValueError("inner_loss: does not depend on theta")
                return outputs.detach().clone(), along.detach().clone()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # NotImplementedError is one
            raise NoForwardMode(" ".join(str(error).split())[:200]) from error

    def _slopes_twice(self, theta: Tensor, batch: Any, v: Tensor) -> Tensor:
        """The same as d/dc_i of < grad_theta sum_i c_i l_i, v >, by double backward."""
        with second_order(), way_out(), same_twice("inner_loss", theta):
            theta = theta.detach().requires_grad_()
            losses = self.losses(theta, batch)
            c = torch.ones_like(losses).requires_grad_()
            (g,) = torch.autograd.grad(dot(c, losses), theta, create_graph=True)
            return torch.autograd.grad(dot(g, v.to(g)), c)[0]

    def confirms(self, theta: Tensor, batch: Any, v: Tensor, slopes: Tensor) -> bool:
        """True if slopes are those of the gradient that training follows, an ordinary one.

        Once for each model the whole batch is compared, which is enough where all of its code is
        known. Else a few examples, other ones at each call, go through the model alone and back;
        where their gradient along v is not what their slopes say (a model may mix examples, or not
        take few) the whole batch decides again. With random numbers c:

            sum_i c_i slope_i = < grad_theta sum_i c_i l_i, v >

        Nothing is differentiated twice. Cost: a few examples; 1 gradient where all decide.
        """
        n = len(slopes)
        key = ("forward mode", mixes_examples(self.model))
        seen = verdicts_of(self.model)
        if key in seen and known_code(self.model):
            return True
        if key in seen and not key[1]:  # else a few examples are another function
            rows = spots(n)
            try:
                if self._has_slopes(theta, some_examples(batch, rows, n), v, slopes[rows]):
                    return True
            except (RuntimeError, ValueError, IndexError):
                pass
        agrees = self._has_slopes(theta, batch, v, slopes)
        if agrees:
            seen[key] = True
        return agrees

    def _has_slopes(self, theta: Tensor, batch: Any, v: Tensor, slopes: Tensor) -> bool:
        n = len(slopes)
        c = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        c = c.to(slopes)
        size, made = torch.stack([slopes.norm(), dot(c, slopes)]).tolist()
        if not math.isfinite(size):
            return True  # nothing to compare; who asked refuses it
        return abs(self._slope(theta, batch, v, c) - made) <= tolerance(slopes) * size

    def _slope(self, theta: Tensor, batch: Any, v: Tensor, c: Tensor) -> float:
        """< grad_theta sum_i c_i l_i, v > by an ordinary gradient; statistics stay as they are."""
        here, along = leaves(self.model, theta), unflatten(self.model, v)
        with still(self.model):
            total = dot(c, self.losses(here, batch))
        grads = torch.autograd.grad(total, list(here.values()), allow_unused=True)
        parts = [dot(g, d) for g, d in zip(grads, along.values(), strict=True) if g is not None]
        return float(sum(parts))

    def output_gradient(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return s_i, the gradient of each unweighted loss in its outputs, like ``outputs``.

        Raises:
            ValueError: if the targets do not fit the outputs, as `losses`.
        """
        self._check_targets(outputs, y)
        if self.loss == "mse":
            return outputs - y
        s = outputs.softmax(1)
        return s.scatter_add_(1, y[:, None], s.new_full((len(y), 1), -1.0))

    def _check_targets(self, outputs: Tensor, y: Tensor) -> None:
        if outputs.dim() < 2:
            raise ValueError(f"model: gives shape {tuple(outputs.shape)}, expected (n, C)")
        if self.loss == "mse":
            if outputs.shape != y.shape:
                raise ValueError(
                    f"batch: y has shape {tuple(y.shape)}, expected {tuple(outputs.shape)}, "
                    "the shape of the model's output"
                )
        elif y.dim() != 1 or y.dtype != torch.int64:
            raise ValueError(
                f"batch: y has shape {tuple(y.shape)} and dtype {y.dtype}, "
                "expected integer labels of shape (n,), dtype torch.int64"
            )
        elif y.device.type == "cpu" and y.numel():
            check_labels(y, outputs.shape[1])

    def weights(self, lam: Tensor, batch: Any) -> Tensor | None:
        """Return sigma(lam) for the examples of the batch, shape (n,), or None for all ones.

        Raises:
            ValueError: if the weights do not come out as one number per example.
        """
        if self.weight is None:
            return None
        try:
            sigma = self.weight(lam, batch)
        except IndexError as error:
            raise ValueError(
                f"lam: has {lam.numel()} entries, too few for this batch ({error})"
            ) from error
        if sigma.shape != batch[1].shape[:1]:
            raise ValueError(
                f"weight: returned shape {tuple(sigma.shape)}, expected "
                f"({batch[1].shape[0]},), one weight per example"
            )
        return sigma

    def __call__(self, lam: Tensor, theta: Tensor, batch: Any) -> Tensor:
        """Evaluate g(lam, theta) on the batch; a scalar."""
        losses, sigma = self.losses(theta, batch), self.weights(lam, batch)
        risk = losses.mean() if sigma is None else (sigma * losses).mean()
        return risk + self.l2 * theta.square().sum() if self.l2 else risk
