"""Studies slice by slice: in turns, stopped between two iterations, resumed to the same numbers."""

import json
import math
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from scipy import stats
from words import main

from bilevel_lite import plotting
from bilevel_lite.__main__ import draw_stored
from bilevel_lite.experiment import collect, comparing, methods, search, stopping
from bilevel_lite.tasks import cleaning_figures, studies

pytest.importorskip("optuna")

ONLY = ["identity", "kfac", "ekfac-every10", "kfac-every5"]
WORDS = ["study", "resnet18", "--dataset", "digits", "--model", "linear", "--device", "cpu",
         "--trials", "2", "--seeds", "2", "--widen", "1", "--search-steps", "4",
         "--outer-steps", "12", "--looks", "2", "--only", *ONLY]  # fmt: skip


def numbers(folder):
    """The result without times and dates."""
    result = json.loads((folder / "result.json").read_text())
    del result["provenance"], result["sha256"]
    for row in result["results"]:
        for run in row["runs"]:
            del run["seconds"], run["best"]["seconds"], run["last"]["seconds"]
            for line in run["history"]:
                del line["seconds"]
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices") / "whole"
    assert main([*WORDS, "--out", str(folder)]) == 0
    return folder


def slices(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_all_variants_have_the_same_trials_in_turns(whole):
    done = [tuple(row["slice"]) for row in slices(whole)]
    trials = [one for one in done if one[0] == "trial"]
    # a box widened once: two trials in the first box, one in the wider one; every prefix is fair
    assert trials == [("trial", name, k) for k in range(3) for name in ONLY[:3]]
    finals = [one for one in done if one[0] == "final run"]
    # the search's seed 0 is not among those of the final runs; those that follow come last
    assert finals == [
        ("final run", name, seed) for group in (ONLY[:3], ONLY[3:]) for seed in (1, 2)
        for name in group
    ]  # fmt: skip
    assert [one[1:] for one in done if one[0] == "baseline"] == [
        ("noisy", 1), ("validation", 1), ("clean", 1),
    ]  # fmt: skip
    assert set(numbers(whole)["baselines"]) == {"noisy", "validation", "clean"}
    assert all(row["wall"] > 0 and row["done"] for row in slices(whole))


def test_a_winner_on_the_edge_widens_the_box_of_all_and_runs_again(whole):
    rows = {row["method"]: row for row in numbers(whole)["results"]}
    start = {v.name: v.space for v in studies.variants("resnet18", "digits", "linear")}
    sides = set()
    for name in ONLY[:3]:  # who was on the edge after the first two trials, told anew
        best = min(rows[name]["trials"][:2], key=lambda trial: trial["tuning_loss"])
        for setting, (low, high) in start[name].items():
            tenth = (high / low) ** 0.1
            sides |= {(setting, 0)} if best[setting] < low * tenth else set()
            sides |= {(setting, 1)} if best[setting] > high / tenth else set()
    assert sides
    for name in ONLY[:3]:
        for setting, (low, high) in start[name].items():
            now, half = rows[name]["space"][setting], (high / low) ** 0.5
            expected = [low / half if (setting, 0) in sides else low,
                        high * half if (setting, 1) in sides else high]  # fmt: skip
            np.testing.assert_allclose(now, expected, rtol=1e-3)
        tried = [{k: t[k] for k in start[name]} for t in rows[name]["trials"]]
        assert tried[:2] == search._points(start[name], 2)
        assert tried[2:] == search._points(rows[name]["space"], 3)[2:]
        low = min(rows[name]["trials"], key=lambda trial: trial["tuning_loss"])
        assert rows[name]["chosen"] == {k: low[k] for k in start[name]}
        for setting, side in rows[name]["edge"]:  # what is still on an edge is told
            a, b = rows[name]["space"][setting]
            share = math.log(low[setting] / a) / math.log(b / a)
            assert share < 0.1 if side == "low" else share > 0.9


def test_kept_factors_run_at_the_winner_of_kfac(whole):
    rows = {row["method"]: row for row in numbers(whole)["results"]}
    assert rows["kfac-every5"]["chosen"] == rows["kfac"]["chosen"]
    assert rows["kfac-every5"]["trials"] == [] and rows["kfac-every5"]["follows"] == "kfac"
    config = json.loads((whole / "kfac-every5-2" / "config.json").read_text())
    assert config.items() >= {"every": 5, "seed": 2, **rows["kfac"]["chosen"]}.items()
    sizes = {k: v for k, v in config.items() if k.endswith("batch_size")}
    assert sizes == {**dict.fromkeys(sizes, 256), "outer_batch_size": 200}  # all that there are
    for row in rows.values():
        for run in row["runs"]:  # thin histories of every seed, up to the end
            assert [look["iteration"] for look in run["history"]] == [6, 12]
    # a checkpoint of a finished run is of no more use, and may be large
    assert not list(whole.glob("*/checkpoint.pt")) and not (whole / "trials").exists()


def stop_after(monkeypatch, steps, how):
    """Ask to stop in the midst of an iteration, after so many of them."""
    real, taken = methods.build, []

    def build(*arguments):
        method = real(*arguments)
        step = method.step

        def asked():
            taken.append(1)
            if len(taken) == steps:
                how()
            return step()

        method.step = asked
        return method

    monkeypatch.setattr(methods, "build", build)


def test_stopped_and_resumed_it_gives_the_same_numbers(whole, tmp_path, monkeypatch, capsys):
    words = [*WORDS, "--out", str(tmp_path / "run")]
    total = 3 * 3 + 3 + 2 * 4
    asks = [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]
    # in the second trial; in EKFAC's first final run, with factors that are kept; in the last
    points = [6, 30 + 2 * 12 + 9, 12]
    left = []
    for number, steps in zip(asks, points, strict=True):
        with monkeypatch.context() as patch:
            stop_after(patch, steps, lambda number=number: os.kill(os.getpid(), number))
            assert main(words) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"stopped ({number.name}) in ") and " minutes left" in line
        assert line.endswith("the same command goes on")
        left.append(int(line.partition(" runs done")[0].split()[-3]))
    assert left == sorted(left) and left[0] == 1 and left[-1] < total
    stopped = [row for row in slices(tmp_path / "run") if not row["done"]]
    assert [row["slice"][0] for row in stopped] == ["trial", "final run", "final run"]
    assert stopped[1]["slice"][1] == "ekfac-every10" and 0 < stopped[1]["went"] < 12
    assert main([*words, "--status"]) == 0
    assert f"{left[-1]} of {total} runs done (trials 9 of 9, " in capsys.readouterr().out
    assert main(words) == 0
    assert numbers(tmp_path / "run") == numbers(whole)


