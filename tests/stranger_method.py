"""A method of one's own, as a stranger would write it: heavy-ball steps on v, one an iteration."""

import torch

from bilevel_lite.algorithms.method import Method
from bilevel_lite.options import flag, fraction, instance, one_of, positive
from bilevel_lite.solvers import Solver


class HeavyBall(Method):
    """v <- v + inertia (v - v_old) - linear_lr (H v - b)."""

    linear_lr: float = positive(help="Step on v", search=(0.01, 1.0))
    inertia: float = fraction(default=0.5, help="Of v")
    start: str = one_of("zero", "b", help="v at the first step")
    sharp: bool = flag(default=False, help="Two steps on v instead of one")

    choices = ("Hessian", "heavy ball", "single loop")
    remembers = ("v", "old")

    def __post_init__(self):
        super().__post_init__()
        self.v = self.old = torch.zeros_like(self.theta)

    def _direction(self):
        inner_loss, f = self._inner_steps(1), self._f(self._draw("outer"))
        if self.start == "b" and self.iteration == 0:
            self.v = self.old = f.theta
        for _ in range(1 + self.sharp):
            r = self._hessian(self._draw("curvature"))(self.v) - f.theta
            new = self.v + self.inertia * (self.v - self.old) - self.linear_lr * r
            self.v, self.old = new, self.v
        return inner_loss, f.value, f.lam - self._cross(self._draw("cross"), new), None


class Heavier(HeavyBall):
    """One option more, and the direction of the other."""

    drag: str = one_of("none", "auto", help="No number, and not asked for")


class Same(Method):
    """An option with the name of a setting."""

    eta: str = one_of("a", "b", help="Not BOME's")

    def _direction(self):
        raise NotImplementedError


class Solved(Method):
    """Needs a solver, which is no number: a recipe says how it is made."""

    damper: Solver = instance(Solver, "a solver", help="How v is found")
    note: str = one_of("a", "b", help="A word")

    def _direction(self):
        inner_loss, f = self._inner_steps(1), self._f(self._draw("outer"))
        at = self.problem, self.lam, self.theta, self._draw("inner")
        v, info = self.damper.solve(*at, f.theta)
        return inner_loss, f.value, f.lam - self._cross(self._draw("cross"), v), info
