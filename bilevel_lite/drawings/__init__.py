"""The drawings of the chapters that are no data plots: ``bl.drawings.ch01.loop()``.

One module a chapter; each function returns a figure. What they are drawn with stands here.

Example:
    >>> figure, ax = bl.drawings.canvas(width=4, height=2)
    >>> bl.drawings.box(ax, 2, 1, "theta")
"""

from importlib import import_module

import matplotlib.pyplot as plt

from bilevel_lite.plotting import PALETTE

__all__ = ["arrow", "box", "canvas", "text"]

INK, SOFT = "#000000", "#999999"


def __getattr__(name: str):
    """Import a chapter's drawings when they are first asked for."""
    if name.startswith("ch") and name[2:4].isdigit():
        return import_module(f"bilevel_lite.drawings.{name}")
    raise AttributeError(f"module 'bilevel_lite.drawings' has no attribute {name!r}")


def canvas(width: float = 9.0, height: float = 2.8, columns: int = 1):
    """Make a figure without axes lines, in units of inches, the origin at the lower left.

    Returns:
        (figure, axes), as ``plt.subplots`` gives them.

    Example:
        >>> figure, ax = bl.drawings.canvas(width=4, height=2)
        >>> ax.get_xlim() == (0, 4)
        True
    """
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
    for ax in axes[0]:
        ax.set(xlim=(0, width / columns), ylim=(0, height), aspect="equal")
        ax.axis("off")
    return figure, axes[0, 0] if columns == 1 else axes[0]


def box(ax, x: float, y: float, words: str, width: float = 1.6, height: float = 0.6, color=0):
    """Draw a box around (x, y) with words in it; ``color`` is a number of the palette."""
    face = PALETTE[color] if isinstance(color, int) else color
    ax.add_patch(
        plt.Rectangle(
            (x - width / 2, y - height / 2), width, height, facecolor=face, alpha=0.15, lw=0
        )
    )
    ax.add_patch(
        plt.Rectangle((x - width / 2, y - height / 2), width, height, fill=False, ec=face, lw=1.2)
    )
    text(ax, x, y, words)


def arrow(ax, start: tuple, end: tuple, words: str = "", color=INK, bend: float = 0.0, up=0.12):
    """Draw an arrow from ``start`` to ``end``, with words ``up`` above its middle."""
    style = f"arc3,rad={bend}"
    ax.annotate(
        "", end, start, arrowprops={"arrowstyle": "->", "color": color, "connectionstyle": style}
    )
    if words:
        text(ax, (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + up, words, color=color)


def text(ax, x: float, y: float, words: str, color=INK, **style):
    """Write words centred at (x, y)."""
    ax.text(x, y, words, ha=style.pop("ha", "center"), va="center", color=color, **style)
