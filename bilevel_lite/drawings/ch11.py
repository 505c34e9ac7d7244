"""Chapter 11: the drawing of what runs on one seed share, and the figures of its data."""

from itertools import accumulate
from statistics import mean

from matplotlib.transforms import blended_transform_factory

from bilevel_lite import plotting
from bilevel_lite.drawings import arrow, canvas, text
from bilevel_lite.plotting import COLORS, PALETTE

BLUE, ORANGE, GREEN = PALETTE[0], PALETTE[1], PALETTE[2]
STYLES = {
    "identity": (COLORS["identity"], "-"),
    "cg-3": (COLORS["cg"], "-"),
    "cg-3-ggn": (COLORS["cg"], ":"),
    "cg-10": (COLORS["cg"], "-."),
    "cg-normal-3": (COLORS["cg"], "--"),
    "neumann-10": (COLORS["neumann"], "-"),
    "kfac": (COLORS["kfac"], "-"),
    "kfac-empirical": (COLORS["kfac"], "--"),
    "ekfac": (PALETTE[4], "-"),
    "pcg-3": (PALETTE[3], "-"),
}


def shared_luck():
    """Two methods on three seeds: as two clouds, and as three differences.

    The heights are made up: a seed moves both methods together, the method moves little.
    """
    figure, (left, right) = canvas(9.0, 2.7, columns=2)
    luck, gap = (1.0, 1.9, 1.4), (0.22, 0.30, 0.26)
    for ax in (left, right):
        arrow(ax, (0.4, 0.35), (0.4, 2.5), color="0.4")
        text(ax, 0.4, 2.6, "test loss", color="0.35", ha="left")
    for x, name, color, lift in ((1.5, "KFAC", GREEN, (0, 0, 0)), (3.2, "its rival", BLUE, gap)):
        values = [a + b for a, b in zip(luck, lift, strict=True)]
        left.plot([x] * 3, values, "o", color=color, ms=7)
        left.plot([x - 0.3, x + 0.3], [mean(values)] * 2, color=color)
        text(left, x, 0.2, name, color=color)
    text(left, 2.35, 2.45, "two clouds: they overlap", color="0.35")
    for seed, (low, up) in enumerate(zip(luck, gap, strict=True), 1):
        x = 0.2 + 1.1 * seed
        right.plot([x], [low], "o", color=GREEN, ms=7)
        right.plot([x], [low + up], "o", color=BLUE, ms=7)
        right.annotate("", (x + 0.18, low), (x + 0.18, low + up), arrowprops={"arrowstyle": "<->"})
        text(right, x + 0.4, low + up / 2, rf"$\Delta_{seed}$")
        text(right, x, 0.2, f"seed {seed}", color="0.35")
    text(right, 2.6, 2.45, "three differences: all of one sign, nearly alike", color="0.35")
    return figure


def ritz(values):
    """Smallest Ritz values by step; ``values[model, "H" or "G"]`` is a list."""
    models = list(dict.fromkeys(model for model, _ in values))
    figure, axes = plotting.figure(len(models), height=2.5)
    figure.set_dpi(70)
    for ax, model in zip(axes, models, strict=True):
        for name, style, color in (("H", "o-", "black"), ("G", ".--", BLUE)):
            steps = range(1, len(values[model, name]) + 1)
            ax.plot(steps, values[model, name], style, color=color, label=f"${name}$")
        ax.axhline(0, ls=":", color="0.5")
        ax.set(xlabel="Lanczos steps $m$", ylabel="smallest Ritz value", title=model)
        ax.legend()
    return figure


def live(tracks):
    """AUC against gradients, and the smallest curvature that CG met, of a short live run.

    ``tracks[name]`` has rows (gradients, AUC, `SolveInfo`).
    """
    styles = {"identity": (COLORS["identity"], "-"), "CG-3 on H": (COLORS["cg"], "-"),
              "CG-3 on G": (COLORS["cg"], ":"), "KFAC": (COLORS["kfac"], "-")}  # fmt: skip
    figure, (left, right) = plotting.figure(2, height=2.6)
    figure.set_dpi(70)
    for name, track in tracks.items():
        gradients, auc = ([row[k] for row in track] for k in (0, 1))
        curvature = [row[2].curvature[0] for row in track if row[2].curvature]
        color, line = styles[name]
        left.plot(gradients, auc, line, color=color, label=name)
        if curvature:
            marker = "o" if name.endswith("H") else "x"
            right.plot(range(1, len(curvature) + 1), curvature, marker, color=color, ms=3.5,
                       label=name)  # fmt: skip
    right.axhline(0, ls=":", color="0.5")
    left.set(xlabel="gradients", ylabel="AUC of the weights", title="the same step sizes for all")
    right.set(xlabel="outer iteration", ylabel="smallest curvature met",
              title="CG's directions, damping included")  # fmt: skip
    for ax in (left, right):
        ax.legend(fontsize=7)
    return figure


