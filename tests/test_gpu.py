"""`make gpu` on the CPU: order, limit, interruption, what a second call does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import book
import gpu
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from bilevel_lite.__main__ import main

STUDY = (
    "solvers --dataset digits --only identity cg-3 --trials 2 --search-steps 4 --outer-steps 120"
    " --looks 12 --seeds 1"
)


def job(tmp_path, what, code, part="bench"):
    return gpu.Job(part, what, [sys.executable, "-c", code], tmp_path / "logs" / f"{what}.log")


def ran(tmp_path, jobs, seconds=60.0):
    """One slot over jobs, a group each; what became of them."""
    slot = gpu.Slot(tmp_path, "cpu", seconds)
    for one in jobs:
        slot.run([one])
    return slot, {one.what: record["status"] for one, record in slot.rows}


def test_what_fails_stops_nothing_and_what_passed_is_skipped(tmp_path, capsys):
    mark = "open({!r}, 'a').write('x')"
    good, bad = tmp_path / "good", tmp_path / "bad"
    jobs = [
        job(tmp_path, "bad", mark.format(str(bad)) + "; raise SystemExit('no room')"),
        job(tmp_path, "good", mark.format(str(good))),
    ]
    for _ in range(2):
        slot, status = ran(tmp_path, jobs)
        assert status == {"bad": "failed", "good": "passed"}
    assert (good.read_text(), bad.read_text()) == ("x", "xx")
    table = gpu.table(slot)
    assert "earlier" in table and "1 failed, 1 passed" in table
    assert f"no room; {tmp_path}/logs/bad.log" in table
    # another device, another record
    other = gpu.Slot(tmp_path, "cuda", 60.0)
    other.run(jobs[1:])
    assert good.read_text() == "xx"


@pytest.fixture
def keyboard():
    """SIGINT as at a terminal: what runs in the background may ignore it, and hands that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_at_the_limit_processes_stop_as_by_the_keyboard_or_are_killed(tmp_path, keyboard):
    """The limit is reached as soon as both are at work, whenever that is."""
    polite = (
        "import time\ntry:\n open({!r}, 'w').close()\n time.sleep(600)\n"
        "except KeyboardInterrupt:\n open({!r}, 'w').close()\n raise SystemExit(130)"
    ).format(str(tmp_path / "a"), str(tmp_path / "stopped"))
    deaf = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'b')!r}, 'w').close()\ntime.sleep(600)"
    )
    slot = gpu.Slot(tmp_path, "cpu", 600.0)
    slot.grace = 10.0
    at_work = (tmp_path / "a", tmp_path / "b")
    slot.over = lambda: all(path.exists() for path in at_work)
    slot.run([job(tmp_path, "polite", polite), job(tmp_path, "deaf", deaf)])
    slot.run([job(tmp_path, "late", "pass")])
    assert {one.what: record["status"] for one, record in slot.rows} == {
        "polite": "cut off", "deaf": "cut off", "late": "not reached",
    }  # fmt: skip
    assert (tmp_path / "stopped").exists()
    records = json.loads((tmp_path / "gpu.json").read_text())
    assert sorted(records) == ["bench: deaf (cpu)", "bench: polite (cpu)"]
    # what was cut off comes first the next time
    order = tmp_path / "order"
    again = "open({!r}, 'a').write({!r})"
    jobs = [job(tmp_path, name, again.format(str(order), name[0])) for name in ("new", "deaf")]
    slot = gpu.Slot(tmp_path, "cpu", 60.0)
    gpu.SIDE_BY_SIDE, before = 1, gpu.SIDE_BY_SIDE
    try:
        slot.run(jobs)
    finally:
        gpu.SIDE_BY_SIDE = before
    assert order.read_text() == "dn" and "2 passed" in gpu.table(slot)


