"""What chapter 9b hangs its wrong hypergradients on: data, two more models, and a judge of each.

The slips themselves are written in the chapter. `tests/test_gallery.py` runs it, and has `check`
judge all of them.
"""

from collections.abc import Callable
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel_lite.checking import CheckReport, check
from bilevel_lite.hypergrad import hypergradient
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import cross_vp, gradient, hessian

__all__ = ["Gallery", "apart", "hidden", "network", "newton", "noisy_labels", "normalise", "texts"]


def apart(one: Tensor, other: Tensor) -> float:
    """||one - other|| / ||other||."""
    return float((one - other).detach().norm() / other.detach().norm())


def noisy_labels(n: int = 60, rate: float = 0.3, seed: int = 9) -> SimpleNamespace:
    """Two classes, eleven features of unequal scale, and a share of flipped training labels.

    Returns:
        features, y_clean, flipped, y for training; features_val, y_val; x and x_val are the
        features with a column of ones; index counts the training examples. All in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    double = torch.float64

    def examples():
        size = torch.logspace(0.7, 0.1, 11, dtype=double)
        features = torch.randn(n, 11, generator=generator, dtype=double) * size
        features[:, 0] += 1.0
        noise = 0.5 * torch.randn(n, generator=generator, dtype=double)
        return features, ((features / size).sum(1) + noise > 0).double()

    made = SimpleNamespace(index=torch.arange(n))
    made.features, made.y_clean = examples()
    made.flipped = torch.rand(n, generator=generator, dtype=double) < rate
    made.y = torch.where(made.flipped, 1 - made.y_clean, made.y_clean)
    made.features_val, made.y_val = examples()
    one = torch.ones(n, 1, dtype=double)
    made.x, made.x_val = (torch.cat([f, one], 1) for f in (made.features, made.features_val))
    return made


class Gallery:
    """Wrong hypergradients by name, each with the case in which it is judged.

    Attributes:
        h: name -> function (lam, theta, repaired=False) -> hypergradient.
        case: name -> the name of its case.
        cases: name -> arguments of `check`: problem, lam, theta, inner_batch, outer_batch,
            solve_inner and more. The case "filter" is the one that solvers of H v = b are
            completed on.
    """

    def __init__(self, **filter_case):
        self.h: dict[str, Callable[..., Tensor]] = {}
        self.case: dict[str, str] = {}
        self.cases = {"filter": filter_case}

    def add(self, name: str, like: str = "filter", **changes) -> None:
        """A further case: that of ``like`` with some arguments changed."""
        self.cases[name] = self.cases[like] | changes

    def slip(self, name: str, case: str = "filter", of_v: bool = False):
        """Decorator: hang up a function (lam, theta, repaired=False) -> hypergradient.

        With ``of_v`` it is one (H, b, repaired=False) -> v, H being the product with the Hessian,
        and h = grad_lam f - J v is completed around it.
        """

        def keep(function):
            self.h[name] = self._with_v(function) if of_v else function
            self.case[name] = case
            return function

        return keep

    def _with_v(self, solve):
        case = self.cases["filter"]
        problem, inner, outer = case["problem"], case["inner_batch"], case["outer_batch"]

        def h(lam, theta, **options):
            _, direct, b = gradient(problem.outer_loss, lam, theta, outer)
            v = solve(hessian(problem.inner_loss, lam, theta, inner).mv, b, **options)
            return direct - cross_vp(problem.inner_loss, lam, theta, inner, v)

        return h

    def judge(self, name: str, **options) -> CheckReport:
        """What `check` says of it; ``repaired=True`` judges the repaired one."""
        return check(
            **self.cases[self.case[name]], rtol=1e-6, verbose=False,
            hypergradient=lambda lam, theta: self.h[name](lam, theta, **options),
        )  # fmt: skip

    def panels(self, *names: str):
        """Print the fingerprint of each, and plot its entries over those of the exact one."""
        side = 9 / max(len(names), 4.5)
        figure, axes = plt.subplots(1, len(names), figsize=(side * len(names), side + 0.2))
        print(f"{'':<28}error  cosine   length    direct  implicit     rest")
        for ax, name in zip(axes, names, strict=True):
            case = self.cases[self.case[name]]
            at = [case[part] for part in ("problem", "lam", "theta", "inner_batch", "outer_batch")]
            truth = hypergradient(*at)
            h = self.h[name](case["lam"].clone(), case["theta"].clone())
            found = check(**case, hypergradient=h, verbose=False)
            direct, implicit, rest = found.shares.values()
            shown = found.relative_error_exact, found.length, direct, implicit, rest
            error, length, *made = (
                value if value and abs(value) > 1e-6 else 0.0 for value in shown
            )
            print(f"{name:<24}{error:9.2g}{found.cosine_exact or 0.0:8.3f}{length:9.2g}", end="")
            print("{:10.2g}{:10.2g}{:9.1g}".format(*made))
            ax.axline((0, 0), slope=1, lw=0.8, color="0.7")
            ax.plot(truth, h, ".", ms=3)
            ax.set(xticks=[], yticks=[])
            ax.set_title("\n".join(name.rsplit(" ", 1)), fontsize=7.5)
        return figure


def normalise(a: Tensor, stats: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Columns less their mean, over their standard deviation; of the batch, or as given."""
    mean, var = stats or (a.mean(0), a.var(0, unbiased=False))
    return (a - mean) / (var + 0.1).sqrt()


