"""Small models of every kind, and batches for them, for the table of test_kinds.py.

Each kind is a way to make a model and two batches of inputs: the second batch is there because what
was right on one batch need not be right on the next.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

N = 6  # examples a batch; some models have as many positions, so that the two can be mixed up


@dataclass
class Kind:
    """How to make a model, two batches of inputs, the likelihood, and the model without frills.

    ``plain`` gives, for a model that torch itself cannot differentiate through a vector of
    parameters, the same function without what hinders it.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], list[torch.Tensor]]
    loss: str = "cross_entropy"
    plain: Callable[[nn.Module], nn.Module] = lambda model: model


KINDS: dict[str, Kind] = {}


def normal(*shape):
    return lambda: [torch.randn(N, *shape) for _ in range(2)]


def tokens(*shape):
    return lambda: [torch.randint(7, (N, *shape)) for _ in range(2)]


def add(name, make, inputs, loss="cross_entropy", **plain):
    """Put a kind into the table."""
    assert name not in KINDS, name
    KINDS[name] = Kind(make, inputs, loss, **plain)


def kind(name, inputs, loss="cross_entropy", **options):
    """Put a class of models into the table."""

    def decorate(cls):
        add(name, lambda: cls(**options), inputs, loss)
        return cls

    return decorate


def mlp(*between, first=None, width=4):
    """Linear, what is between, tanh, Linear."""
    return nn.Sequential(first or nn.Linear(5, 4), *between, nn.Tanh(), nn.Linear(width, 3))


def image(first, channels, *between):
    """A layer on images, tanh, the mean over places, Linear."""
    return nn.Sequential(first, *between, nn.Tanh(), Mean(), nn.Linear(channels, 3))


class Mean(nn.Module):
    """The mean over all places behind the channels."""

    def forward(self, x):
        return x.flatten(2).mean(2)


class Head(nn.Module):
    """A module of which the output may be several things, and a linear head on some of it."""

    def __init__(self, body, width=4, use=lambda out: out):
        super().__init__()
        self.body, self.o, self.use = body, nn.Linear(width, 3), use

    def forward(self, x):
        return self.o(torch.tanh(self.use(self.body(x))))


class Pair(nn.Module):
    """Two linear layers, a and o: the base of models that do something in between."""

    def __init__(self, inputs=5, width=4):
        super().__init__()
        self.a, self.o = nn.Linear(inputs, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.o(self.between(self.a(x)))

    def between(self, h):
        return torch.tanh(h)


# ------------------------------------------------------------------ linear layers, convolutions

add("linear", lambda: nn.Linear(5, 3), normal(5))
add("linear without bias", lambda: nn.Linear(5, 3, bias=False), normal(5))
add("mlp", mlp, normal(5))
add("mlp without biases", lambda: mlp(first=nn.Linear(5, 4, bias=False)), normal(5))
add("bias alone", lambda: freeze(nn.Linear(5, 3), "weight"), normal(5))
add(
    "linear over positions", lambda: nn.Sequential(nn.Linear(5, 3), nn.Tanh(), Over()), normal(4, 5)
)
add("conv1d", lambda: image(nn.Conv1d(2, 3, 3), 3), normal(2, 6))
add("conv2d", lambda: image(nn.Conv2d(2, 3, 2), 3), normal(2, 4, 4))
add("conv2d without bias", lambda: image(nn.Conv2d(2, 3, 2, bias=False), 3), normal(2, 4, 4))
add("conv3d", lambda: image(nn.Conv3d(1, 2, 2), 2), normal(1, 3, 3, 3))
add("conv grouped", lambda: image(nn.Conv2d(4, 4, 2, groups=2), 4), normal(4, 3, 3))
add("conv depthwise", lambda: image(nn.Conv2d(3, 3, 2, groups=3), 3), normal(3, 3, 3))
add(
    "conv dilated and strided",
    lambda: image(nn.Conv2d(2, 3, (2, 1), stride=(1, 2), dilation=(2, 1), padding=(1, 0)), 3),
    normal(2, 4, 4),
)
add(
    "conv circular",
    lambda: image(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), 2),
    normal(1, 4, 4),
)
add(
    "conv same, reflected",
    lambda: image(nn.Conv2d(1, 2, (2, 3), padding="same", padding_mode="reflect"), 2),
    normal(1, 4, 4),
)
add("conv transposed", lambda: image(nn.ConvTranspose2d(2, 3, 2, stride=2), 3), normal(2, 2, 2))
add("conv transposed 1d", lambda: image(nn.ConvTranspose1d(2, 3, 2), 3), normal(2, 3))
add(
    "conv of images in channels_last",
    lambda: image(nn.Conv2d(2, 3, 2), 3),
    lambda: [x.to(memory_format=torch.channels_last) for x in normal(2, 3, 3)()],
)
add("bilinear", lambda: Head(Twice(nn.Bilinear(3, 3, 4))), normal(3))