def test_when_the_time_is_up_it_stops_and_says_what_is_left(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop_after(monkeypatch, 7, lambda: now.__setitem__(0, 121.0))
    words = [*WORDS, "--out", str(tmp_path / "run"), "--minutes", "2"]
    assert main(words) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(
        "stopped (the time is up) in trial of kfac, 0, after iteration 3: 1 of 17 runs done "
        "(trials 1 of 6, baselines 0 of 3, final runs 0 of 8); about 0."
    )
    assert line.endswith(
        "minutes left as measured here, if no box widens; the same command goes on"
    )
    assert main([*words[:-1], "0"]) == 1
    assert "--minutes: got 0.0, expected a positive number" in capsys.readouterr().err


def test_asked_twice_it_ends_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stopping.stoppable() as stop:
        assert stop() == ""
        signal.raise_signal(signal.SIGTERM)
        assert stop() == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    seen = []

    def elsewhere():  # signals go to the main thread only
        with stopping.stoppable(1e-9) as stop:
            seen.append(stop())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == ["the time is up"]


def test_what_is_left_is_told_from_what_was_measured(tmp_path, monkeypatch, capsys):
    """Walls of 2 s an iteration for one variant and 4 s for the other: the rest by hand."""
    with monkeypatch.context() as patch:
        stop_after(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        only = ["--only", "identity", "kfac", "--baselines", "0", "--widen", "0"]
        words = [*WORDS[: WORDS.index("--only")], *only, "--out", str(tmp_path / "run")]
        assert main(words) == 0
    log, seconds = tmp_path / "run" / "log.jsonl", {"identity": 2, "kfac": 4}
    rows, lines = slices(tmp_path / "run"), log.read_text().splitlines()
    assert [(*row["slice"], row["went"]) for row in rows] == [
        ("trial", "identity", 0, 4), ("trial", "kfac", 0, 4), ("trial", "identity", 1, 1),
    ]  # fmt: skip
    for row in rows:
        row["wall"] = seconds[row["slice"][1]] * row["went"]
    # of the same length, by which the checkpoint knows the log
    same = [json.dumps(row).ljust(len(line)) for row, line in zip(rows, lines, strict=True)]
    log.write_text("\n".join(same) + "\n")
    capsys.readouterr()
    assert main([*words, "--status"]) == 0
    # 3 + 2 * 12 iterations of the one, 4 + 2 * 12 of the other
    minutes = (2 * 27 + 4 * 28) / 60
    assert f"2 of 8 runs done (trials 2 of 4, final runs 0 of 4); about {minutes:.1f} minutes" in (
        capsys.readouterr().out
    )


def test_who_only_asks_makes_nothing_and_may_ask_while_it_runs(tmp_path, monkeypatch, capsys):
    words = [*WORDS, "--out", str(tmp_path / "run")]
    assert main([*words, "--status"]) == 0
    assert ": 0 of 17 runs done (" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    said = []

    def ask():
        """In the second trial, by another process."""
        command = [sys.executable, "-m", "bilevel_lite", *words, "--status"]
        before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
        said.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before
        os.kill(os.getpid(), signal.SIGTERM)

    stop_after(monkeypatch, 6, ask)
    assert main(words) == 0
    assert ": 1 of 17 runs done (trials 1 of 6, " in said[0]


def test_the_full_study_is_what_it_says():
    full = studies.variants("resnet18", "cifar10", "resnet18")
    searched = [v.name for v in full if not v.follows]
    assert searched == ["identity", "cg-3", "cg-normal-3", "neumann-10", "kfac", "kfac-empirical",
                        "ekfac-every10"]  # fmt: skip
    boxes = [{k: v.space[k] for k in ("inner_lr", "outer_lr")} for v in full]
    assert all(box == boxes[0] for box in boxes)
    by_name = {v.name: v for v in full}
    assert by_name["neumann-10"].settings["iters"] == 11  # terms: ten products
    assert by_name["cg-normal-3"].settings == {"method": "aid-cg-normal", "iters": 3}
    assert by_name["kfac"].settings == {"method": "aid-kfac"}  # Monte Carlo, fresh factors
    assert [(v.name, v.settings.get("every"), v.settings.get("stem")) for v in full[7:]] == [
        ("kfac-every5", 5, None), ("kfac-every10", 10, None), ("kfac-every50", 50, None),
        ("kfac-cifar-stem", None, "cifar"),
    ]  # fmt: skip
    usual = studies.usual("resnet18")
    assert usual["search_steps"] == usual["outer_steps"] == 1000
    assert studies.usual("long_tail", "digits")["imbalance"] == 20  # the dataset's own
    assert studies.usual("long_tail")["imbalance"] == 100
    assert usual["first_seed"] == 1 and usual["stem"] == "imagenet"
    assert studies.runs("resnet18") == 7 * 8 + 3 + 11 * 3


def test_it_is_collected_and_drawn_with_the_pairs(whole, tmp_path):
    name = "hyperclean_cifar10_resnet18_solvers"
    collect([str(whole)], name, tmp_path)
    (path,) = draw_stored([name], tmp_path)
    assert path == tmp_path / f"{name}.svg" and path.stat().st_size > 10_000
    stored = json.loads((tmp_path / "data" / f"{name}.json").read_text())
    assert stored["runs"][0]["provenance"]["command"].startswith("python -m bilevel_lite")
    fig = cleaning_figures.draw_study(stored)
    pairs, curves, kept = fig.axes
    assert [label.get_text() for label in pairs.get_yticklabels()] == ["identity", "ekfac-every10"]
    rows = {row["method"]: row for row in stored["runs"][0]["results"]}
    losses = {k: [run["best"]["test_loss"] for run in row["runs"]] for k, row in rows.items()}
    points = [line.get_xdata() for line in pairs.lines if len(line.get_xdata()) == 2]
    expected = np.subtract(losses["kfac"], losses["identity"])
    assert any(np.allclose(x, expected, rtol=1e-12) for x in points)
    each, middle, half = comparing.difference(rows["kfac"], rows["identity"])
    interval = stats.ttest_rel(losses["kfac"], losses["identity"]).confidence_interval(0.95)
    np.testing.assert_allclose([middle - half, middle + half], interval, rtol=1e-9)
    np.testing.assert_allclose(each, expected)
    names = [line.get_label() for line in curves.lines if not line.get_label().startswith("_")]
    assert names == ["identity", "ekfac-every10", "kfac"]
    assert sorted(float(c.lines[0].get_xdata()[0]) for c in kept.containers) == [1, 5]
    plotting.plt.close(fig)


def test_a_variant_that_follows_needs_its_leader(tmp_path, capsys):
    words = [*WORDS[: WORDS.index("--only")], "--only", "kfac-every5", "--out", str(tmp_path)]
    assert main(words) == 1
    assert "--only: kfac-every5 runs at the winner of kfac; name that too" in (
        capsys.readouterr().err
    )
    for extra in (["--first-seed", "-1"], ["--widen", "-1"]):
        assert main([*WORDS, *extra, "--out", str(tmp_path / "r")]) == 1
        assert f"{extra[0]}: got -1, expected an integer of at least 0" in capsys.readouterr().err