def hidden(theta: Tensor, x: Tensor) -> Tensor:
    """Two hidden units of x, shape (n, 12): theta's first 24 entries are their weights."""
    return (x @ theta[:24].view(12, 2) / 3).tanh()


def network(normalise: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """(theta, x) -> outputs of a network with two normalised hidden units; theta has 27 entries."""

    def outputs(theta, x):
        return normalise(hidden(theta, x)) @ theta[24:26] + theta[26]

    return outputs


def newton(problem: BilevelProblem, lam, theta, batch, steps: int) -> Tensor:
    """Newton's method on the inner loss, damped by the slope and until H is positive definite."""
    for _ in range(steps):
        H = hessian(problem.inner_loss, lam, theta, batch)
        slope = gradient(problem.inner_loss, lam, theta, batch)[2]
        damping = slope.norm() + 1.5 * (-torch.linalg.eigvalsh(H)[0]).clamp(min=0)
        theta = theta - torch.linalg.solve(H + damping * torch.eye(len(theta)).to(H), slope)
    return theta


def texts(l2: float, price: float, n: int = 30, seed: int = 3) -> dict:
    """A case: tokens of two classes, in texts of one to six tokens with padding, at the start.

    g = mean over tokens of sigmoid(lam_i) l + l2 ||theta||^2. A row of padding is all ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def batch():
        mask = torch.arange(6) < torch.randint(1, 7, (n, 1), generator=generator)
        a = torch.randn(n, 6, 5, generator=generator, dtype=torch.float64)
        noise = torch.randn(n, 6, generator=generator, dtype=torch.float64)
        labels = (a.sum(2) + noise > 0).double()
        return torch.where(mask[..., None], a, 1.0), labels, mask

    def losses(theta, a, y):
        return F.softplus(a @ theta) - y * (a @ theta)

    def inner_loss(lam, theta, batch):
        a, y, mask = batch
        each = lam.sigmoid()[:, None] * losses(theta, a, y)
        return each[mask].mean() + l2 * theta.square().sum()

    def outer_loss(lam, theta, batch):
        a, y, mask = batch
        return losses(theta, a, y)[mask].mean() + price * lam.sigmoid().mean()

    double = torch.float64
    return {
        "problem": BilevelProblem(inner_loss, outer_loss), "lam": torch.zeros(n, dtype=double),
        "theta": torch.zeros(5, dtype=double), "inner_batch": batch(), "outer_batch": batch(),
        "solve_inner": None,
    }  # fmt: skip
