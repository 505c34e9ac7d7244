r"""Auxiliary pretraining: an end task and masked words share an encoder; what is each text worth?

    g(lam, theta) = mean_i l_i(theta) + (1/m) sum_j V_lam(m_j) m_j(theta)
    f(theta)      = mean l on held-out texts, or (as the main paper has it) on the training texts

l is the end task's cross-entropy, m_j the masked-word loss of a copy of a training text whose
hidden words were drawn once (`bilevel_lite.text.hide`). theta are the last layers of the encoder,
which both share, a linear head and the transform of the masked-word head; the decoder is the
encoder's own frozen embeddings. V_lam(m) = 2 sigmoid(network(m / log V)), V words: a text's loss as
a share of that of a guess. It starts near 1, where both losses count alike (TARTAN-MT); inner steps
follow V_lam grad m_j, as in `bilevel_lite.tasks.long_tail`, and V' enters H.

**What chooses.** The development texts are split, anew for each seed: `tuning_share` of them choose
the iterate and the settings, by their loss; f sees the others if it is to see held-out texts.

**What is measured.** Micro-F1 (of one label a text: the accuracy) of ChemProt, macro-F1 of the
others, on all test texts and on those that are not training texts too (`pretraining.seen`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_lite import data, text
from bilevel_lite.algorithms.method import Method
from bilevel_lite.data.batches import Batches
from bilevel_lite.data.pretraining import seen
from bilevel_lite.experiment import methods
from bilevel_lite.experiment.settings import Settings, require_batches, setting
from bilevel_lite.experiment.supervised import Supervised, plain
from bilevel_lite.experiment.task import Column, as_text
from bilevel_lite.options import option
from bilevel_lite.params import flatten, predict
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.risk import SumOfRisks, WeightedRisk
from bilevel_lite.solvers import Identity
from bilevel_lite.tasks.long_tail import network
from bilevel_lite.tasks.pretraining_parts import Cosines, Together, macro_f1, prepared
from bilevel_lite.tasks.pretraining_study import RIVALS
from bilevel_lite.tasks.text_cleaning import CHUNK, PRECISIONS
from bilevel_lite.tasks.text_variants import INNER_LR, TOY

__all__ = ["METRIC", "SIZES", "Pretraining", "PretrainingSettings", "macro_f1"]

# training and development texts; each set has its own test texts
SIZES = {
    "chemprot": (4169, 2427), "citation_intent": (1688, 114), "hyperpartisan": (516, 63),
    "sciie": (3219, 455), TOY: (120, 40),
}  # fmt: skip
METRIC = {"chemprot": "micro"}  # of the others macro
# what weighs a masked text: nothing learns from any; all 1; the network as drawn, or learned; and
# one weight for each of the two losses, moved by cosines
WEIGHTS = ("none", "fixed", "frozen", "network", "cosine")
OUTER = ("held_out", "train")
LEARNED = ("network", "cosine")
MEASURES = ("test_loss", "test_accuracy", "test_f1", "test_new_f1")


@dataclass(kw_only=True)
class PretrainingSettings(Settings):
    """The numbers of a run, and the task's own."""

    dataset: str = setting(TOY, "the texts", known=tuple(SIZES))
    encoder: str = setting(
        "", "a folder or a name on the hub, 'tiny' (random weights), or nothing: as text_cleaning"
    )
    layers: str = option(
        "a number of layers, 'half' or 'all'",
        lambda v: v in ("half", "all") or (v.isdigit() and int(v) > 0),
        "1",
        help="how many of the last layers are trained; 'all' are the embeddings too",
    )
    max_length: int = setting(100, "tokens of a text that are read", least=3)
    weights: str = setting("network", "what weighs a masked text", known=WEIGHTS)
    outer: str = setting("held_out", "the texts of f", known=OUTER)
    texts: int = setting(0, "training texts, drawn; 0 is all", least=0)
    copies: int = setting(2, "how often each text is masked", least=1)
    masked_texts: str = setting(
        "own", "the training texts, or as many words drawn at random from all of them",
        known=("own", "scrambled"),
    )  # fmt: skip
    masked: float = option(
        "a number between 0 and 1", lambda v: 0 < v < 1, 0.15, help="share of a text's tokens"
    )
    head_steps: int = setting(1000, "Adam steps on the masked-word head before the run", least=0)
    words_batch_size: int = setting(
        8,
        "masked texts of an inner batch (H and J: as many as of the end task); 0: as training",
    )
    hidden: int = setting(20, "units of V's hidden layer", least=1)
    tuning_share: float = option(
        "between 0 and 1",
        lambda v: 0 < v < 1,
        0.5,
        help="of the development texts that choose iterate and settings",
    )
    kept_in: str = setting(
        "float32", "the frozen layers' activations, once computed", known=tuple(PRECISIONS)
    )