class Over(nn.Module):
    """The last of running sums over positions, so that positions matter unequally."""

    def forward(self, h):
        return torch.cumsum(torch.tanh(h), 1)[:, -1]


class Twice(nn.Module):
    """A module of two arguments, called with the input twice."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x)


# ------------------------------------------------------------------ embeddings


def without_options(model):
    """The same model, its embeddings without what only training needs."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse, module.max_norm = False, None
    return model


for words, options in {
    "embedding": {},
    "embedding with padding_idx": {"padding_idx": 0},
    "embedding with padding_idx=-1": {"padding_idx": -1},
    "embedding with max_norm": {"max_norm": 0.5},
    "embedding with scale_grad_by_freq": {"scale_grad_by_freq": True},
    "embedding that is sparse": {"sparse": True},
}.items():
    add(
        words,
        lambda options=options: nn.Sequential(
            nn.Embedding(7, 3, **options), Over(), nn.Linear(3, 3)
        ),
        tokens(4),
        plain=without_options,
    )
add("embedding of one token", lambda: Head(nn.Embedding(7, 4)), tokens())
for words, options in {
    "embedding bag, mean": {"mode": "mean"},
    "embedding bag, sum": {"mode": "sum"},
    "embedding bag, max": {"mode": "max"},
    "embedding bag with padding_idx": {"mode": "sum", "padding_idx": 0},
    "embedding bag with max_norm": {"max_norm": 0.5},
    "embedding bag that is sparse": {"mode": "sum", "sparse": True},
}.items():
    add(
        words,
        lambda options=options: Head(nn.EmbeddingBag(7, 3, **options), 3),
        tokens(4),
        plain=without_options,
    )


