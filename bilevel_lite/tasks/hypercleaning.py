"""Data hypercleaning: learn one weight per training example from a small clean validation set.

    f(theta)      = mean cross-entropy on the validation set
    g(lam, theta) = (1/n) sum_i lam_i * cross-entropy_i(theta) + l2 ||theta||^2,   lam in [0, 1]^N

A share of the training labels is redrawn at random; nobody says which.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bilevel_lite import data, models
from bilevel_lite.experiment import job, search
from bilevel_lite.experiment.settings import Settings, require_batches, setting, written
from bilevel_lite.experiment.supervised import (
    BATCHNORM,
    Supervised,
    best_fit,
    evaluate,
    refresh_batchnorm,
    train,
    train_minibatch,
)
from bilevel_lite.experiment.task import Column, as_text
from bilevel_lite.params import flatten
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.tasks.wrong_labels import auc, pictures, precision, surest

__all__ = [
    "DEFAULTS", "Hypercleaning", "SIZES", "auc", "build", "compare", "evaluate", "mean_test_loss",
    "pictures", "precision", "project", "refresh_batchnorm", "run", "surest", "train",
    "train_minibatch",
]  # fmt: skip

# train, validation (outer loss), tuning (hyperparameters, stopping); the test set is its own.
# The main paper does not say how it splits CIFAR-10, and its 50,000 + 5,000 + 5,000 do not fit.
SIZES = {
    "mnist": (50_000, 5_000, 5_000),
    "cifar10": (40_000, 5_000, 5_000),
    "digits": (1_000, 200, 237),
}

# what a redrawn label becomes: number of classes -> transition matrix, None is any class
NOISE = {"uniform": lambda classes: None, "pair": data.pair_flips}


@dataclass(kw_only=True)
class HypercleaningSettings(Settings):
    """The numbers of a run, and the task's own; the defaults of a dataset are in `DEFAULTS`."""

    dataset: str = setting("digits", "the data", known=tuple(SIZES))
    model: str = setting("linear", "the model", known=tuple(models.MODELS))
    noise: float = setting(0.5, "fraction of training labels redrawn")
    noise_kind: str = setting(
        "uniform", "what a redrawn label becomes, any class or the next one", known=tuple(NOISE)
    )
    l2: float = setting(1e-5, "coefficient of ||theta||^2 in the inner loss")
    stem: str = setting("cifar", "first layers of resnet18", known=("cifar", "imagenet"))
    batchnorm: str = setting(
        "batch", "its statistics, taken in inner steps, at each outer iteration, or once",
        known=BATCHNORM,
    )  # fmt: skip


# Chosen on the tuning split (of seed 0, but for digits), never on the test set.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mnist": {
        "outer_steps": 400,
        "outer_lr": 1000.0,
        "batch_size": 1000,
        "curvature_batch_size": 2000,
    },
    # The lowest tuning loss (mean of seeds 10 to 14, 400 outer steps), one setting after the other:
    # outer_lr of 20, 60, 100, 200 (0.257, 0.243, 0.245, 0.345; 10 inner steps), l2 of 1e-5, 1e-4,
    # 1e-3 (0.258, 0.243, 0.358), inner_steps of 5, 10, 20 (0.242, 0.243, 0.243). The rest is older.
    "digits": {
        "outer_steps": 400,
        "inner_steps": 5,
        "inner_lr": 0.5,
        "outer_lr": 60.0,
        "batch_size": 250,
        "curvature_batch_size": 1000,
        "l2": 1e-4,
    },
    "cifar10": {
        "outer_steps": 1000,
        "inner_lr": 0.02,
        "outer_lr": 1000.0,
        "batch_size": 128,
        "curvature_batch_size": 128,
        "outer_batch_size": 128,
        "cross_batch_size": 128,
        "evaluate_every": 20,
    },
}

# The l2 coefficients among which each baseline chooses, on the tuning split.
BASELINE_L2 = (1e-5, 1e-4, 1e-3)

