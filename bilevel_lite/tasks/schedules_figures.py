"""What the stored study of schedules says: losses by way and seed, the lowest so far, the rates."""

from typing import Any

import numpy as np

from bilevel_lite.drawings import ch18
from bilevel_lite.experiment.comparing import joined
from bilevel_lite.plotting import STYLE, plt

__all__ = ["courses", "draw_study", "fresh", "lowest"]


def fresh(row: dict, key: str) -> list[float]:
    """A measure of a study's row, one number for each fresh training of each seed."""
    runs = sorted(row["runs"], key=lambda run: run["seed"])
    return [fit[key] for run in runs for fit in run["fresh"]["each"]]


def lowest(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """Gradients, and the lowest validation loss that they had bought, a mean over the seeds."""
    histories = [run["history"] for run in row["runs"]]
    spent = np.array([look["gradients"] for look in histories[0]])
    losses = np.array([[look["tuning_loss"] for look in history] for history in histories])
    return spent, np.minimum.accumulate(losses, axis=1).mean(0)


def courses(row: dict) -> np.ndarray:
    """The chosen learning rate over a training, shape (seeds, points)."""
    return np.array([run["course"] for run in row["runs"]])


def draw_study(stored: dict) -> Any:
    """The figure of the study: `bilevel_lite.drawings.ch18.study` of what is stored."""
    rows = {name: row for name, row in joined(stored["runs"]).items() if row["runs"]}
    with plt.rc_context(STYLE):
        return ch18.study(
            {name: courses(row) for name, row in rows.items()},
            {name: lowest(row) for name, row in rows.items()},
            {name: fresh(row, "test_loss") for name, row in rows.items()},
        )
