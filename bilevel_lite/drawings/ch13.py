"""Chapter 13: the loop of a network that weighs examples by their losses, and its figures."""

import numpy as np

from bilevel_lite import plotting
from bilevel_lite.drawings import arrow, box, canvas, text
from bilevel_lite.plotting import COLORS, PALETTE

BACK = PALETTE[1]  # what goes backwards, as in chapter 2
SHADES = {
    "equal": PALETTE[7], "focal": PALETTE[3], "balanced": PALETTE[4], "frozen": PALETTE[6],
    "network": PALETTE[2], "class": PALETTE[0], "equal, meta too": PALETTE[5],
}  # fmt: skip


def loop():
    """Loss, weight, step, verdict on the meta images, and the hypergradient on its way back."""
    figure, ax = canvas(9.0, 3.0)
    box(ax, 0.85, 2.1, "training\nbatch", width=1.1, height=0.75, color=7)
    box(ax, 2.65, 2.1, "losses $\\ell_i$", width=1.2, height=0.75)
    box(ax, 4.5, 2.1, "$V_\\lambda(\\ell_i)$\none weight each", width=1.5, height=0.75, color=2)
    box(ax, 6.55, 2.1, "step on $\\theta$\nalong $\\mathcal{F}$", width=1.35, height=0.75)
    box(ax, 8.25, 2.1, "$f$ on the\nmeta images", width=1.15, height=0.75, color=4)
    for start, end in ((1.4, 2.05), (3.25, 3.75), (5.25, 5.88), (7.22, 7.68)):
        arrow(ax, (start, 2.1), (end, 2.1))
    arrow(ax, (6.2, 2.48), (2.75, 2.48), bend=0.22)
    text(ax, 4.5, 2.64, "new $\\theta$, new losses: ten times", color="0.35")
    arrow(ax, (8.25, 1.7), (4.6, 1.7), color=BACK, bend=-0.3)
    text(ax, 6.6, 0.78, "the hypergradient: moves $\\lambda$, once", color=BACK)
    arrow(ax, (2.95, 1.7), (3.8, 1.7), color="0.6", bend=0.5)
    text(ax, 3.05, 1.18, "detached: no gradient\nflows back through $V_\\lambda$", color="0.35")
    return figure


def live(curves, losses, counts, accuracy):
    """V over the loss before and after, the losses under it (left); accuracy by class (right).

    Args:
        curves: One ``LongTail.curve`` for each seed.
        losses: Of the training images at the end, last seed.
        counts: Training images by class.
        accuracy: Name -> accuracy by class, mean over the seeds.
    """
    figure, (left, right) = plotting.figure(2, height=2.9)
    for k, curve in enumerate(curves):
        label = {"color": PALETTE[2], "label": "learned" if k == 0 else None}
        left.plot(curve["loss"], curve["learned"], **label)
        left.plot(curve["loss"], curve["start"], "--", color=COLORS["exact"], lw=1,
                  label="as drawn" if k == 0 else None)  # fmt: skip
    left.plot(losses, np.full(len(losses), 0.04), "|", color=PALETTE[7], ms=5, alpha=0.5,
              label="training losses")  # fmt: skip
    left.set(xlabel=r"loss $\ell$", ylabel=r"weight $V_\lambda(\ell)$", xlim=(0, 6), ylim=(0, 2.1))
    left.legend(fontsize=7)
    for name, each in accuracy.items():
        right.plot(counts, [100 * a for a in each], "o-", ms=3, color=SHADES[name], label=name)
    right.set(xscale="log", xlabel="training images of the class", ylabel="test accuracy, %")
    right.set_xticks(counts[::3], counts[::3])
    right.minorticks_off()
    right.invert_xaxis()
    right.legend(fontsize=7)
    return figure


def study(rows, curves):
    """Accuracy of each variant by three rules (left); V over the loss, learned (right).

    Args:
        rows: Variant -> rule (``"last"``, ``"held out"``, ``"on test"``) -> one number a seed, %.
        curves: Variant -> ``LongTail.curve`` of its last seed.
    """
    figure, (left, right) = plotting.figure(2, height=3.4)
    for at, found in enumerate(rows.values()):
        for rule, mark, color in (("held out", "o", PALETTE[2]), ("last", "s", PALETTE[0]),
                                  ("on test", "^", PALETTE[1])):  # fmt: skip
            each, y = found[rule], -at + {"held out": 0.18, "last": 0, "on test": -0.18}[rule]
            left.plot(each, [y] * len(each), "|", color=color, alpha=0.6)
            left.plot([np.mean(each)], [y], mark, color=color, label=None if at else rule)
    left.set_yticks([-k for k in range(len(rows))], list(rows))
    left.set(xlabel="test accuracy, % (bars: seeds)")
    left.legend(title="look chosen by", fontsize=7)
    for k, (name, curve) in enumerate(curves.items()):
        right.plot(curve["loss"], curve["learned"], color=PALETTE[k % 6], label=name,
                   ls=("-", "--")[k > 2])  # fmt: skip
    if curves:
        right.plot(curve["loss"], curve["start"], ":", color=COLORS["exact"], label="as drawn")
        right.legend(fontsize=7)
    right.set(xlabel=r"loss $\ell$", ylabel=r"weight $V_\lambda(\ell)$", ylim=(0, 2.1))
    return figure
