r"""Ways to choose the rates of a training: learned by forward mode, searched for, or greedily.

Every way chooses lam from the same box, in which 0 and 1 are the ends and the scale is that of
logarithms: of the rate, of the weight decay, of 1 - momentum. An outer iteration is one forward
derivative of a whole training, or as many plain trainings as its gradients pay for: so after any
number of outer iterations all ways have cost the same.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import StepInfo
from bilevel_lite.algorithms.resume import Resumable
from bilevel_lite.experiment.supervised import evaluate
from bilevel_lite.recorded import Recordings
from bilevel_lite.refuse import NotFinite
from bilevel_lite.schedules import SignSteps, forward_schedule
from bilevel_lite.tasks.greedy import HypergradientDescent, Preconditioned
from bilevel_lite.updates import SGD, Update, window

__all__ = [
    "BOX", "META", "WAYS", "Learned", "Searched", "Way", "cost", "names", "update",
    "values",
]  # fmt: skip

WAYS = ("learned", "free", "constant", "cosine", "steps", "greedy", "fop")
WINDOWED = ("learned", "free")
BOX = {"lr": (0.003, 0.3), "momentum": (0.0, 0.98), "weight_decay": (1e-5, 1e-2)}
META = {"greedy": (1e-7, 1e-3), "fop": (1e-3, 1.0)}  # the greedy rules' own step


def names(way: str, windows: int) -> list[str]:
    """What the entries of lam are, in order."""
    rates = [f"lr_{k + 1}" for k in range(windows)] if way in WINDOWED else ["lr"]
    return [*rates, "momentum", "weight_decay", *(["meta"] if way in META else [])]


def values(way: str, windows: int, lam: Tensor) -> dict[str, Tensor]:
    """The rates by name, for entries of lam from 0 to 1; all grow with them.

    Example:
        >>> from bilevel_lite.tasks.schedules_ways import values
        >>> rates = values("constant", 3, torch.tensor([0.5, 1.0, 0.0]))
        >>> {name: round(float(rate), 5) for name, rate in rates.items()}
        {'lr': 0.03, 'momentum': 0.98, 'weight_decay': 1e-05}
    """
    out = {}
    for name, u in zip(names(way, windows), lam, strict=True):
        key = "lr" if name.startswith("lr_") else name
        low, high = META[way] if key == "meta" else BOX[key]
        if key == "momentum":
            low, high = 1 - low, 1 - high
        out[name] = low * (high / low) ** u
        if key == "momentum":
            out[name] = 1 - out[name]
    return out


def update(
    way: str, windows: int, lam: Tensor, steps: int, shapes: tuple[tuple[int, ...], ...]
) -> Update:
    """The steps of a training with the rates lam.

    The cosine falls from the rate to 0, the steps are a tenth of it from 0.8 T on and a hundredth
    from 0.9 T on, as in `bilevel_lite.experiment.methods.inner_scheduler`.

    Args:
        way: One of `WAYS`.
        windows: Of the learning rate, where it has some.
        lam: Shape (n,), from 0 to 1, as `names` has them.
        steps: T.
        shapes: Of the parameters.
    """
    rates = {name: float(v) for name, v in values(way, windows, lam).items()}
    fixed = {name: rates.pop(name) for name in ("momentum", "weight_decay")}
    if way == "greedy":
        return HypergradientDescent(**rates, **fixed)
    if way == "fop":
        return Preconditioned(**rates, **fixed, shapes=shapes)
    t = torch.arange(steps, dtype=torch.float64)
    course = {
        "cosine": (1 + torch.cos(torch.pi * t / steps)) / 2,
        "steps": 0.1 ** ((t >= 0.8 * steps).double() + (t >= 0.9 * steps).double()),
    }.get(way, torch.ones(1))
    course = [share * rate for rate in rates.values() for share in course.tolist()]
    return SGD(lr=lambda lam, t: course[window(t, steps, len(course))], **fixed)


def cost(windows: int, steps: int) -> int:
    """Gradients of a forward derivative of a training in its windows, a momentum and a decay.

    Two for each step and each column that has begun, one for a first step without any, one for f. A
    window's column begins after its first step, the decay's after step 0, the momentum's after step
    1, since u_0 = 0.
    """
    begun = [-(-k * steps // windows) for k in range(windows)]
    return 2 * sum(steps - 1 - first for first in [*begun, 0, 1]) + 2


class Way(Resumable):
    """What a run asks of a method: lam and theta are those of a whole training.

    Attributes:
        lam: The rates of the training that is reported, from 0 to 1.
        theta: Where it ended.
        iteration: Outer iterations done.
        gradients: Spent.
    """

    def __init__(self, task: Any, s: Any):
        self.task, self.s, self.recorded = task, s, Recordings()
        self.lam, self.theta = task.lam0.clone(), task.theta0.clone()
        self.iteration, self.gradients, self.trained = 0, 0.0, 0

    def step(self) -> StepInfo:
        """One outer iteration."""
        inner_loss, outer_loss, h = self._iterate()
        self.iteration += 1
        return StepInfo(self.iteration, inner_loss, outer_loss, h, None, self.gradients)

    def _iterate(self) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class Searched(Way):
    """The middle of the box, then random rates; lam and theta are of the lowest validation loss.

    A training that would cost more than is left of as many forward derivatives is not begun; one
    that diverges is lost and counts as a whole one.
    """

    def __init__(self, task: Any, s: Any):
        super().__init__(task, s)
        self.lowest = float("inf")
        self.generator = torch.Generator().manual_seed(1_000_003 * 9 + s.seed)

    def _values(self) -> tuple[str, ...]:
        return "gradients", "trained", "lowest"

    def _parts(self) -> dict[str, Any]:
        return {"generator": self.generator}

    def _iterate(self) -> tuple[Tensor, Tensor, Tensor]:
        allowed = (self.iteration + 1) * cost(self.s.windows, self.s.inner_steps)
        last = torch.tensor(float("nan"))
        while self.gradients + self.s.inner_steps <= allowed:
            lam = torch.rand(len(self.lam), generator=self.generator).to(self.lam)
            lam = lam if self.trained else torch.full_like(lam, 0.5)
            with suppress(NotFinite):
                theta, last, _ = self.task.training(self.s, lam, self.trained)
                found = evaluate(self.task.model, theta, self.task.tuning)["loss"]
                if found < self.lowest:
                    self.lowest, self.lam, self.theta = found, lam, theta
            self.gradients += self.s.inner_steps
            self.trained += 1
        return last, torch.tensor(self.lowest), torch.zeros_like(self.lam)


class Learned(Way):
    """Signs of the forward derivative move lam from one place in the box; see `SignSteps`."""

    def __init__(self, task: Any, s: Any):
        super().__init__(task, s)
        self.outer = SignSteps({"lam": self.lam}, {"lam": s.outer_lr}, {"lam": (0.0, 1.0)})

    def _values(self) -> tuple[str, ...]:
        return "gradients", "trained"

    def _parts(self) -> dict[str, Any]:
        return {"outer": self.outer}

    def _iterate(self) -> tuple[Tensor, Tensor, Tensor]:
        s, lam, task = self.s, self.outer.values["lam"], self.task
        *rates, momentum, decay = values("learned", s.windows, lam).values()
        theta0, batches = task.begin(s, self.trained)
        slopes, info = forward_schedule(
            task.plain, theta0, s.inner_steps, torch.stack(rates), momentum[None], decay[None],
            inner_batch=batches, outer_batch=task.validation,
        )  # fmt: skip
        h = torch.cat(list(slopes.values()))  # each rate grows with its entry: the signs are lam's
        self.outer.step({"lam": h})
        self.lam, self.theta = lam, info.theta
        self.gradients += info.gradients
        self.trained += 1
        inner_loss = task.plain.inner_loss(lam, info.theta, batches.draw())
        return inner_loss.detach(), info.outer_loss, h
