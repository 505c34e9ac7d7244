r"""A and B of every layer, and the diagonals of the rest, from one remembered pass.

    A = mean of a a^T                        (d2 x d2, from the forward pass)
    B = (1/n) sum over positions of gamma gamma^T    (d1 x d1, gamma = (dz/doutputs)^T s, s a probe)

Where a risk is a sum of terms (`bilevel_lite.SumOfRisks`) each has its pass, and a layer that
several share has

    B = sum_k c_k B_k,     A = sum_k c_k A_k / sum_k c_k,     diagonals sum_k c_k d_k

which is the term's own block times c_k where one term has the layer, and the block of the whole
where one batch was cut into terms with c_k = n_k / n. Positions that the risk's mask calls padding
are left out of A; B needs no mask, since no gradient arrives there.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.curvature import OutputSide, Probes, output_side, require_risk
from bilevel_lite.kronecker import NARROW, Columns, Factor, Matrix, accumulate
from bilevel_lite.options import check, document, one_of
from bilevel_lite.parallel import Group, Part, Sharded, apart, part_of
from bilevel_lite.params import unflatten
from bilevel_lite.risk import SumOfRisks, Term, WeightedRisk, same_terms
from bilevel_lite.surroundings import way_out
from bilevel_lite.tape import Layer, Tape, output_columns, places_of, squared_gradients

__all__ = ["Estimate", "Layout", "arrange", "estimate", "kfac_factors"]


@document
@dataclass(frozen=True)
class Layout:
    """Which parameters have which block: options of KFAC and of all that is made of its factors."""

    bias: str = one_of(
        "joint", "separate",
        help="One block of [W, bias] (a has a 1 appended), or W's B (x) A and the bias's B",
    )  # fmt: skip
    rest: str = one_of(
        "diagonal", "damping", "drop",
        help="What parameters without a Kronecker block get, in this order: the diagonal of the "
        "same Fisher; v = b / tau; v = 0",
    )  # fmt: skip


@dataclass
class Pass:
    """One term's forward pass, its output probes, and what came back for the first of them."""

    term: Term
    tape: Tape
    side: OutputSide
    params: dict[str, Tensor]
    probes: list[Tensor]
    first: dict[str, list[Tensor]]
    own: dict[str, list[Tensor]] | None = None  # gradients of the examples' own losses
    b: dict[str, Factor] | None = None
    diagonal: dict[str, Tensor] | None = None
    gradients: list[dict[str, Tensor]] | None = None  # of each probe, if they are to be kept
    shares: bool = False  # the probe's gradients are those of the losses, weighted

    def grads(self, i: int) -> dict[str, list[Tensor]]:
        """Gradients of probe i at the layers' outputs; the graph is freed after the last one."""
        if self.own is not None and self.shares:  # the probe is sqrt(sigma_i) s_i
            weight = self.side.empirical_weight()
            return {name: [_weighted(g, weight) for g in gs] for name, gs in self.own.items()}
        if i == 0 and self.own is None:
            return self.first
        return self.tape.backward(self.probes[i], keep=i + 1 < len(self.probes))

    def a(self, layer: Layer, dual: bool) -> Factor:
        """Factor A of one layer in this term, from its inputs, padding left out."""
        x, real = self.tape.input_columns(layer), _real(self.term, self.tape, layer)
        x = x if real is None else x[:, real]
        rows = x.shape[1]  # none, where a layer was called without examples: then A is zero
        return accumulate(None, x, 1 / max(1, rows), dual and 0 < rows < NARROW * len(x))


def _real(term: Term, tape: Tape, layer: Layer) -> Tensor | None:
    """Which of a layer's columns are no padding, bool; None if all."""
    mask, places = term.risk.unpadded(term.batch), tape.places_of(layer)
    # a head on pooled texts has (n,): its columns are texts, also where its width is T
    if mask is None or places[: mask.dim()] != mask.shape:
        return None
    real = mask.reshape(*mask.shape, *[1] * (len(places) - mask.dim()))
    return real.expand(places).flatten()


def _part(group: Group, term: Term, tape: Tape) -> Part:
    """How many examples there are in all, and columns of each layer's A and B."""
    columns = {}
    for layer in tape.layers:
        real, places = _real(term, tape, layer), math.prod(tape.places_of(layer))
        columns[layer.name, "a"] = places if real is None else int(real.sum())
        columns[layer.name, "b"] = places
    return part_of(group, tape.n, columns, tape.theta)


