"""The drawing of chapter 5: one layer, what passes through it, and what KFAC keeps of it."""

import matplotlib.pyplot as plt

from bilevel_lite.drawings import INK, PALETTE, SOFT, arrow, box, canvas, text

__all__ = ["layer"]

FORWARD, BACKWARD = PALETTE[0], PALETTE[1]


def _column(ax, x, y, entries, color, words):
    """A vector as a stack of cells, its name below."""
    for k in range(entries):
        corner = (x - 0.11, y + (k - entries / 2) * 0.22)
        ax.add_patch(plt.Rectangle(corner, 0.22, 0.22, facecolor=color, alpha=0.3, lw=0))
        ax.add_patch(plt.Rectangle(corner, 0.22, 0.22, fill=False, ec=color, lw=0.8))
    text(ax, x, y - entries * 0.11 - 0.16, words, color=color)


def _square(ax, x, y, entries, color, words):
    """An outer product as a grid, its name below."""
    for i in range(entries):
        for j in range(entries):
            corner = (x + (j - entries / 2) * 0.16, y + (i - entries / 2) * 0.16)
            shade = 0.2 + 0.5 * ((2 * i + 1) * (2 * j + 1) % 5) / 5
            ax.add_patch(plt.Rectangle(corner, 0.16, 0.16, facecolor=color, alpha=shade, lw=0))
    half = entries * 0.08
    ax.add_patch(
        plt.Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, ec=color, lw=1.0)
    )
    text(ax, x, y - half - 0.16, words, color=color)


def layer():
    """Forward a goes in and z comes out; backward a probe s arrives at z as gamma."""
    figure, ax = canvas(9.0, 4.1)
    y = 3.05
    _column(ax, 0.75, y, 5, FORWARD, r"input $a$, $d_2$ entries")
    box(ax, 2.45, y, r"layer $z = Wa$" + "\n" + r"$W$: $d_1\times d_2$", 1.5, 0.9, 7)
    _column(ax, 4.15, y, 3, FORWARD, "")
    text(ax, 4.15, y + 0.47, r"$z$, $d_1$ entries", color=FORWARD)
    box(ax, 5.85, y, "rest of\nthe network", 1.3, 0.9, 7)
    box(ax, 7.95, y, r"outputs $o$" + "\n" + r"loss $\ell$", 1.3, 0.9, 7)
    for start, end in ((0.95, 1.64), (3.25, 3.98), (4.33, 5.14), (6.55, 7.24)):
        arrow(ax, (start, y + 0.08), (end, y + 0.08), color=FORWARD)
    arrow(ax, (7.24, y - 0.22), (6.55, y - 0.22), color=BACKWARD)
    text(ax, 6.9, y - 0.4, r"probe $s$", color=BACKWARD)
    arrow(ax, (5.14, y - 0.22), (4.33, y - 0.22), color=BACKWARD)
    text(ax, 4.75, y - 0.4, r"$\gamma$", color=BACKWARD)

    arrow(ax, (0.75, 2.1), (0.75, 1.52), color=FORWARD)
    text(ax, 1.42, 1.82, r"mean of $aa^\top$", color=FORWARD)
    arrow(ax, (4.15, 2.6), (4.15, 1.52), color=BACKWARD)
    text(ax, 4.86, 1.82, r"mean of $\gamma\gamma^\top$", color=BACKWARD)
    _square(ax, 0.75, 1.0, 5, FORWARD, r"$A$: $d_2\times d_2$")
    _square(ax, 4.15, 1.0, 3, BACKWARD, r"$B$: $d_1\times d_1$")

    # the Kronecker product: every entry of B multiplies a copy of A
    x0, y0, tile = 6.75, 0.35, 0.48
    for i in range(3):
        for j in range(3):
            corner = (x0 + j * tile, y0 + i * tile)
            shade = 0.2 + 0.5 * ((2 * i + 1) * (2 * j + 1) % 5) / 5
            ax.add_patch(plt.Rectangle(corner, tile, tile, fc=BACKWARD, alpha=shade, lw=0))
            for k in range(1, 5):
                at = k * tile / 5
                for line in (
                    ([corner[0] + at] * 2, [corner[1], corner[1] + tile]),
                    ([corner[0], corner[0] + tile], [corner[1] + at] * 2),
                ):
                    ax.plot(*line, color=FORWARD, lw=0.4)
            ax.add_patch(plt.Rectangle(corner, tile, tile, fill=False, ec=INK, lw=0.8))
    text(ax, x0 + 1.5 * tile, y0 - 0.17, r"$B\otimes A$: $d_1d_2\times d_1d_2$, never formed")
    text(ax, 2.45, 1.0, "and", color=SOFT)
    arrow(ax, (4.75, 1.0), (6.55, 1.0), color=INK)
    text(ax, 5.65, 1.16, "each entry of $B$")
    text(ax, 5.65, 0.84, "times a copy of $A$")
    return figure
