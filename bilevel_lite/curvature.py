"""What may stand for H, as linear operators on flat vectors: ``H @ v``, ``H.dense()``.

Every matrix here but the Hessian has the form  J^T C J  (J the Jacobian of the model's outputs in
theta, C a matrix on the outputs) plus the l2 term; they differ in C only:

    GGN = exact Fisher   C = (1/n) blockdiag sigma_i h_i,  h_i the loss's Hessian in the outputs
    Monte-Carlo Fisher   C = (1/(n M)) sum_m s s^T,  s drawn so that E[s s^T] = sigma_i h_i
    empirical Fisher     C = (1/n) s s^T,  s = sqrt(sigma_i) times the gradient at the true label

The square-root rule: an output-gradient column carries sqrt(sigma_i), so that its second moment
carries sigma_i exactly once. It holds in all three.

Where an example has a loss term at each of T positions, h_i and its square roots are block diagonal
in the positions, with the share k_it of each in the example's loss (`WeightedRisk.share`). Where
the weights read the losses and their slope counts (``weight_slope=True``), C has one part more,
(1/n) V'(l_i) s_i s_i^T with s_i the gradient of the unweighted loss. A `SumOfRisks` has one such
J^T C J a term, times its coefficient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.exact import exactly
from bilevel_lite.forward_mode import NoForwardMode, push_forward
from bilevel_lite.options import check, document, one_of, whole
from bilevel_lite.parallel import Part, apart, part_of
from bilevel_lite.params import dot
from bilevel_lite.products import hvp_operator
from bilevel_lite.refuse import NotFinite, Unseen
from bilevel_lite.risk import (
    SumOfRisks,
    Term,
    WeightedRisk,
    is_structured,
    only_reads,
    refusal,
    same_terms,
)
from bilevel_lite.same_function import same_twice
from bilevel_lite.surroundings import differentiating, require_twice, second_order, way_out
from bilevel_lite.trust import known_code, numbers, tolerance, verdicts_of

__all__ = [
    "Drawn",
    "EmpiricalFisher",
    "Fisher",
    "GGN",
    "Hessian",
    "Operator",
    "OutputSide",
    "Probes",
    "from_curvlinops",
    "ggn_vp",
    "output_side",
    "require_risk",
]

LARGEST = 2**28  # numbers that the exact probes may hold where labels have positions


class Operator:
    """A symmetric matrix known by its products, on flat vectors of one size.

    Args:
        matvec: v -> H v, for v of shape (d,).
        like: A tensor of shape (d,) with the dtype and device of the vectors.

    Raises:
        ValueError: in ``@``, for an operand that does not have d rows.
    """

    def __init__(self, matvec: Callable[[Tensor], Tensor], like: Tensor):
        self.matvec = matvec
        self._act_on(like)

    def _act_on(self, like: Tensor) -> None:
        self.size, self.dtype, self.device = like.numel(), like.dtype, like.device
        self.shape = (self.size, self.size)

    def __call__(self, v: Tensor) -> Tensor:
        """Return H v; what `bilevel_lite.linsolve` calls."""
        return self.matvec(v)

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return H v for a vector, shape (d,), or column by column for a matrix, shape (d, k)."""
        if v.dim() not in (1, 2) or v.shape[0] != self.size:
            raise ValueError(
                f"operand: got shape {tuple(v.shape)}, expected ({self.size},) or ({self.size}, k)"
            )
        if v.dim() == 1:
            return self.matvec(v)
        return torch.stack([self.matvec(column) for column in v.T], dim=1)

    def dense(self, max_dim: int = 4000) -> Tensor:
        """The matrix, shape (d, d), made exactly symmetric; for small problems.

        Raises:
            ValueError: if d exceeds ``max_dim``.

        Cost: d products.
        """
        if self.size > max_dim:
            raise ValueError(f"dense: the matrix has {self.size} rows, more than max_dim={max_dim}")
        matrix = self @ torch.eye(self.size, dtype=self.dtype, device=self.device)
        return 0.5 * (matrix + matrix.T)

    def to_scipy(self):
        """View as a ``scipy.sparse.linalg.LinearOperator`` (NumPy vectors in and out).

        Raises:
            ImportError: if SciPy is not installed.
        """
        from scipy.sparse.linalg import LinearOperator

        def matvec(v):
            vector = torch.as_tensor(v.reshape(-1), dtype=self.dtype, device=self.device)
            return self.matvec(vector).cpu().numpy()

        numpy_dtype = torch.empty((), dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=matvec, rmatvec=matvec, dtype=numpy_dtype)


