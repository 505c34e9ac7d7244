r"""EKFAC: keep KFAC's eigenbasis, replace its eigenvalues by the true second moments along it.

    A = U_A S_A U_A^T,  B = U_B S_B U_B^T                        (the factors of KFAC)
    E_jk = (1/n) sum_i [ (U_B^T G_i U_A)_jk ]^2                  (G_i the gradient of example i)
    v-block = U_B [ (U_B^T V U_A) / (E + tau) ] U_A^T,           tau = damping + 2 l2

In the basis U_B (x) U_A the best diagonal in Frobenius norm is the matrix's own diagonal, which is
E: so EKFAC is never farther from the block of the same Fisher than KFAC. Damping is exact.

Where a factor has fewer columns than rows its basis is thin: every G_i lies in the space that the
basis spans, so E is zero outside, where v = V / tau.
"""

from dataclasses import field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.blocks import Block, block_operator
from bilevel_lite.curvature import Operator, Probes
from bilevel_lite.factors import Estimate, estimate
from bilevel_lite.kfac import KFAC
from bilevel_lite.kronecker import (
    Columns,
    EigenbasisInverse,
    Factor,
    Matrix,
    Spectrum,
    in_basis,
    spectra,
)
from bilevel_lite.options import again
from bilevel_lite.parallel import Group, dealt
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.tape import Layer, output_columns

__all__ = ["EKFAC", "ekfac_operator", "eigenvalue_correction"]

CHUNK = 2**24  # numbers held at once when per-example gradients are formed


def eigenvalue_correction(
    a: Tensor | None,
    gs: list[Tensor],
    u_a: Tensor | None,
    u_b: Tensor,
    n: int,
) -> Tensor:
    r"""Second moments of the per-example gradients along an eigenbasis.

        E_jk = (1/n) sum over examples and probes of [ (U_B^T G_i U_A)_jk ]^2
        G_i  = sum over positions of g a^T

    With one position an example the square of a product is the product of squares, and E is one
    matrix product. Otherwise the G_i are formed, some examples at once: in the basis already, or
    rotated afterwards, whichever takes fewer operations (with many positions the latter).

    Args:
        a: Inputs, shape (d2, n positions), examples outermost; None for a bias.
        gs: For each probe the output gradients, shape (d1, n positions).
        u_a: Basis on the input side, shape (d2, r2); None for a bias.
        u_b: Basis on the output side, shape (d1, r1).
        n: Number of examples.

    Returns:
        Shape (r1, r2), or (r1,) for a bias.

    Cost: with P positions an example, n times the smaller of P (d2 r2 + d1 r1 + r1 r2) and
    P d1 d2 + r1 d2 (d1 + r2) products of two numbers.
    Source: George et al. (2018), eq. 5.
    """
    if a is None:
        return sum(_by_example(u_b.T @ g, n).sum(2).square().sum(0) for g in gs) / n
    (d1, r1), (d2, r2), positions = u_b.shape, u_a.shape, a.shape[1] // n
    early = positions * (d2 * r2 + d1 * r1 + r1 * r2)
    late = positions * d1 * d2 + r1 * d2 * (d1 + r2)
    if positions > 1 and late < early:
        a = _by_example(a, n)
        return sum(_late(a, _by_example(g, n), u_a, u_b) for g in gs) / n
    a = _by_example(u_a.T @ a, n)
    return sum(_early(a, _by_example(u_b.T @ g, n)) for g in gs) / n


def _by_example(columns: Tensor, n: int) -> Tensor:
    """View (rows, n positions) as (n, rows, positions)."""
    return columns.reshape(len(columns), n, -1).transpose(0, 1)


def _early(a: Tensor, g: Tensor) -> Tensor:
    """Sum of squares of U_B^T G_i U_A from inputs and gradients that are in the basis already."""
    if a.shape[2] == 1:
        return g[..., 0].square().T @ a[..., 0].square()
    return sum(torch.bmm(x, y.mT).square().sum(0) for x, y in _some(g, a))


