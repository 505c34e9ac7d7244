"""The drawing of chapter 0: data hypercleaning as a loop of three."""

import matplotlib.pyplot as plt

from bilevel_lite.drawings import PALETTE, SOFT, arrow, box, canvas, text

__all__ = ["hypercleaning"]

# given label, whether it is right, its weight: four training examples
EXAMPLES = (("“3”", True, 0.9), ("“8”", False, 0.1), ("“1”", True, 1.0), ("“5”", False, 0.0))


def hypercleaning():
    """Weights decide what is trained on, clean images judge it, a hypergradient moves the weights.

    Returns:
        The figure.
    """
    figure, ax = canvas(9.0, 3.2)
    train, judge, y = PALETTE[2], PALETTE[3], 1.75
    text(ax, 1.2, 2.95, "training images, noisy labels")
    for row, (label, right, weight) in enumerate(EXAMPLES):
        height, color = 2.5 - 0.45 * row, PALETTE[0] if right else PALETTE[1]
        text(ax, 0.3, height, f"{label} {'✓' if right else '✗'}", color=color)
        ax.add_patch(plt.Rectangle((0.7, height - 0.11), 1.3, 0.22, fill=False, ec=SOFT, lw=0.8))
        ax.add_patch(plt.Rectangle((0.7, height - 0.11), 1.3 * weight, 0.22, fc=color, lw=0))
    text(ax, 1.35, 0.78, r"weights $\lambda_i$")
    box(
        ax, 4.4, y, "inner player: train\n" + r"$\theta \approx \theta^*(\lambda)$", 2.0, 0.8, train
    )
    box(
        ax, 7.6, y, "outer player: judge\n" + r"$\Phi(\lambda) = f(\theta^*(\lambda))$", 2.0, 0.8, 3
    )
    arrow(ax, (2.1, y), (3.36, y), r"$\lambda_i\,\ell_i(\theta)$", color=train, up=0.18)
    arrow(ax, (5.44, y), (6.56, y), r"$\theta$", color=train, up=0.18)
    text(ax, 7.6, 2.95, "200 clean validation images")
    arrow(ax, (7.6, 2.8), (7.6, y + 0.44), color=judge)
    ax.plot([7.6, 7.6, 1.35], [y - 0.4, 0.42, 0.42], color=judge, lw=1.2, ls="--")
    arrow(ax, (1.35, 0.42), (1.35, 0.64), color=judge)
    text(ax, 4.5, 0.6, r"hypergradient $h$: how $\Phi$ answers to each weight", color=judge)
    text(
        ax,
        4.5,
        0.2,
        r"one outer step: $\lambda \leftarrow \lambda - \eta_\lambda h$, kept in $[0, 1]$",
    )
    return figure
