r"""One Kronecker product B (x) A: three forms of a factor, damping, and the inverse product.

    (B (x) A) vec V = vec(B V A),      (B (x) A)^-1 vec V = vec(B^-1 V A^-1)

with vec row by row, as theta holds a weight (column by column it would be A (x) B).

Damping tau, by one of three rules:

    heuristic   (B + sqrt(tau)/pi I) (x) (A + pi sqrt(tau) I),  pi^2 = (tr A / d2) / (tr B / d1)
    factored    the same with pi = 1
    exact       B (x) A + tau I, in the eigenbases of A and B

A factor of rank R < d is never formed: the Woodbury identity solves it in its R columns
(`Columns`). Nothing is inverted: Cholesky factors solve.

What J v reads of V is its product with the inputs x. Where A = s X X^T and x = X, the push-through
identity gives it in R dimensions, and 1 / delta, which is what float32 loses, does not occur:

    V (s X X^T + delta I)^-1 X = (V X) (s X^T X + delta I)^-1
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import InitVar, dataclass, field
from functools import cache, cached_property, partial

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Columns",
    "DampedFactor",
    "EigenbasisInverse",
    "Factorisations",
    "FactoredInverse",
    "Matrix",
    "Spectrum",
    "batched",
    "heuristic_damping",
    "in_basis",
    "kronecker_inverse",
    "same_memory",
    "set_threads",
    "spectra",
]

Solve = Callable[..., Tensor]
RULES = ("heuristic", "factored", "exact")
NARROW = 0.7  # columns are kept where there are fewer than this many times d (measured)
MANY = 1024  # from this size on one after the other: cuSOLVER's batches are made for small ones
LARGE = 64  # from this size on NumPy's symmetric product and SciPy's Cholesky pay (measured)
_NO_INVERSE = (  # one sentence: whether a factor or the block notices hangs on the last digits
    "damping: is 0 and a Kronecker block is singular to working precision; give a positive damping "
    "or l2"
)


# ------------------------------------------------------------------ the three forms


@dataclass
class Matrix:
    """F as a matrix, shape (d, d); solved by Cholesky, d^3 / 3."""

    matrix: Tensor
    inputs = None  # the columns that F is made of, where they are known

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

    def eigenproblem(self):
        """The matrix to diagonalise, and what makes the spectrum from its eigenpairs."""
        return self.matrix, Spectrum

    def damped(self, delta: Tensor, on: Tensor | float = 1.0, group=None) -> "DampedFactor":
        """(on F + delta I)^-1, to be applied from either side; see `DampedFactor`.

        Args:
            delta: Damping.
            on: 1, or 0 to leave F out.
            group: `Factorisations` that will factor it, with others; None to factor it here.

        Raises:
            ValueError: if on F + delta I is not positive definite to working precision.
        """
        return _factored(_DampedMatrix(), self.matrix, delta, on, group)


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

    @property
    def inputs(self) -> Tensor:
        """The columns that F is made of."""
        return self.columns

    @cached_property
    def gram(self) -> Tensor:
        """X^T X, shape (R, R)."""
        return _gram(self.columns.T)

    def dense(self) -> Tensor:
        """Return F, formed."""
        return self.scale * (self.columns @ self.columns.T)

    def spectrum(self) -> "Spectrum":
        """The R eigenpairs that may differ from zero: X = Q T, T T^T diagonalised."""
        small, finish = self.eigenproblem()
        return finish(*_eigh(small))

    def eigenproblem(self):
        """The matrix to diagonalise, (R, R), and what makes the spectrum from its eigenpairs."""
        q, t = torch.linalg.qr(self.columns)

        def finish(values, rotation):
            return Spectrum(values, q @ rotation).keep(self.columns, rotation.T @ t)

        return self.scale * (t @ t.T), finish

    def damped(self, delta: Tensor, on: Tensor | float = 1.0, group=None) -> "DampedFactor":
        """As `Matrix.damped`; delta must be positive, for F alone has no inverse."""
        solve = _DampedColumns(self.columns, self.scale, delta, on)
        return _factored(solve, self.gram, delta / self.scale, on, group)


@dataclass
class Spectrum:
    """F = U diag(values) U^T, U of shape (d, r) with orthonormal columns, r <= d."""

    values: Tensor
    vectors: Tensor
    _kept = None  # (X, its version, U^T X); no field, so no part of a saved state

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

    def keep(self, x: Tensor, along: Tensor | None = None) -> "Spectrum":
        """Keep U^T X for the columns X that F was made of, so that `coordinates` knows it.

        Args:
            x: X, shape (d, R), with F a multiple of X X^T: then X lies in the span of U.
            along: U^T X, shape (r, R), if it is known; else it is computed.

        Returns:
            Itself.
        """
        self._kept = x, x._version, self.vectors.T @ x if along is None else along
        return self

    @property
    def inputs(self) -> Tensor | None:
        """The columns that F is made of, if `keep` was given them and they have not changed."""
        known = self._kept is not None and self._kept[1] == self._kept[0]._version
        return self._kept[0] if known else None

    def coordinates(self, x: Tensor) -> Tensor | None:
        """U^T x, shape (r, R), if x is what `keep` was given, unchanged since; else None."""
        if self._kept is None or not same_memory(self._kept[0], x) or self._kept[1] != x._version:
            return None
        return self._kept[2]

    def damped(self, delta: Tensor, on: Tensor | float = 1.0, group=None) -> "DampedFactor":
        """As `Matrix.damped`; nothing is left to factor."""
        return _DampedSpectrum(self, 1 / (on * self.values + delta), 1 / delta if self.thin else 0)


FORMS = {form.__name__: form for form in (Matrix, Columns, Spectrum)}
Factor = Matrix | Columns | Spectrum


# ------------------------------------------------------------------ their damped inverses


class DampedFactor:
    """V -> (on F + delta I)^-1 V, or V (on F + delta I)^-1 if called with ``right=True``."""

    def __call__(self, v: Tensor, right: bool = False) -> Tensor:
        """Apply from the left, or from the right."""
        return self.right(v) if right else self.left(v)

    def left(self, v: Tensor) -> Tensor:
        """(on F + delta I)^-1 V."""
        raise NotImplementedError

    def right(self, v: Tensor) -> Tensor:
        """V (on F + delta I)^-1; it is symmetric, so this is ((on F + delta I)^-1 V^T)^T."""
        return self.left(v.T).T

    def through(self, v: Tensor, x: Tensor) -> Tensor:
        """V (on F + delta I)^-1 x for x of shape (d, R): for F's own columns by push-through.

        Cost: that of the fewer of V's rows and x's columns, and of one product with them; for F's
        own columns V X and a solve in their R dimensions.
        """
        return self.right(v) @ x if len(v) <= x.shape[1] else v @ self.left(x)


@dataclass
class _DampedMatrix(DampedFactor):
    chol: Tensor | None = None  # of on F + delta I

    def left(self, v):
        return torch.cholesky_solve(v, self.chol)


@dataclass
class _DampedColumns(DampedFactor):
    columns: Tensor
    scale: float
    delta: Tensor
    on: Tensor | float
    chol: Tensor | None = None  # of on X^T X + (delta / scale) I

    def left(self, v):
        inner = self.on * torch.cholesky_solve(self.columns.T @ v, self.chol)
        return torch.addmm(v, self.columns, inner, alpha=-1).div_(self.delta)

    def right(self, v):  # written out, so that the large V is not transposed
        inner = self.on * torch.cholesky_solve((v @ self.columns).T, self.chol).T
        return torch.addmm(v, inner, self.columns.T, alpha=-1).div_(self.delta)

    def through(self, v, x):
        if not same_memory(x, self.columns):
            return super().through(v, x)
        return torch.cholesky_solve((v @ x).T, self.chol).T / self.scale


@dataclass
class _DampedSpectrum(DampedFactor):
    basis: Spectrum
    inverse: Tensor  # 1 / (on values + delta)
    outside: Tensor | int  # 1 / delta, the inverse on what a thin basis leaves out; else 0

    def left(self, v):
        u = self.basis.vectors
        out = u @ ((self.inverse - self.outside)[:, None] * (u.T @ v))
        return out + self.outside * v if self.basis.thin else out

    def right(self, v):  # by rows: V is wide, and its transpose would be copied
        u = self.basis.vectors
        out = (v @ u * (self.inverse - self.outside)) @ u.T
        return out + self.outside * v if self.basis.thin else out

    def through(self, v, x):
        along = self.basis.coordinates(x)
        if along is None:
            return super().through(v, x)
        return (v @ self.basis.vectors * self.inverse) @ along


def same_memory(a: Tensor, b: Tensor) -> bool:
    """True if both are the same view of the same memory; their contents then change together."""
    return a is b or (
        (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
    )


# ------------------------------------------------------------------ symmetric algebra


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    _require_finite_factor(matrix)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # in float32, many eigenvalues near zero can stop LAPACK
        if matrix.dtype != torch.float32:
            raise
        values, vectors = (part.to(matrix.dtype) for part in torch.linalg.eigh(matrix.double()))
    return values.clamp(min=0), vectors  # F is a second moment: what is below zero is rounding


def spectra(factors: list["Factor | None"]) -> list["Spectrum | None"]:
    """`Matrix.spectrum` of each; where `batched`, one ``eigh`` for all of a shape.

    Raises:
        ValueError: if one holds NaN or infinity.
    """
    todo = [k for k, f in enumerate(factors) if isinstance(f, Matrix | Columns)]
    if not (todo and batched(_tensor_of(factors[todo[0]]))):
        return [f and f.spectrum() for f in factors]
    done, problems = list(factors), {k: factors[k].eigenproblem() for k in todo}
    _require_finite_factor(*(small for small, _ in problems.values()))
    for group in _by_shape(todo, lambda k: problems[k][0]):
        pairs = _eigh_of_all([problems[k][0] for k in group])
        for k, values, vectors in zip(group, *pairs, strict=True):
            done[k] = problems[k][1](values, vectors)
    return done


def _eigh_of_all(matrices: list[Tensor]) -> tuple:
    try:
        values, vectors = torch.linalg.eigh(torch.stack(matrices))
    except torch.linalg.LinAlgError:  # of one of them
        return tuple(zip(*map(_eigh, matrices), strict=True))
    return values.clamp(min=0), vectors


def _by_shape(items: Iterable, matrix: Callable) -> Iterable[list]:
    """The items in groups of which all have a matrix of the same shape and dtype."""
    groups: dict[tuple, list] = {}
    for item in items:
        groups.setdefault((matrix(item).shape, matrix(item).dtype), []).append(item)
    return groups.values()


@dataclass
class _Wanted:
    name: str
    solve: DampedFactor
    matrix: Tensor
    delta: Tensor
    on: Tensor | float


class Factorisations:
    """Cholesky factors that are asked for one by one and made together, without a look between.

    `run` stacks all matrices of a shape and factors them in one call; large ones, `MANY` and more,
    one after the other. What failed is NaN, so that nobody takes it for a result. `require_sound`
    is the one wait: it repeats what failed as `_cholesky` does it, alone and in float64.

    Attributes:
        name: What errors call the layer that asks.
        failed: After `run`: for each matrix whether it failed, bool, shape (number of them,).
    """

    def __init__(self):
        self.name, self.wanted = "", []
        self.failed: Tensor | None = None

    def ask(self, solve: DampedFactor, matrix: Tensor, delta: Tensor, on: Tensor | float) -> None:
        """Note that ``solve.chol`` is to be the factor of on matrix + delta I."""
        self.wanted.append(_Wanted(self.name, solve, matrix, delta, on))

    def run(self) -> None:
        """Make all that was asked for, at least one."""
        groups = []
        for group in _by_shape(self.wanted, lambda one: one.matrix):
            large = len(group[0].matrix) >= MANY
            groups += [[one] for one in group] if large else [group]
        self.wanted = [one for group in groups for one in group]
        self.failed = torch.cat([_factor(group) for group in groups])

    def faulty(self) -> Tensor:
        """Whether any failed; bool, shape (), without a wait for the device."""
        return self.failed.any()

    def require_sound(self) -> bool:
        """Look, and factor again what failed; True if there was something.

        Raises:
            ValueError: naming the layer, if one is singular in float64, too.
        """
        bad = [one for one, f in zip(self.wanted, self.failed.tolist(), strict=True) if f]
        for one in bad:
            try:
                one.solve.chol.copy_(_cholesky(one.on * one.matrix, one.delta))
            except ValueError as error:
                raise ValueError(f"{error} (layer {one.name!r})") from None
        self.failed.zero_()
        return bool(bad)


def _factor(group: list[_Wanted]) -> Tensor:
    """Factor matrices of one shape in one call, and say which failed."""
    damped = torch.stack([one.on * one.matrix for one in group])
    damped.diagonal(dim1=1, dim2=2).add_(torch.stack([one.delta for one in group])[:, None])
    chols, info = torch.linalg.cholesky_ex(damped)
    failed = (info > 0) | ~torch.isfinite(chols[:, -1, -1])  # where NaN ends up, whatever info says
    chols.masked_fill_(failed[:, None, None], math.nan)
    for one, chol in zip(group, chols, strict=True):
        one.solve.chol = chol
    return failed


def _factored(solve, matrix, delta, on, group: Factorisations | None) -> DampedFactor:
    """The solve with its factor of on matrix + delta I: made here, or asked for."""
    if group is None:
        solve.chol = _cholesky(on * matrix, delta)
    else:
        group.ask(solve, matrix, delta, on)
    return solve


def _cholesky(matrix: Tensor, delta: Tensor) -> Tensor:
    """Cholesky factor of matrix + delta I, written over matrix; float64 where float32 fails."""
    damped = matrix
    damped.diagonal().add_(delta)
    chol, failed = _potrf(damped)
    if failed and matrix.dtype == torch.float32:
        chol, failed = _potrf(damped.double())
        chol = chol.to(matrix.dtype)
    if failed:
        _require_finite_factor(damped)
        raise ValueError(
            f"damping: {float(delta):.3g} on a Kronecker factor of size {len(matrix)} leaves it "
            "singular to working precision; give a larger damping or l2"
        )
    return chol


def _require_finite_factor(*matrices: Tensor) -> None:
    if not bool(torch.stack([torch.isfinite(matrix).all() for matrix in matrices]).all()):
        raise ValueError("KFAC: a factor holds NaN or infinity; are the inputs of a huge scale?")


def _potrf(matrix: Tensor) -> tuple[Tensor, bool]:
    """Cholesky factor, in the lower triangle, and whether it failed; then the matrix is as before.

    LAPACK writes over the triangle that it reads, and the other one still has what was there.
    """
    if not _numpy_pays(matrix):
        chol, failed = torch.linalg.cholesky_ex(matrix)
        return chol, bool(failed)
    from scipy.linalg import lapack

    potrf = lapack.spotrf if matrix.dtype == torch.float32 else lapack.dpotrf
    diagonal, chol = matrix.diagonal().clone(), matrix.T  # LAPACK counts by columns
    _, failed = potrf(chol.numpy(), lower=1, clean=0, overwrite_a=1)
    if failed or not math.isfinite(float(chol[-1, -1])):
        chol.copy_(chol.triu(1) + chol.triu(1).T)
        chol.diagonal().copy_(diagonal)
        return chol, True
    return chol, False


def _gram(x: Tensor) -> Tensor:
    """X X^T, of which half is computed and half copied: by NumPy, or in blocks (torch has none)."""
    if _numpy_pays(x):
        rows = x.numpy()
        return torch.from_numpy(np.dot(rows, rows.T))  # NumPy sees that it is symmetric: SYRK
    half = len(x) // 2
    if half < 256:
        return x @ x.T
    top, bottom = x[:half], x[half:]
    out = x.new_empty(len(x), len(x))
    out[:half, :half], out[half:, half:] = _gram(top), _gram(bottom)
    torch.mm(bottom, top.T, out=out[half:, :half])
    out[:half, half:] = out[half:, :half].T
    return out


in_batches = False  # True: on a CPU, too


def batched(like: Tensor) -> bool:
    """True where matrices are factored together: not on a CPU, which gains nothing by holding all.

    Elsewhere a call costs more than a small factorisation, and a look between two waits for both.
    """
    return in_batches or like.device.type != "cpu"


in_numpy = True  # False: torch alone (`experiment.bench.flops` sees torch's operations only)


def set_threads(threads: int) -> None:
    """Hold torch to a number of threads, and NumPy and SciPy too, which do not ask torch."""
    torch.set_num_threads(threads)
    for library in _blas():
        library.set_num_threads(threads)


def _numpy_pays(x: Tensor) -> bool:
    """True where NumPy and SciPy are quicker: large matrices on a CPU, one thread everywhere.

    With more threads theirs and torch's wait for each other at every call, busily: on two shared
    cores a product then took up to fifteen times as long.
    """
    return (
        in_numpy
        and len(x) >= LARGE
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not x.requires_grad
        and torch.get_num_threads() == 1
        and {library.num_threads for library in _blas()} == {1}
    )


@cache
def _blas() -> list:
    """The BLAS libraries of NumPy and SciPy, of which threadpoolctl knows the threads."""
    import scipy.linalg.lapack  # noqa: F401 (brings its own)

    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return []
    return ThreadpoolController().select(user_api="blas").lib_controllers


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

    Example:
        >>> from bilevel_lite.kronecker import Matrix, heuristic_damping
        >>> a, b = Matrix(torch.diag(torch.tensor([4.0, 4.0]))), Matrix(torch.tensor([[1.0]]))
        >>> heuristic_damping(a, b, tau=0.01)  # pi = 2
        (tensor(0.2000), tensor(0.0500))
    """
    mean_a, mean_b = a.trace() / a.dim, b.trace() / b.dim
    zero = ~((mean_a > 0) & (mean_b > 0))
    pi = (mean_a.sqrt() / mean_b.sqrt()).masked_fill(zero, 1.0)
    root = math.sqrt(tau)
    return pi * root, root / pi


