r"""Unlearnable examples: noise that costs whoever trains on it the accuracy on clean images.

    g(lam, theta) = mean of l(x_i + r lam_i, y_i; theta) + l2 ||theta||^2          r: the radius
    f(theta)      = mean over clean training images of  max_{c != y} l(x_i, c; theta)

f is made small. It stands for minus the cross-entropy, which has no lower bound; f has, log(C - 1):
see `worst_wrong`. lam is the noise itself (``rows``), in units of the radius, or the weights of a
`UNet` that makes it (``generator``). After Liu et al. (2024, arXiv 2401.17523) as in the main
paper's Table 6. What needs no hypergradient is beside it: with f = g the inner problem is solved
where grad_theta f = 0, so that J v = 0 and dPhi/dlam = grad_lam g (the envelope theorem). That is
error minimisation (Huang et al., 2021): ``attack="min-min"``.

**Rows.** lam has n x pixels numbers, and the hypergradient on a batch is zero in all rows but the
batch's. `Rows` gives the method these alone: nothing of lam's size is made in a step.

A run ends with those who train on the exported images, 8 bits a pixel, from new parameters: as they
are, with augmentation, or after compressing them (`Unlearnable.judged`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bilevel_lite import data, models
from bilevel_lite.algorithms.bome import BOME
from bilevel_lite.experiment import methods
from bilevel_lite.experiment.settings import Settings, require_batches, setting
from bilevel_lite.experiment.supervised import Supervised, descend, evaluate
from bilevel_lite.experiment.task import Column, as_text
from bilevel_lite.options import option
from bilevel_lite.params import flatten, predict
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.solvers import Identity
from bilevel_lite.tasks.hypercleaning import SIZES
from bilevel_lite.tasks.unlearnable_noise import (
    VICTIMS,
    ErrorMinimising,
    Rows,
    UNet,
    limits,
    probe,
    worst_wrong,
)

__all__ = ["VICTIMS", "Unlearnable", "UnlearnableSettings"]

ATTACKS = ("bilevel", "min-min", "random", "none")
NOISES = ("rows", "generator")
SIZES_OF_ROWS = ("outer_batch_size", "curvature_batch_size", "cross_batch_size")

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"batch_size": 100, **dict.fromkeys(SIZES_OF_ROWS, 100), "victim_batch": 100},
    **dict.fromkeys(
        ("mnist", "cifar10"),
        {
            "model": "lenet", "batch_size": 250, **dict.fromkeys(SIZES_OF_ROWS, 250),
            "inner_lr": 0.05, "victim_lr": 0.02, "images": 2500, "victim_batch": 100,
        },
    ),
}  # fmt: skip


@dataclass(kw_only=True)
class UnlearnableSettings(Settings):
    """The numbers of a run, and the task's own; the defaults of a dataset are in `DEFAULTS`."""

    dataset: str = setting("digits", "the data", known=tuple(SIZES))
    model: str = setting("linear", "what the noise is made on", known=tuple(models.MODELS))
    victim: str = setting("", "what is trained on it; empty: the same", known=("", *models.MODELS))
    radius: float = option(
        "from 1 to 255", lambda v: 1 <= v <= 255, 8.0, help="most that a pixel moves, in 255ths"
    )
    attack: str = setting("bilevel", "how the noise is made", known=ATTACKS)
    noise: str = setting("rows", "what lam is: the noise, or weights of a U-Net", known=NOISES)
    width: int = setting(4, "channels of the U-Net's first stage", least=1)
    images: int = setting(0, "training images; 0 is all", least=0)
    l2: float = setting(1e-4, "coefficient of ||theta||^2 in the inner loss", least=0)
    epochs: int = setting(30, "passes of a victim over its images", least=1)
    victim_lr: float = option("above 0", lambda v: v > 0, 0.1, help="the victim's step of SGD")
    victim_batch: int = setting(100, "the victim's batch", least=1)
    look_steps: int = setting(200, "steps of the victim of a line of the log", least=1)
    quality: int = option(
        "from 1 to 95", lambda v: 1 <= v <= 95, 10, help="of JPEG, where a victim compresses"
    )


