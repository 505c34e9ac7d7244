"""What auxiliary pretraining is made of: macro-F1, pairs of batches, cosines, texts and models."""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel_lite import data, text
from bilevel_lite.algorithms.aid import AID
from bilevel_lite.algorithms.method import draw
from bilevel_lite.data.pretraining import EndTask, toy
from bilevel_lite.risk import SumOfRisks
from bilevel_lite.tasks.text_cleaning import PRECISIONS, encoder_of, trained
from bilevel_lite.tasks.text_variants import TOY

__all__ = ["Cosines", "Together", "macro_f1", "prepared"]


def macro_f1(guess: Tensor, y: Tensor) -> float:
    """Mean over the classes of 2 right / (guessed + true), of classes that occur in either.

    Example:
        >>> from bilevel_lite.tasks.pretraining import macro_f1
        >>> macro_f1(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]))  # (4/5 + 2/3) / 2
        0.7333333333333334
    """
    n = 1 + int(torch.cat([guess, y]).max())
    right = y[guess == y].bincount(minlength=n)
    both = guess.bincount(minlength=n) + y.bincount(minlength=n)
    return float((2 * right / both.double())[both > 0].mean())


class Together:
    """Samplers that are drawn together: a batch of a sum of risks, one part a term."""

    def __init__(self, *samplers: Any):
        self.samplers = samplers

    def draw(self) -> tuple:
        """Return the next batch of each."""
        return tuple(map(draw, self.samplers))

    def state_dict(self) -> dict:
        """Return where each one is."""
        return {str(k): s.state_dict() for k, s in enumerate(self.samplers) if hasattr(s, "draw")}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned."""
        for k, own in state.items():
            self.samplers[int(k)].load_state_dict(own)


class Cosines(AID):
    r"""AID with h_j = - cos(grad L_j, grad f) on the parameters that both share, for no solver.

    META-TARTAN's heuristic: a loss whose gradient points where f's does gets more weight. No
    curvature, one step looked ahead, and the length of the gradients left out. L_j are unweighted
    means; f's gradient is taken through the end task's own head (TARTAN keeps another for it).

    Cost of a step: inner_steps + 3 gradients.
    Source: Dery et al. (2022), arXiv 2109.07437, algorithm 1.
    """

    def _hypergradient(self, outer, curvature, cross, theta=None, lam=None, **how):
        value, b = self._f_theta(outer)
        inner, h = self.problem.inner_loss, torch.zeros_like(self.lam)
        shared = _shared(inner).to(self.theta.device)
        for j, term in enumerate(inner.terms(self.lam, cross)):
            at = self.theta.clone().requires_grad_()
            (g,) = torch.autograd.grad(term.risk.losses(term.read(at), term.batch).mean(), at)
            h[j] = -F.cosine_similarity(g[shared], b[shared], 0)
            self._spend("gradient", cross)
        return h, SimpleNamespace(outer_loss=value, solve=None)


def _shared(risk: SumOfRisks) -> Tensor:
    """Mask of theta: the parameters that every term has."""
    sizes = risk.parts[0].sizes
    both = set.intersection(*(set(part.picks) for part in risk.parts))
    return torch.cat([torch.full((n,), i in both) for i, n in enumerate(sizes)])


def scrambled(texts: list[str], generator: torch.Generator) -> list[str]:
    """As many words in each text, every word drawn from all of them (a control: no sense left)."""
    words = [one.split() for one in texts]
    pool = [word for one in words for word in one]
    places = torch.randint(len(pool), (len(pool),), generator=generator).tolist()
    drawn = iter(pool[k] for k in places)
    return [" ".join(next(drawn) for _ in one) for one in words]


@lru_cache(maxsize=1)
def prepared(
    dataset: str, rows: tuple[int, ...], place: str, layers: str, length: int, copies: int,
    masked: float, masked_texts: str, head_steps: int, kept_in: str, device: torch.device,
) -> SimpleNamespace:  # fmt: skip
    """Texts, the two models, inputs by split, masked copies; the last one made is kept.

    The hidden places and the masked-word head are those of one draw, whatever the seed of a run.
    """
    sets: EndTask = toy() if dataset == TOY else data.pretraining.load(dataset)
    part = sets.train
    kept = part._replace(texts=[part.texts[i] for i in rows], y=part.y[list(rows)])
    sets = sets._replace(train=kept)
    encoder = encoder_of(place, length)
    splits, draws = (sets.train, sets.valid, sets.test), torch.Generator().manual_seed(0)
    strings = [one for split in splits for one in split.texts]
    own = sets.train.texts
    if masked_texts == "scrambled":
        own = scrambled(own, torch.Generator().manual_seed(0))
    hidden = text.hide(encoder, own, draws, copies, masked)
    many = trained(encoder, layers)
    model = text.TextClassifier(encoder, len(sets.classes), many, "mean", draws).to(device)
    ids = encoder.ids(strings)
    if many == "all":
        x, first = ids.to(device), None
    else:
        wide = max(ids.shape[1], hidden.ids.shape[1])
        both = [F.pad(i, (0, wide - i.shape[1]), value=encoder.pad) for i in (ids, hidden.ids)]
        x = model.remember(torch.cat(both), PRECISIONS[kept_in])[: len(ids)]
        first = len(ids)
    words = text.MaskedWords(model, hidden, first, draws).to(device)
    y = hidden.y.to(device)
    notes = {
        "copies": len(y), "vocabulary": len(hidden.vocabulary), "hidden words": int((y >= 0).sum()),
        "cut off": int((encoder.lengths(strings) > encoder.max_length).sum()),
    }  # fmt: skip
    if head_steps:
        notes["head loss"] = round(words.fit(y, head_steps, draws), 3)
    return SimpleNamespace(
        sets=sets,
        models=(model, words),
        x=x.split([len(split.y) for split in splits]),
        masked=(torch.arange(len(y), device=device), y),
        start={name: p.detach().clone() for name, p in words.named_parameters()},
        notes=notes,
    )