BASELINES = {
    "noisy": "noisy training labels + validation set",
    "validation": "validation set only",
    "clean": "clean training labels + validation set",
}


@dataclass(kw_only=True)
class Hypercleaning(Supervised, name="hyperclean"):
    """Learn one weight per training example from a small clean validation set.

    Batches are (x, y, index), index being positions among the training examples.

    Attributes:
        lam0: Start of the weights, 0.5 each, shape (N,).
        train: (x, noisy y), N examples.
        index: Their positions in the dataset, shape (N,).
        wrong: Mask of the training labels that are wrong, shape (N,).
        y_clean: The training labels before the noise.
        image_shape: (height, width) of a grey input, (3, height, width) of a coloured one.
        l2: Coefficient of ||theta||^2.
    """

    index: Tensor
    wrong: Tensor
    y_clean: Tensor
    image_shape: tuple[int, ...]
    l2: float

    Settings: ClassVar[type] = HypercleaningSettings
    columns: ClassVar[tuple[Column, ...]] = (*Supervised.columns, Column("auc", "AUC", ".3f", 7))

    @classmethod
    def settings(cls, **given: Any) -> HypercleaningSettings:
        """The settings of a run, those that were not given by the defaults of the dataset.

        Raises:
            ValueError: for a name that is not known, or a value out of range.
        """
        own = DEFAULTS.get(given.get("dataset", "digits"), {})
        s = super().settings(**{**own, **given})
        require_batches(s, *SIZES[s.dataset][:2])
        if s.stem != "cifar" and s.model != "resnet18":
            raise ValueError(
                f"stem: got {s.stem!r}, but only a resnet18 has another, not {s.model}"
            )
        return s

    @classmethod
    def make(cls, s: HypercleaningSettings, device: torch.device) -> "Hypercleaning":
        """Load the data, split it, redraw labels, build the model: all from the settings' seed."""
        dataset = data.load(s.dataset)
        if len(dataset.image_shape) == 3:
            dataset = data.standardise(dataset)
        options = {"stem": s.stem} if s.model == "resnet18" else {}
        with torch.random.fork_rng(devices=[]):  # layers draw from torch's global generator
            torch.manual_seed(s.seed)
            if s.model not in models.FLAT:
                dataset = dataset.as_images()
            model = models.build(
                s.model, tuple(dataset.x.shape[1:]), dataset.num_classes, **options
            )
        return build(
            dataset,
            model,
            s.noise,
            s.l2,
            torch.Generator().manual_seed(s.seed),
            device,
            transition=NOISE[s.noise_kind](dataset.num_classes),
            batchnorm=s.batchnorm,
        )

    @classmethod
    def config(cls, s: HypercleaningSettings) -> dict:
        """The settings alone, as in the folders of earlier versions."""
        return written(s)

    @classmethod
    def label(cls, s: HypercleaningSettings) -> str:
        """Dataset and model."""
        return f"{s.dataset}-{s.model}"

    def project(self, lam: Tensor) -> Tensor:
        """Clip the weights to [0, 1]."""
        return project(lam)

    def measure(self, lam: Tensor, theta: Tensor) -> dict[str, float]:
        """As every classifier, and how well the weights tell wrong labels."""
        row = super().measure(lam, theta)
        if 0 < int(self.wrong.sum()) < len(self.wrong):
            row["auc"] = auc(lam, self.wrong)
            row["precision"] = precision(lam, self.wrong)
        return row

    def baselines(self, s: HypercleaningSettings) -> dict[str, Callable[[], dict]]:
        """Training without weights; l2 and the iterate are chosen on the tuning split."""
        x, y = self.validation

        def trained(labels: Tensor | None) -> dict:
            if labels is None:
                return self._best_fit(s, (x, y))
            return self._best_fit(s, (torch.cat([self.train[0], x]), torch.cat([labels, y])))

        labels = {"noisy": self.train[1], "validation": None, "clean": self.y_clean}
        return {name: partial(trained, labels[name]) for name in BASELINES}

    def _best_fit(self, s: HypercleaningSettings, split, weights: Tensor | None = None) -> dict:
        """Vector models by L-BFGS, once for each l2 of a grid; the others by SGD with the run's."""
        if s.model in models.FLAT:
            return best_fit(self, split, s, BASELINE_L2, weights)
        return best_fit(self, split, s, (s.l2,), weights, minibatch=True)

    def result(self, s: HypercleaningSettings, lam: Tensor, theta: Tensor) -> dict:
        """Everything that the table and the figure need, and no more."""
        edges, wrong, weights = torch.linspace(0, 1, 41), self.wrong.cpu(), lam.cpu()
        out = {
            "sizes": {
                "train": len(self.train[1]),
                "wrong": int(wrong.sum()),
                "validation": len(self.validation[1]),
                "tuning": len(self.tuning[1]),
                "test": len(self.test[1]),
            },
            "weights": {
                "edges": edges.tolist(),
                "clean": torch.histogram(weights[~wrong], edges).hist.int().tolist(),
                "corrupted": torch.histogram(weights[wrong], edges).hist.int().tolist(),
            },
        }
        if s.baselines:
            x, y = (torch.cat(pair) for pair in zip(self.train, self.validation, strict=True))
            ones = torch.ones_like(self.validation[1], dtype=lam.dtype)
            out["retrained"] = self._best_fit(s, (x, y), torch.cat([lam, ones]))
        return {**out, "surest": pictures(self, lam, theta)}

    @classmethod
    def keep(cls, result: dict, given: dict[str, Any]) -> dict:
        """The pictures, in a study of the noise and on seed 0."""
        pictured = result["settings"]["seed"] == 0 and "noise" in given
        return {"surest": result["surest"]} if pictured else {}

    @classmethod
    def table(cls, result: dict) -> str:
        """Baselines, the learned weights, and what was learned about labels, as text."""
        known = result["baselines"]
        rows = [(text, known[name]) for name, text in BASELINES.items() if name in known]
        rows.append(("learned weights, as trained", result["best"]))
        if "retrained" in result:
            rows.append(("learned weights + validation, retrained", result["retrained"]))
        lines = [f"{'trained on':<42} test loss  test accuracy"]
        for text, row in rows:
            lines.append(
                f"{text:<42} {row['test_loss']:9.4f}  {100 * row['test_accuracy']:10.2f} %"
            )
        best, s = result["best"], result["settings"]
        lines.append(
            f"{s['method']} on {s['dataset']}, seed {s['seed']}: best tuning loss "
            f"{best['tuning_loss']:.4f} at iteration {best['iteration']}, after "
            f"{best['gradients']:.0f} gradients and {best['seconds']:.0f} s"
        )
        if "auc" in best:
            lines.append(
                f"corrupted or clean, told by the weight: AUC {best['auc']:.4f}, precision at the "
                f"noise rate {best['precision']:.4f}"
            )
        return as_text(lines, result["source"])

    @classmethod
    def draw(cls, stored: dict) -> dict[str, Any]:
        """The figure of runs, of the comparison of methods, or of a study.

        The study of the noise has a second one: what each solver is surest is mislabelled.
        """
        from bilevel_lite.tasks import cleaning_figures as figures

        drawers = {
            "hyperclean": figures.draw_hyperclean,
            "hyperclean_methods": figures.draw_hyperclean_methods,
            "hyperclean_study": figures.draw_study,
        }
        if stored["kind"] not in drawers:
            return super().draw(stored)
        out = {"": drawers[stored["kind"]](stored)}
        if stored["runs"][0].get("study") == "noise":
            out["_surest"] = figures.draw_noise_surest(stored)
        return out


