"""Text cleaning: learn one weight per weakly labelled text from a few texts to trust.

    f(theta)      = mean cross-entropy on validation texts
    g(lam, theta) = (1/n) sum_i lam_i * cross-entropy_i(theta),   lam in [0, 1]^N

theta are the last layers of a pretrained encoder and a linear head, the labels of g the majority
vote of labelling functions (`bilevel_lite.data.wrench`). SemEval's label is the relation of two
entities of the sentence; here, as in the code of the main paper's authors, the classifier reads the
sentence alone and is not told which two (WRENCH's own model is).

**What chooses.** The validation texts are split, anew for each seed: `tuning_share` of them choose
the iterate and the hyperparameters, by the share that is misclassified, f sees the others. The
weights are fitted to f's texts, so that these flatter whoever fits them hardest. Not by the loss:
it is lowest at the first of ten looks in nearly every run, with true labels too, where a weight
has been visited about once, and chooses the same iterate for every method. The price is a coarse
measure: YouTube has 120 validation texts, so that one is 0.8 points (1.7 of a half), SemEval 178
(0.6 and 1.1), TREC 500 (0.2 and 0.4). Beside the chosen iterate stands the last.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel_lite import data, text
from bilevel_lite.algorithms.method import Method
from bilevel_lite.data.batches import Batches
from bilevel_lite.data.wrench import TIES, Texts, WeakTexts, toy
from bilevel_lite.experiment.folder import RunError
from bilevel_lite.experiment.settings import Settings, require_batches, setting
from bilevel_lite.experiment.supervised import Supervised, evaluate, plain
from bilevel_lite.experiment.task import Column, as_text
from bilevel_lite.options import option
from bilevel_lite.params import flatten
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.tasks.text_variants import BASELINES, CROSS, INNER_LR, OUTER_LR, TOY
from bilevel_lite.tasks.wrong_labels import auc, precision, surest

__all__ = ["SIZES", "TextCleaning", "TextCleaningSettings"]

# training and validation texts; each dataset has its own test texts
SIZES = {"trec": (5033, 500), "semeval": (1749, 178), "youtube": (1586, 120), TOY: (120, 40)}
CHUNK = 64  # texts of one forward pass, where nothing is differentiated
PRECISIONS = {"float32": torch.float32, "float16": torch.float16}
LABELS = ("weak", "true", "validation")
LINUX = sys.platform.startswith("linux")


@dataclass(kw_only=True)
class TextCleaningSettings(Settings):
    """The numbers of a run, and the task's own."""

    dataset: str = setting(TOY, "the texts", known=tuple(SIZES))
    encoder: str = setting(
        "", "a folder or a name on the hub, 'tiny' (random weights), or nothing: bert-base-uncased "
        "where it can be had, else a folder found here, else tiny",
    )  # fmt: skip
    layers: str = option(
        "a number of layers, 'half' or 'all'",
        lambda v: v in ("half", "all") or (v.isdigit() and int(v) > 0),
        "1",
        help="how many of the last layers are trained; 'all' are the embeddings too",
    )
    pooling: str = setting("mean", "how a text's tokens become one", known=text.POOLINGS)
    max_length: int = setting(100, "tokens of a text that are read", least=3)
    ties: str = setting("first", "who wins a tied vote, the first class or a drawn one", known=TIES)
    uncovered: str = setting(
        "tie", "texts without any weak label, a tie of all classes, or left out",
        known=("tie", "left_out"),
    )  # fmt: skip
    labels: str = setting(
        "weak", "what is trained on, voted or true labels, or the validation texts alone",
        known=LABELS,
    )  # fmt: skip
    weights: str = setting(
        "learned", "learned; for comparison all one, or balanced: one number for each class",
        known=("learned", "one", "balanced"),
    )  # fmt: skip
    texts: int = setting(0, "training texts, drawn; 0 is all", least=0)
    tuning_share: float = option(
        "from 0 up to, not including, 1",
        lambda v: 0 <= v < 1,
        0.5,
        help="of the validation texts that choose iterate and settings; 0: f's own ones do",
    )
    kept_in: str = setting(
        "float32", "the frozen layers' activations, once computed", known=tuple(PRECISIONS)
    )


