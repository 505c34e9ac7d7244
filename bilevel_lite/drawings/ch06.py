"""Drawings of chapter 6: a damped solve in the plane, and the damping of two factors."""

import torch

from bilevel_lite.drawings import PALETTE, SOFT, arrow, canvas, plt, text

__all__ = ["path", "split", "springs"]


def path():
    """The quadratic's ellipses in the plane, and v_delta on its way from H^-1 b to zero."""
    figure, ax = plt.subplots(figsize=(6.2, 2.9))
    mu, b = torch.tensor([1.0, 0.12]), torch.tensor([0.55, 0.26])
    newton = b / mu
    across, up = torch.meshgrid(
        torch.linspace(-0.5, 2.3, 200), torch.linspace(-0.15, 2.55, 200), indexing="ij"
    )
    # eigenvector of the small eigenvalue along the horizontal, so that the picture is wide
    height = 0.5 * mu[1] * (up - newton[1]) ** 2 + 0.5 * mu[0] * (across - newton[0]) ** 2
    ax.contour(up, across, height, levels=[0.02, 0.08, 0.2, 0.4, 0.7], colors=SOFT, linewidths=0.8)
    deltas = torch.cat([torch.zeros(1), torch.logspace(-4, 3, 300)])
    v = b / (mu + deltas[:, None])
    ax.plot(v[:, 1], v[:, 0], color=PALETTE[2], lw=2)
    for delta, shift in ((0.03, (0.0, 0.16)), (0.12, (0.0, 0.18)), (0.5, (0.0, 0.18))):
        at = b / (mu + delta)
        ax.plot(at[1], at[0], "o", color=PALETTE[2], ms=6)
        text(ax, float(at[1]) + shift[0], float(at[0]) + shift[1], rf"$\delta={delta:g}$")
    ax.plot(newton[1], newton[0], "s", color="black", ms=6)
    text(ax, float(newton[1]) + 0.1, float(newton[0]) + 0.17, r"$H^{-1}b$  ($\delta=0$)")
    ax.plot(0, 0, "o", color="black", ms=4)
    text(ax, -0.07, -0.13, r"$0$  ($\delta\to\infty$)")
    length = 0.75 * b / b.norm()
    arrow(ax, (0, 0), (float(length[1]), float(length[0])), color=PALETTE[1])
    text(ax, float(length[1]) + 0.07, float(length[0]) + 0.08, "$b$", color=PALETTE[1])
    ax.set(xlim=(-0.35, 2.55), ylim=(-0.3, 1.15), aspect="equal")
    ax.set_title(r"$v_\delta$ leaves $H^{-1}b$ along the flat direction and reaches $0$ along $b$")
    ax.axis("off")
    return figure


def springs():
    """Where theta goes when lambda moves: with a penalty, and with the spring of a damped solve."""
    figure, axes = canvas(9.0, 1.15, columns=2)
    start, goal, y = 2.2, 3.7, 0.5  # theta* before and after lambda moves
    for ax, anchor, rest, ball, color, words in (
        (axes[0], 0.3, 1.6, 2.8, PALETTE[0], "penalty: tied to $0$"),
        (axes[1], start, start, 3.0, PALETTE[1], r"damping: tied to $\theta^*(\lambda_0)$"),
    ):
        ax.plot([0.1, 4.2], [y, y], color=SOFT, lw=0.8)
        for x, name in (
            (0.3, "$0$"),
            (start, r"$\theta^*(\lambda_0)$"),
            (goal, r"$\theta^*(\lambda)$"),
        ):
            ax.plot([x, x], [y - 0.08, y + 0.08], color=SOFT, lw=1)
            text(ax, x, y - 0.27, name)
        _spring(ax, (anchor, y), (ball, y), color)
        ax.plot(rest, y, "o", mfc="white", mec=color, ms=7)
        ax.plot(ball, y, "o", color=color, ms=7)
        text(ax, 2.1, y + 0.42, words, color=color)
    return figure


def _spring(ax, start, end, color):
    """A zigzag from start to end."""
    t = torch.linspace(0, 1, 16)
    along = torch.tensor(end) - torch.tensor(start)
    side = 0.07 * torch.tensor([-along[1], along[0]]) / along.norm()
    swing = torch.tensor([0.0, 0.0] + [1.0, -1.0] * 6 + [0.0, 0.0])
    points = torch.tensor(start) + t[:, None] * along + swing[:, None] * side
    ax.plot(points[:, 0], points[:, 1], color=color, lw=1.4)
    ax.plot(*start, "s", color=color, ms=4)


def split():
    """Nine eigenvalues of a block: undamped, tau on the block, its root on each factor."""
    xi, zeta, tau = torch.tensor([1.0, 0.1, 0.001]), torch.tensor([1.0, 0.1, 0.001]), 0.01
    asked = torch.outer(zeta, xi) + tau
    given = torch.outer(zeta + tau**0.5, xi + tau**0.5)
    tables = (
        (r"undamped: $\zeta_j\,\xi_k$", torch.outer(zeta, xi)),
        (r"$\tau$ on the block: $\zeta_j\,\xi_k+\tau$", asked),
        (r"$\sqrt{\tau}$ on each factor: $(\zeta_j+\sqrt{\tau})(\xi_k+\sqrt{\tau})$", given),
    )
    figure, axes = canvas(9.0, 2.75, columns=3)
    for ax, (title, values) in zip(axes, tables, strict=True):
        text(ax, 1.65, 2.58, title, fontsize=9)
        text(ax, 0.18, 2.2, r"$\zeta_j\,\backslash\,\xi_k$", color=SOFT)
        for k in range(3):
            text(ax, 0.83 + 0.83 * k, 2.2, f"{float(xi[k]):g}", color=SOFT)
            text(ax, 0.12, 1.75 - 0.6 * k, f"{float(zeta[k]):g}", color=SOFT)
        for j in range(3):
            for k in range(3):
                _cell(ax, 0.83 + 0.83 * k, 1.75 - 0.6 * j, values[j, k], asked[j, k])
    return figure


def _cell(ax, x, y, value, asked):
    """One eigenvalue; what is lifted above what was asked for is shaded, and its factor said."""
    times = float(value / asked)
    strong = min(1.0, max(0.0, (times - 1.05) / 9)) ** 0.5
    ax.add_patch(
        plt.Rectangle((x - 0.41, y - 0.29), 0.82, 0.58, fc=PALETTE[1], alpha=0.55 * strong)
    )
    ax.add_patch(plt.Rectangle((x - 0.41, y - 0.29), 0.82, 0.58, fill=False, ec=SOFT, lw=0.8))
    text(ax, x, y + (0.09 if times > 1.05 else 0), f"{float(value):.3g}")
    if times > 1.05:
        text(ax, x, y - 0.13, f"{times:.2g} \u00d7 asked", fontsize=7.5)
