"""Batches from tensors that stay on one device."""

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from bilevel_lite.refuse import check_labels, require_generator, require_state

__all__ = ["Batches"]


class Batches:
    """A sampler of batches (x, y, index) from tensors that stay on one device.

    Each pass visits the examples in a new random order; a remainder smaller than a batch is left
    out of that pass, so that every batch has the same size. A batch as large as the set is the set
    itself, in order and not copied: a mean over it knows no order.

    Args:
        x: Inputs, shape (n, ...).
        y: Labels or targets, shape (n, ...).
        batch_size: Examples per batch, from 1 to n.
        generator: CPU generator, so that every device sees the same batches.
        num_classes: If given, labels are checked to be 0 .. num_classes-1 once, here.
        transform: ``transform(x, generator)`` -> x, of each batch that is drawn (not of `all`), say
            `bilevel_lite.data.crop_and_flip`; it draws from the same generator.

    Raises:
        TypeError: if x or y is no tensor, the generator none, or with ``num_classes`` y not of
            integers.
        ValueError: if the lengths differ, the batch size does not fit, x is not finite, or a
            label is out of range.

    Example:
        >>> x, y = torch.arange(6.0).reshape(6, 1), torch.zeros(6, dtype=torch.int64)
        >>> batches = bl.data.Batches(x, y, 3, torch.Generator().manual_seed(0))
        >>> inputs, labels, index = batches.draw()
        >>> torch.equal(inputs, x[index]), inputs.shape
        (True, torch.Size([3, 1]))
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        generator: torch.Generator,
        num_classes: int | None = None,
        transform: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ):
        require_generator(generator)
        for name, value in (("x", x), ("y", y)):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name}: got {type(value).__name__}, expected a tensor; say torch.as_tensor"
                )
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} rows and y has {len(y)}; expected the same number")
        whole = isinstance(batch_size, Integral) and not isinstance(batch_size, bool)
        if not whole or not 1 <= batch_size <= len(x):
            raise ValueError(f"batch_size: got {batch_size!r}, expected 1 to {len(x)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"x: {int((~torch.isfinite(x)).sum())} entries are NaN or infinite")
        if num_classes is not None:
            check_labels(y, num_classes)
        self.x, self.y, self.batch_size, self.generator = x, y, int(batch_size), generator
        self.transform = transform
        self._start_pass()

    def _start_pass(self):
        self._before = self.generator.get_state()  # enough to replay this pass when resuming
        draws = self.generator
        order = torch.randperm(len(self.x), generator=draws, device=draws.device)
        self._order = order.to(self.x.device)
        self._position = 0

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next batch: x[index], transformed where that is asked for, y[index], index."""
        if self.batch_size == len(self.x) and self.transform is None:
            return self.all()
        if self._position + self.batch_size > len(self.x):
            self._start_pass()
        index = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        # the same rows as x[index], several times sooner on a CPU
        x, y = self.x.index_select(0, index), self.y.index_select(0, index)
        return x if self.transform is None else self.transform(x, self.generator), y, index

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the whole set as one batch, in order."""
        return self.x, self.y, torch.arange(len(self.x), device=self.x.device)

    def _size(self) -> list[int]:
        return [len(self.x), self.batch_size]

    def state_dict(self) -> dict:
        """Return the place in the current pass, and what replays it."""
        return {
            "generator": self._before,
            "position": self._position,
            "now": self.generator.get_state(),  # elsewhere, if other samplers draw from it too
            "size": self._size(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned, with the same batches to come.

        Raises:
            ValueError: if it is of a set or batches of another size, or of no place in a pass.
        """
        require_state(state, "generator", "position", "now")
        if (size := [*state.get("size", self._size())]) != self._size():  # older ones do not say it
            raise ValueError(
                f"state: is of {size[0]} examples in batches of {size[1]}, expected {len(self.x)} "
                f"in batches of {self.batch_size}"
            )
        if not isinstance(state["position"], int) or not 0 <= state["position"] <= len(self.x):
            got = state["position"]
            raise ValueError(f"state: position is {got!r}, expected 0 to {len(self.x)}")
        self.generator.set_state(state["generator"].cpu())
        self._start_pass()
        self._position = state["position"]
        self.generator.set_state(state["now"].cpu())
