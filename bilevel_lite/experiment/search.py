"""The same search for each of several variants of a run."""

from statistics import mean

__all__ = ["pace"]


def pace(row: dict, key: str) -> float:
    """``"seconds"`` or ``"gradients"`` per outer iteration up to the best, mean over the seeds."""
    return mean(run["best"][key] / run["best"]["iteration"] for run in row["runs"])
