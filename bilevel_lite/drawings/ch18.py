"""Chapter 18: the drawing of the two directions, and the figures of its data."""

import numpy as np

from bilevel_lite import plotting
from bilevel_lite.drawings import SOFT, arrow, canvas, text
from bilevel_lite.plotting import COLORS, PALETTE

__all__ = ["directions", "drift", "landscapes", "learned", "noise_and_sharing", "study"]


def directions():
    """Six steps in three windows: what the way back stores, what the way there carries."""
    figure, ax = canvas(9.0, 2.9)
    xs = [0.9 + 1.15 * t for t in range(7)]
    for t, x in enumerate(xs):
        ax.plot(x, 1.45, "o", color="black", ms=6)
        text(ax, x, 1.13, rf"$\theta_{t},u_{t}$", fontsize=8)
        if t < 6:
            arrow(ax, (x + 0.12, 1.45), (xs[t + 1] - 0.12, 1.45))
            color = PALETTE[t // 2]
            ax.plot([x + 0.15, xs[t + 1] - 0.15], [1.75, 1.75], color=color, lw=4, alpha=0.5)
            if t % 2 == 0:
                text(ax, xs[t + 1], 1.98, rf"$\eta_{t // 2}$", color=color)
    text(ax, 8.45, 1.45, r"$f(\theta_6)$")
    arrow(ax, (xs[6] + 0.12, 1.45), (8.1, 1.45))
    arrow(ax, (xs[0], 2.4), (xs[6], 2.4), "forward: carries one column $(D, S)$ for each rate",
          color=COLORS["forward"])  # fmt: skip
    arrow(ax, (xs[6], 0.62), (xs[0], 0.62), color=COLORS["unrolled"])
    text(ax, xs[3], 0.3, r"reverse: carries $(w, \bar u)$, needs every $(\theta_t, u_t)$ back",
         color=COLORS["unrolled"])  # fmt: skip
    return figure


def noise_and_sharing(each, truth, windows, variance, bias):
    """Derivatives of each step's rate, shape (seeds, T), their mean over many; error by window."""
    figure, (left, right) = plotting.figure(2, height=2.7)
    t = np.arange(each.shape[1])
    for row in each[:3]:
        left.plot(t, row, ".", ms=2.5, color=SOFT)
    left.plot([], [], ".", ms=2.5, color=SOFT, label="three orders of batches")
    left.plot(t, truth, color=COLORS["exact"], label="mean of many orders")
    left.axhline(0, color="black", lw=0.5)
    top = 1.5 * np.quantile(np.abs(each), 0.98)
    left.set(xlabel="step $t$", ylabel=r"$d\Phi_T/d\eta_t$", ylim=(-top, top))
    left.legend(loc="upper left")
    right.plot(windows, variance + bias, "o-", color="black", label="both")
    right.plot(windows, variance, "s--", color=PALETTE[0], label="noise")
    right.plot(windows, np.where(bias > 0, bias, np.nan), "^:", color=PALETTE[1],
               label="sharing")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="steps that share a rate, $L$",
              ylabel="mean squared error")  # fmt: skip
    right.legend()
    return figure