@dataclass
class Estimate:
    """What the passes estimate; layers and rest by their places in theta.

    Where processes share the batch, ``part`` says which rows are here: A, B and the diagonals are
    those of the whole batch, in all processes, and what is read from a pass is of these rows.
    """

    passes: list[Pass]
    layers: list[Layer]
    uses: dict[str, list[tuple[Pass, Layer]]]  # layer -> where it is used, as the term knows it
    rest: dict[str, slice]
    diagonal: dict[str, Tensor]
    dual: bool
    part: Part | None = None

    @property
    def probes(self) -> int:
        """Backward passes that the estimate took, at most, of one term."""
        return max(len(one.probes) for one in self.passes)

    def a(self, layer: Layer) -> Factor | None:
        """Factor A of one layer; formed when asked for, one layer at a time."""
        if layer.weight is None:
            return None
        parts = [(p.term.coefficient, p.a(own, self.dual)) for p, own in self.uses[layer.name]]
        made = _combined(parts, mean=True)
        if self.part is None:
            return made
        columns = self._columns(layer, "a")
        total = max(1, sum(columns))
        return self._whole(made, columns[self.part.group.rank] / total, 1 / total, columns)

    def b(self, layer: Layer) -> Factor:
        """Factor B of one layer."""
        parts = [(p.term.coefficient, p.b[o.name]) for p, o in self.uses[layer.name]]
        made = _combined(parts)
        if self.part is None:
            return made
        columns = [self.probes * k for k in self._columns(layer, "b")]
        return self._whole(made, self.part.share, 1 / self.part.n, columns)

    def _columns(self, layer: Layer, factor: str) -> list[int]:
        """How many columns each process has for one probe, counted under the pass's own name."""
        (_, own), *_ = self.uses[layer.name]
        return self.part.columns[own.name, factor]

    def _whole(self, own: Factor, share: float, scale: float, columns: list[int]) -> Factor:
        """A factor of the whole batch: its columns gathered where they are few, else summed.

        Args:
            own: That of the rows here.
            share: Its weight in the sum.
            scale: Of the columns in the whole.
            columns: How many each process has.
        """
        if self.dual and 0 < sum(columns) < NARROW * own.dim:
            mine = own.columns if isinstance(own, Columns) else own.dense()[:, :0]
            return Columns(self.part.group.gather(mine.T, "factors", columns).T, scale)
        return Matrix(self.part.group.sum(share * own.dense(), "factors"))

    def only(self, layer: Layer) -> tuple[Pass, Layer] | None:
        """The one pass that has this layer, and the layer as it knows it; None if several do."""
        uses = self.uses[layer.name]
        return uses[0] if len(uses) == 1 else None


def _combined(parts: list[tuple[float, Factor]], mean: bool = False) -> Factor:
    """sum_k c_k F_k, or that over sum_k c_k."""
    total = sum(c for c, _ in parts) if mean else 1.0
    if len(parts) == 1:
        c = 1.0 if mean else parts[0][0]
        return parts[0][1] if c == 1 else _scaled(parts[0][1], c)
    if not total:  # every term is switched off: any mean will do, for B is zero
        parts, total = [(1.0, f) for _, f in parts], float(len(parts))
    return Matrix(sum(c / total * f.dense() for c, f in parts))


def _scaled(f: Factor, c: float) -> Factor:
    if isinstance(f, Matrix):
        return Matrix(c * f.matrix)
    return (
        replace(f, scale=c * f.scale) if isinstance(f, Columns) else replace(f, values=c * f.values)
    )


@way_out()
def estimate(
    risk: WeightedRisk | SumOfRisks | Sharded,
    lam: Tensor,
    theta: Tensor,
    batch: Any,
    how: Probes,
    bias: str = "joint",
    rest: str = "diagonal",
    dual: bool = True,
    keep: bool = False,
    true: bool = False,
    look: bool = True,
) -> Estimate:
    """One forward pass a term, one backward pass a probe; see `kfac_factors` for the arguments.

    Args:
        risk: The risk; `Sharded`, if processes share the batch.
        lam: Outer variable.
        theta: Inner variable.
        batch: (x, y, ...).
        how: Which probes; drawn for the whole batch.
        bias, rest: See `Layout`.
        dual: Keep factors of low rank as columns.
        keep: Keep the layers' output gradients of every probe (EKFAC needs them).
        true: Also keep those of the examples' unweighted losses (the shared J v needs them).
        look: Check weights and outputs, for which the host waits; else whoever asks does.

    Raises:
        TypeError, ValueError: as `kfac_factors`.

    Cost: half a gradient a term, and half a gradient a probe; one more backward pass with ``true``
    (none under ``"empirical"``, whose probe is the losses' gradient, weighted); `Tape.verify`.
    """
    risk, group = apart(risk)
    require_risk(risk, "KFAC")
    check(Layout(bias, rest))
    part = None
    terms = same_terms(risk, lam.detach(), batch)
    passes = []
    for term in terms:
        tape = Tape(term.risk, term.read(theta.detach()), term.batch, bias)
        look = look or not tape.settled()  # what is NaN proves nothing
        side = output_side(term, lam, tape.outputs, look)
        if group is not None:  # a sum of risks, of several terms, is never shared
            part = _part(group, term, tape)
        probes = how.on(part).of(side, look)
        own = None
        if true:
            own = tape.backward(term.risk.output_gradient(side.outputs, side.y), keep=True)
        first = tape.backward(probes[0], keep=True) if own is None else own
        params = unflatten(term.risk.model, tape.theta)
        passes.append(Pass(term, tape, side, params, probes, first, own))
    by_example = keep or true or rest == "diagonal"
    for one in passes:
        _verify(one, by_example)
    layers, uses, places = _arrange_all(risk, passes, by_example)
    names, diagonal = _names(risk), {}
    for one in passes:
        one.shares = true and how.fisher == "empirical" and not one.tape.unlike
        _accumulate(one, dual, rest, keep)
        for name, d in (one.diagonal or {}).items():
            whole = names[_global(one.term, one.tape.places[name][0]).start]
            diagonal[whole] = diagonal.get(whole, 0.0) + one.term.coefficient * d
    if part is not None:
        diagonal = _totals(part, diagonal)
    return Estimate(passes, layers, uses, places, diagonal, dual, part)


