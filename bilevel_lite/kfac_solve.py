"""One solve by KFAC: the blocks of G^-1, applied; J v from the pass that they came from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_lite.blocks import Block
from bilevel_lite.factors import Estimate
from bilevel_lite.kronecker import batched, same_memory
from bilevel_lite.linsolve import SolveInfo
from bilevel_lite.parallel import Group, Sharded, apart
from bilevel_lite.products import cross_from_slopes
from bilevel_lite.refuse import require_finite, versions
from bilevel_lite.solvers import Prepared, Solver

__all__ = ["KFACInfo", "PreparedKFAC"]


@dataclass
class KFACInfo(SolveInfo):
    """The diagnosis of one KFAC solve: that of `SolveInfo` and what is particular to KFAC.

    ``residual`` is that of the true Hessian, H v + damping v against b: it says how good an
    approximation KFAC is here, not whether its own system was solved.

    Attributes:
        staleness: Calls (`prepare`, `inverse`) since the factors were built; 0 is fresh.
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
        then: To be called once all blocks are made; None if they are.

    Attributes:
        parts: The processes that each make a part of v; None if all is made here.
        looks: Set it to False to leave `look` to whoever solves. What failed is NaN until then.
        failed: Whether the last solve did, bool, shape (); None if there is nothing to look at.
    """

    def __init__(
        self, solver, problem, lam, theta, batch, blocks, own: Estimate | None, info,
        once=False, unseen=(), then=None,
    ):  # fmt: skip
        super().__init__(solver, problem, lam, theta, batch, shared=False)
        split = solver.split_inverses and solver._sums_parts
        self.parts = apart(problem.inner_loss)[1] if split else None
        self.blocks, self.own, self.info = blocks, own, info
        self.cost, self.once, self.unseen, self.then = solver.last_cost, once, unseen, then
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
        if self.then is not None:
            self.then()
            self.then = None
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
