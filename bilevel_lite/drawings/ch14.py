"""Chapter 14: the drawing of two losses on one encoder, and the figures of its data."""

import numpy as np

from bilevel_lite import plotting
from bilevel_lite.drawings import arrow, box, canvas, text
from bilevel_lite.plotting import COLORS, PALETTE

GREY = 7  # the palette's
BACK = PALETTE[1]  # what goes backwards, as in chapter 2


def two_losses():
    """Two kinds of texts through one encoder to two losses; how lam reaches f, backwards."""
    figure, ax = canvas(9.0, 2.9)
    rows = ((2.2, "labelled text", r"head $a$", r"end task $L$", GREY),
            (0.7, "text with [MASK]", r"word head $u$", r"masked words $M$", 2))  # fmt: skip
    for y, what, head, loss, color in rows:
        box(ax, 0.95, y, what, width=1.6, height=0.6, color=color)
        arrow(ax, (1.75, y), (2.4, 1.45 + 0.25 * np.sign(y - 1.45)))
        arrow(ax, (3.6, 1.45 + 0.25 * np.sign(y - 1.45)), (4.25, y))
        box(ax, 5.0, y, head, width=1.45, height=0.6, color=color)
        arrow(ax, (5.75, y), (6.35, y))
        box(ax, 7.25, y, loss, width=1.75, height=0.6, color=color)
    box(ax, 3.0, 1.45, "shared\nlayers $s$", width=1.15, height=1.3, color=0)
    text(ax, 7.25, 0.15, r"weighed by $V_\lambda(m_j)$", color=PALETTE[2])
    arrow(ax, (4.15, 2.72), (3.2, 2.15), color=BACK)
    text(ax, 5.9, 2.72, r"$f$ meets the masked words only here: $v_s$", color=BACK)
    return figure


def judges(weights, train, held):
    """f over the weight of all masked texts, for two judges (left), and its slope (right)."""
    figure, (left, right) = plotting.figure(2, height=2.6)
    for values, name, style, color in (
        (train, "L and penalty, training texts", "--", "corrupted"),
        (held, "f on held-out texts", "-", "clean"),
    ):
        loss, slope = np.array(values).T
        left.plot(weights, loss, style, marker="o", color=COLORS[color], label=name)
        right.plot(weights, slope, style, marker="o", color=COLORS[color], label=name)
    right.axhline(0, color="black", lw=0.8)
    left.set(xlabel="weight c of the masked texts", ylabel="f at the solved inner problem")
    right.set(xlabel="weight c of the masked texts", ylabel="df/dc")
    right.set_yscale("symlog", linthresh=0.01)
    for ax in (left, right):
        ax.set_xscale("symlog", linthresh=0.1)
        ax.set_xlim(-0.01, 4)
    left.legend()
    return figure


def learned(found, losses):
    """V over a text's loss as it was drawn and as it was learned; where the losses lie."""
    figure, ax = plotting.figure(1, height=2.6)
    ax.plot(found["loss"], found["start"], ":", color="black", label="as drawn")
    ax.plot(found["loss"], found["learned"], color=COLORS["kfac"], label="learned")
    twin = ax.twinx()
    twin.hist(losses, 30, color="0.8")
    twin.set(yticks=[])
    twin.spines["right"].set_visible(False)
    twin.set_zorder(0)
    ax.set_zorder(1)
    ax.patch.set_visible(False)
    ax.set(xlabel="masked-word loss of a text", ylabel="its weight V", ylim=(0, 2))
    ax.legend()
    return figure


def study(rows, curves):
    """F1 of each row at the chosen iterate and at the end (left), V over the loss (right)."""
    from bilevel_lite.tasks.pretraining_figures import SHADES, draw_curves

    figure, (left, right) = plotting.figure(2, height=3.2)
    for at, (name, (chosen, end)) in enumerate(rows.items()):
        color = SHADES.get(name.removesuffix("-on-train"))
        for each, y, fill in ((chosen, -at, color), (end, -at - 0.3, "none")):
            left.plot(each, [y] * len(each), "|", color=color, ms=7)
            left.plot(np.mean(each), y, "o", color=color, mfc=fill)
    left.set_yticks([-k for k in range(len(rows))], list(rows))
    left.set(xlabel="test macro-F1, %")
    draw_curves(right, curves)
    return figure