def _totals(part: Part, diagonal: dict[str, Tensor]) -> dict[str, Tensor]:
    """The diagonals of the whole batch, all in one sum."""
    if not diagonal:
        return diagonal
    sizes = [d.numel() for d in diagonal.values()]
    whole = part.total(torch.cat([d.reshape(-1) for d in diagonal.values()])).split(sizes)
    pairs = zip(diagonal.items(), whole, strict=True)
    return {name: own.view_as(d) for (name, d), own in pairs}


def _verify(one: Pass, by_example: bool) -> None:
    probe = one.probes[0]
    if one.own is not None:
        probe = one.term.risk.output_gradient(one.side.outputs, one.side.y)
    one.tape.verify(probe, one.first, one.params, by_example)


def _accumulate(one: Pass, dual: bool, rest: str, keep: bool) -> None:
    """B of every layer of one term, and the diagonals of its rest, probe by probe."""
    tape, count = one.tape, len(one.probes)
    one.b, one.diagonal, one.gradients = {}, {}, []
    if one.shares or count == 1 and one.own is None:
        tape.release()
    for i in range(count):
        grads = one.grads(i)
        for layer in tape.layers:
            (g,) = grads[layer.name]
            if g is None:  # the outputs do not depend on this layer
                g = grads[layer.name][0] = tape.outputs.new_zeros(tape.calls[layer.name][0].shape)
            x = output_columns(layer.module, g)
            narrow = dual and 0 < count * x.shape[1] < NARROW * len(x)
            one.b[layer.name] = accumulate(one.b.get(layer.name), x, 1 / tape.n, narrow)
        for name in tape.rest if rest == "diagonal" else ():
            squares = squared_gradients(tape, name, grads, one.params) / tape.n
            one.diagonal[name] = one.diagonal.get(name, 0.0) + squares
        if keep:
            one.gradients.append({layer.name: grads[layer.name][0] for layer in tape.layers})
    tape.release()
    one.first = None


