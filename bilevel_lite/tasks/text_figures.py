"""Figures of text cleaning: runs, and the study of the solvers."""

from statistics import mean

import matplotlib as mpl
import matplotlib.pyplot as plt

from bilevel_lite.drawings import ch12
from bilevel_lite.experiment.comparing import joined
from bilevel_lite.experiment.search import pace
from bilevel_lite.plotting import COLORS, PALETTE, STYLE, figure
from bilevel_lite.tasks.text_variants import BASELINES, SOLVERS

__all__ = ["costs", "draw_costs", "draw_runs", "draw_study"]

SHADES = {
    "noisy": PALETTE[1], "balanced": PALETTE[4], "validation": PALETTE[7], "clean": PALETTE[2],
    "sama": PALETTE[3],
}  # fmt: skip


def draw_runs(result: dict):
    """Draw runs: test accuracy against time and gradients, and the learned weights.

    Args:
        result: ``{"runs": [...]}``, the results of one or more seeds of one method; of several
            methods what an iteration of them costs.

    Returns:
        The figure. The histogram is that of the first run.
    """
    if len({run["settings"]["method"] for run in result["runs"]}) > 1:
        return draw_costs(result["runs"])
    first = result["runs"][0]
    with mpl.rc_context(STYLE):
        fig, axes = figure(3, height=2.9)
        for ax, key in zip(axes, ("seconds", "gradients"), strict=False):
            for run in result["runs"]:
                accuracy = [100 * row["test_accuracy"] for row in run["history"]]
                label = "learned weights" if run is first else None
                ax.plot([row[key] for row in run["history"]], accuracy, color=COLORS["kfac"],
                        label=label)  # fmt: skip
            for name, fit in first["baselines"].items():
                ax.axhline(100 * fit["test_accuracy"], color=SHADES[name], linestyle="--",
                           linewidth=1.2, label=name)  # fmt: skip
            ax.set_xlabel({"gradients": "gradient-equivalents"}.get(key, key))
        axes[0].set_ylabel("test accuracy, %")
        axes[0].legend(loc="best")
        edges = first["weights"]["edges"]
        for name, colour in (("right", COLORS["clean"]), ("wrong", COLORS["corrupted"])):
            axes[2].stairs(
                first["weights"][name], edges, fill=True, alpha=0.6, color=colour, label=name
            )
        axes[2].set(xlabel="learned weight", ylabel="training texts", yscale="log")
        axes[2].legend(title="label is")
        fig.suptitle(_title(first["settings"], first["source"]), fontsize=8)
    return fig