@dataclass
class FactoredInverse:
    """V -> (on B + delta_B I)^-1 V (on A + delta_A I)^-1: the damped inverse of one block."""

    a: DampedFactor
    b: DampedFactor

    def __call__(self, v: Tensor) -> Tensor:
        """The damped inverse times V, shape (d1, d2)."""
        return self.a(self.b(v), right=True)

    def along(self, v: Tensor, x: Tensor) -> Tensor:
        """The same times x, shape (d1, R), for inputs x of shape (d2, R).

        Cost: where x are the columns of A, d1 d2 R and solves in the R dimensions; the (d1, d2)
        result is then never formed.
        """
        if x.shape[1] <= len(x):
            return self.b(self.a.through(v, x))
        return self.a.through(self.b(v), x)


@dataclass
class EigenbasisInverse:
    r"""V -> U_B [ (U_B^T V U_A) / (values + tau) ] U_A^T, and V / tau on what thin bases leave out.

    Args:
        a: Eigenbasis on the input side, r2 vectors; None for a bias.
        b: Eigenbasis on the output side, r1 vectors.
        values: Eigenvalues of the block in that basis, shape (r1, r2), or (r1,) for a bias.
        tau: damping + 2 l2.

    Raises:
        ValueError: if tau is zero and an eigenvalue is zero to working precision.
    """

    a: Spectrum | None
    b: Spectrum
    values: InitVar[Tensor]
    tau: float
    inverse: Tensor = field(init=False)  # 1 / (values + tau)

    def __post_init__(self, values: Tensor):
        self.thin = self.b.thin or (self.a is not None and self.a.thin)
        if self.tau == 0 and (self.thin or _singular(values)):
            raise ValueError(_NO_INVERSE)
        values = values if self.a is not None else values[:, None]
        self.inverse = 1 / (values + self.tau)

    def __call__(self, v: Tensor) -> Tensor:
        """The damped inverse times V, shape (d1, d2), or (d1, 1) for a bias."""
        if not self.thin:
            return in_basis(self.a, self.b, self.inverse, v)
        return in_basis(self.a, self.b, self.inverse - 1 / self.tau, v) + v / self.tau

    def along(self, v: Tensor, x: Tensor) -> Tensor:
        """The same times x, shape (d1, R), for inputs x of shape (d2, R).

        Inputs that A was made of have no part outside of U_A, so a thin U_A leaves nothing out.
        """
        along = self.a.coordinates(x)
        if along is None:
            return self(v) @ x
        u, v = self.b.vectors, v @ self.a.vectors
        if not self.b.thin:
            return u @ (self.inverse * (u.T @ v)) @ along
        return (u @ ((self.inverse - 1 / self.tau) * (u.T @ v)) + v / self.tau) @ along


