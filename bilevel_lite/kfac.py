r"""KFAC: one Kronecker product A (x) B for each linear map, inverted factor by factor.

For a layer z = W a (a with a 1 appended if the bias is joint), over examples and positions:

    A = mean of a a^T                        (d2 x d2, from the forward pass)
    B = (1/n) sum over positions of g g^T    (d1 x d1, g = (dz/doutputs)^T s, s an output probe)

    GGN block of W  ~  A (x) B,     (A (x) B) vec V = vec(B V A),     V shaped like W

The probes s carry sqrt(sigma_i) (`bilevel_lite.curvature.output_probes`), A is unweighted.
Conventions are those of curvlinops ("expand" for convolutions).

Damping. The inner problem's own l2 ||theta||^2 adds 2 l2 I to the curvature, exactly as damping
adds delta I. Both enter as one number tau = delta + 2 l2, by one of the rules of
`bilevel_lite.kronecker`; parameters without a Kronecker block have a diagonal d, damped d + tau.

A block whose A or B is zero (all weights zero, say) is the zero matrix, so its damped inverse is
I / tau under every rule.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.curvature import Operator, require_fisher, require_risk
from bilevel_lite.factors import Estimate, arrange, estimate, kfac_factors, require_bias
from bilevel_lite.kronecker import (
    FORMS,
    RULES,
    Columns,
    Factor,
    Matrix,
    Solve,
    Spectrum,
    heuristic_damping,
    kronecker_inverse,
)
from bilevel_lite.linsolve import LinearSolve, at_least
from bilevel_lite.params import trainable
from bilevel_lite.problem import NotFinite
from bilevel_lite.products import COST, cross_and_route, cross_from_slopes, has_slopes
from bilevel_lite.risk import SumOfRisks, Term, WeightedRisk
from bilevel_lite.solvers import SolveInfo, Solver
from bilevel_lite.surroundings import differentiating
from bilevel_lite.tape import Call, Layer, along, output_columns, places_of, split_parameters
from bilevel_lite.trust import known_code

__all__ = [
    "KFAC",
    "KFACInfo",
    "KFACRichardson",
    "heuristic_damping",
    "kfac_factors",
    "kfac_operator",
    "kronecker_inverse",
]


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
    """The undamped KFAC matrix as an `Operator`: A (x) B blocks, diagonal rest, plus 2 l2 I.

    The arguments and errors are those of `kfac_factors`; ``rest`` is that of `KFAC`.

    Cost: a product costs B V A per layer; the build costs what `kfac_factors` costs.
    """
    require_bias(bias)
    require_rest(rest)
    done = estimate(risk, lam, theta, batch, fisher, samples, generator, bias, rest, dual=False)
    blocks = []
    for layer in done.layers:
        a, b = done.a(layer), done.b(layer).dense()
        weight = None if a is None else partial(_sandwich, b, a.dense())
        blocks.append(Block(layer, weight, partial(torch.matmul, b)))
    return block_operator(blocks, done, risk, theta)


def _sandwich(b: Tensor, a: Tensor, v: Tensor) -> Tensor:
    return b @ v @ a


def block_operator(
    blocks: list["Block"], done: Estimate, risk: WeightedRisk, theta: Tensor
) -> Operator:
    """Layers' blocks, the diagonals of an estimate, and 2 l2 I, as one `Operator`."""
    diagonals = [DiagonalBlock(name, done.rest[name], d) for name, d in done.diagonal.items()]

    def matvec(v):
        out = torch.zeros_like(v)
        for block in [*blocks, *diagonals]:
            block(v, out)
        return out + 2 * risk.l2 * v

    return Operator(matvec, theta)


def require_rest(rest: str) -> None:
    """Refuse an unknown way to treat parameters without a Kronecker block."""
    if rest not in ("diagonal", "damping", "drop"):
        raise ValueError(f"rest: got {rest!r}, expected 'diagonal', 'damping' or 'drop'")


# ------------------------------------------------------------------ the solvers


