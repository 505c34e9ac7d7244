"""The comparison of all methods and the studies: same points for each, resumed to same numbers."""

import base64
import json
import math
import zlib

import pytest
import torch
from words import main

from bilevel_lite import plotting
from bilevel_lite.experiment import job, methods, search
from bilevel_lite.tasks import cleaning_comparison as comparison
from bilevel_lite.tasks import cleaning_figures, studies
from bilevel_lite.tasks import hypercleaning as hc

optuna = pytest.importorskip("optuna")

WORDS = ["hyperclean", "--dataset", "digits", "--device", "cpu", "--method", "aid-identity", "soba",
         "--trials", "3", "--seeds", "2", "--search-budget", "60", "--budget", "120"]  # fmt: skip


def numbers(folder):
    """The result without what may differ: times, dates."""
    result = json.loads((folder / "result.json").read_text())
    del result["provenance"], result["sha256"]
    for row in result["results"]:
        for run in row["runs"]:
            del run["seconds"], run["best"]["seconds"], run["last"]["seconds"]
            for line in run.get("history", []):
                del line["seconds"]
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "whole"
    assert main([*WORDS, "--out", str(folder)]) == 0
    return folder


def test_every_method_has_a_space_and_is_tried_equally_often(whole):
    # dense NHGD keeps a matrix of d x d numbers; KFAC as a preconditioner is for the solvers' study
    assert set(comparison.SPACES) == set(methods.PACKAGE) - {"nhgd", "aid-pcg"}
    for space in comparison.SPACES.values():
        points = search._points(space, 8)
        assert len(points) == 8 and points == search._points(space, 9)[:8]
        for name, (low, high) in space.items():
            values = [math.log(p[name] / low) / math.log(high / low) for p in points]
            assert all(-1e-3 <= v <= 1.001 for v in values)
            # eight points of a Sobol sequence: one in each eighth of every axis
            assert sorted(min(7, int(8 * v)) for v in values) == list(range(8))
    result = numbers(whole)
    for row in result["results"]:
        assert [{k: t[k] for k in row["space"]} for t in row["trials"]] == search._points(
            row["space"], 3
        )
        losses = [t["tuning_loss"] for t in row["trials"] if t["tuning_loss"] is not None]
        best = next(t for t in row["trials"] if t["tuning_loss"] == min(losses))
        assert row["chosen"] == {k: best[k] for k in row["space"]}
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert row["runs"][0]["history"][-1]["gradients"] <= 120 * 1.3


@pytest.mark.parametrize("stop_at", [2, 8])
def test_stopped_anywhere_it_gives_the_same_numbers(whole, tmp_path, monkeypatch, stop_at):
    """Stopped within the search (with a trial under way) and within the final runs."""
    calls, build = [], methods.build

    def stops(*arguments):
        method = build(*arguments)
        calls.append(1)
        if len(calls) == 2 * stop_at:
            step = method.step

            def interrupted():
                if method.iteration == 1:
                    raise KeyboardInterrupt
                return step()

            method.step = interrupted
        return method

    monkeypatch.setattr(methods, "build", stops)
    words = [*WORDS, "--out", str(tmp_path / "run")]
    assert main(words) == 130
    monkeypatch.setattr(methods, "build", build)
    assert main(words) == 0
    assert numbers(tmp_path / "run") == numbers(whole)


