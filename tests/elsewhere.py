"""Would a chapter say the same on a GPU? Ask without one, in two ways.

    elsewhere.py device [CH]     on the second device of second_device.py, which does not mix with
                                 the CPU: finds tensors left behind, and more launches than a GPU
                                 starts in 90 s
    elsewhere.py launches [CH]   the same, and says cell by cell what a GPU would start and wait for
    elsewhere.py rounding [CH]   on the CPU, with sums, products and functions off by a rounding, as
                                 another order of summation leaves them, and with the `sum` of
                                 another Python: finds digits and decisions that hang on the last
                                 bit

Cells that fail, or print other than what is stored, are shown; those tagged nbval-ignore-output may
print what they like. A chapter takes one to fifteen minutes. Not a test: a passing run proves
nothing about CUDA's kernels, a failing one nearly always is a fault on a GPU.
"""

import contextlib
import io
import linecache
import math
import os
import subprocess
import sys
import traceback
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
WAYS = ("device", "launches", "rounding")
# Seconds of a small operation on a GPU, with Python and autograd, and of a number read from it.
# On an H200 the bench's rows of the linear model and of the MLP took 28 to 58 us for each operation
# that second_device.py counts in them, half of them 34 to 47: the launch itself is a quarter of it.
LAUNCH, READ = 40e-6, 40e-6
BUDGET = 90  # seconds that a notebook may take there
SHAKEN = (
    "mm bmm mv dot addmm addmv baddbmm sum mean convolution convolution_backward linalg_vector_norm"
    " var std cumsum logsumexp _softmax _log_softmax linalg_solve_triangular exp log tanh sigmoid"
    " pow sqrt rsqrt"
).split()


def rounding():
    """A mode under which results are off by up to two units in the last place.

    By how much depends on the value alone: the same sum twice is the same number, as on a GPU.
    What is whole stays whole: counts are exact everywhere.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    names = {f"aten::{name}" for name in SHAKEN}

    def shaken(value):
        if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, torch.float64):
            return value
        exact, eps = value.double(), 2 * torch.finfo(value.dtype).eps
        moved = exact * (1 + eps * torch.sin(98765.4321 * exact))
        return torch.where(exact == exact.round(), exact, moved).to(value.dtype)

    class Rounding(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            schema = func._schema
            if schema.name not in names or any(one.alias_info for one in schema.returns):
                return out
            return shaken(out) if isinstance(out, torch.Tensor) else type(out)(map(shaken, out))

    return Rounding()


def other_sum(values, /, start=0):
    """Python's `sum` of floats as the other versions have it: compensated from 3.12 on."""
    values = list(values)
    kinds = {type(value) for value in (start, *values)}
    if sys.version_info < (3, 12) and kinds <= {int, float} and float in kinds:
        return math.fsum((start, *values))
    for value in values:
        start = start + value
    return start


def second():
    """The second device, for a chapter: curvlinops, which looks into tensors, is not there."""
    from second_device import second_device

    real = metadata.version

    def version(name):
        if name.startswith("curvlinops"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    metadata.version = version
    return second_device()


def run(path: Path, way: str) -> int:
    """Run a chapter's cells in one namespace; return how many fail or print something else."""
    os.environ |= {"MPLBACKEND": "agg", "BILEVEL_LITE_PROGRESS": "0", "BILEVEL_LITE_DEVICE": "cpu"}
    import nbformat
    from IPython.core.inputtransformer2 import TransformerManager

    cells = nbformat.read(path, as_version=4).cells
    os.chdir(path.parent)
    names, faults, total, seen = {"__name__": "__main__"}, 0, [0, 0], lambda: [0, 0]
    with rounding() if way == "rounding" else second() as device:
        if way == "rounding":
            names["sum"] = other_sum
        else:
            from second_device import launches, reads

            os.environ["BILEVEL_LITE_DEVICE"] = str(device)

            def seen():
                return [launches.total(), reads.total()]

        for number, cell in enumerate(cells):
            if cell.cell_type != "code":
                continue
            source, file = TransformerManager().transform_cell(cell.source), f"<cell {number}>"
            linecache.cache[file] = (len(source), None, source.splitlines(True), file)
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    exec(compile(source, file, "exec"), names)
            except Exception:
                faults += 1
                print(f"{path.name}, cell {number} fails:\n{traceback.format_exc()}")
                continue
            finally:
                before, total = total, seen()
                if way == "launches" and total != before:
                    counts = [now - old for now, old in zip(total, before, strict=True)]
                    print(f"{path.name}, cell {number}: {said(counts)}", flush=True)
            texts = [out.text for out in cell.outputs if out.get("name") == "stdout"]
            stored, now = "".join(texts).split("\n"), printed.getvalue().split("\n")
            if stored != now and "nbval-ignore-output" not in cell.metadata.get("tags", []):
                faults += 1
                print(f"{path.name}, cell {number} prints something else:")
                for old, new in zip(stored, now, strict=False):
                    if old != new:
                        print(f"  stored: {old}\n  now:    {new}")
    if seconds(total) > BUDGET:
        faults += 1
        print(f"{path.name} would take more than {BUDGET} s on a GPU: batch, or stay on the CPU")
    print(f"{path.name}: {faults or 'no'} faults ({way}{', ' + said(total) if any(total) else ''})")
    return faults


def seconds(counts: list[int]) -> float:
    """What so many operations and reads cost on a GPU that has hardly anything to compute."""
    return counts[0] * LAUNCH + counts[1] * READ


def said(counts: list[int]) -> str:
    return f"{counts[0]:,} operations and {counts[1]:,} reads, {seconds(counts):.1f} s on a GPU"


def main(way: str, chapters: list[str]) -> int:
    """Each chapter in a process of its own; the exit status is 1 if one has a fault."""
    if way not in WAYS:
        sys.exit(f"expected one of {WAYS}, got {way!r}")
    paths = [Path(name) for name in chapters if name.endswith(".ipynb")]
    if not paths:
        starts = tuple(f"{number}_" for number in chapters) or ""
        paths = [
            p for p in sorted((ROOT / "chapters").glob("*.ipynb")) if p.name.startswith(starts)
        ]
    if len(paths) == 1:
        return min(1, run(paths[0].resolve(), way))
    command = [sys.executable, "-W", "ignore", __file__, way]
    return max((subprocess.run([*command, str(path)]).returncode for path in paths), default=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]))
