"""Asking a long run to stop: Ctrl-C, SIGTERM and the end of its time, between two iterations."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Stopped", "stoppable"]


class Stopped(Exception):
    """A run stopped when it was asked to, and can go on.

    Attributes:
        iteration: Outer iterations done.
        gradients: Spent on them.
    """

    def __init__(self, message: str, iteration: int = 0, gradients: float = 0.0):
        super().__init__(message)
        self.iteration, self.gradients = iteration, gradients


@contextmanager
def stoppable(minutes: float | None = None) -> Iterator[Callable[[], str]]:
    """Around a long run: give the question that it asks between iterations, ``stop()``.

    The answer is why it is to stop, and empty while it is to go on. A second Ctrl-C or SIGTERM ends
    it at once (KeyboardInterrupt). Outside the main thread, where no signal arrives, only the time
    is looked at.

    Args:
        minutes: How long it may go on; without an end by default.

    Raises:
        ValueError: if ``minutes`` is not positive.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes: got {minutes}, expected a positive number")
    end, asked = None if minutes is None else time.monotonic() + 60 * minutes, []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    def stop() -> str:
        if asked:
            return asked[0]
        return "the time is up" if end is not None and time.monotonic() >= end else ""

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {one: signal.signal(one, ask) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