def test_divergence_is_a_result_not_an_end(tmp_path, monkeypatch, capsys):
    space = {"inner_lr": (1e20, 1e21), "outer_lr": (1.0, 2.0)}
    monkeypatch.setitem(comparison.SPACES, "soba", {**space, "step": (1e20, 1e21)})
    words = [w if w != "aid-identity" else "aid-kfac" for w in WORDS]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "soba                 diverged in every trial" in capsys.readouterr().out
    row = numbers(tmp_path / "run")["results"][1]
    assert row["runs"] == [] and {t["tuning_loss"] for t in row["trials"]} == {None}
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    plotting.plt.close(cleaning_figures.draw_hyperclean_methods({"runs": [stored]}))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trials", "0"], "trials: got 0, expected at least 1"),
        (["--budget", "-1"], "budget: got -1.0, expected a positive number"),
        (["--inner-lr", "0.1"], "--inner-lr: is chosen by the search, or fixed"),
        (["--seed", "3"], "--seed: is chosen by the search, or fixed"),
    ],
)
def test_bad_input(tmp_path, extra, message, capsys):
    assert main([*WORDS, *extra, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"method: got \['sgd'\], expected 'all' or some of"):
        comparison.run("digits", "linear", ["sgd"], str(tmp_path / "other"))


def test_the_task_is_the_same_for_all(whole):
    assert torch.get_default_dtype() == torch.float64  # the run put it back


# ------------------------------------------------------------------ the studies

SHORT = ["--dataset", "digits", "--device", "cpu", "--trials", "2", "--seeds", "2",
         "--search-steps", "4", "--outer-steps", "8"]  # fmt: skip
ONLY = {
    "solvers": ["identity", "kfac-empirical", "pcg-3"],
    "batch": ["cg-3-b32", "kfac-b32", "kfac-b256"],
    "refresh": ["kfac-every1", "kfac-every5", "ekfac-every1"],
    "ema": ["ema0-damping0.1-b64", "ema0.9-damping0.1-b64", "ema0.9-damping0.1-b64-at0"],
    "noise": ["kfac-uniform-0", "kfac-uniform-0.4", "kfac-pair-0.4"],
}


def test_every_study_covers_what_it_says():
    counts = {name: len(studies.variants(name, "mnist", "mlp")) for name in ONLY}
    assert counts == {"solvers": 18, "batch": 30, "refresh": 8, "ema": 80, "noise": 27}
    for study in ONLY:
        for variant in studies.variants(study, "mnist", "linear"):
            assert set(variant.space) & set(variant.settings) == set(), variant
            # no two variants of a study are the same run
        runs = [
            (str(v.settings), v.space, v.follows) for v in studies.variants(study, "mnist", "mlp")
        ]
        assert all(runs.count(run) == 1 for run in runs)
    names = [v.name for v in studies.variants("solvers", "mnist", "linear")]
    assert "cg-3" in names and not any(name.endswith("-ggn") for name in names)
    steep = {v.name: v.space for v in studies.variants("solvers", "cifar10", "lenet")}
    assert steep["neumann-3"] == {
        "inner_lr": (0.003, 0.3), "outer_lr": (10.0, 1e5), "step": (0.002, 0.3),
    }  # fmt: skip
    sizes = {v.name: v.settings for v in studies.variants("batch", "mnist", "linear")}
    full = [sizes["kfac-b50000"][role] for role in ("batch_size", "outer_batch_size")]
    assert full == [50_000, 5000]  # the whole training set, the whole validation set


def test_a_memory_is_compared_at_one_point_both_ways():
    for dataset, size in (("mnist", 1000), ("digits", 64)):
        found = {v.name: v for v in studies.variants("ema", dataset, "linear")}
        with_ = found[f"ema0.9-damping0.001-b{size}-at0"]
        without = found[f"ema0-damping0.001-b{size}-at0.9"]
        assert (with_.follows, with_.settings["ema"]) == (f"ema0-damping0.001-b{size}", 0.9)
        assert (without.follows, without.settings["ema"]) == (f"ema0.9-damping0.001-b{size}", 0.0)
        assert with_.settings["batch_size"] == without.settings["batch_size"] == size


def test_means_over_the_seeds():
    def run(loss, iteration, seconds):
        return {"best": {"test_loss": loss, "iteration": iteration, "seconds": seconds}}

    row = {"runs": [run(0.25, 10, 20.0), run(0.75, 4, 2.0)]}
    assert hc.mean_test_loss(row) == 0.5
    assert search.pace(row, "seconds") == 1.25  # of 2 and 0.5, not 22 / 14
    assert hc.mean_test_loss({"runs": []}) == math.inf


def test_the_pictures_of_the_noise_study():
    def row(kind, rate, given):
        pixels = torch.arange(3 * 4, dtype=torch.uint8).numpy().tobytes()
        pictures = {"shape": [2, 2], "given": given, "true": [1, 2, 3],
                    "pixels": base64.b64encode(zlib.compress(pixels)).decode()}  # fmt: skip
        settings = {"noise": rate, "noise_kind": kind}
        runs = [{"seed": 0, "surest": pictures}, {"seed": 1}]
        return {"method": f"kfac-{kind}-{rate:g}", "settings": settings, "runs": runs}

    rows = [
        row("uniform", 0.4, [5, 2, 7]),
        row("uniform", 0.6, [5, 6, 7]),
        row("pair", 0.4, [2, 3, 4]),
    ]
    fig = cleaning_figures.draw_noise_surest({"runs": [{"results": rows}]}, columns=4)
    lines = [fig.axes[:4], fig.axes[4:]]
    assert [line[0].texts[0].get_text() for line in lines] == [
        "kfac-uniform-0.4\n2 of 3 wrong", "kfac-pair-0.4\n3 of 3 wrong",
    ]  # fmt: skip
    assert [ax.get_title() for ax in lines[0]] == ["5", "2", "7", ""]
    assert [ax.title.get_color() == "black" for ax in lines[0][:3]] == [True, False, True]
    assert lines[1][2].images[0].get_array().tolist() == [[8, 9], [10, 11]]
    plotting.plt.close(fig)
    with pytest.raises(ValueError, match="rate: got 0.8, expected one of the study's"):
        cleaning_figures.draw_noise_surest({"runs": [{"results": rows}]}, 0.8)
    for alone in (rows[1:2], [row("uniform", 0, [1, 2, 3])]):
        fig = cleaning_figures.draw_noise_surest({"runs": [{"results": alone}]}, columns=4)
        assert fig.axes[0].texts[0].get_text().startswith(alone[0]["method"])
        plotting.plt.close(fig)


@pytest.mark.parametrize("study", sorted(ONLY))
def test_a_study_runs_is_resumed_and_drawn(study, tmp_path, capsys):
    words = ["study", study, *SHORT, "--only", *ONLY[study], "--out", str(tmp_path / "run")]
    assert main(words) == 0
    first = numbers(tmp_path / "run")
    assert [row["method"] for row in first["results"]] == ONLY[study]
    by_name = {v.name: v for v in studies.variants(study, "digits", "linear")}
    for row in first["results"]:
        assert row["settings"] == by_name[row["method"]].settings
        assert row["runs"][0]["history"][-1]["iteration"] == 8
        assert len(row["trials"]) == (0 if "follows" in row else 2)
        assert ["surest" in run for run in row["runs"]] == [study == "noise", False]
        rated = row["settings"].get("noise", 0.5) > 0
        assert all(("precision" in run["best"]) == rated for run in row["runs"])
        stored = json.loads((tmp_path / "run" / f"{row['method']}-0" / "config.json").read_text())
        for key, value in {**row["settings"], **row["chosen"]}.items():
            assert stored[key] == value
    capsys.readouterr()
    # the last variant is run again as if the process had died after the others
    log = tmp_path / "run" / "log.jsonl"
    state = torch.load(tmp_path / "run" / "checkpoint.pt")
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))
    torch.save({**state, "log_bytes": log.stat().st_size}, tmp_path / "run" / "checkpoint.pt")
    assert main(words) == 0
    assert numbers(tmp_path / "run") == first
    fig = cleaning_figures.draw_study(
        {"runs": [json.loads((tmp_path / "run/result.json").read_text())]}
    )
    assert "digits, linear model, 8 of 1000 outer iterations, 2 seeds" in fig.get_suptitle()
    plotting.plt.close(fig)