def forest(groups, edge=0.03):
    """One line for each difference, in groups under a heading.

    ``groups[heading][line]`` is (one for each seed, mean, half width, note); the note stands at the
    right. Filled where zero is outside of the interval. The axis is linear within ``edge`` of zero,
    the grey band, and logarithmic beyond. Headings stand on white lines of their own.
    """
    lines = sum(1 + len(group) for group in groups.values())
    figure, ax = plotting.figure(1)
    figure.set_size_inches(7.8, 0.7 + 0.19 * lines)
    figure.set_dpi(78)
    ax.set_xscale("symlog", linthresh=edge, linscale=1.2)
    ax.axvspan(-edge, edge, color="0.93", lw=0)
    ax.axvline(0, color="black", lw=0.8)
    places, names, y = [], [], 0
    left = blended_transform_factory(figure.transFigure, ax.transData)
    for heading, group in groups.items():
        ax.axhspan(y - 0.5, y + 0.5, color="white", lw=0, zorder=2.5)
        ax.text(0.01, y, heading, transform=left, fontsize=9, weight="bold", va="center", zorder=3,
                in_layout=False)  # fmt: skip
        for line, (each, middle, half, note) in group.items():
            y += 1
            decided = abs(middle) > half
            color = (GREEN if middle < 0 else ORANGE) if decided else "0.45"
            plotting.interval(ax, y, each, middle, half, color)
            ax.text(1.01, y, note, transform=ax.get_yaxis_transform(), fontsize=8.5, va="center")
            places, names = [*places, y], [*names, line]
        y += 1
    ax.set_yticks(places, names, fontsize=9)
    ax.tick_params("y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(y - 0.4, -0.5)
    ticks = [-0.5, -0.2, -0.1, -0.03, -0.01, 0, 0.01, 0.03, 0.1]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=9)
    ax.minorticks_off()
    ax.set(xlim=(-0.8, 0.2))
    ax.set_xlabel("difference of test losses (left of 0: the first is lower)", fontsize=9.5)
    ax.grid(axis="y", visible=False)
    return figure


def clock(panels):
    """Test loss of the iterate chosen so far against seconds.

    ``panels[title]`` is (rows of a study by method, a history of each, baselines by name); mean and
    range of all seeds stand where the runs end. Methods without a style are left out.
    """
    figure, axes = plotting.figure(len(panels), height=2.9)
    figure.set_dpi(72)
    for ax, (title, (rows, histories, baselines)) in zip(axes, panels.items(), strict=True):
        for method, row in rows.items():
            if method not in STYLES:
                continue
            (color, line), history = STYLES[method], histories[method]
            chosen = accumulate(history, lambda a, b: min(a, b, key=lambda r: r["tuning_loss"]))
            seconds = [look["seconds"] for look in history]
            ax.plot(seconds, [look["test_loss"] for look in chosen], line, color=color, lw=1.2,
                    label=method)  # fmt: skip
            ends = [run["best"]["test_loss"] for run in row["runs"]]
            ax.errorbar([seconds[-1]], [mean(ends)], [[mean(ends) - min(ends)],
                        [max(ends) - mean(ends)]], fmt="s", ms=3, color=color)  # fmt: skip
        for name, value in baselines.items():
            ax.axhline(value, color="0.6", ls=":", lw=0.9)
            ax.text(0.01, value, name, transform=ax.get_yaxis_transform(), fontsize=6, color="0.4",
                    va="bottom")  # fmt: skip
        ax.set(xscale="log", xlabel="seconds", title=title)
    axes[0].set_ylabel("test loss of the iterate chosen so far")
    handles = {}
    for ax in axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    axes[-1].legend(handles.values(), handles.keys(), fontsize=6.5, loc="upper left",
                    bbox_to_anchor=(1.0, 1.0))  # fmt: skip
    return figure


def luck(curves):
    """Expected lowest tuning loss of k trials; ``curves[panel][method]`` is a list over k."""
    figure, axes = plotting.figure(len(curves), height=2.5)
    figure.set_dpi(60)
    for ax, (title, of) in zip(axes, curves.items(), strict=True):
        for method, values in of.items():
            color, line = STYLES[method]
            ax.plot(range(1, len(values) + 1), values, line, color=color, label=method)
        ax.set(xlabel="trials $k$", title=title)
    axes[0].set_ylabel("expected lowest tuning loss")
    axes[0].legend(fontsize=7)
    return figure
