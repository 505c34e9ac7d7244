"""Chapter 10: the drawing of whose weight falls, and the figures of its data."""

import matplotlib.pyplot as plt
import numpy as np

from bilevel_lite import plotting
from bilevel_lite.drawings import arrow, canvas, text
from bilevel_lite.plotting import COLORS, PALETTE

BLUE, ORANGE, GREEN = PALETTE[0], PALETTE[1], PALETTE[2]


def whose_weight_falls():
    """The step that the validation set can have, and which examples pull against it.

    Left: level lines of g with H = diag(1, 10), the wish -b = (1, 5) and the step -v = (1, 1/2).
    Right: three pulls -grad l_i; the half plane that disagrees with -v is shaded.
    """
    figure, (left, right) = canvas(9.0, 3.1, columns=2)
    x0, y0 = 1.9, 1.1  # theta, on the left
    angle = np.linspace(0, 2 * np.pi, 200)
    for size in (0.45, 0.9, 1.35):
        left.plot(
            x0 + size * np.cos(angle), y0 + size / 10**0.5 * np.sin(angle), color="0.6", lw=0.8
        )
    scale = 0.36
    arrow(left, (x0, y0), (x0 + scale, y0 + 5 * scale), color=ORANGE)
    text(left, x0 + 0.5, y0 + 5 * scale - 0.1, "$-b$: the wish", color=ORANGE, ha="left")
    scale = 1.35
    arrow(left, (x0, y0), (x0 + scale, y0 + scale / 2), color=GREEN)
    text(left, x0 + scale + 0.1, y0 + 0.72, "$-v = -H^{-1}b$:\nthe step", color=GREEN, ha="left")
    left.plot([x0], [y0], "o", color="black")
    text(left, x0, 0.28, "level lines of $g$: flat sideways, steep upwards", color="0.35")

    x0, y0, scale = 2.25, 1.5, 0.8
    along, across = np.array([1.0, 0.5]) / 1.25**0.5, np.array([-0.5, 1.0]) / 1.25**0.5
    edge = [np.array([x0, y0]) + s * across for s in (-1.6, 1.6)]
    far = [point - 1.9 * along for point in reversed(edge)]
    right.fill(*np.array(edge + far).T, color="0.9", lw=0)
    right.plot(*np.array(edge).T, color="0.5", lw=0.8)
    arrow(right, (x0, y0), (x0 + scale * 1.25, y0 + scale * 0.625), color=GREEN)
    text(right, x0 + 1.15, y0 + 0.72, "$-v$", color=GREEN)
    for (dx, dy), words, color, (tx, ty) in (
        ((2, 1), "$(2, 1)$ rises", BLUE, (0.35, -0.02)),
        ((1, -1), "$(1, -1)$ rises", BLUE, (0.62, -0.1)),
        ((-1, 1), "$(-1, 1)$ falls", ORANGE, (-0.6, 0.1)),
    ):
        size = 0.75
        shift = -0.18 if (dx, dy) == (2, 1) else 0.0  # beside -v, which has the same direction
        start = (x0 - 0.4 * shift, y0 + shift)
        end = (start[0] + size * dx, start[1] + size * dy)
        arrow(right, start, end, color=color)
        text(right, end[0] + tx, end[1] + ty, words, color=color)
    right.plot([x0], [y0], "o", color="black")
    text(right, 0.95, 0.75, "weights fall", color="0.35")
    return figure


def _by_label(ax, values, wrong, bins):
    """Two histograms on one axis: right labels, and wrong ones hatched."""
    for label, mask, hatch in (("clean", ~wrong, ""), ("corrupted", wrong, "///")):
        style = {"hatch": hatch, "edgecolor": "white", "linewidth": 0, "alpha": 0.6}
        ax.hist(values[mask], bins, color=COLORS[label], label=label, **style)
    ax.legend(title="label is", loc="best")


