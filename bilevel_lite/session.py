"""What a notebook's first cell sets: seed, number type, device, figure style, progress bars."""

import os
import warnings

import torch

__all__ = ["no_tf32", "pick_device", "progress", "ready", "setup"]


def pick_device(name: str | None = None) -> torch.device:
    """Return the device to work on: ``name``, else $BILEVEL_LITE_DEVICE, else CUDA if there.

    A GPU's libraries are loaded before it is returned (see `ready`).

    Raises:
        ValueError: if the name is no device, or the device is not on this machine.
    """
    return ready(_named(name))


def _named(name: str | None) -> torch.device:
    """The same, with nothing done to it."""
    name = os.environ.get("BILEVEL_LITE_DEVICE") or None if name is None else name
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: got {name!r}, expected for example 'cpu' or 'cuda'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: got {name!r}, but this machine has {torch.cuda.device_count()} CUDA device(s)"
        )
    if device.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, NotImplementedError, AssertionError):
            raise ValueError(f"device: got {name!r}, which this torch or machine has not") from None
    return device


_readied: set[tuple[str, int]] = set()


def ready(device: torch.device) -> torch.device:
    """Load a GPU's libraries now, in this thread and in autograd's; return the device.

    Otherwise the first backward pass of a process finds no context of the GPU in autograd's own
    thread, and says so on stderr, into whatever cell came first. Once for each process and GPU;
    nothing on a CPU. It draws no random number.
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        if (device.type, index) not in _readied:
            _first_use(device)
            torch.cuda.synchronize(device)
            _readied.add((device.type, index))
    return device


def _first_use(device: torch.device) -> None:
    """A product forward and backward, and a factorisation, in both precisions.

    The elementwise operation comes first: its kernel needs no library, and makes the context
    current in autograd's thread, where cuBLAS then finds it.
    """
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        warnings.simplefilter("ignore")  # torch's, of the missing context: this is its cure
        for dtype in (torch.float32, torch.float64):
            x = torch.eye(8, dtype=dtype, device=device, requires_grad=True)
            (x * x).sum().backward()
            (x @ x).sum().backward()
            torch.linalg.cholesky(x.detach())


def no_tf32() -> None:
    """Keep float32 at its 24 bits on a GPU; TF32 has 11, and numbers would differ from a CPU's."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def setup(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.device:
    """Make a notebook reproducible: seed, default dtype, figure style, device.

    Args:
        seed: Seed of torch's global generator (layers' initial weights). Random draws in the
            package take a ``torch.Generator`` of their own.
        dtype: Default floating type. The theory chapters use float64 so that printed digits
            hold on every machine; full-scale runs use float32.

    Returns:
        The device to put data and parameters on, its libraries loaded (see `pick_device`).

    Example:
        >>> device = bl.setup(seed=0)
        >>> torch.get_default_dtype()
        torch.float64
    """
    from bilevel_lite import plotting

    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    no_tf32()
    plotting.use_style()
    return pick_device()


def progress(iterable, **kwargs):
    """Wrap ``iterable`` in a progress bar; return it untouched when BILEVEL_LITE_PROGRESS=0.

    Under nbval and in stored notebooks the bar is off, because its text would never be the same.
    Keyword arguments go to ``tqdm``.

    Example:
        >>> sum(k for k in bl.progress(range(4)))
        6
    """
    if os.environ.get("BILEVEL_LITE_PROGRESS") == "0":
        return iterable
    from tqdm.auto import tqdm

    return tqdm(iterable, leave=False, **kwargs)  # gone when done: a log keeps only results
