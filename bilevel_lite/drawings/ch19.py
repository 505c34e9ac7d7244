"""Chapter 19: the drawing of copies and sums, and the figures of its data."""

import numpy as np

from bilevel_lite import plotting
from bilevel_lite.drawings import arrow, box, canvas, text
from bilevel_lite.plotting import COLORS, PALETTE

__all__ = ["by_size", "copies_and_sums", "predicted", "sent"]


def copies_and_sums():
    """A loss of two processes: theta goes out by copies, slopes come back by a sum."""
    figure, ax = canvas(9.0, 2.9)
    box(ax, 0.9, 1.45, r"$\theta$ (both)", width=1.2)
    for p, y in enumerate((2.2, 0.7)):
        box(ax, 4.0, y, rf"$g_{p + 1}$ on $n_{p + 1}$ rows", width=2.0, color=p)
        arrow(ax, (1.5, 1.55 if p == 0 else 1.35), (3.0, y), r"$\mathcal{C}$" if p == 0 else "")
        arrow(ax, (5.0, y), (6.9, 1.55 if p == 0 else 1.35),
              rf"$\frac{{n_{p + 1}}}{{n}}$" if p == 0 else "", up=0.2)  # fmt: skip
        text(ax, 5.85, 1.2, r"$\frac{n_2}{n}$") if p else None
    box(ax, 7.4, 1.45, r"$\mathcal{S}$", width=0.8)
    arrow(ax, (7.8, 1.45), (8.2, 1.45))
    text(ax, 8.6, 1.45, "$g$ (both)")
    arrow(ax, (7.4, 1.1), (5.0, 0.45), color=COLORS["unrolled"], bend=-0.25)
    arrow(ax, (3.0, 0.45), (0.9, 1.1), color=COLORS["unrolled"], bend=-0.25)
    text(ax, 6.9, 0.3, r"back: $\mathcal{S}^\top = \mathcal{C}$", color=COLORS["unrolled"])
    text(ax, 1.2, 0.3, r"back: $\mathcal{C}^\top = \mathcal{S}$", color=COLORS["unrolled"])
    return figure


def sent(told):
    """Megabytes of an outer iteration by purpose, from `bilevel_lite.experiment.processes.told`."""
    figure, ax = plotting.figure(1, height=0.6 + 0.26 * len(told))
    names = {"theta": "gradients, H v", "lam": "J v, direct term", "factors": "A and B"}
    y, left = np.arange(len(told)), np.zeros(len(told))
    for k, (what, name) in enumerate(names.items()):
        width = np.array([row.get(what, {"bytes": 0.0})["bytes"] for row in told.values()]) / 1e6
        ax.barh(y, width, left=left, color=PALETTE[k], label=name)
        left = left + width
    labels = [f"{model}: {method}" for model, method in told]
    ax.set(yticks=y, yticklabels=labels, xlabel="MB in an outer iteration")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend()
    return figure


def by_size(columns, ways, dim):
    """Bytes of a factor as a matrix, and as its columns, by columns in all."""
    figure, ax = plotting.figure()
    for (name, values), style in zip(ways.items(), ("-", "--"), strict=True):
        ax.plot(columns, np.array(values) / 1e6, style, label=name)
    ax.axvline(0.7 * dim, color="black", lw=0.8, ls=":")
    ax.text(0.72 * dim, 0.05, "0.7 d", transform=ax.get_xaxis_transform())
    ax.set(xscale="log", yscale="log", xlabel="columns in all", ylabel="MB")
    ax.legend()
    return figure


def predicted(processes, panels):
    """Seconds of an outer iteration by number of processes: {panel: {solver: seconds}}."""
    figure, axes = plotting.figure(len(panels), height=2.5)
    colors = {"identity": COLORS["identity"], "CG-3": COLORS["cg"], "KFAC": COLORS["kfac"]}
    for ax, (title, lines) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for name, (alone, values) in lines.items():
            ax.plot(processes, 1e3 * np.array(values), "o-", color=colors[name], label=name)
            ax.axhline(1e3 * alone, color=colors[name], lw=0.8, ls=":")
        ax.set(xscale="log", xlabel="processes", title=title)
        ax.set_ylim(bottom=0)
        ax.set_xticks(processes[::2], [str(k) for k in processes[::2]])
        ax.minorticks_off()
    np.atleast_1d(axes)[0].set_ylabel("ms, outer iteration")
    np.atleast_1d(axes)[0].legend()
    return figure
