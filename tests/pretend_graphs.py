"""CUDA graphs for machines without CUDA: operators are noted, and run again in the same memory.

As on CUDA, a replay knows nothing of Python: it repeats the operators of one call with the tensors
and numbers that they had then. What cannot be recorded there raises here: reading a number, and
copying one from the host.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

FORBIDDEN = {
    f"aten::{op}"
    for op in (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "lift_fresh",
    )
}


def _tensors(value) -> list:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


def _as_now(value):
    """The same memory under the present shapes: operators such as ``unsqueeze_`` change them."""
    return tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, value)


class _Noting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = _as_now((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, *given, _as_now(out)))
        return out


class PretendGraphs:
    """`bilevel_lite.recorded.CudaGraphs`, on a CPU."""

    captured = replayed = 0

    def __init__(self, device):
        self.device = device

    def capture(self, function):
        """Run a function; return its result and what runs its operators again, in place."""
        with _Noting() as noted:
            result = function()
        type(self).captured += 1

        def replay():
            type(self).replayed += 1
            with torch.no_grad():
                for func, args, kwargs, out in noted.calls:
                    given = {t.untyped_storage().data_ptr() for t in _tensors([*args])}
                    new = func(*args, **kwargs)
                    for place, value in zip(_tensors(out), _tensors(new), strict=True):
                        if place.untyped_storage().data_ptr() not in given:
                            place.data.copy_(value)

        return result, replay
