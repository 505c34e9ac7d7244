r"""One Kronecker product A (x) B: three forms of a factor, damping, and the inverse product.

    (A (x) B) vec V = vec(B V A),      (A (x) B)^-1 vec V = vec(B^-1 V A^-1)

Damping tau, by one of three rules:

    heuristic   (A + pi sqrt(tau) I) (x) (B + sqrt(tau)/pi I),  pi^2 = (tr A / d2) / (tr B / d1)
    factored    the same with pi = 1
    exact       A (x) B + tau I, in the eigenbases of A and B

A factor of rank R < d is never formed: the Woodbury identity solves it in its R columns
(`Columns`). Nothing is inverted: Cholesky factors solve.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = [
    "Columns",
    "Matrix",
    "Spectrum",
    "eigenbasis_inverse",
    "heuristic_damping",
    "in_basis",
    "kronecker_inverse",
]

Solve = Callable[..., Tensor]
RULES = ("heuristic", "factored", "exact")
NARROW = 0.7  # columns are kept where there are fewer than this many times d (measured)


@dataclass
class Matrix:
    """F as a matrix, shape (d, d); solved by Cholesky, d^3 / 3."""

    matrix: Tensor

    @property
    def dim(self) -> int:
        """Size of F."""
        return self.matrix.shape[0]

    def trace(self) -> Tensor:
        """Return tr F."""
        return self.matrix.trace()

    def dense(self) -> Tensor:
        """Return F."""
        return self.matrix

    def spectrum(self) -> "Spectrum":
        """All d eigenpairs."""
        return Spectrum(*_eigh(self.matrix))

    def damped(self, delta: Tensor, on: Tensor | float = 1.0) -> Solve:
        """V -> (on F + delta I)^-1 V, or V (on F + delta I)^-1 if called with ``right=True``.

        Args:
            delta: Damping.
            on: 1, or 0 to leave F out.

        Raises:
            ValueError: if on F + delta I is not positive definite to working precision.
        """
        chol = _cholesky(on * self.matrix, delta)
        return _either_side(lambda v: torch.cholesky_solve(v, chol))


@dataclass
class Columns:
    r"""F = scale X X^T by its columns X, shape (d, R), R < d; solved in R dimensions (Woodbury).

    (scale X X^T + delta I)^-1 = (I - X (X^T X + (delta / scale) I)^-1 X^T) / delta
    """

    columns: Tensor
    scale: float

    @property
    def dim(self) -> int:
        """Size of F."""
        return self.columns.shape[0]

    def trace(self) -> Tensor:
        """Return tr F."""
        return self.scale * self.gram.trace()

    @cached_property
    def gram(self) -> Tensor:
        """X^T X, shape (R, R)."""
        return _gram(self.columns.T)

    def dense(self) -> Tensor:
        """Return F, formed."""
        return self.scale * (self.columns @ self.columns.T)

    def spectrum(self) -> "Spectrum":
        """The R eigenpairs that may differ from zero: X = Q T, T T^T diagonalised."""
        q, t = torch.linalg.qr(self.columns)
        values, rotation = _eigh(self.scale * (t @ t.T))
        return Spectrum(values, q @ rotation)

    def damped(self, delta: Tensor, on: Tensor | float = 1.0) -> Solve:
        """As `Matrix.damped`; delta must be positive, for F alone has no inverse."""
        x = self.columns
        chol = _cholesky(self.gram.clone(), delta / self.scale)

        def solve(v, right=False):
            if right:  # written out, so that the large V is not transposed
                inner = on * torch.cholesky_solve((v @ x).T, chol).T
                return torch.addmm(v, inner, x.T, alpha=-1).div_(delta)
            inner = on * torch.cholesky_solve(x.T @ v, chol)
            return torch.addmm(v, x, inner, alpha=-1).div_(delta)

        return solve


@dataclass
class Spectrum:
    """F = U diag(values) U^T, U of shape (d, r) with orthonormal columns, r <= d."""

    values: Tensor
    vectors: Tensor

    @property
    def dim(self) -> int:
        """Size of F."""
        return self.vectors.shape[0]

    @property
    def thin(self) -> bool:
        """True if U is not square, so that F is zero on what U leaves out."""
        return self.vectors.shape[1] < self.dim

    def trace(self) -> Tensor:
        """Return tr F."""
        return self.values.sum()

    def dense(self) -> Tensor:
        """Return F, formed."""
        return (self.vectors * self.values) @ self.vectors.T

    def spectrum(self) -> "Spectrum":
        """Return itself."""
        return self

    def damped(self, delta: Tensor, on: Tensor | float = 1.0) -> Solve:
        """As `Matrix.damped`."""
        u, inverse = self.vectors, 1 / (on * self.values + delta)
        if not self.thin:
            return _either_side(lambda v: u @ (inverse[:, None] * (u.T @ v)))
        change = (inverse - 1 / delta)[:, None]
        return _either_side(lambda v: u @ (change * (u.T @ v)) + v / delta)


def _either_side(solve: Callable[[Tensor], Tensor]) -> Solve:
    """Let a symmetric solve act from the right too: V F^-1 = (F^-1 V^T)^T."""
    return lambda v, right=False: solve(v.T).T if right else solve(v)


FORMS = {form.__name__: form for form in (Matrix, Columns, Spectrum)}
Factor = Matrix | Columns | Spectrum


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    _require_finite_factor(matrix)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # in float32, many eigenvalues near zero can stop LAPACK
        if matrix.dtype != torch.float32:
            raise
        values, vectors = (part.to(matrix.dtype) for part in torch.linalg.eigh(matrix.double()))
    return values.clamp(min=0), vectors  # F is a second moment: what is below zero is rounding


def _cholesky(matrix: Tensor, delta: Tensor) -> Tensor:
    """Cholesky factor of matrix + delta I, written over matrix; float64 where float32 fails."""
    damped = matrix
    damped.diagonal().add_(delta)
    chol, failed = torch.linalg.cholesky_ex(damped)
    failed = int(failed)
    if failed and matrix.dtype == torch.float32:
        chol, failed = torch.linalg.cholesky_ex(damped.double())
        chol, failed = chol.to(matrix.dtype), int(failed)
    if failed:
        _require_finite_factor(damped)
        raise ValueError(
            f"damping: {float(delta):.3g} on a Kronecker factor of size {len(matrix)} leaves it "
            "singular to working precision; give a larger damping or l2"
        )
    return chol


def _require_finite_factor(matrix: Tensor) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("KFAC: a factor holds NaN or infinity; are the inputs of a huge scale?")


def _gram(x: Tensor) -> Tensor:
    """X X^T, of which the upper half is copied, not computed (torch has no such product)."""
    half = len(x) // 2
    if half < 256:
        return x @ x.T
    top, bottom = x[:half], x[half:]
    out = x.new_empty(len(x), len(x))
    out[:half, :half], out[half:, half:] = _gram(top), _gram(bottom)
    torch.mm(bottom, top.T, out=out[half:, :half])
    out[:half, half:] = out[half:, :half].T
    return out


def accumulate(total: Factor | None, x: Tensor, scale: float, narrow: bool) -> Factor:
    """Add scale x x^T, in the form that the total rank makes the smaller."""
    if narrow:
        return Columns(x if total is None else torch.cat([total.columns, x], 1), scale)
    gram = _gram(x)
    return Matrix(gram.mul_(scale) if total is None else total.matrix.add_(gram, alpha=scale))


# ------------------------------------------------------------------ damping and inverse


def heuristic_damping(a: Factor, b: Factor, tau: float) -> tuple[Tensor, Tensor]:
    r"""Split tau over the two factors so that both are damped in proportion to their size.

        pi = sqrt( (tr A / d2) / (tr B / d1) ),   delta_A = pi sqrt(tau),   delta_B = sqrt(tau) / pi

    Args:
        a: The factor A (any of the three forms).
        b: The factor B.
        tau: damping + 2 l2.

    Returns:
        delta_A and delta_B, tensors of shape (); their product is tau. pi is 1 where a trace is 0.

    Source: Martens and Grosse (2015), section 6.3.
    """
    mean_a, mean_b = a.trace() / a.dim, b.trace() / b.dim
    pi = torch.where((mean_a > 0) & (mean_b > 0), mean_a.sqrt() / mean_b.sqrt(), 1.0)
    root = math.sqrt(tau)
    return pi * root, root / pi


def kronecker_inverse(
    a: Factor | None, b: Factor, tau: float, rule: str = "heuristic"
) -> tuple[Solve | None, Solve]:
    r"""The damped inverse of one block, as two functions: for the weight and for a separate bias.

        heuristic, factored   V -> (B + delta_B I)^-1 V (A + delta_A I)^-1
                              v -> (B + delta_B I)^-1 v
        exact                 V -> U_B [ (U_B^T V U_A) / (values_B values_A^T + tau) ] U_A^T
                              v -> (B + tau I)^-1 v

    Under the first two a separate bias is damped by the B that it shares with its weight (the
    convention of curvlinops); a bias whose weight is frozen (A is None) by tau. Where A or B is
    zero both inverses are I / tau.

    Args:
        a: Factor A, or None for a bias alone.
        b: Factor B.
        tau: damping + 2 l2.
        rule: ``"heuristic"``, ``"factored"`` or ``"exact"``.

    Returns:
        The function for V of shape (d1, d2), or None without A; the function for v, shape (d1, 1).

    Raises:
        ValueError: for an unknown rule, or if the damped block is singular.

    Cost: per factor the cube of the smaller of its dimension and its number of columns.
    """
    if rule not in RULES:
        raise ValueError(f"damping_rule: got {rule!r}, expected one of {', '.join(RULES)}")
    if tau == 0:
        _require_regular(b, a)
    if a is None:
        return None, b.damped(_scalar(tau, b))
    if rule == "exact":
        a, b = a.spectrum(), b.spectrum()
        outer = b.values[:, None] * a.values
        return eigenbasis_inverse(a, b, outer, tau), eigenbasis_inverse(None, b, b.values, tau)
    if rule == "heuristic":
        delta_a, delta_b = heuristic_damping(a, b, tau)
    else:
        delta_a = delta_b = _scalar(math.sqrt(tau), b)
    # A (x) B is zero if one of them is: then leave both out, and (sqrt(tau) I) (x) (sqrt(tau) I),
    # damping alone, remains.
    on = ((a.trace() > 0) & (b.trace() > 0)).to(delta_a.dtype)
    solve_a, solve_b = a.damped(delta_a, on), b.damped(delta_b, on)

    def weight(v):
        return solve_a(solve_b(v), right=True)

    def bias(v):
        return torch.where(on > 0, solve_b(v), v / tau if tau else v)

    return weight, bias


def eigenbasis_inverse(a: Spectrum | None, b: Spectrum, values: Tensor, tau: float) -> Solve:
    r"""V -> U_B [ (U_B^T V U_A) / (values + tau) ] U_A^T, and V / tau on what thin bases leave out.

    Args:
        a: Eigenbasis on the input side, r2 vectors; None for a bias.
        b: Eigenbasis on the output side, r1 vectors.
        values: Eigenvalues of the block in that basis, shape (r1, r2), or (r1,) for a bias.
        tau: damping + 2 l2.

    Returns:
        A function of V, shape (d1, d2), or (d1, 1) for a bias.

    Raises:
        ValueError: if tau is zero and an eigenvalue is zero to working precision.
    """
    thin = b.thin or (a is not None and a.thin)
    limit = values.numel() * torch.finfo(values.dtype).eps * values.max()
    if tau == 0 and (thin or bool(values.min() <= limit)):
        raise ValueError(
            "damping: is 0 and a Kronecker block is singular to working precision; "
            "give a positive damping or l2"
        )
    values = values if a is not None else values[:, None]
    inverse = 1 / (values + tau) - (1 / tau if thin else 0)

    def solve(v):
        out = in_basis(a, b, inverse, v)
        return out + v / tau if thin else out

    return solve


def _require_regular(*factors: Factor | None) -> None:
    """Without damping, refuse a spectrum that has no inverse; other forms meet it in Cholesky."""
    for f in factors:
        if isinstance(f, Spectrum):
            limit = f.values.numel() * torch.finfo(f.values.dtype).eps * f.values.max()
            if f.thin or bool(f.values.min() <= limit):
                raise ValueError(
                    f"damping: is 0 and a Kronecker factor of size {f.dim} is singular to working "
                    "precision; give a positive damping or l2"
                )


def in_basis(a: Spectrum | None, b: Spectrum, values: Tensor, v: Tensor) -> Tensor:
    """U_B [ values (U_B^T V U_A) ] U_A^T, entry by entry in the bracket; without U_A for a bias."""
    if a is None:
        return b.vectors @ (values * (b.vectors.T @ v))
    return b.vectors @ (values * (b.vectors.T @ v @ a.vectors)) @ a.vectors.T


def _scalar(value: float, like: Factor) -> Tensor:
    tensor = next(t for t in vars(like).values() if isinstance(t, Tensor))
    return torch.tensor(value, dtype=tensor.dtype, device=tensor.device)
