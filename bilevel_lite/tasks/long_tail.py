"""Long-tailed classes: learn one weight per class from a small balanced validation set.

    f(theta)      = mean cross-entropy on the validation set, as many examples of each class
    g(lam, theta) = (1/n) sum_i lam_{y_i} * cross-entropy_i(theta) + l2 ||theta||^2,   lam >= 0

The data are scikit-learn's digits. Of class c = 0 .. C-1 the training set keeps
round(MOST * ratio^(c / (C-1))) examples (the rule of Cui et al., 2019, arXiv 1901.05555): MOST of
the first class, MOST * ratio of the last; the test set stays as it is.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel_lite import data, models
from bilevel_lite.experiment.settings import Settings, setting
from bilevel_lite.experiment.supervised import Supervised, best_fit
from bilevel_lite.params import flatten
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.risk import WeightedRisk

__all__ = ["LongTail", "LongTailSettings"]

MOST, TRUSTED = 80, 20  # training examples of the first class; of each in validation and in tuning
L2 = (1e-4, 1e-3, 1e-2)  # among which each baseline chooses, on the tuning split


@dataclass(kw_only=True)
class LongTailSettings(Settings):
    """The numbers of a run, and the task's own."""

    model: str = setting("linear", "the model", known=models.FLAT)
    ratio: float = setting(0.05, "size of the rarest class, as a share of the most frequent one's")
    l2: float = setting(1e-4, "coefficient of ||theta||^2 in the inner loss")


@dataclass(kw_only=True)
class LongTail(Supervised, name="longtail"):
    """Learn one weight per class of a long-tailed training set from a balanced validation set.

    Attributes:
        counts: Training examples of each class, shape (C,).
    """

    counts: Tensor

    Settings: ClassVar[type] = LongTailSettings
    # The lowest tuning loss of `bilevel-lite search longtail --method aid-cg --seeds 1 --trials 32
    # --over inner_lr=0.05:1 outer_lr=0.3:300 l2=1e-5:1e-2` (digits, seed 0; rounded: 0.251). By it
    # training with equal weights has 0.354, with those by inverse frequency 0.294.
    defaults: ClassVar[dict[str, Any]] = {"inner_lr": 0.24, "outer_lr": 4.7, "l2": 4e-5}

    @classmethod
    def make(cls, s: LongTailSettings, device: torch.device) -> "LongTail":
        """Split each class, thin it out by the rule, build the model.

        Raises:
            ValueError: if ``ratio`` leaves a class without examples.
        """
        if not 0.5 / MOST < s.ratio <= 1:
            raise ValueError(f"ratio: got {s.ratio}, expected above {0.5 / MOST:.4f}, up to 1")
        digits, generator = data.load("digits"), torch.Generator().manual_seed(s.seed)
        splits = [[], [], []]
        for c in range(digits.num_classes):
            left = round(MOST * s.ratio ** (c / (digits.num_classes - 1)))
            of_class = (digits.y == c).nonzero().squeeze(1)
            order = of_class[torch.randperm(len(of_class), generator=generator)]
            parts = order[: left + 2 * TRUSTED].split([left, TRUSTED, TRUSTED])
            for split, part in zip(splits, parts, strict=True):
                split.append(part)
        train, validation, tuning = (
            (digits.x[index].to(device), digits.y[index].to(device))
            for index in map(torch.cat, splits)
        )
        with torch.random.fork_rng(devices=[]):  # layers draw from torch's global generator
            torch.manual_seed(s.seed)
            model = models.build(s.model, digits.x.shape[1], digits.num_classes).to(device)
        inner = WeightedRisk(model, weight=lambda lam, batch: lam[batch[1]], l2=s.l2)
        return cls(
            problem=BilevelProblem(inner, WeightedRisk(model)),
            lam0=torch.ones(digits.num_classes, device=device),
            theta0=flatten(model),
            train=train,
            validation=validation,
            tuning=tuning,
            test=(digits.x_test.to(device), digits.y_test.to(device)),
            num_classes=digits.num_classes,
            model=model,
            counts=train[1].bincount(),
        )

    def project(self, lam: Tensor) -> Tensor:
        """Keep the weights from turning negative."""
        return lam.clamp(min=0)

    def baselines(self, s: LongTailSettings) -> dict[str, Any]:
        """Equal weights, weights by inverse frequency, and the balanced examples alone.

        The run's own theta is of the training set, as the first two are; what is trained anew with
        the learned weights sees the validation set too, as the two "on both" do.
        """
        splits = {"": self.train, ", on both": self._both()}
        fits = {f"equal{on}": partial(best_fit, self, split, s, L2) for on, split in splits.items()}
        for on, split in splits.items():
            frequency = split[1].bincount().to(self.lam0) / len(split[1])
            rare = 1 / (self.num_classes * frequency[split[1]])
            fits[f"inverse{on}"] = partial(best_fit, self, split, s, L2, rare)
        return fits | {"validation only": partial(best_fit, self, self.validation, s, L2)}

    def result(self, s: LongTailSettings, lam: Tensor, theta: Tensor) -> dict:
        """The weight that each class has learned, beside its size; and training anew with it."""
        out = {"counts": self.counts.tolist(), "weights": lam.tolist()}
        if s.baselines:
            weights = torch.cat([lam[self.train[1]], torch.ones_like(self.validation[0][:, 0])])
            out["retrained"] = best_fit(self, self._both(), s, L2, weights)
        return out

    def _both(self) -> tuple[Tensor, Tensor]:
        """Training and validation examples."""
        x, y = (torch.cat(pair) for pair in zip(self.train, self.validation, strict=True))
        return x, y