def build(
    dataset: data.Dataset,
    model: nn.Module,
    noise: float = 0.5,
    l2: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    sizes: tuple[int, int, int] | None = None,
    transition: Tensor | None = None,
    batchnorm: str = "batch",
) -> Hypercleaning:
    """Split a dataset, redraw labels, and write down the two losses.

    Args:
        dataset: From `bilevel_lite.data.load`.
        model: Takes the dataset's x, gives logits. BatchNorm is put in evaluation mode, with the
            statistics of the first training examples (`refresh_batchnorm`).
        noise: Fraction of training labels redrawn.
        l2: Coefficient of ||theta||^2 in the inner loss.
        generator: CPU generator of the split and the noise; seed 0 by default.
        device: Where everything goes.
        sizes: (train, validation, tuning); by default `SIZES` of the dataset.
        transition: What a redrawn label becomes (`bilevel_lite.data.corrupt_labels`); by default
            any class, with the same probability.
        batchnorm: ``"batch"``, ``"refresh"`` or ``"frozen"``, see `Hypercleaning`.

    Returns:
        `Hypercleaning`.

    Raises:
        ValueError: if the sizes do not fit, noise or l2 is out of range, or ``batchnorm`` is
            unknown.
    """
    if batchnorm not in BATCHNORM:
        raise ValueError(f"batchnorm: got {batchnorm!r}, expected one of {BATCHNORM}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise: got {noise}, expected a number from 0 to 1")
    if sizes is None and dataset.name not in SIZES:
        raise ValueError(f"sizes: needed for {dataset.name!r}; known for {sorted(SIZES)}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parts = data.split(len(dataset.y), sizes or SIZES[dataset.name], generator)
    (x, y), validation, tuning = [
        (dataset.x[index].to(device), dataset.y[index].to(device)) for index in parts
    ]
    noisy, wrong = data.corrupt_labels(y, noise, dataset.num_classes, generator, transition)
    model = model.to(device).eval()
    inner = WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=l2)
    outer = WeightedRisk(model)
    theta0 = flatten(model)
    refresh_batchnorm(model, theta0, x)
    return Hypercleaning(
        problem=BilevelProblem(inner, outer),
        model=model,
        lam0=torch.full((len(noisy),), 0.5, dtype=x.dtype, device=device),
        theta0=theta0,
        train=(x, noisy),
        index=parts[0],
        wrong=wrong,
        y_clean=y,
        validation=validation,
        tuning=tuning,
        test=(dataset.x_test.to(device), dataset.y_test.to(device)),
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        l2=l2,
        source=dataset.source,
        batchnorm=batchnorm,
    )