def from_curvlinops(operator: Any, like: Tensor) -> Operator:
    """View a curvlinops operator (any object with ``@`` on flat torch vectors) as an `Operator`.

    Args:
        operator: For example ``curvlinops.GGNLinearOperator(...)``, built on the parameters that
            `bilevel_lite.flatten` puts into theta, in the same order.
        like: theta, or any tensor of its shape, dtype and device.

    Raises:
        ValueError: if the operator's shape is not (d, d).
    """
    if tuple(operator.shape) != (like.numel(), like.numel()):
        raise ValueError(
            f"operator: has shape {tuple(operator.shape)}, expected "
            f"({like.numel()}, {like.numel()}), d of theta"
        )
    return Operator(lambda v: operator @ v, like)


# ------------------------------------------------------------------ the output side: C


def require_risk(loss: Any, what: str) -> WeightedRisk | SumOfRisks:
    """Refuse a loss whose model, likelihood and weights cannot be seen.

    Raises:
        Unseen: (a TypeError) naming what needs a `WeightedRisk`, or what a subclass has overridden.
    """
    if not isinstance(loss, WeightedRisk | SumOfRisks):
        raise Unseen(
            f"inner_loss: got {type(loss).__name__}, but {what} needs to see the model, the "
            "likelihood and the weights: give a bilevel_lite.WeightedRisk"
        )
    if not is_structured(loss):
        raise Unseen(f"inner_loss: {refusal(loss)}")
    return loss


def _require_weights(sigma: Tensor) -> None:
    if not sigma.numel():
        return
    low, total = torch.stack([sigma.min(), sigma.sum()]).tolist()
    if not (low >= 0 and math.isfinite(total)):
        raise ValueError(
            f"weight: the smallest is {low}; expected finite numbers that are zero or positive "
            "(a negative weight makes the curvature indefinite); clamp lam or use a sigmoid"
        )


@dataclass
class OutputSide:
    """What C of one term is made of: the outputs, the weights and their slopes, all detached.

    Attributes:
        risk: Gives the likelihood.
        outputs: Model outputs, shape (n, C) or (n, T, C).
        y: Targets.
        sigma: Weights, shape (n,), or None for all ones.
        slope: V', shape (n,), or None where it does not count.
    """

    risk: WeightedRisk
    outputs: Tensor
    y: Tensor
    sigma: Tensor | None = None
    slope: Tensor | None = None

    def times(self, u: Tensor) -> Tensor:
        r"""C u for the GGN:  (1/n) [ sigma_i h_i u_i + V'_i s_i (s_i . u_i) ], example by example.

            cross-entropy  h_i = diag(p_i) - p_i p_i^T,  p_i = softmax(outputs_i)
                           with positions: blockdiag over t of k_it (diag(p_it) - p_it p_it^T)
            mse            h_i = I

        Args:
            u: Direction, like the outputs.

        Cost: negligible.
        """
        hu = u
        if self.risk.loss == "cross_entropy":
            p = self.outputs.softmax(-1)
            hu = p * u - p * (p * u).sum(-1, keepdim=True)
            share = self.risk.share(self.outputs, self.y)
            if share is not None:
                hu = share[..., None] * hu
        hu = _times(hu, self.sigma)
        if self.slope is not None:
            s = self.risk.output_gradient(self.outputs, self.y)
            hu = hu + _times(s, self.slope * _dots(s, u))
        return hu / len(self.outputs)

    def empirical_weight(self) -> Tensor | None:
        """sigma + max(V', 0), by which an example's own second moment is multiplied; or None."""
        return self.sigma if self.slope is None else self.sigma + self.slope.clamp(min=0)

    def faulty(self) -> Tensor:
        """True where `require_sound` would raise; bool, shape (), without a wait for the device."""
        bad = ~torch.isfinite(self.outputs.sum())
        if self.sigma is None or not self.sigma.numel():
            return bad
        return bad | ~(self.sigma.min() >= 0) | ~torch.isfinite(self.sigma.sum())

    def require_sound(self) -> None:
        """Refuse weights that are negative or not finite, and outputs that are not finite.

        Raises:
            ValueError: saying which, and the way out.
        """
        if self.sigma is not None:
            _require_weights(self.sigma)
        _require_finite_outputs(self.outputs)


