"""Short trainings of softmax regression, and what a search over their rates finds.

For who learns schedules (`bilevel_lite.schedules`): many trainings run at once, so that a search
may have as many of them as a hypergradient's work would pay for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel_lite import data
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.refuse import at_least
from bilevel_lite.schedules import RATES
from bilevel_lite.updates import window

__all__ = ["SHAPES", "Trainings"]

SHAPES = ("constant", "linear", "free")


class Trainings:
    """Softmax regression on a part of a data set, from zero, by SGD with schedules of its rates.

    Attributes:
        problem: Both losses are the mean cross-entropy on a batch; lam is not in them.
        start: theta_0, zeros.
        judge: The outer batch.

    Args:
        dataset: Its name; see `bilevel_lite.data.load`.
        steps: T, of each training.
        size: Examples in a batch.
        device: Where it runs.
        fit: Training examples, the first of a permutation.
        held: Validation examples, the last.

    Raises:
        ValueError: if ``steps``, ``size`` or ``fit`` is below 1, or the data set is too small.

    Example:
        >>> from bilevel_lite.tasks.rates import Trainings
        >>> trainings = Trainings("digits", steps=20, size=20, fit=500, held=300)
        >>> rates = {"lr": torch.tensor([[0.1], [0.5]]), "momentum": torch.zeros(2, 1),
        ...          "weight_decay": torch.zeros(2, 1)}
        >>> slow, fast = trainings.losses(rates, seeds=[0])
        >>> bool(fast < slow)
        True
    """

    def __init__(
        self,
        dataset: str,
        steps: int,
        size: int = 50,
        device: Any = "cpu",
        fit: int = 5000,
        held: int = 2000,
    ):
        for name, value in (("steps", steps), ("size", size), ("fit", fit), ("held", held)):
            at_least(name, value, 1)
        whole = data.load(dataset, dtype=torch.float32)
        if fit + held > len(whole.y):
            raise ValueError(
                f"fit: got {fit} and held={held}, but {dataset} has {len(whole.y)} examples in all"
            )
        rows = torch.randperm(len(whole.y), generator=torch.Generator().manual_seed(0))
        self.train, self.judge = (
            (whole.x[part].flatten(1).to(device), whole.y[part].to(device))
            for part in (rows[:fit], rows[-held:])
        )
        self.steps, self.size = steps, size
        self.shape = self.train[0].shape[1], whole.num_classes
        self.start = torch.zeros(self.shape[0] * self.shape[1], device=device, dtype=torch.float32)
        self.problem = BilevelProblem(self.loss, self.loss)

    def loss(self, lam: Any, theta: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of theta on a batch."""
        return cross_entropy(batch[0] @ theta.view(self.shape), batch[1])

    def order(self, seed: int):
        """Return the function t -> batch of one training; another seed, another order."""
        draws = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(self.train[1]), (self.steps, self.size), generator=draws)
        rows = rows.to(self.start.device)
        return lambda t: tuple(part.index_select(0, rows[t]) for part in self.train)

    def losses(self, rates: dict[str, Tensor], seeds: Any) -> Tensor:
        """The validation losses of R trainings at once, a mean over orders that all of them share.

        Args:
            rates: ``lr``, ``momentum`` and ``weight_decay``, each of shape (R, values).
            seeds: Of the orders.

        Returns:
            Shape (R,), on the CPU.

        Raises:
            ValueError: if a rate is missing, or they are not of equally many trainings.
        """
        fits = all(v.dim() == 2 and 1 <= v.shape[1] <= self.steps for v in rates.values())
        if not fits or set(rates) != set(RATES) or len({len(v) for v in rates.values()}) != 1:
            shapes = {name: tuple(v.shape) for name, v in rates.items()}
            raise ValueError(
                f"rates: got {shapes}, expected (R, values) for each of {list(RATES)}, "
                f"with one R and at most {self.steps} values"
            )
        trainings, ends = len(rates["lr"]), []
        for seed in seeds:
            theta = u = torch.zeros(self.shape[0], trainings, self.shape[1]).to(self.start)
            batch = self.order(seed)
            for t in range(self.steps):
                lr, momentum, decay = (
                    v[:, window(t, self.steps, v.shape[1]), None].to(theta)
                    for v in (rates[name] for name in RATES)
                )
                x, y = batch(t)
                slope = torch.einsum("nd,drc->nrc", x, theta).softmax(-1)
                slope[torch.arange(len(y)), :, y] -= 1
                u = momentum * u + torch.einsum("nd,nrc->drc", x, slope) / len(y) + decay * theta
                theta = theta - lr * u
            x, y = self.judge
            logits = torch.einsum("nd,drc->ncr", x, theta)
            each = cross_entropy(logits, y[:, None].expand(-1, trainings), reduction="none")
            ends.append(each.mean(0))
        return torch.stack(ends).mean(0).cpu()

    def searched(self, shape: str, trials: int, seed: int) -> dict[str, Tensor]:
        """The best of so many random rates by the validation loss, all trained on one order.

        A constant learning rate; one that falls linearly to a tenth, in five windows; or five
        learning rates that are free; each with one momentum and one weight decay. Rates from 0.01
        to 2 and decays from 1e-5 to 1e-2 on a logarithmic scale, momenta from 0 to 0.99.

        Args:
            shape: One of `SHAPES`.
            trials: How many.
            seed: Draws the rates, and gives the order.

        Returns:
            As `losses` takes them, R = 1.

        Raises:
            ValueError: for another shape, or no trials.
        """
        at_least("trials", trials, 1)
        if shape not in SHAPES:
            raise ValueError(f"shape: got {shape!r}, expected one of {list(SHAPES)}")
        r = torch.rand(trials, 7, generator=torch.Generator().manual_seed(seed))
        lr = 10 ** (-2 + 2.3 * (r[:, :5] if shape == "free" else r[:, :1]))
        if shape == "linear":
            lr = lr * torch.linspace(1, 0.1, 5)
        rates = {"lr": lr, "momentum": 0.99 * r[:, 5:6], "weight_decay": 10 ** (-5 + 3 * r[:, 6:])}
        best = int(self.losses(rates, [seed]).nan_to_num(float("inf")).argmin())
        return {name: v[best : best + 1] for name, v in rates.items()}
