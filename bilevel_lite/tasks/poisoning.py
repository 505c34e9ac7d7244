"""Data poisoning: how much a few generated training rows can cost whoever trains on them.

    g(lam, theta) = [ sum_clean l(x_i, y_i; theta) + sum_poison l(G(lam; z_j), y_j; theta) ] / (n+m)
                    + l2 ||theta||^2
    f(theta)      = mean of log 1 / (1 - p_y) on validation rows, made small      ("bounded")
                    or minus their cross-entropy                                  ("negative")

lam are the weights of a generator G, which turns m = share * n training rows z_j into poison and
leaves their labels. It is Lu et al. (2022, arXiv 2204.09092) as in the main paper's Table 5, with
three things mended that the public code has otherwise: f's rows are not among the training rows
(``leak=1`` takes them from there), poison is generated once, and the flipped label is C - 1 - y.

A run ends where a defender begins: new parameters, trained from scratch on clean rows and the
exported poison, with nothing clean to look at, and judged once on the test set; without a defence,
and with two (`Poisoning.defended`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_lite import data, models
from bilevel_lite.experiment.settings import Settings, require_batches, setting, switch
from bilevel_lite.experiment.supervised import Supervised, descend, evaluate
from bilevel_lite.experiment.task import Column, as_text
from bilevel_lite.options import option
from bilevel_lite.params import flatten, predict
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.tasks.hypercleaning import SIZES

__all__ = [
    "DEFENCES", "Generator", "Poisoning", "PoisoningSettings", "far_from_class_mean", "flipped",
    "not_the_label", "with_poison",
]  # fmt: skip

OBJECTIVES = ("bounded", "negative")
ATTACKS = ("generator", "flip", "noise", "none")
DEFENCES = ("none", "distance", "trimmed")
ROUNDS = 2  # of the trimmed loss: train, leave out, train anew

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"batch_size": 250, "curvature_batch_size": 250, "cross_batch_size": 250},
    "mnist": {
        "batch_size": 1000, "curvature_batch_size": 1000, "cross_batch_size": 1000,
        "outer_batch_size": 1000, "defender_batch": 1000,
    },
    "cifar10": {
        "batch_size": 256, "curvature_batch_size": 256, "cross_batch_size": 256,
        "outer_batch_size": 256, "inner_lr": 0.02, "defender_lr": 0.02, "defender_batch": 256,
    },
}  # fmt: skip


@dataclass(kw_only=True)
class PoisoningSettings(Settings):
    """The numbers of a run, and the task's own; the defaults of a dataset are in `DEFAULTS`."""

    dataset: str = setting("digits", "the data", known=tuple(SIZES))
    model: str = setting("linear", "what the defender trains", known=tuple(models.MODELS))
    share: float = option(
        "above 0, up to 0.5", lambda v: 0 < v <= 0.5, 0.03, help="poisoned rows for each clean one"
    )
    attack: str = setting(
        "generator", "what is exported; for comparison flipped labels, noise, or nothing",
        known=ATTACKS,
    )  # fmt: skip
    objective: str = setting("bounded", "f, see the task's file", known=OBJECTIVES)
    leak: int = switch(0, "1: f is judged on training rows")
    examples: int = setting(0, "clean training rows; 0 is all", least=0)
    hidden: int = setting(128, "width of the generator", least=1)
    l2: float = setting(1e-4, "coefficient of ||theta||^2 in the inner loss")
    epochs: int = setting(20, "passes of a fresh defender over its rows", least=1)
    defender_lr: float = option("above 0", lambda v: v > 0, 0.1, help="the defender's step of SGD")
    defender_batch: int = setting(250, "the defender's batch", least=1)
    look_steps: int = setting(200, "steps of the fresh defender of a line of the log", least=1)
    removed: float = option(
        "from 0 to 0.5", lambda v: 0 <= v <= 0.5, 0.05, help="share that a defence leaves out"
    )


