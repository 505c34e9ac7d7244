"""The figure of the study of auxiliary pretraining."""

from statistics import mean

import matplotlib as mpl
import matplotlib.pyplot as plt

from bilevel_lite.experiment.comparing import joined
from bilevel_lite.plotting import COLORS, PALETTE, STYLE

__all__ = ["draw_curves", "draw_study"]

SHADES = {
    "none": PALETTE[7], "fixed": PALETTE[6], "frozen": PALETTE[4], "cosine": PALETTE[3],
    "identity": PALETTE[5], "sama": PALETTE[1], "kfac-empirical": COLORS["kfac"],
    "fixed-scrambled": PALETTE[0],
}  # fmt: skip


def draw_curves(ax, found: dict[str, dict]) -> None:
    """Draw V over a masked text's loss, by name; dotted as drawn, dashed with f on train.

    Args:
        ax: Axes.
        found: Name -> what `Pretraining.weighing` returned for a network; the middle nine tenths of
            the losses of the first are shaded.
    """
    first = next(iter(found.values()))
    ax.axvspan(first["losses"][0], first["losses"][2], color="0.93", zorder=0)
    ax.plot(first["loss"], first["start"], ":", color="black", lw=1, label="as drawn")
    for name, one in found.items():
        solver = name.removesuffix("-on-train")
        style = "-" if solver == name else "--"
        ax.plot(one["loss"], one["learned"], style, color=SHADES.get(solver), label=name)
    ax.set(xlabel="masked-word loss of a text", ylabel="its weight V", ylim=(0, 2))
    ax.legend(fontsize=6.5)


def draw_study(stored: dict):
    """Draw the study, a row of axes for each set: F1 of each row by seed, V over the loss.

    F1 at the iterate that the tuning texts chose (filled) and at the end (hollow); a tick is a
    seed. The curves are those of the last seed.
    """
    sets: dict[str, list] = {}
    for one in stored["runs"]:
        sets.setdefault(one["dataset"], []).append(one)
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(len(sets), 2, figsize=(9, 2.9 * len(sets)), squeeze=False)
        for (left, right), (dataset, studies) in zip(axes, sets.items(), strict=True):
            rows = {name: row for name, row in joined(studies).items() if row["runs"]}
            for at, (name, row) in enumerate(rows.items()):
                color = SHADES.get(name.removesuffix("-on-train"))
                for look, y, fill in (("best", -at, color), ("last", -at - 0.3, "none")):
                    each = [100 * run[look]["test_f1"] for run in row["runs"]]
                    left.plot(each, [y] * len(each), "|", color=color, ms=6)
                    left.plot(mean(each), y, "o", color=color, mfc=fill, ms=5)
            left.set_yticks([-k for k in range(len(rows))], list(rows))
            run = next(iter(rows.values()))["runs"][0]
            left.set(xlabel=f"{dataset}: test {run['metric']}-F1, %")
            curves = {
                name: row["runs"][-1]["weighing"]
                for name, row in rows.items()
                if "learned" in row["runs"][-1]["weighing"] and name != "frozen"
            }
            if curves:
                draw_curves(right, curves)
        fig.suptitle(stored["runs"][0]["source"], fontsize=7)
    return fig