def _late(a: Tensor, g: Tensor, u_a: Tensor, u_b: Tensor) -> Tensor:
    """The same, with every G_i formed and then rotated."""
    return sum((u_b.T @ torch.bmm(x, y.mT) @ u_a).square().sum(0) for x, y in _some(g, a))


def _some(g: Tensor, a: Tensor):
    """Some examples at once, so that their gradients fit."""
    step = max(1, CHUNK // (a.shape[1] * g.shape[1]))
    return zip(g.split(step), a.split(step), strict=True)


def _corrected(
    done: Estimate, layer: Layer, a: Spectrum | None, b: Spectrum
) -> tuple[Tensor | None, Tensor | None]:
    """E for the weight (a joint bias in it) and for a separate bias; None where there is none."""
    weight = bias = None
    for one, own in done.uses[layer.name]:
        tape, c = one.tape, one.term.coefficient
        for name in tape.parameters_of(own):
            if name in tape.unlike:
                raise ValueError(
                    f"model: EKFAC needs each example's gradient, but for parameter {name!r} "
                    f"{tape.unlike[name]}; use KFAC, or write the model with the examples in the "
                    "first dimension, in the batch's order"
                )
        gs = [output_columns(own.module, grads[own.name]) for grads in one.gradients]
        if layer.weight is not None:
            x = tape.input_columns(own)
            part = c * eigenvalue_correction(x, gs, a.vectors, b.vectors, tape.n)
            part = part if done.part is None else done.part.total(part)
            weight = part if weight is None else weight + part
        if layer.bias is not None and not layer.joint:
            part = c * eigenvalue_correction(None, gs, None, b.vectors, tape.n)
            part = part if done.part is None else done.part.total(part)
            bias = part if bias is None else bias + part
    return weight, bias


class EKFAC(KFAC):
    r"""v = G^-1 b with G the EKFAC approximation, damped exactly; no iteration.

        v-block = U_B [ (U_B^T V U_A) / (E + tau) ] U_A^T,     tau = damping + 2 l2

    Of what ``rest``, ``fixed_batch`` and ``group`` do, see `KFAC`.

    Raises:
        ValueError, TypeError: as `KFAC`.

    Cost: (1 + probes) / 2 gradients where built, and two eigendecompositions a layer, each in the
    smaller of the factor's two spaces. Holds the output gradients of every probe at once.
    Source: George et al. (2018).

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> inner = bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=0.1)
        >>> problem = bl.BilevelProblem(inner, bl.WeightedRisk(model))
        >>> batch = torch.eye(2), torch.tensor([0, 1]), torch.arange(2)
        >>> at = problem, torch.ones(2), torch.zeros(6), batch, batch
        >>> bl.hypergradient(*at, solver=bl.EKFAC(fisher="exact", damping=0.1)).round(decimals=3)
        tensor([-0.2270, -0.2270])
        >>> bl.hypergradient(*at, solver=bl.Direct(damping=0.1)).round(decimals=3)  # the truth
        tensor([-0.2270, -0.2270])
    """

    damping: float = again(KFAC, "damping", help="delta, added to the curvature")
    ema: float = again(
        KFAC, "ema", help="Average of A and B, and so of the basis; E is of the current batch alone"
    )
    every: int = again(KFAC, "every", help="Calls for which basis and eigenvalues are kept")
    damping_rule: str = field(default="exact", init=False)
    split_inverses: bool = again(
        KFAC, "split_inverses",
        help="With a group, each process diagonalises some of the factors for all",
    )  # fmt: skip

    _keeps_gradients = True
    _sums_parts = False  # but the bases

    def _layer_factors(self, done, layers):
        pairs = super()._layer_factors(done, layers)
        factors = [f for pair in pairs for f in pair]
        split = done.part is not None and self.split_inverses
        if split:
            named = [(one.name, d**3) for one in done.layers for d in reversed(one.dims)]
            owners = dealt([cost for _, cost in named], done.part.group.size)
            wanted = {layer.name for layer in layers}
            mine = [k for (name, _), k in zip(named, owners, strict=True) if name in wanted]
            made = iter(_shared_spectra(factors, mine, done.part.group))
        else:
            made = iter(spectra(factors))
        del pairs, factors
        return [
            (a, b, *_corrected(done, layer, a, b))
            for layer, a, b in zip(layers, made, made, strict=True)
        ]

    def _block(self, layer, factors, tau, pending=None):
        """V -> U_B [ (U_B^T V U_A) / (E + tau) ] U_A^T for one layer."""
        a, b, weight, bias = factors
        try:
            return Block(
                layer,
                None if weight is None else EigenbasisInverse(a, b, weight, tau),
                None if bias is None else EigenbasisInverse(None, b, bias, tau),
                columns=None if a is None else a.inputs,
            )
        except ValueError as error:
            raise ValueError(f"{error} (layer {layer.name!r})") from None


def _shared_spectra(
    factors: list[Factor | None], owners: list[int], group: Group
) -> list[Spectrum | None]:
    """`bilevel_lite.kronecker.spectra`, each by its owner, who sends it to the others."""
    mine = [f if owner == group.rank else None for f, owner in zip(factors, owners, strict=True)]
    made = spectra(mine)
    for k, (f, owner) in enumerate(zip(factors, owners, strict=True)):
        if f is None:
            continue
        like, rank = _shape(f)
        whole = like.new_empty(1 + f.dim, rank)
        if made[k] is not None:
            whole = torch.cat([made[k].values[None], made[k].vectors])
        values, vectors = group.broadcast(whole, owner, "factors").split([1, f.dim])
        made[k] = Spectrum(values[0], vectors)
    return made


def _shape(f: Factor) -> tuple[Tensor, int]:
    """A tensor of the factor's kind, and how many eigenpairs it has."""
    if isinstance(f, Columns):
        return f.columns, f.columns.shape[1]
    return (f.matrix, f.dim) if isinstance(f, Matrix) else (f.vectors, len(f.values))


def ekfac_operator(
    risk: WeightedRisk,
    lam: Tensor,
    theta: Tensor,
    batch: Any,
    fisher: str = "mc",
    samples: int = 1,
    generator: torch.Generator | None = None,
    bias: str = "joint",
    rest: str = "diagonal",
) -> Operator:
    """The undamped EKFAC matrix as an `Operator`, with 2 l2 on the diagonal.

    The arguments and errors are those of `bilevel_lite.blocks.kfac_operator`.

    Cost: as an `EKFAC` solve.

    Example:
        >>> from bilevel_lite.ekfac import ekfac_operator
        >>> risk = bl.WeightedRisk(torch.nn.Linear(1, 2, bias=False))
        >>> theta = torch.tensor([3.0, 1.0]).log()  # so that the probabilities are 3/4 and 1/4
        >>> at = torch.zeros(0), theta, (torch.ones(1, 1), torch.tensor([0]))
        >>> (ekfac_operator(risk, *at, fisher="exact") @ torch.eye(2)).round(decimals=4)
        tensor([[ 0.1875, -0.1875],
                [-0.1875,  0.1875]])
    """
    how = Probes(fisher, samples, generator)
    done = estimate(risk, lam, theta, batch, how, bias, rest, dual=True, keep=True)
    return block_operator(_undamped, done, risk, theta)


def _undamped(done: Estimate, layer: Layer) -> Block:
    """V -> U_B [ (U_B^T V U_A) E ] U_A^T for one layer."""
    a = None if layer.weight is None else done.a(layer).spectrum()
    b = done.b(layer).spectrum()
    weight, bias = _corrected(done, layer, a, b)
    return Block(
        layer,
        None if weight is None else partial(in_basis, a, b, weight),
        None if bias is None else partial(in_basis, None, b, bias[:, None]),
    )
