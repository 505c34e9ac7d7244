"""What may stand for H, as linear operators on flat vectors: ``H @ v``, ``H.dense()``.

Every matrix here but the Hessian has the form  J^T C J  (J the Jacobian of the model's outputs in
theta, C a matrix on the outputs) plus the l2 term; they differ in C only:

    GGN = exact Fisher   C = (1/n) blockdiag sigma_i h_i,  h_i the loss's Hessian in the outputs
    Monte-Carlo Fisher   C = (1/(n M)) sum_m s s^T,  s drawn so that E[s s^T] = sigma_i h_i
    empirical Fisher     C = (1/n) s s^T,  s = sqrt(sigma_i) times the gradient at the true label

The square-root rule: an output-gradient column carries sqrt(sigma_i), so that its second moment
carries sigma_i exactly once. It holds in all three.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from bilevel_lite.problem import NotFinite
from bilevel_lite.products import hvp_operator
from bilevel_lite.risk import WeightedRisk

__all__ = [
    "EmpiricalFisher",
    "Fisher",
    "GGN",
    "Hessian",
    "Operator",
    "from_curvlinops",
    "ggn_vp",
    "output_hessian_vp",
    "output_probes",
    "require_risk",
    "sample_weights",
]

FISHERS = ("exact", "mc", "empirical")


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

    def _act_on(self, like: Tensor):
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


def require_risk(loss: Any, what: str) -> WeightedRisk:
    """Refuse a loss whose model, likelihood and weights cannot be seen.

    Raises:
        TypeError: naming what needs a `WeightedRisk`.
    """
    if not isinstance(loss, WeightedRisk):
        raise TypeError(
            f"inner_loss: got {type(loss).__name__}, but {what} needs to see the model, the "
            "likelihood and the weights: give a bilevel_lite.WeightedRisk"
        )
    return loss


def sample_weights(risk: WeightedRisk, lam: Tensor, batch: Any) -> Tensor | None:
    """Return sigma(lam) detached, shape (n,), or None for all ones.

    Raises:
        ValueError: if a weight is below zero (sqrt(sigma) does not exist and the curvature would
            be indefinite) or not finite.
    """
    sigma = risk.weights(lam.detach(), batch)
    if sigma is None:
        return None
    sigma = sigma.detach()
    if not sigma.numel():
        return sigma
    low, total = torch.stack([sigma.min(), sigma.sum()]).tolist()
    if not (low >= 0 and math.isfinite(total)):
        raise ValueError(
            f"weight: the smallest is {low}; expected finite numbers that are zero or positive "
            "(a negative weight makes the curvature indefinite); clamp lam or use a sigmoid"
        )
    return sigma


def require_batch(outputs: Tensor) -> None:
    """Refuse a batch without examples.

    Raises:
        ValueError: if there are none.
    """
    if outputs.shape[0] == 0:
        raise ValueError("batch: holds no example, so its curvature is undefined")


def output_hessian_vp(
    risk: WeightedRisk, outputs: Tensor, sigma: Tensor | None, u: Tensor
) -> Tensor:
    r"""C u for the GGN:  (1/n) sigma_i h_i u_i, example by example.

        cross-entropy  h_i = diag(p_i) - p_i p_i^T,  p_i = softmax(outputs_i)
        mse            h_i = I

    Args:
        risk: Gives the likelihood.
        outputs: Model outputs, shape (n, C).
        sigma: Weights, shape (n,), or None.
        u: Direction, shape (n, C).

    Returns:
        Shape (n, C).

    Cost: negligible.
    """
    if risk.loss == "cross_entropy":
        p = outputs.softmax(1)
        u = p * u - p * (p * u).sum(1, keepdim=True)
    return _times(u, sigma) / len(outputs)


def output_probes(
    risk: WeightedRisk,
    outputs: Tensor,
    y: Tensor,
    sigma: Tensor | None,
    fisher: str = "mc",
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    r"""Output-gradient columns s whose second moment is the output curvature of each example.

        sum over probes of s_i s_i^T  =  sigma_i h_i   (exactly, or in expectation)

        "exact"      one probe a class c:  sqrt(sigma_i) sqrt(p_ic) (e_c - p_i);
                     mse: sqrt(sigma_i) e_c
        "mc"         M draws, each over sqrt(M):  sqrt(sigma_i) (p_i - e_y), y ~ Cat(p_i);
                     mse: sqrt(sigma_i) eps, eps ~ N(0, I)
        "empirical"  sqrt(sigma_i) (p_i - e_{y_i});   mse: sqrt(sigma_i) (outputs_i - y_i)

    The weight enters by its square root. (Weighting the loss itself by sigma_i would put sigma_i^2
    into the second moment; leaving it out would put none.)

    Args:
        risk: Gives the likelihood.
        outputs: Model outputs, shape (n, C).
        y: Targets; used by the empirical variant only.
        sigma: Weights, shape (n,), or None.
        fisher: ``"exact"``, ``"mc"`` or ``"empirical"``.
        samples: M; used by ``"mc"`` only.
        generator: A CPU generator for the draws of ``"mc"``; they are moved to the outputs' device.

    Returns:
        A list of tensors of shape (n, C).

    Raises:
        ValueError: for an unknown ``fisher``, fewer than one sample, or outputs not finite.

    Cost: negligible; each probe then costs one backward pass.
    Source: Martens and Grosse (2015); the weights: arXiv 2603.29108, app. A.2.
    """
    require_fisher(fisher, samples)
    require_batch(outputs)
    outputs = outputs.detach()
    _require_finite_outputs(outputs)
    classification = risk.loss == "cross_entropy"
    p = outputs.softmax(1) if classification else None
    if fisher == "exact":
        columns = _exact_columns(outputs, p)
    elif fisher == "mc":
        columns = [_draw(outputs, p, generator) / math.sqrt(samples) for _ in range(samples)]
    else:
        columns = [risk.output_gradient(outputs, y)]
    root = None if sigma is None else sigma.sqrt()
    return [_times(s, root) for s in columns]


def _require_finite_outputs(outputs: Tensor) -> None:
    if not bool(torch.isfinite(outputs.sum())):
        bad = int((~torch.isfinite(outputs)).flatten(1).any(1).sum())
        raise NotFinite(
            f"model: its outputs are NaN or infinite for {bad} of {len(outputs)} examples, so "
            "their curvature is undefined; look for NaN in theta and in the batch, or a step size "
            "too large"
        )


def require_fisher(fisher: str, samples: int) -> None:
    """Refuse an unknown Fisher variant or number of samples.

    Raises:
        ValueError: naming the argument.
    """
    if fisher not in FISHERS:
        raise ValueError(f"fisher: got {fisher!r}, expected 'mc', 'exact' or 'empirical'")
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples: got {samples!r}, expected an integer of at least 1")
    if fisher != "mc" and samples != 1:
        raise ValueError(f"samples: got {samples} with fisher={fisher!r}, which draws none")


def _exact_columns(outputs, p):
    if p is None:
        flat = torch.eye(outputs[0].numel(), dtype=outputs.dtype, device=outputs.device)
        return [e.view_as(outputs[0]).expand_as(outputs) for e in flat]
    eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    return [p[:, c : c + 1].sqrt() * (eye[c] - p) for c in range(p.shape[1])]


def _draw(outputs, p, generator):
    """One draw of the loss's gradient under the model's own predictive distribution."""
    if p is None:
        noise = torch.randn(outputs.shape, dtype=outputs.dtype, generator=generator)
        return noise.to(outputs.device)
    labels = p.cpu().multinomial(1, generator=generator).squeeze(1)
    return p - _one_hot(labels.to(p.device), p)


def _one_hot(y, p):
    return torch.zeros_like(p).scatter_(1, y[:, None], 1.0)


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
    """

    def __init__(self, loss, lam: Tensor, theta: Tensor, batch: Any = None):
        super().__init__(hvp_operator(loss, lam, theta, batch), theta)


