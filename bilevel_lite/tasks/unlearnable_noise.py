"""Noise that makes images unlearnable: its loss, its box, who makes it, who reads it.

The equations are those of `bilevel_lite.tasks.unlearnable`, which puts them to work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_lite.algorithms.aid import AID
from bilevel_lite.algorithms.method import StepInfo
from bilevel_lite.experiment import methods
from bilevel_lite.experiment.supervised import evaluate
from bilevel_lite.hypergrad import HypergradientInfo
from bilevel_lite.params import flatten
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.solvers import SolveInfo

__all__ = [
    "RADII", "VICTIMS", "ErrorMinimising", "Rows", "UNet", "limits", "probe", "worst_wrong",
]  # fmt: skip

RADII = (8, 25)  # of the study, in 255ths: the usual one, and the main paper's
VICTIMS = ("none", "augment", "jpeg")  # what a victim does to its images


def worst_wrong(logits: Tensor, y: Tensor) -> Tensor:
    r"""Mean of max_{c != y} -log p_c = logsumexp(z) - min_{c != y} z_c; shape ().

    The loss of the wrong label that the model believes in least. The C - 1 wrong labels share at
    most probability 1, so that one of them has at most 1 / (C - 1), and the value is log(C - 1) or
    more. It is approached as p_y goes to 0 with all wrong labels as likely.
    """
    others = logits.scatter(1, y[:, None], torch.inf)
    return (logits.logsumexp(1) - others.amin(1)).mean()


def limits(x: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest lam, in units of the radius r, with |lam| <= 1 and 0 <= x + r lam <= 1.

    A box for each pixel: so ``lam.clamp(low, high)`` is the projection, and no pixel need be
    clamped inside g, where the derivative would be lost.
    """
    return (-x / radius).clamp(min=-1), ((1 - x) / radius).clamp(max=1)


