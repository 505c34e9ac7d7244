"""Chapter 16: the drawing of who protects and who learns, and the figures of unlearnable images."""

import numpy as np

from bilevel_lite import plotting
from bilevel_lite.drawings import SOFT, arrow, box, canvas, text
from bilevel_lite.plotting import COLORS, PALETTE

NOISE = COLORS["corrupted"]
WHITE = {"mode": "constant", "constant_values": 1.0}
VICTIMS = {
    "none": (PALETTE[0], "o", "as they are"),
    "augment": (PALETTE[2], "s", "augmented"),
    "jpeg": (NOISE, "^", "JPEG"),
}


def story():
    """Noise between the images and who learns from them; the test is on clean images."""
    figure, ax = canvas(9.0, 3.0)
    box(ax, 0.9, 2.2, "clean images\n$x_i, y_i$", width=1.5, height=0.75, color=7)
    box(ax, 3.0, 2.2, "noise\n$r\\lambda_i$, $|\\lambda_i|\\leq 1$", width=1.5, height=0.75,
        color=NOISE)  # fmt: skip
    box(ax, 5.3, 2.2, "published\n$x_i + r\\lambda_i, y_i$", width=1.5, height=0.75, color=2)
    box(ax, 5.3, 0.7, "surrogate\n$\\theta$ on $g$", width=1.5, height=0.75, color=0)
    box(ax, 7.9, 2.2, "victim: fresh $\\theta$,\ntrained on these", width=1.9, height=0.75, color=0)
    box(ax, 7.9, 0.7, "test: clean\nimages, new ones", width=1.9, height=0.75, color=7)
    arrow(ax, (1.65, 2.2), (2.25, 2.2))
    arrow(ax, (3.75, 2.2), (4.55, 2.2))
    arrow(ax, (6.05, 2.2), (6.95, 2.2))
    arrow(ax, (7.9, 1.82), (7.9, 1.08))
    arrow(ax, (5.3, 1.82), (5.3, 1.08))
    arrow(ax, (4.55, 0.7), (3.0, 1.8), color=NOISE)
    text(ax, 4.4, 1.4, "EM: $\\nabla_\\lambda g$\nbilevel: $-Jv$", color=NOISE)
    arrow(ax, (0.9, 1.82), (4.55, 0.5), color=SOFT)
    text(ax, 1.5, 0.7, "$f$: clean images,\nwrong labels", color="0.45")
    return figure


def pictures(x, noises):
    """Images in the first row; below, each with a noise, ``noises[name]`` like x."""
    rows = {"clean": x, **{name: x + noise for name, noise in noises.items()}}
    lines = [np.hstack(np.pad(_pixels(images), ((0, 0), (2, 2), (2, 2), (0, 0)), **WHITE))
             for images in rows.values()]  # fmt: skip
    size = x.shape[-1] + 4  # one picture with its margin: the file stays small
    figure, ax = plotting.plt.subplots(figsize=(0.6 * len(x) + 1.2, 0.6 * len(rows)))
    ax.imshow(np.vstack(lines), cmap="gray", interpolation="nearest")
    ax.set_yticks([size * (k + 0.5) for k in range(len(rows))], list(rows), fontsize=7)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def _pixels(images):
    return images.permute(0, 2, 3, 1).clamp(0, 1).cpu().numpy()


def live(accuracy):
    """Bars: test accuracy in % by noise and victim, ``accuracy[noise][victim]``."""
    figure, ax = plotting.figure(1, height=2.5)
    for k, (color, _, words) in enumerate(VICTIMS.values()):
        key = list(VICTIMS)[k]
        heights = [row[key] for row in accuracy.values()]
        ax.bar(np.arange(len(heights)) + 0.27 * (k - 1), heights, 0.25, color=color, label=words)
    ax.axhline(10, color="black", lw=0.8, ls=":")
    ax.set_xticks(range(len(accuracy)), list(accuracy))
    ax.set_ylabel("test accuracy, %")
    ax.set_ylim(0, 1.35 * max(max(row[key] for key in VICTIMS) for row in accuracy.values()))
    ax.legend(fontsize=7, ncols=3, loc="upper center")
    return figure


def study(panels, clean):
    """Test accuracy of the victims, a panel a radius; the lines are those of clean images.

    ``panels[radius][noise]`` and ``clean`` are test accuracies in % by victim, one for each seed.
    """
    figure, axes = plotting.figure(len(panels), height=2.9, sharey=True)
    axes = np.atleast_1d(axes)  # one radius has one panel, no array of them
    names = list(dict.fromkeys(name for rows in panels.values() for name in rows))
    for ax, (radius, rows) in zip(axes, panels.items(), strict=True):
        for k, (key, (color, marker, words)) in enumerate(VICTIMS.items()):
            ax.axvline(float(np.mean(clean[key])), color=color, lw=0.9, ls=":")
            for name, row in rows.items():
                places = [names.index(name) + 0.2 * (k - 1)] * len(row[key])
                first = words if name == next(iter(rows)) else None
                ax.plot(row[key], places, marker, color=color, ms=4, label=first)
        ax.axvline(10, color="black", lw=0.8)
        ax.set(title=f"radius {radius}/255", xlabel="test accuracy, %")
        ax.set_yticks(range(len(names)), names, fontsize=7)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=6.5)
    return figure