class GGN(Operator):
    r"""The generalised Gauss-Newton matrix of a `WeightedRisk`.

        G v = J^T C J v + 2 l2 v,    C = (1/n) blockdiag(sigma_i h_i)

    J v is one forward pass with theta + eps v (a dual number); J^T u is one backward pass through a
    graph of the outputs that is built once and kept.

    Args:
        risk: The weighted risk.
        lam: Outer variable; gives the weights.
        theta: Inner variable, shape (d,).
        batch: (x, y, ...).

    Raises:
        TypeError: if ``risk`` is not a `WeightedRisk`.
        ValueError: for a negative weight or an empty batch.

    Cost: counted as 2 gradients per product (measured between 1.7 and 3.3).
    Source: Schraudolph (2002).
    """

    def __init__(self, risk: WeightedRisk, lam: Tensor, theta: Tensor, batch: Any):
        require_risk(risk, type(self).__name__)
        self.risk, self.batch, self.sigma = risk, batch, sample_weights(risk, lam, batch)
        self.theta = theta.detach().requires_grad_()
        with torch.enable_grad():
            self.outputs = risk.outputs(self.theta, batch)
        require_batch(self.outputs)
        self._act_on(theta)

    def matvec(self, v: Tensor) -> Tensor:  # a method: kept on self, it would keep self alive
        """G v, shape (d,)."""
        return self.vjp(self.middle(self.jvp(v))) + 2 * self.risk.l2 * v

    def jvp(self, v: Tensor) -> Tensor:
        """J v, shape (n, C): the directional derivative of the outputs along v."""
        with torch.no_grad(), fwad.dual_level():
            dual = fwad.make_dual(self.theta.detach(), v.detach())
            tangent = fwad.unpack_dual(self.risk.outputs(dual, self.batch)).tangent
        return torch.zeros_like(self.outputs) if tangent is None else tangent

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, shape (d,), for u of shape (n, C)."""
        return torch.autograd.grad(self.outputs, self.theta, u, retain_graph=True)[0]

    def middle(self, u: Tensor) -> Tensor:
        """C u, shape (n, C)."""
        return output_hessian_vp(self.risk, self.outputs.detach(), self.sigma, u)


class _ProbeFisher(GGN):
    """J^T C J with C = (1/n) sum over probes of s s^T, example by example."""

    fisher, samples, generator = "empirical", 1, None

    def __init__(self, risk: WeightedRisk, lam: Tensor, theta: Tensor, batch: Any):
        super().__init__(risk, lam, theta, batch)
        self.probes = output_probes(
            risk, self.outputs, batch[1], self.sigma, self.fisher, self.samples, self.generator
        )

    def middle(self, u):
        along = [s * (s * u).flatten(1).sum(1).view(-1, *[1] * (u.dim() - 1)) for s in self.probes]
        return sum(along) / len(u)


class EmpiricalFisher(_ProbeFisher):
    r"""The empirical Fisher: second moment of the true gradients, (1/n) sum_i sigma_i g_i g_i^T.

    Not the Fisher: its labels are the data's, not the model's. Plus 2 l2 on the diagonal.

    The arguments and errors are those of `GGN`.

    Cost: counted as 2 gradients per product.
    """


class Fisher(_ProbeFisher):
    r"""The Fisher: exact (equal to the GGN for both likelihoods) or from M draws per example.

        F = (1/n) sum_i sigma_i E_{y ~ model}[ g_i(y) g_i(y)^T ] + 2 l2 I

    The draws are made once, so that the operator is one fixed matrix.

    Args:
        risk: The weighted risk.
        lam: Outer variable; gives the weights.
        theta: Inner variable, shape (d,).
        batch: (x, y, ...).
        fisher: ``"mc"`` or ``"exact"``.
        samples: Draws per example for ``"mc"``.
        generator: A CPU generator for the draws.

    Raises:
        ValueError: as `GGN`, or for an unknown ``fisher`` or number of samples.

    Cost: counted as 2 gradients per product.
    """

    def __init__(
        self,
        risk: WeightedRisk,
        lam: Tensor,
        theta: Tensor,
        batch: Any,
        fisher: str = "mc",
        samples: int = 1,
        generator: torch.Generator | None = None,
    ):
        require_fisher(fisher, samples)
        self.fisher, self.samples, self.generator = fisher, samples, generator
        super().__init__(risk, lam, theta, batch)


def ggn_vp(risk: WeightedRisk, lam: Tensor, theta: Tensor, batch: Any, v: Tensor) -> Tensor:
    """One GGN-vector product G v, shape (d,); see `GGN` for many at one point.

    Cost: 2 gradients.
    """
    return GGN(risk, lam, theta, batch) @ v
