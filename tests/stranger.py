"""A task of one's own, as a stranger would write it: one penalty for each feature of ridge."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_diabetes

import bilevel_lite as bl
from bilevel_lite.experiment import Settings, Task, setting


@dataclass(kw_only=True)
class RidgeSettings(Settings):
    rows: int = setting(60, "training examples", least=1)


class Ridge(Task, name="ridge"):
    """Learn one penalty for each feature of ridge regression."""

    Settings = RidgeSettings
    defaults = {"outer_steps": 20, "evaluate_every": 5, "inner_momentum": 0.0}

    @classmethod
    def make(cls, s, device):
        x, y = (torch.as_tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
        x, y = x / x.std(0), (y - y.mean()) / y.std()
        parts = bl.data.split(len(y), (s.rows, 100, 100), torch.Generator().manual_seed(s.seed))
        train, validation, tuning = ((x[i].to(device), y[i].to(device)) for i in parts)

        def fit(lam, theta, batch):
            return (batch[0] @ theta - batch[1]).square().mean()

        def inner(lam, theta, batch):
            return fit(lam, theta, batch) + (lam.exp() * theta.square()).mean()

        zeros = torch.zeros(10, device=device)
        problem = bl.BilevelProblem(inner, fit)
        task = cls(problem=problem, lam0=zeros, theta0=zeros, train=train, validation=validation)
        task.tuning = tuning
        return task

    def measure(self, lam, theta):
        return {"criterion": float(self.problem.outer_loss(lam, theta, self.tuning))}