def test_a_trial_is_the_final_run_judged_by_its_lowest_tuning_loss(tmp_path):
    """Of the same length and seed the two must agree to the last digit."""
    words = ["study", "solvers", *SHORT, "--search-steps", "8", "--only", "kfac", "cg-3"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    for row in numbers(tmp_path / "run")["results"]:
        lowest = min(trial["tuning_loss"] for trial in row["trials"])
        history = [look["tuning_loss"] for look in row["runs"][0]["history"]]
        assert row["runs"][0]["best"]["tuning_loss"] == lowest < max(history)


def test_a_study_without_a_search_runs_at_the_given_values(tmp_path):
    words = ["study", "solvers", *SHORT, "--only", "identity", "cg-3", "--seeds", "1"]
    words += ["--looks", "2", "--at", "inner_lr=0.25", "outer_lr=30", "damping=0.5"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    identity, cg = numbers(tmp_path / "run")["results"]
    for row in (identity, cg):
        assert row["trials"] == [] and row["chosen"] == {}
        assert [look["iteration"] for look in row["runs"][0]["history"]] == [4, 8]
        assert (row["settings"]["inner_lr"], row["settings"]["outer_lr"]) == (0.25, 30)
    assert cg["settings"]["damping"] == 0.5 and "damping" not in identity["settings"]
    stored = json.loads((tmp_path / "run" / "cg-3-0" / "config.json").read_text())
    assert (stored["inner_lr"], stored["outer_lr"], stored["damping"]) == (0.25, 30, 0.5)
    fig = cleaning_figures.draw_study(
        {"runs": [json.loads((tmp_path / "run/result.json").read_text())]}
    )
    assert fig.get_suptitle().endswith("8 of 1000 outer iterations, 1 seed, one setting, no search")
    plotting.plt.close(fig)


def test_a_study_with_other_batch_sizes(tmp_path):
    words = ["study", "solvers", *SHORT, "--only", "kfac", "--seeds", "1"]
    words += ["--at", "inner_lr=0.25", "outer_lr=30", "damping=0.5"]
    sizes = {"outer_batch_size": 150, "cross_batch_size": 300}
    words += ["--sizes", *[f"{role}={size}" for role, size in sizes.items()]]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    stored = json.loads((tmp_path / "run" / "kfac-0" / "config.json").read_text())
    assert stored.items() >= {**sizes, "batch_size": 250, "curvature_batch_size": 250}.items()
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["sizes"] == sizes
    fig = cleaning_figures.draw_study({"runs": [result]})
    assert fig.get_suptitle().endswith("\nouter_batch_size 150, cross_batch_size 300")
    plotting.plt.close(fig)


def test_a_study_keeps_how_often_cg_met_negative_curvature(tmp_path):
    words = ["study", "solvers", *SHORT, "--model", "mlp", "--only", "cg-10", "--seeds", "1"]
    words += ["--at", "inner_lr=0.05", "outer_lr=10", "damping=0.001"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    ((run,),) = [row["runs"] for row in numbers(tmp_path / "run")["results"]]
    log = (tmp_path / "run" / "cg-10-0" / "log.jsonl").read_text().splitlines()
    met = [json.loads(line)["negative_curvature"] for line in log]
    assert len(met) == 8 and run["negative_curvature"] == sum(met) / 8 > 0


def test_a_final_run_that_diverges_is_told_and_the_others_stand(tmp_path, monkeypatch, capsys):
    run_job = job.run_job

    def diverges(s, *arguments, **options):
        if s.seed == 1:
            raise search.NotFinite("AID, step 3: theta is not finite")
        return run_job(s, *arguments, **options)

    monkeypatch.setattr(job, "run_job", diverges)
    words = ["study", "solvers", *SHORT, "--only", "identity", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    (row,) = numbers(tmp_path / "run")["results"]
    assert [run["seed"] for run in row["runs"]] == [0]
    assert row["diverged"] == [{"seed": 1, "why": "AID, step 3: theta is not finite"}]
    assert "(1 of 2 seeds diverged)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["solvers", "--only", "sgd"], "only: solvers has no ['sgd']; expected some of"),
        (
            ["noise", "--outer-steps", "0"],
            "--outer-steps: got 0, expected an integer of",
        ),
        (
            ["noise", "--search-steps", "0"],
            "--search-steps: got 0, expected an integer of",
        ),
        (["batch", "--seeds", "0"], "seeds: got 0, expected an integer of at least 1"),
        (["noise", "--at", "inner_lr"], "at: got 'inner_lr', expected SETTING=NUMBER"),
        (["noise", "--at", "lr=1"], "at: got ['lr'], expected some of ['damping', 'inner_lr',"),
        (["ema", "--at", "inner_lr=1"], "damping0.001-b64 also needs ['outer_lr']"),
        (["noise", "--sizes", "batch_size=big"], "sizes: got 'batch_size=big', expected SETTING="),
        (["noise", "--sizes", "batch=9"], "sizes: got ['batch'], expected some of ['batch_size',"),
        (["batch", "--sizes", "batch_size=9"], "sizes: got ['batch_size'], expected some of [] in"),
        (["noise", "--sizes", "batch_size=.5"], "sizes: got {'batch_size': 0.5}, expected whole"),
        (["noise", "--sizes", "batch_size=inf"], "sizes: got {'batch_size': inf}, expected whole"),
    ],
)
def test_bad_input_of_a_study(tmp_path, words, message, capsys):
    command = ["study", words[0], "--dataset", "digits", *words[1:], "--out", str(tmp_path / "r")]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="study: got 'speed', expected one of"):
        studies.variants("speed", "digits", "linear")


def test_out_of_memory_names_the_batch_to_lower(tmp_path, monkeypatch, capsys):
    def step(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("bilevel_lite.algorithms.aid.AID.step", step)
    words = ["hyperclean", "--dataset", "digits", "--baselines", "0", "--device", "cpu"]
    out = ["--out", str(tmp_path / "a")]
    assert main([*words, *out, "--outer-batch-size", "50", "--cross-batch-size", "60"]) == 1
    assert "out of memory: lower --curvature-batch-size (now 1000)" in capsys.readouterr().err
    smaller = ["--curvature-batch-size", "50"]
    assert main([*words, "--out", str(tmp_path / "b"), *smaller]) == 1
    assert "lower --cross-batch-size (now the whole set)" in capsys.readouterr().err
