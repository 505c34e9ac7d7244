"""A population of bilevel problems at once: students that descend, copies of the best, mutations.

What is after Tao et al. (NeurIPS 2020), who combine population-based training with hypergradients;
they published no code, so the form of the teacher here is from memory: a method like theirs.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_lite.refuse import (
    at_least,
    require_finite,
    require_fraction,
    require_function,
    require_generator,
)

__all__ = ["Member", "Teacher", "evolve", "rescale"]


@dataclass
class Member:
    """One of a population.

    Attributes:
        lam: Its outer variable.
        state: All else that it takes along when it is copied: theta, say.
        loss: Its outer loss when it was last looked at.
    """

    lam: Tensor
    state: Any = None
    loss: float = field(default=float("inf"))


def rescale(lam: Tensor, generator: torch.Generator) -> Tensor:
    """Each entry times 0.8 or 1.2, drawn at random: the mutation of population-based training."""
    require_generator(generator)
    up = torch.randint(2, lam.shape, generator=generator, device=generator.device).to(lam.device)
    return torch.where(up == 1, lam * 1.2, lam * 0.8)


class Teacher(nn.Module):
    r"""A mutation that learns: alpha(lam) * lam, alpha = 1 + tanh(W softmax(V^T lam)).

    W starts at zero, so that it begins by copying. It moves against the derivative of the student's
    outer loss at the mutated lam, h: by the chain rule d Phi(alpha lam) / d alpha = lam h.

    Args:
        size: Entries of lam.
        keys: Columns of V.
        lr: Step size.
        generator: Draws V.

    Example:
        >>> from bilevel_lite.population import Teacher
        >>> teacher = Teacher(2, 3, lr=0.5, generator=torch.Generator().manual_seed(0))
        >>> lam = torch.tensor([2.0, -1.0])
        >>> teacher.learn(lam, torch.tensor([1.0, 0.0]))  # Phi falls along -lam_0
        >>> teacher(lam) < lam
        tensor([ True, False])
    """

    def __init__(self, size: int, keys: int, lr: float, generator: torch.Generator):
        super().__init__()
        require_generator(generator)
        made = torch.randn(size, keys, generator=generator, device=generator.device)
        self.V = nn.Parameter(made)
        self.W = nn.Parameter(torch.zeros_like(made))
        self.lr = lr

    def forward(self, lam: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the mutated lam; ``generator`` is not used, it makes this a mutation."""
        return (1 + torch.tanh(self.W @ torch.softmax(self.V.T @ lam, 0))) * lam

    def learn(self, lam: Tensor, h: Tensor) -> None:
        """One step of descent on Phi(alpha(lam) lam), h being the derivative of Phi there."""
        parameters = list(self.parameters())
        with torch.enable_grad():
            slopes = torch.autograd.grad((self(lam.detach()) * h.detach()).sum(), parameters)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter -= self.lr * slope


def evolve(
    members: list[Member],
    step: Callable[[Member], Member],
    rounds: int,
    generator: torch.Generator,
    every: int = 1,
    truncation: float = 0.2,
    mutate: Callable[[Tensor, torch.Generator], Tensor] | None = rescale,
) -> tuple[list[Member], list[list[float]]]:
    r"""Population-based training whose students move by a hypergradient.

        each round:     member <- step(member)
        every so often: each of the worst copies (lam, state) of one of the best, drawn at random,
                        and lam <- mutate(lam)

    Args:
        members: The population, which is not changed.
        step: A student's step: takes a member and returns its successor, with its loss.
        rounds: How many steps each of them does.
        generator: Draws whom to copy and the mutations.
        every: Rounds between two selections.
        truncation: The part that is replaced, at least one member; 0 for none, which makes it a
            descent from each start alone.
        mutate: (lam, generator) -> lam; None for copies only.

    Returns:
        The members after the last round, the best first, and each round's losses.

    Raises:
        TypeError: if the generator is none, ``members`` is no list of them, ``step`` or ``mutate``
            no function, or what one of these returns no member or no tensor.
        ValueError: if there are fewer than 2 members, more than half are to be replaced, or an
            option is out of range.
        NotFinite: if no member has a finite loss.

    Cost: that of ``rounds`` steps for each member, which is also that of as many restarts.
    Source: Jaderberg et al. (2017); Tao et al. (2020).

    Example:
        >>> from bilevel_lite.population import Member, evolve
        >>> def step(m):
        ...     lam = m.lam - 0.1 * 2 * (m.lam - 1)
        ...     return Member(lam, loss=float((lam - 1) ** 2))
        >>> starts = [Member(torch.tensor(4.0)), Member(torch.tensor(-9.0))]
        >>> best, history = evolve(starts, step, 20, torch.Generator(), truncation=0.0)
        >>> round(float(best[0].lam), 2)
        1.03
    """
    require_generator(generator)
    at_least("rounds", rounds, 1)
    at_least("every", every, 1)
    require_fraction("truncation", truncation, 0.5)
    require_function("step", step, "member -> member")
    if mutate is not None:
        require_function("mutate", mutate, "(lam, generator) -> lam")
    if not isinstance(members, list | tuple):
        raise TypeError(f"members: got {type(members).__name__}, expected a list of Member")
    _require_members("members: got", members)
    worst = max(1, round(truncation * len(members))) if truncation > 0 else 0
    if len(members) < 2 or 2 * worst > len(members):
        raise ValueError(
            f"members: got {len(members)}, of which {worst} are to be replaced at a time, expected "
            "at least 2, and at most half of them replaced"
        )
    members, history = deepcopy(members), []
    for r in range(rounds):
        members = [step(member) for member in members]
        _require_members("step: returned", members)
        history.append([member.loss for member in members])
        if (r + 1) % every == 0 and r + 1 < rounds and worst:
            order = _ranked(members)
            for k in range(worst):
                draw = torch.randint(worst, (), generator=generator, device=generator.device)
                chosen = int(draw)
                new = deepcopy(members[order[chosen]])
                new.lam = new.lam if mutate is None else _mutated(mutate, new.lam, generator)
                members[order[-1 - k]] = new
    members = [members[k] for k in _ranked(members)]
    require_finite({"loss of the best member": torch.tensor(members[0].loss, device="cpu")})
    return members, history


def _require_members(what: str, members: Sequence[Any]) -> None:
    for member in members:
        if not isinstance(member, Member):
            raise TypeError(f"{what} {type(member).__name__}, expected a Member")


def _mutated(mutate: Callable[..., Tensor], lam: Tensor, generator: torch.Generator) -> Tensor:
    made = mutate(lam, generator)
    if not isinstance(made, Tensor):
        raise TypeError(f"mutate: returned {type(made).__name__}, expected a tensor like lam")
    return made.detach()


def _ranked(members: list[Member]) -> list[int]:
    """Their places from the lowest loss to the highest; what is not finite comes last."""
    losses = torch.tensor([member.loss for member in members], dtype=torch.float64, device="cpu")
    losses[~losses.isfinite()] = float("inf")
    return torch.argsort(losses, stable=True).tolist()