def stage(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each with a norm of one example and ReLU."""
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, 1, 1), nn.GroupNorm(1, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    r"""Noise from an image: a U-Net's outputs u, then  low + (high - low) (1 + tanh u) / 2.

    So pixels stay in range and within the radius for any weights, see `limits`. Its norms are those
    of one image (GroupNorm). BatchNorm would make an image's noise depend on who shares its batch
    during the attack, and on running means in the export: two different generators.

    Args:
        shape: (channels, height, width) of an image.
        width: Channels of the first stage; each of up to three halvings of the image doubles them.
        radius: r.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, radius: float):
        super().__init__()
        channels, *size = shape
        depth = next(k for k in (3, 2, 1, 0) if not any(n % 2**k for n in size))
        widths = [width * 2**k for k in range(depth + 1)]
        self.radius = radius
        self.down = nn.ModuleList(map(stage, [channels, *widths[:-1]], widths))
        self.up = nn.ModuleList(stage(3 * wide, wide) for wide in widths[-2::-1])
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return lam, shape (n, C, H, W), in units of the radius, for images of that shape."""
        h, kept = x, []
        for k, down in enumerate(self.down):
            h = down(F.avg_pool2d(h, 2) if k else h)
            kept.append(h)
        for up, skip in zip(self.up, kept[-2::-1], strict=True):
            wide = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
            h = up(torch.cat([wide, skip], 1))
        low, high = limits(x, self.radius)
        return low + (high - low) * (1 + torch.tanh(self.last(h))) / 2


class ErrorMinimising(AID):
    """AID with f = g: grad_theta f = 0 where g is solved, so that grad_lam g is all there is.

    Cost of a step: inner_steps + 1 gradients; no solver, and no second derivative.
    """

    def _hypergradient(self, outer, curvature, cross, theta=None, lam=None, **how):
        g = self._g(cross, theta, lam)
        nothing = SolveInfo(torch.zeros_like(g.theta), iterations=0, products=0)
        return g.lam, HypergradientInfo(
            g.value, g.lam, torch.zeros_like(g.lam), None, g.theta, nothing, 1.0
        )


class Rows:
    """A method for lam with a row an image: each step holds the rows of its batch, and no others.

    Inner steps go over all images with the noise of now. Then one batch is drawn; its clean images
    are f's, its rows of lam the outer variable, and itself the batch of H and of J.

    Args:
        task: The task.
        s: Its settings.
        recipe: Of the method, see `bilevel_lite.experiment.methods`.

    Attributes:
        lam: All rows, shape (n, ...), in units of the radius.
        method: What makes the step, with lam of shape (batch, ...).
    """

    group = None  # one process has all rows

    def __init__(self, task: Any, s: Any, recipe: Any):
        self.task, self.lam = task, torch.zeros_like(task.train[0])
        self.sampler = task._sampler(s, s.cross_batch_size, 2, task.train)
        self.inner = task._sampler(s, s.batch_size, 0, task.train)
        self.problem, self.theta0, self.attach = task.problem, task.theta0, task.attach
        self.lam0 = self.lam[: self.sampler.batch_size]
        self.method = methods.build(s, self, recipe)

    # what the method asks of a task

    def batches(self, s: Any) -> dict[str, Any]:
        """Noisy images for the inner steps, the batch of this step for all else."""
        here, noisy = _Draws(lambda: self.current), _Draws(self._noisy)
        inner = here if s.method == "bome" and s.attack == "bilevel" else noisy
        return {"inner_batch": inner, **dict.fromkeys(
            ("outer_batch", "curvature_batch", "cross_batch"), here)}  # fmt: skip

    def _noisy(self) -> tuple[Tensor, Tensor]:
        x, y, index = self.inner.draw()
        return x + self.task.radius * self.lam.index_select(0, index), y

    def project(self, lam: Tensor) -> Tensor:
        """The rows of this step's batch within the radius, and their pixels in range."""
        return lam.clamp(*limits(self.current[0], self.task.radius))

    # what a run asks of a method

    def step(self) -> StepInfo:
        """One outer iteration of the method, on the rows of one batch."""
        x, y, index = self.sampler.draw()
        self.current = x, y, torch.arange(len(y), device=y.device)
        self.method.lam.copy_(self.lam[index])
        info = self.method.step()
        self.lam[index] = self.method.lam
        return info

    def __getattr__(self, name: str) -> Any:
        if name in ("theta", "iteration", "gradients", "recorded"):
            return getattr(self.method, name)
        raise AttributeError(name)

    def state_dict(self) -> dict:
        """All rows, the method's state and the places of the samplers, as copies."""
        parts = {name: getattr(self, name).state_dict() for name in ("method", "sampler", "inner")}
        return {"lam": self.lam.clone(), **parts}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned."""
        self.lam.copy_(state["lam"])
        for name in ("method", "sampler", "inner"):
            getattr(self, name).load_state_dict(state[name])


@dataclass
class _Draws:
    draw: Callable[[], tuple]


def probe(noise: Tensor, y: Tensor, l2: float = 1e-3, iters: int = 100) -> float:
    """Accuracy of a linear model of the noise alone, fitted to half of it, on the other half.

    Near 1 / C: the noise says nothing of the label that a linear model could read. Near 1: who
    learns the noise need not look at the image. Source: Yu et al. (2022), arXiv 2111.00898.

    Args:
        noise: A row an image, any scale; the first half is fitted.
        y: Labels, shape (n,).
        l2: Coefficient of ||theta||^2, at noise of mean square 1 an image.
        iters: Of L-BFGS.
    """
    flat = noise.flatten(1)
    flat = flat / flat.square().sum(1).mean().sqrt().clamp(min=torch.finfo(flat.dtype).tiny)
    half, model = len(y) // 2, nn.Linear(flat.shape[1], int(y.max()) + 1).to(flat)
    risk, theta = WeightedRisk(model, l2=l2), torch.zeros_like(flatten(model)).requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=iters, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = risk(theta, theta, (flat[:half], y[:half]))
        value.backward()
        return value

    optimizer.step(closure)
    return evaluate(model, theta.detach(), (flat[half:], y[half:]))["accuracy"]
