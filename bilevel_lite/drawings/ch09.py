"""Drawings of chapter 9: two methods as time lines, and a map of methods."""

from bilevel_lite.drawings import PALETTE, SOFT, arrow, box, canvas, text

__all__ = ["loops", "places"]


def loops():
    """Two outer iterations of AID and of SOBA: what runs when, and what is kept."""
    figure, (left, right) = canvas(9.0, 2.7, columns=2)
    for x in (1.25, 3.25):
        for row, (y, color) in enumerate(((1.75, 0), (1.1, 2), (0.45, 1))):
            at = x - 0.6 + 0.6 * row
            box(left, at, y, (r"$\theta$ steps", "CG", "step")[row], 0.72, 0.4, color)
        arrow(left, (x - 0.6, 1.53), (x - 0.12, 1.32))
        arrow(left, (x, 0.88), (x + 0.45, 0.67))
    arrow(left, (1.03, 1.75), (2.27, 1.75), r"$\theta$ kept", up=0.14)
    arrow(left, (2.23, 0.45), (2.6, 1.5), bend=0.3)
    text(left, 2.2, 1.1, "$v$ dropped", color=SOFT)
    text(left, 2.25, 2.5, "AID: one after the other")
    for step, x in enumerate((0.75, 2.0, 3.25)):
        for y, color in ((1.75, 0), (1.1, 2), (0.45, 1)):
            box(right, x, y, "step", 0.6, 0.4, color)
            if step < 2:
                for target in (1.75, 1.1, 0.45):
                    shade = "black" if target == y else SOFT
                    arrow(right, (x + 0.32, y), (x + 0.93, target), color=shade)
    text(right, 2.0, 2.5, "SOBA: all at once, all three kept")
    for ax in (left, right):
        for y, name, color in ((1.75, r"$\theta$", 0), (1.1, "$v$", 2), (0.45, r"$\lambda$", 1)):
            text(ax, 0.08, y, name, color=PALETTE[color])
        ax.plot([0.2, 4.05], [0.12, 0.12], color=SOFT, lw=0.8)
        text(ax, 4.3, 0.12, "time", color=SOFT, ha="center", fontsize=7.5)
    return figure


def places():
    """Rows: what stands for H. Columns: how v is found. Bold are the six of the race."""
    figure, ax = canvas(9.0, 3.0)
    rows = (
        ("the Hessian", 2.15),
        ("something cheaper", 1.35),
        ("nothing: values\nand gradients of $g$", 0.5),
    )
    left, wide = 1.75, 1.8
    heads = ("solved at once", "few terms from zero", "goes on from the last $v$", "no $v$ at all")
    for k, words in enumerate(heads):
        text(ax, left + wide * (k + 0.5), 2.78, words, color=SOFT)
    for words, y in rows:
        text(ax, 0.85, y, words, color=SOFT)
    for y in (0.95, 1.75, 2.6):
        ax.plot([0.1, 8.95], [y, y], color=SOFT, lw=0.5)
    cells = (
        (0, 2.15, "AID\n(exact)", True),
        (1, 2.15, "AID, ITD\nstocBiO, MRBO", True),
        (2, 2.15, "SOBA, NBO\nAmIGO, SABA", True),
        (0, 1.35, "SAMA\nBSG-1, NHGD", True),
        (3, 0.5, "F2SA\nBVFSM, BOME", True),
    )
    for k, y, words, raced in cells:
        x = left + wide * (k + 0.5)
        face = 0 if raced else 7
        box(ax, x, y, "", 1.6, 0.62, face)
        first, *more = words.split("\n")
        text(ax, x, y + (0.13 if more else 0), first, weight="bold" if raced else "normal")
        if more:
            text(ax, x, y - 0.15, more[0], fontsize=8)
    return figure
