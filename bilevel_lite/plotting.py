"""One style for every figure of the book.

Example:
    >>> figure, ax = bl.plotting.figure()
    >>> line = ax.plot([1, 2])
"""

import matplotlib as mpl
import matplotlib.pyplot as plt

__all__ = [
    "COLORS",
    "PALETTE",
    "draw_audit",
    "figure",
    "interval",
    "use_style",
]

# Okabe-Ito: distinguishable with any common colour vision. One meaning each, in every chapter.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
COLORS = {
    "exact": "#000000",
    "cg": "#0072B2",
    "neumann": "#D55E00",
    "identity": "#999999",
    "kfac": "#009E73",
    "unrolled": "#CC79A7",
    "forward": "#56B4E9",
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

    Example:
        >>> figure, axes = bl.plotting.figure(columns=2)
        >>> len(axes), figure.get_size_inches().tolist()
        (2, [9.0, 2.8])
    """
    width = 5.0 if columns == 1 else 9.0
    return plt.subplots(1, columns, figsize=(width, height), **kwargs)


def interval(ax, y: float, each: list[float], middle: float, half: float, color: str) -> None:
    """Draw a difference: its seeds as ticks, the mean and its interval, filled where it is decided.

    Args:
        ax: Axes, with a line at zero of their own.
        y: Height.
        each: The difference on each seed.
        middle: Their mean.
        half: Half width of the interval; infinite where there is none, which is not drawn.
        color: Of all of it.

    Example:
        >>> figure, ax = bl.plotting.figure()
        >>> bl.plotting.interval(ax, 0, [-0.2, -0.1], -0.15, 0.1, "black")
    """
    ax.plot(each, [y] * len(each), "|", ms=6, color=color, alpha=0.7)
    if half < float("inf"):
        ax.errorbar([middle], [y], xerr=[half], fmt="o", ms=4.5, capsize=2, lw=1, color=color,
                    mfc=color if abs(middle) > half else "white")  # fmt: skip


def draw_audit(report):
    """Draw an `AuditReport`: for each solver the lengths of its error's parts, and the whole.

    Args:
        report: What `bilevel_lite.audit` returned.

    Returns:
        The figure.
    """
    shades = dict(
        zip(
            ("inner", "curvature", "linear", "minibatch"),
            (PALETTE[3], PALETTE[2], PALETTE[0], PALETTE[4]),
            strict=True,
        )
    )
    parts = list(report.rows[0].parts)
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(max(5.0, 1.1 * len(report.rows)), 3.0))
        width = 0.8 / len(parts)
        for i, part in enumerate(parts):
            at = [x - 0.4 + (i + 0.5) * width for x in range(len(report.rows))]
            # a part that is only rounding has no bar
            sizes = [row.parts[part] if row.parts[part] > 1e-9 else 0 for row in report.rows]
            ax.bar(at, sizes, width, color=shades[part], label=part)
        ax.plot(
            range(len(report.rows)), [row.relative_error for row in report.rows], "_",
            color=COLORS["exact"], ms=30, label="whole error",
        )  # fmt: skip
        ax.set_xticks(range(len(report.rows)), [row.name for row in report.rows], rotation=20)
        ax.set(yscale="log", ylabel="length / length of the truth")
        ax.grid(False, axis="x")
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)
    return fig