@dataclass
class KFACInfo(SolveInfo):
    """The diagnosis of one KFAC solve: that of `SolveInfo` and what is particular to KFAC.

    ``residual`` is that of the true Hessian, H v + damping v against b: it says how good an
    approximation KFAC is here, not whether its own system was solved.

    Attributes:
        staleness: Solves since the factors were built; 0 is fresh.
        drift: ||theta - theta_built|| / ||theta_built||, how far theta went since then.
        without_block: Names of the parameters that have no Kronecker block.
        rest: How those were treated: ``"diagonal"``, ``"damping"`` or ``"drop"``.
    """

    staleness: int = 0
    drift: float = 0.0
    without_block: tuple[str, ...] = ()
    rest: str = "diagonal"


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
        if (
            columns is not None and columns.shape[1] == self.columns.shape[1]
        ):  # no mask left one out
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


class KFAC(Solver):
    r"""v = G^-1 b with G the damped KFAC approximation of the curvature; no iteration.

        v-block = (B + sqrt(tau)/pi I)^-1 V (A + pi sqrt(tau) I)^-1,     tau = damping + 2 l2

    Each factor is solved by Cholesky in the smaller of its two spaces (its dimension, or its
    columns: examples times positions), layer by layer; no inverse is formed.

    Args:
        damping: delta, added to the curvature; zero only where an l2 term or full-rank factors
            make every block invertible.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``; see `kfac_factors`.
        samples: Draws per example for ``"mc"``.
        ema: beta in F <- beta F + (1 - beta) F_new for every factor and diagonal; 0 is off. The
            first estimate initialises; there is no bias correction.
        every: Build the factors on every ``every``-th call and reuse them in between.
        damping_rule: ``"heuristic"``, ``"factored"`` or ``"exact"``; see the module.
        bias: ``"joint"`` or ``"separate"``.
        rest: What parameters without a Kronecker block (BatchNorm, LayerNorm, embeddings, grouped
            convolutions, shared weights) get: ``"diagonal"``, the diagonal of the same Fisher, or
            ``"damping"``, v = b / tau, or ``"drop"``, v = 0 (then another inner problem is
            differentiated than by the other solvers). The diagnosis names them.
        fixed_batch: Keep the eigendecomposition of A where a layer's input is the very tensor of
            the last build: pays where the curvature batch never changes (first layers). With a new
            batch at each call it costs an eigendecomposition each time instead. Nothing is kept
            with ``ema``, under a mask, or where several terms of a sum have the layer.
        generator: CPU generator for the draws; by default one with ``seed``, kept between calls.
        seed: Seed of that generator.

    Raises:
        ValueError: for an option out of range; in `solve`, for a singular block, a negative weight,
            dropout or BatchNorm in training mode, half precision, or a result that is not finite.
        TypeError: in `solve`, if the inner loss is not a `WeightedRisk`.

    Cost: (1 + probes) / 2 gradients where factors are built (one probe, or ``samples``, or a class
    each for ``"exact"``), and the Cholesky solves, which are no gradients.
    Source: Martens and Grosse (2015); as a hypergradient solver arXiv 2603.29108.
    """

    def __init__(
        self,
        damping: float = 1e-3,
        fisher: str = "mc",
        samples: int = 1,
        ema: float = 0.0,
        every: int = 1,
        damping_rule: str = "heuristic",
        bias: str = "joint",
        rest: str = "diagonal",
        fixed_batch: bool = False,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if not (damping >= 0 and math.isfinite(damping)):
            raise ValueError(
                f"damping: got {damping}, expected a finite number that is zero or positive"
            )
        require_fisher(fisher, samples)
        if not 0 <= ema < 1:
            raise ValueError(f"ema: got {ema}, expected a number from 0 up to, not including, 1")
        at_least("every", every, 1)
        if damping_rule not in RULES:
            raise ValueError(
                f"damping_rule: got {damping_rule!r}, expected one of {', '.join(RULES)}"
            )
        require_bias(bias)
        require_rest(rest)
        self.damping, self.fisher, self.samples = damping, fisher, samples
        self.ema, self.every, self.damping_rule = ema, every, damping_rule
        self.bias, self.rest, self.fixed_batch = bias, rest, fixed_batch
        self._generator = generator or torch.Generator().manual_seed(seed)
        self._reset()

    def _reset(self):
        self._age = 0  # solves since the factors were built
        self._factors = None  # layer name -> factors, kept for `every` and `ema`
        self._diagonal: dict[str, Tensor] = {}
        self._theta = None  # where the factors were built
        self._parameters: list | None = None  # names and shapes that the factors are of
        self._blocks = None
        self._inputs: dict[tuple, tuple] = {}  # fixed_batch: layer -> (module, input, version, A)
        self._report: tuple[int, float, tuple[str, ...], float] = (0, 0.0, (), 0.0)

    # -- building

    def _estimate(self, risk, lam, theta, batch, true: bool = False) -> Estimate:
        """One pass for factors and diagonals (``true``: and for J v)."""
        if self.ema:
            self._require_known(risk, theta)
        tau = self.damping + 2 * risk.l2
        done = estimate(
            risk, lam, theta, batch, self.fisher, self.samples, self._generator,
            self.bias, self.rest, dual=tau > 0 and self.ema == 0, keep=self._keeps_gradients,
            true=true,
        )  # fmt: skip
        self._report = (0, 0.0, tuple(done.rest), (1 + done.probes) / 2)
        return done

    def _build(self, risk, done: Estimate, invert: bool = True, keep: bool = False) -> Iterator:
        """Give the blocks' damped inverses one by one; ``keep``: the tape is needed afterwards."""
        tau = self.damping + 2 * risk.l2
        old, new = self._factors or {}, {}
        for layer in done.layers:
            factors = self._layer_factors(done, layer, old.get(layer.name))
            if self.every > 1 or self.ema:
                factors = new[layer.name] = _owned(factors, done)
            if invert:
                yield self._block(layer, factors, tau)
            del factors
            if not keep:
                for one, own in done.uses[layer.name]:
                    del one.tape.calls[own.name]  # streaming: its input is needed no more
        diagonal = {
            name: self._mix(self._diagonal.get(name), d) for name, d in done.diagonal.items()
        }
        if invert:
            yield from self._rest_blocks(done.rest, diagonal, tau)
        if self.every > 1 or self.ema:
            self._factors, self._diagonal = new, diagonal
            self._parameters = _parameters(risk)

    def _rebuild(self, risk) -> Iterator[Any]:
        """The blocks of factors that `load_state_dict` brought back."""
        tau = self.damping + 2 * risk.l2
        layers, rest = _layers_of(risk, self.bias, set(self._factors))
        for layer in layers:
            yield self._block(layer, self._factors[layer.name], tau)
        yield from self._rest_blocks(rest, self._diagonal, tau)

    _keeps_gradients = False

    def _layer_factors(self, done: Estimate, layer: Layer, old: tuple | None) -> tuple:
        """What stands for this layer until the next build: here the factors A and B."""
        a, b = self._input_factor(done, layer), done.b(layer)
        if not self.ema or old is None:
            return a, b
        pairs = zip(old[:2], (a, b), strict=True)
        return tuple(f and Matrix(self._mix(o.dense(), f.dense())) for o, f in pairs)

    def _mix(self, old: Tensor | None, new: Tensor) -> Tensor:
        """F <- beta F + (1 - beta) F_new; the first estimate initialises."""
        return new if old is None or not self.ema else self.ema * old + (1 - self.ema) * new

    def _input_factor(self, done: Estimate, layer: Layer) -> Factor | None:
        found = done.only(layer)
        if layer.weight is None or not self.fixed_batch or self.ema or found is None:
            return done.a(layer)
        one, own = found
        if one.term.risk.mask is not None:  # A is of the mask too, and that may change
            return done.a(layer)
        a, key = one.tape.calls[own.name][0].input, (layer.name, layer.joint)
        module, before, version, factor = self._inputs.get(key, (None, None, 0, None))
        if module is own.module and _same(before, a) and version == a._version:
            return factor
        factor = done.a(layer)
        if a.untyped_storage().data_ptr() == one.tape.x.untyped_storage().data_ptr():
            factor = factor.spectrum().keep(one.tape.input_columns(own))
            self._inputs[key] = (own.module, a, a._version, factor)
        return factor

    def _block(self, layer: Layer, factors: tuple, tau: float) -> "Block":
        try:
            inverse = kronecker_inverse(*factors, tau, self.damping_rule)
        except ValueError as error:
            raise ValueError(f"{error} (layer {layer.name!r})") from None
        return Block(layer, *inverse, columns=None if factors[0] is None else factors[0].inputs)

    def _rest_blocks(self, rest: dict, diagonal: dict, tau: float) -> Iterator["DiagonalBlock"]:
        for name, place in rest.items():
            if self.rest == "drop":
                yield DiagonalBlock(name, place, None)
                continue
            d = diagonal.get(name)
            if tau == 0 and (d is None or bool(d.min() == 0)):
                raise ValueError(
                    f"damping: is 0 and the diagonal of parameter {name!r} has a zero; "
                    "give a positive damping or l2"
                )
            yield DiagonalBlock(name, place, 1 / (tau if d is None else d + tau))

    # -- applying

    def inverse(self, loss: Any, lam: Tensor, theta: Tensor, batch: Any) -> Solve:
        """Return the function r -> G^-1 r, with factors built here or, under ``every``, kept.

        This is what preconditions CG. It counts as one call for ``every``.

        Raises:
            TypeError, ValueError: as `solve`.
        """
        blocks = self._ready(require_risk(loss, type(self).__name__), lam, theta, batch, True)

        def apply(r: Tensor) -> Tensor:
            return _apply(blocks, r)

        return apply

    def observe(self, loss: Any, lam: Tensor, theta: Tensor, batch: Any) -> float:
        """Take a batch into the moving average of the factors, and invert nothing.

        Returns:
            The cost in gradient-equivalents; 0 without ``ema``, where nothing would be remembered.

        Raises:
            TypeError, ValueError: as `solve`.
        """
        if not self.ema:
            return 0.0
        risk = require_risk(loss, type(self).__name__)
        for _ in self._build(risk, self._estimate(risk, lam, theta, batch), invert=False):
            pass
        return self.last_cost

    def _ready(self, risk, lam, theta, batch, store: bool):
        """The blocks: kept ones while they last, else new ones (a stream unless stored)."""
        if self._keeps_on(risk, theta):
            return self._blocks
        self._forget()
        blocks = self._build(risk, self._estimate(risk, lam, theta, batch))
        return self._remember(blocks, theta, store)

    def _keeps_on(self, risk: WeightedRisk, theta: Tensor) -> bool:
        """True if this call uses kept factors; counts it."""
        if not self._kept(risk):
            return False
        self._require_known(risk, theta)
        size = float(self._theta.norm())
        moved = float((theta.detach() - self._theta).norm())
        self._report = (self._age, moved / size if size else moved, self._report[2], 0.0)
        self._age += 1
        return True

    def _require_known(self, risk: WeightedRisk | SumOfRisks, theta: Tensor) -> None:
        """Refuse a problem that the remembered factors are not of."""
        if self._theta is not None and self._theta.shape != theta.shape:
            raise ValueError(
                f"{type(self).__name__}: remembers factors for {self._theta.numel()} parameters, "
                f"but theta has {theta.numel()}; use a new solver for a new problem"
            )
        if self._parameters is not None and self._parameters != _parameters(risk):
            raise ValueError(
                f"{type(self).__name__}: remembers factors for parameters of other names or "
                "shapes (frozen or replaced since?); use a new solver for a new problem"
            )

    def _kept(self, risk: WeightedRisk) -> bool:
        """True if there are blocks that are still to be used."""
        restored = self._blocks is None and self._factors is not None and self._theta is not None
        if restored and self._age < self.every:
            self._blocks = list(self._rebuild(risk))
        return self._blocks is not None and self._age < self.every

    def _forget(self):
        self._age, self._blocks, self._theta = 0, None, None  # gone, should the build fail

    def _remember(self, blocks: Iterator, theta: Tensor, store: bool):
        self._age = 1
        if self.every == 1:
            return list(blocks) if store else blocks
        self._blocks, self._theta = list(blocks), theta.detach().clone()
        return self._blocks

    def limit(self) -> None:
        """Return None: its system, the Kronecker one, is solved exactly."""

    def _info(self, done, matvec, b, diagnose):
        info = super()._info(done, matvec, b, diagnose)
        staleness, drift, without, _ = self._report
        known = {**vars(info), "gradients": info.gradients + self.last_cost}
        return KFACInfo(
            **known, staleness=staleness, drift=drift, without_block=without, rest=self.rest
        )

    @differentiating
    def solve_and_cross(
        self, problem, lam, theta, batch, b, diagnose: bool = True, want_v: bool = True
    ):
        r"""Return v, J v on the same batch, and the diagnosis; J v from the pass that built G.

            J v = grad_lam (1/n) sum_i sigma_i(lam) < grad_theta l_i, v >
            < grad_theta l_i, v > = sum over layers of g_i . (V a_i)

        with the inputs a_i of that pass and one more backward pass for g_i: where factors are built
        anew and all of the model's code is known (`bilevel_lite.risk.known_code`). Else J v is
        `bilevel_lite.products.cross_vp`; ``info.cross`` says so. Without ``want_v`` v is not formed
        where J v does not need it.

        Cost: that of the build and, for J v, one backward pass to the layers' outputs (none under
        ``"empirical"``, whose probe is the losses' gradient, weighted). It is counted as 2
        gradients all the same, what J v counts by any way.
        """
        risk = problem.inner_loss
        one = isinstance(risk, WeightedRisk) and has_slopes(risk) and known_code(risk.model)
        if not one or self._kept(risk):
            return super().solve_and_cross(problem, lam, theta, batch, b, diagnose)
        self._require_like(b, theta)
        self._forget()
        done = self._estimate(risk, lam, theta, batch, true=True)
        (one,) = done.passes
        own = not one.tape.unlike
        blocks = self._build(risk, done, keep=own)
        v = torch.empty_like(b) if want_v or diagnose or not own else None
        slopes = one.tape.outputs.new_zeros(one.tape.n)
        for block in self._remember(blocks, theta, store=False):
            if v is not None:
                block(b, v)
            if own:
                slopes += block.slopes(done, b, v)
        if v is not None:
            _require_finite(v)
        matvec = self._operator(problem, lam, theta, batch)
        info = self._info(LinearSolve(v, iterations=0, products=0), matvec, b, diagnose)
        if own:
            info.cross = f"{info.solver}'s own pass"
            return v, cross_from_slopes(lam, theta, [one.term], [slopes], [one.side.outputs]), info
        jv, info.cross = cross_and_route(risk, lam, theta, batch, v)
        return v, jv, info

    def _solve(self, problem, lam, theta, batch, b, matvec):
        risk = require_risk(problem.inner_loss, type(self).__name__)
        v = _apply(self._ready(risk, lam, theta, batch, False), b)
        return LinearSolve(v, iterations=0, products=0)

    @property
    def last_cost(self) -> float:
        """Gradient-equivalents of the last call's build; 0 where factors were reused."""
        return COST["gradient"] * self._report[3]

    # -- resuming

    def state_dict(self) -> dict:
        """Return what is remembered between calls: the generator, kept factors and their age."""
        factors = None
        if self._factors is not None:
            factors = {
                name: [_pack(part) for part in parts] for name, parts in self._factors.items()
            }
        return {
            **super().state_dict(),
            "generator": self._generator.get_state(),
            "age": self._age,
            "theta": self._theta,
            "factors": factors,
            "diagonal": dict(self._diagonal),
            "parameters": self._parameters,
            "without_block": list(self._report[2]),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned; kept factors are inverted again on the next call."""
        super().load_state_dict(state)
        self._reset()
        self._generator.set_state(state["generator"].cpu())
        self._age, self._theta = state["age"], state["theta"]
        self._diagonal = dict(state["diagonal"])
        self._parameters = state.get("parameters")  # an older state has none
        self._report = (0, 0.0, tuple(state["without_block"]), 0.0)
        if state["factors"] is not None:
            self._factors = {
                name: tuple(_unpack(part) for part in parts)
                for name, parts in state["factors"].items()
            }


def _parameters(risk: WeightedRisk | SumOfRisks) -> list[list]:
    """Names and shapes of theta's parts."""
    return [[name, *p.shape] for name, p in trainable(risk.model).items()]


def _owned(factors: tuple, done: Estimate) -> tuple:
    """The factors as they are kept: no view of the caller's batch, no spectrum's inputs."""
    given = {
        one.tape.x.untyped_storage().data_ptr()
        for one in done.passes
        if isinstance(one.tape.x, Tensor)
    }

    def owned(f):
        if isinstance(f, Spectrum):
            return Spectrum(f.values, f.vectors)
        if not isinstance(f, Columns):
            return f
        shared = f.columns.untyped_storage().data_ptr() in given
        return Columns(f.columns.clone(), f.scale) if shared else f

    return tuple(map(owned, factors))


def _layers_of(
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


def _same(a: Tensor, b: Tensor) -> bool:
    """True if both are views of the same memory (their contents then change together)."""
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _pack(part: Factor | Tensor | None):
    if part is None or isinstance(part, Tensor):
        return part
    return [type(part).__name__, {f.name: getattr(part, f.name) for f in fields(part)}]


def _unpack(part):
    return FORMS[part[0]](**part[1]) if isinstance(part, list) else part


def _apply(blocks, b: Tensor) -> Tensor:
    v = torch.empty_like(b)
    for block in blocks:
        block(b, v)
    _require_finite(v)
    return v


def _require_finite(v: Tensor) -> None:
    bad = 0 if bool(torch.isfinite(v.sum())) else int((~torch.isfinite(v)).sum())
    if bad:
        raise NotFinite(
            f"KFAC: {bad} of {v.numel()} entries of v are NaN or infinite; is the damping zero on "
            "a curvature that is zero, or are the inputs of a huge scale?"
        )


class KFACRichardson(Solver):
    r"""Richardson iteration on the true Hessian, preconditioned by KFAC and warm-started.

        v <- v - step G^-1 ((H + damping I) v - b),      starting from the last call's v

    What KFAC gets wrong is corrected by one Hessian product a step, and the warm start spreads the
    correction over the outer iterations. It converges if every eigenvalue of G^-1 (H + damping I)
    lies between 0 and 2 / step; KFAC does not guarantee that, so watch the residual.

    Args:
        iters: Steps per call, at least 1.
        kfac: The preconditioner; by default ``KFAC()``. Give it ``every`` to build it less often.
        step: Step size.
        damping: Added to H's diagonal, once. The preconditioner has its own.
        warm_start: Start from the last call's v; else from zero, where the first step is free of
            products.

    Raises:
        ValueError: for an option out of range; in `solve`, if v grows beyond the largest number,
            or as `KFAC`.

    Cost: one product a step (one less from zero) and the KFAC build.
    Source: our reading of AmIGO (arXiv 2111.14580) with KFAC, as arXiv 2603.29108 suggests it.
    """

    def __init__(
        self,
        iters: int = 1,
        kfac: KFAC | None = None,
        step: float = 1.0,
        damping: float = 0.0,
        warm_start: bool = True,
    ):
        super().__init__()
        at_least("iters", iters, 1)
        if not step > 0:
            raise ValueError(f"step: got {step}, expected a positive number")
        if not damping >= 0:
            raise ValueError(f"damping: got {damping}, expected a number that is zero or positive")
        if kfac is not None and not isinstance(kfac, KFAC):
            raise TypeError(f"kfac: got {kfac!r}, expected a bilevel_lite.KFAC")
        self.iters, self.kfac, self.step = iters, kfac or KFAC(), step
        self.damping, self.warm_start = damping, warm_start

    def _info(self, done, matvec, b, diagnose):
        info = super()._info(done, matvec, b, diagnose)
        info.gradients += self.kfac.last_cost
        return info

    def _solve(self, problem, lam, theta, batch, b, matvec):
        precondition = self.kfac.inverse(problem.inner_loss, lam, theta, batch)
        v = self._v if self.warm_start else None
        products = self.iters - (v is None)
        for _ in range(self.iters):
            r = b if v is None else b - matvec(v) - self.damping * v
            change = self.step * precondition(r)
            v = change if v is None else v + change
        return LinearSolve(v, iterations=self.iters, products=products)

    def state_dict(self) -> dict:
        """Return the last v and what the KFAC remembers."""
        return {**super().state_dict(), "kfac": self.kfac.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.kfac.load_state_dict(state["kfac"])
