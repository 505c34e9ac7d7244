"""Figures of long-tailed classes: runs, and the study of the weights."""

from statistics import mean

import matplotlib as mpl

from bilevel_lite.experiment.comparing import joined
from bilevel_lite.plotting import COLORS, PALETTE, STYLE, figure
from bilevel_lite.tasks.long_tail_study import RIVALS, selection

__all__ = ["draw_classes", "draw_curve", "draw_runs", "draw_study"]

SHADES = {
    "equal": PALETTE[7], "focal": PALETTE[3], "balanced": PALETTE[4], "frozen": PALETTE[6],
    "identity": PALETTE[5], "sama": PALETTE[1], "kfac-empirical": PALETTE[2],
    "kfac-mc": PALETTE[0], "kfac-1e-5": PALETTE[7], "kfac-normalised": PALETTE[3],
    "class": PALETTE[1], "meta": PALETTE[0],
}  # fmt: skip
SHOWN = ("equal", "balanced", "class", "kfac-empirical")  # by class: more are a tangle
RULES = {"held out": "o", "last": "_", "on test": "^"}


def draw_curve(ax, curves: dict[str, dict], start: bool = True) -> None:
    """Draw V over the loss.

    Args:
        ax: Axes.
        curves: Name -> what `LongTail.curve` returned.
        start: Whether V as it was drawn is shown too, that of the first curve.
    """
    for name, curve in curves.items():
        ax.plot(curve["loss"], curve["learned"], color=SHADES.get(name, COLORS["kfac"]), label=name)
    first = next(iter(curves.values()))
    if start:
        ax.plot(first["loss"], first["start"], color=COLORS["exact"], ls="--", lw=1, label="start")
    ax.set(xlabel="loss of an example", ylabel="its weight V", ylim=(0, 2))
    ax.legend()


def draw_classes(ax, counts: list[int], rows: dict[str, list[float]]) -> None:
    """Draw the accuracy of each class, by name, over the number of its training images."""
    for name, accuracy in rows.items():
        ax.plot(counts, [100 * a for a in accuracy], "o-", ms=3, color=SHADES.get(name),
                label=name)  # fmt: skip
    ax.set(xscale="log", xlabel="training images of the class", ylabel="test accuracy, %")
    ax.set_xticks(counts[::3], counts[::3])
    ax.minorticks_off()
    ax.invert_xaxis()
    if any(rows):
        ax.legend()


def draw_runs(stored: dict):
    """Draw runs: test accuracy by iteration, V over the loss, the accuracy of each class."""
    first = stored["runs"][0]
    with mpl.rc_context(STYLE):
        fig, axes = figure(3, height=2.9)
        for run in stored["runs"]:
            rows = run["history"]
            axes[0].plot([row["iteration"] for row in rows],
                         [100 * row["test_accuracy"] for row in rows], color=COLORS["kfac"],
                         label=first["settings"]["weights"] if run is first else None)  # fmt: skip
        for name, row in first["baselines"].items():
            axes[0].axhline(100 * row["last_test_accuracy"], color=SHADES[name], ls="--", lw=1.2,
                            label=name)  # fmt: skip
        axes[0].set(xlabel="outer iteration", ylabel="test accuracy, %")
        axes[0].legend()
        if first["curve"]:
            draw_curve(axes[1], {"learned": first["curve"]})
        draw_classes(axes[2], first["counts"], {"": first["class_accuracy"]})
        s = first["settings"]
        fig.suptitle(
            f"{s['dataset']}, {s['model']}, imbalance {s['imbalance']:g}, {s['method']}"
            + (f"; {first['source']}" if first["source"] else ""),
            fontsize=8,
        )
    return fig


def draw_study(stored: dict):
    """Draw the study: accuracy of each row by three rules, V over the loss, accuracy by class."""
    rows = {name: row for name, row in joined(stored["runs"]).items() if row["runs"]}
    last = {name: row["runs"][-1] for name, row in rows.items()}
    curves = {n: run["curve"] for n, run in last.items() if run["curve"] and n not in RIVALS}
    classes = {n: last[n]["class_accuracy"] for n in SHOWN if n in last}
    with mpl.rc_context(STYLE):
        fig, axes = figure(3, height=3.2)
        for at, (name, row) in enumerate(rows.items()):
            found = [selection(run["history"]) for run in row["runs"]]
            for rule, mark in RULES.items():
                each = [100 * one[rule] for one in found]
                axes[0].plot([mean(each)], [-at], mark, color=SHADES.get(name), ms=6,
                             mfc="none" if rule == "on test" else None,
                             label=None if at else rule)  # fmt: skip
        axes[0].set_yticks([-k for k in range(len(rows))], list(rows))
        axes[0].set(xlabel="test accuracy, %, mean of the seeds")
        axes[0].legend(loc="lower left")
        if curves:
            draw_curve(axes[1], curves)
        draw_classes(axes[2], next(iter(last.values()))["counts"], classes)
        one = stored["runs"][0]
        fig.suptitle(
            "; ".join(filter(None, [f"{one['dataset']}, {one['model']}", one["source"]])),
            fontsize=8,
        )
    return fig
