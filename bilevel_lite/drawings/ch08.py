"""Drawings of chapter 8: what EKFAC keeps of a block, and what an average over time holds."""

import torch

from bilevel_lite.drawings import PALETTE, SOFT, arrow, canvas, plt, text

__all__ = ["kept", "weights"]


def kept():
    """A block in KFAC's basis: all of it, KFAC's diagonal of products, EKFAC's own diagonal."""
    generator = torch.Generator().manual_seed(4)
    g = torch.randn(40, 2, generator=generator) * torch.tensor([0.7, 1.2])
    a = torch.randn(40, 3, generator=generator) * torch.tensor([0.5, 0.9, 1.3])
    a = a * (0.5 + g[:, 1:].abs())  # inputs and probes depend on each other
    g, a = (side @ torch.linalg.eigh(side.T @ side)[1] for side in (g, a))
    rows = torch.einsum("nj,nk->njk", g, a).flatten(1)
    block = rows.T @ rows / 40
    products = torch.outer(g.square().mean(0), a.square().mean(0)).flatten()
    figure, axes = canvas(9.0, 2.5, columns=3)
    shown = (
        (r"in KFAC's basis: $U^\top G\,U$", block, ""),
        (r"KFAC: products $\zeta_j\,\xi_k$", products.diag(), "wrong sizes"),
        (r"EKFAC: the diagonal itself, $E_{jk}$", block.diagonal().diag(), "right sizes"),
    )
    side = 0.3
    for ax, (title, matrix, words) in zip(axes, shown, strict=True):
        text(ax, 1.5, 2.36, title)
        for row in range(6):
            for column in range(6):
                depth = min(1.0, float(matrix[row, column].abs() / block.abs().max())) ** 0.5
                x, y = 0.45 + side * column, 1.9 - side * row
                face = PALETTE[2] if row == column else PALETTE[1]
                ax.add_patch(plt.Rectangle((x, y), side, side, fc=face, alpha=0.85 * depth, lw=0))
                ax.add_patch(plt.Rectangle((x, y), side, side, fill=False, ec=SOFT, lw=0.4))
                if row == column:
                    ax.add_patch(plt.Rectangle((x, y), side, side, fill=False, ec="black", lw=1.1))
        if words:
            text(ax, 1.35, 0.18, f"{words}; off the diagonal nothing", fontsize=8)
        else:
            text(ax, 1.35, 0.18, "orange: lost in both", fontsize=8, color=PALETTE[1])
    return figure


def weights():
    """The weights of the estimates in an average with memory 0.9, after 25 updates."""
    beta, t = 0.9, 25
    held = [beta**t] + [(1 - beta) * beta ** (t - k) for k in range(1, t + 1)]
    figure, ax = canvas(9.0, 2.3)
    left, step, tall = 0.6, 0.27, 13.0
    for k, weight in enumerate(held):
        colour = PALETTE[1] if k == 0 else PALETTE[2]
        ax.add_patch(
            plt.Rectangle((left + step * k, 0.45), 0.2, tall * weight, fc=colour, alpha=0.6, lw=0)
        )
    end = left + step * t + 0.1
    ax.plot([left - 0.1, end + 0.25], [0.45, 0.45], color="black", lw=0.8)
    text(ax, left + 0.1, 0.25, "$0$")
    text(ax, end, 0.25, "$t$")
    text(ax, left - 0.1, 1.79, r"the first one weighs $\beta^t$,", color=PALETTE[1], ha="left")
    text(ax, left - 0.1, 1.57, "not $(1-\\beta)\\,\\beta^t$", color=PALETTE[1], ha="left")
    text(ax, end - 2.2, 1.72, r"weights $(1-\beta)\,\beta^{t-k}$", color=PALETTE[2], ha="center")
    middle = end - step * beta / (1 - beta)
    ax.plot(middle, 0.32, "^", color="black", ms=7)
    text(ax, middle - 0.95, 0.2, "centre of mass")
    ax.plot(end, 2.0, "o", color="black", ms=6)
    ax.plot(middle, 2.0, "o", mfc="white", mec="black", ms=6)
    arrow(ax, (end - 0.08, 2.0), (middle + 0.1, 2.0))
    text(ax, end + 0.12, 2.0, "the target now", ha="left")
    text(ax, middle - 0.15, 2.0, r"what is held: $\beta/(1-\beta)$ updates old", ha="right")
    return figure
