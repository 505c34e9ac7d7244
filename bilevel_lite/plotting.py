"""One style for every figure of the book."""

from itertools import accumulate
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

__all__ = [
    "COLORS",
    "PALETTE",
    "draw_audit",
    "draw_bench",
    "draw_hyperclean",
    "draw_hyperclean_methods",
    "draw_stored",
    "figure",
    "use_style",
]

# Okabe-Ito: distinguishable with any common colour vision. One meaning each, in every chapter.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
COLORS = {
    "exact": "#000000",
    "cg": "#0072B2",
    "neumann": "#D55E00",
    "identity": "#999999",
    "kfac": "#009E73",
    "unrolled": "#CC79A7",
    "forward": "#56B4E9",
    "differences": "#E69F00",
    "clean": "#0072B2",
    "corrupted": "#D55E00",
}

STYLE = {
    "figure.figsize": (5.0, 3.0),
    "figure.dpi": 90,
    "savefig.dpi": 90,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=PALETTE),
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "bilevel_lite",  # the same figure gives the same file
    "svg.fonttype": "path",
}


def use_style() -> None:
    """Apply the book's figure style to matplotlib."""
    mpl.rcParams.update(STYLE)


def figure(columns: int = 1, height: float = 2.8, **kwargs):
    """Make a figure with a row of axes in the book's sizes.

    Args:
        columns: Axes side by side; 1 gives a 5-inch-wide figure, more a 9-inch one.
        height: In inches.
        **kwargs: Passed to ``plt.subplots``.

    Returns:
        (figure, axes) as ``plt.subplots`` gives them.
    """
    width = 5.0 if columns == 1 else 9.0
    return plt.subplots(1, columns, figsize=(width, height), **kwargs)


def draw_hyperclean(result: dict):
    """Draw hypercleaning runs: test loss against time and gradients, and the learned weights.

    Args:
        result: ``{"runs": [...]}`` with the results of one or more seeds of one method.

    Returns:
        The figure. The histogram is that of the first run.
    """
    first = result["runs"][0]
    shades = {"noisy": PALETTE[1], "validation": PALETTE[7], "clean": PALETTE[2]}
    with mpl.rc_context(STYLE):
        fig, axes = figure(3, height=2.9)
        for ax, key, label in (
            (axes[0], "seconds", "seconds"),
            (axes[1], "gradients", "gradient-equivalents"),
        ):
            for run in result["runs"]:
                history = run["history"]
                ax.plot(
                    [row[key] for row in history],
                    [row["test_loss"] for row in history],
                    color=COLORS["cg"],
                    label="learned weights" if run is first else None,
                )
            for name, fit in first["baselines"].items():  # none if the run was asked for none
                ax.axhline(
                    fit["test_loss"], color=shades[name], linestyle="--", linewidth=1.2,
                    label=f"{name} data",
                )  # fmt: skip
            ax.set_xlabel(label)
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(
                mpl.ticker.FixedLocator([0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.2, 1.5, 2])
            )
            ax.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
            ax.yaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes[0].set_ylabel("test loss")
        axes[0].legend(loc="best")
        edges = first["weights"]["edges"]
        for name in ("clean", "corrupted"):
            counts = first["weights"][name]
            axes[2].stairs(counts, edges, fill=True, alpha=0.6, color=COLORS[name], label=name)
        axes[2].set(xlabel="learned weight", ylabel="training examples", yscale="log")
        axes[2].legend(title="label is", loc="upper center")
        settings = first["settings"]
        fig.suptitle(
            f"Hypercleaning {first.get('source') or settings['dataset']}, "
            f"{settings['model']} model, {settings['method']}",
            fontsize=10,
        )
    return fig


# The methods in the figure of the comparison: those that solve a linear system, and the others.
IMPLICIT = ("aid", "amigo", "stocbio", "mrbo", "soba", "saba", "nbo", "nsbo", "nhgd")


