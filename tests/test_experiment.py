"""Runs that are stopped, killed, resumed, refused; the command line; stored results and figures."""

import collections
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from words import main

import bilevel_lite as bl
from bilevel_lite import experiment
from bilevel_lite.__main__ import OPTIONS
from bilevel_lite.__main__ import main as strictly
from bilevel_lite.experiment import RunError, RunFolder, search, supervised
from bilevel_lite.experiment.methods import METHODS, OWN
from bilevel_lite.tasks import hypercleaning

REAL = os.environ.get("BILEVEL_LITE_DATA")
needs_mnist = pytest.mark.skipif(
    not REAL or not os.path.exists(os.path.join(REAL, "mnist")), reason="no local MNIST"
)
SMALL = [
    "hyperclean", "--dataset", "digits", "--outer-steps", "30", "--evaluate-every", "3",
    "--device", "cpu",
]  # fmt: skip


def unfinished(whole, copy):
    """A copy of a run as it was before its result was written."""
    shutil.copytree(whole, copy)
    (copy / "result.json").unlink()
    return copy


def timeless(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def numbers(folder):
    """Everything in a finished run but time and provenance."""
    result = json.loads((folder / "result.json").read_text())
    history = [timeless(row) for row in result.pop("history")]
    result.pop("provenance")
    result.pop("sha256")
    result["best"] = timeless(result["best"])
    return result, history


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*SMALL, "--out", str(folder)]) == 0
    return folder


def test_a_checkpoint_holds_theta_and_momentum_once_each(whole, tmp_path):
    """The chosen iterate has a file of its own: ResNet-18's checkpoint stays below 100 MB."""
    tensors, waiting = [], [torch.load(whole / "checkpoint.pt")]
    while waiting:
        one = waiting.pop()
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []
        tensors += [one] if isinstance(one, torch.Tensor) else []
    sizes = sorted(one.numel() for one in tensors if one.dtype == torch.float32 and one.ndim)
    assert sizes == [650, 650, 1000]  # theta, its momentum, lam
    draws = [one for one in tensors if one.dtype != torch.float32]
    assert sum(one.numel() * one.element_size() for one in draws) < 30_000  # generators
    d = bl.flatten(bl.models.build("resnet18", (3, 32, 32), 10)).numel()
    assert 4 * (2 * d + 50_000) + 30_000 < 100e6
    result = json.loads((whole / "result.json").read_text())
    (chosen,) = whole.glob("best-*.pt")
    assert chosen.name == f"best-{result['best']['iteration']}.pt"
    at = torch.load(chosen)
    assert at["lam"].numel() == 1000 and at["theta"].numel() == 650
    # the chosen iterate of an earlier version's checkpoint, which held it itself, is still read
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    state = torch.load(copy / "checkpoint.pt")
    torch.save({**state, "best": {**state["best"], **at}}, copy / "checkpoint.pt")
    for name in ("result.json", chosen.name):
        (copy / name).unlink()
    assert main([*SMALL, "--out", str(copy)]) == 0
    assert numbers(copy) == numbers(whole)


def test_a_lost_file_of_the_chosen_iterate_is_told(whole, tmp_path, capsys):
    copy = unfinished(whole, tmp_path / "copy")
    best = next(copy.glob("best-*.pt"))
    for damage in (lambda: best.write_bytes(b"nonsense"), lambda: torch.save({}, best)):
        damage()
        assert main([*SMALL, "--out", str(copy)]) == 1
        assert f"{best} is damaged (" in capsys.readouterr().err


def test_a_run_writes_all_that_it_promises(whole, capsys):
    result, history = numbers(whole)
    assert [row["iteration"] for row in history] == list(range(3, 31, 3))
    assert (whole / "figure.png").stat().st_size > 10_000
    full = json.loads((whole / "result.json").read_text())
    assert set(full["provenance"]) == {
        "command", "commit", "device", "versions", "seed", "date", "seconds",
    }  # fmt: skip
    assert sum(result["weights"]["clean"]) + sum(result["weights"]["corrupted"]) == 1000
    assert sum(result["weights"]["corrupted"]) == result["sizes"]["wrong"]
    assert set(result["baselines"]) == {"noisy", "validation", "clean"}
    best = min(history, key=lambda row: row["tuning_loss"])
    assert timeless(result["best"]) == best  # chosen on the tuning split
    assert result["best"]["auc"] > 0.9
    # a finished run shows its result again and computes nothing
    before = (whole / "checkpoint.pt").stat().st_mtime_ns
    assert main([*SMALL, "--out", str(whole)]) == 0
    assert "holds the finished run" in capsys.readouterr().out
    assert (whole / "checkpoint.pt").stat().st_mtime_ns == before


