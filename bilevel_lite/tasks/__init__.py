"""The bilevel tasks of the book."""

from bilevel_lite.tasks import hypercleaning

__all__ = ["hypercleaning"]
