r"""KFAC: one Kronecker product A (x) B for each linear map, inverted factor by factor.

For a layer z = W a (a with a 1 appended if the bias is joint), over examples and positions:

    A = mean of a a^T                        (d2 x d2, from the forward pass)
    B = (1/n) sum over positions of gamma gamma^T    (d1 x d1, gamma = (dz/doutputs)^T s, s a probe)

    GGN block of W  ~  A (x) B,     (A (x) B) vec V = vec(B V A),     V shaped like W

The probes s carry sqrt(sigma_i) (`bilevel_lite.curvature.output_probes`), A is unweighted.
Conventions are those of curvlinops ("expand" for convolutions).

Damping. The inner problem's own l2 ||theta||^2 adds 2 l2 I to the curvature, exactly as damping
adds delta I. Both enter as one number tau = delta + 2 l2, by one of the rules of
`bilevel_lite.kronecker`; parameters without a Kronecker block have a diagonal d, damped d + tau.

A block whose A or B is zero (all weights zero, say) is the zero matrix, so its damped inverse is
I / tau under every rule.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.blocks import Block, DiagonalBlock, kfac_operator, layers_of
from bilevel_lite.curvature import Probes, require_risk
from bilevel_lite.factors import Estimate, estimate, kfac_factors
from bilevel_lite.kronecker import (
    FORMS,
    RULES,
    Columns,
    Factor,
    Factorisations,
    Matrix,
    Solve,
    Spectrum,
    batched,
    heuristic_damping,
    kronecker_inverse,
    same_memory,
    spectra,
)
from bilevel_lite.linsolve import SolveInfo, richardson
from bilevel_lite.options import (
    again,
    flag,
    fraction,
    instance,
    not_negative,
    one_of,
    positive,
    whole,
)
from bilevel_lite.parallel import Group, Sharded, apart, dealt, require_shared
from bilevel_lite.params import trainable
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import COST, cross_from_slopes, has_slopes
from bilevel_lite.refuse import looked_at, require_finite, versions
from bilevel_lite.risk import SumOfRisks, WeightedRisk
from bilevel_lite.solvers import Prepared, Solver
from bilevel_lite.tape import Layer
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


_SINGULAR = "; is the damping zero on a curvature that is zero, or are inputs of a huge scale?"


class PreparedKFAC(Prepared):
    r"""KFAC's damped inverse at one point, block by block, and the pass that it came from.

        v = G^-1 b,     J v = grad_lam (1/n) sum_i sigma_i(lam) < grad_theta l_i, v >
        < grad_theta l_i, v > = sum over layers of gamma_i . (V a_i)

    with the inputs a_i of that pass and one more backward pass for gamma_i, where the factors are
    new and all of the model's code is known (`bilevel_lite.trust.known_code`). Else J v is
    `bilevel_lite.products.cross_vp`; ``info.cross`` says so.

    On another device than the CPU nothing is waited for on the way to v; `look`, at its end, reads
    in one number whether all was well.

    Args:
        solver, problem, lam, theta, batch: What was prepared.
        blocks: What gives each block's part of v.
        own: The pass, if J v is to be read from it.
        info: What the diagnosis says of the factors.
        once: The blocks serve one solve.
        unseen: What nobody has looked at yet: the passes' output sides, the factorisations.

    Attributes:
        parts: The processes that each make a part of v; None if all is made here.
        looks: Set it to False to leave `look` to whoever solves. What failed is NaN until then.
        failed: Whether the last solve did, bool, shape (); None if there is nothing to look at.
    """

    def __init__(
        self, solver, problem, lam, theta, batch, blocks, own: Estimate | None, info,
        once=False, unseen=(),
    ):  # fmt: skip
        super().__init__(solver, problem, lam, theta, batch, shared=False)
        split = solver.split_inverses and solver._sums_parts
        self.parts = apart(problem.inner_loss)[1] if split else None
        self.blocks, self.own, self.info = blocks, own, info
        self.cost, self.once, self.unseen = solver.last_cost, once, unseen
        self.slopes = self.of = None  # < grad l_i, v >, and v if it was formed
        self.looks, self.failed = True, None

    def inverse(self, b: Tensor) -> Tensor:
        """Return G^-1 b."""
        return self._solve(b, True).solution

    def _solve(self, b, want_v):
        if type(self.solver)._solve is not Solver._solve:  # somebody's own
            return super()._solve(b, want_v)
        if self.blocks is None:
            raise ValueError("prepare: once=True serves one solve, and this is the second")
        made = want_v or self.own is None or self.parts is not None
        v = torch.empty_like(b) if made else None
        if self.own is not None:
            (one,) = self.own.passes
            self.slopes = one.tape.outputs.new_empty(one.tape.n)
        self.solved = b, v
        self._apply()
        bad = [] if v is None else [~torch.isfinite(v.sum())]
        bad += [part.faulty() for part in self.unseen]
        self.failed = torch.stack(bad).any() if bad else None
        if self.looks:
            self.look()
            self.unseen = ()
        if self.once and not self.unseen:
            self.blocks = None
        return KFACInfo(v, iterations=0, products=0, **self.info)

    def _apply(self):
        """Write v and < grad l_i, v >, block by block."""
        b, v = self.solved
        if self.own is not None:
            self.slopes.zero_()
        if self.parts is not None:
            self.blocks = list(self.blocks)
            _sum_parts(self.blocks, b, v, self.parts)
        for block in self.blocks:
            if v is not None and not (self.parts and isinstance(block, Block)):
                block(b, v)
            if self.own is not None:
                self.slopes += block.slopes(self.own, b, v)
        self.of = None if v is None else (v, versions(v))

    def look(self) -> bool:
        """Read `failed`, the one wait of a solve; factor again what failed, or say what is wrong.

        Returns:
            True if there was something to repair: v was then written anew, into the same tensor,
            and J v is to be asked for (again).

        Raises:
            ValueError: as `KFAC`.
        """
        if self.failed is None or not self._anywhere(bool(self.failed)):
            return False
        again = self._anywhere(any([part.require_sound() for part in self.unseen]))
        if again:
            self._apply()
        v = self.solved[1]
        if v is not None:
            require_finite({"KFAC: v": v}, lambda: _SINGULAR)
        return again

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so in any of the processes that each make a part of v."""
        if self.parts is None or not batched(self.theta):  # all see the same
            return here
        return bool(self.parts.sum(torch.tensor(float(here)).to(self.theta), "v") > 0)

    def _cross(self, v):
        mine = v is None or (self.of and same_memory(v, self.of[0]) and versions(v) == self.of[1])
        if self.slopes is None or not mine:
            return super()._cross(v)
        (one,) = self.own.passes
        at = self.lam, self.theta, [one.term], [self.slopes], [one.side.outputs]
        own, route = cross_from_slopes(*at), f"{type(self.solver).__name__}'s own pass"
        shared = isinstance(self.loss, Sharded)
        return self.loss.total(own, self.batch, "lam") if shared else own, route


