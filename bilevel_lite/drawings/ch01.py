"""The drawing of chapter 1: two roads from lambda to Phi, and the loop around them."""

from bilevel_lite.drawings import PALETTE, SOFT, arrow, box, canvas, text

__all__ = ["loop"]


def loop():
    """The bilevel loop: lambda reaches Phi by itself and through training, and is then moved."""
    figure, ax = canvas(9.0, 2.7)
    direct, through, y = PALETTE[1], PALETTE[0], 1.3
    box(ax, 0.85, y, r"$\lambda$", width=0.8, height=0.7, color=7)
    box(ax, 3.75, y, "train\n" + r"$\theta^* = \arg\min_\theta\ g(\lambda,\theta)$", 2.3, 0.8, 0)
    box(ax, 7.7, y, "judge\n" + r"$\Phi = f(\lambda,\theta^*)$", 1.7, 0.8, color=7)

    arrow(ax, (1.28, y), (2.57, y), color=through)
    arrow(ax, (4.93, y), (6.82, y), color=through)
    text(ax, 1.92, y + 0.16, r"$\lambda$ stands in $g$", color=through)
    text(ax, 5.87, y + 0.16, r"$\theta^*$ stands in $f$", color=through)
    text(ax, 1.92, y - 0.2, r"$D = d\theta^*/d\lambda$", color=through)
    text(ax, 5.87, y - 0.2, r"$b = \nabla_\theta f$", color=through)

    ax.plot([0.85, 0.85, 7.7], [y + 0.37, 2.2, 2.2], color=direct, lw=1.2)
    arrow(ax, (7.7, 2.2), (7.7, y + 0.41), color=direct)
    text(ax, 4.3, 2.36, r"direct: $\nabla_\lambda f$, where $\lambda$ itself stands in $f$",
         color=direct)  # fmt: skip

    ax.plot([7.7, 7.7, 0.85], [y - 0.42, 0.4, 0.4], color=SOFT, lw=1.2, ls="--")
    arrow(ax, (0.85, 0.4), (0.85, y - 0.36), color=SOFT)
    text(
        ax,
        4.3,
        0.2,
        r"one outer step: $\lambda \leftarrow \lambda - \eta_\lambda\, d\Phi/d\lambda$",
    )
    return figure
