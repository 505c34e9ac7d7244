"""Drawing of chapter 9b: where on the way from the data to h each slip sits."""

from bilevel_lite.drawings import SOFT, arrow, box, canvas, text

__all__ = ["pipeline"]


def pipeline():
    """From data and model over b, H and v to h; below each stage the slips that sit there."""
    figure, ax = canvas(9.0, 3.1)
    stages = (
        (0.85, "data, model", 0, ("12 another batch's weights", "13 noise at each access",
                                  "14 bias in a column", "18 evaluation mode")),
        (2.85, "$b$, $H$ or KFAC", 2, ("15 weights squared", "16 padding in $A$",
                                       "17 subclass", "19 constants in $H$")),
        (4.85, "$v$ from $Hv = b$", 3, ("1 stale iterate", "2 stale residual",
                                        "3 half-scaled", "4 squared, 5 damping twice",
                                        "6 unscaled step", "7 step left out")),
        (6.6, "$Jv$", 1, ("11 point not put back",)),
        (8.15, r"$h = \nabla_\lambda f - Jv$", 4, ("8 missing direct term", "9 chain rule cut",
                                                    "10 running sum")),
    )  # fmt: skip
    for place, (x, words, color, slips) in enumerate(stages):
        box(ax, x, 2.45, words, 1.45 if place != 3 else 0.9, 0.55, color)
        for row, slip in enumerate(slips):
            text(ax, x, 1.85 - 0.26 * row, slip, fontsize=7.5)
        if place:
            before = stages[place - 1][0] + (0.72 if place != 4 else 0.45)
            arrow(ax, (before, 2.45), (x - (0.72 if place != 3 else 0.45), 2.45))
    ax.plot([0.1, 8.9], [0.32, 0.32], color=SOFT, lw=0.8)
    text(
        ax, 4.5, 0.15, r"the judge: $\Phi$ by differences, $H$ and $Jv$ by another way", color=SOFT
    )
    return figure
