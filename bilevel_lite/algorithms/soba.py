"""SOBA and SABA: theta, v and lam move together, one step each, from one point."""

from typing import Any

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import Method, require_positive
from bilevel_lite.problem import BilevelProblem, examples, require_batch
from bilevel_lite.products import COST, first_and_second
from bilevel_lite.surroundings import ordinary

__all__ = ["SABA", "SOBA"]


class SOBA(Method):
    r"""Stochastic bilevel algorithm: one loop, three coupled steps, no system solved.

        D_theta = grad_theta g,  D_v = H v - b,  D_lam = grad_lam f - J v,  at one (lam, theta, v)
        theta <- theta - inner_lr D_theta,  v <- v - linear_lr D_v,  lam <- lam - outer_lr D_lam

    At a common fixed point theta solves the inner problem, v solves H v = b, and D_lam is the
    hypergradient. One batch of g serves grad_theta g, H and J.

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied.
        linear_lr: Step on v, in units of 1 / curvature.
        **common: See `bilevel_lite.algorithms.method.Method`.

    Raises:
        TypeError, ValueError: as `Method`; ValueError for an option out of range.

    Cost of a step: 2 gradients and one double backward pass (2), which gives H v and J v.
    Source: Dagreou, Ablin, Vaiter and Moreau (2022), arXiv 2201.13409.
    """

    choices = ("Hessian", "one gradient step, warm start", "single loop")
    remembers = ("v",)
    step_sizes = {"linear_lr": "linear_lr"}

    def __init__(
        self, problem: BilevelProblem, lam: Tensor, theta: Tensor, linear_lr: float, **common: Any
    ):
        require_positive("linear_lr", linear_lr)
        super().__init__(problem, lam, theta, **common)
        self.linear_lr, self.v = linear_lr, torch.zeros_like(self.theta)

    def _direction(self):
        inner_loss, g_theta, jv, hv = self._inner_oracle(self._draw("inner"))
        outer_loss, direct, b = self._outer_gradient(self._draw("outer"))
        self._move_theta(g_theta)
        self.v = self.v - self.linear_lr * (hv - b)
        return inner_loss, outer_loss, direct - jv, None

    def _inner_oracle(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g, grad_theta g, J v and H v, from one double backward pass."""
        self._spend(COST["gradient"] + COST["hvp"], batch)
        return first_and_second(self.problem.inner_loss, self.lam, self.theta, batch, self.v)


class SABA(SOBA):
    r"""SOBA with SAGA's variance reduction: each oracle on a batch is corrected by a table.

        estimate = current(batch i) - table[i] + mean(table),    table[i] <- current(batch i)

    for the five terms grad_theta g, H v, J v (a row for each inner batch) and b, grad_lam f (a row
    for each outer batch). The noise vanishes as the tables settle, so that constant steps
    converge. The memory is five tables of (number of batches) x dimension.

    Args:
        problem: The two losses.
        lam: Start of the outer variable; copied.
        theta: Start of the inner variable, shape (d,); copied.
        linear_lr: Step on v.
        inner_batches: The fixed minibatches of g, of one size.
        outer_batches: Those of f.
        generator: CPU generator that picks them.
        **common: See `bilevel_lite.algorithms.method.Method`, without batches.

    Raises:
        TypeError, ValueError: as `SOBA`; ValueError for an empty list or batches of unequal size.

    Cost of a step: as SOBA; the first step also fills the tables, one pass over all batches.
    Source: Dagreou et al. (2022).
    """

    choices = ("Hessian", "one variance-reduced step, warm start", "single loop, SAGA")
    remembers = ("v", "inner_table", "outer_table")
    needs = ()

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        linear_lr: float,
        inner_batches: list,
        outer_batches: list,
        generator: torch.Generator,
        **common: Any,
    ):
        _require_equal("inner_batches", inner_batches, problem.inner_loss)
        _require_equal("outer_batches", outer_batches, problem.outer_loss)
        if {"inner_batch", "outer_batch"} & set(common):
            raise ValueError("inner_batch, outer_batch: SABA takes inner_batches, outer_batches")
        super().__init__(problem, lam, theta, linear_lr, **common)
        self.fixed = {"inner": ordinary(inner_batches), "outer": ordinary(outer_batches)}
        self.generator = generator
        self._unit = self.fixed["inner"][0]
        self.inner_table = self.outer_table = None
        self._rows: list[tuple] = []  # what the tables get once the step is good

    def _direction(self):
        if self.inner_table is None:
            rows = [self._inner_oracle(batch)[1:] for batch in self.fixed["inner"]]
            self.inner_table = [torch.stack(column) for column in zip(*rows, strict=True)]
            rows = [self._outer_gradient(batch)[1:] for batch in self.fixed["outer"]]
            self.outer_table = [torch.stack(column) for column in zip(*rows, strict=True)]
        i, j = (self._pick(level) for level in ("inner", "outer"))
        inner_loss, *inner = self._inner_oracle(self.fixed["inner"][i])
        g_theta, jv, hv = _saga(self.inner_table, i, inner)
        outer_loss, *outer = self._outer_gradient(self.fixed["outer"][j])
        direct, b = _saga(self.outer_table, j, outer)
        self._rows = [(self.inner_table, i, inner), (self.outer_table, j, outer)]
        self._move_theta(g_theta)
        self.v = self.v - self.linear_lr * (hv - b)
        return inner_loss, outer_loss, direct - jv, None

    def _commit(self):
        for table, row, terms in self._rows:
            for column, term in zip(table, terms, strict=True):
                column[row] = term

    def _pick(self, level: str) -> int:
        count = len(self.fixed[level])
        return int(torch.randint(count, (1,), generator=self.generator))

    def _state(self, copies: bool) -> dict:
        counts = [len(self.fixed[level]) for level in ("inner", "outer")]
        generator = self.generator.get_state()
        return {**super()._state(copies), "generator": generator, "counts": counts}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned; see `Method.load_state_dict`.

        Raises:
            ValueError: as there, or if there were other numbers of batches.
        """
        counts = [len(self.fixed[level]) for level in ("inner", "outer")]
        if state.get("counts", counts) != counts:
            raise ValueError(
                f"state: is of {state['counts']} inner and outer batches, expected {counts}"
            )
        super().load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())


def _saga(table: list[Tensor], row: int, current: list[Tensor]) -> list[Tensor]:
    """Correct each term by its table."""
    pairs = zip(table, current, strict=True)
    return [term - column[row] + column.mean(0) for column, term in pairs]


def _require_equal(name: str, batches: list, loss: Any) -> None:
    if not isinstance(batches, list) or not batches:
        got = "an empty list" if batches == [] else type(batches).__name__
        raise ValueError(f"{name}: got {got}, expected a list of batches")
    for i, batch in enumerate(batches):
        require_batch(f"{name}[{i}]", batch, loss)
    sizes = {examples(batch) for batch in batches} - {None}
    if len(sizes) > 1:
        raise ValueError(
            f"{name}: sizes are {sorted(sizes)}, expected one size (the tables' means are means "
            "over batches)"
        )
