"""What acts on one layer's part of a vector, and KFAC's whole matrix as an operator."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.curvature import Operator, Probes
from bilevel_lite.factors import Estimate, arrange, estimate
from bilevel_lite.kronecker import Solve
from bilevel_lite.risk import SumOfRisks, Term, WeightedRisk
from bilevel_lite.tape import Call, Layer, along, output_columns, places_of, split_parameters

__all__ = [
    "Block",
    "DiagonalBlock",
    "block_operator",
    "kfac_operator",
    "layers_of",
]


@dataclass
class Block:
    """What acts on one layer's part of a vector: the block, or its damped inverse.

    ``columns`` are the inputs that A was made of, where A knows them.
    """

    layer: Layer
    weight: Any
    bias: Solve
    columns: Tensor | None = None

    def __call__(self, b: Tensor, out: Tensor) -> None:
        """Write this block's part of v into ``out``."""
        self.layer.write(out, *self.solved(b))

    def solved(self, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """This block's part of v, as the layer reads it: V and a separate bias."""
        weight, bias = self.layer.read(b)
        return (
            None if weight is None else self.weight(weight),
            None if bias is None else self.bias(bias),
        )

    def slopes(self, done: Estimate, b: Tensor, v: Tensor | None) -> Tensor | float:
        """This layer's part of < grad l_i, v >, shape (n,): sum of g_i . (V a_i), from the tape.

        V a_i without V where A knows its inputs: (B^-1 V A^-1) X, in their own dimensions.
        """
        one, layer = done.only(self.layer)
        (call,), (g,) = one.tape.calls[layer.name], one.own[layer.name]
        columns = None if g is None or self.columns is None else output_columns(call.module, g)
        # as many as A has: no mask left one out
        if columns is not None and columns.shape[1] == self.columns.shape[1]:
            weight, bias = self.layer.read(b)
            z = self.weight.along(weight, self.columns)
            z = z if bias is None else z + self.bias(bias)
            return (columns * z).sum(0).view(one.tape.n, -1).sum(1)
        weight, bias = layer.split(*(self.solved(b) if v is None else self.layer.read(v)))
        params = {} if weight is None else {"weight": weight}
        if bias is not None:
            params["bias"] = bias
        return one.tape.slopes_of(layer.name, one.own, lambda call: along(call, params))


@dataclass
class DiagonalBlock:
    """The same for a diagonal block, by its factor; with ``factor`` None, the result is 0."""

    name: str
    place: slice
    factor: Tensor | float | None

    def __call__(self, b: Tensor, out: Tensor) -> None:
        """Write this block's part of v into ``out``."""
        out[self.place] = 0 if self.factor is None else self.factor * b[self.place]

    def slopes(self, done: Estimate, b: Tensor, v: Tensor | None) -> Tensor | float:
        """This parameter's part of < grad l_i, v >, shape (n,), from the tape."""
        if self.factor is None:
            return 0.0
        (one,) = done.passes
        direction = self.factor * b[self.place]
        return sum(
            one.tape.slopes_of(owner, one.own, partial(self._along, local, direction))
            for owner, local in one.tape.rest[self.name][1]
            if owner in one.tape.calls
        )

    @staticmethod
    def _along(local: str, direction: Tensor, call: Call) -> Tensor:
        return along(call, {local: direction.view(call.module._parameters[local].shape)})


# ------------------------------------------------------------------ as an operator


def kfac_operator(
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
    """The undamped KFAC matrix as an `Operator`: B (x) A blocks, diagonal rest, plus 2 l2 I.

    The arguments and errors are those of `kfac_factors`; ``rest`` is that of `KFAC`.

    Cost: a product costs B V A per layer; the build costs what `kfac_factors` costs.

    Example:
        >>> from bilevel_lite.blocks import kfac_operator
        >>> risk = bl.WeightedRisk(torch.nn.Linear(1, 2, bias=False))
        >>> theta = torch.tensor([3.0, 1.0]).log()  # so that the probabilities are 3/4 and 1/4
        >>> at = torch.zeros(0), theta, (torch.ones(1, 1), torch.tensor([0]))
        >>> kfac_operator(risk, *at, fisher="exact") @ torch.eye(2)
        tensor([[ 0.1875, -0.1875],
                [-0.1875,  0.1875]])
    """
    how = Probes(fisher, samples, generator)
    done = estimate(risk, lam, theta, batch, how, bias, rest, dual=False)
    return block_operator(_kronecker, done, risk, theta)


def _kronecker(done: Estimate, layer: Layer) -> Block:
    """V -> B V A, and v -> B v for a separate bias."""
    a, b = done.a(layer), done.b(layer).dense()
    weight = None if a is None else partial(_sandwich, b, a.dense())
    return Block(layer, weight, partial(torch.matmul, b))


def _sandwich(b: Tensor, a: Tensor, v: Tensor) -> Tensor:
    return b @ v @ a


def block_operator(
    block: Callable[[Estimate, Layer], Block], done: Estimate, risk: WeightedRisk, theta: Tensor
) -> Operator:
    """A block a layer, the diagonals of an estimate, and 2 l2 I, as one `Operator`."""
    blocks: list[Any] = [block(done, layer) for layer in done.layers]
    blocks += [DiagonalBlock(name, done.rest[name], d) for name, d in done.diagonal.items()]

    def matvec(v):
        out = torch.zeros_like(v)
        for one in blocks:
            one(v, out)
        return out + 2 * risk.l2 * v

    return Operator(matvec, theta)


def layers_of(
    risk: WeightedRisk | SumOfRisks, bias: str, wanted: set[str]
) -> tuple[list[Layer], dict[str, slice]]:
    """The layers of these names, and the rest, without a pass."""
    if isinstance(risk, WeightedRisk):
        terms = [Term(risk, None)]
    else:
        terms = [Term(r, None, 1.0, part) for r, part in zip(risk.risks, risk.parts, strict=True)]
    splits = []
    for term in terms:
        modules = dict(term.risk.model.named_modules())
        splits.append(split_parameters(places_of(term.risk.model), modules, set(modules), bias))
    layers, _, rest, _ = arrange(risk, terms, splits)
    for layer in [one for one in layers if one.name not in wanted]:
        for part in ("weight", "bias"):
            if getattr(layer, part) is not None:
                rest[f"{layer.name}.{part}".lstrip(".")] = getattr(layer, part)
    return [layer for layer in layers if layer.name in wanted], rest
