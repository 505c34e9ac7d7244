"""Comparing what is stored: rows of studies on fresh seeds, by pairs.

A seed draws split, noise, start and batches and moves all methods together; a search looks for the
luckiest point of its own seed. So methods are compared by pairs, on seeds that no search has seen.
"""

from collections.abc import Iterable
from statistics import mean

import numpy as np

from bilevel_lite.experiment.folder import stored

__all__ = ["courses", "difference", "fresh", "joined", "memory_pairs"]

SEARCHED_ON = 0  # the seed of every search


def fresh(*names: str) -> dict[str, dict]:
    """The rows of stored studies by method, with final runs on seeds that no search has seen.

    A point was chosen on seed 0, so its run there is the luckiest of its runs. Where further seeds
    at a chosen point were run later, the row has them too.

    Args:
        names: Of stored results (`bilevel_lite.experiment.stored`), studies or single runs.

    Returns:
        Method -> its row; ``runs`` without the search's seed.

    Raises:
        ValueError: if a method stands at two points.

    Example:
        >>> from bilevel_lite.experiment.comparing import fresh
        >>> rows = fresh("hyperclean_mnist_mlp_solvers")
        >>> all(run["seed"] > 0 for row in rows.values() for run in row["runs"])
        True
    """
    return joined(run for name in names for run in stored(name)["runs"])


def joined(results: Iterable[dict]) -> dict[str, dict]:
    """The rows of studies and runs that are at hand, by method, as `fresh` has them."""
    rows: dict[str, dict] = {}
    for row in (row for result in results for row in _rows(result)):
        runs = [run for run in row["runs"] if run["seed"] != SEARCHED_ON]
        have = rows.setdefault(row["method"], {**row, "runs": []})
        one, other = ({**r.get("settings", {}), **(r["chosen"] or {})} for r in (row, have))
        if bad := {k: (one[k], other[k]) for k in set(one) & set(other) if one[k] != other[k]}:
            raise ValueError(f"{row['method']}: stands at two points, expected one: {bad}")
        have["runs"] = [*have["runs"], *runs]
    return rows


def courses(*names: str) -> dict[str, list[dict]]:
    """The log of one run of each method in stored results: that of the last seed that has one.

    Args:
        names: As in `fresh`.
    """
    rows = [row for name in names for run in stored(name)["runs"] for row in _rows(run)]
    return {
        row["method"]: one["history"] for row in rows for one in row["runs"] if "history" in one
    }


def _rows(run: dict) -> list[dict]:
    """The rows of a study, or a run of its own as one."""
    if "results" in run:
        return run["results"]
    s, history = dict(run["settings"]), run["history"]
    one = {"seed": s.pop("seed"), "best": run["best"], "last": history[-1], "history": history}
    return [{"method": s["method"], "settings": {}, "chosen": s, "trials": [], "runs": [one]}]


def difference(
    one: dict, other: dict, key: str = "test_loss", at: str = "best"
) -> tuple[list[float], float, float]:
    """Compare two variants by pairs, at one look of the seeds that both have.

    Args:
        one: A row of a study's result.
        other: Another one.
        key: The measure.
        at: Which look: ``"best"``, the chosen one, or ``"last"``.

    Returns:
        ``one`` minus ``other`` for each seed, their mean, and the half width of its 95 % interval
        by Student's t (infinite for a single seed).
    """
    from scipy import stats

    a, b = ({run["seed"]: run[at][key] for run in row["runs"]} for row in (one, other))
    each = [a[seed] - b[seed] for seed in sorted(set(a) & set(b))]
    if len(each) < 2:
        return each, mean(each) if each else np.nan, np.inf
    half = stats.t.ppf(0.975, len(each) - 1) * np.std(each, ddof=1) / len(each) ** 0.5
    return each, mean(each), float(half)


def memory_pairs(rows: list[dict]) -> dict[str, tuple[list[float], float, float]]:
    """What a memory of the factors changes where nothing else differs, the point neither.

    Args:
        rows: Of the study ``ema``.

    Returns:
        Memory minus none, as `difference` gives it, for all pairs with one batch size, damping and
        point, by "batch, damping, memory (inner_lr, outer_lr)".
    """
    out = {}
    for one in (row for row in rows if row["settings"]["ema"] > 0):
        s, at = one["settings"], one["chosen"]
        for none in rows:
            if none["chosen"] == at and none["settings"] == {**s, "ema": 0.0}:
                point = ", ".join(f"{value:g}" for value in at.values())
                name = f"{s['batch_size']}, {s['damping']:g}, {s['ema']:g} ({point})"
                out[name] = difference(one, none)
    return out
