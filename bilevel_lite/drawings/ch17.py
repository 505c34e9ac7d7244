"""Chapter 17: the drawing of what is taken where, and the figures of its data."""

from bilevel_lite import plotting
from bilevel_lite.drawings import arrow, canvas, text
from bilevel_lite.plotting import PALETTE

BLUE, ORANGE, GREEN, GREY = PALETTE[0], PALETTE[1], PALETTE[2], "0.45"


def taken_where():
    """Three rows, one a method: at which theta are H and b taken, and where is J v."""
    figure, ax = canvas(9.0, 3.0)
    places = {"old": 2.9, "new": 5.2, "star": 6.1}
    for name, words in (("old", r"old $\theta$"), ("new", r"$\theta_+$"), ("star", r"$\theta^*$")):
        x = places[name]
        ax.plot([x, x], [0.25, 2.45], ":" if name == "star" else "-", color="0.8", lw=1)
        text(ax, x, 2.65, words)
    arrow(ax, (places["old"], 2.35), (places["new"], 2.35), "Newton", color=GREY, up=0.12)
    for y, name, marks, end, color in (
        (1.85, "NBO (17.2)", (("H, b", "old"), ("J", "new")), "error of $h$: order $e$", ORANGE),
        (1.15, "moved (17.4)", (("solve: H", "old"), ("residual: H, b;  J", "new")),
         "order $e^2$", BLUE),
        (0.45, "second Hessian", (("", "old"), ("solve: H, b;  J", "new")),
         "order $e^2$, one factorisation more", GREEN),
    ):  # fmt: skip
        text(ax, 0.2, y, name, color=color, ha="left")
        ax.plot([places["old"], places["new"]], [y, y], color=color, lw=1)
        for words, place in marks:
            x = places[place]
            ax.plot([x], [y], "o" if words else "|", color=color)
            words = words.replace("H", "$H$").replace("b;", "$b$;").replace("J", "$J$")
            words = words.replace(", b", ", $b$")
            text(ax, x, y - 0.22, words, color=color, fontsize=8)
        text(ax, 6.4, y, end, color=color, ha="left")
    return figure


def slopes(curves):
    """Errors after one step against the distance before it; ``curves`` by name, lists."""
    figure, (left, right) = plotting.figure(2, height=2.7)
    before = curves["before"]
    for ax, name, mark, color, label in (
        (left, "gradient", "s--", GREY, "one gradient step"),
        (left, "newton", "o-", BLUE, "one Newton step"),
        (right, "old", "s--", GREY, r"old $\theta$, $v$ solved there"),
        (right, "nbo", "^-", ORANGE, "NBO (17.2)"),
        (right, "moved", "o-", BLUE, "residual moved (17.4)"),
        (right, "again", "x:", GREEN, "second Hessian"),
    ):
        ax.loglog(before, curves[name], mark, color=color, label=label)
    left.set(ylabel=r"$\Vert\theta_+-\theta^*\Vert$ after", title=r"$\theta$")
    right.set(ylabel="relative error after", title="hypergradient")
    for ax in (left, right):
        ax.set_xlabel(r"distance $e=\Vert\theta-\theta^*\Vert$ before the step")
        ax.legend(loc="lower right", fontsize=7)
    return figure


def three_matrices(separations, result):
    """Cosine and length of J v for three matrices, against the separation of the weights."""
    figure, axes = plotting.figure(2, height=2.6)
    for ax, k, title in zip(axes, (0, 1), ("cosine with the exact $h$", "length over the exact "
                            "one"), strict=True):  # fmt: skip
        for (name, values), mark, color in zip(
            result.items(), ("o-", "s--", "^:"), (GREEN, PALETTE[4], PALETTE[3]), strict=True
        ):
            ax.plot(separations, [value[k] for value in values], mark, color=color, label=name)
        ax.set(xlabel="separation $s$ of the weights", title=title, ylim=(0, (1.05, 9)[k]))
    axes[0].legend(loc="lower left")
    return figure


def memory(ratios, law, measured, growth):
    """The excess of the inverse against d (1 - beta), and a direction that is never seen."""
    figure, (left, right) = plotting.figure(2, height=2.6)
    left.plot(ratios, law, color="black", label=r"$(e^\nu-1)/\nu$")
    left.plot(ratios, measured, "o", color=PALETTE[3], label="measured, $d = 50$")
    left.set(xlabel=r"$\nu = d\,(1-\beta)$", ylabel=r"inverse over $F^{-1}$",
             title="a short memory")  # fmt: skip
    for (beta, values), style, color in zip(
        growth.items(), ("-", "--", ":"), (ORANGE, PALETTE[4], BLUE), strict=True
    ):
        steps = range(1, len(values) + 1)
        right.semilogy(steps, values, style, color=color, label=rf"$\beta = {beta}$")
    right.set(xlabel="updates", ylabel="entry of the inverse", ylim=(0.5, 1e12),
              title="a direction that no $q$ has")  # fmt: skip
    left.legend()
    right.legend()
    return figure