def _sum_parts(blocks: list, b: Tensor, v: Tensor, group: Group) -> None:
    """Write into v what the processes have each made: every layer's part comes from one."""
    v.zero_()
    for block in blocks:
        if isinstance(block, Block):
            block(b, v)
    v.copy_(group.sum(v, "v"))


# solver -> the model whose factors it remembers; a copy of a solver has no entry
_MODELS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclass
class Memory:
    """What is kept between calls.

    Attributes:
        age: Solves since the factors were built.
        theta: Where they were built.
        parameters: Names and shapes of the parameters that they are of.
        factors: Layer name -> factors, for ``every`` and ``ema``; None where nothing is kept.
        diagonal: Parameter name -> diagonal.
        blocks: The damped inverses, for ``every``.
        damped: By which tau and rule the blocks were.
        made: How the factors were made, in words; None in a state that does not say it.
        without: Names of the parameters without a Kronecker block.
        inputs: ``fixed_batch``: layer -> (module, input, its version, A).
    """

    age: int = 0
    theta: Tensor | None = None
    parameters: list | None = None
    factors: dict[str, tuple] | None = None
    diagonal: dict[str, Tensor] = field(default_factory=dict)
    blocks: list | None = None
    without: tuple[str, ...] = ()
    inputs: dict[tuple, tuple] = field(default_factory=dict)
    damped: tuple | None = None
    made: str | None = None