class Generator(nn.Module):
    r"""Poison from a row and its label: a pixel in (0, 1), near the row's own at first.

        G(z, y) = sigmoid( logit(0.05 + 0.9 z) + W2 tanh(W1 [z, e_y] + c1) + c2 )

    The sigmoid keeps pixels in their range for any weights; the 0.05 keeps it off its flat ends.

    Args:
        pixels: Of a row.
        classes: Number of labels.
        hidden: Width.
    """

    def __init__(self, pixels: int, classes: int, hidden: int):
        super().__init__()
        self.classes = classes
        self.first, self.last = nn.Linear(pixels + classes, hidden), nn.Linear(hidden, pixels)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Return poison of the shape of ``z``, (m, ...), for labels ``y``, (m,)."""
        flat = z.flatten(1)
        told = torch.cat([flat, F.one_hot(y, self.classes).to(flat.dtype)], 1)
        moved = torch.logit(0.05 + 0.9 * flat) + self.last(torch.tanh(self.first(told)))
        return torch.sigmoid(moved).view_as(z)


def with_poison(generator: nn.Module, sources: tuple[Tensor, Tensor], share: float) -> Callable:
    """Return ``inputs(lam, batch)``: the batch's n rows, then round(share * n) poisoned ones.

    Which ones, the batch itself says: its first rows' positions, modulo the number of sources. So
    the same batch brings the same poison at each call, the whole set brings each source once, and
    a batch of random rows brings random ones.

    Args:
        generator: ``generator(z, y)`` gives poison; lam are its parameters.
        sources: (z, y), what it is made from.
        share: Poisoned rows for each clean one.

    Raises:
        ValueError: when called with a batch so small that no poison would be in it.
    """
    z, labels = sources

    def inputs(lam: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        x, y, index = batch[:3]
        m = round(share * len(y))
        if not m:
            raise ValueError(
                f"batch: {len(y)} rows with share={share:g} hold no poisoned row; take "
                f"{int(0.5 / share) + 1} rows or more"
            )
        rows = index[:m] % len(labels)
        chosen = labels.index_select(0, rows)
        poison = predict(generator, lam, z.index_select(0, rows), chosen)
        return torch.cat([x, poison]), torch.cat([y, chosen])

    return inputs


def not_the_label(logits: Tensor, y: Tensor) -> Tensor:
    """Mean of -log(1 - p_y): zero once no row has its label, whatever else happens; shape ().

    It is bounded below where minus the cross-entropy is not: that one can fall for ever by being
    ever surer of wrong answers on rows that are lost already. Its slope in the label's logit is
    p_y (of a lost row 0, of a sure one 1), the other's is 1 - p_y, the other way round.
    """
    others = logits.scatter(1, y[:, None], -torch.inf)
    return (logits.logsumexp(1) - others.logsumexp(1)).mean()


def flipped(y: Tensor, classes: int) -> Tensor:
    """C - 1 - y: of ten digits 9 - y. (10 - y, as in the paper, makes a class 10 of 0.)"""
    return classes - 1 - y


def far_from_class_mean(x: Tensor, y: Tensor, removed: float) -> Tensor:
    """Mask of the rows to keep: all but the share that is farthest from the mean of its label."""
    flat, classes = x.flatten(1), int(y.max()) + 1
    sums = flat.new_zeros(classes, flat.shape[1]).index_add_(0, y, flat)
    means = sums / y.bincount(minlength=classes).clamp(min=1)[:, None]
    return _but_highest((flat - means[y]).norm(dim=1), removed)


def _but_highest(values: Tensor, removed: float) -> Tensor:
    keep = torch.ones_like(values, dtype=torch.bool)
    keep[values.topk(round(removed * len(values))).indices] = False
    return keep


@dataclass(kw_only=True)
class Poisoning(Supervised, name="poisoning"):
    """Learn a generator of poisoned training rows that costs a classifier accuracy.

    Batches are (x, y, index), index being positions among the training rows.

    Attributes:
        generator: G; lam holds its parameters.
        sources: (z, y), the training rows that poison is made from.
        attack: What is exported.
        start: Initial parameters of fresh defenders, other ones than theta0.
        s: The settings that it was made from.
    """

    generator: nn.Module
    sources: tuple[Tensor, Tensor]
    start: Tensor
    s: PoisoningSettings

    Settings: ClassVar[type] = PoisoningSettings
    figures: ClassVar[str] = "bilevel_lite.tasks.poisoning_figures"
    defaults: ClassVar[dict[str, Any]] = {
        "inner_steps": 10, "outer_lr": 10.0, "damping": 0.01, "evaluate_every": 20,
    }  # fmt: skip
    criterion: ClassVar[str] = "tuning_accuracy"  # the lower the better, for an attack
    dropped: ClassVar[tuple[str, ...]] = ("tuning_loss", "validation_loss")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("tuning_accuracy", "tuning acc.", ".2f", 22, 100, spread=True),
    )

    @classmethod
    def settings(cls, **given: Any) -> PoisoningSettings:
        """The settings of a run, those that were not given by the defaults of the dataset.

        Raises:
            ValueError: for a name that is not known, or a value out of range.
        """
        own = DEFAULTS.get(given.get("dataset", "digits"), {})
        s = super().settings(**{**own, **given})
        train, validation, _ = SIZES[s.dataset]
        if s.examples > train:
            raise ValueError(f"examples: got {s.examples}, expected 1 to {train}, or 0 for all")
        most = s.examples or train
        validation = min(validation, most) if s.leak else validation
        require_batches(s, most, validation)
        for name in ("batch_size", "curvature_batch_size", "cross_batch_size"):
            value = getattr(s, name)
            if not round(s.share * (value or most)):
                raise ValueError(
                    f"{name}: got {value} with share={s.share:g}, so that no row of a batch is "
                    f"poisoned; expected at least {int(0.5 / s.share) + 1}"
                )
        return s

    @classmethod
    def make(cls, s: PoisoningSettings, device: torch.device) -> "Poisoning":
        """Split the data, draw the sources of poison, build model and generator."""
        dataset = data.load(s.dataset)
        if s.model not in models.FLAT:
            dataset = dataset.as_images()
        draws = torch.Generator().manual_seed(s.seed)
        parts = list(data.split(len(dataset.y), SIZES[s.dataset], draws))
        parts[0] = parts[0][: s.examples or None]
        if s.leak:
            parts[1] = parts[0][: len(parts[1])]
        train, validation, tuning = (
            (dataset.x[index].to(device), dataset.y[index].to(device)) for index in parts
        )
        rows = torch.randperm(len(train[1]), generator=draws)[: round(s.share * len(train[1]))]
        sources = tuple(part[rows.to(device)] for part in train)
        with torch.random.fork_rng(devices=[]):  # layers draw from torch's global generator
            torch.manual_seed(s.seed)
            shape, classes = tuple(dataset.x.shape[1:]), dataset.num_classes
            options = {"stem": "imagenet"} if s.model == "resnet18" else {}
            fresh, model = (models.build(s.model, shape, classes, **options) for _ in range(2))
            generator = Generator(dataset.x[0].numel(), classes, s.hidden)
        model, generator = model.to(device).eval(), generator.to(device)
        inner = WeightedRisk(model, l2=s.l2, inputs=with_poison(generator, sources, s.share))

        def outer(lam: Tensor, theta: Tensor, batch: Any) -> Tensor:
            logits = predict(model, theta, batch[0])
            if s.objective == "negative":
                return -F.cross_entropy(logits, batch[1])
            return not_the_label(logits, batch[1])

        return cls(
            problem=BilevelProblem(inner, outer),
            lam0=flatten(generator),
            theta0=flatten(model),
            train=train,
            validation=validation,
            tuning=tuning,
            test=(dataset.x_test.to(device), dataset.y_test.to(device)),
            num_classes=classes,
            source=dataset.source,
            model=model,
            generator=generator,
            sources=sources,
            start=flatten(fresh).to(device),
            s=s,
        )

    # -- poison, and who trains on it

    @torch.no_grad()
    def poison(self, lam: Tensor, attack: str) -> tuple[Tensor, Tensor]:
        """Export: (x, y) of the rows that an attack adds, made once.

        Args:
            lam: Of the generator; the others do not look at it.
            attack: ``"generator"``, ``"flip"`` (the sources with label C - 1 - y), ``"noise"``
                (uniform pixels with the sources' labels) or ``"none"`` (no rows).
        """
        z, y = self.sources
        if attack == "generator":
            return predict(self.generator, lam, z, y), y
        if attack == "flip":
            return z, flipped(y, self.num_classes)
        if attack == "noise":
            draws = torch.Generator().manual_seed(1_000_003 * 7 + self.s.seed)
            return torch.rand(z.shape, generator=draws).to(z), y
        return z[:0], y[:0]

    def both(self, poison: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Clean training rows, then poison."""
        x, y = (torch.cat(pair) for pair in zip(self.train, poison, strict=True))
        return x, y

    def descend(self, split: tuple[Tensor, Tensor], theta: Tensor, steps: int) -> Tensor:
        """That many steps on the rows of ``split``: `bilevel_lite.experiment.supervised.descend`.

        The last iterate: whoever trains on poison has nothing clean to choose another one by.
        """
        s = self.s
        return descend(
            self.model, split, theta, steps, s.defender_lr, s.defender_batch, s.l2,
            1_000_003 * 8 + s.seed,
        )  # fmt: skip

    def fresh(self, split: tuple[Tensor, Tensor]) -> Tensor:
        """A fresh defender: new parameters, ``epochs`` passes over the rows of ``split``."""
        size = min(self.s.defender_batch, len(split[1]))
        return self.descend(split, self.start, self.s.epochs * (len(split[1]) // size))

    def defended(self, poison: tuple[Tensor, Tensor], defence: str) -> dict[str, float]:
        """Test accuracy of a fresh defender, and the share of the poison that it left out.

        Args:
            poison: (x, y), from `poison`.
            defence: ``"none"``; ``"distance"``: leave out the share ``removed`` of rows that is
                farthest from the mean of its label, once; ``"trimmed"``: train, leave out the share
                with the highest loss, and train anew on the rest, `ROUNDS` times.

        Raises:
            ValueError: for another defence.
        """
        if defence not in DEFENCES:
            raise ValueError(f"defence: got {defence!r}, expected one of {DEFENCES}")
        x, y = self.both(poison)
        keep = torch.ones_like(y, dtype=torch.bool)
        if defence == "distance":
            keep = far_from_class_mean(x, y, self.s.removed)
        theta = self.fresh((x[keep], y[keep]))
        for _ in range(ROUNDS if defence == "trimmed" else 0):
            keep = _but_highest(self._losses(theta, x, y), self.s.removed)
            theta = self.fresh((x[keep], y[keep]))
        row = {"test_accuracy": evaluate(self.model, theta, self.test)["accuracy"]}
        if len(poison[1]):
            row["caught"] = float((~keep[-len(poison[1]) :]).double().mean())
        return row

    @torch.no_grad()
    def _losses(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = zip(x.split(5_000), y.split(5_000), strict=True)
        return torch.cat(
            [F.cross_entropy(predict(self.model, theta, a), b, reduction="none") for a, b in parts]
        )

    # -- for the log and the result

    def measure(self, lam: Tensor, theta: Tensor) -> dict[str, float]:
        """Loss and accuracy of a fresh defender of ``look_steps`` steps on the poison of now.

        On the tuning rows, and on f's. The run's own theta has seen all the poison before it, and
        under some methods descends on f itself: what it loses (``as_trained``) is not what anybody
        would lose who trains on the poison. The test set waits for the end.
        """
        split = self.both(self.poison(lam, self.s.attack))
        fresh = self.descend(split, self.start, self.s.look_steps)
        rows = {"tuning": self.tuning, "validation": self.validation}
        found = {name: evaluate(self.model, fresh, split) for name, split in rows.items()}
        out = {f"{name}_{k}": v for name, row in found.items() for k, v in row.items()}
        self.refresh(theta)
        return {**out, "as_trained": evaluate(self.model, theta, self.tuning)["accuracy"]}

    def judge(self, lam: Tensor, theta: Tensor) -> float:
        """The tuning accuracy."""
        return self.measure(lam, theta)["tuning_accuracy"]

    def baselines(self, s: PoisoningSettings) -> dict[str, Callable[[], dict]]:
        """A fresh defender on clean rows, with flipped labels, with noise; each defence of each."""
        return {
            name: partial(self.outcomes, self.lam0, attack)
            for name, attack in (("clean", "none"), ("flip", "flip"), ("noise", "noise"))
        }

    def outcomes(self, lam: Tensor, attack: str) -> dict[str, float]:
        """`defended` by every defence, in one row."""
        poison = self.poison(lam, attack)
        rows = {name: self.defended(poison, name) for name in DEFENCES}
        return {
            key if name == "none" else f"{name}_{key}": value
            for name, row in rows.items()
            for key, value in row.items()
            if (name, key) != ("none", "caught")
        }

    def result(self, s: PoisoningSettings, lam: Tensor, theta: Tensor) -> dict:
        """Fresh defenders on the exported poison, and what it looks like."""
        x, y = self.poison(lam, s.attack)
        return {
            "defender": self.outcomes(lam, s.attack),
            "sizes": {"train": len(self.train[1]), "poison": len(y), "test": len(self.test[1])},
        }

    @classmethod
    def keep(cls, result: dict, given: dict[str, Any]) -> dict:
        """What the fresh defenders found."""
        return {"defender": result["defender"], "sizes": result["sizes"]}

    @classmethod
    def table(cls, result: dict) -> str:
        """Test accuracy of fresh defenders, without and with a defence, as text."""
        s = result["settings"]
        attack = s["method"] if s["attack"] == "generator" else s["attack"]
        rows = {**result["baselines"], f"clean + {attack}": result["defender"]}
        lines = [f"{'trained on':<24}no defence   distance    trimmed   caught: distance, trimmed"]
        for name, row in rows.items():
            keys = ("test_accuracy", "distance_test_accuracy", "trimmed_test_accuracy")
            cells = "".join(f"{100 * row[key]:9.2f} %" for key in keys)
            caught = [
                f"{row[key]:.0%}" for key in ("distance_caught", "trimmed_caught") if key in row
            ]
            lines.append(f"{name:<22}{cells}   {', '.join(caught)}")
        sizes = result["sizes"]
        lines.append(
            f"{s['model']} on {s['dataset']}, seed {s['seed']}: {sizes['train']} clean and "
            f"{sizes['poison']} poisoned rows, {sizes['test']} test rows"
        )
        return as_text(lines, result["source"])