def test_the_order_and_the_processes(tmp_path):
    words = ["--out", str(tmp_path), "--device", "cpu", "--chapters", "0", "--study", STUDY]
    words += ["--study", "run ridge-of-nobody --set rows=60", "--models", "linear"]
    tests, bench, notebooks, study, other = gpu.groups(gpu.read(words))
    files = ["kfac", "parallel", "recorded", "session"]
    assert tests[0].command[-4:] == [f"tests/test_{name}.py" for name in files]
    assert bench[0].command[3:8] == ["bench", "--device", "cpu", "--rounds", "5"]
    assert [one.what for one in notebooks] == ["00_tour", "00_tour_solutions"]
    assert study[0].command[3:] == [
        "study", *STUDY.split(), "--out", str(study[0].results), "--device", "cpu",
    ]  # fmt: skip
    assert other[0].command[3:5] == ["run", "ridge-of-nobody"]
    assert len({group[0].results for group in (bench, study, other)}) == 3
    assert len(gpu.groups(gpu.read(["--device", "cpu"]))[2]) == len(gpu.notebooks(None)) > 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--study", "nothing"], "invalid choice: 'nothing'"),
        (["--study", "solvers --out x"], "its folder is one in --out; leave it out"),
        (["--minutes", "0"], "--minutes: got 0, expected a positive number"),
        (["--device", "gpu"], "--device: got 'gpu', expected for example 'cpu' or 'cuda'"),
    ],
)
def test_bad_input(words, message, capsys):
    with pytest.raises(SystemExit):
        gpu.read(words)
    assert message in capsys.readouterr().err


def test_fresh_removes_only_what_was_made_here(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds no gpu.json"):
        gpu.empty(tmp_path)
    for name in ("gpu.json", "bench-cpu/result.json", "study-solvers/log.jsonl", "logs/a.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    gpu.empty(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def timeless(folder: Path):
    """The numbers of a finished study."""
    result = json.loads((folder / "result.json").read_text())
    for row in result["results"]:
        for run in row["runs"]:
            del run["seconds"]
            for look in [run["best"], run["last"], *run.get("history", [])]:
                del look["seconds"]
    return result["results"]


@pytest.mark.slow
def test_the_whole_of_it_interrupted_in_its_study_and_called_again(tmp_path):
    """Ends with the numbers of a study that was never interrupted."""
    outputs = [new_output("stream", name="stdout", text="42\n")]
    notebook = tmp_path / "tiny.ipynb"
    nb = book.normalise(new_notebook(cells=[new_code_cell("print(6 * 7)", outputs=outputs)]))
    notebook.write_text(book.dumps(nb), encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, gpu.__file__, "--out", str(out), "--device", "cpu", "--study", STUDY]
    command += ["--models", "linear", "--rounds", "1", "--seconds", "0.01", "--no-memory"]
    command += ["--chapters", str(notebook)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not list(out.glob("study-*/identity-0/checkpoint.pt")) and first.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130, said
    last = said.partition("where\n")[2].splitlines()
    assert [row.split()[0] for row in last[1:5]] == ["tests", "bench", "notebook", "study"]
    assert " skipped, " in last[1] or "passed" in last[1]
    assert "passed" in last[2] and "cells: 1 passed" in last[3] and "cut off" in last[4]
    (study,) = out.glob("study-*")
    done = subprocess.run([*command, "--minutes", "5"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("earlier") == 3 and "2 final runs are done" in done.stdout
    words = ["study", *STUDY.split(), "--device", "cpu", "--out", str(tmp_path / "whole")]
    assert main(words) == 0
    assert timeless(study) == timeless(tmp_path / "whole")
    # nothing large is left of the final runs, and collect takes what is there
    assert not list(study.glob("*/*.pt"))
    for folder in (study, out / "bench-cpu"):
        assert f"collect {folder} --name NAME" in done.stdout
        assert main(["collect", str(folder), "--name", "x", "--to", str(tmp_path / "to")]) == 0


def test_make_gpu_passes_its_options_on():
    makefile = (gpu.ROOT / "Makefile").read_text("utf-8")
    assert "\n\t$(BIN)/python tests/gpu.py $(GPU)\n" in makefile
    assert os.access(gpu.__file__, os.R_OK)
