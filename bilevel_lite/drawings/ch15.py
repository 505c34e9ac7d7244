"""Chapter 15: the drawing of attacker and defender, and the figures of poisoned data."""

import numpy as np

from bilevel_lite import plotting
from bilevel_lite.drawings import SOFT, arrow, box, canvas, text
from bilevel_lite.plotting import COLORS, PALETTE

BACK = PALETTE[1]  # what goes backwards, as in chapter 2
POISON = COLORS["corrupted"]
ATTACKS = {
    "identity": (COLORS["identity"], "o"), "cg-3": (COLORS["cg"], "s"),
    "cg-3-ggn": (COLORS["cg"], "p"), "cg-normal-3": (COLORS["cg"], "D"),
    "kfac": (COLORS["kfac"], "^"), "bome": (PALETTE[3], "v"),
    "tgda": (PALETTE[6], "<"), "cg-3-negative": (COLORS["cg"], "h"),
    "kfac-negative": (COLORS["kfac"], "*"),
    "flip": ("0.4", "P"), "noise": ("0.6", "X"),
}  # fmt: skip


def loop():
    """The attacker's loop with the generator in it, and the defender, who sees rows alone."""
    figure, ax = canvas(9.0, 3.2)
    box(ax, 0.85, 2.4, "$N_p$ rows\n$z_j, y_j$", width=1.1, height=0.75, color=7)
    box(ax, 2.65, 2.4, "generator\n$\\psi_\\lambda$", width=1.2, height=0.75, color=2)
    box(ax, 4.55, 2.4, "poison\n$\\tilde x_j, y_j$", width=1.1, height=0.75, color=POISON)
    box(ax, 2.65, 1.2, "$N$ clean rows\n$x_i, y_i$", width=1.4, height=0.75, color=7)
    box(ax, 6.45, 2.4, "surrogate\n$\\theta$ on $g$", width=1.2, height=0.75)
    box(ax, 8.25, 2.4, "$f$ on\nheld-out rows", width=1.2, height=0.75)
    for start, end in ((1.4, 2.05), (3.25, 4.0), (5.1, 5.85), (7.05, 7.65)):
        arrow(ax, (start, 2.5), (end, 2.5))
    arrow(ax, (3.35, 1.4), (5.85, 2.15))
    for start, end, words in ((7.65, 7.05, "$b$"), (5.85, 5.1, ""), (4.0, 3.25, "")):
        arrow(ax, (start, 2.28), (end, 2.28), color=BACK)
        if words:
            text(ax, (start + end) / 2, 2.12, words, color=BACK)
    text(ax, 5.45, 2.92, "$-Jv$ comes back through the input $\\tilde x$", color=BACK)
    ax.plot([0.2, 8.8], [0.72, 0.72], color=SOFT, lw=1, ls=":")
    text(ax, 8.2, 1.0, "attacker", color="0.35")
    text(ax, 8.2, 0.3, "defender", color="0.35")
    box(ax, 5.0, 0.3, "fresh $\\theta$, trained on all rows", width=2.6, height=0.42, color=0)
    arrow(ax, (4.55, 2.02), (4.55, 0.53), color=POISON)
    arrow(ax, (2.9, 0.82), (3.68, 0.42))
    text(ax, 7.0, 0.3, "test, once", ha="center")
    arrow(ax, (6.3, 0.3), (6.6, 0.3))
    return figure


def plane(x, y, path, before, after):
    """Two classes, the paths of the poisoned points, the boundaries before and after.

    ``path`` has shape (steps, points, 2); a boundary is (w, c) of w x + c = 0.
    """
    figure, ax = plotting.figure(1, height=3.0)
    for label, marker in ((0, "o"), (1, "s")):
        ax.plot(*x[y == label].T.tolist(), marker, color=PALETTE[label], ms=3.5, alpha=0.5,
                label=f"clean, class {label}")  # fmt: skip
    for j in range(path.shape[1]):
        ax.plot(*path[:, j].T.tolist(), "-", color=POISON, lw=1, label="poison" if j == 0 else None)
        ax.plot(*path[-1, j].tolist(), "*", color=POISON, ms=9)
    at = np.linspace(-4, 4, 2)
    for (w, c), style, name in ((before, ":", "at the start"), (after, "-", "at the end")):
        ax.plot(at, -(w[0] * at + c) / w[1], "k" + style, lw=1.2, label=f"boundary {name}")
    ax.set(xlim=(-4.2, 4.2), ylim=(-4.2, 4.2), xlabel="$x_1$", ylabel="$x_2$")
    ax.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def live(looks, clean):
    """What the attacker's own theta loses and what a fresh defender loses, over the run.

    ``looks`` has rows step, accuracy of the run's theta, of a fresh defender; ``clean`` is the
    fresh defender's without poison. All on tuning rows, per cent.
    """
    step, own, fresh = np.array(looks).T
    figure, ax = plotting.figure(1, height=2.5)
    ax.axhline(clean, color=COLORS["clean"], ls=":", label="fresh, without poison")
    ax.plot(step, fresh, "o-", color=COLORS["clean"], ms=3.5, label="fresh, on the poison of now")
    ax.plot(step, own, "s--", color=POISON, ms=3.5, label="the run's own theta")
    ax.set(xlabel="outer iteration", ylabel="tuning accuracy, %")
    ax.legend(fontsize=7)
    return figure


def pictures(before, after, labels, shape):
    """Rows that poison is made from (above) and what became of them (below)."""
    figure, axes = plotting.figure(len(labels), height=2.0)
    for ax, one, other, label in zip(axes, before, after, labels, strict=True):
        ax.imshow(
            np.vstack([one.reshape(shape), other.reshape(shape)]), cmap="gray", vmin=0, vmax=1
        )
        ax.set_title(f"label {label}", fontsize=8)
        ax.axis("off")
    return figure


def study(drops, curves):
    """The drop of each attack, seed by seed, without and with a defence; and over the run.

    ``drops[attack]`` is (no defence, distance, trimmed), each a list of points of accuracy, one for
    each seed; ``curves[attack]`` is (steps, mean drop of short fresh defenders on tuning rows).
    """
    figure, (left, right) = plotting.figure(2, height=2.9)
    for y, (attack, values) in enumerate(drops.items()):
        color, marker = ATTACKS[attack]
        for each, shift, face in zip(
            values, (-0.22, 0, 0.22), (color, "white", "0.8"), strict=True
        ):
            middle = float(np.mean(each))
            bar = [[middle - min(each)], [max(each) - middle]]
            style = {"fmt": marker, "color": color, "mfc": face, "ms": 4.5, "capsize": 2, "lw": 1}
            left.errorbar([middle], [y + shift], xerr=bar, **style)
    left.axvline(0, color="black", lw=0.8)
    left.set_yticks(range(len(drops)), list(drops), fontsize=7)
    left.invert_yaxis()
    left.set(xlabel="points of test accuracy lost")
    for attack, (steps, mean) in curves.items():
        color, marker = ATTACKS[attack]
        right.plot(steps, mean, marker + "-", color=color, ms=3, lw=1, label=attack)
    right.axhline(0, color="black", lw=0.8)
    right.set(xlabel="outer iteration", ylabel="points lost, tuning rows")
    right.legend(fontsize=6.5)
    return figure