@kind("position table looked up once, T == n", tokens(N), positions=N)
@kind("position table looked up once, T != n", tokens(4), positions=4)
class Positions(nn.Module):
    def __init__(self, positions):
        super().__init__()
        self.e, self.p, self.o = nn.Embedding(7, 3), nn.Embedding(positions, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.e(x) + self.p(torch.arange(x.shape[1]))
        return self.o(torch.tanh(h).cumsum(1)[:, -1])


@kind("token predictions with a tied head", tokens())
class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.o = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.o.weight = self.e.weight

    def forward(self, x):
        return self.o(torch.tanh(self.e(x)))


# ------------------------------------------------------------------ recurrent layers

for cls in (nn.RNN, nn.LSTM, nn.GRU):
    add(
        cls.__name__,
        lambda cls=cls: Head(cls(3, 2, batch_first=True), 2, lambda out: out[0][:, -1]),
        normal(3, 3),
    )


@kind("LSTM, time first inside, T == n", normal(N, 3))
class TimeFirstLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.r, self.o = nn.LSTM(3, 2), nn.Linear(2, 3)

    def forward(self, x):
        return self.o(self.r(x.transpose(0, 1))[0][-1])


@kind("GRU on packed sequences", normal(3, 3))
class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.r, self.o = nn.GRU(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x):
        lengths = torch.tensor([3, 1, 2, 3, 2, 1])[: len(x)]
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.o(self.r(packed)[1][0])


@kind("RNN cell, by hand", normal(3, 3))
class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.r, self.o = nn.RNNCell(3, 2), nn.Linear(2, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 2)
        for t in range(x.shape[1]):
            h = self.r(x[:, t], h)
        return self.o(h)


# ------------------------------------------------------------------ normalisations


def shaken(model):
    """Running statistics and norms' parameters that are no zeros and ones."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if "orm" in type(module).__name__:
            for p in module.parameters(recurse=False):
                with torch.no_grad():
                    p.add_(0.3 * torch.randn_like(p))
    return model


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of images."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OneMoreNorm(nn.LayerNorm):
    """LayerNorm that multiplies by 1 + weight."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


for words, make in {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm without parameters": lambda: nn.BatchNorm1d(4, affine=False),
    "sync batch norm": lambda: nn.SyncBatchNorm(4),
    "layer norm": lambda: nn.LayerNorm(4),
    "layer norm without bias": lambda: nn.LayerNorm(4, bias=False),
    "layer norm without parameters": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "rms norm": lambda: nn.RMSNorm(4),
    "group norm": lambda: nn.GroupNorm(1, 4),
    "1 + w layer norm": lambda: OneMoreNorm(4),
    "prelu": lambda: nn.PReLU(),
    "prelu, one a channel": lambda: nn.PReLU(4),
    "softmax": lambda: nn.Softmax(1),
    "log softmax": lambda: nn.LogSoftmax(-1),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "dropout in eval mode": lambda: nn.Dropout(0.5).eval(),
}.items():
    add(
        words,
        lambda make=make: shaken(mlp(make()).eval()),
        normal(5),
    )
add("no dropout, in training", lambda: mlp(nn.Dropout(0.0)).train(), normal(5))
for words, make in {
    "batch norm 2d": lambda: nn.BatchNorm2d(3),
    "batch norm 2d, no running statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "instance norm": lambda: nn.InstanceNorm2d(3, affine=True),
    "instance norm with running statistics": lambda: nn.InstanceNorm2d(
        3, affine=True, track_running_stats=True
    ),
    "local response norm": lambda: nn.LocalResponseNorm(2, alpha=1.0),
    "layer norm of the channels": lambda: LayerNorm2d(3),
    "group norm of images": lambda: nn.GroupNorm(1, 3),
    "dropout of channels": lambda: nn.Dropout2d(0.5),
}.items():
    add(
        words,
        lambda make=make: shaken(image(nn.Conv2d(1, 3, 2), 3, make()).eval()),
        normal(1, 3, 3),
    )
add("batch norm in training", lambda: shaken(mlp(nn.BatchNorm1d(4)).train()), normal(5))
add(
    "batch norm 2d in training, no momentum",
    lambda: shaken(image(nn.Conv2d(1, 2, 2), 2, nn.BatchNorm2d(2, momentum=None)).train()),
    normal(1, 3, 3),
)


@kind("batch norm as a function", normal(5))
class FunctionalNorm(Pair):
    def between(self, h):
        return torch.tanh(F.batch_norm(h, None, None, training=True))


@kind("batch centring, large inputs only", lambda: [torch.rand(N, 5), 4 * torch.randn(N, 5) + 3])
class Centring(Pair):
    def forward(self, x):
        h = self.a(x)
        return self.o(torch.tanh(h - h.mean(0) if x.abs().max() > 3 else h))


# ------------------------------------------------------------------ weights made of parameters

legacy = nn.utils.weight_norm
add("weight norm, old", lambda: mlp(first=legacy(nn.Linear(5, 4))), normal(5))
add("weight norm, old, one length", lambda: mlp(first=legacy(nn.Linear(5, 4), dim=None)), normal(5))
add("weight norm, new", lambda: mlp(first=parametrizations.weight_norm(nn.Linear(5, 4))), normal(5))
add(
    "spectral norm, old",
    lambda: mlp(first=nn.utils.spectral_norm(nn.Linear(5, 4))).eval(),
    normal(5),
)
add(
    "spectral norm, new",
    lambda: mlp(first=parametrizations.spectral_norm(nn.Linear(5, 4))).eval(),
    normal(5),
)
add(
    "weight norm of a convolution",
    lambda: image(parametrizations.weight_norm(nn.Conv2d(1, 2, 2)), 2),
    normal(1, 3, 3),
)


class Symmetric(nn.Module):
    """A parametrisation: the symmetric part."""

    def forward(self, w):
        return 0.5 * (w + w.mT)


def parametrised():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return mlp(first=layer)


add("parametrised linear", parametrised, normal(4))


@kind("parametrised linear, kept within a pass", normal(4))
class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = parametrised()

    def forward(self, x):
        with parametrize.cached():
            return self.body(x)


class LowRank(nn.Module):
    """A frozen linear layer and a trained change of low rank."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


add("low-rank adapter on a frozen base", lambda: mlp(first=LowRank(nn.Linear(5, 4))), normal(5))


@kind("adapter that reads its base's weight", normal(5))
class AdapterByHand(nn.Linear):
    def __init__(self):
        super().__init__(5, 3)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


@kind("standardised weights", normal(5))
class Standardised(nn.Module):
    class Layer(nn.Linear):
        def forward(self, x):
            w = self.weight - self.weight.mean(1, keepdim=True)
            return F.linear(x, w / w.norm(dim=1, keepdim=True), self.bias)

    def __init__(self):
        super().__init__()
        self.a, self.o = self.Layer(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.a(x)))


# ------------------------------------------------------------------ attention


class Attention(nn.Module):
    """nn.MultiheadAttention, its output alone."""

    def __init__(self, first, **options):
        super().__init__()
        self.m, self.options = nn.MultiheadAttention(2, 1, batch_first=first), options

    def forward(self, x):
        return self.m(x, x, x, **self.options)[0]


add("attention", lambda: Head(Attention(True), 2, lambda h: h[:, 0]).eval(), normal(3, 2))
add(
    "attention without weights, in training",
    lambda: Head(Attention(True, need_weights=False), 2, lambda h: h[:, 0]),
    normal(3, 2),
)
add(
    "attention, batch second inside",
    lambda: Head(Attention(False), 2, lambda h: h[:, 0]).eval(),
    normal(N, 2),
)
add(
    "transformer encoder layer",
    lambda: Head(
        nn.TransformerEncoderLayer(3, 1, 2, batch_first=True), 3, lambda h: h[:, 0]
    ).eval(),
    normal(2, 3),
)
add(
    "transformer encoder layer, no dropout, in training",
    lambda: Head(nn.TransformerEncoderLayer(3, 1, 2, 0.0, batch_first=True), 3, lambda h: h[:, 0]),
    normal(2, 3),
)


@kind("scaled dot product attention", normal(3, 3))
class Sdpa(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(3, 6), nn.Linear(2, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.o(F.scaled_dot_product_attention(q, k, v)[:, 0])


# ------------------------------------------------------------------ which parameters, used where


def freeze(model, *names):
    for name, p in model.named_parameters():
        if name in names:
            p.requires_grad_(False)
    return model


add("frozen in part", lambda: freeze(mlp(), "0.weight", "2.bias"), normal(5))
add("frozen first layer", lambda: freeze(mlp(), "0.weight", "0.bias"), normal(5))
add(
    "frozen in the middle",
    lambda: freeze(mlp(nn.Tanh(), nn.Linear(4, 4)), "2.weight", "2.bias"),
    normal(5),
)


def tied():
    model = mlp(nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[4].weight = model[2].weight
    return model


def twice():
    layer = nn.Linear(4, 4)
    return mlp(nn.Tanh(), layer, nn.Tanh(), layer)


add("tied weights", tied, normal(5))
add("a layer used twice", twice, normal(5))


@kind("a weight read outside of its module", normal(5))
class Borrowing(Pair):
    def between(self, h):
        return torch.tanh(h) @ self.a.weight @ self.a.weight.T


@kind("a weight read as a function's argument only", normal(5))
class Functional(Pair):
    def forward(self, x):
        return self.o(torch.tanh(F.linear(x, self.a.weight, self.a.bias)))


@kind("a penalty on a weight among the outputs", normal(5))
class Penalty(Pair):
    def forward(self, x):
        return super().forward(x) * (1 + self.a.weight.square().sum())


@kind("a layer that is never called", normal(5))
class Idle(Pair):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(2, 2)


@kind("a layer whose output is not used", normal(5))
class Unused(Pair):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(4, 2)

    def between(self, h):
        self.unused(h)
        return torch.tanh(h)


@kind("parameters of its own", normal(5))
class Own(Pair):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))

    def between(self, h):
        return torch.tanh(h * self.scale + self.shift)


class Scale(nn.Module):
    """A module of one's own with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, h):
        return h * self.scale.exp()


add("a module of one's own", lambda: mlp(Scale()), normal(5))


@kind("lists and dicts", normal(5))
class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 3)})
        self.second = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.free = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2)])
        self.named = nn.ParameterDict({"c": nn.Parameter(torch.randn(3))})

    def forward(self, x):
        h = torch.tanh(self.first["a"](x)) * torch.sigmoid(self.first["b"](x)) * self.named["c"]
        for layer, p in zip(self.second, self.free, strict=True):
            h = h + p * torch.tanh(layer(h))
        return h


