"""Figures of hypercleaning: runs, the comparison, the studies, pictures of rejected images."""

import base64
import zlib
from itertools import accumulate
from statistics import mean

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from bilevel_lite.experiment.comparing import difference, memory_pairs
from bilevel_lite.experiment.search import pace
from bilevel_lite.plotting import COLORS, PALETTE, STYLE, figure, interval

__all__ = [
    "draw_hyperclean", "draw_hyperclean_methods", "draw_noise_surest", "draw_study",
    "unpack_images",
]  # fmt: skip


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


FULL_LENGTH = 1000  # outer iterations, as in the papers; a figure of a shorter study says so


def draw_study(result: dict):
    """Draw a study of full-scale hypercleaning.

    Args:
        result: ``{"runs": [results of ``python -m bilevel_lite study NAME``, perhaps in parts]}``.

    Returns:
        The figure.
    """
    first = result["runs"][0]
    rows = [row for run in result["runs"] for row in run["results"] if row["runs"]]
    with mpl.rc_context(STYLE):
        fig = DRAW_STUDY[first["study"]](rows)
        source = first["source"] or first["dataset"]
        steps, seeds = int(first["final"]["outer_steps"]), first["seeds"]
        length = f"{steps} of {FULL_LENGTH}" if steps < FULL_LENGTH else f"{steps}"
        searched = any(row["trials"] for row in rows)
        notes = "" if searched else ", one setting, no search"
        if sizes := first.get("sizes"):
            notes += "\n" + ", ".join(f"{role} {size}" for role, size in sizes.items())
        fig.suptitle(
            f"{source}, {first['model']} model, {length} outer iterations, {seeds} "
            f"seed{'s' if seeds > 1 else ''}{notes}",
            fontsize=9,
        )
    return fig


def _bests(row: dict, key: str) -> list[float]:
    return [run["best"][key] for run in row["runs"]]


def _point(ax, x: float, values: list[float], **style) -> None:
    """The mean of the seeds, and a bar from the lowest to the highest."""
    y = mean(values)
    ax.errorbar([x], [y], [[y - min(values)], [max(values) - y]], fmt="o", capsize=2, **style)


def _colour(name: str) -> str:
    """Colour of a variant, by the first word of its name."""
    known = {**COLORS, "ekfac": PALETTE[4], "pcg": PALETTE[3]}
    return known[name.split("-")[0]]


def _draw_solvers(rows):
    fig, axes = plt.subplots(1, 2, figsize=(9.0, 4.0), sharey=True)
    rows = sorted(rows, key=lambda row: mean(_bests(row, "test_loss")))
    losses = [mean(_bests(row, "test_loss")) for row in rows]
    for ax, key in zip(axes, ("gradients", "seconds"), strict=True):
        paces = [pace(row, key) for row in rows]
        for i, (row, x, y) in enumerate(zip(rows, paces, losses, strict=True)):
            _point(ax, x, _bests(row, "test_loss"), color=_colour(row["method"]))
            # a name goes above those of the points just below it
            crowd = sum(
                abs(np.log(x / paces[j])) < 0.12 * np.log(max(paces) / min(paces))
                and y - losses[j] < 0.05 * (losses[-1] - losses[0])
                for j in range(i)
            )
            ax.annotate(
                row["method"], (x, y), xytext=(4, 3 + 8 * crowd), textcoords="offset points",
                fontsize=7,
            )  # fmt: skip
        ax.set(xscale="log", xlabel=f"{key} per outer iteration")
        ax.margins(x=0.12)
        for which in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
            which(lambda value, _: f"{value:.2g}")
        ax.tick_params(axis="x", which="both", labelsize=7)
    axes[0].set_ylabel("test loss")
    return fig


def _lines(axes, rows, split, values, xlabels) -> None:
    """Lines over a setting: ``split(row)`` gives (line, x), each of ``values`` an axis."""
    names = list(dict.fromkeys(split(row)[0] for row in rows))
    for ax, (label, value) in zip(axes, values.items(), strict=True):
        for name in names:
            group = sorted((split(row)[1], value(row)) for row in rows if split(row)[0] == name)
            ax.plot(*zip(*[(x, mean(y)) for x, y in group], strict=True), color=_colour(name),
                    label=name)  # fmt: skip
            for x, several in group:
                _point(ax, x, several, color=_colour(name), ms=3)
        ax.set(xlabel=xlabels, ylabel=label)


