"""The parts of the hypercleaning task: what the weights find, BatchNorm, minibatch baselines."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bilevel_lite as bl
from bilevel_lite import data, models
from bilevel_lite.experiment import job, methods
from bilevel_lite.params import flatten, predict
from bilevel_lite.tasks import cleaning_figures
from bilevel_lite.tasks import hypercleaning as hc


def toy(model=None, sizes=(60, 30, 20), batchnorm="batch"):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 1, 4, 4, generator=g), torch.randint(3, (120,), generator=g)
    x += y.view(-1, 1, 1, 1) * torch.randn(3, 1, 4, 4, generator=g)[y]
    dataset = data.Dataset("toy", x, y, x[:10], y[:10], 3, (4, 4))
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    return hc.build(dataset, model, 0.5, 1e-3, g, sizes=sizes, batchnorm=batchnorm)


def normed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def test_precision_is_the_mean_over_all_ways_to_break_ties():
    lam = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.7, 0.5, 1.0])
    for chosen in itertools.combinations(range(7), 4):
        wrong = torch.zeros(7, dtype=torch.bool)
        wrong[list(chosen)] = True
        shares = []
        for order in itertools.permutations(range(7)):  # all orders that sort the weights
            if all(lam[a] <= lam[b] for a, b in itertools.pairwise(order)):
                shares.append(float(wrong[list(order[:4])].double().mean()))
        assert hc.precision(lam, wrong) == pytest.approx(sum(shares) / len(shares))
    with pytest.raises(ValueError, match="needs at least one wrong"):
        hc.precision(lam, torch.zeros(7, dtype=torch.bool))


def test_the_surest_are_the_lowest_weights_and_among_them_the_highest_losses():
    task = toy()
    lam = torch.linspace(0, 1, 60).round(decimals=1)
    found = hc.surest(task, lam, task.theta0, 20).tolist()
    x, y = task.train
    loss = F.cross_entropy(predict(task.model, task.theta0, x), y, reduction="none")
    assert found == sorted(range(60), key=lambda i: (float(lam[i]), -float(loss[i])))[:20]


def test_pictures_are_the_images_with_both_labels():
    task = toy()
    got = hc.pictures(task, task.lam0, task.theta0, count=5)
    at = hc.surest(task, task.lam0, task.theta0, 5)
    assert got["given"] == task.train[1][at].tolist() and got["true"] == task.y_clean[at].tolist()
    images = torch.from_numpy(cleaning_figures.unpack_images(got).copy()).double()
    x = task.train[0][at].squeeze(1)
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    assert float((images / 255 - (x - low) / (high - low)).abs().max()) <= 0.5 / 255 + 1e-12
    # 48 bytes read as coloured images of 2 x 2: 12 bytes each, channels first
    three = hc.pictures(task, task.lam0, task.theta0, count=3)["pixels"]
    coloured = cleaning_figures.unpack_images({"shape": [3, 2, 2], "pixels": three})
    flat = cleaning_figures.unpack_images({"shape": [12], "pixels": three})
    assert coloured.shape == (4, 2, 2, 3)
    assert coloured[0, 1, 0].tolist() == [flat[0, 2], flat[0, 6], flat[0, 10]]


def test_positions_in_the_dataset_lead_back_to_the_images():
    dataset = data.load("digits")
    model = models.build("linear", 64, 10)
    task = hc.build(dataset, model, 0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(dataset.x[task.index], task.train[0])
    assert torch.equal(dataset.y[task.index], task.y_clean)
    assert torch.equal(task.wrong, task.train[1] != task.y_clean)


def test_batchnorm_statistics_are_those_of_the_examples_at_theta():
    task = toy(normed())
    conv, norm = task.model[0], task.model[1]
    theta = task.theta0 + 0.3 * torch.randn(
        len(task.theta0), generator=torch.Generator().manual_seed(1)
    )
    weight, bias = theta[:36].view(4, 1, 3, 3), theta[36:40]
    assert flatten(conv).numel() == 40
    z = F.conv2d(task.train[0], weight, bias)

    def expected(z):
        return z.mean((0, 2, 3)), z.transpose(0, 1).flatten(1).var(1)

    for refreshed, at in ((False, F.conv2d(task.train[0], conv.weight, conv.bias)), (True, z)):
        if refreshed:
            task.refresh(theta)
        mean, variance = expected(at)
        torch.testing.assert_close(norm.running_mean, mean.detach())
        torch.testing.assert_close(norm.running_var, variance.detach())
        assert not task.model.training and norm.momentum == 0.1
    hc.refresh_batchnorm(task.model, theta, task.train[0], examples=7)
    torch.testing.assert_close(norm.running_mean, expected(z[:7])[0].detach())


def test_frozen_batchnorm_stays_and_an_unknown_kind_is_refused():
    task = toy(normed(), batchnorm="frozen")
    before = task.model[1].running_mean.clone()
    task.refresh(task.theta0 + 1)
    assert torch.equal(task.model[1].running_mean, before)
    with pytest.raises(ValueError, match="batchnorm: got 'train', expected one of"):
        toy(normed(), batchnorm="train")
    soba = hc.HypercleaningSettings(method="soba", batch_size=20, curvature_batch_size=20)
    with pytest.raises(ValueError, match="soba cannot use .* 'refresh'"):
        methods.build(soba, toy(normed()))


def test_inner_steps_use_batch_statistics_and_the_hypergradient_those_at_theta():
    """One outer iteration by hand, with torch's own training and evaluation modes."""
    values = {"batch_size": 20, "curvature_batch_size": 20, "inner_steps": 2, "outer_lr": 1.0}
    s = hc.HypercleaningSettings(method="aid-identity", **values)
    task = toy(normed())
    method = methods.build(s, task)
    method.step()

    model, (x, y), lam = normed(), task.train, torch.full((60,), 0.5, requires_grad=True)
    generator = torch.Generator().manual_seed(1_000_003)  # the inner batches'
    batches = data.Batches(x, y, 20, generator)
    model.train()
    buffers = [torch.zeros_like(p) for p in model.parameters()]

    def weighted(index):
        l2 = sum((p * p).sum() for p in model.parameters())
        ce = F.cross_entropy(model(x[index]), y[index], reduction="none")
        return (lam[index] * ce).mean() + 1e-3 * l2

    for _ in range(2):
        grads = torch.autograd.grad(weighted(batches.draw()[2]), list(model.parameters()))
        with torch.no_grad():
            for p, g, m in zip(model.parameters(), grads, buffers, strict=True):
                m.mul_(s.inner_momentum).add_(g)
                p.sub_(s.inner_lr * m)
    torch.testing.assert_close(method.theta, flatten(model))
    model[1].momentum = 1.0
    with torch.no_grad():
        model(x)  # the statistics of all 60 examples (256 at most)
    model.eval()
    outer = F.cross_entropy(model(task.validation[0]), task.validation[1])
    v = [s.step * g for g in torch.autograd.grad(outer, list(model.parameters()))]
    grads = torch.autograd.grad(
        weighted(torch.arange(60)), list(model.parameters()), create_graph=True
    )
    product = sum((g * u).sum() for g, u in zip(grads, v, strict=True))
    (jv,) = torch.autograd.grad(product, lam)
    torch.testing.assert_close(method.lam, (0.5 + jv).clamp(0, 1))
    assert not task.model.training


