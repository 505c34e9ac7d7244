"""What an answer did in another process, written down so that a check can be held on it again.

A check calls the answer, and the answer calls what the check hands it: products to count, losses.
`Recorder` stands between the two and writes down what crosses: results, exceptions, and the
arguments of calls in the other direction. `Replay` is the answer as the record has it. A check is
deterministic: on the same draws, given the same results, it asks the same again. So the process
that judges computes its own truth and runs no line of the submission.
"""

import builtins
import functools
import types
from numbers import Real

import numpy as np
import torch

from bilevel_lite import exercises

MOST = 20_000  # calls in one record
PLAIN = (bool, int, float, str)


class CannotReplay(BaseException):
    """Raised by `Replay` for a result that is no data; no check catches it."""


class TooLong(BaseException):
    """Raised by `Recorder` for an answer that makes more than `MOST` calls."""


def _unwrapped(x: torch.Tensor) -> torch.Tensor:
    """The plain tensor inside those of torch.func's transformations."""
    functorch = torch._C._functorch

    def inner(x):
        while functorch.is_functorch_wrapped_tensor(x):
            x = functorch.get_unwrapped(x)
        return x

    return inner(inner(x).detach().cpu().clone())  # inside a transformation, clone wraps again


class Recorder:
    """Wraps an answer; `record` is then what it did, of numbers, strings, tensors, containers."""

    def __init__(self):
        self.functions, self.open, self.calls = [], [], 0

    def answer(self, answer):
        """The answer for the check: itself, or a function that is written down as it is called."""
        if callable(answer):
            wrapped = self._student(answer)
            self.record = {"functions": self.functions}
            return wrapped
        self.record = {"value": self.encode(answer)}
        return answer

    def encode(self, value):
        """A value as a pair (kind, data)."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in PLAIN:
            return ("v", value)
        if isinstance(value, Real):  # a Fraction
            return ("v", float(value))
        if value is ...:
            return ("...", None)
        try:
            if isinstance(value, torch.Tensor):
                return ("t", _unwrapped(value))
            if isinstance(value, np.ndarray):
                return ("a", torch.as_tensor(value.copy()))
        except (RuntimeError, TypeError):
            return ("x", type(value).__name__)
        if isinstance(value, tuple | list):
            kind = "u" if isinstance(value, tuple) else "l"
            return (kind, [self.encode(part) for part in value])
        if isinstance(value, dict):
            return ("d", [[self.encode(k), self.encode(v)] for k, v in value.items()])
        index = getattr(value, "_of_record", None)
        return ("c", index) if type(index) is int else ("x", type(value).__name__)

    def _count(self):
        self.calls += 1
        if self.calls > MOST:
            raise TooLong(f"It makes more than {MOST} calls.")

    def _student(self, function):
        """A function of the submission: what it returns is written down."""
        calls, index = [], len(self.functions)
        self.functions.append(calls)

        @functools.wraps(function)
        def call(*args, **kwargs):
            self._count()
            entry = {"events": []}
            calls.append(entry)
            self.open.append(entry)
            try:
                args = [self._lend(x, [k]) for k, x in enumerate(args)]
                kwargs = {k: self._lend(x, [k]) for k, x in kwargs.items()}
                result = function(*args, **kwargs)
            except Exception as error:
                entry["raised"] = [type(error).__name__, str(error)[:500]]
                raise
            finally:
                self.open.pop()
            if result is None and exercises._empty(function):
                result = ...
            entry["result"] = self.encode(result)
            return result

        call._of_record = index
        return call

    def _lend(self, value, path):
        """An argument from the check: of its functions the calls are written down."""
        if type(value) in (tuple, list):
            return type(value)(self._lend(x, [*path, k]) for k, x in enumerate(value))
        ours = type(value).__module__.startswith("bilevel_lite.exercises") and callable(value)
        if not ours and not isinstance(value, types.FunctionType | types.MethodType):
            return value

        @functools.wraps(value, updated=())
        def call(*args, **kwargs):
            self._count()
            args = [
                self._student(x) if isinstance(x, types.FunctionType | types.MethodType) else x
                for x in args
            ]
            event = [path, [self.encode(x) for x in args]]
            if self.open and not kwargs:
                self.open[-1]["events"].append(event)
            return value(*args, **kwargs)

        return call


class Replay:
    """An answer out of a record: `answer` is what to hand to the check."""

    def __init__(self, record: dict):
        self.record = record
        self.next = [0] * len(record.get("functions", ()))

    @property
    def answer(self):
        """The value, or a function that does what the recorded one did, call by call."""
        if "value" in self.record:
            return self.decode(self.record["value"])
        return self._function(0)

    def decode(self, pair):
        """The value of a pair (kind, data)."""
        kind, data = pair
        if kind == "x":
            raise CannotReplay(f"the answer is of type {data}")
        if kind == "a":
            return data.clone().numpy()
        if kind in "ul":
            return (tuple if kind == "u" else list)(self.decode(part) for part in data)
        if kind == "d":
            return {self.decode(k): self.decode(v) for k, v in data}
        if kind == "c":
            return self._function(data)
        return ... if kind == "..." else data.clone() if kind == "t" else data

    def _function(self, index):
        def call(*args, **kwargs):
            calls, k = self.record["functions"][index], self.next[index]
            if k >= len(calls):
                raise CannotReplay(
                    "what its process wrote down does not fit this check (was the package changed "
                    "there?)"
                )
            self.next[index] += 1
            entry = calls[k]
            for path, values in entry["events"]:
                self._event(args, kwargs, path, values)
            if "raised" in entry:
                name, text = entry["raised"]
                kind = getattr(builtins, name, None)
                if not (isinstance(kind, type) and issubclass(kind, Exception)):
                    kind = type(name, (Exception,), {})
                try:
                    error = kind(text)
                except TypeError:  # UnicodeDecodeError and others want more
                    error = Exception(f"{name}: {text}")
                raise error
            return self.decode(entry["result"])

        return call

    def _event(self, args, kwargs, path, values):
        """Call the check's function as the answer did; what it makes of that is its business."""
        function = kwargs if isinstance(path[0], str) else args
        try:
            values = [self.decode(value) for value in values]
            for step in path:
                function = function[step]
            function(*values)
        except (exercises.Wrong, exercises.NotAttempted):
            raise
        except (Exception, CannotReplay):  # a transformed tensor out of its place, say
            pass