def kronecker_inverse(
    a: Factor | None,
    b: Factor,
    tau: float,
    rule: str = "heuristic",
    group: Factorisations | None = None,
    bias: bool = True,
) -> tuple[FactoredInverse | EigenbasisInverse | None, Solve | None]:
    r"""The damped inverse of one block, as two functions: for the weight and for a separate bias.

        heuristic, factored   V -> (B + delta_B I)^-1 V (A + delta_A I)^-1
                              v -> (B + delta_B I)^-1 v
        exact                 V -> U_B [ (U_B^T V U_A) / (values_B values_A^T + tau) ] U_A^T
                              v -> (B + tau I)^-1 v

    Under the first two a separate bias is damped by the B that it shares with its weight (the
    convention of curvlinops); a bias whose weight is frozen (A is None), or that alone is left
    where A is zero, by tau. Where A or B is zero the weight's inverse is I / tau.

    Args:
        a: Factor A, or None for a bias alone.
        b: Factor B.
        tau: damping + 2 l2.
        rule: ``"heuristic"``, ``"factored"`` or ``"exact"``.
        group: What factors A and B, with others'; the functions serve after its ``run``.
        bias: Whether there is a separate bias; False gives None in its function's place.

    Returns:
        The function for V of shape (d1, d2), or None without A, which also has ``along(V, x)``;
        the function for v, shape (d1, 1). Both can be copied and pickled.

    Raises:
        ValueError: for an unknown rule, or if the damped block is singular.

    Cost: per factor the cube of the smaller of its dimension and its number of columns.

    Example:
        >>> from bilevel_lite.kronecker import Matrix, kronecker_inverse
        >>> a, b = Matrix(torch.diag(torch.tensor([4.0, 4.0]))), Matrix(torch.tensor([[1.0]]))
        >>> weight, bias = kronecker_inverse(a, b, tau=0.01)
        >>> weight(torch.ones(1, 2)).round(decimals=4)  # 1 / (4.2 * 1.05)
        tensor([[0.2268, 0.2268]])
    """
    if rule not in RULES:
        raise ValueError(f"damping_rule: got {rule!r}, expected one of {', '.join(RULES)}")
    if tau == 0:
        _require_regular(b, a)
    if a is None:
        return None, b.damped(_scalar(tau, b), 1.0, group)
    if rule == "exact":
        a, b = a.spectrum(), b.spectrum()
        outer = b.values[:, None] * a.values
        return EigenbasisInverse(a, b, outer, tau), EigenbasisInverse(None, b, b.values, tau)
    if rule == "heuristic":
        delta_a, delta_b = heuristic_damping(a, b, tau)
    else:
        delta_a = delta_b = _scalar(math.sqrt(tau), b)
    # B (x) A is zero if one of them is: then leave both out, and (sqrt(tau) I) (x) (sqrt(tau) I),
    # damping alone, remains.
    on = ((a.trace() > 0) & (b.trace() > 0)).to(delta_a.dtype)
    weight = FactoredInverse(a.damped(delta_a, on, group), b.damped(delta_b, on, group))
    if not bias:
        return weight, None
    if not batched(on):  # a look costs nothing there
        return weight, weight.b if bool(on) else b.damped(_scalar(tau, b))
    alone = b.damped(_scalar(tau, b), 1.0, group) if tau else weight.b
    return weight, partial(_bias_inverse, weight.b, alone, on)


