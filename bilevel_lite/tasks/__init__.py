"""The bilevel tasks of the book: one file each, and one line here, by which it is known."""

from bilevel_lite.tasks import hypercleaning, long_tail

__all__ = ["hypercleaning", "long_tail"]
