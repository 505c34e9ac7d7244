r"""KFAC: one Kronecker product B (x) A for each linear map, inverted factor by factor.

For a layer z = W a (a with a 1 appended if the bias is joint), over examples and positions:

    A = mean of a a^T                        (d2 x d2, from the forward pass)
    B = (1/n) sum over positions of gamma gamma^T    (d1 x d1, gamma = (dz/doutputs)^T s, s a probe)

    GGN block of W  ~  B (x) A,     (B (x) A) vec V = vec(B V A),     V shaped like W

vec reads row by row, as theta holds W. The probes s carry sqrt(sigma_i)
(`bilevel_lite.curvature.Probes`), A is unweighted. Conventions are those of curvlinops ("expand"
for convolutions).

Damping. The inner problem's own l2 ||theta||^2 adds 2 l2 I to the curvature, exactly as damping
adds delta I. Both enter as one number tau = delta + 2 l2, by one of the rules of
`bilevel_lite.kronecker`; parameters without a Kronecker block have a diagonal d, damped d + tau.

A block whose A or B is zero (all weights zero, say) is the zero matrix, so its damped inverse is
I / tau under every rule; a separate bias has the block B, whatever A is.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.blocks import Block, DiagonalBlock, kfac_operator, layers_of
from bilevel_lite.curvature import Probes, require_risk
from bilevel_lite.factors import Estimate, Layout, estimate, kfac_factors
from bilevel_lite.kfac_memory import STATE, Memory, owned
from bilevel_lite.kfac_solve import PreparedKFAC
from bilevel_lite.kronecker import (
    RULES,
    Factor,
    Factorisations,
    Matrix,
    Solve,
    batched,
    kronecker_inverse,
    same_memory,
    spectra,
)
from bilevel_lite.options import again, flag, fraction, instance, not_negative, one_of, whole
from bilevel_lite.parallel import Group, Sharded, apart, dealt, require_shared
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import COST, has_slopes
from bilevel_lite.refuse import looked_at, versions
from bilevel_lite.risk import SumOfRisks, WeightedRisk
from bilevel_lite.solvers import Solver
from bilevel_lite.tape import Layer
from bilevel_lite.trust import known_code

__all__ = [
    "KFAC",
    "kfac_factors",
    "kfac_operator",
]


class KFAC(Solver):
    r"""v = G^-1 b with G the damped KFAC approximation of the curvature; no iteration.

        v-block = (B + sqrt(tau)/pi I)^-1 V (A + pi sqrt(tau) I)^-1,     tau = damping + 2 l2

    Each factor is solved by Cholesky in the smaller of its two spaces (its dimension, or its
    columns: examples times positions), on a CPU layer by layer, elsewhere equal shapes in one call;
    no inverse is formed.

    The first estimate initialises the average of ``ema``; there is no bias correction. Parameters
    without a Kronecker block are BatchNorm's, LayerNorm's, embeddings, grouped convolutions' and
    shared weights; the diagnosis names them. ``rest="drop"`` differentiates another inner problem
    than the other solvers do. ``fixed_batch`` pays where the curvature batch never changes (first
    layers); with a new batch at each call it costs an eigendecomposition each time instead, and
    nothing is kept with ``ema`` or a group, under a mask, or where several terms of a sum have the
    layer. With a ``group``, A, B and the diagonals are those of the whole batch (columns are
    gathered where they are fewer than a factor's dimension, else the factors are summed), the draws
    those of one process.

    Raises:
        ValueError: for an option out of range; in `solve`, for a singular block, a negative weight,
            dropout or BatchNorm in training mode, half precision, or a result that is not finite.
        TypeError: in `solve`, if the inner loss is not a `WeightedRisk`.

    Cost: (1 + probes) / 2 gradients where factors are built (one probe, or ``samples``, or a class
    each for ``"exact"``), and the Cholesky solves, which are no gradients. J v on the same batch
    costs one backward pass more (none under ``"empirical"``, whose probe is the losses' gradient,
    weighted), and is counted as 2 gradients all the same, what J v counts by any way.
    Source: Martens and Grosse (2015); as a hypergradient solver arXiv 2603.29108.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> inner = bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=0.1)
        >>> problem = bl.BilevelProblem(inner, bl.WeightedRisk(model))
        >>> batch = torch.eye(2), torch.tensor([0, 1]), torch.arange(2)
        >>> at = problem, torch.ones(2), torch.zeros(6), batch, batch
        >>> kfac = bl.KFAC(fisher="exact", damping=0.1)
        >>> bl.hypergradient(*at, solver=kfac).round(decimals=3)  # damps each factor, so more
        tensor([-0.1070, -0.1070])
        >>> kfac = bl.KFAC(fisher="exact", damping=0.1, damping_rule="exact")
        >>> bl.hypergradient(*at, solver=kfac).round(decimals=3)
        tensor([-0.2270, -0.2270])
        >>> bl.hypergradient(*at, solver=bl.Direct(damping=0.1)).round(decimals=3)  # the truth
        tensor([-0.2270, -0.2270])
    """

    damping: float = not_negative(
        default=1e-3, search=(1e-3, 1.0),
        help="delta; 0 only where an l2 term or full-rank factors make every block invertible",
    )  # fmt: skip
    fisher: str = again(Probes, "fisher")
    samples: int = again(Probes, "samples")
    ema: float = fraction(
        default=0.0,
        help="Average: beta in F <- beta F + (1 - beta) F_new, each factor and diagonal; 0: none",
    )
    every: int = whole(default=1, help="Calls for which factors are kept")
    damping_rule: str = one_of(
        *RULES, default="heuristic", help="How tau is split, see `bilevel_lite.kronecker`"
    )
    bias: str = again(Layout, "bias")
    rest: str = again(Layout, "rest")
    fixed_batch: bool = flag(
        default=False,
        help="Keep A's eigenvectors where a layer's input is the batch's very tensor, unchanged",
    )
    generator: torch.Generator | None = instance(
        torch.Generator, "a torch.Generator", default=None,
        help="On the CPU, for the draws; None: one with ``seed``, kept between calls",
    )  # fmt: skip
    seed: int = whole(default=0, least=0, help="Of that generator")
    group: Group | None = instance(
        Group, "a bilevel_lite.parallel.Group", default=None,
        help="The processes that share each batch, where the inner loss does not say it "
        "(`bilevel_lite.parallel.Sharded`): for `solve` alone, with a b of the whole batch",
    )  # fmt: skip
    split_inverses: bool = flag(
        default=False,
        help="With a group, each process factors some layers, chosen by size, and sends the others "
        "its part of v",
    )

    _keeps_gradients = False
    _sums_parts = True  # what ``split_inverses`` shares out is v, in parts

    def __post_init__(self):
        super().__post_init__()
        self._generator = self.generator or torch.Generator().manual_seed(self.seed)
        self._probes()  # which refuses samples that are not drawn
        self._memory, self.last_cost = Memory(type(self).__name__), 0.0

    def _probes(self) -> Probes:
        return Probes(self.fisher, self.samples, self._generator)

    def _block(
        self, layer: Layer, factors: tuple, tau: float, pending: Factorisations | None = None
    ) -> Block:
        """V -> (B + delta_B I)^-1 V (A + delta_A I)^-1 for one layer, by the damping rule."""
        a, b = factors
        try:
            apart = layer.bias is not None and not layer.joint
            weight, bias = kronecker_inverse(a, b, tau, self.damping_rule, pending, apart)
        except ValueError as error:
            raise ValueError(f"{error} (layer {layer.name!r})") from None
        return Block(layer, weight, bias, columns=None if a is None else a.inputs)

    def _layer_factors(self, done: Estimate, layers: list[Layer]) -> list[tuple]:
        """What stands for layers until the next build: A and B, here or averaged over builds."""
        made, old = [], self._memory.factors or {}
        for layer in layers:
            new = self._input_factor(done, layer), done.b(layer)
            if self.ema and layer.name in old:
                pairs = zip(old[layer.name][:2], new, strict=True)
                new = tuple(f and Matrix(self._mix(o.dense(), f.dense())) for o, f in pairs)
            made.append(new)
        return made

    def _mix(self, old: Tensor | None, new: Tensor) -> Tensor:
        """F <- beta F + (1 - beta) F_new; the first estimate initialises."""
        return new if old is None or not self.ema else self.ema * old + (1 - self.ema) * new

    # -- building

    def prepare(self, problem, lam, theta, batch, cross=False, once=False):
        """Build the factors, or go on with those that are kept; see `PreparedKFAC`.

        Raises:
            TypeError, ValueError: as the class says.
        """
        loss, risk, group = self._split(problem.inner_loss)
        problem, memory = BilevelProblem(loss, problem.outer_loss), self._memory
        at, own = (self, problem, lam, theta, batch), None
        if self._kept(risk, group, theta):
            info, self.last_cost = self._diagnosis(theta), 0.0
            memory.age += 1
            return PreparedKFAC(*at, memory.blocks, None, info)
        memory.age, memory.blocks, memory.theta = 0, None, None  # gone, should the build fail
        cross = cross and isinstance(risk, WeightedRisk) and has_slopes(risk)
        # nothing may be kept, or diagonalised, before it was looked at
        look = looked_at(theta) or self.every > 1 or self.ema > 0 or self.damping_rule == "exact"
        done = self._estimate(loss, lam, theta, batch, cross and known_code(risk.model), look)
        if done.passes[0].own is not None and not done.passes[0].tape.unlike:
            own = done
        blocks, pending, then = self._build(risk, done, keep=own is not None)
        unseen = () if look else tuple(one.side for one in done.passes)
        unseen = unseen if pending is None else (*unseen, pending)
        info, memory.age = self._diagnosis(theta), 1
        once = once and self.every == 1
        if not once:  # else `PreparedKFAC` makes each block, applies it and lets it go
            blocks = list(blocks)
            then()
        if self.every > 1:
            memory.blocks, memory.theta = blocks, theta.detach().clone()
            memory.damped = self.damping + 2 * risk.l2, self.damping_rule
        return PreparedKFAC(*at, blocks, own, info, once, unseen, then if once else None)

    def _split(self, loss: Any) -> tuple[Any, WeightedRisk | SumOfRisks, Group | None]:
        """The loss, `Sharded` if processes share its batch; the risk that is evaluated here."""
        if self.group is not None and not isinstance(loss, Sharded):
            loss = Sharded(require_risk(loss, type(self).__name__), self.group)
        risk, group = apart(loss)
        return loss, require_risk(risk, type(self).__name__), group

    def _estimate(self, loss, lam, theta, batch, true: bool = False, look=True) -> Estimate:
        """One pass for factors and diagonals (``true``: and for J v)."""
        risk = apart(loss)[0]
        if self.ema:
            self._memory.require_same(risk, self._how(risk, theta), theta)
        tau = self.damping + 2 * risk.l2
        done = estimate(
            loss, lam, theta, batch, self._probes(), self.bias, self.rest,
            dual=tau > 0 and self.ema == 0, keep=self._keeps_gradients, true=true, look=look,
        )  # fmt: skip
        self._memory.without = tuple(done.rest)
        self.last_cost = COST["gradient"] * (1 + done.probes) / 2
        return done

    def _build(
        self, risk, done: Estimate, keep: bool
    ) -> tuple[Iterable, Factorisations | None, Callable[[], None]]:
        """Give the blocks' damped inverses; ``keep``: the tape is needed afterwards.

        What comes last is called once all are made; a refused build leaves the average as it was.
        """
        pairs, diagonal, like = self._factors(done, keep), done.diagonal, done.passes[0].tape.theta
        group = None if done.part is None else done.part.group
        if not (self.every > 1 or self.ema):
            made = self._made(like, risk, done.layers, pairs, done.rest, diagonal, group)
            return *made, lambda: None
        factors, diagonal = self._averaged(done, pairs)
        pairs = ((layer, factors[layer.name]) for layer in done.layers)
        blocks = self._sound(like, risk, done.layers, pairs, done.rest, diagonal, group)
        what = risk, self._how(risk, like), factors, diagonal
        return blocks, None, partial(self._memory.keep, *what)

    def _sound(self, *at) -> Iterable[Block | DiagonalBlock]:
        """The blocks that `_made` makes, their factorisations looked at."""
        blocks, pending = self._made(*at)
        if pending is not None:
            pending.require_sound()
        return blocks

    def _factors(self, done: Estimate, keep: bool) -> Iterator[tuple[Layer, tuple]]:
        """Each layer's factors, as they are made: all together or, on a CPU, layer by layer.

        The inputs that they were made of are then let go, unless ``keep``.
        """
        together = batched(done.passes[0].tape.theta)
        for layers in [done.layers] if together else [[layer] for layer in done.layers]:
            made = self._layer_factors(done, layers)
            for one, own in () if keep else (use for l in layers for use in done.uses[l.name]):
                del one.tape.calls[own.name]
            made.reverse()
            yield from ((layer, made.pop()) for layer in layers)  # each let go when it is used

    def _averaged(self, done: Estimate, pairs: Iterable[tuple[Layer, tuple]]) -> tuple[dict, dict]:
        """Factors and diagonals as they are to be kept."""
        old = self._memory.diagonal
        diagonal = {name: self._mix(old.get(name), d) for name, d in done.diagonal.items()}
        return {layer.name: owned(own, done) for layer, own in pairs}, diagonal

    def _made(
        self, like: Tensor, risk, layers: list[Layer], pairs, rest, diagonal, group=None
    ) -> tuple[Iterable[Block | DiagonalBlock], Factorisations | None]:
        """The blocks: as a stream, or all of them and how their factorisations came out."""
        away = self._away(layers, group)
        if not batched(like):
            return self._blocks(risk, pairs, rest, diagonal, away), None
        if self.damping_rule == "exact":
            pairs = zip(layers, _diagonalised([own for _, own in pairs]), strict=True)
        pending = Factorisations()
        blocks = list(self._blocks(risk, pairs, rest, diagonal, away, pending))
        if not pending.wanted:
            return blocks, None
        pending.run()
        return blocks, pending

    def _blocks(
        self,
        risk: WeightedRisk | SumOfRisks,
        pairs: Iterable[tuple[Layer, tuple]],
        rest: dict[str, slice],
        diagonal: dict[str, Tensor],
        away: set[str],
        pending: Factorisations | None = None,
    ) -> Iterator[Block | DiagonalBlock]:
        tau = self.damping + 2 * risk.l2
        for layer, own in pairs:
            if pending is not None:
                pending.name = layer.name
            if layer.name in away:
                yield Block(layer, torch.zeros_like, torch.zeros_like)
            else:
                yield self._block(layer, own, tau, pending)
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

    def _away(self, layers: list[Layer], group: Group | None) -> set[str]:
        """The layers whose inverses another process makes."""
        if group is None or not (self.split_inverses and self._sums_parts):
            return set()
        owners = dealt([sum(d**3 for d in layer.dims) for layer in layers], group.size)
        pairs = zip(layers, owners, strict=True)
        return {layer.name for layer, owner in pairs if owner != group.rank}

    def _input_factor(self, done: Estimate, layer: Layer) -> Factor | None:
        found = done.only(layer)
        alone = done.part is None and found is not None
        if layer.weight is None or not self.fixed_batch or self.ema or not alone:
            return done.a(layer)
        one, own = found
        if one.term.risk.mask is not None:  # A is of the mask too, and that may change
            return done.a(layer)
        a, key = one.tape.calls[own.name][0].input, (layer.name, layer.joint)
        module, before, version, factor = self._memory.inputs.get(key, (None, None, 0, None))
        now = versions(a, contents=True)  # what NumPy writes torch does not count
        if module is own.module and same_memory(before, a) and version == now:
            return factor
        factor = done.a(layer)
        if a.untyped_storage().data_ptr() == one.tape.x.untyped_storage().data_ptr():
            factor = factor.spectrum().keep(one.tape.input_columns(own))
            self._memory.inputs[key] = (own.module, a, now, factor)
        return factor

    # -- applying

    def inverse(self, loss: Any, lam: Tensor, theta: Tensor, batch: Any) -> Solve:
        """Return the function r -> G^-1 r, with factors built here or, under ``every``, kept.

        This is what preconditions CG. It counts as one call for ``every``.

        Raises:
            TypeError, ValueError: as `prepare`; for a ``group`` and a loss of this process alone.
        """
        require_shared(self, loss)
        return self.prepare(BilevelProblem(loss, loss), lam, theta, batch).inverse

    def observe(self, loss: Any, lam: Tensor, theta: Tensor, batch: Any) -> float:
        """Take a batch into the moving average of the factors, and invert nothing.

        Returns:
            The cost in gradient-equivalents; 0 without ``ema``, where nothing would be remembered.

        Raises:
            TypeError, ValueError: as `prepare`.
        """
        if not self.ema:
            return 0.0
        loss, risk, _ = self._split(loss)
        done = self._estimate(loss, lam, theta, batch)
        made = self._averaged(done, self._factors(done, keep=False))
        self._memory.keep(risk, self._how(risk, theta), *made)
        self._memory.blocks = None  # of the average before; the next solve makes them anew
        return self.last_cost

    # -- remembering

    def _kept(self, risk: WeightedRisk | SumOfRisks, group: Group | None, theta: Tensor) -> bool:
        """True if there are blocks that are still to be used."""
        memory = self._memory
        if memory.theta is None or memory.age >= self.every:
            return False
        memory.require_same(risk, self._how(risk, theta), theta)
        damped = self.damping + 2 * risk.l2, self.damping_rule
        if memory.blocks is None or memory.damped != damped:
            # brought back by a state, averaged since, or damped by what is no longer said
            memory.blocks = None  # gone, should this fail
            layers, rest = layers_of(risk, self.bias, set(memory.factors))
            pairs = ((layer, memory.factors[layer.name]) for layer in layers)
            at = memory.theta, risk, layers, pairs, rest, memory.diagonal, group
            memory.blocks, memory.damped = list(self._sound(*at)), damped
        return True

    def _diagnosis(self, theta: Tensor) -> dict:
        return {**self._memory.staleness(theta), "rest": self.rest}

    def _how(self, risk: WeightedRisk | SumOfRisks, theta: Tensor) -> str:
        terms = risk.risks if isinstance(risk, SumOfRisks) else [risk]
        losses = "+".join(t.loss + " with slopes" * t.weight_slope for t in terms)
        own = f"bias={self.bias!r}, rest={self.rest!r}, fisher={self.fisher!r}"
        return f"{own} of {losses} in {theta.dtype}"

    def limit(self) -> None:
        """Return None: its system, the Kronecker one, is solved exactly."""

    def state_dict(self) -> dict:
        """Return what is remembered between calls: the generator, kept factors and their age."""
        generator = {"generator": self._generator.get_state()}
        return {**super().state_dict(), **generator, **self._memory.state()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned; kept factors are inverted again on the next call."""
        self._require_own(state, "generator", *STATE)
        super().load_state_dict(state)
        self._generator.set_state(state["generator"].cpu())
        self._memory, self.last_cost = Memory.restored(type(self).__name__, state), 0.0


def _diagonalised(factors: list[tuple]) -> list[tuple]:
    """The factors as spectra, by one call for each shape; a bias alone needs none."""
    pairs = [own for own in factors if own[0] is not None]
    try:
        made = iter(spectra([f for own in pairs for f in own[:2]]))
    except ValueError:  # the layer's own block will say it, by name
        return factors
    return [own if own[0] is None else (next(made), next(made), *own[2:]) for own in factors]