def draw_hyperclean_methods(result: dict):
    """Draw the comparison of all methods: test loss against gradients and time.

    The test loss is that of the iterate with the lowest tuning loss so far.

    Above the methods with a linear system, below the others; seed 0 of each, KFAC methods green.

    Args:
        result: ``{"runs": [results of ``hyperclean --method all``, perhaps in parts]}``.

    Returns:
        The figure.
    """
    rows = [row for run in result["runs"] for row in run["results"] if row["runs"]]
    groups = [[r for r in rows if r["method"].startswith(IMPLICIT)]]
    groups.append([r for r in rows if r not in groups[0]])
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(2, 2, figsize=(9.0, 7.0), sharey=True, squeeze=False)
        for line, group in zip(axes, groups, strict=True):
            colours = iter(plt.get_cmap("tab20").colors)
            for row in sorted(group, key=lambda r: r["runs"][0]["best"]["test_loss"]):
                kfac = "kfac" in row["method"]
                style = {"color": PALETTE[2] if kfac else next(colours), "label": row["method"]}
                style["linestyle"] = KFAC_LINES.get(row["method"], "-")
                history = row["runs"][0]["history"]
                losses = [look["test_loss"] for look in accumulate(history, _better)]
                for ax, key in zip(line, ("gradients", "seconds"), strict=True):
                    ax.plot([h[key] for h in history], losses, **style)
            for ax, label in zip(line, ("gradient-equivalents", "seconds"), strict=True):
                ax.set(xscale="log", yscale="log", xlabel=label)
                ax.yaxis.set_major_locator(mpl.ticker.FixedLocator([0.25, 0.3, 0.4, 0.6, 1, 2]))
                ax.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
                ax.yaxis.set_minor_locator(mpl.ticker.NullLocator())
            line[0].set_ylabel("test loss of the iterate chosen so far")
            if group:
                line[1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
        first = result["runs"][0]
        fig.suptitle(f"Hypercleaning {first['dataset']}, {first['model']} model", fontsize=10)
    return fig


def _better(a: dict, b: dict) -> dict:
    """The line of a log with the lower tuning loss."""
    return b if b["tuning_loss"] < a["tuning_loss"] else a


KFAC_LINES = {
    "aid-kfac": "-", "aid-ekfac": "--", "amigo-kfac": "-.", "amigo-kfac-replace": ":",
    "mrbo-kfac": (0, (1, 1)), "nhgd-kfac": (0, (5, 1, 1, 1, 1, 1)),
}  # fmt: skip


def draw_audit(report):
    """Draw an `AuditReport`: for each solver the lengths of its error's parts, and the whole.

    Args:
        report: What `bilevel_lite.audit` returned.

    Returns:
        The figure.
    """
    shades = dict(
        zip(
            ("inner", "curvature", "linear", "minibatch"),
            (PALETTE[3], PALETTE[2], PALETTE[0], PALETTE[4]),
            strict=True,
        )
    )
    parts = list(report.rows[0].parts)
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(max(5.0, 1.1 * len(report.rows)), 3.0))
        width = 0.8 / len(parts)
        for i, part in enumerate(parts):
            at = [x - 0.4 + (i + 0.5) * width for x in range(len(report.rows))]
            # a part that is only rounding has no bar
            sizes = [row.parts[part] if row.parts[part] > 1e-9 else 0 for row in report.rows]
            ax.bar(at, sizes, width, color=shades[part], label=part)
        ax.plot(
            range(len(report.rows)), [row.relative_error for row in report.rows], "_",
            color=COLORS["exact"], ms=30, label="whole error",
        )  # fmt: skip
        ax.set_xticks(range(len(report.rows)), [row.name for row in report.rows], rotation=20)
        ax.set(yscale="log", ylabel="length / length of the truth")
        ax.grid(False, axis="x")
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)
    return fig