def costs(runs: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """Seconds an outer iteration and peak memory in MiB, by trained layers and the study's names.

    Of runs each in a process of its own with at least two looks; the time is that between the first
    look and the last, in which nothing is warmed up. Several runs of one name are averaged.

    Args:
        runs: Results of ``python -m bilevel_lite run text_cleaning``, of plain training on the
            voted labels (``"noisy"``) and of solvers with the study's settings.

    Raises:
        ValueError: for a run that is neither, or that has one look.
    """
    found: dict[str, dict[str, list]] = {}
    for run in runs:
        s, first, last = run["settings"], run["history"][0], run["history"][-1]
        names = [name for name, own in SOLVERS.items() if own.items() <= s.items()]
        if s["weights"] == "one":
            names = ["noisy"]
        if len(names) != 1:
            raise ValueError(f"runs: {s['method']} is none of {list(SOLVERS)} as it was run")
        if not (span := last["iteration"] - first["iteration"]):
            raise ValueError(f"runs: {names[0]} has one look, expected two (evaluate_every)")
        pair = ((last["seconds"] - first["seconds"]) / span, run["memory"]["peak_mib"])
        found.setdefault(s["layers"], {}).setdefault(names[0], []).append(pair)
    return {
        layers: {name: tuple(map(mean, zip(*pairs, strict=True))) for name, pairs in rows.items()}
        for layers, rows in found.items()
    }


def draw_costs(runs: list[dict]):
    """Draw what iterations of different methods cost, in time and memory."""
    with mpl.rc_context(STYLE):
        fig = ch12.costs(costs(runs))
        source = runs[0]["source"].rsplit(";", 1)[0]
        fig.suptitle(_title(runs[0]["settings"], source), fontsize=7)
    return fig


def draw_study(result: dict):
    """Draw the study: a row for each set and number of layers, a line for each method.

    Accuracy at the iterate that the tuning texts chose (filled) and at the end (hollow), each the
    mean of the seeds, with a bar from the lowest to the highest; AUC; seconds an outer iteration.

    Args:
        result: ``{"runs": [results of ``python -m bilevel_lite study text``, one or more]}``;
            those of one set and number of layers are joined.

    Returns:
        The figure.
    """
    panels: dict[tuple, list[dict]] = {}
    for run in result["runs"]:
        panels.setdefault((run["dataset"], run["base"]["layers"]), []).append(run)
    shown = {where: sorted(joined(parts).values(), key=_place) for where, parts in panels.items()}
    heights = [0.7 + 0.23 * len(rows) for rows in shown.values()]
    with mpl.rc_context(STYLE):
        fig, grid = plt.subplots(
            len(panels), 3, figsize=(9.0, 0.4 + sum(heights)), squeeze=False, layout="constrained",
            height_ratios=heights, sharey="row",
        )  # fmt: skip
        for axes, (where, parts) in zip(grid, panels.items(), strict=True):
            run, rows = parts[0], [row for row in shown[where] if row["runs"]][::-1]
            for y, row in enumerate(rows):
                colour = SHADES.get(row["method"], COLORS.get(row["method"].split("-")[0]))
                for ax, key, scale in ((axes[0], "test_accuracy", 100), (axes[1], "auc", 1)):
                    for at, filled in (("last", False), ("best", True)):
                        if key in row["runs"][0][at]:
                            values = [scale * one[at][key] for one in row["runs"]]
                            _spread(ax, values, y + (0 if filled else -0.25), colour, filled)
                if row["method"] not in BASELINES:
                    each = [pace({"runs": [one]}, "seconds") for one in row["runs"]]
                    _spread(axes[2], each, y, colour, True)
            labels = "test accuracy, %", "AUC of the weights", "seconds an outer iteration"
            for ax, label in zip(axes, labels, strict=True):
                ax.set(xlabel=label, ylim=(-0.7, len(rows) - 0.3))
            axes[0].set_yticks(range(len(rows)), [row["method"] for row in rows])
            title = _title({**run, **run["base"], **run["final"]}, run["source"])
            title += "\n" + _seeds(run, max(len(row["runs"]) for row in rows))
            axes[1].set_title(" \n ", fontsize=9)  # room for one as wide as the three panels
            axes[0].text(0, 1.04, title, size=7, in_layout=False, transform=axes[0].transAxes)
        for filled, label in ((True, "chosen by the tuning texts"), (False, "at the end")):
            grid[0, 0].plot([], [], "o", color="0.3", mfc=None if filled else "none", label=label)
        grid[0, 0].legend(fontsize=6)
    return fig


def _spread(ax, values: list[float], y: float, colour, filled: bool) -> None:
    x = mean(values)
    ax.errorbar(
        [x], [y], xerr=[[x - min(values)], [max(values) - x]], fmt="o", color=colour, capsize=2,
        ms=5 if filled else 4, mfc=colour if filled else "none", elinewidth=1,
    )  # fmt: skip


def _place(row: dict) -> int:
    order = [*BASELINES, *SOLVERS]
    return order.index(row["method"]) if row["method"] in order else len(order)


def _seeds(run: dict, most: int) -> str:
    seeds = f"{most} seed{'s' if most > 1 else ''}"
    return f"{run['final']['outer_steps']:g} outer iterations, {seeds}, {run['trials']} trials each"


def _title(s: dict, source: str) -> str:
    return f"{s['dataset']}, batch {s['batch_size']}: {source}"
