r"""Masked words: what a text must say at places that are hidden from the encoder.

    l_i = mean over the hidden places t of text i of   - log softmax(E u(h_it) + c)[word_it]
    u(h) = LayerNorm(gelu(U h + u_0))

h_it is the last layer's vector at place t of the text in which the words at the hidden places stand
as [MASK]. E, the decoder, is the encoder's own frozen embeddings, of the words that can be asked
for alone. A masked-word head that was kept with the encoder is not read: u and c are trained first,
`MaskedWords.fit`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_lite.refuse import at_least, require_generator
from bilevel_lite.surroundings import differentiating
from bilevel_lite.text.classifier import TextClassifier
from bilevel_lite.text.encoders import Encoder

__all__ = ["IGNORED", "MaskedTexts", "MaskedWords", "hide"]

IGNORED = -100  # at the slots that a short text does not fill


@dataclass
class MaskedTexts:
    """Copies of texts with hidden words; N copies, of each text as many one after the other.

    Attributes:
        ids: Token ids with [MASK] at the hidden places, shape (N, L).
        places: Where they are, shape (N, M), int64; 0 in the slots that a text does not fill.
        y: What stood there, as a position in ``vocabulary``, shape (N, M); -100 in empty slots.
        vocabulary: Token ids of the words that are asked for, increasing, shape (V,).
    """

    ids: Tensor
    places: Tensor
    y: Tensor
    vocabulary: Tensor


def hide(
    encoder: Encoder,
    texts: list[str],
    generator: torch.Generator,
    copies: int = 1,
    share: float = 0.15,
) -> MaskedTexts:
    """Hide a share of the tokens of each text, once and for all.

    Masks that are drawn anew at each step make the inner loss another one at each call, and forbid
    activations that are computed once; drawn once they are part of the data. Every hidden word is
    replaced by [MASK] (BERT leaves a tenth as they are and a tenth becomes random words).

    Args:
        encoder: Gives the ids; its tokenizer must have a [MASK].
        texts: n of them.
        generator: CPU generator of the places.
        copies: How often each text is hidden, with other places.
        share: Of the tokens that are not special ([CLS], [UNK], padding ...), rounded, at least 1.

    Returns:
        `MaskedTexts` of n * copies texts; its vocabulary are the tokens of these texts.

    Raises:
        TypeError: if the generator is none.
        ValueError: for a tokenizer without [MASK], a number out of range, or a text without words.

    Example:
        >>> from bilevel_lite import text
        >>> made = text.hide(text.tiny(), ["Who built the old bridge ?"], torch.Generator())
        >>> made.places.shape, int((made.y >= 0).sum())
        (torch.Size([1, 1]), 1)
    """
    mask = getattr(encoder.tokenizer, "mask_token_id", None)
    if mask is None:
        raise ValueError(
            f"encoder: the tokenizer of {encoder.name} has no [MASK] token, so no word can be "
            "hidden; take an encoder that was pretrained with masked words, such as a BERT"
        )
    require_generator(generator)
    at_least("copies", copies, 1)
    if not 0 < share < 1:
        raise ValueError(f"share: got {share}, expected a number between 0 and 1")
    ids = encoder.ids(texts)
    special = torch.tensor(sorted({*encoder.tokenizer.all_special_ids, encoder.pad}))
    words = ~torch.isin(ids, special)
    if bool((~words.any(1)).any()):
        bad = int((~words.any(1)).nonzero()[0])
        raise ValueError(f"texts: number {bad} has no word that could be hidden; leave it out")
    vocabulary = ids[words].unique()
    ids, words = ids.repeat_interleave(copies, 0), words.repeat_interleave(copies, 0)
    counts = (share * words.sum(1).double()).round().long().clamp(min=1)
    order = torch.rand(ids.shape, generator=generator, device=generator.device).to(ids.device)
    order = order.masked_fill(~words, -1.0)
    places = order.topk(int(counts.max()), 1).indices
    filled = torch.arange(places.shape[1]) < counts[:, None]
    places = torch.where(filled, places, 0)
    y = torch.searchsorted(vocabulary, ids.gather(1, places)).masked_fill(~filled, IGNORED)
    hidden = torch.zeros_like(ids).scatter_add(1, places, filled.long()) > 0
    return MaskedTexts(ids.masked_fill(hidden, mask), places, y, vocabulary)


class MaskedWords(nn.Module):
    r"""A classifier's encoder with a masked-word head: logits (n, M, V) of the hidden words.

        logits_it = E u(h_it) + c,     u(h) = LayerNorm(gelu(U h + u_0))

    It shares the classifier's encoder, so that both losses move the same last layers; U, u_0 and
    the norm are its own, and train; E and c stay as they are. u is applied at every token, hidden
    or not, so that the classifier's mask of padding holds for it as for every other layer
    (``WeightedRisk(mask=words.mask)``); E only where a word is hidden, which saves six sevenths of
    the largest product.

    Args:
        classifier: The classifier whose encoder is shared.
        texts: What `hide` returned.
        first: If the classifier remembers the copies' activations: the first one's position in its
            table, after which they stand in order; None: they go through the whole encoder.
        generator: CPU generator of U (by default torch's own).

    Raises:
        ValueError: if the copies do not stand at ``first`` in the classifier's table; in `forward`,
            if that table was replaced.

    Example:
        >>> from bilevel_lite import text
        >>> encoder, draws = text.tiny(), torch.Generator().manual_seed(0)
        >>> made = text.hide(encoder, ["Who built the old bridge ?", "Where is it ?"], draws)
        >>> words = text.MaskedWords(text.TextClassifier(encoder, 2, generator=draws), made)
        >>> words(torch.tensor([0, 1])).shape  # two texts, one word of each, nine in all
        torch.Size([2, 1, 9])
    """

    @differentiating
    def __init__(
        self,
        classifier: TextClassifier,
        texts: MaskedTexts,
        first: int | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        # the encoder's parameters are shared, the head's are not: so the classifier is no submodule
        self.encoder, self._of, self.first = classifier.encoder, (classifier,), first
        self._table = None if first is None else classifier.remembered(first, texts.ids)
        embeddings = classifier.encoder.get_input_embeddings().weight.detach()
        width = embeddings.shape[1]
        self.transform = nn.utils.skip_init(nn.Linear, width, width, dtype=embeddings.dtype)
        self.norm = nn.LayerNorm(width, dtype=embeddings.dtype)
        like = {"dtype": embeddings.dtype, "device": getattr(generator, "device", None)}
        draws = torch.randn(width, width, generator=generator, **like)
        with torch.no_grad():
            self.transform.weight.copy_(0.02 * draws)
            self.transform.bias.zero_()
        self.register_buffer("decoder", embeddings[texts.vocabulary].clone())
        self.register_buffer("bias", embeddings.new_zeros(len(texts.vocabulary)))
        self.register_buffer("ids", texts.ids if first is None else texts.ids[:0])
        self.register_buffer("places", texts.places)
        self.register_buffer("vocabulary", texts.vocabulary)

    @property
    def classifier(self) -> TextClassifier:
        """The classifier whose encoder is shared."""
        return self._of[0]

    def _texts(self, x: Tensor) -> Tensor:
        if self.first is None:
            return self.ids[x]
        if self.classifier._table is not self._table:
            raise ValueError(
                "classifier: has remembered other texts since these words were made of its table; "
                "make MaskedWords again"
            )
        return x + self.first

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (n, M, V), of the copies number x, shape (n,)."""
        tokens = self.classifier.tokens(self._texts(x))
        return self.decode(self.norm(F.gelu(self.transform(tokens))), self.places[x])

    def decode(self, u: Tensor, places: Tensor) -> Tensor:
        """Return E u + c at some places (n, M) of each text, shape (n, M, V)."""
        some = u.gather(1, places[..., None].expand(-1, -1, u.shape[-1]))
        return some @ self.decoder.T + self.bias

    def mask(self, batch: Any) -> Tensor:
        """True where a token stands, bool, shape (n, L): for ``WeightedRisk(mask=...)``."""
        return self.classifier.mask((self._texts(batch[0]),))

    @differentiating
    def fit(
        self, y: Tensor, steps: int, generator: torch.Generator, lr: float = 1e-3, size: int = 256
    ) -> float:
        """Train U, u_0, the norm and c on the hidden words, by Adam; the encoder stays as it is.

        The vectors h at the hidden places are computed once.

        Args:
            y: Of the texts that were hidden, shape (N, M).
            steps: Number of steps.
            generator: CPU generator of the batches of words.
            lr: Step size.
            size: Words of a step.

        Returns:
            The mean loss over the last tenth of the steps.

        Raises:
            TypeError, ValueError: if the generator is none; if a number is below 1.

        Cost: one forward pass on every copy, then nothing but the head.
        """
        require_generator(generator)
        at_least("steps", steps, 1)
        at_least("size", size, 1)
        with torch.no_grad():
            parts = []
            for x in torch.arange(len(y), device=y.device).split(64):
                tokens, kept = self.classifier.tokens(self._texts(x)), y[x] != IGNORED
                at = self.places[x][..., None].expand(-1, -1, tokens.shape[-1])
                parts.append(tokens.gather(1, at)[kept])
            h, words = torch.cat(parts), y[y != IGNORED]
            counts = words.bincount(minlength=len(self.bias)).to(h)
            self.bias.copy_(((counts + 1) / (counts.sum() + len(counts))).log())
        free = [*self.transform.parameters(), *self.norm.parameters()]
        bias = self.bias.clone().requires_grad_()
        optimizer, said = torch.optim.Adam([*free, bias], lr), []
        for _ in range(steps):
            rows = torch.randint(len(words), (size,), generator=generator, device=generator.device)
            rows = rows.to(h.device)
            u = self.norm(F.gelu(self.transform(h[rows])))
            loss = F.cross_entropy(u @ self.decoder.T + bias, words[rows])
            grads = torch.autograd.grad(loss, [*free, bias])
            for p, grad in zip([*free, bias], grads, strict=True):
                p.grad = grad
            optimizer.step()
            said.append(loss.detach())
        for p in free:
            p.grad = None
        self.bias.copy_(bias.detach())
        tail = said[-max(1, steps // 10) :]
        return float(torch.stack(tail).mean())