@dataclass(kw_only=True)
class TextCleaning(Supervised, name="text_cleaning"):
    """Learn one weight per weakly labelled text from a few texts to trust.

    Batches are (x, y, index): x positions in the classifier's table of frozen activations (token
    ids, if all layers are trained), index positions among the training texts.

    Attributes:
        lam0: Start of the weights, 0.5 each, shape (N,); if they are not learned, what they stay.
        train: (x, voted y), N texts.
        y_clean: Their true labels, which only measures and the baseline see.
        strings: The training texts.
        classes: Names of the labels.
        notes: Texts left out and cut off, classes that no vote gave; for the result.
        learned: Whether the weights move.
    """

    y_clean: Tensor
    strings: list[str]
    classes: list[str]
    notes: dict[str, Any]
    learned: bool = True

    Settings: ClassVar[type] = TextCleaningSettings
    figures: ClassVar[str] = "bilevel_lite.tasks.text_figures"
    defaults: ClassVar[dict[str, Any]] = {
        "method": "aid-kfac", "fisher": "empirical", "damping": 1e-3, "inner_optimizer": "adamw",
        "outer_momentum": 0.9, "outer_steps": 150, "batch_size": 32, "outer_batch_size": 32,
        "curvature_batch_size": 32, "cross_batch_size": CROSS,
    }  # fmt: skip
    criterion: ClassVar[str] = "tuning_error"
    columns: ClassVar[tuple[Column, ...]] = (
        *Supervised.columns,
        Column("test_accuracy", "at the end", ".1f", 17, 100, spread=True, at="last"),
        Column("auc", "AUC", ".3f", 7),
    )

    @classmethod
    def settings(cls, **given: Any) -> TextCleaningSettings:
        """The settings of a run, those that were not given by their defaults.

        Of the toy texts the encoder is the tiny one; AdamW's step is smaller with more layers, and
        the step on the weights is the method's (1 where they do not move). J has 128 texts, or as
        many as there are.

        Raises:
            ValueError: for a name that is not known, or a value out of range.
        """
        own: dict[str, Any] = {
            "inner_lr": INNER_LR.get(given.get("layers", "1"), INNER_LR["half"]),
            "cross_batch_size": min(CROSS, given.get("texts", 0) or CROSS),
        }
        if given.get("weights", "learned") == "learned":
            own["outer_lr"] = OUTER_LR.get(given.get("method", cls.defaults["method"]), 1.0)
        if given.get("dataset", TOY) == TOY:
            own |= {"encoder": "tiny", "outer_steps": 20, "outer_batch_size": 20}
            own["cross_batch_size"] = min(32, own["cross_batch_size"])
        s = super().settings(**{**own, **given})
        train, validation = SIZES[s.dataset]
        if s.texts and s.texts > train:
            raise ValueError(f"texts: got {s.texts}, expected 1 to {train}, or 0 for all")
        kept = validation - round(s.tuning_share * validation)
        require_batches(s, s.texts or train, kept)
        return s

    @classmethod
    def make(cls, s: TextCleaningSettings, device: torch.device) -> "TextCleaning":
        """Load the texts, vote, split the validation texts, cut the encoder.

        Raises:
            ValueError: as the encoder says, and the vote.
            DataError: if the texts cannot be had.
        """
        sets = toy() if s.dataset == TOY else data.load(s.dataset)
        generator, classes = torch.Generator().manual_seed(s.seed), len(sets.classes)
        uncovered = "abstain" if s.uncovered == "left_out" else "tie"
        voted = data.majority(sets.train.weak, classes, s.ties, uncovered, generator)
        rows = (voted >= 0).nonzero().squeeze(1)
        left_out = len(voted) - len(rows)
        if s.texts:
            rows = rows[torch.randperm(len(rows), generator=generator)[: s.texts]]
        places = (s.encoder, s.layers, s.pooling, s.max_length, s.kept_in)
        sets, cut, model, (x, x_valid, x_test) = _prepared(
            s.dataset, tuple(rows.tolist()), *places, device
        )
        n = len(sets.valid.y)
        tuned = round(s.tuning_share * n)
        # in order again: sorted by length, and a batch is as wide as its longest text
        first, second = (r.sort().values for r in data.split(n, (n - tuned, tuned), generator))
        validation, tuning = ((x_valid[r].to(device), sets.valid.y[r].to(device))
                              for r in (first, second))  # fmt: skip
        with torch.no_grad():
            model.head.weight.copy_(
                0.02 * torch.randn(model.head.weight.shape, generator=generator)
            )
        y_clean, y = sets.train.y.to(device), voted[rows].to(device)
        inner = WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], mask=model.mask)
        never = sorted(set(range(classes)) - set(y.unique().tolist()))
        task = cls(
            problem=BilevelProblem(inner, WeightedRisk(model)),
            model=model,
            lam0=torch.full((len(y),), 0.5, device=device),
            theta0=flatten(model),
            train=(x.to(device), y),
            validation=validation,
            tuning=tuning if tuned else validation,
            test=(x_test.to(device), sets.test.y.to(device)),
            num_classes=classes,
            source="; ".join(filter(None, [sets.source, model.description])),
            y_clean=y_clean,
            strings=sets.train.texts,
            classes=sets.classes,
            notes={
                "left out": left_out, "cut off": cut,
                "never voted": [sets.classes[c] for c in never],
            },
        )  # fmt: skip
        return task.on(s.labels, s.weights)

    def on(self, labels: str, weights: str) -> "TextCleaning":
        """The same task with another training set and other weights.

        Args:
            labels: ``"weak"``, ``"true"`` or ``"validation"``.
            weights: ``"learned"``; ``"one"``; or ``"balanced"``: one for each class, such that the
                classes have the shares that they have among f's texts, of mean 1. That needs
                neither J nor a solver, and is what learned weights have to beat.
        """
        x, y, y_clean = *self.train, self.y_clean
        if labels == "validation":
            (x, y), y_clean = self.validation, self.validation[1]
        elif labels == "true":
            y = y_clean
        learned = weights == "learned"
        start = torch.full((len(y),), 0.5 if learned else 1.0, device=y.device)
        if weights == "balanced":
            here, there = (
                row.bincount(minlength=self.num_classes) for row in (y, self.validation[1])
            )
            share = (there / here.clamp(min=1))[y]
            start = (share / share.mean()).to(start)
        return replace(self, train=(x, y), y_clean=y_clean, lam0=start, learned=learned)

    # -- for the method

    def _sampler(self, s: Any, size: int, salt: int, split: tuple[Tensor, Tensor]) -> Batches:
        # trained on validation texts, of which there may be less than a batch
        return super()._sampler(s, min(size, len(split[1])), salt, split)

    def project(self, lam: Tensor) -> Tensor:
        """Clip the weights to [0, 1]; leave them as they are where they are not learned."""
        return lam.clamp(0, 1) if self.learned else self.lam0

    def attach(self, method: Method, s: TextCleaningSettings) -> None:
        """Start the high-water mark of the memory anew."""
        super().attach(method, s)
        if self.lam0.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.lam0.device)
        elif LINUX:
            with suppress(OSError):  # where that is not allowed, the mark is the whole process's
                Path("/proc/self/clear_refs").write_text("5")

    # -- for the log and the result

    def measure(self, lam: Tensor, theta: Tensor) -> dict[str, float]:
        """Loss and accuracy on tuning and test texts, and what the weights say of the labels.

        ``tuning_error``: one less the accuracy on the tuning texts, which chooses.
        ``auc``: how well low weights tell wrong labels from right ones (0.5 is chance).
        """
        row = {
            f"{name}_{key}": value
            for name in ("tuning", "test")
            for key, value in evaluate(self.model, theta, getattr(self, name), CHUNK).items()
        }
        row[self.criterion] = 1 - row["tuning_accuracy"]
        if 0 < int(self.wrong.sum()) < len(self.wrong):
            row["auc"] = auc(lam, self.wrong)
            row["precision"] = precision(lam, self.wrong)
            row["right_weight"] = float(lam[~self.wrong].mean())
            row["wrong_weight"] = float(lam[self.wrong].mean())
        return row

    def judge(self, lam: Tensor, theta: Tensor) -> float:
        """The share of the tuning texts that is misclassified."""
        return 1 - evaluate(self.model, theta, self.tuning, CHUNK)["accuracy"]

    @property
    def wrong(self) -> Tensor:
        """Mask of the training labels that are wrong, shape (N,)."""
        return self.train[1] != self.y_clean

    def baselines(self, s: TextCleaningSettings) -> dict[str, Callable[[], dict]]:
        """Plain training with the run's inner steps, the iterate chosen like that of the weights.

        ``noisy``: on the voted labels (what the main paper calls its baseline); ``balanced``: the
        same with one weight for each class (see `on`); ``validation``: on f's validation texts
        alone; ``clean``: on the true labels, which nobody has.
        """
        if s.labels != "weak":
            return {}
        return {name: partial(plain, self.on(*kind[:2]), s) for name, kind in BASELINES.items()}

    def result(self, s: TextCleaningSettings, lam: Tensor, theta: Tensor) -> dict:
        """Sizes and what one text is worth, the weights, the peak of the memory, 12 texts."""
        wrong, weights = self.wrong.cpu(), lam.cpu()
        counts = {
            "train": len(wrong), "wrong": int(wrong.sum()),
            **{name: len(getattr(self, name)[1]) for name in ("validation", "tuning", "test")},
        }  # fmt: skip
        edges = torch.linspace(0, 1, 41)
        return {
            "sizes": {**counts, **self.notes},
            "points": {name: round(100 / counts[name], 2) for name in ("tuning", "test")},
            "weights": {
                "edges": edges.tolist(),
                "right": torch.histogram(weights[~wrong], edges).hist.int().tolist(),
                "wrong": torch.histogram(weights[wrong], edges).hist.int().tolist(),
            },
            "memory": self._memory(),
            "surest": self.rejected(lam, theta),
        }

    def rejected(self, lam: Tensor, theta: Tensor, count: int = 12) -> list[dict[str, Any]]:
        """The training texts that the weights are surest are mislabelled, surest first.

        Lowest weight first; among equal ones (many are 0) the highest loss under theta.

        Returns:
            ``weight``, ``text``, ``given`` (its voted label) and ``true``, by name, of each.
        """
        if not self.learned:
            return []
        return [
            {
                "weight": round(float(lam[i]), 4),
                "text": self.strings[i],
                "given": self.classes[self.train[1][i]],
                "true": self.classes[self.y_clean[i]],
            }
            for i in surest(self, lam, theta, count, CHUNK).tolist()
        ]

    def _memory(self) -> dict[str, Any]:
        """The peak since the method was made: of the device, or of this whole process."""
        if self.lam0.is_cuda:
            peak = torch.cuda.max_memory_allocated(self.lam0.device)
            return {"of": "device", "peak_mib": round(peak / 2**20, 1)}
        if not LINUX:
            return {}
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        return {"of": "process", "peak_mib": round(peak / 2**10, 1)}

    @classmethod
    def keep(cls, result: dict, given: dict[str, Any]) -> dict:
        """Weights, memory, and the texts that are rejected."""
        return {name: result[name] for name in ("points", "weights", "memory", "surest")}

    @classmethod
    def table(cls, result: dict) -> str:
        """Baselines and learned weights, at the chosen iterate and at the end; what is rejected."""
        known, best, last = result["baselines"], result["best"], result["history"][-1]
        rows = [(text, known[name], "last_") for name, (*_, text) in BASELINES.items()
                if name in known]  # fmt: skip
        rows = [(words, row, row[f"{at}test_accuracy"]) for words, row, at in rows]
        rows.append(("learned weights", best, last["test_accuracy"]))
        s, sizes, points = result["settings"], result["sizes"], result["points"]
        lines = [f"{'trained on':<24} test loss  accuracy, chosen  at the end"]
        for words, row, end in rows:
            accuracy = 100 * row["test_accuracy"]
            lines.append(
                f"{words:<24} {row['test_loss']:9.4f} {accuracy:15.2f} % {100 * end:9.2f} %"
            )
        lines.append(
            f"{s['method']} on {s['dataset']}, layers {s['layers']}, seed {s['seed']}: chosen at "
            f"iteration {best['iteration']} of {last['iteration']} by {sizes['tuning']} texts (one "
            f"is {points['tuning']} points; of {sizes['test']} test texts one is {points['test']}),"
            f" {last['seconds']:.0f} s"
        )
        if result["memory"]:
            lines[-1] += ", peak {peak_mib:.0f} MiB of the {of}".format(**result["memory"])
        if "auc" in best:
            lines.append(
                f"{sizes['wrong']} of {sizes['train']} labels are wrong, told by the weight: AUC "
                f"{best['auc']:.4f}; mean weight {best['right_weight']:.3f} of right and "
                f"{best['wrong_weight']:.3f} of wrong labels"
            )
        if sizes["never voted"]:
            lines.append(f"no training text has the label {', '.join(sizes['never voted'])}")
        for row in result["surest"][:4]:
            lines.append(
                f"  {row['weight']:.3f} {row['given']} (true {row['true']}): {row['text']}"
            )
        return as_text(lines, f"{s['dataset']}; {result['source']}")


