"""The tests of on_second_device.py, in a process of their own: a second backend is seen by all."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_on_a_second_device():
    file = Path(__file__).with_name("on_second_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("this torch takes no backend written in Python")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed > 60
