"""The models: sizes that are known, shapes, and what they refuse."""

import pytest
import torch

import bilevel_lite as bl
from bilevel_lite import models, params


@pytest.mark.parametrize(
    ("name", "shape", "options", "parameters"),
    [
        ("linear", (784,), {}, 7_850),
        ("mlp", (784,), {}, 203_530),
        ("lenet", (3, 32, 32), {}, 62_006),  # the classic count
        ("lenet", (1, 28, 28), {}, 44_426),
        ("resnet18", (3, 32, 32), {"stem": "cifar"}, 11_173_962),
        # torchvision's 11,689,512 with 1,000 classes, less 990 rows of 512 + 1
        ("resnet18", (3, 32, 32), {"stem": "imagenet"}, 11_689_512 - 990 * 513),
    ],
)
def test_sizes_and_shapes(name, shape, options, parameters):
    model = models.build(name, shape, 10, **options).eval()
    assert bl.flatten(model).numel() == parameters
    with torch.no_grad():
        assert model(torch.randn(2, *shape)).shape == (2, 10)


def test_a_basic_block_adds_its_shortcut():
    block = models.BasicBlock(4, 4, 1).eval()
    x = torch.randn(2, 4, 5, 5).abs()
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            conv.weight.zero_()
        assert torch.equal(block(x), x)  # both convolutions give zero, BatchNorm's shift is zero
    assert models.BasicBlock(4, 8, 2)(x).shape == (2, 8, 3, 3)


def test_bad_input():
    with pytest.raises(ValueError, match="model: got 'vgg', expected one of"):
        models.build("vgg", 3, 2)
    with pytest.raises(ValueError, match=r"'lenet' takes images, .* has shape \(784,\)"):
        models.build("lenet", 784, 10)
    with pytest.raises(ValueError, match="lenet needs images of 16 x 16 or more, got 8 x 8"):
        models.build("lenet", (1, 8, 8), 10)
    with pytest.raises(ValueError, match="stem: got 'vit', expected 'cifar' or 'imagenet'"):
        models.resnet18((3, 32, 32), 10, stem="vit")


@pytest.mark.parametrize("gradients", [True, False])
def test_a_model_holds_its_own_parameters_after_a_call(gradients):
    """Also a module that stands in it twice, and a weight that two modules share."""
    mix, out, tied = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    tied.weight = out.weight
    model = torch.nn.Sequential(mix, torch.nn.Tanh(), mix, out, tied)
    before = dict(model.named_parameters())
    g = torch.Generator().manual_seed(0)
    theta, x = torch.randn(27, generator=g), torch.randn(2, 3, generator=g)
    w, b, w2, b2, b3 = theta.split([9, 3, 9, 3, 3])
    w, w2 = w.view(3, 3), w2.view(3, 3)
    truth = ((((x @ w.T + b).tanh() @ w.T + b) @ w2.T + b2) @ w2.T) + b3
    for _ in range(2):
        with torch.set_grad_enabled(gradients):
            outputs = params.predict(model, theta.clone().requires_grad_(gradients), x)
        assert float((outputs.detach() - truth).norm() / truth.norm()) < 1e-14
        after = dict(model.named_parameters())
        assert list(after) == list(before) and all(after[k] is p for k, p in before.items())
        assert model[2].weight is mix.weight and model[4].weight is out.weight