@kind("a sequence with a forward of its own", normal(5))
class Residual(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)
        )

    def forward(self, x):
        h = self[0](x)
        return self[2](h + 2 * self[1](h))


@kind("modules called with keywords", normal(5))
class Keywords(Pair):
    def forward(self, x):
        return self.o(input=torch.tanh(self.a(input=x)))


class Wrapper(nn.Module):
    """What DataParallel and its like do: pass on whatever comes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


add("a wrapper", lambda: Wrapper(mlp()), normal(5))
add("nn.DataParallel", lambda: nn.DataParallel(mlp()), normal(5), plain=lambda model: model.module)
add(
    "names with dots",
    lambda: nn.Sequential(OrderedDict(a=nn.Sequential(OrderedDict(b=mlp())), c=nn.Identity())),
    normal(5),
)


# ------------------------------------------------------------------ rows that are not the examples


def sorted_first():
    x = torch.randn(N, 5)
    return [x[x[:, 0].argsort(descending=True)], torch.randn(N, 5)]


@kind("sorts inside; the first batch is sorted", sorted_first)
class Sorting(Pair):
    def forward(self, x):
        order = x[:, 0].argsort(descending=True)
        return self.o(torch.tanh(self.a(x[order])))[order.argsort()]


@kind("sorts inside", normal(5))
class SortingAlways(Sorting):
    pass


@kind("sends rows to one of two experts", normal(5))
class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.o = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x):
        out, left = x.new_zeros(len(x), 3), x[:, 0] > 0
        out = out.index_put((left,), self.one(x[left]))
        return self.o(torch.tanh(out.index_put((~left,), self.two(x[~left]))))


@kind("time first inside, T == n", normal(N, 3))
@kind("time first inside, T != n", normal(4, 3))
class TimeFirst(Pair):
    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        return self.o(torch.cumsum(torch.tanh(self.a(x.transpose(0, 1))), 0)[-1])


@kind("flat tokens, example after example", normal(3, 3), time=False)
@kind("flat tokens, time after time", normal(3, 3), time=True)
class Flat(Pair):
    def __init__(self, time):
        super().__init__(3, 2)
        self.time = time

    def forward(self, x):
        (n, t, _), axis = x.shape, 0 if self.time else 1
        h = self.a((x.transpose(0, 1) if self.time else x).reshape(n * t, -1))
        h = torch.tanh(h).view(*((t, n) if self.time else (n, t)), -1)
        return self.o(h.cumsum(axis).select(axis, -1))


@kind("two views of each example, one after the other", normal(2, 5))
class Siamese(Pair):
    def forward(self, x):
        h = torch.tanh(self.a(torch.cat([x[:, 0], x[:, 1]])))
        return self.o(h[: len(x)] - 2 * h[len(x) :])


@kind("attention between examples", normal(5))
class BatchAttention(Pair):
    def between(self, h):
        return torch.tanh(h + torch.softmax(h @ h.T, 1) @ h)


@kind("shapes that depend on the batch", normal(5))
class Shapes(Pair):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 4))

    def between(self, h):
        return torch.tanh(h + self.table[: len(h)].mean(0))


@kind("rows added and taken away", normal(5))
class Padded(Pair):
    def forward(self, x):
        padded = torch.cat([x, x.new_ones(2, 5)])
        return self.o(torch.tanh(self.a(padded)))[: len(x)]


@kind("outputs with positions", normal(3, 5))
class Sequence(Pair):
    pass


# ------------------------------------------------------------------ gradients of one's own


class Reverse(torch.autograd.Function):
    """Gradient reversal, as training follows it; no forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class ReverseForwards(Reverse):
    """The same with a forward mode that tells another story."""

    @staticmethod
    def jvp(ctx, t):
        return t.clone()