def encoder_of(place: str, length: int) -> text.Encoder:
    """The encoder of a run's settings.

    Raises:
        ValueError: as it says itself, naming the setting.
        RunError: without transformers.
    """
    try:
        return text.encoder(place or None, length)
    except text.EncoderError as error:
        raise ValueError(f"encoder: {error}") from error
    except ImportError as error:
        raise RunError(str(error)) from error


def trained(encoder: text.Encoder, layers: str) -> int | str:
    """How many of the last layers the setting means: a number, or "all"."""
    many = {"half": max(1, encoder.layers // 2)}.get(layers, layers)
    return many if many == "all" else int(many)


@lru_cache(maxsize=1)
def _prepared(
    dataset: str, rows: tuple[int, ...], place: str, layers: str, pooling: str, length: int,
    kept_in: str, device,
) -> tuple[WeakTexts, list[int], text.TextClassifier, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Texts, how many are cut off, model, inputs by split; of the training texts some rows.

    Validation and test texts are sorted by their length. The last one made is kept: frozen layers
    take longer than many a run, and whoever trains on all texts has the same ones for each seed.
    """
    sets = toy() if dataset == TOY else data.load(dataset)
    all_ = sets.train
    some = all_._replace(texts=[all_.texts[i] for i in rows], y=all_.y[list(rows)])
    sets = sets._replace(train=some)
    encoder = encoder_of(place, length)
    ordered, cut = [], 0
    for name in ("train", "valid", "test"):
        part: Texts = getattr(sets, name)
        lengths = encoder.lengths(part.texts)
        order = torch.arange(len(lengths)) if name == "train" else lengths.argsort(stable=True)
        ordered.append(part._replace(texts=[part.texts[i] for i in order], y=part.y[order]))
        cut += int((lengths > encoder.max_length).sum())
    sets = sets._replace(train=ordered[0], valid=ordered[1], test=ordered[2])
    many = trained(encoder, layers)
    with torch.random.fork_rng(devices=[]):
        model = text.TextClassifier(encoder, len(sets.classes), many, pooling).to(device)
    ids = encoder.ids([one for part in ordered for one in part.texts])
    x = ids.to(device) if many == "all" else model.remember(ids, PRECISIONS[kept_in])
    return sets, cut, model, x.split([len(part.y) for part in ordered])
