"""The first cell: a GPU's libraries are loaded there, once, silently; a CPU is left alone."""

import subprocess
import sys
import warnings

import pytest
import torch

import bilevel_lite as bl
from bilevel_lite import session


@pytest.fixture
def gpu(monkeypatch):
    """A pretend GPU of two chips; returns the devices that were used for the first time."""
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(session, "_first_use", used.append)
    monkeypatch.setattr(session, "_readied", set())
    monkeypatch.delenv("BILEVEL_LITE_DEVICE", raising=False)
    return used


def test_each_gpu_is_made_ready_once(gpu):
    assert bl.setup() == torch.device("cuda") and gpu == [torch.device("cuda")]
    assert session.pick_device() == session.pick_device("cuda") == torch.device("cuda")
    assert session.pick_device("cuda:0") == torch.device("cuda:0")  # the same chip
    assert gpu == [torch.device("cuda")]
    assert session.pick_device("cuda:1") == torch.device("cuda:1")
    assert gpu == [torch.device("cuda"), torch.device("cuda:1")]


def test_a_gpu_that_failed_is_tried_again(gpu, monkeypatch):
    def fails(device):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(session, "_first_use", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            session.pick_device()
    session.pick_device()
    assert gpu == [torch.device("cuda")]


def test_nothing_runs_on_a_cpu(gpu, monkeypatch):
    assert session.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("BILEVEL_LITE_DEVICE", "cpu")
    assert bl.setup() == torch.device("cpu") and gpu == []


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_first_use_runs_anywhere_silently_and_draws_nothing(mode, monkeypatch, capfd):
    """The operations themselves, here on the CPU, with torch's words about the context."""
    factor, dtypes = torch.linalg.cholesky, []

    def cholesky(a):
        warnings.warn("Attempting to run cuBLAS, but there was no current context!", stacklevel=1)
        dtypes.append(a.dtype)
        return factor(a)

    monkeypatch.setattr(torch.linalg, "cholesky", cholesky)
    before = torch.get_rng_state()
    with mode(), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        session._first_use(torch.device("cpu"))
    assert dtypes == [torch.float32, torch.float64]
    assert heard == [] and capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_the_first_backward_pass_of_a_process_prints_nothing():
    code = (
        "import torch, bilevel_lite as bl; x = torch.ones(4, 4, device=bl.setup()); "
        "x.requires_grad_(); (x @ x).sum().backward(); "
        "torch.linalg.cholesky(x @ x.T + 9 * torch.eye(4, device=x.device))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