def one_hypergradient(h, wrong, title):
    """Histogram of 1000 h_i, shape (N,), wrong labels hatched."""
    figure, ax = plotting.figure(1)
    values = 1e3 * h.numpy()
    _by_label(ax, values, wrong.numpy(), np.linspace(values.min(), values.max(), 41))
    ax.axvline(0, color="black", lw=1)
    ax.set(xlabel=r"$1000\; h_i$  (right of 0: the weight falls)", ylabel="examples", title=title)
    return figure


def course(history, chosen):
    """Losses (left) and scores of the weights (right) over the looks; both are lists of dicts."""
    rounds, top = [row["iteration"] for row in history], max(history, key=lambda row: row["auc"])
    figure, (left, right) = plotting.figure(2, height=2.6)
    for ax, key, style, color, label in (
        (left, "outer", "--", "0.5", "validation (outer loss)"),
        (left, "tuning", ".-", GREEN, "tuning"),
        (right, "auc", "^-", PALETTE[3], "AUC"),
        (right, "precision", "s--", PALETTE[4], "precision at the noise rate"),
    ):
        ax.plot(rounds, [row[key] for row in history], style, color=color, label=label)
    left.plot(chosen["iteration"], chosen["tuning"], "o", color="black", label="chosen")
    right.plot(top["iteration"], top["auc"], "o", color="black", label="highest AUC")
    left.set(xlabel="outer iteration", ylabel="cross-entropy", title="what is minimised")
    title = "how well weights point at wrong labels"
    right.set(xlabel="outer iteration", ylim=(0.89, 1), title=title)
    left.legend()
    right.legend()
    return figure


def found(lam, wrong, lost, caught):
    """The learned weights by label (left) and the ROC curve (right)."""
    figure, (left, right) = plotting.figure(2, height=2.6)
    _by_label(left, lam.numpy(), wrong.numpy(), np.linspace(0, 1, 41))
    left.set(xlabel=r"learned weight $\lambda_i$", ylabel="examples", yscale="log")
    right.plot(lost, caught, color=GREEN, label="learned weights")
    right.plot([0, 1], [0, 1], ":", color="black", label="chance")
    right.set(xlabel="share of right labels lost", ylabel="share of wrong labels caught")
    right.legend(loc="lower right")
    return figure


def rejected(images, labels, wrong):
    """Two rows of ten images under their given labels; right labels in blue."""
    figure, axes = plt.subplots(2, 10, figsize=(9, 2.4))
    for ax, image, label, bad in zip(axes.flat, images, labels, wrong, strict=True):
        ax.imshow(image, cmap="gray_r")
        ax.set_title(f"{int(label)}", color="black" if bad else BLUE)
        ax.axis("off")
    return figure


def failures(few, control, count, rates, trusted, spoilt):
    """Tuning loss, AUC and precision with few validation images and many; pair noise.

    ``few`` and ``control`` have rows outer loss, tuning loss, AUC, precision, each ten iterations.
    """
    figure, (left, middle, right) = plotting.figure(3, height=2.7)
    looks = range(10, 10 * few.shape[1] + 1, 10)
    for label, track, color, style in (
        (f"{count} images", control, BLUE, "-"),
        ("30 images", few, ORANGE, "--"),
    ):
        left.plot(looks, track[1] / track[1].min(), style, color=color, label=label)
        middle.plot(looks, track[2], style, color=color, marker="^", label=f"AUC, {label}")
        middle.plot(looks, track[3], style, color=color, marker="s", label=f"precision, {label}")
    left.set(xlabel="outer iteration", ylabel="tuning loss / its minimum", ylim=(0.98, 1.2),
             title="too few validation images")  # fmt: skip
    middle.set(xlabel="outer iteration", ylim=(0.3, 1), title="the same runs")
    right.plot(rates, trusted, "o-", color=BLUE, label="validation set is clean")
    right.plot(rates, spoilt, "s--", color=ORANGE, label="it has the same noise")
    right.axhline(0.5, ls=":", color="black")
    right.set(xlabel=r"rate $\epsilon$ of pair noise", ylabel="AUC", ylim=(0, 1.02),
              title="whom do weights obey?")  # fmt: skip
    for ax in (left, middle, right):
        ax.legend(fontsize=7)
    return figure