class Square(torch.autograd.Function):
    """A function whose backward pass is right once and cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


@kind("gradient reversal", normal(5), function=Reverse)
@kind("gradient reversal with a jvp of its own", normal(5), function=ReverseForwards)
@kind("a function that is differentiable once", normal(5), function=Square)
class Doctored(Pair):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def between(self, h):
        return torch.tanh(self.function.apply(h))


@kind("tensor hook where a gradient is asked for", normal(5))
class TensorHook(Pair):
    def between(self, h):
        h = torch.tanh(h)
        if h.requires_grad:
            h.register_hook(lambda g: 0.3 * g)
        return h


@kind("straight-through rounding", normal(5))
class StraightThrough(Pair):
    def between(self, h):
        return h + (torch.round(2 * h) - h).detach()


@kind("detached part", normal(5))
class Detached(Pair):
    def between(self, h):
        return torch.tanh(h) * h.detach()


@kind("a branch without gradients", normal(5))
class NoGrad(Pair):
    def between(self, h):
        with torch.no_grad():
            scale = self.a.weight.norm()
        return torch.tanh(h) * scale


def recording():
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda m, x, out: seen.append(out.shape))
    return model


def scaling():
    model = mlp()
    model[0].register_forward_hook(lambda m, x, out: 0.5 * out.square())
    return model


def shifting():
    model = mlp()
    model[2].register_forward_pre_hook(lambda m, x: (x[0] * x[0].mean(0),))
    return model


def back(hook):
    def make():
        model = mlp()
        hook(model)
        return model

    return make


add("forward hook that records", recording, normal(5))
add("forward hook that changes the output", scaling, normal(5))
add("forward hook that mixes examples", shifting, normal(5))
add(
    "backward hook",
    back(
        lambda m: m[1].register_full_backward_hook(
            lambda m, gi, go: tuple(None if g is None else 0.5 * g for g in gi)
        )
    ),
    normal(5),
)
add(
    "backward hook on a linear layer",
    back(
        lambda m: m[2].register_full_backward_hook(
            lambda m, gi, go: tuple(None if g is None else 0.5 * g for g in gi)
        )
    ),
    normal(5),
)
add(
    "backward pre-hook",
    back(lambda m: m[0].register_full_backward_pre_hook(lambda m, go: (3 * go[0],))),
    normal(5),
)
add(
    "hook on a parameter",  # of the module, not of theta: training by theta does not follow it
    back(lambda m: m[0].weight.register_hook(lambda g: 0 * g)),
    normal(5),
)


@kind("checkpoint, reentrant, of the inputs", normal(5))
class CheckpointedFirst(Pair):
    def forward(self, x):
        return self.o(checkpoint(lambda z: torch.tanh(self.a(z)), x, use_reentrant=True))


@kind("checkpoint", normal(5), reentrant=False)
@kind("checkpoint, reentrant", normal(5), reentrant=True)
class Checkpointed(Pair):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(lambda z: self.o(torch.tanh(z)), self.a(x), use_reentrant=self.reentrant)


# ------------------------------------------------------------------ another function at each call


@kind("a buffer that counts calls", normal(5), how="buffer")
@kind("an attribute that counts calls", normal(5), how="number")
@kind("a list that grows", normal(5), how="list")
@kind("a running mean that is read", normal(5), how="mean")
@kind("activations of the pass before", normal(5), how="before")
@kind("calls counted, the count not read", normal(5), how="idle")
class Keeping(Pair):
    def __init__(self, how):
        super().__init__()
        self.how, self.calls, self.passes, self.h = how, 0, [], torch.zeros(N, 4)
        self.register_buffer("kept", torch.zeros(()))

    def between(self, h):
        h, before = torch.tanh(h), self.h
        self.calls, self.h = self.calls + 1, h.detach()
        self.kept += h.detach().mean() if self.how == "mean" else 1
        self.passes.append(None)
        return (
            h
            + {
                "buffer": 0.1 * self.kept,
                "number": 0.1 * self.calls,
                "list": 0.1 * len(self.passes),
                "mean": self.kept,
                "before": 0.5 * before.mean(0),
                "idle": 0.0,
            }[self.how]
        )


def counting_outside():
    """A hook that keeps its count where no module shows it."""
    model, calls = mlp(), []

    def louder(module, inputs, output):
        calls.append(1)
        return output + 0.1 * (len(calls) % 7)

    model[0].register_forward_hook(louder)
    return model


add("a hook that counts calls", counting_outside, normal(5))
add(
    "spectral norm, old, in training",
    lambda: mlp(first=nn.utils.spectral_norm(nn.Linear(5, 4))),
    normal(5),
)
add(
    "spectral norm, new, in training",
    lambda: mlp(first=parametrizations.spectral_norm(nn.Linear(5, 4))),
    normal(5),
)


@kind("forces: a gradient inside", normal(4), "mse")
class Force(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.a, self.o, self.norm = nn.Linear(4, 3), nn.Linear(3, 1), norm or nn.Identity()

    def forward(self, x):
        x = x if x.requires_grad else x.clone().requires_grad_()
        energy = self.o(torch.tanh(self.norm(self.a(x)))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


add("forces of a softmax", lambda: Force(nn.Softmax(1)), normal(4), "mse")
add("forces of a layer norm", lambda: Force(nn.LayerNorm(3)), normal(4), "mse")


@kind("torch.func inside", normal(4), "mse")
class Func(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(4, 3), nn.Linear(3, 1)

    def energy(self, x):
        return self.o(torch.tanh(self.a(x)))[0]

    def forward(self, x):
        return torch.func.vmap(torch.func.grad(self.energy))(x)


@kind("forward mode inside", normal(4), "mse")
class Tangent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return torch.func.jvp(lambda z: self.o(torch.tanh(self.a(z))), (x,), (x * 0 + 1,))[1]


@kind("vmap inside", normal(5))
class Mapped(Pair):
    def forward(self, x):
        return torch.func.vmap(lambda row: self.o(torch.tanh(self.a(row))))(x)


@kind("an ensemble by vmap over weights", normal(4))
class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(2, 3, 4)), nn.Linear(3, 3)

    def forward(self, x):
        return self.o(torch.func.vmap(lambda w: torch.tanh(F.linear(x, w)))(self.w).sum(0))


# ------------------------------------------------------------------ operations


def operation(name, function, width=4):
    class Operation(Pair):
        def __init__(self):
            super().__init__()
            self.o = nn.Linear(width, 3)

        def between(self, h):
            return function(h)

    add(name, Operation, normal(5))


operation("logsumexp", lambda h: torch.logsumexp(h[:, :, None] * h[:, None], 2))
operation("glu", lambda h: F.glu(h, -1), 2)
operation("sort and cummax", lambda h: h.sort(1)[0].cummax(1)[0])
operation("view and expand", lambda h: h.view(-1, 2, 2).mT.reshape(len(h), -1).expand(-1, 4))
operation("changed in place", lambda h: torch.tanh_((2 * h).add_(h).sub_(1)))
operation("written in place by parts", lambda h: written(h))
operation("linear systems", lambda h: torch.linalg.solve(systems(h), h))
operation("distances", lambda h: torch.cdist(h[:, None], h[:, None].flip(2))[:, 0], 1)
operation("scatter", lambda h: torch.zeros_like(h).scatter_add(1, h.argsort(1), h))
operation("max pooling", lambda h: F.max_pool1d(h[:, None], 2)[:, 0], 2)
operation("interpolate", lambda h: F.interpolate(h[:, None], 7, mode="linear")[:, 0], 7)


def systems(h):
    return torch.eye(4) + h[:, :, None] * h[:, None].tanh().square()


def written(h):
    out = torch.zeros_like(h)
    out[:, :2] = torch.tanh(h[:, 2:])
    out[:, 2:] = h[:, :2] ** 2
    return out


@kind("Fourier layer", normal(5))
class Fourier(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.o = nn.Parameter(torch.randn(3)), nn.Linear(5, 3)

    def forward(self, x):
        return self.o(torch.fft.irfft(torch.fft.rfft(x) * torch.complex(self.f, self.f.sin()), n=5))


@kind("complex weights", normal(5))
class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.re, self.im = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(5, 2))
        self.o = nn.Linear(2, 3)

    def forward(self, x):
        return self.o((x.to(torch.complex128) @ torch.complex(self.re, self.im)).abs())


# ------------------------------------------------------------------ compiled


def compiled_in_place():
    model = mlp()
    model.compile(backend="eager")
    return model


add("torch.compile", lambda: torch.compile(mlp(), backend="eager"), normal(5))
add("model.compile", compiled_in_place, normal(5))
