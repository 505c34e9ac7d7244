"""Chapter 12: the drawing of what is trained in an encoder, and the figures of its data."""

import numpy as np

from bilevel_lite import plotting
from bilevel_lite.drawings import SOFT, arrow, box, canvas, text
from bilevel_lite.plotting import COLORS, PALETTE

GREY = 7  # the palette's
BACK = PALETTE[1]  # what goes backwards, as in chapter 2


def encoder():
    """A text on its way through an encoder (arrows to the right), and gamma on its way back."""
    figure, ax = canvas(9.0, 3.0)
    tokens = ("who", "built", "it", "?", "[pad]", "[pad]")
    for row, token in enumerate(tokens):
        y = 2.55 - 0.4 * row
        pad = token == "[pad]"
        color = SOFT if pad else "black"
        text(ax, 0.45, y, token, color=color)
        for start, end in ((0.8, 1.15), (2.35, 2.7), (3.5, 3.85)):
            arrow(ax, (start, y), (end, y), color=color)
        box(ax, 3.1, y, "not kept" if pad else "kept", width=0.75, height=0.32,
            color=SOFT if pad else GREY)  # fmt: skip
        text(ax, 4.22, y, "masked" if pad else f"$a_{{i{row + 1}}}$", color=color)
        text(ax, 5.95, y, "0" if pad else rf"$\gamma_{{i{row + 1}}}$", color=color)
        if not pad:
            arrow(ax, (6.75, 1.75), (6.25, y), color=BACK)
    box(ax, 1.75, 1.55, "embeddings,\nfrozen\nlayers", width=1.15, height=2.5, color=GREY)
    box(ax, 5.15, 1.55, "last layer:\nsix maps $W$", width=1.0, height=2.5, color=2)
    box(ax, 7.2, 1.75, "mean of\nthe tokens", width=0.95, height=0.7)
    box(ax, 8.45, 1.75, "head", width=0.7, height=0.7, color=2)
    arrow(ax, (7.7, 1.75), (8.08, 1.75))
    text(ax, 2.5, 0.08, "computed once, kept", color="0.35")
    text(ax, 5.3, 0.08, "trained: $A$ from $a$, $B$ from $\\gamma$", color="0.35")
    text(ax, 7.75, 0.85, "$\\gamma$ comes back from the right", color=BACK)
    return figure


def live(looks, lam, wrong, model=""):
    """Mean weights and AUC over the looks (left), the learned weights by label (right).

    ``looks`` has rows step, mean weight of right labels, of wrong ones, AUC; ``model`` is named
    above the figure.
    """
    step, right, bad, area = np.array(looks).T
    figure, (left, middle) = plotting.figure(2, height=2.6)
    left.plot(step, right, color=COLORS["clean"], label="mean weight, right labels")
    left.plot(step, bad, "--", color=COLORS["corrupted"], label="mean weight, wrong labels")
    left.plot(step, area, ":", color="black", label="AUC")
    left.set(xlabel="outer iteration", ylim=(0, 1))
    left.legend(fontsize=7)
    bins = np.linspace(0, 1, 26)
    for name, mask, hatch in (("clean", ~wrong, ""), ("corrupted", wrong, "///")):
        style = {"hatch": hatch, "edgecolor": "white", "linewidth": 0, "alpha": 0.6}
        middle.hist(lam[mask].numpy(), bins, color=COLORS[name], label=name, **style)
    middle.set(xlabel=r"learned weight $\lambda_i$", ylabel="texts")
    middle.legend(title="label is", fontsize=7)
    figure.suptitle(model, fontsize=8)
    return figure


LAYERS = {"1": "one layer", "half": "half", "all": "all"}
METHODS = {
    "noisy": ("0.4", "P"), "balanced": ("0.4", "d"), "validation": ("0.4", "X"),
    "clean": ("0.4", "*"),
    "identity": (COLORS["identity"], "o"), "sama": (PALETTE[3], "v"),
    "neumann-3": (COLORS["neumann"], "<"), "neumann-10": (COLORS["neumann"], ">"),
    "cg-3-ggn": (COLORS["cg"], "s"), "cg-normal-3": (COLORS["cg"], "D"),
    "ggn-exact": ("black", "^"),
    "kfac-mc": (COLORS["kfac"], "o"), "kfac-empirical": (COLORS["kfac"], "s"),
}  # fmt: skip


def study(rows, minus, model=""):
    """Accuracy of each method (left), and how far the others are behind one of them (right).

    ``rows[method]`` is (accuracies at the chosen look, at the end), per cent, one for each seed.
    Filled: chosen; hollow: at the end; bars from the lowest seed to the highest.
    ``minus[method]`` is (differences on each seed, mean, half width of the interval), in points;
    ``model`` is named above the figure.
    """
    figure, (left, right) = plotting.figure(2, height=3.0, sharey=True)
    for y, (method, (chosen, end)) in enumerate(rows.items()):
        color, marker = METHODS[method]
        for values, shift, face in ((chosen, 0.14, color), (end, -0.16, "white")):
            middle = float(np.mean(values))
            bar = [[middle - min(values)], [max(values) - middle]]
            left.errorbar([middle], [y + shift], xerr=bar, fmt=marker, color=color, mfc=face,
                          ms=4.5, capsize=2, lw=1)  # fmt: skip
        if method in minus:
            plotting.interval(right, y, *minus[method], color)
    right.axvline(0, color="black", lw=0.8)
    left.set(xlabel="test accuracy, %")
    right.set(xlabel="KFAC less this one, points of accuracy")
    left.set_yticks(range(len(rows)), list(rows), fontsize=7)
    left.invert_yaxis()
    figure.suptitle(model, fontsize=8)
    return figure


def costs(found, model=""):
    """Seconds an outer iteration (over SAMA's, if there) and peak memory, by trained layers."""
    figure, axes = plotting.figure(2, height=2.9, sharey=True)
    names = [name for name in METHODS if any(name in rows for rows in found.values())]
    over, high = all("sama" in rows for rows in found.values()), 0.8 / len(found)
    for k, (layers, rows) in enumerate(found.items()):
        at = [(names.index(name) + (k - (len(found) - 1) / 2) * high, name) for name in rows]
        for ax, what in zip(axes, (0, 1), strict=True):
            unit = rows["sama"][0] if over and not what else 1
            ax.barh([y for y, _ in at], [rows[name][what] / unit for _, name in at], high * 0.9,
                    color=[METHODS[name][0] for _, name in at],
                    alpha=1 - 0.3 * k, label=LAYERS.get(layers, layers))  # fmt: skip
    if over:
        axes[0].axvline(1, color="black", ls=":", lw=1)
    axes[0].set(xlabel="seconds an outer iteration" + ", SAMA = 1" * over)
    axes[1].set(xlabel="peak memory of the process, MiB")
    axes[0].set_yticks(range(len(names)), names, fontsize=7)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=7)
    axes[0].set_title(model, fontsize=8)
    return figure