def output_side(term: Term, lam: Tensor, outputs: Tensor, look: bool = True) -> OutputSide:
    """Weigh the outputs of one term of a risk: sigma, and V' where it counts.

    Args:
        term: From ``risk.terms(lam, batch)``.
        lam: Outer variable; gives the weights.
        outputs: ``term.risk.outputs(term.read(theta), term.batch)``.
        look: Check the weights; else whoever asks does, with `OutputSide.faulty`.

    Raises:
        ValueError: for a weight that is not finite or below zero (sqrt(sigma) does not exist and
            the curvature would be indefinite), targets that do not fit, or weights without the
            slope that ``weight_slope=True`` asks for.

    Cost: that of losses and weights from the outputs; negligible.
    """
    risk, outputs, y = term.risk, outputs.detach(), term.batch[1]
    risk._check_targets(outputs, y)
    losses = risk.output_losses(outputs, y) if risk.reads_losses else None
    sigma = risk.weights(lam.detach(), term.batch, losses)
    if sigma is not None:
        sigma = sigma.detach().to(outputs)
        if look:
            _require_weights(sigma)
    return OutputSide(risk, outputs, y, sigma, risk.weight_slopes(lam, term.batch, losses))


@document
@dataclass(frozen=True)
class Probes:
    r"""Which output-gradient columns s stand for C: the options of all Fishers, KFAC and EKFAC.

        sum over probes of s_i s_i^T  =  sigma_i h_i   (exactly, or in expectation)

        "exact"      one probe a class c:  sqrt(sigma_i) sqrt(p_ic) (e_c - p_i);
                     mse: sqrt(sigma_i) e_c
        "mc"         M draws, each over sqrt(M):  sqrt(sigma_i) (p_i - e_y), y ~ Cat(p_i);
                     mse: sqrt(sigma_i) eps, eps ~ N(0, I)
        "empirical"  sqrt(sigma_i) (p_i - e_{y_i});   mse: sqrt(sigma_i) (outputs_i - y_i)

    The weight enters by its square root. (Weighting the loss itself by sigma_i would put sigma_i^2
    into the second moment; leaving it out would put none.)

    With positions a column also carries sqrt(k_it), the share of a position in its example's loss;
    "exact" has a probe for each class at each position, "mc" draws at each position independently,
    and "empirical" has the gradient of l_i itself, k_it (p_it - e_{y_it}).

    Where the slope of the weights counts, V' s_i s_i^T is to be added, s_i the gradient at the true
    label: "exact" and "mc" get one more column, sqrt(V'_i) s_i, and "empirical" the factor
    sqrt(sigma_i + V'_i). A negative V'_i has no real column: it counts as 0, here but not in
    `OutputSide.times`. So the exact Fisher is then the GGN of the positive V' alone.

    Args:
        generator: A CPU generator for its draws, which are moved to the outputs' device; or a
            `Drawn`, whose numbers are there already.

    Raises:
        ValueError: for an unknown ``fisher``, or a number of samples that it does not have.

    Cost: negligible; each probe then costs one backward pass.
    Source: Martens and Grosse (2015); the weights: arXiv 2603.29108, app. A.2.
    """

    fisher: str = one_of("mc", "exact", "empirical", help="Which probes, see `kfac_factors`")
    samples: int = whole(default=1, help='M, draws per example for "mc"')
    generator: "torch.Generator | Drawn | None" = None

    def __post_init__(self):
        check(self)
        if self.fisher != "mc" and self.samples != 1:
            raise ValueError(
                f"samples: got {self.samples} with fisher={self.fisher!r}, which draws none"
            )

    def on(self, part: Part | None) -> "Probes":
        """The same probes, drawn for a whole batch of which part of the rows is here."""
        return self if part is None else replace(self, generator=_Sliced(self.generator, part))

    def of(self, side: OutputSide, look: bool = True) -> list[Tensor]:
        """The columns, each like the outputs.

        Args:
            side: Outputs, targets, weights and their slopes.
            look: Check that the outputs are finite; else whoever asks does (`OutputSide.faulty`).

        Raises:
            ValueError: for outputs not finite or without examples, or exact probes for so many
                classes and positions that they would not fit.
        """
        risk, outputs, y, sigma = side.risk, side.outputs, side.y, side.sigma
        if not len(outputs):
            raise ValueError("outputs: of no example, which has no curvature")
        if look:
            _require_finite_outputs(outputs)
        p = outputs.softmax(-1) if risk.loss == "cross_entropy" else None
        if self.fisher == "empirical":
            return [_times(risk.output_gradient(outputs, y), _root(side.empirical_weight()))]
        if self.fisher == "exact":
            columns = _exact_columns(outputs, p)
        else:
            draws = (_draw(outputs, p, self.generator) for _ in range(self.samples))
            columns = [drawn / math.sqrt(self.samples) for drawn in draws]
        share = risk.share(outputs, y)
        if share is not None:
            columns = [share.sqrt()[..., None] * column for column in columns]
        columns = [_times(column, _root(sigma)) for column in columns]
        if side.slope is not None:
            columns.append(_times(risk.output_gradient(outputs, y), side.slope.clamp(min=0).sqrt()))
        return columns