def test_the_command_for_any_task_is_the_same_run(whole, capsys):
    words = ["run", "hyperclean", "--device", "cpu", "--set", "outer_steps=30", "evaluate_every=3"]
    assert main([*words, "--out", str(whole)]) == 0
    assert "holds the finished run" in capsys.readouterr().out


def test_the_test_set_chooses_nothing(tmp_path, monkeypatch):
    calls = []

    def evaluate(model, theta, split):  # tuning gets worse and test gets better, call by call
        calls.append(len(split[1]))
        loss = len(calls) if len(split[1]) == 237 else 1 / len(calls)
        return {"loss": float(loss), "accuracy": 0.5}

    monkeypatch.setattr(supervised, "evaluate", evaluate)
    assert main([*SMALL, "--out", str(tmp_path / "run")]) == 0
    result, history = numbers(tmp_path / "run")
    assert timeless(result["best"]) == history[0]
    assert 360 in calls  # the test set was looked at all the same, for the figure


def test_an_edited_result_and_one_of_another_version_are_refused(whole, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    path, words = copy / "result.json", [*SMALL, "--out", str(copy)]
    result = json.loads(path.read_text())
    better = {**result, "best": {**result["best"], "test_loss": 0.01}}
    for changed, message in (
        (better, "was edited: its content does not match its sha256; make it anew"),
        ({**result, "result_format": 0}, "was made by another version (result format 0, this one"),
        ({k: v for k, v in result.items() if k != "result_format"}, "another version (result form"),
    ):
        path.write_text(json.dumps(changed))
        assert main(words) == 1
        assert message in capsys.readouterr().err
        assert main(["collect", str(copy), "--name", "nothing"]) == 1
        assert message in capsys.readouterr().err
    for cut in ("{", '"x"', "[]", b"\xff"):  # no object, or no JSON
        path.write_bytes(cut if isinstance(cut, bytes) else cut.encode())
        for command in (words, ["collect", str(copy), "--name", "nothing"]):
            assert main(command) == 1
            error = capsys.readouterr().err
            assert f"{path} cannot be read: " in error and "; remove it and make it" in error
            assert error.count("\n") == 1
    path.write_text(json.dumps(result, indent=None))  # other spaces, the same content
    assert main(words) == 0


def test_an_edited_stored_result_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.folder, "_REPOSITORY", tmp_path)
    folder = tmp_path / "figures" / "data"
    folder.mkdir(parents=True)
    sealed = experiment.seal({"kind": "bench", "runs": [1.5]})
    (folder / "x.json").write_text(json.dumps(sealed))
    assert experiment.stored("x") == {"kind": "bench", "runs": [1.5]}
    (folder / "x.json").write_text(json.dumps({**sealed, "runs": [1.25]}))
    with pytest.raises(RunError, match="x.json was edited"):
        experiment.stored("x")


