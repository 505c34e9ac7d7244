r"""Schedules of learning rate, momentum and weight decay: learned, searched for, chosen greedily.

    theta_T(lam, seed): T steps of SGD on g, the mean cross-entropy of a batch, with the rates lam
    f(theta) = mean cross-entropy on the validation images

lam moves by the derivative of f(theta_T) (way ``learned``: Micaelli and Storkey, 2021, arXiv
2007.07869) or is searched for at the same number of gradients; see `schedules_ways` beside this.
Each training has an initial theta and an order of its own, the k-th of a run the same ones whatever
the way. All ways choose by f; what is chosen is then trained from other initial values, and tested.

The task's own inner problem is what an implicit method can see of all this: the penalty that
belongs to the weight decay, decay/2 ||theta||^2. Its solution knows neither rate nor momentum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bilevel_lite import data, models
from bilevel_lite.data.batches import Batches
from bilevel_lite.experiment.settings import Settings, require_batches, setting
from bilevel_lite.experiment.supervised import Supervised
from bilevel_lite.experiment.task import Column, as_text
from bilevel_lite.options import option
from bilevel_lite.params import flatten
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import theta_gradient
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.tasks.greedy import HypergradientDescent
from bilevel_lite.tasks.hypercleaning import SIZES
from bilevel_lite.tasks.schedules_ways import WAYS, Learned, Searched, Way, names, update, values
from bilevel_lite.updates import Update

__all__ = ["Schedules", "SchedulesSettings"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"inner_steps": 60, "batch_size": 20},
    **dict.fromkeys(
        ("mnist", "cifar10"),
        {"model": "lenet", "inner_steps": 400, "batch_size": 50, "images": 5000, "held": 2000},
    ),
}  # fmt: skip
COURSE = 50  # points of a learning rate's course that are kept


@dataclass(kw_only=True)
class SchedulesSettings(Settings):
    """The numbers of a run, and the task's own; the defaults of a dataset are in `DEFAULTS`."""

    dataset: str = setting("digits", "the data", known=tuple(SIZES))
    model: str = setting("linear", "what is trained", known=("linear", "mlp", "lenet"))
    way: str = setting("learned", "how the rates are chosen", known=WAYS)
    windows: int = setting(3, "learning rates of a training, where it has several", least=1)
    images: int = setting(0, "training images; 0 is all", least=0)
    held: int = setting(0, "validation images; 0 is all", least=0)
    fresh: int = setting(3, "trainings with the chosen rates, tested", least=1)
    start: float = option(
        "from 0 to 1", lambda v: 0 <= v <= 1, 0.25, help="where in the box learned rates begin"
    )
    outer_lr: float = option(
        "above 0 and at most 1", lambda v: 0 < v <= 1, 0.125, help="first sign step, of the box"
    )


