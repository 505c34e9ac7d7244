"""Long-tailed classes: learn how to weight an example by its loss, from a few balanced examples.

    f(theta)  = mean cross-entropy on the meta images, as many of each class
    inner steps follow  F(theta) = (1/n) sum_i V_lam(l_i) grad l_i + 2 l2 theta,   l_i = l_i(theta)

V_lam, from an example's loss to its weight, is a network 1-100-1 (Meta-Weight-Net, Shu et al.,
2019, arXiv 1902.07379); `WEIGHTS` names what may stand in its place, the rivals among it.

**Sizes.** The meta images are taken first; of class c = 0 .. C-1 the training set then keeps
floor(most / imbalance^(c/(C-1))) (Cui et al., 2019, arXiv 1901.05555). The images that choose the
iterate and the settings, as many of each class, are cut from the test images, since the first class
has none to spare; the test images are the others. Nothing is chosen by them.

**The scale of V.** V = 2 sigmoid(network) starts near 1, so that the run starts as plain training;
a sigmoid alone would halve the step size. The weights are not normalised by default: then F has a
potential, H is symmetric, and an inner problem is solved (``reading``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_lite import data, models
from bilevel_lite.data.batches import Batches
from bilevel_lite.experiment.settings import Settings, require_batches, setting, switch
from bilevel_lite.experiment.supervised import (
    BATCHNORM,
    Supervised,
    evaluate,
    plain,
    refresh_batchnorm,
)
from bilevel_lite.experiment.task import Column, as_text
from bilevel_lite.params import flatten, predict
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.tasks.long_tail_study import RIVALS

__all__ = ["SIZES", "LongTail", "LongTailSettings", "class_balanced", "focal", "network", "sizes"]

# training images of the first class; of each class in meta and tuning split
SIZES = {"digits": (80, 10, 10), "cifar10": (4990, 10, 200), "cifar100": (490, 10, 20)}
BETA, GAMMA = 0.9999, 1.0  # of class-balanced weights and of the focal loss
# what weighs an example: V, learned or as it was drawn; a number for each class, learned or
# class-balanced; the focal loss; nothing; nothing, and the meta images are trained on, too
WEIGHTS = ("network", "frozen", "class", "balanced", "focal", "equal", "meta")
LEARNED, READ = ("network", "class"), ("network", "frozen", "focal")  # READ: the losses
READINGS = ("full", "no_slope", "normalised")


def network(hidden: int = 100) -> nn.Module:
    """The network in V = 2 sigmoid(network(l)); its 3 * hidden + 1 parameters are lam."""
    return nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def focal(gamma: Tensor, losses: Tensor) -> Tensor:
    """Weights whose potential is the focal loss (1 - p)^gamma l with p = exp(-l).

    V(l) = (1 - p)^gamma + gamma (1 - p)^(gamma - 1) p l: nothing but l is read.
    Source: Lin et al. (2017), arXiv 1708.02002, eq. 4.
    """
    p = (-losses).exp()
    miss = (1 - p).clamp(min=torch.finfo(p.dtype).tiny)
    return miss**gamma + gamma * miss ** (gamma - 1) * p * losses


def class_balanced(counts: Tensor, beta: float = BETA) -> Tensor:
    """One weight for each class, (1 - beta) / (1 - beta^n_c), of mean 1 over the classes.

    With few examples, or beta near 1, this is 1 / n_c. The mean over the examples is below 1 (0.17
    for an imbalance of 100 on CIFAR-10), so that the steps are shorter; with a mean of 1 there the
    weights of rare examples are 20 and more, and training with momentum does not survive it.
    Source: Cui et al. (2019), arXiv 1901.05555, eq. 3.
    """
    rare = (1 - beta) / -torch.expm1(counts * math.log(beta))  # 1 - beta^n keeps no digits
    return rare / rare.mean()


def sizes(most: int, imbalance: float, classes: int) -> list[int]:
    """Training images of each class: floor(most / imbalance^(c/(C-1)))."""
    return [int(most / imbalance ** (c / (classes - 1)) + 1e-9) for c in range(classes)]


@dataclass(kw_only=True)
class LongTailSettings(Settings):
    """The numbers of a run, and the task's own; the defaults of a dataset are in `DEFAULTS`."""

    dataset: str = setting("digits", "the data", known=tuple(SIZES))
    model: str = setting("linear", "the model", known=tuple(models.MODELS))
    imbalance: float = setting(100.0, "size of the first class over that of the last", least=1)
    most: int = setting(0, "training images of the first class; 0: all there are", least=0)
    weights: str = setting("network", "what weighs an example", known=WEIGHTS)
    reading: str = setting(
        "full", "weights V with V' in H (full), V with H as if they stood still (no_slope), or V "
        "over its mean in the batch, likewise (normalised)", known=READINGS,
    )  # fmt: skip
    hidden: int = setting(100, "units of V's hidden layer", least=1)
    augment: int = switch(0, "1: images are shifted by up to 4 pixels and flipped at random")
    l2: float = setting(2.5e-4, "coefficient of ||theta||^2 in the inner loss", least=0)
    batchnorm: str = setting("batch", "its statistics, see Supervised", known=BATCHNORM)


DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"imbalance": 20.0, "inner_lr": 0.1, "batch_size": 50, "curvature_batch_size": 50},
    **dict.fromkeys(
        ("cifar10", "cifar100"),
        {
            "model": "lenet", "augment": 1, "batch_size": 100, "curvature_batch_size": 100,
            "outer_batch_size": 100, "cross_batch_size": 100, "inner_lr": 0.05,
            "inner_schedule": "steps",
        },
    ),
}  # fmt: skip


@dataclass(kw_only=True)
class LongTail(Supervised, name="long_tail"):
    """Learn to weight examples of long-tailed classes by their losses.

    Batches are (x, y, index), with ``augment`` of shifted and flipped images.

    Attributes:
        counts: Training images of each class, shape (C,), without the meta images.
        net: The network in V; its own parameters are the start of lam.
        kind: What weighs an example, one of `WEIGHTS`.
        reading: One of `READINGS`.
        l2: Coefficient of ||theta||^2.
        transform: What is done to the images of a batch; None: nothing.
    """

    counts: Tensor
    net: nn.Module
    kind: str = "network"
    reading: str = "full"
    l2: float = 0.0
    transform: Callable | None = None

    Settings: ClassVar[type] = LongTailSettings
    figures: ClassVar[str] = "bilevel_lite.tasks.long_tail_figures"
    defaults: ClassVar[dict[str, Any]] = {
        "method": "aid-kfac", "fisher": "empirical", "damping": 1e-3,
        "outer_optimizer": "adam", "outer_lr": 0.01,
    }  # fmt: skip
    criterion: ClassVar[str] = "tuning_error"
    columns: ClassVar[tuple[Column, ...]] = (
        *Supervised.columns,
        Column("test_accuracy", "at the end", ".1f", 17, 100, spread=True, at="last"),
    )

    @classmethod
    def settings(cls, **given: Any) -> LongTailSettings:
        """The settings of a run, those that were not given by the defaults of the dataset.

        Raises:
            ValueError: for a name that is not known, or a value out of range.
        """
        s = super().settings(**{**DEFAULTS.get(given.get("dataset", "digits"), {}), **given})
        most, _, _ = SIZES[s.dataset]
        classes = 100 if s.dataset == "cifar100" else 10
        if s.most > most:
            raise ValueError(f"most: got {s.most}, expected 1 to {most} in {s.dataset}, or 0")
        first = s.most or most
        if s.imbalance > first:
            raise ValueError(
                f"imbalance: got {s.imbalance:g}, which leaves the last class without images; "
                f"expected 1 to {first} (the first class has that many)"
            )
        if s.augment not in (0, 1):
            raise ValueError(f"augment: got {s.augment}, expected 0 or 1")
        if s.augment and s.model in models.FLAT:
            raise ValueError(
                f"augment: got 1, but {s.model} takes vectors, which cannot be shifted; expected "
                "0, or a model of images"
            )
        require_batches(s, sum(sizes(first, s.imbalance, classes)), SIZES[s.dataset][1] * classes)
        return s

    @classmethod
    def make(cls, s: LongTailSettings, device: torch.device) -> "LongTail":
        """Take the meta images, thin out each class, cut the test images, build the model.

        Raises:
            ValueError: if the model cannot take the images.
            DataError: if they cannot be had.
        """
        found, generator = data.load(s.dataset), torch.Generator().manual_seed(s.seed)
        if len(found.image_shape) == 3:
            found = data.standardise(found)
        if s.model not in models.FLAT:
            found = found.as_images()
        most, meta, tuned = SIZES[s.dataset]
        counts = sizes(s.most or most, s.imbalance, found.num_classes)
        validation, train = _cut(found.y, [(meta, n) for n in counts], generator)
        tuning, test = _cut(found.y_test, [(tuned, None)] * found.num_classes, generator)
        # in another order: BatchNorm takes its statistics from the first ones
        train = train[torch.randperm(len(train), generator=generator)]
        splits = {
            name: (x[rows].to(device), y[rows].to(device))
            for x, y, parts in (
                (found.x, found.y, {"train": train, "validation": validation}),
                (found.x_test, found.y_test, {"tuning": tuning, "test": test}),
            )
            for name, rows in parts.items()
        }
        with torch.random.fork_rng(devices=[]):  # layers draw from torch's global generator
            torch.manual_seed(s.seed)
            model = models.build(s.model, tuple(found.x.shape[1:]), found.num_classes).to(device)
            net = network(s.hidden).to(device)
        model.eval()
        task = cls(
            **splits,
            problem=BilevelProblem(WeightedRisk(model), WeightedRisk(model)),
            lam0=flatten(net),
            theta0=flatten(model),
            num_classes=found.num_classes,
            source=found.source,
            model=model,
            batchnorm=s.batchnorm,
            counts=splits["train"][1].bincount(),
            net=net,
            reading=s.reading,
            l2=s.l2,
            transform=data.crop_and_flip if s.augment else None,
        )
        refresh_batchnorm(model, task.theta0, task.train[0])
        return task.on(s.weights)

    def on(self, kind: str) -> "LongTail":
        """The same task with other weights, one of `WEIGHTS`."""
        start = self.lam0.new_ones(self.num_classes)
        if kind == "balanced":
            start = class_balanced(self.counts)
        elif kind == "focal":
            start = self.lam0.new_full((1,), GAMMA)
        elif kind in ("network", "frozen"):
            start = flatten(self.net)
        own = [part[: int(self.counts.sum())] for part in self.train]
        if kind == "meta":
            own = [torch.cat(pair) for pair in zip(own, self.validation, strict=True)]
        task = replace(self, lam0=start, kind=kind, train=tuple(own))
        mean = self.reading == "normalised" and kind != "focal"  # which is a loss, no weighting

        def weight(lam: Tensor, batch: Any, losses: Tensor) -> Tensor:
            sigma = task.V(lam, losses) if kind in READ else lam[batch[1]]
            return sigma / sigma.mean() if mean else sigma

        slope = kind in READ and self.reading == "full"
        inner = WeightedRisk(self.model, weight=weight, l2=self.l2, weight_slope=slope)
        task.problem = BilevelProblem(inner, WeightedRisk(self.model))
        return task

    def V(self, lam: Tensor, losses: Tensor) -> Tensor:  # noqa: N802
        """The weights of examples with these losses, shape (n,); of weights that read them."""
        if self.kind == "focal":
            return focal(lam, losses)
        return 2 * predict(self.net, lam, losses[:, None]).sigmoid().squeeze(1)

    # -- for the method

    def attach(self, method: Any, s: Any) -> None:
        """As other supervised tasks.

        Raises:
            ValueError: for weights over their mean in a batch that processes share.
        """
        super().attach(method, s)
        if self.group is not None and s.reading == "normalised":
            raise ValueError(
                "reading: 'normalised' divides by the mean weight of a batch, of which a process "
                "has only a part; expected another"
            )

    def _sampler(self, s: Any, size: int, salt: int, split: tuple[Tensor, Tensor]) -> Batches:
        sampler = super()._sampler(s, size, salt, split)
        sampler.transform = self.transform
        return sampler

    def project(self, lam: Tensor) -> Tensor:
        """Where lam may be: everywhere, zero or above for a class; as it is if not learned."""
        if self.kind not in LEARNED:
            return self.lam0
        return lam.clamp(min=0) if self.kind == "class" else lam

    # -- for the log and the result

    def measure(self, lam: Tensor, theta: Tensor) -> dict[str, float]:
        """As every classifier; ``tuning_error``, 1 less the accuracy, chooses."""
        row = super().measure(lam, theta)
        return {**row, "tuning_error": 1 - row["tuning_accuracy"]}

    def judge(self, lam: Tensor, theta: Tensor) -> float:
        """The share of the tuning images that is misclassified."""
        return 1 - evaluate(self.model, theta, self.tuning)["accuracy"]

    def baselines(self, s: LongTailSettings) -> dict[str, Callable[[], dict]]:
        """What the learned weights have to beat, by the run's own inner steps; see `RIVALS`."""
        return {kind: partial(plain, self.on(kind), s) for kind in RIVALS if kind != self.kind}

    def class_accuracy(self, theta: Tensor) -> list[float]:
        """The accuracy on the test images of each class."""
        x, y = self.test
        return [evaluate(self.model, theta, (x[y == c], y[y == c]))["accuracy"]
                for c in range(self.num_classes)]  # fmt: skip

    def class_weights(self, lam: Tensor, theta: Tensor) -> list[float]:
        """The mean weight of the training images of each class, as they are at theta."""
        if self.kind not in READ:
            return lam.tolist()
        x, y = self.train
        with torch.no_grad():
            outputs = torch.cat([predict(self.model, theta, part) for part in x.split(5_000)])
            weights = self.V(lam, F.cross_entropy(outputs, y, reduction="none"))
        return [float(weights[y == c].mean()) for c in range(self.num_classes)]

    def curve(self, lam: Tensor, losses: Tensor | None = None) -> dict[str, list[float]]:
        """V over the loss, as it was drawn and at lam; empty for weights that do not read it."""
        if self.kind not in READ:
            return {}
        losses = torch.linspace(0, 6, 61) if losses is None else losses
        with torch.no_grad():
            start, learned = (self.V(l, losses.to(l)).tolist() for l in (self.lam0, lam))
        return {"loss": losses.tolist(), "start": start, "learned": learned}

    def result(self, s: LongTailSettings, lam: Tensor, theta: Tensor) -> dict:
        """Sizes, accuracy and mean weight of each class, V over the loss; what one image is."""
        held = {name: len(getattr(self, name)[1]) for name in ("validation", "tuning", "test")}
        return {
            "counts": self.counts.tolist(),
            "sizes": {"train": len(self.train[1]), **held},
            "points": {name: round(100 / held[name], 2) for name in ("tuning", "test")},
            "class_accuracy": self.class_accuracy(theta),
            "class_weights": self.class_weights(lam, theta),
            "curve": self.curve(lam),
        }

    @classmethod
    def keep(cls, result: dict, given: dict[str, Any]) -> dict:
        """What the figure and the tables need."""
        names = ("counts", "sizes", "points", "class_accuracy", "class_weights", "curve")
        return {name: result[name] for name in names}

    @classmethod
    def table(cls, result: dict) -> str:
        """The rivals and the learned weights, at the chosen iterate and at the end; V; classes."""
        best, last, s = result["best"], result["history"][-1], result["settings"]
        rows = [(RIVALS[k], row, row["last_test_accuracy"])
                for k, row in result["baselines"].items()]  # fmt: skip
        rows.append((f"{s['weights']}, {s['method']}", best, last["test_accuracy"]))
        lines = [f"{'weights':<26} test accuracy, chosen   at the end"]
        for words, row, end in rows:
            lines.append(f"{words:<26} {100 * row['test_accuracy']:19.2f} % {100 * end:9.2f} %")
        points = result["points"]
        lines.append(
            f"{s['dataset']}, {s['model']}, imbalance {s['imbalance']:g}, seed {s['seed']}: chosen "
            f"at iteration {best['iteration']} of {last['iteration']} by "
            f"{result['sizes']['tuning']} images (one is {points['tuning']} points; of "
            f"{result['sizes']['test']} test images one is {points['test']}), "
            f"{last['seconds']:.0f} s"
        )
        first, rare = result["class_accuracy"][0], result["class_accuracy"][-1]
        lines.append(
            f"accuracy of the first class ({result['counts'][0]} images) {100 * first:.1f} %, of "
            f"the last ({result['counts'][-1]}) {100 * rare:.1f} %"
        )
        if result["curve"]:
            at = [round(len(result["curve"]["loss"]) * share) for share in (0.02, 0.17, 0.5)]
            told = ", ".join(
                f"V({result['curve']['loss'][i]:.1f}) {result['curve']['start'][i]:.2f} -> "
                f"{result['curve']['learned'][i]:.2f}"
                for i in at
            )
            lines.append(told)
        return as_text(lines, result["source"])


def _cut(
    y: Tensor, parts: list[tuple[int, int | None]], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows in random order: of class c the first parts[c][0], and parts[c][1] (or all) others."""
    first, second = [], []
    for c, (one, other) in enumerate(parts):
        of_class = (y == c).nonzero().squeeze(1)
        order = of_class[torch.randperm(len(of_class), generator=generator)]
        first.append(order[:one])
        second.append(order[one:] if other is None else order[one : one + other])
    return torch.cat(first), torch.cat(second)