def test_a_killed_run_resumes_bit_equal(whole, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "bilevel_lite", *SMALL, "--out", str(out)]
    environment = {**os.environ, "BILEVEL_LITE_PROGRESS": "0"}
    for _ in range(3):  # killed without warning, wherever it happens to be
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        rows, deadline = count_lines(out / "log.jsonl"), time.monotonic() + 120
        while count_lines(out / "log.jsonl") < rows + 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if (out / "log.jsonl").exists():  # and killed while writing
        with open(out / "log.jsonl", "a") as file:
            file.write('{"iteration": 99, "tuning_l')
    (out / "checkpoint.tmp").write_bytes(b"half a checkpoint")
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert numbers(out) == numbers(whole)  # the same operations in the same order


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_full_disk_keeps_the_last_state_and_the_run_goes_on_afterwards(
    whole, tmp_path, monkeypatch, capsys
):
    out, real, calls = tmp_path / "full", os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 16:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert main([*SMALL, "--out", str(out)]) == 1
    assert "the disk is full; the last checkpoint is kept" in capsys.readouterr().err
    monkeypatch.setattr(os, "fsync", real)
    assert main([*SMALL, "--out", str(out)]) == 0
    assert "resuming" in capsys.readouterr().out
    assert numbers(out) == numbers(whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_really_full(tmp_path):
    with RunFolder(tmp_path / "run", {"a": 1}) as folder:
        folder.checkpoint({"x": torch.ones(3)})
        (folder.path / "checkpoint.tmp").unlink(missing_ok=True)
        (folder.path / "checkpoint.tmp").symlink_to("/dev/full")
        with pytest.raises(RunError, match="the disk is full; the last checkpoint is kept"):
            folder.checkpoint({"x": torch.zeros(100_000)})
    (tmp_path / "run" / "checkpoint.tmp").unlink()
    with RunFolder(tmp_path / "run", {"a": 1}) as folder:
        assert torch.equal(folder.state["x"], torch.ones(3))


class Small(io.FileIO):
    """A file on a disk with little room: what no longer fits is refused, as by the system."""

    def write(self, part):
        if room := 4000 - self.tell():
            return super().write(bytes(part)[:room])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_within_a_checkpoint(tmp_path, monkeypatch):
    """torch itself tells a file written in part in words of its own, which change."""
    with RunFolder(tmp_path / "run", {"a": 1}) as folder:
        folder.checkpoint({"x": torch.ones(3)})
        monkeypatch.setattr(
            experiment.folder, "open", lambda path, mode: io.BufferedWriter(Small(path, "w")),
            raising=False,
        )  # fmt: skip
        with pytest.raises(RunError, match="the disk is full; the last checkpoint is kept"):
            folder.checkpoint({"x": torch.zeros(3000)})
    monkeypatch.undo()
    with RunFolder(tmp_path / "run", {"a": 1}) as folder:
        assert torch.equal(folder.state["x"], torch.ones(3))


def test_stopped_by_the_keyboard(tmp_path, monkeypatch, capsys):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(bl.AID, "step", stop)
    assert main([*SMALL, "--out", str(tmp_path / "run")]) == 130
    assert "the same command resumes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1"], "was made with other settings (seed: 0 there, 1 here)"),
        (["--outer-lr", "7"], "outer_lr: 60.0 there, 7.0 here"),
        (["--model", "mlp"], "model: 'linear' there, 'mlp' here"),
    ],
)
def test_a_folder_made_with_other_settings_is_refused(whole, arguments, message, capsys):
    assert main([*SMALL, "--out", str(whole), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_two_processes_on_one_folder(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    code = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        "print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")], stdout=subprocess.PIPE
    )
    other.stdout.readline()
    try:
        assert main([*SMALL, "--out", str(tmp_path / "run")]) == 1
        assert "is in use by another process" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()


