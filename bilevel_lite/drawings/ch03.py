"""The pictures of chapter 3: conjugate gradients in two dimensions, and solvers compared.

`conjugate_gradients` is the drawing; the others plot what the chapter's cells have computed.
"""

import numpy as np

from bilevel_lite.drawings import INK, PALETTE, SOFT, arrow, canvas, text
from bilevel_lite.plotting import COLORS, figure

__all__ = ["conjugate_gradients", "filters", "polynomials", "reached", "sweep"]

TURN = np.deg2rad(15)
BASIS = np.array([[np.cos(TURN), -np.sin(TURN)], [np.sin(TURN), np.cos(TURN)]])
H = BASIS @ np.diag([1.0, 7.0]) @ BASIS.T
END = np.array([2.35, 1.03])  # v = H^-1 b, in inches
START = END + BASIS @ np.array([-2.0, 2.0 / 7])  # v_0, where steepest descent is slowest


def path(conjugate: bool, steps: int) -> tuple[list, list]:
    """The points from START, and the residuals there, that each method visits on q."""
    v, r = START, H @ (END - START)
    p, points, residuals = r, [START], [r]
    for _ in range(steps):
        alpha = (r @ p) / (p @ H @ p)
        v, r_new = v + alpha * p, r - alpha * H @ p
        p = r_new + ((r_new @ r_new) / (r @ r) * p if conjugate else 0)
        r = r_new
        points.append(v)
        residuals.append(r)
    return points, residuals


def conjugate_gradients():
    """Contours of q: steepest descent goes back and forth, CG arrives in two steps.

    Returns:
        The figure.
    """
    drawn, axes = canvas(9.0, 2.4, columns=2)
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    heights = [(START - END) @ H @ (START - END) * share for share in (1.0, 0.5625, 0.2)]
    for ax in axes:
        for height in heights:
            ring = END[:, None] + BASIS @ np.diag([1.0, 7.0**-0.5]) @ circle * height**0.5
            ax.plot(*ring, color=SOFT, lw=0.7)
        ax.plot(*END, "o", color=INK, ms=4)
        ax.plot(*START, "o", color=INK, ms=4)
        text(ax, START[0] - 0.2, START[1] + 0.1, r"$v_0$")
        text(ax, END[0] + 0.36, END[1] + 0.02, r"$H^{-1}b$")
    points, _ = path(conjugate=False, steps=12)
    for start, end in zip(points, points[1:], strict=False):
        axes[0].plot(*zip(start, end, strict=True), color=PALETTE[1], lw=1.4)
        axes[0].plot(*end, ".", color=PALETTE[1], ms=4)
    text(axes[0], 2.25, 2.28, "steepest descent: always along the residual", color=PALETTE[1])

    points, residuals = path(conjugate=True, steps=2)
    arrow(axes[1], points[0], points[1], color=PALETTE[0])
    arrow(axes[1], points[1], points[2], color=PALETTE[0])
    tip = points[1] + 0.75 * residuals[1] / np.linalg.norm(residuals[1])
    axes[1].annotate(
        "", tip, points[1], arrowprops={"arrowstyle": "->", "color": PALETTE[1], "ls": "--"}
    )
    middle = (points[0] + points[1]) / 2
    text(axes[1], middle[0] - 0.22, middle[1] - 0.22, r"$p_0 = r_0$", color=PALETTE[0])
    middle = (points[1] + points[2]) / 2
    text(axes[1], middle[0] + 0.1, middle[1] - 0.2, r"$p_1$", color=PALETTE[0])
    text(axes[1], tip[0] + 0.18, tip[1], r"$r_1$", color=PALETTE[1])
    text(
        axes[1], 2.25, 2.28, "CG: the second direction is conjugate to the first", color=PALETTE[0]
    )
    return drawn


KINDS = {
    "identity": (COLORS["identity"], "s"),
    "Neumann": (COLORS["neumann"], "^"),
    "CG": (COLORS["cg"], "o"),
    "CGNormal": (PALETTE[5], "v"),
    "CG-100": (INK, "D"),
}


def style(name: str) -> dict:
    """A solver's colour and marker, the same in all figures of the chapter."""
    color, marker = KINDS.get(name) or KINDS[name.split("-")[0]]
    return {"color": color, "marker": marker, "markersize": 3}


