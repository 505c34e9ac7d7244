"""The bilevel tasks of the book: one file each, and one line here, by which it is known.

Example:
    >>> "hypercleaning" in bl.tasks.__all__
    True
"""

from bilevel_lite.tasks import (
    hypercleaning,
    long_tail,
    poisoning,
    pretraining,
    schedules,
    text_cleaning,
    unlearnable,
)

__all__ = [
    "hypercleaning", "long_tail", "poisoning", "pretraining", "schedules",
    "text_cleaning", "unlearnable",
]  # fmt: skip