def learned(schedules, courses, rivals, greedy):
    """Learned schedules of the learning rate, and what each way to choose rates costs.

    ``schedules`` has the last of each repeat, ``courses`` its losses after fresh trainings, one for
    each outer step; ``rivals`` maps names to such losses; ``greedy`` has runs of other starts, a
    rate for each step.
    """
    figure, (left, right) = plotting.figure(2, height=2.7)
    for k, values in enumerate(schedules):
        edges = np.linspace(0, len(greedy[0]), len(values) + 1)
        left.stairs(values, edges, color=COLORS["forward"], lw=1 + 0.6 * k,
                    label=None if k else "learned, three repeats")  # fmt: skip
    for k, rates in enumerate(greedy):
        left.plot(rates, color=COLORS["identity"], lw=1, ls=("-", "--")[k % 2],
                  label=None if k else "greedy, two starts")  # fmt: skip
    left.set(xlabel="step $t$", ylabel=r"learning rate $\eta_t$", ylim=(0, None))
    left.legend()
    for k, course in enumerate(courses):
        right.plot(range(1, len(course) + 1), course, color=COLORS["forward"], lw=1 + 0.6 * k,
                   label=None if k else "learned")  # fmt: skip
    for k, (name, value) in enumerate(rivals.items()):
        right.axhline(
            value, ls=("--", ":", "-.")[k % 3], color=PALETTE[(1, 2, 3)[k % 3]], label=name
        )
    right.set(xlabel="outer step", ylabel="validation loss after training")
    right.legend(fontsize=7)
    return figure


def study(courses, lowest, tested):
    """Ways to choose the rates of a training: what they chose, what that took, what it is worth.

    Of each way ``courses`` has learning rates, shape (seeds, points); ``lowest`` gradients and the
    lowest validation loss so far; ``tested`` a test loss for each fresh training.
    """
    figure, (left, middle, right) = plotting.figure(3, height=2.6)
    colors = {name: PALETTE[k % len(PALETTE)] for k, name in enumerate(courses)}
    for name, rates in courses.items():
        t = np.linspace(0, 1, rates.shape[1], endpoint=False)
        for k, row in enumerate(rates):
            left.plot(t, row, color=colors[name], lw=1, drawstyle="steps-post",
                      label=None if k else name)  # fmt: skip
        middle.plot(*lowest[name], "o-", ms=2.5, color=colors[name])
    left.set(xlabel="share of the training", ylabel=r"learning rate $\eta_t$", yscale="log",
             ylim=(2e-4, None))  # fmt: skip
    left.legend(fontsize=6)
    middle.set(xlabel="gradients", ylabel="lowest validation loss so far")
    for k, (name, losses) in enumerate(tested.items()):
        right.plot(losses, [k] * len(losses), "o", ms=3.5, color=colors[name])
    right.set(xlabel="test loss of fresh trainings")
    right.set_yticks(range(len(tested)), list(tested))
    right.invert_yaxis()
    return figure


def landscapes(functions, starts, span=(0.0, 4.2)):
    """Cuts of the two functions along the diagonal, with the box of starts."""
    figure, axes = plotting.figure(len(functions), height=2.3)
    line = np.linspace(*span, 600)
    for ax, (name, function) in zip(np.atleast_1d(axes), functions.items(), strict=True):
        ax.axvspan(*starts, color=SOFT, alpha=0.25, lw=0, label="starts")
        ax.plot(line, [function(x) for x in line], color="black", lw=1)
        ax.set(title=name, xlabel=r"$\lambda_1 = \lambda_2$", ylabel=r"$\Phi$")
        ax.legend(loc="upper right")
    return figure


def drift(windows, stored, again, error):
    """Mean loss by window: past estimates stored, past losses taken again; error at a fixed lam.

    Each of ``stored`` and ``again`` maps a drift to losses, one for each window.
    """
    figure, (left, middle, right) = plotting.figure(3, height=2.5)
    left.plot(windows, error["measured"], "o", color="black", label="measured")
    left.plot(windows, error["predicted"], color=COLORS["exact"], label="noise + lag")
    left.set(xscale="log", yscale="log", xlabel="window", ylabel="error at a fixed $\\lambda$")
    left.legend()
    for ax, title, rows in ((middle, "estimates stored", stored), (right, "losses again", again)):
        for k, (omega, values) in enumerate(rows.items()):
            ax.plot(windows, values, ("o-", "s--", "^:")[k], color=PALETTE[k],
                    label=rf"drift {omega:g}")  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="window", ylabel="loss, mean over time",
               title=title, ylim=(2e-3, 12))  # fmt: skip
        ax.legend(fontsize=6)
    return figure