def test_a_model_with_batchnorm_is_cleaned_and_resumed_bit_equal(tmp_path, monkeypatch):
    """The statistics follow theta, so the checkpoint needs none of them."""

    def run(folder, steps):
        task = toy(normed())
        s = hc.HypercleaningSettings(
            model="resnet18", method="aid-kfac", outer_steps=steps, batch_size=20, outer_lr=1.0,
            curvature_batch_size=20, evaluate_every=2, baselines=0,
        )  # fmt: skip
        with bl.experiment.RunFolder(folder, {}) as opened:
            return job.run_job(s, torch.device("cpu"), opened, task)

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 4)
    (tmp_path / "parts" / "result.json").unlink()
    parts = run(tmp_path / "parts", 6)
    for result in (whole, parts):
        for row in result["history"]:
            del row["seconds"]
    assert parts["history"] == whole["history"]  # the same operations in the same order


def test_minibatch_training_descends_and_weights_leave_examples_out():
    task = toy()
    x, y = task.train
    arguments = {"l2": 0.0, "lr": 0.1, "steps": 200, "batch_size": 20}

    def fit(split, weights=None):
        g = torch.Generator().manual_seed(0)
        return hc.train_minibatch(task, split, generator=g, weights=weights, **arguments)

    clean = (x, task.y_clean)
    start = hc.evaluate(task.model, task.theta0, task.tuning)["loss"]
    assert hc.evaluate(task.model, fit(clean), task.tuning)["loss"] < 0.6 * start
    # what weighs nothing might as well have any label
    weights = (~task.wrong).to(x.dtype)
    other = y.clone()
    other[task.wrong] = (other[task.wrong] + 1) % 3
    # to the last bit: nothing but a factor of exactly 0 differs
    assert torch.equal(fit((x, y), weights), fit((x, other), weights))
    assert not torch.equal(fit((x, y)), fit((x, other)))


def test_chunks_change_nothing():
    task = toy()
    whole = hc.evaluate(task.model, task.theta0, task.train)
    parts = hc.evaluate(task.model, task.theta0, task.train, chunk=7)
    assert parts["accuracy"] == whole["accuracy"]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-12)


def test_batchnorm_recovers_from_statistics_that_are_nan():
    task = toy(normed())
    norm, good = task.model[1], task.theta0
    task.refresh(good)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    task.refresh(good * float("nan"))
    assert not bool(torch.isfinite(norm.running_mean).any())
    task.refresh(good)
    # the same operations in the same order
    assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, variance)


def test_a_dataset_of_ones_own_needs_sizes():
    dataset = data.load("digits")._replace(name="mine")
    with pytest.raises(ValueError, match="sizes: needed for 'mine'"):
        hc.build(dataset, models.build("linear", 64, 10))