def _weighted(g: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if g is None or weight is None:
        return g
    return (g.reshape(len(weight), -1) * weight.sqrt()[:, None].to(g)).view(g.shape)


# ------------------------------------------------------------------ places in theta


def _names(risk: WeightedRisk | SumOfRisks) -> dict[int, str]:
    """Where each parameter starts in theta -> its name."""
    return {place.start: name for name, (place, _) in places_of(risk.model).items()}


def _global(term: Term, place: slice) -> slice:
    """A place in the term's own vector, in theta."""
    if term.part is None:
        return place
    starts = itertools.accumulate(
        (whole.stop - whole.start for whole in term.part.places), initial=0
    )
    return dict(zip(starts, term.part.places, strict=False))[place.start]


def arrange(
    risk: WeightedRisk | SumOfRisks, terms: list[Term], splits: list[tuple[list[Layer], dict]]
) -> tuple[list[Layer], dict[str, list[tuple[int, Layer]]], dict[str, slice], list]:
    """The layers and the rest of all terms, by their places in theta.

    Args:
        risk: The whole risk.
        terms: Its terms.
        splits: For each term its layers, and its rest (name -> (place, ...)).

    Returns:
        The layers; layer -> [(term, the layer as it knows it)]; the rest, name -> place; and the
        (term, layer) whose parameters are elsewhere no layer, or another one.
    """
    names = _names(risk)
    made: dict[tuple, list[tuple[int, Layer]]] = {}
    elsewhere: set[int] = set()
    rest: dict[str, slice] = {}
    for k, (term, (layers, others)) in enumerate(zip(terms, splits, strict=True)):
        for layer in layers:
            parts = (layer.weight, layer.bias)
            key = tuple(None if p is None else _global(term, p).start for p in parts)
            made.setdefault(key, []).append((k, layer))
        for place, _ in others.values():
            whole = _global(term, place)
            elsewhere.add(whole.start)
            rest[names[whole.start]] = whole
    starts = [s for key in made for s in key if s is not None]
    twice = {s for s in starts if starts.count(s) > 1} | elsewhere
    conflicts = [use for key, uses in made.items() if set(key) & twice for use in uses]
    layers, uses = [], {}
    for key, where in made.items():
        k, own = where[0]
        weight, bias = (None if p is None else _global(terms[k], p) for p in (own.weight, own.bias))
        first = names[next(s for s in key if s is not None)]
        name = first.rpartition(".")[0]
        if name in uses:  # one module of the whole holds the weights of two layers
            name = first
        layers.append(Layer(name, own.module, weight, bias, own.joint))
        uses[name] = where
    return layers, uses, rest, conflicts


def _arrange_all(risk, passes: list[Pass], by_example: bool):
    """`arrange`, until no layer of one term is something else in another."""
    while True:
        splits = [(one.tape.layers, one.tape.rest) for one in passes]
        terms = [one.term for one in passes]
        layers, uses, rest, conflicts = arrange(risk, terms, splits)
        if not conflicts:
            return (
                layers,
                {name: [(passes[k], own) for k, own in where] for name, where in uses.items()},
                rest,
            )
        for k, layer in conflicts:
            passes[k].tape.exclude(layer.name)
        for k in {k for k, _ in conflicts}:
            _verify(passes[k], by_example)


def kfac_factors(
    risk: WeightedRisk | SumOfRisks,
    lam: Tensor,
    theta: Tensor,
    batch: Any,
    fisher: str = "mc",
    samples: int = 1,
    generator: torch.Generator | None = None,
    bias: str = "joint",
) -> dict[str, tuple[Tensor | None, Tensor]]:
    r"""The Kronecker factors (A, B) of every linear map of the model, as matrices.

        A = mean over examples and positions of a a^T,    B = (1/n) sum over both of gamma gamma^T

    Args:
        risk: The risk; its l2 term is not in the factors.
        lam: Outer variable; gives the weights sigma.
        theta: Inner variable, shape (d,).
        batch: (x, y, ...), or for a `SumOfRisks` a tuple of these.
        fisher: ``"mc"``: B from draws of the model's own labels; ``"exact"``: one probe a class;
            ``"empirical"``: the data's labels. As are the next two, an option of
            `bilevel_lite.curvature.Probes`.
        samples: Draws per example for ``"mc"``.
        generator: A CPU generator for the draws.
        bias: ``"joint"`` (a has a 1 appended, the block is that of [W, bias]) or ``"separate"``
            (weight B (x) A, bias B).

    Returns:
        Layer name -> (A, B), shapes (d2, d2) and (d1, d1); A is None where the weight is frozen.
        Parameters of other layers have no entry.

    Raises:
        TypeError: if ``risk`` is neither, or a subclass that overrides its structure.
        ValueError: for a negative weight, an empty batch, a model in training mode with dropout or
            BatchNorm, half precision, or an unknown option.

    Cost: half a gradient (forward) and half a gradient a probe, plus the products that form A, B.
    Source: Martens and Grosse (2015); Grosse and Martens (2016); the weights: arXiv 2603.29108,
    app. A.2.

    Example:
        >>> from bilevel_lite.factors import kfac_factors
        >>> risk = bl.WeightedRisk(torch.nn.Linear(1, 2, bias=False))
        >>> theta = torch.tensor([3.0, 1.0]).log()  # so that the probabilities are 3/4 and 1/4
        >>> at = torch.zeros(0), theta, (torch.ones(1, 1), torch.tensor([0]))
        >>> [(A, B)] = kfac_factors(risk, *at, fisher="exact").values()
        >>> A, B
        (tensor([[1.]]), tensor([[ 0.1875, -0.1875],
                [-0.1875,  0.1875]]))
    """
    how = Probes(fisher, samples, generator)
    done = estimate(risk, lam, theta, batch, how, bias, rest="drop", dual=False)
    factors = {layer.name: (done.a(layer), done.b(layer)) for layer in done.layers}
    return {name: (a and a.dense(), b.dense()) for name, (a, b) in factors.items()}