# row of the benchmark -> (its name in the figure, the curvlinops row that does the same work)
BENCH_ROWS = {
    "hvp": ("Hessian product", "curvlinops hvp"),
    "ggn": ("GGN product", "curvlinops ggn"),
    "identity": ("identity", None),
    "cg-3": ("CG, 3 steps", "curvlinops cg-3"),
    "cg-10": ("CG, 10 steps", None),
    "neumann-10": ("Neumann, 10 terms", None),
    "kfac-mc": ("KFAC", "curvlinops kfac-mc"),
    "kfac-mc, first factor kept": ("KFAC, first A kept", None),
    "ekfac-mc": ("EKFAC", "curvlinops ekfac-mc"),
    "ekfac-mc, first factor kept": ("EKFAC, first A kept", None),
    "aid step, kfac-mc": ("outer iteration, KFAC", "aid step, curvlinops kfac-mc"),
}


def draw_bench(result: dict):
    """Draw the benchmark: cost of each row in gradients, beside curvlinops and the operation count.

    Args:
        result: ``{"runs": [one run of ``python -m bilevel_lite bench``]}``.

    Returns:
        The figure, an axis per model.
    """
    (run,) = result["runs"]
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(
            1, len(run["cases"]), figsize=(9.0, 3.3), sharey=True, squeeze=False
        )
        heights = range(len(BENCH_ROWS))
        for ax, case in zip(axes[0], run["cases"], strict=True):
            for y, (row, (_, other)) in zip(heights, BENCH_ROWS.items(), strict=True):
                ours = case["rows"][row]
                theirs = case["rows"].get(other, {}).get("ratio")
                if theirs is not None:
                    ax.plot([ours["ratio"], theirs], [y, y], color="0.8", zorder=1)
                    ax.plot(theirs, y, "o", color=PALETTE[1], mfc="white", label="curvlinops")
                ax.plot(ours["flops"], y, "|", color="0.3", ms=9, label="operations counted")
                ax.plot(ours["ratio"], y, "o", color=PALETTE[2], label="bilevel_lite")
            ax.set(xscale="log", xlabel="gradients")
            ax.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
            ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
            size = f"N = {case['examples']}, gradient {case['gradient_ms']:.3g} ms"
            ax.set_title(f"{case['model']}\n{size}", fontsize=8)
        axes[0, 0].set_yticks(heights, [name for name, _ in BENCH_ROWS.values()])
        axes[0, 0].invert_yaxis()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        fig.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3)
    return fig


def draw_stored(names: list[str] | None = None, to: str | Path | None = None) -> list[Path]:
    """Draw ``figures/NAME.svg`` from ``figures/data/NAME.json``.

    The study of the noise also gets ``NAME_surest.svg``: the images that each solver is surest are
    mislabelled.

    Args:
        names: Which; all that the folder holds by default. A result of the book that the folder
            does not hold is taken from the package.
        to: Another folder than the one that `bilevel_lite.experiment.figures_folder` gives.

    Returns:
        The files written.

    Raises:
        ValueError: for an unknown name, or a result that no function here draws.
        RunError: if a result was edited, or a file cannot be written.
    """
    from bilevel_lite.experiment import figures_folder, stored, writing
    from bilevel_lite.tasks.cleaning_figures import draw_noise_surest, draw_study

    drawers = {
        "hyperclean": draw_hyperclean,
        "hyperclean_methods": draw_hyperclean_methods,
        "hyperclean_study": draw_study,
        "bench": draw_bench,
    }
    folder = figures_folder(to)
    written = []
    for name in names or sorted(path.stem for path in (folder / "data").glob("*.json")):
        result = stored(name, folder)
        if result.get("kind") not in drawers:
            raise ValueError(f"{name}: is of kind {result.get('kind')!r}; known: {sorted(drawers)}")
        figures = {name: drawers[result["kind"]](result)}
        if result["runs"][0].get("study") == "noise":
            figures[f"{name}_surest"] = draw_noise_surest(result)
        for stem, fig in figures.items():
            path = folder / f"{stem}.svg"
            # the style's salt makes the file's identifiers always the same
            with writing(path), mpl.rc_context(STYLE):
                folder.mkdir(parents=True, exist_ok=True)
                fig.savefig(path, metadata={"Date": None})
            plt.close(fig)
            written.append(path)
    return written