def project(lam: Tensor) -> Tensor:
    """Clip the weights to [0, 1]."""
    return lam.clamp(0, 1)


def mean_test_loss(row: dict) -> float:
    """Mean over the seeds of the test loss at the chosen iterate; infinite if all diverged."""
    return search.mean_best(row, "test_loss")


def compare(rows: list[dict]) -> str:
    """The results of a comparison or a study as text, the lowest test loss first."""
    return search.table(rows, Hypercleaning.columns)


def run(
    dataset: str,
    model: str,
    method: str,
    seed: int,
    out: str,
    device: str | None = None,
    **options: Any,
) -> dict:
    """Learn one weight per training example; write log, checkpoints, result and figure to ``out``.

    Args:
        dataset: ``"mnist"``, ``"cifar10"`` or ``"digits"``.
        model: A key of `bilevel_lite.models.MODELS`.
        method: Its name, see `bilevel_lite.experiment.methods.by_name`.
        seed: Of the split, the noise, the initial parameters and the batches.
        out: The output folder, see `bilevel_lite.experiment.job.run`.
        device: Such as ``"cpu"``; CUDA if there, by default.
        **options: Further settings; None means the dataset's default.

    Returns:
        The result, as written to ``result.json``.

    Raises:
        ValueError: for an unknown name or a setting out of range.
        DataError: if the dataset cannot be had.
        RunError: if the folder cannot be used.
    """
    given = {name: value for name, value in options.items() if value is not None}
    named = {"dataset": dataset, "model": model, "method": method, "seed": seed}
    return job.run(Hypercleaning, Hypercleaning.settings(**named, **given), out, device)