def test_a_run_that_is_refused_leaves_no_folder(tmp_path, capsys):
    refused = [*SMALL, "--method", "aid-cg", "--iters", "0", "--out"]  # told by the method
    assert main([*refused, str(tmp_path / "new" / "run")]) == 1
    assert "iters: got 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert main([*refused, str(tmp_path / "mine")]) == 1
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"
    with pytest.raises(ValueError), RunFolder(tmp_path / "run", {"a": 1}) as folder:
        folder.log({"iteration": 1})  # something was done: it is kept
        raise ValueError
    with pytest.raises(ValueError), RunFolder(tmp_path / "run", {"a": 1}) as folder:
        raise ValueError  # begun by another
    assert {"config.json", "log.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}
    (tmp_path / "mine" / "log.jsonl").write_text("my own\n")
    assert main([*refused, str(tmp_path / "mine")]) == 1
    assert "log.jsonl is of nothing that was run here" in capsys.readouterr().err
    assert (tmp_path / "mine" / "log.jsonl").read_text() == "my own\n"
    assert main([*refused, str(tmp_path / ("a" * 300))]) == 1
    assert "cannot be made" in capsys.readouterr().err


def test_a_refused_search_leaves_no_folder_either(tmp_path, capsys):
    words = ["search", "long_tail", "--method", "aid-cg", "--device", "cpu", "--trials", "1"]
    words += ["--search-steps", "1", "--outer-steps", "1", "--seeds", "1", "--out"]
    out = str(tmp_path / "out")
    for over, message in (
        (["outer_lr=1:2", "--set", "batch_size=100000"], "batch_size: got 100000"),
        (["outer_lr=1:inf"], "outer_lr: got a box from 1.0 to inf, expected 0 < LOW < HIGH"),
        (["inner_momentum=0.5:2"], "inner_momentum: got 2.0, expected a number from 0 up to"),
        (["outer_lr=1:2", "--set", "evaluate_every=1"], "chosen by the search (--looks)"),
    ):
        assert main([*words, out, "--over", *over]) == 1
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_variants_that_cannot_be_searched_are_refused():
    kind = supervised.Supervised
    for variants, message in (
        ([], "variants: got none"),
        ([search.Variant("a", {}, {"nosuch": (1.0, 2.0)})], "'nosuch', which is no setting"),
        ([search.Variant("a", {}, {"outer_lr": (0.0, 1.0)})], "outer_lr: got a box from 0.0"),
        ([search.Variant("a", {}, {}, follows="b")], "a follows 'b', which is none of them"),
    ):
        with pytest.raises(ValueError, match=message):
            search._require_boxes([(v, kind.settings()) for v in variants])


def test_folders_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*SMALL, "--out", str(tmp_path / "file")]) == 1
    assert "cannot be made" in capsys.readouterr().err
    folder = tmp_path / "run"
    RunFolder(folder, {"a": 1}).close()
    (folder / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(RunError, match="checkpoint.pt is damaged"):
        RunFolder(folder, {"a": 1})
    (folder / "checkpoint.pt").unlink()
    (folder / "config.json").write_text('{"format": 0, "a": 1}')
    with pytest.raises(RunError, match="made by another version"):
        RunFolder(folder, {"a": 1})
    for text in ("{", "[]", '"x"', "1"):
        (folder / "config.json").write_text(text)
        with pytest.raises(RunError, match="config.json cannot be read: .*; use another folder"):
            RunFolder(folder, {"a": 1})


@pytest.mark.parametrize("there", [[1], torch.ones(2), "x", {}, {"log_bytes": 0}])
def test_a_file_that_is_no_checkpoint_is_told(whole, tmp_path, there, capsys):
    copy = unfinished(whole, tmp_path / "copy")
    torch.save(there, copy / "checkpoint.pt")
    assert main([*SMALL, "--out", str(copy)]) == 1
    error = capsys.readouterr().err
    assert "checkpoint.pt" in error and "anew" in error and error.count("\n") == 1


def test_a_checkpoint_knows_its_settings(whole, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    config, words = copy / "config.json", [*SMALL, "--out", str(copy)]
    other = json.loads(config.read_text()) | {"seed": 1}
    config.unlink()
    for _ in range(2):  # nothing is written that would be taken for the settings
        assert main([*words, "--seed", "1"]) == 1
        assert "was made with other settings (seed: 0 there, 1 h" in capsys.readouterr().err
    (copy / "result.json").unlink()
    config.write_text(json.dumps(other))
    assert main([*words, "--seed", "1"]) == 1
    assert "was made with other settings (seed: 0 there, 1 h" in capsys.readouterr().err
    config.unlink()
    assert main(words) == 0 and numbers(copy) == numbers(whole)
    # one of an earlier version does not tell: it needs its config.json
    state = torch.load(copy / "checkpoint.pt")
    del state["config"]
    torch.save(state, copy / "checkpoint.pt")
    (copy / "result.json").unlink()
    (kept := tmp_path / "kept").write_bytes(config.read_bytes())
    config.unlink()
    assert main(words) == 1
    assert "has lost its config.json" in capsys.readouterr().err
    shutil.copy(kept, config)
    assert main(words) == 0 and numbers(copy) == numbers(whole)


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (np.float64(1), r"state\['a'\]\[1\], a numpy.float64,"),
        (np.ones(2), r"state\['a'\]\[1\], a numpy.ndarray,"),
        (collections.deque(), r"state\['a'\]\[1\], a collections.deque,"),
        (len, "something"),
    ],
)
def test_what_a_checkpoint_cannot_give_back_is_not_written(tmp_path, odd, told):
    with RunFolder(tmp_path, {}) as folder:
        folder.checkpoint({"a": [torch.ones(2), 1.0, {"b": (None, "c", True)}]})
        with pytest.raises(RunError, match=f"checkpoint.pt: {told} cannot be kept in a checkpoint"):
            folder.checkpoint({"a": [1, odd]})
    with RunFolder(tmp_path, {}) as folder:
        assert folder.state["a"][2] == {"b": (None, "c", True)}


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(whole, tmp_path, monkeypatch, capsys):
    copy = unfinished(whole, tmp_path / "copy")

    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fails)
        assert main([*SMALL, "--out", str(copy)]) == 1
    said = capsys.readouterr().err
    assert "checkpoint.pt cannot be read: [Errno 5]" in said and "remove" not in said
    best = next(copy.glob("best-*.pt"))
    best.unlink()
    assert main([*SMALL, "--out", str(copy)]) == 1
    assert f"{best} is missing; remove" in capsys.readouterr().err