@dataclass(kw_only=True)
class Schedules(Supervised, name="schedules"):
    """Choose the learning rates, momentum and weight decay of a training.

    Attributes:
        plain: The two losses, neither of which knows lam.
        shapes: Of the parameters.
        build: Seed -> theta_0.
        s: The settings that it was made from.
    """

    plain: BilevelProblem
    shapes: tuple[tuple[int, ...], ...]
    build: Callable[[int], Tensor]
    s: SchedulesSettings

    Settings: ClassVar[type] = SchedulesSettings
    figures: ClassVar[str] = "bilevel_lite.tasks.schedules_figures"
    defaults: ClassVar[dict[str, Any]] = {"outer_steps": 6, "evaluate_every": 1, "baselines": 0}
    columns: ClassVar[tuple[Column, ...]] = (
        Column("tuning_loss", "validation"),
        Column("test_loss", "test loss", at="fresh"),
        Column("test_accuracy", "accuracy", ".1f", 17, 100, spread=True, at="fresh"),
    )

    @classmethod
    def settings(cls, **given: Any) -> SchedulesSettings:
        """The settings of a run, those that were not given by the defaults of the dataset.

        Raises:
            ValueError: for a name that is not known, or a value out of range.
        """
        s = super().settings(**{**DEFAULTS.get(given.get("dataset", "digits"), {}), **given})
        train, validation, _ = SIZES[s.dataset]
        for name, most in (("images", train), ("held", validation)):
            if getattr(s, name) > most:
                got = getattr(s, name)
                raise ValueError(f"{name}: got {got}, expected 1 to {most}, or 0 for all")
        require_batches(s, s.images or train, s.held or validation)
        if s.method != (usual := cls.Settings().method):
            raise ValueError(
                f"method: got {s.method!r}, but rates are chosen by a way; expected {usual!r}, as "
                f"it is by default, and a way, one of {WAYS}"
            )
        if s.windows > s.inner_steps // 2:
            raise ValueError(
                f"windows: got {s.windows}, expected 1 to {s.inner_steps // 2}, half the steps of "
                "a training (inner_steps)"
            )
        return s

    @classmethod
    def make(cls, s: SchedulesSettings, device: torch.device) -> "Schedules":
        """Standardise and split the data, build the model: all from the settings' seed."""
        dataset = data.standardise(data.load(s.dataset))  # else most of the box trains nothing
        if s.model not in models.FLAT:
            dataset = dataset.as_images()
        draws = torch.Generator().manual_seed(s.seed)
        rows = data.split(len(dataset.y), SIZES[s.dataset], draws)
        train, validation = (
            (dataset.x[part[: most or None]].to(device), dataset.y[part[: most or None]].to(device))
            for part, most in zip(rows, (s.images, s.held), strict=False)
        )

        def model_of(seed: int) -> nn.Module:
            with torch.random.fork_rng(devices=[]):  # layers draw from torch's global generator
                torch.manual_seed(seed)
                shape = tuple(dataset.x.shape[1:])
                return models.build(s.model, shape, dataset.num_classes).to(device).eval()

        model, known = model_of(s.seed), names(s.way, s.windows)
        risk = WeightedRisk(model)

        def penalised(lam: Tensor, theta: Tensor, batch: Any) -> Tensor:
            decay = values(s.way, s.windows, lam)["weight_decay"]
            return risk(lam, theta, batch) + decay / 2 * theta.square().sum()

        return cls(
            problem=BilevelProblem(penalised, risk),
            plain=BilevelProblem(risk, risk),
            lam0=torch.full((len(known),), s.start, device=device),
            theta0=flatten(model),
            train=train,
            validation=validation,
            tuning=validation,  # what f sees is what every way chooses by
            test=(dataset.x_test.to(device), dataset.y_test.to(device)),
            num_classes=dataset.num_classes,
            source=dataset.source,
            model=model,
            shapes=tuple(tuple(p.shape) for p in model.parameters()),
            build=lambda seed: flatten(model_of(seed)),
            s=s,
        )

    def project(self, lam: Tensor) -> Tensor:
        """The box."""
        return lam.clamp(0, 1)

    def method(self, s: SchedulesSettings) -> Way:
        """The way of the settings."""
        return (Learned if s.way == "learned" else Searched)(self, s)

    # -- a training

    def begin(self, s: SchedulesSettings, number: int) -> tuple[Tensor, Batches]:
        """theta_0 and the batches of a training of this number."""
        seed = 1_000_003 * (10 + number) + s.seed
        draws = torch.Generator().manual_seed(seed)
        return self.build(seed), Batches(*self.train, s.batch_size, draws)

    def training(
        self, s: SchedulesSettings, lam: Tensor, number: int
    ) -> tuple[Tensor, Tensor, list[float]]:
        """theta_T, the last batch's loss, and the learning rate of each step.

        Cost: T gradients.
        """
        step = update(s.way, s.windows, lam, s.inner_steps, self.shapes)
        theta, batches = self.begin(s, number)
        state, course = step.start(theta), []
        for t in range(s.inner_steps):
            loss, q = theta_gradient(self.plain.inner_loss, lam, theta, batches.draw())
            theta, state = step.step(theta, state, q, lam, t)
            course.append(_rate(step, state, t))
        return theta, loss, course

    # -- for the log and the result

    def measure(self, lam: Tensor, theta: Tensor) -> dict[str, float]:
        """Loss and accuracy on validation and test images, and the rates."""
        rates = values(self.s.way, self.s.windows, lam)
        return {**super().measure(lam, theta), **{k: float(v) for k, v in rates.items()}}

    def result(self, s: SchedulesSettings, lam: Tensor, theta: Tensor) -> dict:
        """The chosen rates on other initial values and orders than any that they were chosen by."""
        fits, course = [], []
        for k in range(s.fresh):
            theta, _, course = self.training(s, lam, 1_000_000 + k)
            fits.append(super().measure(lam, theta))
        means = {name: mean(fit[name] for fit in fits) for name in fits[0]}
        every = max(1, s.inner_steps // COURSE)
        return {"fresh": {**means, "each": fits}, "course": course[::every]}

    @classmethod
    def keep(cls, result: dict, given: dict[str, Any]) -> dict:
        """The fresh trainings, and the learning rate over the last of them."""
        return {"fresh": result["fresh"], "course": result["course"]}

    @classmethod
    def table(cls, result: dict) -> str:
        """A run's result as text."""
        s, best, fresh = result["settings"], result["best"], result["fresh"]
        rates = ", ".join(f"{name} {best[name]:.3g}" for name in names(s["way"], s["windows"]))
        lines = [
            f"{s['way']}: {rates}",
            f"validation loss {best['tuning_loss']:.4f} when chosen, {fresh['tuning_loss']:.4f} "
            f"in {s['fresh']} fresh trainings",
            f"test loss {fresh['test_loss']:.4f}, accuracy {100 * fresh['test_accuracy']:.1f} %",
            f"{s['dataset']}, {s['model']}, seed {s['seed']}: trainings of {s['inner_steps']} "
            f"steps, {result['history'][-1]['gradients']:.0f} gradients in all",
        ]
        return as_text(lines, result["source"])


def _rate(step: Update, state: tuple[Tensor, ...], t: int) -> float:
    """The learning rate of step t; a greedy rule has it in its state."""
    return float(state[1] if isinstance(step, HypergradientDescent) else step.at("lr", None, t))
