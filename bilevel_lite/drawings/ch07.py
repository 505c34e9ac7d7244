"""Drawings of chapter 7: where a weight passes once and where twice, and two groups of inputs."""

import torch

from bilevel_lite.drawings import PALETTE, SOFT, arrow, box, canvas, plt, text

__all__ = ["groups", "pipes"]


def pipes():
    """The weight on its way through the loss (once) and through a probe (twice)."""
    figure, ax = canvas(9.0, 2.3)
    text(ax, 0.45, 1.75, "loss")
    text(ax, 0.45, 0.55, "probe")
    for x, words in ((1.6, r"output $o_i$"), (3.6, r"loss $\ell_i$")):
        box(ax, x, 1.75, words, width=1.4, height=0.55, color=7)
    for x, words in ((1.6, r"label $\tilde y\sim\hat y_i$"), (3.6, r"$s_i=\hat y_i-e_{\tilde y}$")):
        box(ax, x, 0.55, words, width=1.4, height=0.55, color=7)
    for y in (1.75, 0.55):
        arrow(ax, (2.32, y), (2.88, y))
        arrow(ax, (4.32, y), (4.78, y))
    box(ax, 5.2, 1.75, r"$\times\,\sigma_i$", width=0.8, height=0.55, color=1)
    box(ax, 5.2, 0.55, r"$\times\,\sigma_i^{\,k}$", width=0.8, height=0.55, color=1)
    arrow(ax, (5.62, 1.75), (7.18, 1.75), "two derivatives", up=0.17)
    arrow(ax, (5.62, 0.62), (7.18, 0.62), "taken twice", bend=-0.25, up=0.34)
    arrow(ax, (5.62, 0.48), (7.18, 0.48), bend=0.25)
    box(ax, 8.0, 1.75, r"$\sigma_i\,\Omega_i$", width=1.6, height=0.55, color=2)
    box(ax, 8.0, 0.55, r"mean: $\sigma_i^{\,2k}\,\Omega_i$", width=1.6, height=0.55, color=2)
    return figure


def groups(q: float = 0.6):
    """Four inputs of two weights: the true block, KFAC's and the one with A_sigma, as ellipses.

    Args:
        q: How much the weights follow the inputs, from 0 to 1.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 2.9))
    sigma = torch.tensor([1 + q, 1 - q]) / 2
    cases = (
        (torch.ones(2), r"1: the same $\Omega_i$ in both groups"),
        (torch.tensor([1 - q, 1 + q]), r"2: the heavier group is the surer one"),
    )
    styles = (
        ("true block", "black", "-", 2.6),
        (r"$B\otimes A$ (KFAC)", PALETTE[2], "--", 1.8),
        (r"$B\otimes A_\sigma$", PALETTE[1], ":", 2.2),
    )
    turn = torch.linspace(0, 2 * torch.pi, 200)
    for ax, (omega, title) in zip(axes, cases, strict=True):
        product = sigma * omega
        moments = (product, product.mean() * torch.ones(2), product.mean() * sigma / sigma.mean())
        for (name, color, style, width), moment in zip(styles, moments, strict=True):
            half = 1.3 * moment.sqrt()  # half axes: roots of the eigenvalues
            ax.plot(half[0] * turn.cos(), half[1] * turn.sin(), style, color=color, lw=width,
                    label=name)  # fmt: skip
        for axis, weight in enumerate(sigma):
            for sign in (-1, 1):
                at = [0.0, 0.0]
                at[axis] = sign * 2**0.5
                ax.plot(*at, "o", color=PALETTE[0], ms=4 + 14 * float(weight))
        ax.axhline(0, color=SOFT, lw=0.6, zorder=0)
        ax.axvline(0, color=SOFT, lw=0.6, zorder=0)
        ax.set(xlim=(-2.6, 2.6), ylim=(-1.75, 1.75), aspect="equal", title=title)
        ax.axis("off")
    axes[0].legend(loc="upper left", bbox_to_anchor=(0.92, 0.9), handlelength=3)
    text(axes[0], 3.1, -0.9, "dots: inputs,\nsize: weight", color=PALETTE[0], clip_on=False)
    return figure
