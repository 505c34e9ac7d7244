"""One style for every figure of the book."""

import matplotlib as mpl
import matplotlib.pyplot as plt

__all__ = ["COLORS", "PALETTE", "figure", "use_style"]

# Okabe-Ito: distinguishable with any common colour vision. One meaning each, in every chapter.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
COLORS = {
    "exact": "#000000",
    "cg": "#0072B2",
    "neumann": "#D55E00",
    "identity": "#999999",
    "kfac": "#009E73",
    "unrolled": "#CC79A7",
    "differences": "#E69F00",
    "clean": "#0072B2",
    "corrupted": "#D55E00",
}

STYLE = {
    "figure.figsize": (5.0, 3.0),
    "figure.dpi": 90,
    "savefig.dpi": 90,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=PALETTE),
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "bilevel_lite",  # the same figure gives the same file
    "svg.fonttype": "path",
}


def use_style() -> None:
    """Apply the book's figure style to matplotlib."""
    mpl.rcParams.update(STYLE)


def figure(columns: int = 1, height: float = 2.8, **kwargs):
    """Make a figure with a row of axes in the book's sizes.

    Args:
        columns: Axes side by side; 1 gives a 5-inch-wide figure, more a 9-inch one.
        height: In inches.
        **kwargs: Passed to ``plt.subplots``.

    Returns:
        (figure, axes) as ``plt.subplots`` gives them.
    """
    width = 5.0 if columns == 1 else 9.0
    return plt.subplots(1, columns, figsize=(width, height), **kwargs)