def _root(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.sqrt()


def _require_finite_outputs(outputs: Tensor) -> None:
    if not bool(torch.isfinite(outputs.sum())):
        bad = int((~torch.isfinite(outputs)).flatten(1).any(1).sum())
        raise NotFinite(
            f"model: its outputs are NaN or infinite for {bad} of {len(outputs)} examples, so "
            "their curvature is undefined; look for NaN in theta and in the batch, or a step size "
            "too large"
        )


def _exact_columns(outputs, p):
    if p is None:
        flat = torch.eye(outputs[0].numel(), dtype=outputs.dtype, device=outputs.device)
        return [e.view_as(outputs[0]).expand_as(outputs) for e in flat]
    classes, positions = p.shape[-1], math.prod(p.shape[1:-1])
    if p.dim() > 2 and p.numel() * classes * positions > LARGEST:
        raise ValueError(
            f"fisher: 'exact' needs a probe for each class at each position, {classes} x "
            f"{positions} probes of shape {tuple(p.shape)}; use 'mc' or 'empirical'"
        )
    eye = torch.eye(classes, dtype=p.dtype, device=p.device)
    roots = [p[..., c, None].sqrt() * (eye[c] - p) for c in range(classes)]
    if p.dim() == 2:
        return roots
    at = torch.eye(positions, dtype=p.dtype, device=p.device).view(-1, *p.shape[1:-1], 1)
    return [root * here for root in roots for here in at]


def _draw(outputs, p, generator):
    """One draw of the loss's gradient under the model's own predictive distribution."""
    kept = isinstance(generator, Drawn | _Sliced)
    take = generator.take if kept else partial(_numbers, generator)
    drawn = take(outputs, p is not None)
    if p is None:
        return drawn
    labels = (p / drawn).argmax(-1, keepdim=True)  # as `multinomial` does, but on the device
    return p - torch.zeros_like(p).scatter_(-1, labels, 1.0)


def _numbers(generator: torch.Generator | None, like: Tensor, labels: bool) -> Tensor:
    """What one draw takes, like the outputs: exponential numbers for labels, normal for noise."""
    where = "cpu" if generator is None else generator.device
    new = torch.empty(like.shape, dtype=like.dtype, device=where)
    new = (new.exponential_ if labels else new.normal_)(generator=generator)
    # from pinned memory the copy waits for nothing
    if like.device.type == "cuda" and new.device.type == "cpu":
        return new.pin_memory().to(like.device, non_blocking=True)
    return new.to(like.device)


class Drawn:
    """Random numbers in places that stay, for a pass that is recorded: in a generator's place.

    The first pass draws as it would from the generator, and each draw's tensor is kept. `again`
    draws anew into the same tensors; what then asks in the same order gets them, and nothing is
    drawn or moved meanwhile. So every pass has the numbers that the generator would have given it.

    Args:
        generator: A CPU generator.
    """

    def __init__(self, generator: torch.Generator | None):
        self.generator, self.next = generator, 0
        self.kept: list[tuple[Tensor, bool]] = []

    def take(self, like: Tensor, labels: bool) -> Tensor:
        """The next draw's numbers, like the outputs: for labels, or noise.

        Raises:
            ValueError: if it asks for others than the first pass did.
        """
        if self.next == len(self.kept):
            self.kept.append((_numbers(self.generator, like, labels), labels))
        kept, kind = self.kept[self.next]
        if (kept.shape, kept.dtype, kind) != (like.shape, like.dtype, labels):
            raise ValueError(
                f"generator: draw {self.next} was made for outputs of shape {tuple(kept.shape)}, "
                f"but these have {tuple(like.shape)}; use a new Drawn"
            )
        self.next += 1
        return kept

    def again(self) -> None:
        """Draw anew into the same tensors, in the same order; the next pass starts with them."""
        for kept, labels in self.kept:
            kept.copy_(_numbers(self.generator, kept, labels))
        self.next = 0


@dataclass
class _Sliced:
    """A generator's numbers for a whole batch, of which those of the rows here are taken."""

    generator: torch.Generator | None
    part: Part

    def take(self, like: Tensor, labels: bool) -> Tensor:
        whole = like.new_empty(self.part.n, *like.shape[1:])
        return _numbers(self.generator, whole, labels)[self.part.before :][: len(like)]


def _dots(s: Tensor, u: Tensor) -> Tensor:
    """s_i . u_i for each example, shape (n,)."""
    return (s * u).reshape(len(s), -1).sum(1)


def _times(u: Tensor, weight: Tensor | None) -> Tensor:
    """Scale example i of u by weight_i."""
    return u if weight is None else u * weight.view(-1, *[1] * (u.dim() - 1))


# ------------------------------------------------------------------ the operators


class Hessian(Operator):
    """The Hessian of a loss in theta; see `bilevel_lite.products.hvp_operator`.

    Args:
        loss: Any ``loss(lam, theta, batch)`` -> scalar.
        lam: Outer variable.
        theta: Inner variable, shape (d,).
        batch: Passed on.

    Cost: 2 gradients per product.

    Example:
        >>> from bilevel_lite.curvature import Hessian
        >>> risk = bl.WeightedRisk(torch.nn.Linear(1, 2, bias=False))
        >>> theta = torch.tensor([3.0, 1.0]).log()  # so that the probabilities are 3/4 and 1/4
        >>> at = torch.zeros(0), theta, (torch.ones(1, 1), torch.tensor([0]))
        >>> Hessian(risk, *at) @ torch.eye(2)
        tensor([[ 0.1875, -0.1875],
                [-0.1875,  0.1875]])
    """

    def __init__(self, loss, lam: Tensor, theta: Tensor, batch: Any = None):
        super().__init__(hvp_operator(loss, lam, theta, batch), theta)


class GGN(Operator):
    r"""The generalised Gauss-Newton matrix of a `WeightedRisk` or `SumOfRisks`.

        G v = sum over terms of c J^T C J v + 2 l2 v,
        C = (1/n) blockdiag(sigma_i h_i + V'_i s_i s_i^T),    V' only with ``weight_slope=True``

    J v is one forward pass with theta + eps v (a dual number); J^T u is one backward pass through a
    graph of the outputs that is built once and kept. A negative V' may make G indefinite.

    Args:
        risk: The risk.
        lam: Outer variable; gives the weights and the inputs.
        theta: Inner variable, shape (d,).
        batch: (x, y, ...), or for a `SumOfRisks` a tuple of these.

    Raises:
        TypeError: if ``risk`` is neither, or a subclass that overrides its structure.
        ValueError: for a negative weight or an empty batch.

    Cost: counted as 2 gradients per product (measured between 1.7 and 3.3).
    Source: Schraudolph (2002).

    Example:
        >>> from bilevel_lite.curvature import GGN
        >>> risk = bl.WeightedRisk(torch.nn.Linear(1, 2, bias=False))
        >>> theta = torch.tensor([3.0, 1.0]).log()  # so that the probabilities are 3/4 and 1/4
        >>> at = torch.zeros(0), theta, (torch.ones(1, 1), torch.tensor([0]))
        >>> GGN(risk, *at) @ torch.eye(2)
        tensor([[ 0.1875, -0.1875],
                [-0.1875,  0.1875]])
    """

    @differentiating
    def __init__(self, risk: WeightedRisk | SumOfRisks, lam: Tensor, theta: Tensor, batch: Any):
        risk, group = apart(risk)
        require_risk(risk, type(self).__name__)
        theta = theta.detach().requires_grad_()

        def outputs(theta):
            return [exactly(t.risk.outputs, t.read(theta), t.batch) for t in terms]

        def together(made):
            return torch.cat([out.detach().reshape(-1) for out in made])

        terms, of = same_terms(risk, lam.detach(), batch), None if only_reads(risk) else risk
        once = same_twice("inner_loss", theta, lambda: together(outputs(theta.detach())), of)
        with second_order(), way_out(), once as watch:
            made = outputs(theta)
            watch.value = together(made)
        self.parts = [
            OutputMap(term, theta, outputs, output_side(term, lam, outputs))
            for term, outputs in zip(terms, made, strict=True)
        ]
        self.l2, self.rows = risk.l2, None
        if group is not None:
            self.rows = part_of(group, len(self.parts[0].outputs), {}, theta)
        self._act_on(theta)

    def middle(self, part: "OutputMap", u: Tensor) -> Tensor:
        """C u of one term, like its outputs."""
        return part.side.times(u)

    def matvec(self, v: Tensor) -> Tensor:
        """Return G v."""
        out = 2 * self.l2 * v
        for part in self.parts:
            out = out + part.term.coefficient * part.vjp(self.middle(part, part.jvp(v)))
        return out if self.rows is None else self.rows.total(out, "theta")


@dataclass
class OutputMap:
    """The outputs of one term as a function of theta, at one point, and C there."""

    term: Term
    theta: Tensor
    outputs: Tensor
    side: OutputSide
    probes: list[Tensor] | None = None
    pushed: bool | None = None  # forward mode may be used; None before it was compared

    @differentiating
    def jvp(self, v: Tensor) -> Tensor:
        """J v, like the outputs: their directional derivative along v, by one forward-mode pass.

        Where an operation has none, or J is not the transpose of what training follows, by double
        backward: J v = d/du < J^T u, v >.
        """
        term, v = self.term, v.detach()
        if self.pushed is not False:
            try:
                along = push_forward(
                    lambda theta: term.risk.outputs(theta, term.batch),
                    term.read(self.theta.detach()),
                    term.read(v),
                )[1]
                if self.pushed or self._is_transpose(along, v):
                    return along
            except NoForwardMode:
                pass
            self.pushed = False
        with second_order(), way_out():
            u = torch.zeros_like(self.outputs).requires_grad_()
            (back,) = torch.autograd.grad(
                self.outputs, self.theta, u, create_graph=True, retain_graph=True
            )
            require_twice("inner_loss", back)
            (along,) = torch.autograd.grad(back, u, v, allow_unused=True)
        return torch.zeros_like(self.outputs) if along is None else along

    def _is_transpose(self, along: Tensor, v: Tensor) -> bool:
        """Compare < u, J v > with < J^T u, v > once, for random u.

        Cost: half a gradient; three halves in float32 or below (`bilevel_lite.trust.numbers`).
        """
        seen, known = verdicts_of(self.term.risk.model), known_code(self.term.risk.model)
        if not (known and "pushed forward" in seen):
            generator = torch.Generator().manual_seed(0)
            for _ in range(numbers(along)):
                u = torch.randn(along.shape, generator=generator, device="cpu").to(along)
                size = float(along.norm() * u.norm())
                apart = abs(float(dot(u, along) - dot(self.vjp(u), v)))
                if math.isfinite(size) and apart > tolerance(along) * size:
                    return False
            seen["pushed forward"] = True
        self.pushed = True
        return True

    @differentiating
    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, shape (d,), for u like the outputs."""
        with way_out():
            return torch.autograd.grad(self.outputs, self.theta, u, retain_graph=True)[0]


class _ProbeFisher(GGN):
    """J^T C J with C = (1/n) sum over probes of s s^T, example by example."""

    how = Probes("empirical")

    def __init__(self, risk: WeightedRisk | SumOfRisks, lam: Tensor, theta: Tensor, batch: Any):
        super().__init__(risk, lam, theta, batch)
        for part in self.parts:
            part.probes = self.how.on(self.rows).of(part.side)

    def middle(self, part: OutputMap, u: Tensor) -> Tensor:
        """C u of one term, like its outputs."""
        return sum(_times(s, _dots(s, u)) for s in part.probes) / len(u)


class EmpiricalFisher(_ProbeFisher):
    r"""The empirical Fisher: second moment of the true gradients, (1/n) sum_i sigma_i g_i g_i^T.

    Not the Fisher: its labels are the data's, not the model's. Plus 2 l2 on the diagonal. Where the
    slope of the weights counts, sigma_i + max(V'_i, 0) stands for sigma_i.

    The arguments and errors are those of `GGN`.

    Cost: counted as 2 gradients per product.

    Example:
        >>> from bilevel_lite.curvature import EmpiricalFisher
        >>> risk = bl.WeightedRisk(torch.nn.Linear(1, 2, bias=False))
        >>> theta = torch.tensor([3.0, 1.0]).log()  # so that the probabilities are 3/4 and 1/4
        >>> at = torch.zeros(0), theta, (torch.ones(1, 1), torch.tensor([0]))
        >>> EmpiricalFisher(risk, *at) @ torch.eye(2)
        tensor([[ 0.0625, -0.0625],
                [-0.0625,  0.0625]])
    """


class Fisher(_ProbeFisher):
    r"""The Fisher: exact (equal to the GGN for both likelihoods) or from M draws per example.

        F = (1/n) sum_i sigma_i E_{y ~ model}[ g_i(y) g_i(y)^T ] + 2 l2 I

    The draws are made once, so that the operator is one fixed matrix. Where the slope of the
    weights counts, max(V'_i, 0) g_i g_i^T at the true label is added: equal to the GGN where no V'
    is negative.

    Args:
        risk: The risk, as for `GGN`.
        lam: Outer variable; gives the weights and the inputs.
        theta: Inner variable, shape (d,).
        batch: (x, y, ...), or for a `SumOfRisks` a tuple of these.
        fisher, samples, generator: As `Probes` says, ``"mc"`` or ``"exact"``.

    Raises:
        ValueError: as `GGN`, or for an unknown ``fisher`` or number of samples.

    Cost: counted as 2 gradients per product.

    Example:
        >>> from bilevel_lite.curvature import Fisher
        >>> risk = bl.WeightedRisk(torch.nn.Linear(1, 2, bias=False))
        >>> theta = torch.tensor([3.0, 1.0]).log()  # so that the probabilities are 3/4 and 1/4
        >>> at = torch.zeros(0), theta, (torch.ones(1, 1), torch.tensor([0]))
        >>> Fisher(risk, *at, fisher="exact") @ torch.eye(2)
        tensor([[ 0.1875, -0.1875],
                [-0.1875,  0.1875]])
    """

    def __init__(
        self,
        risk: WeightedRisk | SumOfRisks,
        lam: Tensor,
        theta: Tensor,
        batch: Any,
        fisher: str = "mc",
        samples: int = 1,
        generator: torch.Generator | None = None,
    ):
        self.how = Probes(fisher, samples, generator)
        super().__init__(risk, lam, theta, batch)


def ggn_vp(
    risk: WeightedRisk | SumOfRisks, lam: Tensor, theta: Tensor, batch: Any, v: Tensor
) -> Tensor:
    """One GGN-vector product G v, shape (d,); see `GGN` for many at one point.

    Cost: 2 gradients.

    Example:
        >>> from bilevel_lite.curvature import ggn_vp
        >>> risk = bl.WeightedRisk(torch.nn.Linear(1, 2, bias=False))
        >>> theta = torch.tensor([3.0, 1.0]).log()  # so that the probabilities are 3/4 and 1/4
        >>> at = torch.zeros(0), theta, (torch.ones(1, 1), torch.tensor([0]))
        >>> ggn_vp(risk, *at, torch.tensor([1.0, 0.0]))
        tensor([ 0.1875, -0.1875])
    """
    return GGN(risk, lam, theta, batch) @ v
