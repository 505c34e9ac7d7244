"""Chapter 13b: the drawing of the two readings of lambda, and the figures of its data."""

import numpy as np

from bilevel_lite import plotting
from bilevel_lite.drawings import SOFT, arrow, canvas, text
from bilevel_lite.plotting import COLORS, PALETTE

__all__ = ["adaptation", "horizon", "start_and_anchor"]

# three tasks: minimum of l_i, curvatures and angle of its axes
TASKS = [((0.75, 2.0), (1.0, 0.4), 0.5), ((3.75, 2.15), (0.9, 0.4), -0.6),
         ((3.4, 0.55), (0.4, 1.0), 0.2)]  # fmt: skip
START = np.array([2.1, 0.85])


def _curvature(values, angle):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ np.diag(values) @ turn.T


def start_and_anchor():
    """Three tasks and one lambda: paths that start there (left), springs that end there (right)."""
    figure, axes = canvas(9.0, 3.0, columns=2)
    for ax, title in zip(axes, ("a start (MAML)", "an anchor (iMAML)"), strict=True):
        text(ax, 2.25, 2.88, title)
        for k, (center, values, angle) in enumerate(TASKS):
            center, H = np.array(center), _curvature(values, angle)
            circle = np.linspace(0, 2 * np.pi, 80)
            root = np.linalg.inv(np.linalg.cholesky(H)).T
            for size in (0.18, 0.36):
                ring = center[:, None] + size * root @ np.stack([np.cos(circle), np.sin(circle)])
                ax.plot(*ring, color=SOFT, lw=0.7)
            ax.plot(*center, "+", color=SOFT, ms=6)
            color, name = PALETTE[k], str(k + 1)
            if ax is axes[0]:
                path = [START]
                for _ in range(3):
                    path.append(path[-1] - 0.55 * H @ (path[-1] - center))
                for a, b in zip(path, path[1:], strict=False):
                    arrow(ax, tuple(a), tuple(b), color=color)
                at, words = path[-1], rf"$\theta_{{{name},T}}$"
            else:
                at = np.linalg.solve(H + 0.35 * np.eye(2), H @ center + 0.35 * START)
                along = np.linspace(0, 1, 200)
                across = (at - START)[::-1] * [-1, 1] / np.linalg.norm(at - START)
                coil = 0.05 * np.sin(along * 2 * np.pi * 9) * (np.abs(along - 0.5) < 0.4)
                ax.plot(*(START[:, None] + np.outer(at - START, along) + np.outer(across, coil)),
                        color=color, lw=1)  # fmt: skip
                words = rf"$\theta_{{{name}}}^*$"
            ax.plot(*at, "o", color=color, ms=5)
            away = ((-0.1, 0.26), (0.05, 0.26), (-0.2, -0.26))[k]
            text(ax, at[0] + away[0], at[1] + away[1], words, color=color)
        ax.plot(*START, "s", color="black", ms=6)
        text(ax, START[0] - 0.16, START[1] - 0.24, r"$\lambda$")
    return figure


def horizon(steps, errors, stored):
    """Errors of hypergradients (left) and what they keep in memory (right) over T.

    ``errors[name]`` and ``stored[name]`` have a number for each entry of ``steps``.
    """
    figure, (left, right) = plotting.figure(2, height=2.6)
    styles = {"unrolled": (COLORS["unrolled"], "s--"), "implicit": (COLORS["cg"], "o-")}
    for ax, rows in ((left, errors), (right, stored)):
        for name, values in rows.items():
            color, style = styles[name]
            ax.plot(steps, values, style, color=color, label=name)
        ax.set(xlabel="inner steps $T$")
        ax.legend()
    left.set(xscale="log", yscale="log", ylabel=r"relative error of $d\Phi/d\lambda$")
    right.set(ylabel="kept for the way back, MiB", ylim=(0, None))
    return figure


def adaptation(x, target, points, curves, mean):
    """One new sinusoid: what each start says of it before and after ten steps on its points.

    ``curves[name]`` is (before, after) on the grid ``x``; ``mean`` the mean of all sinusoids.
    """
    figure, axes = plotting.figure(len(curves), height=2.5, sharey=True)
    for k, (ax, (name, (before, after))) in enumerate(zip(axes, curves.items(), strict=True)):
        ax.plot(x, target, color="black", lw=1, label="the sinusoid")
        ax.plot(*points, "o", color="black", ms=3.5)
        ax.plot(x, mean, ":", color=SOFT, label="mean of all")
        ax.plot(x, before, "--", color=PALETTE[k], lw=1.2, label="before")
        ax.plot(x, after, color=PALETTE[k], label="ten steps")
        ax.set(title=name, xlabel="$x$")
        if not k:
            ax.legend(fontsize=6, loc="lower left")
    return figure