class KFAC(Solver):
    r"""v = G^-1 b with G the damped KFAC approximation of the curvature; no iteration.

        v-block = (B + sqrt(tau)/pi I)^-1 V (A + pi sqrt(tau) I)^-1,     tau = damping + 2 l2

    Each factor is solved by Cholesky in the smaller of its two spaces (its dimension, or its
    columns: examples times positions), on a CPU layer by layer, elsewhere equal shapes in one call;
    no inverse is formed.

    Args:
        damping: delta, added to the curvature; zero only where an l2 term or full-rank factors
            make every block invertible.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``; see `kfac_factors`.
        samples: Draws per example for ``"mc"``.
        ema: beta in F <- beta F + (1 - beta) F_new for every factor and diagonal; 0 is off. The
            first estimate initialises; there is no bias correction.
        every: Build the factors on every ``every``-th call and reuse them in between.
        damping_rule: ``"heuristic"``, ``"factored"`` or ``"exact"``; see `bilevel_lite.kronecker`.
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
        group: The processes that share each batch, where the inner loss does not say it
            (`bilevel_lite.parallel.Sharded`): for `solve` alone, with a b of the whole batch. A, B
            and the diagonals are those of the whole batch: columns are gathered where they are
            fewer than a factor's dimension, else the factors are summed. The draws are those of
            one process.
        split_inverses: With a group, each process factors some of the layers, chosen by their
            size, and sends the others its part of v.

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

    damping: float = not_negative(default=1e-3, search=(1e-3, 1.0))
    fisher: str = again(Probes, "fisher")
    samples: int = again(Probes, "samples")
    ema: float = fraction(default=0.0)
    every: int = whole(default=1)
    damping_rule: str = one_of(*RULES, default="heuristic")
    bias: str = one_of("joint", "separate", default="joint")
    rest: str = one_of("diagonal", "damping", "drop", default="diagonal")
    fixed_batch: bool = flag(default=False)
    generator: torch.Generator | None = instance(torch.Generator, "a torch.Generator", default=None)
    seed: int = whole(default=0, least=0)
    group: Group | None = instance(Group, "a bilevel_lite.parallel.Group", default=None)
    split_inverses: bool = flag(default=False)

    _keeps_gradients = False
    _sums_parts = True  # what ``split_inverses`` shares out is v, in parts

    def __post_init__(self):
        super().__post_init__()
        self._generator = self.generator or torch.Generator().manual_seed(self.seed)
        self._probes()  # which refuses samples that are not drawn
        self._memory, self.last_cost = Memory(), 0.0

    def _probes(self) -> Probes:
        return Probes(self.fisher, self.samples, self._generator)

    def _block(
        self, layer: Layer, factors: tuple, tau: float, group: Factorisations | None = None
    ) -> Block:
        """V -> (B + delta_B I)^-1 V (A + delta_A I)^-1 for one layer, by the damping rule."""
        a, b = factors
        try:
            weight, bias = kronecker_inverse(a, b, tau, self.damping_rule, group)
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
        loss, risk, group = self._shared(problem.inner_loss)
        problem, memory = BilevelProblem(loss, problem.outer_loss), self._memory
        at, own = (self, problem, lam, theta, batch), None
        if self._kept(risk, group, theta):
            info, self.last_cost = self._staleness(theta), 0.0
            memory.age += 1
            return PreparedKFAC(*at, memory.blocks, None, info)
        memory.age, memory.blocks, memory.theta = 0, None, None  # gone, should the build fail
        cross = cross and isinstance(risk, WeightedRisk) and has_slopes(risk)
        # nothing may be kept, or diagonalised, before it was looked at
        look = looked_at(theta) or self.every > 1 or self.ema > 0 or self.damping_rule == "exact"
        done = self._estimate(loss, lam, theta, batch, cross and known_code(risk.model), look)
        if done.passes[0].own is not None and not done.passes[0].tape.unlike:
            own = done
        blocks, group = self._build(risk, done, keep=own is not None)
        unseen = () if look else tuple(one.side for one in done.passes)
        info, memory.age = self._staleness(theta), 1
        if self.every > 1:
            if group is not None:
                group.require_sound()
            memory.blocks, memory.theta = list(blocks), theta.detach().clone()
            memory.damped = self.damping + 2 * risk.l2, self.damping_rule
            return PreparedKFAC(*at, memory.blocks, own, info)
        unseen = unseen if group is None else (*unseen, group)
        return PreparedKFAC(*at, blocks if once else list(blocks), own, info, once, unseen)

    def _shared(self, loss: Any) -> tuple[Any, WeightedRisk | SumOfRisks, Group | None]:
        """The loss, `Sharded` if processes share its batch; the risk that is evaluated here."""
        if self.group is not None and not isinstance(loss, Sharded):
            loss = Sharded(require_risk(loss, type(self).__name__), self.group)
        risk, group = apart(loss)
        return loss, require_risk(risk, type(self).__name__), group

    def _estimate(self, loss, lam, theta, batch, true: bool = False, look=True) -> Estimate:
        """One pass for factors and diagonals (``true``: and for J v)."""
        risk = apart(loss)[0]
        if self.ema:
            self._require_known(risk, theta)
        tau = self.damping + 2 * risk.l2
        done = estimate(
            loss, lam, theta, batch, self._probes(), self.bias, self.rest,
            dual=tau > 0 and self.ema == 0, keep=self._keeps_gradients, true=true, look=look,
        )  # fmt: skip
        self._memory.without = tuple(done.rest)
        self.last_cost = COST["gradient"] * (1 + done.probes) / 2
        return done

    def _build(self, risk, done: Estimate, keep: bool) -> tuple[Iterable, Factorisations | None]:
        """Give the blocks' damped inverses; ``keep``: the tape is needed afterwards."""
        diagonal, like = done.diagonal, done.passes[0].tape.theta
        if self.every > 1 or self.ema:
            self._remember(risk, done, keep)
            diagonal, factors = self._memory.diagonal, self._memory.factors.__getitem__
        elif batched(like):
            factors = self._new(done, *self._parts(done), keep).pop
        else:

            def factors(name):
                return self._new(done, [name], keep)[name]

        group = None if done.part is None else done.part.group
        return self._made(like, risk, done.layers, factors, done.rest, diagonal, group)

    def _parts(self, done: Estimate) -> list[list[str]]:
        """Names of layers whose factors are made together: all or, on a CPU, each by itself."""
        names = [layer.name for layer in done.layers]
        return [names] if batched(done.passes[0].tape.theta) else [[name] for name in names]

    def _new(self, done: Estimate, names: list[str], keep: bool) -> dict[str, tuple]:
        """Layers' factors from the pass, of which (unless ``keep``) the inputs are then let go."""
        layers = [layer for layer in done.layers if layer.name in names]
        made = dict(zip(names, self._layer_factors(done, layers), strict=True))
        for one, own in () if keep else (use for name in names for use in done.uses[name]):
            del one.tape.calls[own.name]
        return made

    def _remember(self, risk, done: Estimate, keep: bool) -> None:
        memory = self._memory
        memory.factors = {
            name: _owned(own, done)
            for names in self._parts(done)
            for name, own in self._new(done, names, keep).items()
        }
        memory.diagonal = {
            name: self._mix(memory.diagonal.get(name), d) for name, d in done.diagonal.items()
        }
        memory.made = self._how(done.passes[0].tape.theta)
        memory.parameters = _parameters(risk)
        _MODELS[self] = weakref.ref(risk.model)

    def _made(
        self, like: Tensor, risk, layers: list[Layer], factors, rest, diagonal, processes=None
    ) -> tuple[Iterable[Block | DiagonalBlock], Factorisations | None]:
        """The blocks: as a stream, or all of them and how their factorisations came out."""
        away = self._away(layers, processes)
        if not batched(like):
            return self._blocks(risk, layers, factors, rest, diagonal, away), None
        if self.damping_rule == "exact":
            factors = _diagonalised({layer.name: factors(layer.name) for layer in layers}).pop
        group = Factorisations()
        blocks = list(self._blocks(risk, layers, factors, rest, diagonal, away, group))
        if not group.wanted:
            return blocks, None
        group.run()
        return blocks, group

    def _blocks(
        self,
        risk: WeightedRisk | SumOfRisks,
        layers: list[Layer],
        factors: Callable[[str], tuple],
        rest: dict[str, slice],
        diagonal: dict[str, Tensor],
        away: set[str],
        group: Factorisations | None = None,
    ) -> Iterator[Block | DiagonalBlock]:
        tau = self.damping + 2 * risk.l2
        for layer in layers:
            if group is not None:
                group.name = layer.name
            own = factors(layer.name)
            if layer.name in away:
                yield Block(layer, torch.zeros_like, torch.zeros_like)
            else:
                yield self._block(layer, own, tau, group)
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
        if group is None or not self.split_inverses:
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
        if module is own.module and same_memory(before, a) and version == a._version:
            return factor
        factor = done.a(layer)
        if a.untyped_storage().data_ptr() == one.tape.x.untyped_storage().data_ptr():
            factor = factor.spectrum().keep(one.tape.input_columns(own))
            self._memory.inputs[key] = (own.module, a, a._version, factor)
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
        loss, risk, _ = self._shared(loss)
        self._remember(risk, self._estimate(loss, lam, theta, batch), keep=False)
        return self.last_cost

    # -- remembering

    def _kept(self, risk: WeightedRisk | SumOfRisks, group: Group | None, theta: Tensor) -> bool:
        """True if there are blocks that are still to be used."""
        memory = self._memory
        if memory.theta is None or memory.age >= self.every:
            return False
        self._require_known(risk, theta)
        damped = self.damping + 2 * risk.l2, self.damping_rule
        if memory.factors is not None and (memory.blocks is None or memory.damped != damped):
            # brought back by a state, or damped by what is no longer said
            memory.damped = damped
            layers, rest = layers_of(risk, self.bias, set(memory.factors))
            factors = memory.factors.__getitem__
            made = self._made(memory.theta, risk, layers, factors, rest, memory.diagonal, group)
            blocks, group = made
            memory.blocks = list(blocks)
            if group is not None:
                group.require_sound()
        return memory.blocks is not None

    def _require_known(self, risk: WeightedRisk | SumOfRisks, theta: Tensor) -> None:
        """Refuse a problem that the remembered factors are not of."""
        memory, of = self._memory, _MODELS.get(self)
        if of is not None and of() is not risk.model:
            raise ValueError(
                f"{type(self).__name__}: remembers factors of another model; use a new solver for "
                "a new problem"
            )
        if memory.theta is not None and memory.theta.shape != theta.shape:
            raise ValueError(
                f"{type(self).__name__}: remembers factors for {memory.theta.numel()} parameters, "
                f"but theta has {theta.numel()}; use a new solver for a new problem"
            )
        if memory.made not in (None, made := self._how(theta)):
            raise ValueError(
                f"{type(self).__name__}: remembers factors of {memory.made}, expected {made} as "
                "here; use a new solver"
            )
        if memory.parameters is not None and memory.parameters != _parameters(risk):
            raise ValueError(
                f"{type(self).__name__}: remembers factors for parameters of other names or "
                "shapes (frozen or replaced since?); use a new solver for a new problem"
            )

    def _how(self, theta: Tensor) -> str:
        return f"bias={self.bias!r}, rest={self.rest!r} in {theta.dtype}"

    def _staleness(self, theta: Tensor) -> dict:
        """What the diagnosis says of the factors; they are fresh where theta is not remembered."""
        memory, drift = self._memory, 0.0
        if memory.theta is not None:
            size = float(memory.theta.norm())
            drift = float((theta.detach() - memory.theta).norm()) / (size or 1.0)
        without = {"without_block": memory.without, "rest": self.rest}
        return {"staleness": memory.age, "drift": drift, **without}

    def limit(self) -> None:
        """Return None: its system, the Kronecker one, is solved exactly."""

    def state_dict(self) -> dict:
        """Return what is remembered between calls: the generator, kept factors and their age."""
        memory, factors = self._memory, None
        if memory.factors is not None:
            factors = {name: [_pack(part) for part in fs] for name, fs in memory.factors.items()}
        return {
            **super().state_dict(),
            "generator": self._generator.get_state(),
            "age": memory.age,
            "theta": memory.theta,
            "factors": factors,
            "diagonal": dict(memory.diagonal),
            "parameters": memory.parameters,
            "without_block": list(memory.without),
            "made": memory.made,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned; kept factors are inverted again on the next call."""
        self._require_own(
            state, "generator", "age", "theta", "factors", "diagonal", "without_block"
        )
        super().load_state_dict(state)
        _MODELS.pop(self, None)
        self._generator.set_state(state["generator"].cpu())
        factors = state["factors"]
        if factors is not None:
            factors = {name: tuple(map(_unpack, parts)) for name, parts in factors.items()}
        self._memory = Memory(
            state["age"], state["theta"], state.get("parameters"), factors,
            dict(state["diagonal"]), without=tuple(state["without_block"]), made=state.get("made"),
        )  # fmt: skip
        self.last_cost = 0.0


def _diagonalised(factors: dict[str, tuple]) -> dict[str, tuple]:
    """The factors as spectra, by one call for each shape; a bias alone needs none."""
    pairs = [name for name, own in factors.items() if own[0] is not None]
    try:
        made = iter(spectra([f for name in pairs for f in factors[name][:2]]))
    except ValueError:  # the layer's own block will say it, by name
        return factors
    return factors | {name: (next(made), next(made), *factors[name][2:]) for name in pairs}


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


def _pack(part: Factor | Tensor | None):
    if part is None or isinstance(part, Tensor):
        return part
    return [type(part).__name__, {f.name: getattr(part, f.name) for f in fields(part)}]


def _unpack(part):
    return FORMS[part[0]](**part[1]) if isinstance(part, list) else part


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

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> inner = bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=0.1)
        >>> problem = bl.BilevelProblem(inner, bl.WeightedRisk(model))
        >>> batch = torch.eye(2), torch.tensor([0, 1]), torch.arange(2)
        >>> at = problem, torch.ones(2), torch.zeros(6), batch, batch
        >>> solver = bl.KFACRichardson(iters=30, kfac=bl.KFAC(fisher="exact", damping=0.1))
        >>> bl.hypergradient(*at, solver=solver).round(decimals=3)
        tensor([-0.2780, -0.2780])
        >>> bl.hypergradient(*at, solver=bl.Direct()).round(decimals=3)  # the truth
        tensor([-0.2780, -0.2780])
    """

    iters: int = whole(default=1)
    kfac: KFAC | None = None
    step: float = positive(default=1.0, search=(0.05, 2.0))
    damping: float = not_negative(default=0.0)
    warm_start: bool = flag(default=True)

    def __post_init__(self):
        super().__post_init__()
        if self.kfac is not None and not isinstance(self.kfac, KFAC):
            raise TypeError(f"kfac: got {self.kfac!r}, expected a bilevel_lite.KFAC")
        self.kfac = self.kfac or KFAC()

    def prepare(self, problem, lam, theta, batch, cross=False, once=False):
        """As `Solver.prepare`, with KFAC's factors."""
        at = super().prepare(problem, lam, theta, batch, cross, once)
        at.precondition = self.kfac.inverse(problem.inner_loss, lam, theta, batch)
        at.cost = self.kfac.last_cost
        return at

    def _solve(self, at, b):
        x0 = self._v if self.warm_start else None
        return richardson(at.matvec, b, self.iters, self.step, self.damping, x0, at.precondition)

    def state_dict(self) -> dict:
        """Return the last v and what the KFAC remembers."""
        return {**super().state_dict(), "kfac": self.kfac.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self._require_own(state, "kfac")
        self.kfac.load_state_dict(state["kfac"])
        super().load_state_dict(state)
