r"""The weighted risk: a loss whose model, likelihood and weights can be seen.

    g(lam, theta) = (1/n) sum_i sigma_i l(model(x_i; theta), y_i) + l2 ||theta||^2

lam may stand in the weights, sigma(lam); in the weights through the examples' losses,
sigma = V(lam, l); in the inputs, x(lam); or in all of them. Risks that share theta add up.

Whoever reads the structure (GGN, Fisher, KFAC, J v) walks over `WeightedRisk.terms`: one term for a
`WeightedRisk`, several for a `SumOfRisks`, each with the batch as its model sees it.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_lite.exact import aside
from bilevel_lite.params import predict, trainable
from bilevel_lite.refuse import (
    NotFinite,
    check_labels,
    looked_at,
    require_number,
    require_unwritten,
    versions,
)
from bilevel_lite.same_function import due, same_twice, was_the_same
from bilevel_lite.trust import known_code

__all__ = [
    "SumOfRisks",
    "Term",
    "WeightedRisk",
    "is_structured",
    "only_reads",
    "overridden",
    "refusal",
    "same_terms",
]

LOSSES = ("cross_entropy", "mse")
IGNORED = -100  # the label of a position without a loss term, where labels have positions


# in the words of torch's layers and operations, where an x does not fit
_OF_SHAPES = (
    "size of tensor", "sizes of tensors", "size mismatch", "shapes cannot be multiplied",
    "expected size", "expected input", "invalid for input of size", "given groups",
    "given normalized_shape", "input.size", "output size is too small", "kernel size can't be",
    "inconsistent tensor size", "must match the size",
)  # fmt: skip


class Seen(tuple):
    """A batch after `WeightedRisk.inputs`, as the model sees it."""


@cache
def _seen(kind: type) -> type:
    """`Seen` with the fields of a named tuple."""
    return type(kind.__name__, (Seen, kind), {}) if hasattr(kind, "_fields") else Seen


@dataclass
class Term:
    """One mean of a risk at one (lam, batch): what whoever reads the structure walks over.

        g = sum over terms of coefficient * risk.mean(lam, part(theta), batch) + l2 ||theta||^2

    Attributes:
        risk: Its model, likelihood and weights; its l2 is not to be read (the whole risk's is).
        batch: The batch as ``risk.model`` sees it.
        coefficient: Zero or positive.
        part: Where the parameters of ``risk.model`` stand in theta; None if they are all of it.
    """

    risk: "WeightedRisk"
    batch: Any
    coefficient: float = 1.0
    part: "PartOfTheta | None" = None

    def read(self, theta: Tensor) -> Tensor:
        """What theta, or a direction, holds for ``risk.model``; differentiable."""
        return theta if self.part is None else self.part(theta)


@dataclass
class PartOfTheta:
    """Some of a module's parameters, as positions in its list and in its flat vector."""

    picks: list[int]
    sizes: list[int]

    def __call__(self, theta: Tensor) -> Tensor:
        """Return the chosen parameters as one vector."""
        if theta.shape != (sum(self.sizes),):
            raise ValueError(
                f"theta: got shape {tuple(theta.shape)}, expected ({sum(self.sizes)},), the "
                "trainable parameters of the sum's model (bilevel_lite.flatten(risk.model))"
            )
        chunks = theta.split(self.sizes)
        return torch.cat([chunks[i] for i in self.picks])

    @property
    def places(self) -> list[slice]:
        """Where each chosen parameter stands in theta."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [slice(ends[i] - self.sizes[i], ends[i]) for i in self.picks]


def reads_losses(weight: Callable) -> bool:
    """True for weight(lam, batch, losses), False for weight(lam, batch); told by the signature.

    Raises:
        ValueError: if the signature has neither two nor three positional parameters.
    """
    way_out = (
        "give it exactly (lam, batch) or (lam, batch, losses), and constants behind a *: "
        "lambda lam, batch, *, c=c: ..."
    )
    try:
        seen = weight.forward if isinstance(weight, nn.Module) else weight
        parameters = inspect.signature(seen).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"weight: its parameters cannot be told ({error}); {way_out}") from error
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    clear = all(p.default is p.empty for p in positional) and len(positional) in (2, 3)
    if not clear or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        listed = ", ".join(map(str, parameters))
        raise ValueError(
            f"weight: takes ({listed}), so whether it reads the examples' losses cannot be told; "
            f"{way_out}"
        )
    return len(positional) == 3


class WeightedRisk:
    r"""A weighted empirical risk with an l2 term; call it like any loss.

        g(lam, theta) = (1/n) sum_i sigma_i l_i + l2 ||theta||^2,   l_i = l(model(x_i; theta), y_i)

    The structure is kept (model, per-example losses, weights) because GGN, Fisher and KFAC need to
    see it; every other solver treats it as a plain function.

    **lam in the weights.** ``weight(lam, batch)`` returns sigma. Data hypercleaning uses
    ``lambda lam, batch: lam[batch[2]]``.

    **lam in the weights through the losses.** ``weight(lam, batch, losses)``, three positional
    parameters, returns sigma = V(lam, l). The losses come detached, so that an inner step follows

        F(theta) = (1/n) sum_i V(lam, l_i) grad l_i + 2 l2 theta

    and the Hessian by automatic differentiation is that of weights that stand still. But F is the
    gradient of a potential, (1/n) sum_i W(l_i) + l2 ||theta||^2 with W(l) the integral of V from 0
    to l, whose Hessian has one part more. ``weight_slope=True`` adds it:

        H = (1/n) sum_i [ V hess l_i + V'(l_i) grad l_i grad l_i^T ] + 2 l2 I
        J = (1/n) sum_i d_lam V(lam, l_i) grad l_i^T                          (with or without)

    (where lam stands in the inputs, too, J has more parts, V' among them: then the slope is asked
    for)

    and the curvature C in the outputs is V h_i + V' s_i s_i^T. V' needs weights of which each reads
    its own loss only. Weights normalised over the batch, n V_i / sum V, have no potential, and a
    curvature that is not symmetric: they are refused with ``weight_slope=True``, and fine without.

    The value of g is (1/n) sum_i V(lam, l_i) l_i + l2 ||theta||^2 either way, not the potential. So
    grad_theta g, H and J are the potential's, but grad_lam g is not: what reads it (the penalty
    methods BOME and F2SA, and SAMA's difference) needs the potential written out as a loss. For the
    same reason it is no outer loss: hypergradients and methods refuse it there.

    **lam in the inputs.** ``inputs(lam, batch)`` returns the batch that the model sees: another
    tuple (x, y, ...), whose x may depend on lam and which may have more rows (data poisoning).
    Loss, weights, mask and curvature all read that one.

    **Several loss terms an example.** With outputs of shape (n, P, C) and labels (n, P), l_i is the
    mean over example i's positions whose label is not ``ignore_index``; 0 if there are none.

    Args:
        model: Module with outputs of shape (n, C) or (n, P, C), classes last. Its own parameter
            values are not used.
        loss: ``"cross_entropy"`` (y: integer labels, the outputs' shape without C), or ``"mse"``
            (l = 1/2 ||output - y||^2, summed over all of an example's outputs; y like the outputs).
        weight: ``weight(lam, batch)`` or ``weight(lam, batch, losses)``, returns sigma, shape (n,);
            by default every weight is 1.
        l2: Coefficient of ||theta||^2 (its curvature is 2 * l2 on the diagonal).
        inputs: ``inputs(lam, batch)`` -> (x, y, ...); by default the batch as it is.
        weight_slope: Add V' to the curvature; for weights that read the losses.
        ignore_index: The label of what has no loss term; by default -100 where labels have
            positions, and none where they are of shape (n,).
        mask: ``mask(batch)`` -> bool, shape (n, P), True at positions that are not padding. It
            changes no loss; it leaves padding out of KFAC's factor A in the layers that are applied
            at (n, P) or (n, P, ...); others, such as a head on pooled texts, have no padding or
            positions of their own. (Factor B needs no mask where padding has no loss term: the
            gradients there are zero.)

    Raises:
        ValueError: for an unknown loss, a negative ``l2``, a weight whose parameters cannot be
            told, ``weight_slope`` without a weight that reads the losses, or such a weight and
            ``inputs`` without ``weight_slope``.
        TypeError: for a hook that cannot be called, or a subclass that defines an argument's name.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> risk = bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=0.1)
        >>> batch = torch.eye(2), torch.tensor([0, 1]), torch.arange(2)
        >>> risk(torch.tensor([1.0, 0.0]), torch.zeros(6), batch)  # (1/2) log 2
        tensor(0.3466)
    """

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        taken = inspect.signature(WeightedRisk.__init__).parameters.keys() - {"self"}
        for name in sorted(taken & vars(cls).keys()):
            raise TypeError(
                f"{cls.__name__}: defines {name!r}, which is an argument of WeightedRisk and would "
                f"be replaced by it; pass {name}= to WeightedRisk.__init__"
            )

    def __init__(
        self,
        model: nn.Module,
        loss: str = "cross_entropy",
        weight: Callable[..., Tensor] | None = None,
        l2: float = 0.0,
        *,
        inputs: Callable[[Tensor, Any], Any] | None = None,
        weight_slope: bool = False,
        ignore_index: int | None = None,
        mask: Callable[[Any], Tensor] | None = None,
    ):
        if loss not in LOSSES:
            raise ValueError(f"loss: got {loss!r}, expected 'cross_entropy' or 'mse'")
        _require_fixed("l2", l2)
        if ignore_index is not None and loss == "mse":
            raise ValueError(
                f"ignore_index: got {ignore_index} with loss='mse', which has no labels"
            )
        for name, hook in (("weight", weight), ("inputs", inputs), ("mask", mask)):
            if hook is not None and not callable(hook):
                raise TypeError(f"{name}: got {type(hook).__name__}, expected a function")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
        self.model, self.loss, self.l2 = model, loss, l2
        self.weight, self.weight_slope = weight, weight_slope
        self.inputs, self.ignore_index, self.mask = inputs, ignore_index, mask
        self._require_slope()
        if weight_slope and not self.reads_losses:
            raise ValueError(
                "weight_slope: is True, but the weight does not read the losses; give "
                "weight(lam, batch, losses)"
            )

    def _require_slope(self) -> None:
        """Refuse inputs and weights that both depend on lam through the losses, without V'.

        Moving the inputs moves the losses, and with them the weights: J then has a part with V'.
        """
        if self.inputs is not None and self.reads_losses and not self.weight_slope:
            raise ValueError(
                "weight_slope: is False, but with inputs(lam, batch) and a weight that reads the "
                "losses J needs the weight's slope; give weight_slope=True (weights normalised "
                "over the batch have none: let them not read the losses, or leave inputs out)"
            )

    # -- the batch

    @property
    def weight(self) -> Callable[..., Tensor] | None:
        """The weight function; setting another one tells anew whether it reads the losses."""
        return self._weight

    @weight.setter
    def weight(self, weight: Callable[..., Tensor] | None) -> None:
        self.reads_losses = weight is not None and reads_losses(weight)
        self._weight, self._known_separate = weight, False

    def seen(self, lam: Tensor, batch: Any) -> Any:
        """Return the batch as the model sees it: inputs(lam, batch), or the batch as it is.

        Every other method below takes what this returns.

        Raises:
            ValueError: if ``inputs`` returns no (x, y, ...), or the batch has been here before.
        """
        if self.inputs is None:
            return batch
        if isinstance(batch, Seen):
            raise ValueError(
                "batch: has been through inputs(lam, batch) already; give the original batch"
            )
        new = _hook(self.inputs, lam, batch)
        _require_pair(new, "inputs: returned")
        kind = _seen(type(new))
        return kind(new) if kind is Seen else kind._make(new)

    def terms(self, lam: Tensor, batch: Any) -> list[Term]:
        """Return the means that the risk is a sum of: one."""
        self._require_slope()  # weight and inputs may have been set since
        return [Term(self, self.seen(lam, batch))]

    def unpadded(self, batch: Any) -> Tensor | None:
        """Return mask(batch), bool, shape (n, P), True where there is no padding; None without.

        Raises:
            ValueError: if it is not of that kind, or leaves nothing.
        """
        if self.mask is None:
            return None
        self._require_seen(batch)
        mask, n = self.mask(batch), len(batch[1])
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask: returned {got}, expected a bool tensor, True where it is real")
        if mask.dim() < 2 or len(mask) != n:
            raise ValueError(
                f"mask: returned shape {tuple(mask.shape)}, expected (n, P) with n = {n}"
            )
        if looked_at(mask):
            self._check_mask(mask, batch[1])
        return mask

    def _check_mask(self, mask: Tensor, y: Tensor) -> None:
        if not mask.any():
            raise ValueError("mask: is False everywhere, so that nothing is left; True means real")
        if self.loss == "mse":
            counts = mask.new_ones(y.shape[:-1])
        else:
            ignored = self._ignored(y)
            counts = torch.ones_like(y, dtype=torch.bool) if ignored is None else y != ignored
        if counts.shape == mask.shape and bool((counts & ~mask).any()):
            raise ValueError(
                f"mask: is False at {int((counts & ~mask).sum())} positions that have a loss term; "
                "padding has none: give it the label ignore_index (loss='mse' has no such label: "
                "leave padding out of the outputs)"
            )

    def _require_seen(self, batch: Any) -> None:
        if self.inputs is not None and not isinstance(batch, Seen):
            raise ValueError(
                "batch: this risk has inputs(lam, batch), so the model sees another batch; give "
                "risk.seen(lam, batch)"
            )

    def require_batch(self, batch: Any, name: str = "batch") -> None:
        """Refuse, before anything runs, a batch that this risk cannot take; see `outputs`.

        With ``inputs`` that function says what it takes; a subclass may take what it likes.
        """
        if self.inputs is None and overridden(self) is None:
            _require_pair(batch, f"{name}: got")
            _require_rows(batch, name)

    # -- the losses

    def outputs(self, theta: Tensor, batch: Any) -> Tensor:
        """Evaluate the model on ``batch[0]``; shape (n, C) or (n, P, C)."""
        self._require_seen(batch)
        _require_pair(batch, "batch: got")
        _require_rows(batch, "batch")
        x = batch[0]
        before = versions((None, None, batch))
        try:
            outputs = predict(self.model, theta, x)
        except torch.cuda.OutOfMemoryError:
            raise  # its message speaks of sizes, too
        except RuntimeError as error:
            if fwad._current_level >= 0:
                raise  # of forward mode, perhaps; without it the pass is made again
            if "same dtype" in str(error):
                self._require_one_precision()
                raise ValueError(
                    f"batch: {type(self.model).__name__} cannot take x of {x.dtype} ({error}); "
                    "convert one of them, for example x.to(theta)"
                ) from error
            if any(words in str(error).lower() for words in _OF_SHAPES):
                raise ValueError(
                    f"batch: {type(self.model).__name__} cannot take x of shape "
                    f"{tuple(x.shape)} ({error})"
                ) from error
            raise
        require_unwritten("model", before, versions((None, None, batch)))
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"model: {type(self.model).__name__} gives {type(outputs).__name__}, expected a "
                "tensor of shape (n, C); wrap it in a module that returns its logits"
            )
        return outputs

    def _require_one_precision(self) -> None:
        """Name two parameters of two precisions: theta's parts all have that of the vector."""
        kinds = {p.dtype: name for name, p in trainable(self.model).items()}
        if len(kinds) > 1:
            (one, first), (other, second) = list(kinds.items())[:2]
            raise ValueError(
                f"model: parameters {first!r} ({one}) and {second!r} ({other}) are of two "
                "precisions, which theta, one vector, is not; convert the model (model.double()) "
                "and leave out conversions of its own"
            )

    def losses(self, theta: Tensor, batch: Any) -> Tensor:
        """Return the unweighted loss of each example, shape (n,).

        Raises:
            ValueError: if x and y differ in length, x does not fit the model, or (checked on a
                CPU; `bilevel_lite.data.Batches` checks once for any device) a label is out of
                range.
        """
        return self.output_losses(self.outputs(theta, batch), batch[1])

    def output_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the unweighted loss of each example from the model's outputs, shape (n,).

        Raises:
            ValueError: if the targets do not fit the outputs, as `losses`.
        """
        self._check_targets(outputs, y)
        if self.loss == "mse":
            return 0.5 * (outputs - y).square().flatten(1).sum(1)
        share = self.share(outputs, y)
        if share is None:
            return F.cross_entropy(outputs, y, reduction="none")
        rows = F.cross_entropy(
            outputs.flatten(0, -2), y.flatten(), reduction="none", ignore_index=self._ignored(y)
        )
        return (share * rows.view(y.shape)).reshape(len(y), -1).sum(1)

    def share(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        """Share of each position in its example's loss, like ``y``: 1 / (kept positions), or 0.

        None where each example has one term, and for mse, which sums.
        """
        ignored = self._ignored(y)
        if self.loss == "mse" or ignored is None:
            return None
        kept = (y != ignored).to(outputs.dtype)
        number = kept.reshape(len(y), -1).sum(1).clamp(min=1)
        return kept / _like(number, kept)

    def _ignored(self, y: Tensor) -> int | None:
        return IGNORED if self.ignore_index is None and y.dim() > 1 else self.ignore_index

    def output_gradient(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return s_i, the gradient of each unweighted loss in its outputs, like ``outputs``.

        Raises:
            ValueError: if the targets do not fit the outputs, as `losses`.
        """
        self._check_targets(outputs, y)
        if self.loss == "mse":
            return outputs - y
        share, s = self.share(outputs, y), outputs.softmax(-1)
        if share is not None:
            y = y.masked_fill(share == 0, 0)
        s = s.scatter_add_(-1, y[..., None], s.new_full((*y.shape, 1), -1.0))
        return s if share is None else s * share[..., None]

    def _check_targets(self, outputs: Tensor, y: Tensor) -> None:
        if outputs.dim() < 2:
            raise ValueError(
                f"model: gives shape {tuple(outputs.shape)}, expected (n, C) or (n, P, C)"
            )
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
        elif y.shape != outputs.shape[:-1] or y.dtype != torch.int64:
            expected = "(n,)" if outputs.dim() == 2 else str(tuple(outputs.shape[:-1]))
            raise ValueError(
                f"batch: y has shape {tuple(y.shape)} and dtype {y.dtype}, "
                f"expected integer labels of shape {expected}, dtype torch.int64, for outputs of "
                f"shape {tuple(outputs.shape)}, classes last"
            )
        elif looked_at(y) and y.numel():
            self._check_labels(y, outputs.shape[-1])

    def _check_labels(self, y: Tensor, classes: int) -> None:
        ignored = self._ignored(y)
        kept = y if ignored is None else y[y != ignored]
        try:
            if kept.numel():
                check_labels(kept, classes)
        except ValueError as error:
            way_out = (
                "ignore_index= names the label of what has no loss term"
                if ignored is None
                else f"or ignore_index, {ignored}, where there is no loss term"
            )
            raise ValueError(f"{error}; {way_out}") from None

    # -- the weights

    def weights(self, lam: Tensor, batch: Any, losses: Tensor | None = None) -> Tensor | None:
        """Return sigma for the examples of the batch, shape (n,), or None for all ones.

        Args:
            lam: Outer variable.
            batch: As the model sees it, `seen`.
            losses: The unweighted losses, shape (n,), where the weight reads them; detached here.

        Raises:
            ValueError: if the weights do not come out as one real number per example, or the
                losses are needed and not there.
        """
        if self.weight is None:
            return None
        return self._weights(lam, batch, None if losses is None else losses.detach())

    def _weights(self, lam, batch, losses):
        self._require_seen(batch)
        if self.reads_losses and losses is None:
            raise ValueError(
                "weight: reads the examples' losses, which were not given; call "
                "risk.weights(lam, batch, losses)"
            )
        sigma = _hook(self.weight, lam, batch, *([losses] if self.reads_losses else []))
        if not isinstance(sigma, Tensor) or not sigma.is_floating_point():
            got = f"dtype {sigma.dtype}" if isinstance(sigma, Tensor) else type(sigma).__name__
            raise ValueError(f"weight: returned {got}, expected a floating-point tensor")
        if sigma.shape != batch[1].shape[:1]:
            raise ValueError(
                f"weight: returned shape {tuple(sigma.shape)}, expected "
                f"({batch[1].shape[0]},), one weight per example"
            )
        return sigma

    def weight_slopes(self, lam: Tensor, batch: Any, losses: Tensor) -> Tensor | None:
        """Return V'(lam, l_i), shape (n,), detached; None without ``weight_slope``.

        Raises:
            ValueError: if a weight reads the losses of other examples.

        Cost: that of the weights alone.
        """
        if not (self.weight_slope and self.reads_losses):
            return None
        with torch.enable_grad(), aside():
            losses = losses.detach().requires_grad_()
            sigma = self._weights(lam.detach(), batch, losses)
            if not sigma.requires_grad:
                return torch.zeros_like(losses)
            (slope,) = torch.autograd.grad(sigma.sum(), losses, retain_graph=True)
            # diag(V') c for any c, if each weight reads its own loss only
            c = torch.linspace(0.5, 1.5, len(slope), dtype=slope.dtype, device=slope.device)
            (along,) = torch.autograd.grad(sigma, losses, c)
        if self._known_separate and not looked_at(slope):
            return slope
        off, size = (along - c * slope).abs().sum(), along.abs().sum() + slope.abs().sum()
        if bool(off > math.sqrt(torch.finfo(slope.dtype).eps) * size):
            raise ValueError(
                "weight: a weight reads the losses of other examples (weights normalised over the "
                "batch?), so the field of the inner steps has no potential and its curvature is "
                "not symmetric; use weight_slope=False"
            )
        self._known_separate = self._known_separate or len(slope) > 1
        return slope

    # -- the value

    def mean(self, lam: Tensor, theta: Tensor, batch: Any) -> Tensor:
        """Evaluate (1/n) sum_i sigma_i l_i on a batch as the model sees it; a scalar."""
        losses = self.losses(theta, batch)
        sigma = self.weights(lam, batch, losses)
        if sigma is None:
            return losses.mean()
        self._require_numbers(lam, sigma, losses)
        if not self.weight_slope:
            return (sigma * losses).mean()
        if not self._known_separate and len(losses) > 1:
            self.weight_slopes(lam, batch, losses)
        # (V(l) - V(stopped l)) (l - stopped l) / 2 is zero, and so are its first derivatives; the
        # second one in l is V'
        change = self._weights(lam, batch, losses) - sigma
        return (sigma * losses + 0.5 * change * (losses - losses.detach())).mean()

    def _require_numbers(self, lam: Tensor, sigma: Tensor, losses: Tensor) -> None:
        """Name the weight where it alone is NaN or infinite; otherwise the value says it."""
        if not looked_at(sigma) or bool(torch.isfinite(sigma.sum())):
            return
        bad = ~torch.isfinite(sigma)
        if bad.any() and torch.isfinite(lam).all() and torch.isfinite(losses[bad]).all():
            raise NotFinite(
                f"weight: is NaN or infinite for {int(bad.sum())} of {len(sigma)} examples, where "
                "lam and the losses are finite; look for a division by zero or a logarithm"
            )

    def __call__(self, lam: Tensor, theta: Tensor, batch: Any) -> Tensor:
        """Evaluate g(lam, theta) on the batch; a scalar."""
        return _value(self, lam, theta, batch)


class SumOfRisks:
    r"""Risks that share theta, each the mean over a batch of its own.

        g(lam, theta) = sum_k c_k (1/n_k) sum_i sigma_ki(lam) l_ki(theta) + l2 ||theta||^2

    The models may be different modules that share submodules, say two heads on one encoder:

        words = WeightedRisk(Sequential(encoder, decoder), weight=...)
        task = WeightedRisk(Sequential(encoder, head))
        inner = SumOfRisks([task, words], l2=1e-4)
        theta = flatten(inner.model)                 # shared parameters stand in it once
        inner(lam, theta, (task_batch, words_batch))

    H, J, GGN and Fisher are the sums of the terms'. Each term's model finds its parameters in theta
    by their identity; an outer loss on the same theta is a `SumOfRisks` of one term with the same
    ``model=``.

    For a Kronecker block, over the terms whose model has the layer, each with its own n:

        B = sum_k c_k B_k,    A = sum_k c_k A_k / sum_k c_k

    which is the term's own block times c_k where one term has the layer, and the block of the whole
    where one batch was cut into terms with c_k = n_k / n.

    Args:
        risks: `WeightedRisk` each. A term with an l2 of its own must hold all of theta (then the
            l2's add up, c_k l2_k); otherwise give ``l2`` here.
        coefficients: c_k, zero or positive; by default 1.
        l2: Coefficient of ||theta||^2, all of theta.
        model: The module whose flat vector theta is; by default a list of the terms' models.

    Raises:
        TypeError: for a term that is no `WeightedRisk`, or a subclass that overrides its structure.
        ValueError: for no term, coefficients that do not fit, an l2 as said, or a term with a
            parameter that ``model`` does not hold.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> risk = bl.SumOfRisks([bl.WeightedRisk(model), bl.WeightedRisk(model)], [1.0, 3.0])
        >>> batch = torch.eye(2), torch.tensor([0, 1])
        >>> risk(torch.zeros(0), torch.zeros(6), (batch, batch))  # 4 log 2
        tensor(2.7726)
    """

    def __init__(
        self,
        risks: list[WeightedRisk],
        coefficients: list[float] | None = None,
        l2: float = 0.0,
        model: nn.Module | None = None,
    ):
        risks = list(risks)
        if not risks:
            raise ValueError("risks: got none, expected at least one WeightedRisk")
        for k, risk in enumerate(risks):
            if not isinstance(risk, WeightedRisk):
                raise TypeError(
                    f"risks: term {k} is {type(risk).__name__}, expected a WeightedRisk"
                )
            if not is_structured(risk):
                raise TypeError(f"risks: term {k}: {refusal(risk)}")
        coefficients = [1.0] * len(risks) if coefficients is None else list(coefficients)
        if len(coefficients) != len(risks):
            raise ValueError(
                f"coefficients: got {len(coefficients)} for {len(risks)} risks, expected one each"
            )
        for c in coefficients:
            _require_fixed("coefficients", c)
        _require_fixed("l2", l2)
        self.risks, self.coefficients, self.own_l2 = risks, coefficients, l2
        self.model = nn.ModuleList([risk.model for risk in risks]) if model is None else model
        self.parts = [_part(risk.model, self.model, k) for k, risk in enumerate(risks)]
        for k, (risk, part) in enumerate(zip(risks, self.parts, strict=True)):
            if risk.l2 and set(part.picks) != set(range(len(part.sizes))):
                held = sum(part.sizes[i] for i in part.picks)
                raise ValueError(
                    f"l2: term {k} has l2={risk.l2}, but its model holds {held} of theta's "
                    f"{sum(part.sizes)} parameters; give l2 to SumOfRisks, where it counts for all"
                )

    @property
    def l2(self) -> float:
        """Coefficient of ||theta||^2: its own and sum_k c_k l2_k."""
        terms = zip(self.coefficients, self.risks, strict=True)
        return self.own_l2 + sum(c * risk.l2 for c, risk in terms)

    def require_batch(self, batch: Any, name: str = "batch") -> None:
        """Refuse, before anything runs, what is not one batch a term that the term can take."""
        if overridden(self) is None:
            self._require_parts(batch, name)
            for k, (risk, own) in enumerate(zip(self.risks, batch, strict=True)):
                risk.require_batch(own, f"{name}[{k}]")

    def _require_parts(self, batch: Any, name: str) -> None:
        if not isinstance(batch, tuple | list) or len(batch) != len(self.risks):
            got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
            raise ValueError(
                f"{name}: got {got}, expected a tuple of {len(self.risks)} batches, one for each "
                "term of the sum"
            )

    def terms(self, lam: Tensor, batch: Any) -> list[Term]:
        """Return the terms, each with its batch as its model sees it.

        Raises:
            ValueError: if ``batch`` is not one batch a term.
        """
        self._require_parts(batch, "batch")
        return [
            Term(risk, risk.seen(lam, own), c, part)
            for risk, own, c, part in zip(
                self.risks, batch, self.coefficients, self.parts, strict=True
            )
        ]

    def __call__(self, lam: Tensor, theta: Tensor, batch: Any) -> Tensor:
        """Evaluate g(lam, theta) on the tuple of batches; a scalar."""
        return _value(self, lam, theta, batch)


def _value(risk: WeightedRisk | SumOfRisks, lam: Tensor, theta: Tensor, batch: Any) -> Tensor:
    means = [
        (t.coefficient, t.risk.mean(lam, t.read(theta), t.batch)) for t in risk.terms(lam, batch)
    ]
    first, *others = [mean if c == 1 else c * mean for c, mean in means]
    value = sum(others, first)
    return value + risk.l2 * theta.square().sum() if risk.l2 else value


def _part(model: nn.Module, whole: nn.Module, term: int) -> PartOfTheta:
    """Where the parameters of a term's model stand among those of the sum's, by identity."""
    params = trainable(whole)
    place = {id(p): i for i, p in enumerate(params.values())}
    for name, p in trainable(model).items():
        if id(p) not in place:
            raise ValueError(
                f"model: does not hold parameter {name!r} of term {term}; share the module itself, "
                "not a copy, and freeze parameters before the sum is made"
            )
    picks = [place[id(p)] for p in trainable(model).values()]
    return PartOfTheta(picks, [p.numel() for p in params.values()])


# ------------------------------------------------------------------ what may be read


def overridden(risk: Any) -> str | None:
    """The first part of the structure that a subclass or the instance itself has replaced."""
    base = WeightedRisk if isinstance(risk, WeightedRisk) else SumOfRisks
    replaced = _replaced(type(risk), base) | (_structure(base) & vars(risk).keys())
    return min(replaced, default=None)


@cache
def _structure(base: type) -> frozenset[str]:
    methods = {
        name
        for name, part in vars(base).items()
        if inspect.isroutine(part) or isinstance(part, property)
    }
    return frozenset(methods - {"__init__", "__init_subclass__"})


def _replaced(kind: type, base: type) -> frozenset[str]:
    if kind is base:
        return frozenset()
    return frozenset(
        name
        for name in _structure(base)
        if next(c for c in kind.__mro__ if name in vars(c)) is not base
    )


def is_structured(loss: Any) -> bool:
    """True if the structure may be read: a `WeightedRisk` or `SumOfRisks` with nothing replaced.

    A subclass that overrides ``__call__``, ``outputs``, ``losses``, ``weights``, ... computes
    something else than its structure says; it is a plain function of (lam, theta, batch).
    """
    if isinstance(loss, SumOfRisks):
        return overridden(loss) is None and all(map(is_structured, loss.risks))
    return isinstance(loss, WeightedRisk) and overridden(loss) is None


def same_terms(risk: "WeightedRisk | SumOfRisks", lam: Tensor, batch: Any) -> list[Term]:
    """`WeightedRisk.terms`, refused where weight, inputs or mask is another function at each call.

    Cost: nothing but at the 1st, 2nd, 4th, 8th ... use, where weights, inputs and masks are
    evaluated twice; see `bilevel_lite.same_function.same_twice`.
    """
    risks = risk.risks if isinstance(risk, SumOfRisks) else [risk]
    hooks = [h for r in risks for h in (r.weight, r.inputs, r.mask) if h is not None]
    of, what = (hooks[0] if len(hooks) == 1 else risk), "weight, inputs or mask"
    if not (hooks and due(of)):
        was_the_same(of)
        return risk.terms(lam, batch)

    def read(terms):
        made = []
        for t in terms:
            if t.risk.inputs is not None:
                made += [p for p in t.batch if isinstance(p, Tensor) and p.is_floating_point()]
            if t.risk.weight is not None:
                losses = lam.new_ones(len(t.batch[1])) if t.risk.reads_losses else None
                made.append(t.risk.weights(lam, t.batch, losses))
            if t.risk.mask is not None:
                made.append(t.risk.unpadded(t.batch))
        return torch.cat([part.detach().reshape(-1).to(lam.dtype) for part in made])

    with same_twice(what, lam, lambda: read(risk.terms(lam, batch)), of, every=True) as watch:
        terms = risk.terms(lam, batch)
        watch.value = read(terms)
    return terms


def only_reads(loss: Any) -> bool:
    """True if this loss is known not to write into theta: its models are of known code."""
    risks = loss.risks if isinstance(loss, SumOfRisks) else [loss]
    return is_structured(loss) and all(known_code(risk.model) for risk in risks)


def refusal(risk: Any) -> str:
    """Why the structure of a risk may not be read, and the way out."""
    name = overridden(risk)
    if name is None:  # a term of a sum
        return next(refusal(term) for term in risk.risks if not is_structured(term))
    return (
        f"{type(risk).__name__} overrides {name!r} of WeightedRisk, so its model, likelihood and "
        "weights are not what it computes; use the arguments inputs=, weight= and mask= in its "
        "place, or a solver that takes any function (CG, Neumann, Direct on the Hessian)"
    )


def _hook(function: Callable, lam: Tensor, *args: Any) -> Any:
    try:
        return function(lam, *args)
    except IndexError as error:
        said = str(error)
        short = "weight, inputs: index with what is no index"
        if "tuple index" in said or "list index" in said:
            short = "batch: has too few parts"
        elif "out of" in said:
            short = f"lam: has {lam.numel()} entries, too few for this batch"
        raise ValueError(f"{short} ({said})") from error


def _require_fixed(name: str, value: Any) -> None:
    if isinstance(value, Tensor):  # one that lam made would enter no J v
        raise ValueError(
            f"{name}: got a tensor, expected a number; where lam sets it, write the loss as a "
            "function"
        )
    require_number(name, value)


def _require_pair(batch: Any, said: str) -> None:
    """Refuse what is not (x, y, ...) with tensors x and y that have rows."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        got = f"{len(batch)} part" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"{said} {got}, expected a tuple (x, y, ...)")
    for name, part in zip("xy", batch, strict=False):
        if not isinstance(part, Tensor) or not part.dim():
            got = "a tensor without rows" if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"{said} {got} as {name}, expected a tensor with an example a row")
        if part.is_nested and part.layout == torch.strided:  # which torch gives no length
            raise ValueError(
                f"{said} a strided nested tensor as {name}, expected layout=torch.jagged"
            )


def _require_rows(batch: Any, name: str) -> None:
    """Refuse x and y of different lengths, and a batch without examples."""
    x, y = batch[0], batch[1]
    if len(x) != len(y):
        raise ValueError(
            f"{name}: x has {len(x)} rows and y has {len(y)}; expected the same number"
        )
    if not len(x):
        raise ValueError(f"{name}: holds no example, so its mean is undefined")


def _like(per_example: Tensor, other: Tensor) -> Tensor:
    """View one number an example so that it multiplies ``other`` example by example."""
    return per_example.view(-1, *[1] * (other.dim() - 1))
