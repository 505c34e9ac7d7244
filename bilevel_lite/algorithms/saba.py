"""SABA: SOBA with a table of what each fixed batch last gave, so that the noise vanishes."""

import torch

from bilevel_lite.algorithms.soba import SOBA
from bilevel_lite.options import instance
from bilevel_lite.problem import examples
from bilevel_lite.refuse import require_batch
from bilevel_lite.surroundings import ordinary

__all__ = ["SABA"]


class SABA(SOBA):
    r"""SOBA with SAGA's variance reduction: each oracle on a batch is corrected by a table.

        estimate = current(batch i) - table[i] + mean(table),    table[i] <- current(batch i)

    for the five terms grad_theta g, H v, J v (a row for each inner batch) and b, grad_lam f (for
    each outer batch), so that the noise vanishes as the tables settle, and constant steps converge.
    The memory is five tables of (number of batches) x dimension.

    Args:
        inner_batches: The fixed minibatches of g, a list of batches of one size.
        outer_batches: Those of f. ``generator`` picks among both.
        **common: See `bilevel_lite.algorithms.method.Method`, without batches.

    Cost of a step: as SOBA; the first step also fills the tables, one pass over all batches.
    Source: Dagreou et al. (2022).

    Example:
        >>> g = lambda lam, theta, x: ((theta - lam - x) ** 2).sum()  # solved by lam + mean of x
        >>> f = lambda lam, theta, x: ((theta - 1) ** 2).sum()
        >>> problem, lam, theta = bl.BilevelProblem(g, f), torch.zeros(2), torch.zeros(2)
        >>> x, draws = list(torch.tensor([[0.5], [-0.5]])), torch.Generator().manual_seed(0)
        >>> method = bl.SABA(problem, lam, theta, 0.1, x, x, draws, inner_lr=0.1, outer_lr=0.05)
        >>> steps = [method.step() for _ in range(200)]
        >>> method.lam.round(decimals=2)
        tensor([1., 1.])
    """

    inner_batches: list
    outer_batches: list
    generator: torch.Generator = instance(torch.Generator, "a torch.Generator", help="On the CPU")

    choices = ("Hessian", "one variance-reduced step, warm start", "single loop, SAGA")
    remembers = ("v", "inner_table", "outer_table", "generator", "counts")
    roles = needs = ()  # it has fixed batches instead

    def __post_init__(self):
        super().__post_init__()
        for level in ("inner", "outer"):
            name = f"{level}_batches"
            _require_equal(name, getattr(self, name), getattr(self.problem, f"{level}_loss"))
            setattr(self, name, ordinary(getattr(self, name)))
        self.counts = [len(self.inner_batches), len(self.outer_batches)]
        self.inner_table = self.outer_table = None
        self._unit, self._rows = self.inner_batches[0], []  # rows: for the tables, in `_commit`

    def _direction(self):
        if self.inner_table is None:
            g = zip(*(self._inner_oracle(batch)[1:] for batch in self.inner_batches), strict=True)
            f = zip(*(self._f(batch)[1:] for batch in self.outer_batches), strict=True)
            self.inner_table, self.outer_table = ([*map(torch.stack, terms)] for terms in (g, f))
        where = {"generator": self.generator, "device": self.generator.device}
        i, j = (int(torch.randint(n, (1,), **where)) for n in self.counts)
        inner_loss, *inner = self._inner_oracle(self.inner_batches[i])
        g_theta, jv, hv = _saga(self.inner_table, i, inner)
        outer_loss, *outer = self._f(self.outer_batches[j])
        direct, b = _saga(self.outer_table, j, outer)
        self._rows = [(self.inner_table, i, inner), (self.outer_table, j, outer)]
        self._move_theta(g_theta)
        self.v = self.v - self.linear_lr * (hv - b)
        return inner_loss, outer_loss, direct - jv, None

    def _commit(self):
        for table, row, terms in self._rows:
            for column, term in zip(table, terms, strict=True):
                column[row] = term

    def _require_own(self, state):
        super()._require_own(state)
        if (n := state["values"]["counts"]) != self.counts:
            raise ValueError(f"state: is of {n} inner and outer batches, expected {self.counts}")


def _saga(table, row, current):
    """Correct each term by its table."""
    return [now - old[row] + old.mean(0) for old, now in zip(table, current, strict=True)]


def _require_equal(name, batches, loss):
    if not isinstance(batches, list) or not batches:
        got = "an empty list" if batches == [] else type(batches).__name__
        raise ValueError(f"{name}: got {got}, expected a list of batches")
    for i, batch in enumerate(batches):
        require_batch(f"{name}[{i}]", batch, loss)
    sizes = sorted({examples(batch) for batch in batches} - {None})
    if len(sizes) > 1:
        raise ValueError(f"{name}: sizes are {sizes}, expected one size (means are over batches)")
