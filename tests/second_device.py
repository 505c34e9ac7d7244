"""A second device for machines that have none: tensors that live on it compute on the CPU.

Faults that show on a GPU only: a tensor left on the CPU that meets one on the device, a number
read in the middle of a step, for which the CPU must wait, thousands of operations that are hardly
work but a kernel each. Here such a meeting raises as it does on CUDA, `reads` counts who read what,
`sends` who sent something there, and `launches` what was started. The arithmetic is the CPU's, so
results must agree with it to the last bit. It knows nothing of CUDA's own kernels, their rounding
or their speed.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from functools import cache

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

reads: Counter[str] = Counter()  # file:line in the package or a notebook's cell -> how often
sends: Counter[str] = Counter()
launches: Counter[str] = Counter()  # operator that is a kernel on a GPU -> how often

# operators that may mix devices; that take no scalar of the CPU; that wait for the device
MIXING = {f"aten::{op}" for op in ("copy_", "_to_copy", "index", "index_put_", "index_put")}
STRICT = {f"aten::{op}" for op in ("mm", "bmm", "mv", "dot", "addmm", "addmv", "cat", "stack")}
WAITING = {
    f"aten::{op}"
    for op in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
} | {f"aten::{op}" for op in ("_linalg_check_errors", "_linalg_eigh", "_linalg_svd")}


class Elsewhere(torch.Tensor):
    """A tensor on the second device; ``held`` is the one on the CPU that does the work."""

    @staticmethod
    def __new__(cls, held):
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        out.held = held
        return out

    def __repr__(self):
        return repr(self.held)

    def __reduce_ex__(self, protocol):  # a file holds numbers; where they go the reader says
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _execute(func, args, kwargs or {})


def _is_here(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def _tensors(value, found: list) -> list:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            _tensors(item, found)
    return found


def _map(change, value):
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_map(change, item) for item in value)
    return value


def _held(value):
    return _map(lambda t: t.held if isinstance(t, Elsewhere) else t, value)


@cache
def _is_view(func) -> bool:
    """Whether an operator only looks at memory in another way: nothing to compute."""
    infos = [one.alias_info for one in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _read(count: Counter = reads) -> None:
    """Count a wait, under the innermost line of the package or of a cell."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "bilevel_lite" in name or name.startswith("<cell"):
            count[f"{name.rsplit('/')[-1]}:{frame.f_lineno}"] += 1
            return
        frame = frame.f_back
    count["elsewhere"] += 1


def _execute(func, args, kwargs):
    name, device = func._schema.name, kwargs.get("device")
    found = _tensors([*args, *kwargs.values()], [])
    ours = [t for t in found if isinstance(t, Elsewhere)]
    strangers = [t for t in found if not isinstance(t, Elsewhere)]
    if any(t.device.type == "meta" for t in strangers):  # torch asks for a shape, not for numbers
        return func(*_map(lambda t: _held(t).to("meta"), args), **kwargs)
    to_here = _is_here(device)
    if ours and name not in MIXING and any(t.dim() or name in STRICT for t in strangers):
        shapes = [(str(t.device), tuple(t.shape)) for t in found]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name}: {shapes}")
    generator = kwargs.get("generator")
    if generator is not None and (to_here or (ours and device is None)):
        raise RuntimeError(f"Expected a {NAME!r} device type for generator, found 'cpu': {name}")

    stays = bool(ours) or to_here
    if name == "aten::_to_copy" and ours and device is not None and not to_here:
        stays = False
        _read()
    elif name == "aten::copy_" and not isinstance(args[0], Elsewhere):
        stays = False
        _read()
    elif name == "aten::index" and ours:
        if not isinstance(args[0], Elsewhere):
            raise RuntimeError(f"indices of a tensor on the CPU are on {NAME}")
        if strangers or any(t.dtype == torch.bool for t in found[1:]):
            _read()
    elif name in WAITING and ours:
        _read()
    # a number of the CPU that meets a tensor goes along with the kernel
    if stays and strangers and name in ("aten::_to_copy", "aten::copy_"):
        _read(sends)

    if name == "aten::_efficientzerotensor":  # has no memory
        func = torch.ops.aten.zeros.default
    plain = {key: _held(value) for key, value in kwargs.items()}
    if to_here:
        plain["device"] = torch.device("cpu")
        plain.pop("pin_memory", None)
    out = func(*_held(args), **plain)
    if not name.startswith("aten::empty") and not _is_view(func):
        launches[name] += 1
    if not stays:
        return out
    out = _map(Elsewhere, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours else out


class _Dispatch(TorchDispatchMode):
    """Factories and copies that name the device; what holds its tensors comes by the class."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if Elsewhere in types or _is_here(kwargs.get("device")):
            return _execute(func, args, kwargs)
        return func(*args, **kwargs)


class _Function(TorchFunctionMode):
    """What torch does not send through its dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and _is_here(kwargs.get("device")):
            device, grad = kwargs.pop("device"), kwargs.pop("requires_grad", False)
            return torch.tensor(*args, **kwargs).to(device).requires_grad_(grad)
        if args and isinstance(args[0], Elsewhere):
            if func is torch.Tensor.__getitem__:  # a list becomes a tensor inside of torch
                index = args[1] if isinstance(args[1], tuple) else (args[1],)
                index = [torch.tensor(i) if isinstance(i, list) else i for i in index]
                return func(args[0], tuple(index))
            if func in (torch.Tensor.data_ptr, torch.Tensor.untyped_storage):  # which memory it is
                return func(args[0].held)
            if func is torch.Tensor.tolist:
                _read()
                return args[0].held.tolist()
            if func is torch.Tensor.__format__:
                _read()
                return args[0].held.__format__(*args[1:])
        return func(*args, **kwargs)


@contextmanager
def second_device():
    """Make the device usable inside the block, with nothing counted yet."""
    for count in (reads, sends, launches):
        count.clear()
    with _Function(), _Dispatch():
        yield DEVICE
