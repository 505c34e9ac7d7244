"""Settings for `pytest --nbval`: environment, kernel, timeout, sanitising rules, workers.

They stand here and not in `addopts`, where paths are relative to the current directory.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "chapters" / "book"))
import form  # noqa: E402

form.set_environment()  # before anything imports torch; kernels inherit it


def pytest_configure(config):
    option = config.option
    if getattr(option, "nbval", False) or getattr(option, "nbval_lax", False):
        if not option.nbval_kernel_name:
            option.nbval_current_env = True
        if not option.nbval_sanitize_with:
            option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")
        if (
            option.nbval_cell_timeout == 2000
        ):  # nbval's default: a kernel that died is noticed only then
            option.nbval_cell_timeout = 300


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `-n` a worker takes a whole file: a notebook is one kernel, a fixture is made once.

    test_kinds.py is the longest by far and has nothing to share: each of its tests goes to whoever
    is free. Files keep their order (tests, chapters, the short solutions): all then end together.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            alone = nodeid.startswith("tests/test_kinds.py")
            return nodeid if alone else nodeid.split("::", 1)[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
