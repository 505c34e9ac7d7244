"""What the stored results of unlearnable examples say: accuracies, by noise, radius and victim."""

from typing import Any

from bilevel_lite.drawings import ch16
from bilevel_lite.experiment.comparing import joined
from bilevel_lite.plotting import STYLE, plt
from bilevel_lite.tasks.unlearnable_noise import RADII, VICTIMS

__all__ = ["accuracies", "draw_study"]


def accuracies(row: dict) -> dict[str, list[float]]:
    """Of a study's row: test accuracy in % by victim, and the probe's; a number for each seed."""
    runs = sorted(row["runs"], key=lambda run: run["seed"])
    keys = [key for key in (*VICTIMS, "probe") if all(key in run["victims"] for run in runs)]
    return {key: [100 * run["victims"][key] for run in runs] for key in keys}


def draw_study(stored: dict) -> Any:
    """The figure of the study: `bilevel_lite.drawings.ch16.study` of what is stored."""
    rows = {name: accuracies(row) for name, row in joined(stored["runs"]).items() if row["runs"]}
    panels = {
        radius: {
            name.removesuffix(f"-{radius}"): row
            for name, row in rows.items()
            if name.endswith(f"-{radius}")
        }
        for radius in sorted(RADII, reverse=True)
        if any(name.endswith(f"-{radius}") for name in rows)
    }
    with plt.rc_context(STYLE):
        return ch16.study(panels, rows["clean"])