@dataclass(kw_only=True)
class Unlearnable(Supervised, name="unlearnable"):
    """Make noise that protects images from being learned from.

    Batches are (x, y, index), index being positions among the training images; (x, y) has its noise
    already.

    Attributes:
        generator: The U-Net; None where lam is the noise.
        victim: What is trained on the exported images.
        start: Its initial parameters.
        shape: Of an image, (channels, height, width).
        s: The settings that it was made from.
    """

    generator: UNet | None
    victim: nn.Module
    start: Tensor
    shape: tuple[int, int, int]
    s: UnlearnableSettings

    Settings: ClassVar[type] = UnlearnableSettings
    figures: ClassVar[str] = "bilevel_lite.tasks.unlearnable_figures"
    defaults: ClassVar[dict[str, Any]] = {
        "method": "aid-kfac", "inner_steps": 10, "damping": 0.1, "evaluate_every": 50,
    }  # fmt: skip
    criterion: ClassVar[str] = "tuning_accuracy"  # the lower the better, for a protection
    dropped: ClassVar[tuple[str, ...]] = ("tuning_loss",)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("tuning_accuracy", "tuning acc.", ".2f", 22, 100, spread=True),
    )

    @property
    def radius(self) -> float:
        """r, where pixels are from 0 to 1."""
        return self.s.radius / 255

    @classmethod
    def settings(cls, **given: Any) -> UnlearnableSettings:
        """The settings of a run, those that were not given by the defaults of the dataset.

        Noise in rows moves by sign steps of 0.2 radii, the generator by Adam with 0.002.

        Raises:
            ValueError: for a name that is not known, or a value out of range.
        """
        own = dict(DEFAULTS.get(given.get("dataset", "digits"), {}))
        rows = given.get("noise", "rows") == "rows"
        own |= {"outer_optimizer": "sign" if rows else "adam", "outer_lr": 0.2 if rows else 0.002}
        s = super().settings(**{**own, **given})
        train = SIZES[s.dataset][0]
        if s.images > train:
            raise ValueError(f"images: got {s.images}, expected 1 to {train}, or 0 for all")
        most = s.images or train
        require_batches(s, most, most)
        if s.victim_batch > most:
            raise ValueError(f"victim_batch: got {s.victim_batch}, expected 1 to {most}")
        if not rows and s.model in models.FLAT:
            raise ValueError(
                f"noise: got 'generator' with model={s.model!r}, which takes vectors; a U-Net "
                "needs a model of images, such as 'lenet'"
            )
        victim = s.victim or s.model
        if (victim in models.FLAT) != (s.model in models.FLAT):
            raise ValueError(
                f"victim: got {s.victim!r} with model={s.model!r}; expected both to take images, "
                "or both to take vectors"
            )
        if rows:
            cls._require_rows(s)
        return s

    @staticmethod
    def _require_rows(s: UnlearnableSettings) -> None:
        able = [name for name in methods.METHODS if name.startswith("aid-") or name == "bome"]
        if s.method not in able:
            raise ValueError(
                f"method: got {s.method!r} with noise='rows', where each step has other rows of "
                f"lam and what it remembers would be of the last ones; expected one of {able}, or "
                "noise='generator'"
            )
        if s.outer_optimizer == "adam" or s.outer_momentum:
            raise ValueError(
                f"outer_optimizer: got {s.outer_optimizer!r} with outer_momentum="
                f"{s.outer_momentum:g} and noise='rows', which would carry the momentum of other "
                "images; expected 'sign', or 'sgd' without momentum"
            )
        if len({getattr(s, name) for name in SIZES_OF_ROWS}) > 1:
            got = ", ".join(f"{name}={getattr(s, name)}" for name in SIZES_OF_ROWS)
            raise ValueError(
                f"cross_batch_size: got {got}; with noise='rows' one batch serves f, H and J, so "
                "give all three the same size"
            )

    @classmethod
    def make(cls, s: UnlearnableSettings, device: torch.device) -> "Unlearnable":
        """Split the data, build model, victim and generator."""
        dataset = data.load(s.dataset)
        side = dataset.image_shape
        shape = tuple(side) if len(side) == 3 else (1, *side)
        if s.model not in models.FLAT:
            dataset = dataset.as_images()
        draws = torch.Generator().manual_seed(s.seed)
        parts = list(data.split(len(dataset.y), SIZES[s.dataset], draws))
        parts[0] = parts[0][: s.images or None]
        train, _, tuning = (
            (dataset.x[index].to(device), dataset.y[index].to(device)) for index in parts
        )
        with torch.random.fork_rng(devices=[]):  # layers draw from torch's global generator
            torch.manual_seed(s.seed)
            kinds = [s.model, s.victim or s.model]
            model, victim = (
                models.build(kind, tuple(dataset.x.shape[1:]), dataset.num_classes).to(device)
                for kind in kinds
            )
            unet = UNet(shape, s.width, s.radius / 255).to(device) if s.noise != "rows" else None
        radius = s.radius / 255

        def inputs(lam: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
            x, y = batch[:2]
            if unet is not None:
                return x + radius * predict(unet, lam, x), y
            # (x, y) without an index has its noise already
            return (x, y) if len(batch) == 2 else (x + radius * lam.index_select(0, batch[2]), y)

        def outer(lam: Tensor, theta: Tensor, batch: Any) -> Tensor:
            return worst_wrong(predict(model, theta, batch[0]), batch[1])

        return cls(
            problem=BilevelProblem(WeightedRisk(model.eval(), l2=s.l2, inputs=inputs), outer),
            lam0=torch.zeros_like(train[0]) if unet is None else flatten(unet),
            theta0=flatten(model),
            train=train,
            validation=train,  # the clean images, as in the paper: nobody else's are at hand
            tuning=tuning,
            test=(dataset.x_test.to(device), dataset.y_test.to(device)),
            num_classes=dataset.num_classes,
            source=dataset.source,
            model=model,
            generator=unet,
            victim=victim.eval(),
            start=flatten(victim),
            shape=shape,
            s=s,
        )

    def method(self, s: UnlearnableSettings) -> Any:
        """The method of the settings; of the min-min problem the gradient in lam."""
        recipe = methods.METHODS.get(s.method)
        if recipe is not None and recipe.cls is BOME:  # theta with momentum, phi as in the paper
            options = {**recipe.options, "barrier": "squared"}
            recipe = replace(recipe, inner="momentum", options=options)
        if s.attack == "min-min":
            options = {"solver": lambda s: Identity(1.0), "inner_steps": methods.STEPS}
            recipe = methods.Recipe(ErrorMinimising, options=options)
        return methods.build(s, self, recipe) if self.generator else Rows(self, s, recipe)

    # -- noise, and who trains on it

    @torch.no_grad()
    def perturbed(self, lam: Tensor, attack: str) -> Tensor:
        """Export: the training images with their noise, in steps of a 255th, within the radius.

        Args:
            lam: The noise in units of the radius, or the generator's weights.
            attack: ``"random"`` is a radius up or down at random, and does not look at lam, as does
                not ``"none"``, the images as they are.

        Raises:
            ValueError: for another attack, or noise of another shape than the images.
        """
        x, _ = self.train
        if attack not in ATTACKS:
            raise ValueError(f"attack: got {attack!r}, expected one of {ATTACKS}")
        if self.generator is None and lam.shape != x.shape:
            raise ValueError(f"lam: got shape {tuple(lam.shape)}, expected {tuple(x.shape)}")
        if attack == "none":
            return x
        if attack == "random":
            draws = torch.Generator().manual_seed(1_000_003 * 7 + self.s.seed)
            lam = torch.randint(0, 2, x.shape, generator=draws).to(x) * 2 - 1
        elif self.generator is not None:
            lam = torch.cat([predict(self.generator, lam, part) for part in x.split(1000)])
        noise = self.radius * lam.clamp(*limits(x, self.radius))
        levels = (255 * noise).round().clamp(-int(self.s.radius), int(self.s.radius))
        return (x + levels / 255).clamp(0, 1)

    def pictures(self, x: Tensor) -> Tensor:
        """Rows as images, (n, channels, height, width)."""
        return x.view(-1, *self.shape)

    def fresh(self, x: Tensor, steps: int, victim: str = "none") -> Tensor:
        """A victim: new parameters, trained for so many steps on these images; one of `VICTIMS`.

        The last iterate: a victim has nothing clean to choose another one by.
        """
        s, change = self.s, None
        if victim == "jpeg":
            x = data.jpeg(self.pictures(x), s.quality).view_as(x)
        elif victim == "augment":

            def change(x: Tensor, generator: torch.Generator) -> Tensor:
                return data.crop_and_flip(self.pictures(x), generator).view_as(x)

        return descend(
            self.victim, (x, self.train[1]), self.start, steps, s.victim_lr, s.victim_batch,
            s.l2, 1_000_003 * 8 + s.seed, change,
        )  # fmt: skip

    def judged(self, lam: Tensor, attack: str) -> dict[str, float]:
        """Test accuracy of a victim of each kind, and what the linear `probe` reads in the noise.

        Raises:
            ValueError: for another attack.
        """
        s, x = self.s, self.perturbed(lam, attack)
        steps, row = s.epochs * (len(x) // s.victim_batch), {}
        for kind in VICTIMS:
            theta = self.fresh(x, steps, kind)
            row[kind] = evaluate(self.victim, theta, self.test)["accuracy"]
            if kind == "none":
                row["train"] = evaluate(self.victim, theta, (x, self.train[1]))["accuracy"]
        if attack != "none":
            row["probe"] = probe(x - self.train[0], self.train[1])
        return row

    # -- for the log and the result

    def measure(self, lam: Tensor, theta: Tensor) -> dict[str, float]:
        """Loss and accuracy of a victim of ``look_steps`` steps on the noise of now.

        On the tuning images; beside it ``as_trained``, the run's own theta, which has followed the
        noise and is nobody's victim. The test images wait for the end.
        """
        fresh = self.fresh(self.perturbed(lam, self.s.attack), self.s.look_steps)
        row = evaluate(self.victim, fresh, self.tuning)
        as_trained = evaluate(self.model, theta, self.tuning)["accuracy"]
        return {**{f"tuning_{k}": v for k, v in row.items()}, "as_trained": as_trained}

    def judge(self, lam: Tensor, theta: Tensor) -> float:
        """The tuning accuracy."""
        return self.measure(lam, theta)["tuning_accuracy"]

    def baselines(self, s: UnlearnableSettings) -> dict[str, Callable[[], dict]]:
        """Victims of the clean images, and of random noise within the radius."""
        return {
            name: partial(self.judged, self.lam0, attack)
            for name, attack in (("clean", "none"), ("random", "random"))
        }

    def result(self, s: UnlearnableSettings, lam: Tensor, theta: Tensor) -> dict:
        """Victims of the exported images."""
        return {
            "victims": self.judged(lam, s.attack),
            "sizes": {"train": len(self.train[1]), "test": len(self.test[1])},
        }

    @classmethod
    def keep(cls, result: dict, given: dict[str, Any]) -> dict:
        """What the victims found."""
        return {"victims": result["victims"], "sizes": result["sizes"]}

    @classmethod
    def table(cls, result: dict) -> str:
        """Test accuracy of the victims, and the probe's, as text."""
        s = result["settings"]
        name = s["method"] if s["attack"] == "bilevel" else s["attack"]
        lines = [f"{'trained on':<22}{'as it is':>10}{'augment':>10}{'jpeg':>10}{'probe':>10}"]
        for label, row in {**result["baselines"], name: result["victims"]}.items():
            cells = [f"{100 * row[key]:8.2f} %" for key in (*VICTIMS, "probe") if key in row]
            lines.append(f"{label:<22}{''.join(cells)}")
        sizes = result["sizes"]
        lines.append(
            f"radius {s['radius']:g}/255, noise made on {s['model']}, trained on it "
            f"{s['victim'] or s['model']}; {s['dataset']}, seed {s['seed']}: {sizes['train']} "
            f"training and {sizes['test']} test images; chance is 10 %"
        )
        return as_text(lines, result["source"])