@dataclass(kw_only=True)
class Pretraining(Supervised, name="pretraining"):
    """Learn what each masked text is worth to an end task that shares its encoder.

    Batches of g are a pair, those of the end task (x, y, index) and of masked texts (copy, words,
    index); of f a single (x, y, index) in a tuple.

    Attributes:
        words: The masked-word model, which shares the classifier's encoder.
        masked: (copies, words at their hidden places).
        net: The network in V; its own parameters are the start of lam.
        new: Of each test text, whether it is none of the training texts.
        kind: What weighs a masked text, one of `WEIGHTS`.
        metric: ``"micro"`` or ``"macro"``.
        notes: For the result.
        s: The settings that it was made from.
    """

    words: text.MaskedWords
    masked: tuple[Tensor, Tensor]
    net: nn.Module
    new: Tensor
    metric: str
    notes: dict[str, Any]
    s: PretrainingSettings
    kind: str = "network"

    Settings: ClassVar[type] = PretrainingSettings
    figures: ClassVar[str] = "bilevel_lite.tasks.pretraining_figures"
    defaults: ClassVar[dict[str, Any]] = {
        "method": "aid-kfac", "fisher": "empirical", "damping": 1e-2, "inner_optimizer": "adamw",
        "outer_optimizer": "adam", "outer_lr": 0.01, "outer_steps": 60, "batch_size": 16,
        "outer_batch_size": 16, "curvature_batch_size": 16, "cross_batch_size": 16,
    }  # fmt: skip
    dropped: ClassVar[tuple[str, ...]] = ("tuning_accuracy", "tuning_f1")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("tuning_loss", "tuning loss"),
        Column("test_f1", "test F1", ".1f", 17, 100, spread=True),
        Column("test_f1", "at the end", ".1f", 17, 100, spread=True, at="last"),
    )

    @classmethod
    def settings(cls, **given: Any) -> PretrainingSettings:
        """The settings of a run, those that were not given by their defaults.

        Of the toy texts the encoder is the tiny one; AdamW's step is smaller with more layers;
        the two weights that cosines move take steps of plain gradient descent.

        Raises:
            ValueError: for a name that is not known, or a value out of range.
        """
        own: dict[str, Any] = {"inner_lr": INNER_LR.get(given.get("layers", "1"), INNER_LR["half"])}
        if given.get("dataset", TOY) == TOY:
            own |= {"encoder": "tiny", "outer_steps": 10, "head_steps": 200}
        if given.get("weights") == "cosine":
            own |= {"method": "aid-identity", "outer_optimizer": "sgd", "outer_lr": 0.1}
        s = super().settings(**{**own, **given})
        train, valid = SIZES[s.dataset]
        if s.texts > train:
            raise ValueError(f"texts: got {s.texts}, expected 1 to {train}, or 0 for all")
        kept = valid - round(s.tuning_share * valid)
        if not 0 < kept < valid:
            raise ValueError(
                f"tuning_share: got {s.tuning_share:g}, which leaves {kept} of {s.dataset}'s "
                f"{valid} development texts to f and {valid - kept} to choose by; expected some "
                "for both"
            )
        train = s.texts or train
        require_batches(s, train, train if s.outer == "train" else kept)
        if s.weights == "cosine" and not s.method.startswith("aid-"):
            raise ValueError(
                f"method: got {s.method!r} with weights='cosine', which has a direction of its own "
                "and no solver; expected 'aid-identity'"
            )
        return s

    @classmethod
    def make(cls, s: PretrainingSettings, device: torch.device) -> "Pretraining":
        """Load the texts, hide words, cut the encoder, train the masked-word head.

        Raises:
            ValueError: as the encoder says.
            DataError: if the texts cannot be had.
        """
        generator = torch.Generator().manual_seed(s.seed)
        n, valid = SIZES[s.dataset]
        rows = list(range(n))
        if s.texts:
            rows = torch.randperm(n, generator=generator)[: s.texts].tolist()
        asked = s.layers, s.max_length, s.copies, s.masked, s.masked_texts, s.head_steps, s.kept_in
        found = prepared(s.dataset, tuple(rows), s.encoder, *asked, device)
        (model, words), sets, start = found.models, found.sets, found.start
        tuned = round(s.tuning_share * valid)
        first, second = (
            r.sort().values for r in data.split(valid, (valid - tuned, tuned), generator)
        )
        held, tuning = ((found.x[1][r], sets.valid.y[r].to(device)) for r in (first, second))
        train = found.x[0], sets.train.y.to(device)
        with torch.no_grad():
            for name, value in start.items():  # what an earlier caller may have moved
                words.get_parameter(name).copy_(value)
            shape = model.head.weight.shape
            model.head.weight.copy_(0.02 * torch.randn(shape, generator=generator))
        with torch.random.fork_rng(devices=[]):  # layers draw from torch's global generator
            torch.manual_seed(s.seed)
            net = network(s.hidden).to(device)
        task = cls(
            problem=BilevelProblem(WeightedRisk(model), WeightedRisk(model)),
            lam0=flatten(net),
            theta0=flatten(model),
            train=train,
            validation=held if s.outer == "held_out" else train,
            tuning=tuning,
            test=(found.x[2], sets.test.y.to(device)),
            num_classes=len(sets.classes),
            source="; ".join(filter(None, [sets.source, model.description])),
            model=model,
            words=words,
            masked=found.masked,
            net=net,
            new=~seen(sets.test, sets.train),
            metric=METRIC.get(s.dataset, "macro"),
            notes=found.notes,
            s=s,
        )
        return task.on(s.weights)

    def on(self, kind: str) -> "Pretraining":
        """The same task with other weights, one of `WEIGHTS`."""
        start = {"network": flatten(self.net), "frozen": flatten(self.net)}
        one = self.lam0.new_ones(1)
        start |= {"none": one, "fixed": one, "cosine": self.lam0.new_zeros(2)}
        task = replace(self, kind=kind, lam0=start[kind])

        def constant(k: int) -> Callable:
            return lambda lam, batch: task.shares(lam)[k].expand(len(batch[1]))

        end: dict[str, Any] = {"mask": self.model.mask}
        aux: dict[str, Any] = {"mask": self.words.mask}
        if kind in ("network", "frozen"):
            aux |= {"weight": lambda lam, batch, losses: task.V(lam, losses), "weight_slope": True}
        elif kind == "none":
            end["weight"] = constant(0)
        else:
            aux["weight"] = constant(1)
        if kind == "cosine":
            end["weight"] = constant(0)
        risks = [WeightedRisk(self.model, **end)]
        if kind != "none":
            risks.append(WeightedRisk(self.words, **aux))
        inner = SumOfRisks(risks)
        f = SumOfRisks([WeightedRisk(self.model, mask=self.model.mask)], model=inner.model)
        task.problem, task.theta0 = BilevelProblem(inner, f), flatten(inner.model)
        return task

    def V(self, lam: Tensor, losses: Tensor) -> Tensor:  # noqa: N802
        """The weights of masked texts with these losses, 2 sigmoid(network(m / log V))."""
        share = losses / math.log(len(self.words.bias))
        return 2 * predict(self.net, lam, share[:, None]).sigmoid().squeeze(1)

    def shares(self, lam: Tensor) -> Tensor:
        """The weights of end task and masked words, shape (2,), where each has one.

        Fixed: lam, 1 for both. Moved by cosines: 2 softmax(lam); as in TARTAN the cosines move lam
        without the softmax's Jacobian.
        """
        if self.kind != "cosine":
            return lam.expand(2)
        return 2 * lam.softmax(0)

    # -- for the method

    def batches(self, s: Any) -> dict[str, Any]:
        """The four roles: those of g, H and J a pair of batches, that of f one alone."""
        roles = super().batches(s)
        out = {"outer_batch": Together(roles["outer_batch"])}
        sizes = {
            "inner_batch": s.words_batch_size, "curvature_batch": s.curvature_batch_size,
            "cross_batch": s.cross_batch_size,
        }  # fmt: skip
        for salt, (role, size) in enumerate(sizes.items(), 10):
            out[role] = Together(roles[role])
            if self.kind != "none":
                generator = torch.Generator().manual_seed(1_000_003 * (salt + 1) + s.seed)
                size = min(size or len(self.train[1]), len(self.masked[1]))
                out[role] = Together(roles[role], Batches(*self.masked, size, generator))
        return {name: out[name] for name in roles}

    def fixed_batches(self, s: Any) -> tuple[list, list]:
        """Fixed pairs of minibatches of g, and minibatches of f."""
        roles = self.batches(s)
        sizes = (len(self.train[1]), s.batch_size), (len(self.validation[1]), s.outer_batch_size)
        return tuple(
            [roles[role].draw() for _ in range(max(1, n // (size or n)))]
            for role, (n, size) in zip(("inner_batch", "outer_batch"), sizes, strict=True)
        )

    def project(self, lam: Tensor) -> Tensor:
        """Leave lam as it is where it is not learned."""
        return lam if self.kind in LEARNED else self.lam0

    def method(self, s: Any) -> Method:
        """That of the settings; cosines where they move lam."""
        if self.kind != "cosine":
            return super().method(s)
        options = {"solver": lambda s: Identity(1.0), "inner_steps": methods.STEPS}
        return methods.build(s, self, methods.Recipe(Cosines, options=options))

    # -- for the log and the result

    def read(self, theta: Tensor) -> Tensor:
        """The part of theta that the classifier has."""
        return self.problem.inner_loss.parts[0](theta)

    @torch.no_grad()
    def logits(self, theta: Tensor, x: Tensor) -> Tensor:
        """The classifier's logits, shape (n, C)."""
        mine = self.read(theta)
        return torch.cat([predict(self.model, mine, part) for part in x.split(CHUNK)])

    def f1(self, guess: Tensor, y: Tensor) -> float:
        """Micro- or macro-F1, as the set has it."""
        if self.metric == "micro":
            return float((guess == y).double().mean())
        return macro_f1(guess, y)

    def measure(self, lam: Tensor, theta: Tensor) -> dict[str, float]:
        """Loss, accuracy and F1 on tuning and test texts; F1 on the test texts that are new."""
        row = {}
        for name in ("tuning", "test"):
            x, y = getattr(self, name)
            logits = self.logits(theta, x)
            guess = logits.argmax(1)
            row[f"{name}_loss"] = float(F.cross_entropy(logits, y))
            row[f"{name}_accuracy"] = float((guess == y).double().mean())
            row[f"{name}_f1"] = self.f1(guess, y)
        new = self.new.to(y.device)
        row["test_new_f1"] = self.f1(guess[new], y[new])
        return row

    def judge(self, lam: Tensor, theta: Tensor) -> float:
        """The loss on the tuning texts."""
        x, y = self.tuning
        return float(F.cross_entropy(self.logits(theta, x), y))

    def baselines(self, s: PretrainingSettings) -> dict[str, Callable[[], dict]]:
        """What learned weights have to beat, by the run's own inner steps; see `RIVALS`."""
        return {
            kind: partial(plain, self.on(kind), s, MEASURES) for kind in RIVALS if kind != self.kind
        }

    @torch.no_grad()
    def word_losses(self, theta: Tensor, most: int = 1024) -> Tensor:
        """The masked-word losses of the first copies, shape (at most ``most``,)."""
        risk, part = self.problem.inner_loss.risks[1], self.problem.inner_loss.parts[1]
        rows = zip(*(p[:most].split(CHUNK) for p in self.masked), strict=True)
        return torch.cat([risk.losses(part(theta), batch) for batch in rows])

    def weighing(self, lam: Tensor, theta: Tensor) -> dict[str, Any]:
        """The weights as they are at theta: V over the loss, or the two shares; losses met."""
        if self.kind in ("none", "fixed"):
            return {}
        if self.kind == "cosine":
            return {"shares": self.shares(lam).tolist()}
        losses = self.word_losses(theta)
        grid = torch.linspace(0, float(losses.max()), 61).to(losses)
        with torch.no_grad():
            start, learned = (self.V(at.to(lam), grid).tolist() for at in (self.lam0, lam))
            weights = self.V(lam, losses)
        q = torch.tensor([0.05, 0.5, 0.95]).to(losses)
        return {
            "loss": grid.tolist(), "start": start, "learned": learned,
            "losses": losses.quantile(q).tolist(), "weights": weights.quantile(q).tolist(),
        }  # fmt: skip

    def result(self, s: PretrainingSettings, lam: Tensor, theta: Tensor) -> dict:
        """Sizes, what one test text is worth in points of accuracy, the weights."""
        held = {name: len(getattr(self, name)[1]) for name in ("validation", "tuning", "test")}
        sizes = {"train": len(self.train[1]), **held, "new": int(self.new.sum()), **self.notes}
        return {
            "sizes": sizes,
            "points": {name: round(100 / held[name], 2) for name in ("tuning", "test")},
            "metric": self.metric,
            "weighing": self.weighing(lam, theta),
        }

    @classmethod
    def keep(cls, result: dict, given: dict[str, Any]) -> dict:
        """Sizes, and what the weights have become."""
        return {name: result[name] for name in ("sizes", "points", "metric", "weighing")}

    @classmethod
    def table(cls, result: dict) -> str:
        """Rivals and learned weights, at the chosen iterate and at the end."""
        s, sizes, best = result["settings"], result["sizes"], result["best"]
        last = {f"last_{name}": result["history"][-1][name] for name in MEASURES}
        rows = {RIVALS[name]: row for name, row in result["baselines"].items()}
        rows[RIVALS.get(s["weights"], f"{s['weights']}, {s['method']}")] = {**best, **last}
        title = f"{result['metric']}-F1"
        lines = [f"{'masked texts weighed by':<24} tuning loss  {title}  new texts  at the end"]
        for name, row in rows.items():
            f1, new, end = (100 * row[k] for k in ("test_f1", "test_new_f1", "last_test_f1"))
            lines.append(f"{name:<24} {row['tuning_loss']:11.4f} {f1:9.2f} {new:10.2f} {end:11.2f}")
        lines.append(
            f"{s['dataset']}, layers {s['layers']}, f on {s['outer'].replace('_', ' ')} texts, "
            f"seed {s['seed']}: chosen at iteration {best['iteration']} of "
            f"{result['history'][-1]['iteration']}; one of {sizes['test']} test texts is "
            f"{result['points']['test']} points of accuracy; {sizes['new']} are no training texts"
        )
        return as_text(lines, f"{s['dataset']}; {result['source']}")