MEASURES = {
    "test loss": lambda row: _bests(row, "test_loss"),
    "AUC": lambda row: _bests(row, "auc"),
    "seconds per outer iteration": lambda row: [pace(row, "seconds")],
}


def _draw_batch(rows):
    def split(row):
        return row["method"].rsplit("-b", 1)[0], row["settings"]["batch_size"]

    fig, axes = plt.subplots(1, 3, figsize=(9.0, 3.0))
    _lines(axes, rows, split, MEASURES, "batch size")
    for ax in axes:
        ax.set_xscale("log", base=2)
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=7)
    return fig


def _draw_refresh(rows):
    def split(row):
        return row["method"].split("-every")[0], row["settings"]["every"]

    fig, axes = plt.subplots(1, 3, figsize=(9.0, 3.0))
    _lines(axes, rows, split, MEASURES, "outer iterations for which factors are kept")
    for ax in axes:
        ax.set_xscale("log")
    axes[0].legend(fontsize=7)
    return fig


def _draw_ema(rows):
    """The loss by damping, each at its own point; a memory minus none, at the same point."""
    sizes = sorted({row["settings"]["batch_size"] for row in rows})
    fig, axes = plt.subplots(1, 1 + len(sizes), figsize=(3.2 * (1 + len(sizes)), 3.2))
    shades = mpl.colormaps["viridis"]
    memories = sorted({row["settings"]["ema"] for row in rows})
    for ax, size in zip(axes, sizes, strict=False):
        for k, memory in enumerate(memories):
            group = [
                row for row in rows
                if row["settings"]["batch_size"] == size and row["settings"]["ema"] == memory
                and "follows" not in row
            ]  # fmt: skip
            colour = shades(0.9 * k / max(1, len(memories) - 1))
            xs = [row["settings"]["damping"] for row in group]
            ax.plot(xs, [mean(_bests(r, "test_loss")) for r in group], color=colour)
            for x, row in zip(xs, group, strict=True):
                label = f"memory {memory:g}" if x == xs[0] else None
                _point(ax, x, _bests(row, "test_loss"), color=colour, ms=3, label=label)
        ax.set(xscale="log", xlabel="damping", title=f"batch {size}, own points")
    axes[0].set_ylabel("test loss")
    axes[0].legend(fontsize=7)
    pairs = memory_pairs(rows)
    axes[-1].axvline(0, color="black", linewidth=0.8)
    for y, pair in enumerate(pairs.values()):
        interval(axes[-1], y, *pair, PALETTE[0])
    axes[-1].set_yticks(range(len(pairs)), list(pairs), fontsize=6)
    axes[-1].invert_yaxis()
    axes[-1].set(xlabel="test loss, memory minus none", title="at equal points")
    return fig


