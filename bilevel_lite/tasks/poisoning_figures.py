"""What the stored results of poisoning say: points lost, by attack, seed and defence."""

from typing import Any

import numpy as np

from bilevel_lite.drawings import ch15
from bilevel_lite.experiment.comparing import joined
from bilevel_lite.plotting import STYLE, plt

__all__ = ["curves", "draw_study", "lost"]

KEYS = ("test_accuracy", "distance_test_accuracy", "trimmed_test_accuracy")


def lost(row: dict, clean: dict) -> tuple[list[float], list[float], list[float]]:
    """Points of test accuracy that fresh defenders lose, against those of the same seeds.

    Args:
        row: Of a study's result, an attack; or the clean row itself, for the price of a defence.
        clean: The row of fresh defenders on clean rows.

    Returns:
        Without a defence, under the distance, under the trimmed loss: a number for each seed that
        both have, always less than a fresh defender on clean rows *without* a defence.
    """
    base = {run["seed"]: run["defender"][KEYS[0]] for run in clean["runs"]}
    runs = sorted((run for run in row["runs"] if run["seed"] in base), key=lambda run: run["seed"])
    none, distance, trimmed = (
        [100 * (base[run["seed"]] - run["defender"][key]) for run in runs] for key in KEYS
    )
    return none, distance, trimmed


def curves(row: dict, clean: dict) -> tuple[list[int], list[float]]:
    """Outer iterations, and points of *tuning* accuracy that short fresh defenders lose there.

    The mean over the seeds that both have.
    """
    base = {run["seed"]: run["last"]["tuning_accuracy"] for run in clean["runs"]}
    runs = [run for run in row["runs"] if run["seed"] in base]
    steps = [look["iteration"] for look in runs[0]["history"]]
    each = [
        [100 * (base[run["seed"]] - look["tuning_accuracy"]) for look in run["history"]]
        for run in runs
    ]
    return steps, np.mean(each, axis=0).tolist()


def draw_study(stored: dict) -> Any:
    """The figure of the study: `bilevel_lite.drawings.ch15.study` of what is stored."""
    rows = joined(stored["runs"])
    attacks = {name: row for name, row in rows.items() if name != "clean" and row["runs"]}
    moving = {name: row for name, row in attacks.items() if name not in ("flip", "noise")}
    with plt.rc_context(STYLE):
        return ch15.study(
            {name: lost(row, rows["clean"]) for name, row in attacks.items()},
            {name: curves(row, rows["clean"]) for name, row in moving.items()},
        )