def _bias_inverse(b: DampedFactor, alone: DampedFactor, on: Tensor, v: Tensor) -> Tensor:
    return torch.where(on > 0, b(v), alone(v))


def _require_regular(*factors: Factor | None) -> None:
    """Without damping, refuse a spectrum that has no inverse; other forms meet it in Cholesky."""
    for f in factors:
        if isinstance(f, Spectrum) and (f.thin or _singular(f.values)):
            raise ValueError(_NO_INVERSE)


def _singular(values: Tensor) -> bool:
    """True if an eigenvalue is zero to working precision."""
    return bool(values.min() <= values.numel() * torch.finfo(values.dtype).eps * values.max())


def in_basis(a: Spectrum | None, b: Spectrum, values: Tensor, v: Tensor) -> Tensor:
    """U_B [ values (U_B^T V U_A) ] U_A^T, entry by entry in the bracket; without U_A for a bias."""
    if a is None:
        return b.vectors @ (values * (b.vectors.T @ v))
    return b.vectors @ (values * (b.vectors.T @ v @ a.vectors)) @ a.vectors.T


def _scalar(value: float, like: Factor) -> Tensor:
    return _tensor_of(like).new_full((), value)


def _tensor_of(f: Factor) -> Tensor:
    return next(t for t in vars(f).values() if isinstance(t, Tensor))