def _draw_noise(rows):
    kinds = ("uniform", "pair")
    names = {"test loss": MEASURES["test loss"]}
    names["AUC"] = lambda row: _bests(row, "auc")
    names["precision"] = lambda row: _bests(row, "precision")
    fig, axes = plt.subplots(2, 3, figsize=(9.0, 5.4), sharex=True)
    for line, kind in zip(axes, kinds, strict=True):
        for ax, (label, value) in zip(line, names.items(), strict=True):
            group = [
                row for row in rows
                if (row["settings"]["noise_kind"] == kind or row["settings"]["noise"] == 0)
                and (label == "test loss" or row["settings"]["noise"] > 0)
            ]  # fmt: skip
            _lines(
                [ax],
                group,
                lambda row: (row["method"].rsplit(f"-{row['settings']['noise_kind']}", 1)[0],
                             row["settings"]["noise"]),
                {label: value},
                "labels redrawn" if kind == "pair" else "",
            )  # fmt: skip
            ax.set_title(f"{kind} noise", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    return fig


def _draw_resnet18(rows):
    """KFAC against each rival by pairs, loss against seconds, factors kept."""
    named = {row["method"]: row for row in rows}
    kfac, kept = named.get("kfac"), [row for row in rows if "every" in row["settings"]]
    kept = [row for row in kept if row["settings"]["method"] == "aid-kfac"]
    others = [row["method"] for row in (kfac, *kept) if row] + ["kfac-cifar-stem"]
    rivals = [row for row in rows if row["method"] not in others]
    fig, axes = plt.subplots(1, 3, figsize=(10.0, 3.4), width_ratios=(1.3, 1.6, 1))
    axes[0].axvline(0, color="black", linewidth=0.8)
    for y, row in enumerate(rivals if kfac else []):
        interval(axes[0], y, *difference(kfac, row), _colour(row["method"]))
    axes[0].set_yticks(range(len(rivals)), [row["method"] for row in rivals], fontsize=7)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="test loss of KFAC minus rival's", title="left of 0: KFAC's is lower")
    for row in rows if kfac is None else [*rivals, kfac]:
        style = {"color": _colour(row["method"]), "linestyle": LINES.get(row["method"], "-")}
        for run in row["runs"]:
            looks = list(accumulate(run["history"], _better))
            label = row["method"] if run is row["runs"][0] else None
            seconds = [look["seconds"] for look in run["history"]]
            losses = [look["test_loss"] for look in looks]
            axes[1].plot(seconds, losses, linewidth=1, label=label, **style)
    axes[1].set(xscale="log", xlabel="seconds", ylabel="test loss of the iterate chosen so far")
    axes[1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    for row in [kfac, *kept] if kfac else kept:
        every = row["settings"].get("every", 1)
        _point(axes[2], every, _bests(row, "test_loss"), color=_colour("kfac"), ms=3)
        axes[2].annotate(
            f"{pace(row, 'seconds'):.2g} s", (every, max(_bests(row, "test_loss"))), fontsize=6,
            xytext=(0, 3), textcoords="offset points", ha="center",
        )  # fmt: skip
    axes[2].set(xscale="log", xlabel="iterations KFAC's factors are kept")
    axes[2].set_ylabel("test loss")
    axes[2].margins(x=0.2, y=0.2)
    for ax in axes:
        if ax is not axes[0]:
            ax.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        ax.title.set_fontsize(8)
        ax.xaxis.label.set_fontsize(8)
    return fig


LINES = {"kfac-empirical": "--", "cg-normal-3": "--"}  # of the colour of another

DRAW_STUDY = {
    "solvers": _draw_solvers,
    "batch": _draw_batch,
    "refresh": _draw_refresh,
    "ema": _draw_ema,
    "noise": _draw_noise,
    "resnet18": _draw_resnet18,
}


def _picture(ax, image, label, right: bool) -> None:
    ax.imshow(image, cmap="gray_r" if image.ndim == 2 else None)
    ax.set_title(label, fontsize=7, color=COLORS["clean"] if right else "black", pad=2)


def draw_noise_surest(result: dict, rate: float | None = None, columns: int = 12):
    """Draw what each solver of the noise study is surest is mislabelled, on seed 0.

    Args:
        result: As for `draw_study`, with rows of this ``rate``.
        rate: Of the noise; both kinds are drawn, where they are there. By default the lower middle
            one of the study's rates.
        columns: Images of each, out of those stored.

    Returns:
        The figure, a line for each variant: how many of all that are stored are in fact wrong, and
        the images under their given labels, in the colour of clean examples where it is right.

    Raises:
        ValueError: if no row has this rate.
    """
    rows = [row for run in result["runs"] for row in run["results"]]
    if rate is None:
        rates = sorted({row["settings"]["noise"] for row in rows} - {0}) or [0]
        rate = rates[(len(rates) - 1) // 2]
    rows = [row for row in rows if row["runs"] and row["settings"].get("noise") == rate]
    found = {
        row["method"]: run["surest"] for row in rows for run in row["runs"] if run["seed"] == 0
    }
    if not found:
        raise ValueError(f"rate: got {rate}, expected one of the study's")
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(
            len(found), columns, squeeze=False, figsize=(0.6 * columns + 1.6, 0.8 * len(found))
        )
        for line, (name, surest) in zip(axes, found.items(), strict=True):
            labels = list(zip(surest["given"], surest["true"], strict=True))
            wrong = sum(given != true for given, true in labels)
            line[0].text(-0.15, 0.5, f"{name}\n{wrong} of {len(labels)} wrong", fontsize=7,
                         ha="right", va="center", transform=line[0].transAxes)  # fmt: skip
            for ax in line:
                ax.axis("off")
            for ax, image, (given, true) in zip(line, unpack_images(surest), labels, strict=False):
                _picture(ax, image, given, given == true)
    return fig


def unpack_images(surest: dict):
    """Return a result's pictures as an array, (n, height, width) or (n, height, width, 3)."""
    values = np.frombuffer(zlib.decompress(base64.b64decode(surest["pixels"])), np.uint8)
    images = values.reshape(-1, *surest["shape"])
    return images.transpose(0, 2, 3, 1) if images.ndim == 4 else images
