"""The weighted risk: a loss whose model, likelihood and weights can be seen."""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bilevel_lite.params import predict
from bilevel_lite.problem import check_labels
from bilevel_lite.surroundings import uncompiled

__all__ = ["WeightedRisk"]


class _LinearInParameters(TorchFunctionMode):
    """Within it a linear map of an input without tangent is pushed forward as W' x + c'.

    Torch's forward mode adds W 0: a product with a tangent of zeros as large as the batch, which
    for the first layer on a whole training set costs three times the rest.
    """

    maps = (F.linear, F.conv2d)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.maps and len(args) > 2 and not kwargs:
            x, weight, bias = args[:3]
            along = [None if t is None else fwad.unpack_dual(t).tangent for t in args[:3]]
            if along[0] is None and along[1] is not None:
                plain = [None if t is None else fwad.unpack_dual(t).primal for t in (weight, bias)]
                out = function(x, *plain, *args[3:])
                return fwad.make_dual(out, function(x, *along[1:], *args[3:]))
        return function(*args, **(kwargs or {}))


class WeightedRisk:
    r"""A weighted empirical risk with an l2 term; call it like any loss.

        g(lam, theta) = (1/n) sum_i sigma_i(lam) l(model(x_i; theta), y_i) + l2 ||theta||^2

    The structure is kept (model, per-example losses, weights) because KFAC needs to see it; every
    other solver treats it as a plain function.

    Args:
        model: Module with outputs of shape (n, C). Its own parameter values are not used. Of a
            ``torch.compile``d one the module inside is kept: compiled code has no second
            derivatives.
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
        self.model, self.loss, self.weight, self.l2 = uncompiled(model), loss, weight, l2

    def require_batch(self, batch: Any, name: str = "batch") -> None:
        """Refuse what is not (x, y, ...) with as many rows in x as in y, at least one.

        Raises:
            TypeError: for another kind of batch, naming the argument.
            ValueError: for another number of rows.
        """
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            got = "None" if batch is None else type(batch).__name__
            got += f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise TypeError(
                f"{name}: got {got}, expected a tuple (x, y, ...) of tensors, which a WeightedRisk "
                "needs (a plain function (lam, theta, batch) -> scalar may take other batches)"
            )
        for part, value in zip("xy", batch, strict=False):
            if not isinstance(value, Tensor) or not value.dim():
                got = "a number" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name}: {part} is {got}, expected a tensor with n rows")
        x, y = batch[0], batch[1]
        if x.shape[0] != y.shape[0]:
            raise ValueError(
                f"{name}: x has {x.shape[0]} rows and y has {y.shape[0]}; expected the same number"
            )
        if not x.shape[0]:
            raise ValueError(f"{name}: holds no example, so its mean is undefined")

    def outputs(self, theta: Tensor, batch: Any) -> Tensor:
        """Evaluate the model on ``batch[0]``; shape (n, C)."""
        self.require_batch(batch)
        x = batch[0]
        try:
            outputs = predict(self.model, theta, x)
        except torch.cuda.OutOfMemoryError:
            raise  # its message speaks of sizes, too
        except RuntimeError as error:
            if "shapes cannot be multiplied" in str(error) or "size" in str(error):
                raise ValueError(
                    f"batch: {type(self.model).__name__} cannot take x of shape "
                    f"{tuple(x.shape)} ({error})"
                ) from error
            raise
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"model: {type(self.model).__name__} gives {type(outputs).__name__}, expected a "
                "tensor of shape (n, C); wrap it in a module that returns its logits"
            )
        return outputs

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
        differentiation: give theta the tangent v and read the outputs' tangent.

        Args:
            theta: Inner variable, shape (d,).
            batch: (x, y, ...).
            v: Direction, shape (d,).

        Raises:
            ValueError: as `losses`, or if the outputs do not depend on theta.

        Cost: two forward passes' worth of arithmetic.
        """
        with torch.no_grad(), fwad.dual_level(), _LinearInParameters():
            dual = self.outputs(fwad.make_dual(theta.detach(), v.detach()), batch)
            outputs, along = fwad.unpack_dual(dual)
            if along is None:
                raise ValueError("inner_loss: does not depend on theta")
            outputs, along = outputs.clone(), along.clone()
        return (self.output_gradient(outputs, batch[1]) * along).flatten(1).sum(1)

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
        if outputs.shape[0] != y.shape[0]:
            raise ValueError(
                f"model: gives {outputs.shape[0]} rows for {y.shape[0]} examples, expected one each"
            )
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
        elif outputs.dim() != 2:
            raise ValueError(
                f"model: gives shape {tuple(outputs.shape)} for labels of shape {tuple(y.shape)}, "
                "expected (n, C); a plain function can take the mean over further dimensions"
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
        if not isinstance(sigma, Tensor):
            raise ValueError(
                f"weight: returned {type(sigma).__name__}, expected a tensor, one weight an example"
            )
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
