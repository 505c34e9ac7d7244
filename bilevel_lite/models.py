"""The models that the tasks need, as plain modules.

Example:
    >>> bl.models.mlp(4, 3, hidden=8)
    Sequential(
      (0): Linear(in_features=4, out_features=8, bias=True)
      (1): Tanh()
      (2): Linear(in_features=8, out_features=3, bias=True)
    )
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_lite.trust import rowwise


def linear(inputs: int, classes: int, bias: bool = True) -> nn.Module:
    """Softmax regression: logits = W x + c, with d = (inputs + bias) * classes parameters.

    Example:
        >>> bl.flatten(bl.models.linear(4, 3)).numel()
        15
    """
    return nn.Linear(inputs, classes, bias=bias)


def mlp(inputs: int, classes: int, hidden: int = 256) -> nn.Module:
    """One hidden layer of ``hidden`` tanh units.

    tanh rather than ReLU, so that the inner loss has a Hessian everywhere.

    Example:
        >>> bl.flatten(bl.models.mlp(4, 3, hidden=8)).numel()
        67
    """
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def lenet(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Two 5 x 5 convolutions (6 and 16 channels), each with max-pooling, then 120, 84, classes.

    Args:
        shape: (channels, height, width) of an image.
        classes: Number of outputs.

    Raises:
        ValueError: for images below 16 x 16, of which nothing would be left.

    Example:
        >>> bl.flatten(bl.models.lenet((1, 28, 28), 10)).numel()
        44426
    """
    channels, height, width = shape
    if min(height, width) < 16:
        raise ValueError(f"model: lenet needs images of 16 x 16 or more, got {height} x {width}")
    pooled = 16 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(pooled, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, classes),
    )  # fmt: skip


@rowwise
class Padded(nn.Module):
    """A shortcut without parameters: every other pixel, and channels of zeros on either side."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return x, (n, C, H, W), as (n, C + 2 channels, H / stride, W / stride)."""
        pad = (0, 0, 0, 0, self.channels, self.channels)
        return F.pad(x[:, :, :: self.stride, :: self.stride], pad)


@rowwise
class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm and a shortcut.

    Where the shape changes the shortcut is projected, or, with ``padded``, is `Padded`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, padded: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if padded and (stride != 1 or inputs != outputs):
            self.shortcut = Padded((outputs - inputs) // 2, stride)
        elif stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def resnet18(shape: tuple[int, int, int], classes: int, stem: str = "cifar") -> nn.Module:
    """ResNet-18: a stem, four stages of two `BasicBlock` each (64 to 512 channels), mean, linear.

    Args:
        shape: (channels, height, width) of an image; only the channels matter.
        classes: Number of outputs.
        stem: ``"cifar"``: one 3 x 3 convolution that keeps the size; ``"imagenet"``: 7 x 7 with
            stride 2 and max-pooling, which leaves 8 x 8 of a 32 x 32 image (about 14 times
            cheaper there).

    Raises:
        ValueError: for an unknown ``stem``.

    Source: He et al. (2016), arXiv 1512.03385.

    Example:
        >>> bl.flatten(bl.models.resnet18((3, 32, 32), 10)).numel()
        11173962
    """
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"stem: got {stem!r}, expected 'cifar' or 'imagenet'")
    if stem == "cifar":
        first = [nn.Conv2d(shape[0], 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    else:
        first = [nn.Conv2d(shape[0], 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        first.append(nn.MaxPool2d(3, 2, 1))
    blocks, inputs = [], 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return nn.Sequential(*first, *blocks, *head)


def resnet32(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """ResNet-32 for 32 x 32 images: a stem, three stages of five `BasicBlock`, mean, linear.

    The stages have 16, 32 and 64 channels; shortcuts have no parameters (option A: every other
    pixel, padded with channels of zeros).

    Args:
        shape: (channels, height, width) of an image; only the channels matter.
        classes: Number of outputs.

    Source: He et al. (2016), arXiv 1512.03385, Section 4.2 with n = 5.

    Example:
        >>> bl.flatten(bl.models.resnet32((3, 32, 32), 10)).numel()
        464154
    """
    blocks, inputs = [], 16
    for outputs, stride in ((16, 1), (32, 2), (64, 2)):
        for k in range(5):
            blocks.append(BasicBlock(inputs, outputs, stride if k == 0 else 1, padded=True))
            inputs = outputs
    first = [nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return nn.Sequential(*first, *blocks, *head)


MODELS = {
    "linear": linear, "mlp": mlp, "lenet": lenet, "resnet18": resnet18, "resnet32": resnet32,
}  # fmt: skip
FLAT = ("linear", "mlp")  # take vectors; the others take images


def build(name: str, shape: int | tuple[int, ...], classes: int, **options) -> nn.Module:
    """Build a model by its command-line name.

    Args:
        name: A key of `MODELS`.
        shape: Of one input: its length, or (channels, height, width).
        classes: Number of outputs.
        **options: Passed on to the model.

    Raises:
        ValueError: if the name is unknown, or the model takes images and ``shape`` is none.

    Example:
        >>> bl.flatten(bl.models.build("linear", 4, 3)).numel()
        15
    """
    if name not in MODELS:
        raise ValueError(f"model: got {name!r}, expected one of {sorted(MODELS)}")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if name in FLAT:
        return MODELS[name](math.prod(shape), classes, **options)
    if len(shape) != 3:
        raise ValueError(
            f"model: {name!r} takes images, (channels, height, width), but an input here has shape "
            f"{shape}"
        )
    return MODELS[name](shape, classes, **options)