def test_a_result_stands_without_its_checkpoint(whole, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "checkpoint.pt").write_bytes(b"nonsense")
    assert main([*SMALL, "--out", str(copy)]) == 0
    assert "holds the finished run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("method", "iteration"), "x"), (("method", "iteration"), -1), (("best",), {"row": {}}),
        (("log_bytes",), "a"), (("drawn",), [None, torch.zeros(3)]),
    ],
)  # fmt: skip
def test_a_checkpoint_with_something_else_in_it_is_told(whole, tmp_path, place, value, capsys):
    copy = unfinished(whole, tmp_path / "copy")
    state = inner = torch.load(copy / "checkpoint.pt")
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    torch.save(state, copy / "checkpoint.pt")
    assert main([*SMALL, "--out", str(copy)]) == 1
    error = capsys.readouterr().err
    assert "checkpoint.pt" in error and "anew" in error and error.count("\n") == 1


def test_a_run_that_goes_on_elsewhere_says_so(whole, tmp_path, capsys):
    copy = unfinished(whole, tmp_path / "copy")
    state = torch.load(copy / "checkpoint.pt")
    there = {**state["places"][-1], "device": "CPU (abacus, 1 threads)"}
    torch.save({**state, "places": [there]}, copy / "checkpoint.pt")
    assert main([*SMALL, "--out", str(copy)]) == 0
    assert "elsewhere (device: CPU (abacus, 1 threads) there, CPU" in capsys.readouterr().out
    made = json.loads((copy / "result.json").read_text())["provenance"]
    assert made["before"] == [there] and made["device"] != there["device"]
    assert numbers(copy) == numbers(whole)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing tells which file is synced")
def test_what_is_written_is_on_the_disk_in_the_order_that_it_is_needed(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(number):
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with RunFolder(tmp_path / "run", {}) as folder:
        folder.log({"a": 1})
        folder.checkpoint({})
        folder.finish({"a": 1})
    files = [name for name in synced if name != "run"]
    assert files == ["config.tmp", "log.jsonl", "checkpoint.tmp", "result.tmp"]
    assert synced[-1] == "run"


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path):
    with RunFolder(tmp_path, {}) as folder:
        folder.log({"a": 1})
        folder.checkpoint({})
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(RunError, match="it was changed"):
        RunFolder(tmp_path, {})


