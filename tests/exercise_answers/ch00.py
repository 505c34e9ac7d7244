"""Answers to the exercises of chapter 0: right ones, and the mistakes that students make."""

import torch
import torch.nn.functional as F


def each_loss(theta, batch, classes):
    x, y, _ = batch
    weight, bias = theta[:-classes].view(classes, -1), theta[-classes:]
    return F.cross_entropy(x @ weight.T + bias, y, reduction="none")


def right_loss(lam, theta, batch, classes, l2):
    weighted = lam[batch[2]] * each_loss(theta, batch, classes)
    return weighted.mean() + l2 * theta.square().sum()


def first_weights(lam, theta, batch, classes, l2):
    losses = each_loss(theta, batch, classes)
    return (lam[: len(losses)] * losses).mean() + l2 * theta.square().sum()


def summed(lam, theta, batch, classes, l2):
    weighted = lam[batch[2]] * each_loss(theta, batch, classes)
    return weighted.sum() + l2 * theta.square().sum()


def normalised(lam, theta, batch, classes, l2):
    weights = lam[batch[2]]
    mean = (weights * each_loss(theta, batch, classes)).sum() / weights.sum()
    return mean + l2 * theta.square().sum()


def unweighted(lam, theta, batch, classes, l2):
    return each_loss(theta, batch, classes).mean() + l2 * theta.square().sum()


def no_penalty(lam, theta, batch, classes, l2):
    return (lam[batch[2]] * each_loss(theta, batch, classes)).mean()


def half_penalty(lam, theta, batch, classes, l2):
    return right_loss(lam, theta, batch, classes, l2 / 2)


def not_scalar(lam, theta, batch, classes, l2):
    return lam[batch[2]] * each_loss(theta, batch, classes) + l2 * theta.square().sum()


def weights_and_biases_swapped(lam, theta, batch, classes, l2):
    swapped = torch.cat([theta[classes:], theta[:classes]])
    return right_loss(lam, swapped, batch, classes, l2)


def features_first(lam, theta, batch, classes, l2):
    matrix = theta[:-classes].view(-1, classes).T
    return right_loss(lam, torch.cat([matrix.flatten(), theta[-classes:]]), batch, classes, l2)


RIGHT = {
    "0.A": 0.0625,
    "0.B": (2000, 1),
    "0.1": (+1, 0),
    "0.2": right_loss,
    "0.3": lambda rate, classes: rate * (1 - 1 / classes),
    "0.4": lambda lam: lam.clamp(0, 1),
    "0.5": (32.2, 30.2, 12.2),
}

WRONG = {
    "0.A": [0, -0.0625, 0.25, -0.25, -0.125, 0.125, -0.5, 1.0, (0.0625, 1), "a"],
    "0.B": [(1000, 1), (1001, 1), (2000, 1000), (2000, 650), (1, 1), 2000, "a"],
    "0.1": [(-1, 0), (-1, 1), (+1, 1), (+1, 0.5), (+1, -1), 0, "a"],
    "0.2": [
        first_weights,
        summed,
        normalised,
        unweighted,
        no_penalty,
        half_penalty,
        not_scalar,
        weights_and_biases_swapped,
        features_first,
    ],
    "0.3": [
        lambda rate, classes: rate,
        lambda rate, classes: rate / classes,
        lambda rate, classes: 1 - rate * (1 - 1 / classes),
        lambda rate, classes: rate * (1 - 1 / (classes - 1)),
        lambda rate, classes: 0.45,
    ],
    "0.4": [
        lambda lam: (lam - lam.min()) / (lam.max() - lam.min()),
        lambda lam: lam.sigmoid(),
        lambda lam: lam / lam.norm(),
        lambda lam: lam.clamp(min=0),
        lambda lam: lam.abs().clamp(max=1),
        lambda lam: lam.clamp(0, 1) / lam.clamp(0, 1).max() * 0.9,
        lambda lam: 0.5,
        lambda lam: lam.clamp(1e-4, 1 - 1e-4),
        lambda lam: torch.where((lam < 0) | (lam > 1), torch.nan, lam),
    ],
    "0.5": [
        (32.2, 32.2, 12.2),
        (30.2, 28.2, 10.2),
        (32, 30, 12),
        (33, 31, 13),
        (22.2, 20.2, 2.2),
        (3220, 3020, 1220),
        (22.2, 21.2, 12.2),
        (32.2, 30.2),
        18.2,
    ],
}
