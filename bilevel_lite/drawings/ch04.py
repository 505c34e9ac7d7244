"""The drawing of chapter 4: parameters, outputs, loss, and where the curvature sits."""

import numpy as np

from bilevel_lite.drawings import PALETTE, SOFT, arrow, box, canvas, text

__all__ = ["chain"]

NETWORK, LOSS = PALETTE[1], PALETTE[0]


def _curve(ax, x, y, color, bend):
    """A little graph around (x, y) of a function that bends like ``bend``, on an axis."""
    along = np.linspace(-0.6, 0.6, 60)
    ax.plot([x - 0.7, x + 0.7], [y - 0.3, y - 0.3], color=SOFT, lw=0.8)
    ax.plot(x + along, y + bend(along), color=color, lw=1.8)


def chain():
    """Parameters to outputs to loss; the network's bend is R, the loss's is G."""
    figure, ax = canvas(9.0, 3.2)
    y = 2.55
    box(ax, 1.0, y, "parameters\n" + r"$\theta$", width=1.4, height=0.7, color=7)
    box(ax, 4.5, y, "outputs\n" + r"$o_i(\theta)$", width=1.4, height=0.7, color=7)
    box(ax, 8.0, y, "loss\n" + r"$\ell(o_i, y_i)$", width=1.4, height=0.7, color=7)
    arrow(ax, (1.75, y), (3.75, y), "network", color=NETWORK)
    arrow(ax, (5.25, y), (7.25, y), "loss function", color=LOSS)
    text(ax, 2.75, y - 0.16, r"slope $Z_i$", color=NETWORK)
    text(ax, 6.25, y - 0.16, r"slope $s_i$", color=LOSS)

    _curve(ax, 2.75, 1.6, NETWORK, lambda t: 0.28 * np.sin(5 * t))
    _curve(ax, 6.25, 1.45, LOSS, lambda t: 1.3 * t**2 - 0.1)
    text(ax, 2.75, 1.06, r"bends either way: $\nabla^2_\theta\, o_i$", color=NETWORK)
    text(ax, 6.25, 0.92, r"bends up only: $\Omega_i$", color=LOSS)
    text(ax, 2.75, 0.68, r"times the slope $s_i$ of the loss", color=NETWORK)
    text(ax, 6.25, 0.62, r"seen through the network: $Z_i^\top \Omega_i Z_i$", color=LOSS)
    text(ax, 2.75, 0.25, r"remainder $R$", color=NETWORK, fontsize=12)
    text(ax, 6.25, 0.25, r"GGN $G$", color=LOSS, fontsize=12)
    text(ax, 0.9, 0.25, r"$H\quad =$", fontsize=12)
    text(ax, 4.5, 0.25, "$+$", fontsize=12)
    return figure