def test_a_damaged_line_of_the_log_is_told_at_the_start(tmp_path):
    with RunFolder(tmp_path, {}) as folder:
        for row in ({"a": 1}, {"a": 2}):
            folder.log(row)
        folder.checkpoint({})
    for line in (b"xx", b"\xff", b"{}0", b"[0]"):
        (tmp_path / "log.jsonl").write_bytes(b'{"a": 1}\n' + line.ljust(8) + b"\n")
        told = r"log.jsonl, line 2, cannot be read: .*; remove .*checkpoint.pt to start this run an"
        with pytest.raises(RunError, match=told):
            RunFolder(tmp_path, {})
    (tmp_path / "checkpoint.pt").unlink()
    with RunFolder(tmp_path, {}) as folder:
        assert folder.rows() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--set outer_steps=3 --set outer_steps=4", "outer_steps: is given twice"),
        ("--set outer_steps=3 outer_steps=3", "outer_steps: is given twice"),
        ("--outer-steps 3 --set outer_steps=4", "outer_steps: is given twice"),
        ("--outer-steps 3 --outer-steps=4", "outer_steps: is given twice"),
        ("--seed 1 --set seed=2", "--seed: is given as an option and among the settings"),
    ],
)
def test_settings_that_are_given_twice(tmp_path, arguments, message, capsys):
    assert strictly(["run", "hyperclean", *arguments.split(), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_options_given_twice_and_a_first_seed_too_large(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    for command in (["run", "hyperclean"], ["hyperclean"], ["study", "ema"], ["grade", "x.ipynb"]):
        word = "--seeds" if command[0] == "study" else "--seed"
        with pytest.raises(SystemExit):
            strictly([*command, word, "1", word, "1", *out])
        assert f"argument {word}: is given twice" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    over = ["--method", "aid-cg", "--over", "outer_lr=1:2", "outer_lr=1:3"]
    for words, message in (
        (["search", "hyperclean", *over, *out], "--over: outer_lr is given twice"),
        (["study", "ema", "--at", "inner_lr=1", "inner_lr=2", *out], "--at: inner_lr is given tw"),
        (["study", "ema", "--first-seed", "9" * 20, *out], "--first-seed: got 9999999999"),
    ):
        assert strictly(words) == 1
        assert message in capsys.readouterr().err


def test_an_empty_name_is_not_the_working_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, name in (
        ([*SMALL, "--out", ""], "out"),
        (["figures", "hyperclean_mnist_linear", "--to", ""], "to"),
        (["collect", ".", "--name", ""], "name"),
    ):
        assert main(words) == 1
        assert capsys.readouterr().err == f"error: --{name}: got '', expected a name; give one\n"
    assert not list(tmp_path.iterdir())


def test_a_device_that_holds_no_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BILEVEL_LITE_DEVICE", "meta")
    assert main([*SMALL[:-2], "--out", str(tmp_path / "run")]) == 1
    assert "--device: got 'meta', which holds no numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnits"], "invalid choice: 'mnits'"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--outer-steps", "many"], "invalid int value: 'many'"),
        (["--outer-step", "3"], "unrecognized arguments: --outer-step"),  # no abbreviations
    ],
)
def test_words_that_the_command_line_does_not_know(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main([*SMALL, *arguments, "--out", str(tmp_path / "run")])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu"], "error: --device: got 'gpu'"),
        (["--outer-steps", "0"], "error: --outer-steps: got 0"),
        (["--inner-steps", "0"], "error: --inner-steps: got 0"),
        (["--outer-lr", "-1"], "error: --outer-lr: got -1.0, expected a positive number"),
        (["--inner-lr", "0"], "error: --inner-lr: got 0.0, expected a positive number"),
        (["--inner-lr", "nan"], "error: --inner-lr: got nan, expected a positive number"),
        (["--inner-momentum", "1.5"], "error: --inner-momentum: got 1.5, expected a number from 0"),
        (["--outer-momentum", "5"], "error: --outer-momentum: got 5.0, expected a number from 0"),
        (["--device", "mps"], "error: --device: got 'mps', which this torch or machine has not"),
        (["--device", "meta"], "error: --device: got 'meta', which holds no numbers, expected cpu"),
        (["--budget", "nan"], "error: --budget: got nan, expected at least 0 (0 or inf: no limit)"),
        (["--budget", "-1"], "error: --budget: got -1.0, expected at least 0"),
        (["--seed", "9" * 20], f"error: --seed: got {'9' * 20}, expected an integer from 0 to"),
        (["--seed", "-1"], "error: --seed: got -1, expected an integer from 0 to 2**63 - 1"),
        (["--seeds", "5"], "error: --seeds: is of a comparison; give several methods"),
        (["--storage", "sqlite://"], "error: --storage: is of a comparison"),
        (["--ema", "0.9"], "error: --ema: is not read by aid-cg; it is by aid-ekfac, aid-kfac, "),
        (["--stem", "imagenet"], "error: --stem: got 'imagenet', but only a resnet18"),
        (["--noise", "2"], "error: --noise: got 2.0, expected a number from 0 to 1"),
        (["--batch-size", "2000"], "error: --batch-size: got 2000, expected 1 to 1000, or 0 for"),
        (["--outer-batch-size", "500"], "error: --outer-batch-size: got 500, expected 1 to 200"),
        (["--l2", "-1"], "error: --l2: got -1.0"),
        (["--iters", "0"], "error: --iters: got 0"),
        (["--inner-lr", "1e30"], "inner_loss: value is"),
    ],
)
def test_settings_out_of_range(tmp_path, arguments, message, capsys):
    assert main([*SMALL, *arguments, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_largest_seed_and_an_endless_budget(tmp_path):
    words = ["--seed", str(2**63 - 1), "--budget", "inf", "--outer-steps", "2", "--baselines", "0"]
    assert main([*SMALL, *words, "--out", str(tmp_path / "run")]) == 0
    assert numbers(tmp_path / "run")[1][-1]["iteration"] == 2


def test_help_names_every_setting_once_with_its_true_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken
    with pytest.raises(SystemExit):
        main(["hyperclean", "--help"])
    text = re.sub(r"\n {24}", "  ", capsys.readouterr().out)  # a long name has a line of its own
    for name in OPTIONS:
        (line,) = re.findall(rf"^  --{name.replace('_', '-')} .*$", text, re.MULTILINE)
        settings = {
            data: getattr(hypercleaning.HypercleaningSettings(**own), name)
            for data, own in hypercleaning.DEFAULTS.items()
        }
        said = re.findall(r"\(default: (.*)\)$", line)
        values = [f"{v:g}" if not isinstance(v, str) else v for v in settings.values() if v != None]  # noqa: E711
        if not values:
            usual = next(iter(OWN[name].values())).default  # a method's own: as its class has it
            assert not said
            assert usual is None or f"; by default {usual:g}" in line
        elif len(set(values)) == 1:
            assert said == values[:1]
        else:
            assert said == [", ".join(map(" ".join, zip(settings, values, strict=True)))]
    assert "inner batch; 0 is the whole training set" in text
    for command in ("hyperclean", "study", "bench", "figures", "collect"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text += capsys.readouterr().out
    for silent in (None, False, True):
        assert f"(default: {silent})" not in text
    assert "depends on" not in text and text.count("(default: CUDA if there)") == 4


def test_batches_of_size_0_are_whole_sets(tmp_path):
    sizes = {"batch": 1000, "curvature-batch": 1000, "outer-batch": 200, "cross-batch": 1000}
    losses = []
    for given in (dict.fromkeys(sizes, 0), sizes):
        words = [word for name, n in given.items() for word in (f"--{name}-size", str(n))]
        out = tmp_path / str(given["batch"])
        short = ["--outer-steps", "2", "--evaluate-every", "2", "--out", str(out)]
        assert main([*SMALL, *short, *words]) == 0
        losses.append(numbers(out)[0]["best"]["tuning_loss"])
    # the same examples, added up in another order
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"aid-cg"}))
def test_the_other_methods_run(tmp_path, method):
    short = ["--outer-steps", "3", "--evaluate-every", "3"]
    assert main([*SMALL, *short, "--method", method, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_the_quickest_command_shows_the_method_working(tmp_path):
    readme = (Path(experiment.folder._REPOSITORY) / "README.md").read_text("utf-8")
    said = re.search(r"test loss is ([\d., and]+), against ([\d., and]+) of\s", readme)
    losses = [[float(x) for x in re.findall(r"0\.\d+", text)] for text in said.groups()]
    for seed in range(3):
        out = tmp_path / str(seed)
        words = ["hyperclean", "--dataset", "digits", "--device", "cpu", "--seed", str(seed)]
        assert main([*words, "--out", str(out)]) == 0
        result, _ = numbers(out)
        there = result["baselines"]["validation"]
        assert result["best"]["test_loss"] == pytest.approx(losses[0][seed], abs=0.005)
        assert there["test_loss"] == pytest.approx(losses[1][seed], abs=0.005)
        for here in (result["best"], result["retrained"]):
            assert here["test_loss"] < there["test_loss"]
            assert here["test_accuracy"] > there["test_accuracy"]


def test_mlp_and_noise_free_run(tmp_path):
    short = ["--outer-steps", "2", "--evaluate-every", "2", "--model", "mlp", "--noise", "0"]
    assert main([*SMALL, *short, "--out", str(tmp_path / "run")]) == 0
    assert "auc" not in numbers(tmp_path / "run")[0]["best"]  # nothing to tell apart


@needs_mnist
@pytest.mark.slow
def test_mnist_for_a_few_iterations(tmp_path, monkeypatch):
    monkeypatch.setattr(hypercleaning, "BASELINE_L2", (1e-4,))
    out = tmp_path / "mnist"
    few = ["--outer-steps", "20", "--evaluate-every", "20", "--out", str(out)]
    assert main(["hyperclean", "--dataset", "mnist", "--device", "cpu", *few]) == 0
    result, _ = numbers(out)
    assert result["sizes"] == {
        "train": 50_000, "wrong": result["sizes"]["wrong"], "validation": 5_000,
        "tuning": 5_000, "test": 10_000,
    }  # fmt: skip
    assert result["sizes"]["wrong"] / 50_000 == pytest.approx(0.45, abs=0.01)
    assert result["best"]["auc"] > 0.97
    assert result["baselines"]["validation"]["test_accuracy"] > 0.895
    assert result["baselines"]["clean"]["test_accuracy"] > 0.92


def elements(path):
    """How many lines, markers, texts ... a drawing has; their places differ by library."""
    return Counter(re.findall(r'<g id="([A-Za-z0-9]+)_\d+"', path.read_text()))


def test_stored_results_have_provenance_and_are_drawn(tmp_path):
    folder = Path(experiment.folder._REPOSITORY) / "figures"
    names = sorted(path.stem for path in (folder / "data").glob("*.json"))
    for name in names:
        for run in experiment.stored(name)["runs"]:
            p = run["provenance"]
            assert re.fullmatch(r"[0-9a-f]{12}", p["commit"]), "made from a committed tree"
            assert p["command"].startswith("python -m bilevel_lite ") and "/" not in p["device"]
            assert not re.search(r"/(tmp|home|root|work)/", p["command"])
    # in a process of its own, where no other test's tasks and styles are
    command = [sys.executable, "-m", "bilevel_lite", "figures", *names, "--to", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = {path.stem: path for path in tmp_path.glob("*.svg")}
    assert set(names) <= set(drawn)
    for name, now in drawn.items():
        assert elements(folder / now.name) == elements(now), f"make figures: {name}"
    with pytest.raises(ValueError, match="there is no stored result 'nothing'"):
        experiment.stored("nothing")


def test_a_stored_result_tells_nobodys_folders(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.folder, "_REPOSITORY", tmp_path)
    result = json.loads((whole / "result.json").read_text())
    del result["sha256"]
    result["provenance"]["command"] = (
        "python -m bilevel_lite run t --encoder /home/me/models/mini-l6 --out=/data/x/y.z "
        "--set a=1/2 ../shared/b"
    )
    result["settings"]["encoder"] = "/home/me/models/mini-l6"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(json.dumps(experiment.folder.seal(result)))
    experiment.collect([str(tmp_path / "run")], "shorn")
    (run,) = experiment.stored("shorn")["runs"]
    assert run["settings"]["encoder"] == "mini-l6"
    assert run["provenance"]["command"] == (
        "python -m bilevel_lite run t --encoder mini-l6 --out=y.z --set a=1/2 ../shared/b"
    )


def test_collect(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.folder, "_REPOSITORY", tmp_path)
    path = experiment.collect([str(whole)], "some")
    assert json.loads(path.read_text())["runs"][0]["kind"] == "hyperclean"
    assert experiment.stored("some")["kind"] == "hyperclean"
    other = json.loads((whole / "result.json").read_text())
    other["settings"]["seed"] += 1
    del other["sha256"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text(json.dumps(experiment.folder.seal(other)))
    experiment.collect([str(tmp_path / "other")], "some", add=True)  # to what is there
    first, second = (run["settings"]["seed"] for run in experiment.stored("some")["runs"])
    assert second == first + 1
    for folder, name, message in (
        (tmp_path, "some", "holds no result.json"),
        (whole, "some", "holds a run that is there already"),
        (whole, "../some", "name without a folder"),
    ):
        with pytest.raises(RunError, match=message):
            experiment.collect([str(folder)], name, add=True)
    before = path.read_bytes()

    def full(*_, **options):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match="the disk is full"):
        experiment.collect([str(whole)], "some")
    assert path.read_bytes() == before


def test_what_no_task_draws_keeps_nobody_from_being_drawn(tmp_path, capsys):
    folder = tmp_path / "figures" / "data"
    folder.mkdir(parents=True)
    own = experiment.folder.seal({"kind": "lasso_of_ones_own", "runs": []})
    (folder / "a.json").write_text(json.dumps(own), "utf-8")
    book = Path(bl.__file__).parent.parent / "figures" / "data" / "bench_cpu.json"
    shutil.copy(book, folder)
    assert main(["figures", "--to", str(tmp_path / "figures")]) == 1
    error = capsys.readouterr().err
    assert "a: is of kind 'lasso_of_ones_own'" in error and "(figures drawn here: 1)" in error
    assert (tmp_path / "figures" / "bench_cpu.svg").exists()
