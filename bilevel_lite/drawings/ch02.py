"""The drawing of chapter 2: three steps of descent, differentiated forwards and backwards."""

from bilevel_lite.drawings import PALETTE, SOFT, arrow, box, canvas, text

__all__ = ["unrolled"]


def unrolled():
    """The unrolled graph: lambda enters each step; D_t goes along with it, w_t comes back."""
    figure, ax = canvas(9.0, 3.5)
    forth, back = PALETTE[0], PALETTE[1]
    at = [1.3, 3.3, 5.3, 7.3]  # theta_0 to theta_3; then f
    last, chain, bar = 8.6, 1.7, 0.35

    for t, x in enumerate(at):
        box(ax, x, chain, rf"$\theta_{t}$", width=0.6, height=0.46, color=7)
    box(ax, last, chain, "$f$", width=0.46, height=0.46, color=7)
    for start, end in zip(at, at[1:] + [last], strict=True):
        arrow(ax, (start + 0.31, chain), (end - (0.31 if end < last else 0.24), chain))
    for x in (2.3, 4.3, 6.3):
        text(ax, x, chain + 0.14, r"$-\eta\nabla_\theta g$", color=SOFT)

    box(ax, 5.95, bar, r"$\lambda$", width=5.86, height=0.4, color=7)
    for x in [*at[1:], last]:
        arrow(ax, (x, bar + 0.21), (x, chain - 0.24))
    for t, x in enumerate(at[1:]):
        text(ax, x - 0.07, 1.0, rf"$-\eta J_{t}w_{t + 1}$", color=back, ha="right")
    text(ax, last - 0.07, 1.0, r"$\nabla_\lambda f$", color=back, ha="right")

    rows = ((2.5, forth, "D", "forward:"), (3.15, back, "w", "reverse:"))
    for y, color, letter, name in rows:
        text(ax, 0.45, y, name, color=color)
        for t, x in enumerate(at):
            words = f"${letter}_{t}$"
            words = {"$D_0$": "$D_0=0$", "$w_0$": "", "$w_3$": "$w_3=b$"}.get(words, words)
            text(ax, x, y, words, color=color)
    for start, end in zip(at, at[1:], strict=False):
        arrow(ax, (start + 0.38, rows[0][0]), (end - 0.28, rows[0][0]), color=forth)
    for start, end in zip(at[1:], at[2:], strict=False):
        arrow(ax, (end - 0.4, rows[1][0]), (start + 0.28, rows[1][0]), color=back)
    arrow(ax, (7.6, rows[0][0]), (8.2, rows[0][0]), color=forth)
    text(ax, last, rows[0][0], r"$D_3^\top b$", color=forth)
    arrow(ax, (8.45, rows[1][0]), (7.72, rows[1][0]), color=back)
    return figure
