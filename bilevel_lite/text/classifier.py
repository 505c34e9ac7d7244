"""A classifier on an encoder: the last layers and a head train, the rest is computed once."""

import copy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_lite.refuse import at_least
from bilevel_lite.surroundings import differentiating
from bilevel_lite.text.encoders import Encoder, depth, learned_positions, require_ids

__all__ = ["POOLINGS", "Logits", "TextClassifier"]

POOLINGS = ("mean", "cls", "pooler")


class _Reached(Exception):
    """The activations that the first trained layer is given."""


class _Stop(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        if hasattr(layer, "attention_type"):  # ModernBERT asks its layers for it
            self.attention_type = layer.attention_type

    def forward(self, hidden_states, *_, **__):
        raise _Reached(hidden_states)


class _Given(nn.Module):
    """In place of the embeddings: what it is given."""

    def forward(self, *args, inputs_embeds=None, **_):
        return inputs_embeds if inputs_embeds is not None else args[1]


def _with(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """A shallow copy in which one submodule is another; everything else is shared."""
    made, (name, _, rest) = copy.copy(module), path.partition(".")
    child = module._modules[name]
    made._modules = {**module._modules, name: _with(child, rest, new) if rest else new}
    return made


def _place_of_layers(module: nn.Module) -> str:
    """Where the list of layers stands in an encoder; "" if it cannot be told."""
    for path, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) == depth(module):
            return path
    return ""


@dataclass
class _Table:
    """Activations of texts, one token a row, a row of zeros at the end; where each text starts."""

    rows: Tensor
    starts: Tensor
    lengths: Tensor
    frozen: list[nn.Parameter]  # what made the rows
    written: list[int]  # how often each had been written into
    sums: list[float]  # of each and of its squares

    def move(self, fn: Any) -> None:
        """Follow a module to another device; the precision stays."""
        self.rows = fn(self.rows).to(self.rows.dtype)
        self.starts, self.lengths = fn(self.starts), fn(self.lengths)

    def stamp(self) -> None:
        """Note that the rows are those of the parameters as they are."""
        self.written, self.sums = [p._version for p in self.frozen], self._sums()

    def _sums(self) -> list[float]:
        wide = [p.detach().double() for p in self.frozen]
        return [float(x) for p in wide for x in (p.sum(), p.square().sum())]

    def require_fresh(self) -> None:
        """Refuse rows that the frozen layers would not give any more."""
        if any(p.requires_grad for p in self.frozen):
            raise ValueError(
                "x: got positions, but layers that were frozen when their activations were "
                "remembered are trained now; give ids, or freeze them and call remember(ids) again"
            )
        if self.written == [p._version for p in self.frozen]:
            return
        if self.sums != self._sums():
            raise ValueError(
                "x: got positions, but the frozen layers have changed since their activations were "
                "remembered; call classifier.remember(ids) again"
            )
        self.stamp()  # the same values were written


def _positions(module: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """A row of positions for each text, so that their gradient goes text by text.

    Of its own accord BERT reads one row for all; RoBERTa, counting from its padding, a row each.
    """
    learned = learned_positions(module)
    takes = "position_ids" in signature(module.forward).parameters
    if not takes or learned is None or learned.padding_idx is not None:
        return {}
    return {"position_ids": torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)}


class Logits(nn.Module):
    """A Hugging Face sequence classifier as a function of one tensor: ids (n, L) -> logits (n, C).

    In evaluation mode; it shares the classifier's parameters, of which theta holds those that
    require a gradient.

    Args:
        classifier: ``AutoModelForSequenceClassification.from_pretrained(...)``, say.

    Raises:
        ValueError: for a model without a padding token in its configuration.

    Example:
        >>> from bilevel_lite import text
        >>> words, bert = text.tiny(words=30), text.transformers()
        >>> config = bert.BertConfig(
        ...     vocab_size=30, hidden_size=8, num_attention_heads=2, intermediate_size=16,
        ...     num_hidden_layers=2, num_labels=2, initializer_range=0.3,
        ... )
        >>> _ = torch.manual_seed(0)  # random weights; yours come from_pretrained(...)
        >>> classifier = bert.AutoModelForSequenceClassification.from_config(config)
        >>> ids = words.ids(["good", "good good", "good good good", "bad", "bad bad"])
        >>> right, labels = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
        >>> _ = classifier.base_model.requires_grad_(False)  # train the last layer and the head
        >>> _ = classifier.base_model.encoder.layer[-1:].requires_grad_(True)
        >>> model = text.Logits(classifier)
        >>> train = bl.WeightedRisk(
        ...     model, weight=lambda lam, b: lam[b[2]], l2=1e-3, mask=model.mask
        ... )
        >>> problem = bl.BilevelProblem(train, bl.WeightedRisk(model))
        >>> inner, outer = (ids, labels, torch.arange(5)), (ids, right)
        >>> at = problem, torch.full((5,), 0.5), bl.flatten(model), bl.KFAC(0.1, "empirical")
        >>> how = {"inner_lr": 0.1, "outer_lr": 0.5, "projection": lambda lam: lam.clamp(0, 1)}
        >>> method = bl.AID(*at, inner_batch=inner, outer_batch=outer, **how)
        >>> for _ in range(3):
        ...     step = method.step()
        >>> int(method.lam.argmin())  # the one wrong label has the lowest weight
        2
    """

    def __init__(self, classifier: nn.Module):
        super().__init__()
        pad = getattr(classifier.config, "pad_token_id", None)
        if pad is None:
            raise ValueError(
                f"classifier: {type(classifier).__name__} has no padding token, so where a text "
                "ends cannot be seen; set classifier.config.pad_token_id"
            )
        self.classifier, self.pad = classifier.eval(), pad

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (n, C).

        Raises:
            ValueError: for ids of another vocabulary, an empty text, or one that is too long.
        """
        mask = x != self.pad
        require_ids(self.classifier, x, mask)
        given = _positions(self.classifier, mask)
        return self.classifier(input_ids=x, attention_mask=mask.long(), **given).logits

    def mask(self, batch: Any) -> Tensor:
        """True where a token stands, bool, shape (n, L): for ``WeightedRisk(mask=...)``."""
        return batch[0] != self.pad


class TextClassifier(nn.Module):
    r"""An encoder's last layers and a linear head: logits from token ids, or from positions.

        logits = W pool(h) + c,   pool = mean of h over the text's tokens | h of the first token |
                                  tanh(W_p h_first + c_p), the encoder's own pooler

    theta (`bilevel_lite.flatten`) are the last ``layers`` layers and the head; embeddings, pooler
    and the other layers are frozen. The encoder is copied and stays as it is. Evaluation mode from
    the start: with dropout there is no one function to differentiate.

        classifier = TextClassifier(encoder, 6, layers=1)
        x = classifier.remember(encoder.ids(texts))            # positions 0 .. n-1
        risk = bl.WeightedRisk(classifier, weight=..., mask=classifier.mask)
        batch = x[rows], y[rows], rows

    Args:
        encoder: From `encoder` or `tiny`.
        num_classes: C.
        layers: How many of the last layers to train; ``"all"`` (or -1): everything that the logits
            depend on, embeddings too.
        pooling: ``"mean"``, ``"cls"`` or ``"pooler"``.
        generator: A CPU generator for W (normal, 0.02; c is zero); by default torch's own.
        trim: Cut a batch to its longest text; without, ids are taken at the width they have.

    Raises:
        ValueError: for a number of layers that the encoder does not have or whose layers cannot be
            told, a pooling that is none of these, or a pooler that the encoder does not have.

    Example:
        >>> from bilevel_lite import text
        >>> words = text.tiny()
        >>> classifier = text.TextClassifier(words, 3, generator=torch.Generator().manual_seed(0))
        >>> ids = words.ids(["Which city ?", "How many bridges has it ?"])
        >>> x = classifier.remember(ids)
        >>> torch.allclose(classifier(x), classifier(ids), atol=1e-6)
        True
        >>> classifier.mask((x, None)).sum(1)
        tensor([5, 8])
    """

    @differentiating
    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        layers: int | str = 1,
        pooling: str = "mean",
        generator: torch.Generator | None = None,
        trim: bool = True,
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: got {pooling!r}, expected one of {', '.join(POOLINGS)}")
        if pooling == "pooler" and getattr(encoder.module, "pooler", None) is None:
            raise ValueError(
                f"pooling: {encoder.name} has no trained pooler; use pooling='mean' or 'cls'"
            )
        most = encoder.layers
        every = layers in ("all", -1)
        if not every and not (isinstance(layers, int) and 1 <= layers <= most):
            raise ValueError(f"layers: got {layers!r}, expected 1 to {most}, or 'all'")
        self.encoder = copy.deepcopy(encoder.module)
        float32 = {"dtype": torch.float32}
        self.head = nn.utils.skip_init(nn.Linear, encoder.width, num_classes, **float32)
        like = {**float32, "device": getattr(generator, "device", None)}
        weight = torch.randn(num_classes, encoder.width, generator=generator, **like)
        with torch.no_grad():
            self.head.weight.copy_(0.02 * weight)
            self.head.bias.zero_()
        path = _place_of_layers(self.encoder)
        if not every and not path:
            raise ValueError(
                f"layers: those of {encoder.name} ({type(self.encoder).__name__}) cannot be told "
                "apart; use layers='all'"
            )
        self.pad, self.pooling, self.trim = encoder.pad, pooling, trim
        self.trained: int | str = "all" if every else layers
        self._table: _Table | None = None
        self._halves: tuple = ()
        if every:
            self.encoder.requires_grad_(True)
            self._freeze_unused()
        else:
            stack = self.encoder.get_submodule(path)
            stack[most - layers :].requires_grad_(True)
            self._halves = self._cut(path, most - layers)
        self.eval()
        self.encoder_description = encoder.description

    # -- what is trained

    def _freeze_unused(self) -> None:
        """Freeze what the logits do not depend on, such as a pooler beside mean pooling."""
        ids = torch.arange(2)[:, None] + torch.arange(4)
        ids[ids == self.pad] = 5
        named = list(self.encoder.parameters())
        grads = torch.autograd.grad(self(ids).sum(), named, allow_unused=True)
        for p, grad in zip(named, grads, strict=True):
            p.requires_grad_(grad is not None)

    @property
    def description(self) -> str:
        """What is said with every number: the encoder, its pooling, what is trained."""
        count = sum(p.numel() for p in self.parameters() if p.requires_grad)
        size = f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
        what = "all layers" if self.trained == "all" else f"the last {self.trained} layers"
        what = "the last layer" if self.trained == 1 else what
        said = "its own pooler" if self.pooling == "pooler" else f"{self.pooling} pooling"
        return (
            f"{self.encoder_description}; {said}; {what} and the head trained ({size} parameters)"
        )

    # -- forward

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (n, C), of ids (n, L) or of positions (n,) in the table.

        Raises:
            ValueError: if x is neither, or of positions that are not remembered.
        """
        out, mask = self._outputs(x)
        return self.head(self._pooled(out, mask))

    def tokens(self, x: Tensor) -> Tensor:
        """Return the last layer's vector of each token, shape (n, L, width), of ids or positions.

        Raises:
            ValueError: as `forward`.
        """
        return self._outputs(x)[0].last_hidden_state

    def _outputs(self, x: Tensor) -> tuple[Any, Tensor]:
        ids, mask = self._read(x)
        if ids is not None:
            return self._run(self.encoder, mask, input_ids=ids), mask
        self._refuse_dropout()
        activations = self._activations(x, mask)
        return self._run(self._halves[1], mask, inputs_embeds=activations), mask

    def mask(self, batch: Any) -> Tensor:
        """True where a token stands, bool, shape (n, L): for ``WeightedRisk(mask=...)``.

        KFAC's A is then the mean over the texts' tokens alone; L is that of `forward`.
        """
        return self._read(batch[0])[1]

    def _read(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """The ids, or None for positions, and where there are tokens; both trimmed."""
        if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.dim() not in (1, 2):
            got = type(x).__name__
            got = f"{x.dtype}, shape {tuple(x.shape)}" if isinstance(x, Tensor) else got
            raise ValueError(
                f"x: got {got}, expected int64: token ids (n, L), encoder.ids(texts), or positions "
                "(n,) of remembered texts"
            )
        on_cpu = x.device.type == "cpu" and x.numel()  # a look costs nothing
        if x.dim() == 2:
            mask = x != self.pad
            if self.trim:
                used = mask.any(0).nonzero()
                width = int(used[-1]) + 1 if len(used) else 1
                x, mask = x[:, :width], mask[:, :width]
            if self.pooling == "cls" and on_cpu and not bool(mask[:, 0].all()):
                raise ValueError(
                    "x: a text begins with padding, whose vector pooling='cls' would read; put "
                    "the padding on the right"
                )
            require_ids(self.encoder, x, mask)
            return x, mask
        if self._table is None:
            raise ValueError(
                "x: got positions, but no activations are remembered; call "
                "classifier.remember(ids), or give ids of shape (n, L)"
            )
        self._table.require_fresh()
        known = self._table.lengths
        if on_cpu and not 0 <= int(x.min()) <= int(x.max()) < len(known):
            raise ValueError(
                f"x: positions from {int(x.min())} to {int(x.max())}, but {len(known)} texts are "
                "remembered"
            )
        lengths = known[x]
        width = int((lengths if self.trim else known).max())
        return None, torch.arange(width, device=x.device) < lengths[:, None]

    def _run(self, module: nn.Module, mask: Tensor, **given: Tensor) -> Any:
        if "input_ids" in given:
            given |= _positions(self.encoder, mask)
        return module(attention_mask=mask.long(), **given)

    def _pooled(self, out: Any, mask: Tensor) -> Tensor:
        if self.pooling == "pooler":
            return out.pooler_output
        hidden = out.last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        share = mask.to(hidden) / mask.sum(1, keepdim=True).clamp(min=1)
        return (share[..., None] * hidden).sum(1)

    # -- frozen layers, computed once

    def _cut(self, path: str, first: int) -> tuple[nn.Module, nn.Module]:
        """The encoder below the first trained layer, and from there on; both share its modules."""
        layers = self.encoder.get_submodule(path)
        words = self.encoder.get_input_embeddings()
        below = nn.ModuleList([*layers[:first], _Stop(layers[first])])
        start = next(k for k, m in self.encoder.named_children() if words in set(m.modules()))
        above = _with(self.encoder, path, nn.ModuleList(layers[first:]))
        return _with(self.encoder, path, below), _with(above, start, _Given())

    @torch.no_grad()
    def remember(self, ids: Tensor, dtype: torch.dtype = torch.float32, chunk: int = 64) -> Tensor:
        """Compute what the frozen layers make of some texts, once; positions stand for them then.

        Only tokens are kept, no padding: sum of the texts' lengths times width numbers. A second
        call replaces the table.

        Args:
            ids: Token ids, shape (n, L).
            dtype: What they are kept in; ``torch.float16`` takes half the memory and changes the
                logits by about 1e-4 of their size, which are otherwise those of the ids to
                rounding.
            chunk: Texts that are computed at once.

        Returns:
            The positions 0 .. n-1, int64, shape (n,).

        Raises:
            ValueError: where nothing is frozen, for a model in training mode with dropout, for a
                dtype that is no float, or an encoder that cannot be cut between two layers.

        Cost: one forward pass of the frozen part on every text.
        """
        if not self._halves:
            raise ValueError("layers: all are trained, so there is nothing to remember; give ids")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, expected torch.float32 or torch.float16")
        self._refuse_dropout()
        at_least("chunk", chunk, 1)
        if isinstance(ids, Tensor) and ids.dim() == 1:
            raise ValueError("ids: got positions, expected token ids of shape (n, L)")
        ids, mask = self._read(ids)
        if not len(ids):
            raise ValueError("ids: hold no texts")
        device, lengths = self.head.weight.device, mask.sum(1)
        front = torch.arange(mask.shape[1], device=ids.device) < lengths[:, None]
        if not torch.equal(mask, front):
            raise ValueError("ids: have padding before a token; expected padding on the right only")
        ends = lengths.cumsum(0)
        starts, total = ends - lengths, int(ends[-1])
        rows = torch.zeros(total + 1, self.head.in_features, dtype=dtype, device=device)
        for part in lengths.argsort(stable=True).split(chunk):
            width = int(lengths[part].max())
            few = ids[part, :width].to(device)
            seen = few != self.pad
            hidden = self._below(few, seen)
            at = (starts[part, None] + torch.arange(width, device=ids.device)).to(device)
            rows[at[seen]] = hidden[seen].to(dtype)
        frozen = [p for p in self._halves[0].parameters() if not p.requires_grad]
        self._table = _Table(rows, starts.to(device), lengths.to(device), frozen, [], [])
        self._table.stamp()
        positions = torch.arange(len(ids), device=device)
        self._confirm(positions[:: max(1, len(ids) // 4)], ids.to(device))
        return positions

    def remembered(self, first: int, ids: Tensor) -> _Table:
        """The table, in which texts of the lengths of these, (n, L), stand from ``first`` on.

        Raises:
            ValueError: if they do not.
        """
        lengths = (ids != self.pad).sum(1)
        there = None if self._table is None else self._table.lengths[first : first + len(ids)]
        if there is None or not torch.equal(there.to(lengths.device), lengths):
            raise ValueError(
                f"first: got {first!r}, but the classifier does not remember these {len(ids)} "
                "texts from there on; call classifier.remember(ids) first, with these among them"
            )
        return self._table

    def _below(self, ids: Tensor, mask: Tensor) -> Tensor:
        try:
            self._run(self._halves[0], mask, input_ids=ids)
        except _Reached as reached:
            return reached.args[0]
        raise ValueError("layers: the encoder did not call the first trained layer")

    def _confirm(self, some: Tensor, ids: Tensor) -> None:
        """Refuse a table from which the logits are not those of the ids."""
        try:
            whole = self(ids[some])
            apart, size = float((self(some) - whole).abs().max()), float(whole.abs().max())
        except RuntimeError as error:
            apart, size, why = float("inf"), 0.0, str(error)
        else:
            why = f"logits differ by {apart:.1e}"
        short = self._table.rows.dtype in (torch.float16, torch.bfloat16)
        if not apart <= (2e-2 if short else 1e-4) * (1 + size):
            self._table = None
            raise ValueError(
                f"encoder: {type(self.encoder).__name__} cannot be cut between two layers ({why}), "
                "so nothing can be remembered; give ids"
            )

    def _activations(self, x: Tensor, mask: Tensor) -> Tensor:
        table, (n, width) = self._table, mask.shape
        at = table.starts[x, None] + torch.arange(width, device=x.device)
        at = torch.where(mask, at, len(table.rows) - 1)  # zeros where there is padding
        return table.rows.index_select(0, at.reshape(-1)).view(n, width, -1).to(self.head.weight)

    def _refuse_dropout(self) -> None:
        if not any(m.training for m in self.encoder.modules()):
            return
        known = self.encoder.config.to_dict().items()  # some models drop without a module for it
        drops = [m.p for m in self.encoder.modules() if isinstance(m, nn.Dropout)]
        drops += [v for k, v in known if "drop" in k and isinstance(v, float)]
        if any(drops):
            raise ValueError(
                "model: dropout is on, so what frozen layers give is another at each pass and "
                "cannot be remembered; call classifier.eval()"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> "TextClassifier":
        super()._apply(fn, recurse)
        if self._table is not None:
            self._table.move(fn)
            self._table.stamp()
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self._table is not None:  # copied or unpickled, with counts of their own
            self._table.stamp()