def polynomials(spectra: dict, zeros: dict):
    """What CG and the Neumann series leave of the error along each eigenvalue.

    Args:
        spectra: Name -> eigenvalues, a tensor.
        zeros: Name -> zeros of CG's polynomial, a tensor.

    Returns:
        The figure.
    """
    drawn, axes = figure(2, height=2.3, sharey=True)
    grid = np.logspace(-2.3, 0.03, 2000)
    for ax, (name, mu) in zip(axes, spectra.items(), strict=True):
        steps, mu = len(zeros[name]), mu.cpu().numpy()
        of_cg = np.abs(np.prod(1 - grid[:, None] / zeros[name].cpu().numpy(), axis=1))
        ax.semilogx(grid, of_cg, color=COLORS["cg"], label=f"CG, {steps} products")
        of_neumann = np.abs(1 - grid / mu.max()) ** (steps + 1)
        label = f"Neumann, {steps} products"
        ax.plot(grid, of_neumann, "--", color=COLORS["neumann"], label=label)
        ax.plot(mu, 0 * mu - 0.07, "|", color=INK, label="eigenvalues")
        ax.set(title=name, xlabel=r"eigenvalue $\mu$", ylim=(-0.15, 2.2))
        if of_cg[grid < mu.max()].max() > 2.2:
            ax.text(grid[of_cg.argmax()], 2.05, "goes on above", ha="center", fontsize=8)
    axes[0].set_ylabel(r"factor on the error, $|P(\mu)|$")
    axes[0].legend(loc="upper left")
    return drawn


def sweep(kappas: list, curves: dict):
    """Error and cosine of each solver over the condition number.

    Args:
        kappas: Condition numbers.
        curves: (solver, products) -> a pair (error, cosine) for each condition number.

    Returns:
        The figure.
    """
    drawn, axes = figure(2, height=2.3)
    for (name, products), pairs in curves.items():
        line, label = ("--", None) if products == 3 else ("-", name)
        for ax, curve in zip(axes, zip(*pairs, strict=True), strict=True):
            ax.semilogx(kappas, curve, line, markevery=3, label=label, **style(name))
    axes[0].set(title="3 products (dashed), 10 products (solid)", ylabel="relative error of $v$")
    axes[1].set(title="direction", ylabel="cosine to the exact $v$")
    for ax in axes:
        ax.set(xlabel=r"condition number $\kappa$", ylim=(-0.03, 1.03))
    axes[0].legend(loc="lower right")
    return drawn


def reached(mu, reach, floor: float, budgets: list, curves: dict):
    """The spectrum of H, what J sees of it, and the errors of v and of the hypergradient.

    Args:
        mu: Eigenvalues in ascending order, shape (d,).
        reach: ``|J u|`` for the eigenvector of each, shape (d,).
        floor: What the penalty adds to each eigenvalue.
        budgets: Numbers of products.
        curves: Solver -> {"h": error, "v": error} for each of the last budgets.

    Returns:
        The figure.
    """
    drawn, axes = figure(3, height=2.4)
    axes[0].semilogy(mu.flip(0).cpu(), color=INK)
    axes[0].axhline(floor, color=INK, linestyle=":", linewidth=0.8)
    axes[0].set(title=r"spectrum of $H$, dotted: $2\rho$", xlabel="index")
    axes[0].set_ylabel(r"eigenvalue $\mu$")
    axes[1].loglog(mu.cpu(), reach.cpu(), ".", color=INK, markersize=3)
    axes[1].set(title=r"what $J$ sees of it", xlabel=r"eigenvalue $\mu$", ylim=(1e-5, 0.1))
    axes[1].set_ylabel(r"$\Vert J u\Vert$ for its eigenvector $u$")
    for name, curve in curves.items():
        used = budgets[len(budgets) - len(curve) :]
        axes[2].semilogy(used, [got["h"] for got in curve], label=name, **style(name))
        axes[2].semilogy(used, [got["v"] for got in curve], "--", **style(name))
    axes[2].set(title="hypergradient (solid), $v$ (dashed)", xlabel="products with $H$")
    axes[2].set(ylabel="relative error", ylim=(3e-3, 1.5))
    axes[2].legend(loc="lower right")
    return drawn


def filters(dampings: list, exactly: dict, noisy: dict):
    """Errors of the hypergradient over the damping, with the exact H and with a noisy one.

    Args:
        dampings: Values of the damping.
        exactly: Solver -> an error for each damping, with the exact H.
        noisy: The same with the H of a small batch.

    Returns:
        The figure.
    """
    drawn, axes = figure(2, height=2.4, sharey=True)
    for ax, errors in zip(axes, (exactly, noisy), strict=True):
        for name, curve in errors.items():
            ax.semilogx(dampings, curve, label=name, **style(name))
        ax.set_xlabel(r"damping $\delta$")
    axes[0].set(title="$H$ exact", ylabel="relative error of the hypergradient", ylim=(0, 1.3))
    axes[1].set(title="$H$ from 64 of 1000 examples")
    axes[0].legend(loc="center left")
    return drawn
